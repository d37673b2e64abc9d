"""`bench`: measure each figure and its baseline in one run. Imported by the command line only.

run                the command: tables, charts and bench.json
figures            repeated measurements, their summaries, ratios and chart
frames             samples in memory, and a torch DataLoader over them as baseline
cost               predicted time of an epoch on a cluster, from measured parts
augment, evaluate, feed, predict, prepare, scale, serve, startup, step, train    one benchmark each: `bench(options)`
"""
