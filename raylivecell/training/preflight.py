"""Checks before a run starts for conditions that would make it fail or hang later."""

import math
import os
import shutil
import sys
import sysconfig
from pathlib import Path

import ray

from raylivecell.core.errors import UserError
from raylivecell.data import combined, shards
from raylivecell.data.combined import Data
from raylivecell.ingest.order import SampleSchedule
from raylivecell.recipe import Recipe
from raylivecell.runtime import placement, session

# Time limit for a task on the cluster that checks for a compiler or a GPU, process start included.
PROBE_S = 60.0


def worker_cpus(workers: int, flag: str = "--workers", gpus_per_worker: float = 1.0) -> float:
    """CPUs to reserve for each worker. Some stay free for Ray Data, without which the run would hang.

    Args:
        workers: number of workers in one run, or in all concurrent trials.
        flag: the command-line option for `workers`.
        gpus_per_worker: GPUs of each worker, on a cluster with GPUs.

    Raises:
        UserError: the workers leave no CPU for Ray Data.
    """
    machines = session.machines()
    cpus = placement.worker_cpus(workers, machines, gpus_per_worker)
    if not cpus:
        total, most = sum(machine.cpus for machine in machines), placement.most_workers(machines, gpus_per_worker)
        hint = f"use {flag} {most}" if most >= 1 else "give Ray at least 1 CPU on each machine with a GPU, and 1 more"
        raise UserError(f"{workers} workers would leave no CPU for Ray Data on {total:g} CPUs; {hint}")
    return cpus


def worker_gpus(workers: int | tuple[int, int]) -> float:
    """GPUs per worker: 1 on a cluster with GPUs, else 0; UserError for fewer GPUs than the minimum of workers."""
    minimum = workers if isinstance(workers, int) else workers[0]
    gpus = placement.gpu_slots(session.machines())
    if 0 < gpus < minimum:
        hint = f"use --workers {gpus}, or set CUDA_VISIBLE_DEVICES= to train on CPUs"
        raise UserError(f"{minimum} workers, but {gpus} GPUs; {hint}")
    return 1.0 if gpus else 0.0


def demo_workers(batch_size: int, at_most: int = 2) -> int:
    """Workers for a small run on any cluster: the most that fit and divide the batch equally."""
    machines = session.machines()
    most = min(at_most, placement.gpu_slots(machines) or at_most, placement.most_workers(machines))
    return next((count for count in range(most, 1, -1) if batch_size % count == 0), 1)


def state_api() -> None:
    """Check that Ray's State API answers: Ray Train needs it to free the workers of a stopped run."""
    from ray.util.state import list_nodes  # 0.2 s to import: not for runs that skip this check

    try:
        list_nodes(limit=1, timeout=20)
    except Exception as error:  # errors of Ray or the network, or two clusters on one machine
        reason = str(error).splitlines()[0][:200]
        raise UserError(
            f"Ray's State API does not respond ({reason}): trials of several workers that are stopped early would keep "
            "their CPUs; start Ray with its dashboard and set RAY_ADDRESS, or use --sweep.no-early-stopping"
        ) from error


def batch_divides(batch_size: int, workers: int | tuple[int, int], flag: str = "--workers") -> None:
    """Check that the workers divide each batch equally; `flag` is the command-line option for `workers`."""
    counts = [workers] if isinstance(workers, int) else range(workers[0], workers[1] + 1)
    indivisible = [count for count in counts if batch_size % count]
    if indivisible:
        raise UserError(
            f"a batch of {batch_size} cannot be divided equally among {indivisible[0]} workers; "
            f"set batch_size to a multiple of {math.lcm(*counts)}, or change {flag}"
        )


def samples_fit(data: Data, recipe: Recipe) -> None:
    """Check that each dataset has training images, and that the recipe allows their sizes in one batch."""
    for uri in combined.uris(data):
        if not shards.list_rows(uri, "train"):
            raise UserError(f"dataset at {uri} has no training images; its train split is empty")
    if not isinstance(data, str):
        _check_draws(data, recipe)
    sizes = len(combined.image_sizes(data, "train"))
    if sizes > 1 and recipe.crop is None:
        raise UserError(f"images of {sizes} sizes in {data}/train cannot share a batch; set the recipe's crop")
    if sizes > 1 and recipe.augment.device == "cuda":
        raise UserError(
            f"images of {sizes} sizes in {data}/train cannot be augmented on a GPU; set augment.device: cpu"
        )


def teacher(data: Data, recipe: Recipe, has_teacher: bool) -> None:
    """Check that the recipe uses a teacher if the run has one, and the reverse; images without annotations need one."""
    weight = recipe.distillation.weight
    if has_teacher and not weight:
        raise UserError("distillation.weight is 0, so the teacher would be ignored; set it, or leave out --teacher")
    if weight and not has_teacher:
        raise UserError(
            f"distillation.weight is {weight:g}, but there is no teacher; give `train --teacher CHECKPOINT` (a "
            "sweep has none), or set it to 0"
        )
    unlabelled = [uri for uri in combined.uris(data) if not shards.labelled(uri)]
    if unlabelled and not has_teacher:
        raise UserError(
            f"dataset at {unlabelled[0]} has no annotations, so that nothing can be learned from it without a teacher; "
            "give `train --teacher CHECKPOINT`, or leave it out"
        )
    if len(unlabelled) < len(combined.uris(data)) and combined.uris(data)[0] in unlabelled:
        raise UserError(f"dataset at {unlabelled[0]} has no annotations; give --data of an annotated dataset first")


def _check_draws(data: combined.Datasets, recipe: Recipe) -> None:
    """Check that the weights of the datasets give each at least one sample in an epoch."""
    samples, datasets = len(combined.list_rows(data, "train")), combined.sample_counts(data, "train")
    schedule = SampleSchedule(recipe.seed, samples, recipe.batch_size, recipe.phases, datasets)
    draws = [schedule.draws(phase) for phase in recipe.phases] if datasets else []
    for uri, counts in zip(data.uris, zip(*draws)):
        if not all(counts):
            raise UserError(f"the weight of {uri} gives it less than one of an epoch's samples; raise it")


def network(recipe: Recipe) -> str | None:
    """Describe a MONAI network in one line, None for our U-Net; UserError if it rejects the recipe's options.

    Runs in the driver, before anything is written. Importing MONAI and torch takes 5 s; our U-Net needs neither here.
    """
    if recipe.model.name == "unet":
        return None
    from raylivecell.network import monai_networks

    return monai_networks.describe(recipe.model.name, recipe.model.options, recipe.outputs)


def hardware(recipe: Recipe) -> None:
    """Check that the cluster has the GPU or the compiler that the recipe needs."""
    if not placement.gpu_slots(session.machines()):
        if recipe.augment.device == "cuda":
            raise UserError("augment.device is cuda, but this cluster has no GPU; set augment.device: cpu")
        if recipe.model.norm == "sync_batch":
            raise UserError(
                "model.norm is sync_batch, which torch supports on GPUs only, but this cluster has none; set "
                "model.norm: group, whose result does not depend on the number of workers, or batch"
            )
    if recipe.loop.compile is True:
        _check_compiler()


def _check_compiler() -> None:
    """Check that a task on the cluster finds the compiler that torch.compile starts."""
    gpu = bool(placement.gpu_slots(session.machines()))
    task = ray.remote(num_cpus=0, num_gpus=0.01 if gpu else 0)(find_compiler)
    try:
        compiler = ray.get(task.remote(gpu), timeout=PROBE_S)
    except ray.exceptions.GetTimeoutError:  # the GPUs are busy: the run will wait for them too
        return
    if not compiler:
        names = "gcc" if gpu else "g++"
        raise UserError(
            f"loop.compile needs a compiler and Python's header files on each machine; install {names} and "
            "python3-dev, or set loop.compile: false (as a flag --loop.compile False)"
        )


def find_compiler(gpu: bool) -> str | None:
    """The compiler on this machine for torch.compile: Triton's C compiler for GPUs, else torch's for C++.

    None without one, or without Python's header files, which the compiled code includes.
    """
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return None
    if gpu:
        names = [os.environ.get("CC", ""), "clang", "gcc", "cc"]
    else:
        names = [os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")]
    return next((name for name in names if name and shutil.which(name.split()[0])), None)


def gpus_work() -> None:
    """Check on one machine that torch sees the GPU that Ray assigns; the command `check` does so on all machines.

    It does not if torch is built for CPUs only, on a machine with an NVIDIA driver; workers would fail at their first
    kernel, after the samples were decoded.
    """
    if not placement.gpu_slots(session.machines()):
        return
    task = ray.remote(num_cpus=0, num_gpus=1, max_retries=0)(_blind_address)
    try:
        address = ray.get(task.remote(), timeout=PROBE_S)
    except ray.exceptions.GetTimeoutError:  # the GPUs are busy: the run will wait for them too
        return
    if address:
        raise UserError(blind_gpu(address))


def _blind_address() -> str | None:
    """This machine's address if torch sees no GPU."""
    import torch

    return None if torch.cuda.is_available() else ray.util.get_node_ip_address()


def blind_gpu(address: str) -> str:
    """Error message for a machine whose GPU torch does not see, with the fix."""
    return (
        f"Ray has a GPU on {address}, but torch sees none; install torch for CUDA there and check the driver, or set "
        "CUDA_VISIBLE_DEVICES= (on a cluster: start Ray with --num-gpus=0) to use CPUs"
    )
