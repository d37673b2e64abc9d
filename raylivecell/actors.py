"""A function with a costly start (a network to load) over many items: Ray Data with a pool of actors.

Every item comes back exactly once, or the run fails.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import ray
import ray.data

from raylivecell import placement, preflight, runtime
from raylivecell.data_settings import data_settings, quiet_data
from raylivecell.errors import UserError
from raylivecell.progress import track

Row = dict[str, Any]
# Items in a block: enough to hide Ray Data's 10 ms a task, few enough to spread small sets and show progress.
BLOCK = 8


def run(actor: type, arguments: dict[str, Any], items: Sequence[Any], what: str, use_gpus: bool = True) -> list[Row]:
    """A row for each of `items`, in their order.

    Args:
        actor: a class made with `arguments`; called with {"item": array} it gives columns, "item" among them.
        arguments: of the class.
        items: distinct ints or strings.
        what: shown while it runs.
        use_gpus: one an actor, where there are some.

    Raises:
        RuntimeError: if a result is lost or doubled.
        UserError: as raised in an actor.
    """
    count, cpus, gpus = placement.actor_pool(len(items), BLOCK, runtime.machines(), use_gpus)
    # The index lies in the object store already: no read task competes with the actors for the CPUs.
    blocks = min(len(items), max(count, -(-len(items) // BLOCK)))
    with data_settings():
        dataset = ray.data.from_items([{"item": item} for item in items], override_num_blocks=blocks)
    results = dataset.map_batches(
        actor,
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(size=count),
        fn_constructor_kwargs=arguments,
        num_cpus=cpus,
        num_gpus=gpus,
    )
    with quiet_data():
        rows = list(track(_rows(results), what, len(items)))
    place = {item: i for i, item in enumerate(items)}
    rows.sort(key=lambda row: place[row["item"]])
    if [row["item"] for row in rows] != list(items):
        raise RuntimeError(f"{what}: {len(rows)} results for {len(items)} images: some are lost or doubled")
    return rows


def use_threads(with_torch: bool = True) -> None:
    """In an actor: as many torch threads as it has CPUs, and one for the spared CPU; OpenCV without its own.

    UserError where Ray gives it a GPU that torch does not see: it would silently run on CPUs.
    """
    cv2.setNumThreads(1)
    if with_torch:
        import torch

        if ray.get_gpu_ids() and not torch.cuda.is_available():
            raise UserError(preflight.blind_gpu(ray.util.get_node_ip_address()))
        cpus = int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))
        torch.set_num_threads(min(cpus + 1, os.cpu_count() or 1))


def columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Rows of the same keys as what an actor gives back for a block."""
    return {name: [row[name] for row in rows] for name in rows[0]}


def _rows(results: ray.data.Dataset) -> Iterator[Row]:
    """The rows as they come; a user's mistake found in an actor is raised as itself."""
    try:
        yield from results.iter_rows()
    except ray.exceptions.RayError as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, UserError) and not isinstance(cause, ray.exceptions.RayError):
                raise cause from None
            cause = getattr(cause, "cause", None) or cause.__cause__
        raise
