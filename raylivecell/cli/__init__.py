"""The command line.

main               commands, exit codes, one-line errors
commands           each command's flags, from the types of its function
recipe_commands    flags of the commands that take a recipe: train, sweep, check
arguments          a command line before it is parsed
demo               `demo`: synth, prepare, train, evaluate, predict
check, probe       `check`: what would fail, found before anything is spent
submit, upload     `submit`: a stage as a job of a cluster
"""
