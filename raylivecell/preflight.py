"""What would fail or hang, told before anything is spent."""

import math

import ray

from raylivecell import runtime, shards
from raylivecell.errors import UserError
from raylivecell.recipe import Recipe

# A training process that may use less than this part of a CPU is not worth its memory.
LEAST_WORKER_CPU = 0.5


def worker_cpus(workers: int, flag: str = "--workers") -> float:
    """CPUs to reserve for each of `workers`, so that Ray Data keeps some: else the run would hang.

    One each where there are enough; on a small machine the workers share what is left (training on a CPU uses every
    core anyway, the reservation only says what Ray Data may not take). On several machines without GPUs as much as a
    task of Ray Data, so that whatever workers leave, on whichever machine, has room for one.

    Args:
        workers: of one run, or of all trials at once.
        flag: what the user sets them by.

    Raises:
        UserError: where a worker would get less than LEAST_WORKER_CPU.
    """
    total, task = ray.cluster_resources().get("CPU", 0), runtime.task_cpus()
    share = min(task, int(10 * (total - task) / workers) / 10)
    if share < LEAST_WORKER_CPU:
        most = int((total - task) / LEAST_WORKER_CPU)
        mend = f"use {flag} {most}" if most >= 1 else "give Ray at least 2 CPUs"
        raise UserError(f"{workers} workers would leave no CPU for Ray Data on {total:g} CPUs; {mend}")
    return share


def state_api() -> None:
    """UserError where Ray's State API gives no answer: Ray Train asks it before it frees a stopped run's workers."""
    from ray.util.state import list_nodes  # 0.2 s of the start of every run that asks nothing

    try:
        list_nodes(limit=1, timeout=20)
    except Exception as error:  # of its own, of the network, of two clusters on one machine
        told = str(error).splitlines()[0][:200]
        raise UserError(
            f"Ray's State API gives no answer ({told}): trials of several workers that are stopped early would keep "
            "their CPUs; start Ray with its dashboard and set RAY_ADDRESS, or use --sweep.no-early-stopping"
        ) from error


def batch_divides(batch_size: int, workers: int | tuple[int, int]) -> None:
    """UserError unless every worker can take an equal share of each batch."""
    counts = [workers] if isinstance(workers, int) else range(workers[0], workers[1] + 1)
    wrong = [count for count in counts if batch_size % count]
    if wrong:
        raise UserError(
            f"a batch of {batch_size} cannot be shared equally by {wrong[0]} workers; "
            f"set batch_size to a multiple of {math.lcm(*counts)}, or change --workers"
        )


def samples_fit(data: str, recipe: Recipe) -> None:
    """UserError where there is nothing to train on, or images of several sizes that would have to share a batch."""
    if not shards.list_rows(data, "train"):
        raise UserError(f"dataset at {data} has no training images; its train split is empty")
    sizes = len(shards.image_sizes(data, "train"))
    if sizes > 1 and recipe.crop is None:
        raise UserError(f"images of {sizes} sizes in {data}/train cannot share a batch; set the recipe's crop")
    if sizes > 1 and recipe.augment.device == "cuda":
        raise UserError(
            f"images of {sizes} sizes in {data}/train cannot be sent to a GPU whole; set augment.device: cpu"
        )


def transforming_device(recipe: Recipe) -> None:
    """UserError where the recipe transforms samples on GPUs and the cluster has none."""
    if recipe.augment.device == "cuda" and not ray.cluster_resources().get("GPU", 0):
        raise UserError("augment.device is cuda, and this cluster has no GPU; set augment.device: cpu")


def network(recipe: Recipe) -> str | None:
    """A line about a network of MONAI, None for our U-Net; UserError where it does not take the recipe's options.

    In the driver, before anything is written: MONAI and torch take 5 s to import, our U-Net needs neither here.
    """
    if recipe.model.name == "unet":
        return None
    from raylivecell import monai_networks

    return monai_networks.describe(recipe.model.name, recipe.model.options, recipe.outputs)
