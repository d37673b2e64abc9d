"""Ray itself: the session, what fits on its machines, its errors in one line, and its private names in one file.

session           connect to a cluster or start Ray here; run a function over many items
cluster_address   find out within seconds whether a cluster answers
placement         which CPUs and GPUs a task, a worker or an actor may get
data_settings     Ray Data's settings for the datasets of one call
prometheus        metrics that Ray exports to Prometheus
ray_errors        Ray's errors as one line with cause and fix
ray_internals     every private name of Ray that is used, with its reason
"""
