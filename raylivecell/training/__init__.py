"""`train`: the training loop, and Ray Train around it.

1. preflight       checks before the start for conditions that would make a run fail or hang
2. train           the driver: checks, Ray, cached samples, the run, the report
   display         progress on the console
3. ray_train       workers, resources, retries
   job             the recipe, samples and settings that each worker receives
   messages        progress messages from workers to the driver
4. worker          one training process: stream, network, loop, checkpoints
   acceleration    precision and compilation for the hardware
   ranks, gloo     collective operations, and the process group on CPUs
   validation      scores on the validation images
   preemption      checkpoints when a node is about to be removed
5. loop            the training loop, without Ray
"""
