"""Placement: CPUs and GPUs of data tasks, workers and actors, as pure functions of the machines.

Ray never splits a reservation across machines. A reservation that fits the cluster's total but no single machine waits
forever, and so does Ray Data if workers have reserved every CPU.
"""

from collections.abc import Sequence
from typing import NamedTuple

# A training process with a smaller fraction of a CPU is not worth its memory.
MIN_WORKER_CPU = 0.5


class Machine(NamedTuple):
    """CPUs and GPUs of one machine that Ray may use."""

    cpus: float
    gpus: float = 0.0


def gpu_slots(machines: Sequence[Machine], gpus_per_worker: float = 1.0) -> int:
    """Number of processes that can get a GPU, or the fraction `gpus_per_worker` (0 to 1) of one."""
    return sum(_floor(machine.gpus / gpus_per_worker) for machine in machines)


def task_cpus(machines: Sequence[Machine]) -> float:
    """CPUs reserved by a task of Ray Data: 1.0, or 0.5 if reservations of 1.0 could leave it none.

    It is 0.5 with a single CPU, and on several machines without GPUs: there, workers of 0.6 CPUs would leave 0.4 on
    each machine, too little for a task, and workers of 1.0 could use all CPUs that remain after the loss of a machine.
    With GPUs it is 0.5 if a machine has fewer CPUs than GPUs, or if no CPU remains once each GPU has a worker.
    """
    used = [machine for machine in machines if machine.cpus or machine.gpus]
    cpus = sum(_floor(machine.cpus) for machine in used)
    if cpus < 2:
        return 0.5
    if len(used) == 1:
        return 1.0
    gpus = gpu_slots(used)
    enough = all(machine.cpus >= machine.gpus for machine in used if machine.gpus)
    return 1.0 if gpus and enough and cpus > gpus else 0.5


def most_workers(machines: Sequence[Machine], gpus_per_worker: float = 1.0) -> int:
    """Maximum number of workers, each with a GPU if the cluster has any, that leave CPUs for a data task; may be 0."""
    task = task_cpus(machines)
    if _is_single(machines):
        by_cpu = _floor((sum(machine.cpus for machine in machines) - task) / MIN_WORKER_CPU)
        return max(0, min(by_cpu, gpu_slots(machines, gpus_per_worker) or by_cpu))
    by_cpu = sum(_floor(machine.cpus / task) for machine in machines) - 1
    if not gpu_slots(machines, gpus_per_worker):
        return max(0, by_cpu)
    with_gpu = sum(min(_floor(machine.cpus / task), _floor(machine.gpus / gpus_per_worker)) for machine in machines)
    return max(0, min(by_cpu, with_gpu))


def worker_cpus(workers: int, machines: Sequence[Machine], gpus_per_worker: float = 1.0) -> float:
    """CPUs to reserve per worker so that a task of Ray Data still fits; 0.0 if the workers do not fit.

    On one machine: 1.0 if it has enough CPUs; otherwise the workers share those that a task does not need, in tenths,
    at least MIN_WORKER_CPU each. Training on a CPU uses every core anyway; the reservation only limits Ray Data. On
    several machines: the CPUs of a task, so that no machine keeps free CPUs that are too few for a task. If there are
    more workers than GPUs, only workers with a GPU count: the rest wait for new machines.
    """
    active = min(workers, gpu_slots(machines, gpus_per_worker) or workers)
    if active > most_workers(machines, gpus_per_worker):
        return 0.0
    task = task_cpus(machines)
    if not _is_single(machines):
        return task
    return min(task, _floor(10 * (sum(machine.cpus for machine in machines) - task) / active) / 10)


def actor_pool(items: int, block: int, machines: Sequence[Machine], use_gpus: bool = True) -> tuple[int, float, int]:
    """Number of actors for `items`, and CPUs and GPUs of each.

    One actor per GPU, with 1.0 CPU if the machine has one per GPU. Without GPUs one actor per four CPUs (a convolution
    gains little from more threads), and one CPU remains for Ray Data. An actor takes 4 s to start, the time of about
    ten images, so there are at most as many actors as blocks.

    Args:
        items: 1 or more.
        block: items per block.
        machines: the machines of the cluster.
        use_gpus: whether actors may have GPUs.
    """
    blocks = -(-items // block)
    with_gpus = [machine for machine in machines if machine.gpus >= 1 and machine.cpus > 0] if use_gpus else []
    if with_gpus:
        cpus_per_gpu = min(machine.cpus / _floor(machine.gpus) for machine in with_gpus)
        return min(gpu_slots(with_gpus), blocks), max(0.1, _floor(10 * min(1.0, cpus_per_gpu)) / 10), 1
    cpus = [_floor(machine.cpus) for machine in machines if machine.cpus >= 1] or [1]
    if len(cpus) == 1:
        actors = max(1, cpus[0] // 4)
        return min(actors, blocks), max(1, (cpus[0] - 1) // actors), 0
    cpus_per_actor = max(1, min(4, max(cpus) - 1))
    actors = sum(count // cpus_per_actor for count in cpus)
    spare = sum(cpus) - actors * cpus_per_actor
    return min(actors if spare else actors - 1, blocks), cpus_per_actor, 0


def _is_single(machines: Sequence[Machine]) -> bool:
    """Whether only one machine has CPUs or GPUs; a head node may have neither."""
    return sum(bool(machine.cpus or machine.gpus) for machine in machines) == 1


def _floor(value: float) -> int:
    """Round `value` down, but 2.9999999 to 3: reservations are sums of tenths."""
    return int(value + 1e-6)
