"""What fits on which machine: CPUs of a data task, of a worker, of an actor, as plain functions of the machines.

Ray reserves whole shares of a machine and never splits one over two. A reservation that fits the cluster's sum but no
single machine waits for ever, and so does Ray Data where workers have reserved every CPU.
"""

from collections.abc import Sequence
from typing import NamedTuple

# A training process that may use less than this part of a CPU is not worth its memory.
MIN_WORKER_CPU = 0.5


class Machine(NamedTuple):
    """CPUs and GPUs that Ray may use on one machine."""

    cpus: float
    gpus: float = 0.0


def gpu_slots(machines: Sequence[Machine], gpus_per_worker: float = 1.0) -> int:
    """Processes that find a GPU, or `gpus_per_worker` (0 to 1) of one."""
    return sum(_floor(machine.gpus / gpus_per_worker) for machine in machines)


def task_cpus(machines: Sequence[Machine]) -> float:
    """CPUs that a task of Ray Data reserves: 1.0, or 0.5 where whole CPUs might leave it none.

    That is so with a single CPU, and on several machines without GPUs: there, workers of 0.6 would leave 0.4 of a CPU
    on each machine and room for a task on none, and workers of whole CPUs could take all that is left after the loss of
    a machine. With GPUs where a machine has fewer CPUs than GPUs, or no CPU is left once each GPU has a worker.
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
    """The most workers, each with a GPU where there are some, that leave Ray Data room for a task; 0: not even one."""
    task = task_cpus(machines)
    if _is_one(machines):
        by_cpu = _floor((sum(machine.cpus for machine in machines) - task) / MIN_WORKER_CPU)
        return max(0, min(by_cpu, gpu_slots(machines, gpus_per_worker) or by_cpu))
    by_cpu = sum(_floor(machine.cpus / task) for machine in machines) - 1
    if not gpu_slots(machines, gpus_per_worker):
        return max(0, by_cpu)
    with_gpu = sum(min(_floor(one.cpus / task), _floor(one.gpus / gpus_per_worker)) for one in machines)
    return max(0, min(by_cpu, with_gpu))


def worker_cpus(workers: int, machines: Sequence[Machine], gpus_per_worker: float = 1.0) -> float:
    """CPUs to reserve for each of `workers`, so that Ray Data keeps room for a task; 0.0 where they do not fit.

    On one machine 1.0 where there are enough, else the workers share what is left, in tenths, at least MIN_WORKER_CPU:
    training on a CPU uses every core anyway, the reservation only says what Ray Data may not take. On several machines
    as much as a task of Ray Data, so that whatever workers leave, on whichever machine, has room for one. Of more
    workers than GPUs only those count that find one: the others wait for machines to come.
    """
    placed = min(workers, gpu_slots(machines, gpus_per_worker) or workers)
    if placed > most_workers(machines, gpus_per_worker):
        return 0.0
    task = task_cpus(machines)
    if not _is_one(machines):
        return task
    return min(task, _floor(10 * (sum(machine.cpus for machine in machines) - task) / placed) / 10)


def actor_pool(items: int, block: int, machines: Sequence[Machine], use_gpus: bool = True) -> tuple[int, float, int]:
    """The number of actors for `items`, and CPUs and GPUs of each.

    An actor a GPU, on a whole CPU where the GPU's machine has one for it. Without GPUs an actor to each four CPUs (a
    convolution gains little from more threads), with one CPU spared for Ray Data. An actor starts in 4 s, the time of
    some ten images: no more actors than blocks.

    Args:
        items: 1 or more.
        block: items in a block.
        machines: of the cluster.
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
    actors = sum(one // each for one in cpus)
    spare = sum(cpus) - actors * each
    return min(actors if spare else actors - 1, blocks), each, 0


def _is_one(machines: Sequence[Machine]) -> bool:
    """Whether one machine alone has CPUs or GPUs: a head may have been given none."""
    return sum(bool(machine.cpus or machine.gpus) for machine in machines) == 1


def _floor(value: float) -> int:
    """`value` rounded down, where 2.9999999 is 3: reservations are sums of tenths."""
    return int(value + 1e-6)
