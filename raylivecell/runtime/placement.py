"""Placement: CPUs and GPUs of data tasks, workers and actors, as plain functions of the machines.

Ray never splits a reservation over machines. A reservation that fits the cluster's total but no single machine waits
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
    """CPUs reserved by a task of Ray Data: 1.0, or 0.5 if whole CPUs could leave it none.

    It is 0.5 with a single CPU, and on several machines without GPUs: there, workers of 0.6 would leave 0.4 of a CPU on
    each machine, too little for a task, and workers of whole CPUs could use all that remain after the loss of a
    machine. With GPUs it is 0.5 if a machine has fewer CPUs than GPUs, or no CPU remains once each GPU has a worker.
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
    """Most workers, each with a GPU if there are any, that leave Ray Data the CPUs for a task; may be 0."""
    task = task_cpus(machines)
    if _is_one(machines):
        by_cpu = _floor((sum(machine.cpus for machine in machines) - task) / MIN_WORKER_CPU)
        return max(0, min(by_cpu, gpu_slots(machines, gpus_per_worker) or by_cpu))
    by_cpu = sum(_floor(machine.cpus / task) for machine in machines) - 1
    if not gpu_slots(machines, gpus_per_worker):
        return max(0, by_cpu)
    with_gpu = sum(min(_floor(machine.cpus / task), _floor(machine.gpus / gpus_per_worker)) for machine in machines)
    return max(0, min(by_cpu, with_gpu))


def worker_cpus(workers: int, machines: Sequence[Machine], gpus_per_worker: float = 1.0) -> float:
    """CPUs to reserve per worker so that a task of Ray Data still fits; 0.0 if `workers` do not fit.

    On one machine: 1.0 if there are enough, else the workers share the rest, in tenths, at least MIN_WORKER_CPU each.
    Training on a CPU uses every core anyway; the reservation only limits Ray Data. On several machines: as much as a
    task of Ray Data, so that a task fits into any CPUs that workers leave on any machine. If there are more workers
    than GPUs, only those with a GPU count: the others wait for new machines.
    """
    active = min(workers, gpu_slots(machines, gpus_per_worker) or workers)
    if active > most_workers(machines, gpus_per_worker):
        return 0.0
    task = task_cpus(machines)
    if not _is_one(machines):
        return task
    return min(task, _floor(10 * (sum(machine.cpus for machine in machines) - task) / active) / 10)


def actor_pool(items: int, block: int, machines: Sequence[Machine], use_gpus: bool = True) -> tuple[int, float, int]:
    """Number of actors for `items`, and CPUs and GPUs of each.

    One actor per GPU, with a whole CPU if the machine has one per GPU. Without GPUs one actor per four CPUs (a
    convolution gains little from more threads), and one CPU is left for Ray Data. An actor takes 4 s to start, as long
    as some ten images, so there are no more actors than blocks.

    Args:
        items: 1 or more.
        block: items per block.
        machines: the machines of the cluster.
        use_gpus: whether actors may have GPUs.
    """
    blocks = -(-items // block)
    with_gpus = [machine for machine in machines if machine.gpus >= 1 and machine.cpus > 0] if use_gpus else []
    if with_gpus:
        share = min(machine.cpus / _floor(machine.gpus) for machine in with_gpus)
        return min(gpu_slots(with_gpus), blocks), max(0.1, _floor(10 * min(1.0, share)) / 10), 1
    cpus = [_floor(machine.cpus) for machine in machines if machine.cpus >= 1] or [1]
    if len(cpus) == 1:
        actors = max(1, cpus[0] // 4)
        return min(actors, blocks), max(1, (cpus[0] - 1) // actors), 0
    each = max(1, min(4, max(cpus) - 1))
    actors = sum(count // each for count in cpus)
    spare = sum(cpus) - actors * each
    return min(actors if spare else actors - 1, blocks), each, 0


def _is_one(machines: Sequence[Machine]) -> bool:
    """Whether only one machine has CPUs or GPUs; a head may have none."""
    return sum(bool(machine.cpus or machine.gpus) for machine in machines) == 1


def _floor(value: float) -> int:
    """Round `value` down, with 2.9999999 as 3: reservations are sums of tenths."""
    return int(value + 1e-6)
