"""`bench`: each figure compared with its baseline in one run. Imported by the command line only.

run                the command: tables, charts and bench.json
chart, spread      how repeated measurements are shown
frames             samples in memory, and the baseline's loader
cost               what an epoch costs on a cluster, from measured parts
augment, evaluate, feed, predict, prepare, scale, startup, step, train    one benchmark each
"""
