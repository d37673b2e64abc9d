"""Ray: session, placement on machines, metrics, errors in one line, and all uses of Ray's private names.

session           join a cluster or start Ray locally; map a function over many items
cluster_address   check within seconds whether a cluster answers
placement         CPUs and GPUs of a task, a worker or an actor
data_settings     Ray Data's settings for the datasets of one call
prometheus        metrics that Ray exports to Prometheus
ray_errors        Ray's errors as one line with cause and fix
ray_internals     every private name of Ray that is used, with the reason
"""
