"""The folder of a run: its recipe, log and checkpoints on storage. No Ray.

folder             start a run's folder, or check that it may be resumed
progress           how far the run has come; which checkpoints are complete, the latest, the best
checkpoint         weights and recipe as plain files, nothing in them executed
run_log            metrics.jsonl and TensorBoard's events
"""
