"""The folder of a run: its recipe, log and checkpoints on storage. No Ray.

folder             create a run's folder, or check that it can be resumed
progress           steps and metrics of a run; its complete, latest and best checkpoints
parents            the checkpoints from which the training of a network started
teachers           the network whose maps a training learns
distillation       open a teacher, and load it in a worker
start_from         load the weights of another network where the shapes fit
checkpoint         weights and recipe as plain files, loaded without executing code
run_log            metrics.jsonl and TensorBoard events
"""
