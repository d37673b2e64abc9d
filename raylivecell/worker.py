"""What each training process does: its stream, its network, the loop, and a checkpoint at each report.

Every rank takes every step and every report, so that no collective waits for one that does not come.
"""

import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed
from ray.train import Checkpoint
from ray.util.queue import Queue
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter

from raylivecell import checkpoint, ingest, loop, metrics, segment, shards, storage
from raylivecell.recipe import Recipe

# Seconds between two live progress messages: a remote call each.
TICK_S = 0.5


@dataclass(frozen=True)
class Job:
    """What every worker is told."""

    recipe: Recipe
    data: str
    out: str
    source: ingest.Source
    stream_memory: int
    """Bytes of the object store for the streams of all workers together."""
    progress: Queue
    marks: tuple[tuple[str, float], ...] = ()
    """What the driver had done by when, seconds since 1970."""


def work(config: dict[str, Job]) -> dict[str, Any] | None:
    """The training function of Ray Train; {"step", "samples"} where the loss was not finite, else none."""
    job, entered = config["job"], time.time()
    context = ray.train.get_context()
    rank, ranks = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    _use_threads(context.get_local_world_size(), device)
    last = ray.train.get_checkpoint()
    values, state = checkpoint.load_training(_uri(last)) if last else (None, loop.State())
    batches = ingest.ahead(ingest.stream(job.source, state.step, rank, ranks, job.stream_memory // ranks))
    torch.manual_seed(job.recipe.seed)
    training = loop.start(segment.build(job.recipe, device), job.recipe.optimizer, job.source.plan.steps)
    if values is not None:
        training.load(values, state)
    forward = _wrap(training.model, job.recipe, ranks, device)
    marks = (*job.marks, ("workers", entered), ("network", time.time())) if values is None else ()
    truth = _Validation(job.data, rank, ranks, device)
    try:
        loop.run(
            training,
            forward,
            batches,
            job.source.plan,
            job.recipe.loop,
            job.recipe.loss,
            validate=truth.scores,
            report=_Reporter(job, rank, training.state.step),
            tick=_ticker(job, rank, marks),
            sum_over_ranks=_sum_over_ranks,
        )
    except loop.NonFiniteLoss as error:
        return {"step": error.step, "samples": error.samples}
    return None


def _use_threads(local_ranks: int, device: torch.device) -> None:
    """Share the machine's cores between the training processes on it; a GPU's process needs one for its launches."""
    torch.set_num_threads(1 if device.type == "cuda" else max(1, (os.cpu_count() or 1) // local_ranks))


def _uri(saved: Checkpoint) -> str:
    """The address of a Ray checkpoint as this package's storage reads it."""
    assert saved.filesystem is not None
    kind = saved.filesystem.type_name
    return saved.path if kind == "local" else f"{ {'gcs': 'gs'}.get(kind, kind) }://{saved.path}"


def _wrap(model: nn.Module, recipe: Recipe, ranks: int, device: torch.device) -> nn.Module:
    forward: nn.Module = model
    if ranks > 1:
        forward = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    if recipe.loop.compile:
        forward.compile()
    return forward


def _sum_over_ranks(values: Tensor) -> Tensor:
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        values = values.clone()
        torch.distributed.all_reduce(values)
    return values


def _take_buffers_of_rank_0(network: nn.Module) -> None:
    """Make every rank validate the network that rank 0 saves: each rank's BatchNorm has seen its own images."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        for buffer in network.buffers():
            torch.distributed.broadcast(buffer, 0)


class _Validation:
    """This rank's share of the validation images, whole; sums go over all ranks: none is lost or counted twice."""

    def __init__(self, data: str, rank: int, ranks: int, device: torch.device) -> None:
        self.rows, self.device = shards.list_rows(data, "val")[rank::ranks], device

    def scores(self, network: nn.Module) -> dict[str, float]:
        """`val_dice`, `val_iou` (over all pixels) and `val_mean_image_dice`; {} where there are no such images."""
        network.eval()
        _take_buffers_of_rank_0(network)
        counts = [self._counts(network, row) for row in self.rows]
        table = torch.cat(counts).double() if counts else torch.zeros(0, 4, dtype=torch.float64, device=self.device)
        dice_sum = torch.tensor([sum(metrics.dice(c) for c in table.tolist()), len(table)], dtype=torch.float64)
        sums = _sum_over_ranks(torch.cat([table.sum(0), dice_sum.to(self.device)])).tolist()
        if not sums[5]:
            return {}
        pixels = sums[:4]
        return {
            "val_dice": metrics.dice(pixels),
            "val_iou": metrics.iou(pixels),
            "val_mean_image_dice": sums[4] / sums[5],
        }

    def _counts(self, network: nn.Module, row: shards.Row) -> Tensor:
        sample = shards.read_row(row, ["image", "foreground"])
        image, truth = (torch.from_numpy(sample[name].copy())[None].to(self.device) for name in ("image", "foreground"))
        return metrics.pixel_counts(segment.logits(network, image), truth)


class _Reporter:
    """Tells Ray, the metrics file and TensorBoard of each row of the history; rank 0 saves the checkpoint."""

    def __init__(self, job: Job, rank: int, step: int) -> None:
        self.job, self.rank = job, rank
        self.board_folder = tempfile.mkdtemp(prefix="tensorboard-")
        self.board = SummaryWriter(self.board_folder, purge_step=step or None) if rank == 0 else None

    def __call__(self, training: loop.Training) -> None:
        row = training.state.history[-1]
        if self.rank != 0:
            ray.train.report(row)
            return
        _tell(self.job, {"row": row})
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.save(folder, training.network(), training.state_dict(), training.state, self.job.recipe)
            ray.train.report(row, Checkpoint.from_directory(folder))
        lines = "".join(json.dumps(r) + "\n" for r in training.state.history)
        storage.write_bytes(storage.join(self.job.out, "metrics.jsonl"), lines.encode())
        self._tensorboard(row)

    def _tensorboard(self, row: dict[str, Any]) -> None:
        assert self.board is not None
        for name, value in row.items():
            self.board.add_scalar(name, value, row["step"])
        self.board.flush()
        for name in os.listdir(self.board_folder):
            with open(os.path.join(self.board_folder, name), "rb") as events:
                storage.write_bytes(storage.join(self.job.out, "tensorboard", name), events.read())


def _tell(job: Job, message: dict[str, Any]) -> None:
    """Send a message to the driver without waiting for it."""
    job.progress.actor.put_nowait.remote(message)  # type: ignore[attr-defined]


def _ticker(job: Job, rank: int, marks: Sequence[tuple[str, float]]) -> Callable[[int, float], None]:
    """Rank 0 tells the driver of its steps, and once how long the parts took that lay before the end of the first."""
    last = [0.0]

    def tick(step: int, images_per_s: float) -> None:
        if rank == 0 and time.monotonic() - last[0] > TICK_S:
            if last[0] == 0 and marks:
                done = [*marks, ("first batch and step", time.time())]
                _tell(job, {"start": [(name, end - begin) for (_, begin), (name, end) in itertools.pairwise(done)]})
            last[0] = time.monotonic()
            _tell(job, {"step": step, "images_per_s": images_per_s})

    return tick
