"""The command line.

main               commands, exit codes, one-line errors
commands           flags of each command, from the signature of its function
recipe_commands    flags of the commands that have a recipe: train, sweep, check
arguments          parsing of arguments; --recipe, --resume, --workers
demo               `demo`: synth, prepare, train, evaluate, predict
check, probe       `check`: find what would fail before a run starts
submit, upload     `submit`: run a stage as a job on a cluster
"""
