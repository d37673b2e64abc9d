"""`train`: the loop, and Ray Train around it.

1. preflight       what would fail or hang, found before the start
2. train           the driver: checks, Ray, cached samples, the run, the report
   display         what the console shows meanwhile
3. ray_train       workers, resources, retries
   job             what each worker is given
   gloo, messages  how workers form a group, and report to the driver
4. worker          one training process: stream, network, loop, checkpoints
5. loop            the training loop: no Ray, no command line
"""
