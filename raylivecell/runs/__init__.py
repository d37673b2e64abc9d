"""The folder of a run: its recipe, log and checkpoints on storage. No Ray.

folder             create a run's folder, or check that it can be resumed
progress           steps and metrics of a run; its complete, latest and best checkpoints
checkpoint         weights and recipe as plain files, loaded without executing code
run_log            metrics.jsonl and TensorBoard events
"""
