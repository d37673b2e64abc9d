"""Batch inference on Ray Data: a pool of actors, each with the network loaded once, maps items to rows.

Every item has exactly one row, or the run fails.
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import ray
import ray.data
from ray.util.annotations import RayDeprecationWarning

from raylivecell.core.console import track
from raylivecell.core.errors import UserError
from raylivecell.runtime import placement, session
from raylivecell.runtime.data_settings import data_settings, quiet_data
from raylivecell.runtime.ray_errors import as_user_errors
from raylivecell.training import preflight

Row = dict[str, Any]
# Items per block: enough to hide Ray Data's 10 ms per task, few enough to spread small inputs and show progress.
BLOCK = 8
# The run fails after this number of consecutive pools that lost an actor before any result.
MAX_FAILURES = 3

Pool = tuple[int, float, int]
"""Number of actors; CPUs and GPUs of each."""


def run(actor: type, arguments: dict[str, Any], items: Sequence[Any], what: str, use_gpus: bool = True) -> list[Row]:
    """Compute a row for each of `items`, in their order.

    Args:
        actor: a class whose instances map {"item": array} to columns, including "item".
        arguments: arguments of its constructor.
        items: distinct ints or strings.
        what: title of the progress display.
        use_gpus: one GPU per actor, if the cluster has any.

    Raises:
        RuntimeError: a result is missing or duplicated.
        UserError: as raised in an actor.
    """
    resources = placement.actor_pool(len(items), BLOCK, session.machines(), use_gpus)
    position = {item: i for i, item in enumerate(items)}
    with as_user_errors(), quiet_data():
        rows = list(track(_every_row(actor, arguments, items, resources), what, len(items)))
    rows.sort(key=lambda row: position[row["item"]])
    if [row["item"] for row in rows] != list(items):
        raise RuntimeError(f"{what}: {len(rows)} results for {len(items)} images: some are missing or duplicated")
    return rows


def _every_row(actor: type, arguments: dict[str, Any], items: Sequence[Any], resources: Pool) -> Iterator[Row]:
    """Rows in order of completion; if an actor dies, a new pool computes the remaining items."""
    remaining, failures = dict.fromkeys(items), 0
    while remaining:
        try:
            for row in _rows(actor, arguments, list(remaining), resources):
                remaining.pop(row["item"], None)
                failures = 0
                yield row
            return
        except ray.exceptions.RayActorError:
            failures += 1
            if failures == MAX_FAILURES:
                raise


def _rows(actor: type, arguments: dict[str, Any], items: Sequence[Any], resources: Pool) -> Iterator[Row]:
    yield from _results(actor, arguments, items, resources).iter_rows()


def _results(actor: type, arguments: dict[str, Any], items: Sequence[Any], resources: Pool) -> ray.data.Dataset:
    """Return the dataset whose rows the actors compute once it is read."""
    count, cpus, gpus = resources
    # The items are in the object store already: no read task competes with the actors for CPUs.
    blocks = min(len(items), max(count, -(-len(items) // BLOCK)))
    with data_settings():
        dataset = ray.data.from_items([{"item": item} for item in items], override_num_blocks=blocks)
    with warnings.catch_warnings():
        # Ray 2.60 has no other way to pass max_restarts; Ray 2.64 removes this one.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        return dataset.map_batches(
            actor,
            batch_size=1,  # Ray requires a number for actors with GPUs; a larger one would join small blocks
            compute=ray.data.ActorPoolStrategy(size=count),
            fn_constructor_kwargs=arguments,
            num_cpus=cpus,
            num_gpus=gpus,
            # Ray's restart needs the constructor's arguments, which may no longer exist (ray #53727, #57733: an error
            # line in each run); `_every_row` starts a new pool instead.
            ray_remote_args_fn=lambda: {"max_restarts": 0, "max_task_retries": 0},
        )


def use_threads(with_torch: bool = True) -> None:
    """Set an actor's threads: torch's to its CPUs plus the one that is kept free, OpenCV's to one.

    Raises:
        UserError: Ray assigns a GPU that torch does not see; the actor would silently run on CPUs.
    """
    cv2.setNumThreads(1)
    if with_torch:
        import torch

        if ray.get_gpu_ids() and not torch.cuda.is_available():
            raise UserError(preflight.blind_gpu(ray.util.get_node_ip_address()))
        cpus = int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))
        torch.set_num_threads(min(cpus + 1, os.cpu_count() or 1))


def columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Convert rows with the same keys to the columns that an actor returns for a block."""
    return {name: [row[name] for row in rows] for name in rows[0]}
