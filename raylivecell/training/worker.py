"""What each training process does: its stream, its network, the loop, and a checkpoint at each report.

Every rank takes every step and every report, so that no collective waits for one that does not come.
"""

import contextlib
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
import ray.train.collective
import ray.train.torch
import torch
import torch.distributed
from ray.train import Checkpoint, PreemptionInfo
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raylivecell.cells import watershed
from raylivecell.ingest import gpu_augment
from raylivecell.ingest import stream as ingest
from raylivecell.ingest.dataset import Samples
from raylivecell.ingest.order import SampleSchedule
from raylivecell.network import forward as segment
from raylivecell.network.transfer import tensors
from raylivecell.recipe import Recipe, Targets
from raylivecell.runs import checkpoint, progress
from raylivecell.runs.run_log import RunLog
from raylivecell.runtime import prometheus
from raylivecell.scoring import instance_scores, pixel_scores
from raylivecell.training import gloo, loop
from raylivecell.training.job import SCORE_COLUMN, Job

# Seconds between two live progress messages: a remote call each.
TICK_S = 1.0
# Seconds between two questions whether a node is about to go away: it has 30 or more; and steps by which that is timed.
ASK_S, PACE_STEPS = 2.0, 5


@dataclass(frozen=True)
class RankContext:
    """A training process among the `ranks` that share each batch."""

    rank: int
    ranks: int
    device: torch.device
    threads: int


def work(job: Job, last: str | None, stream: ingest.Stream) -> dict[str, Any] | None:
    """Train as one of Ray Train's workers; {"step", "samples"} where the loss was not finite, else none.

    Args:
        job: what to train.
        last: URI of the checkpoint to go on from; none: from the start.
        stream: this worker's batches from there on.
    """
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    if not torch.distributed.is_initialized():  # by Ray Train, over NCCL, for GPUs alone
        gloo.join()
    # What this process may use, not what the machine has: a container may be bound to some of its cores.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shared = max(1, cores // context.get_local_world_size())
    place = RankContext(context.get_world_rank(), context.get_world_size(), device, job.threads or shared)
    journal: RunLog | None = None
    try:
        for training in reports(job, place, last, stream):
            row = report_row(training.state, job.plan()) if training.state.reported() else {SCORE_COLUMN: -1.0}
            if place.rank != 0:
                ray.train.report(row)
                continue
            with tempfile.TemporaryDirectory() as folder:
                save(folder, training, job)
                ray.train.report(row, Checkpoint.from_directory(folder))
            if training.state.reported():
                _send_progress(job, {"row": row})
                prometheus.show_run(job.name(), row)
                journal = journal or RunLog(job.out, training.state.step)
                journal.write(training.state.history)
    except loop.NonFiniteLoss as error:
        return {"step": error.step, "samples": error.samples}
    return None


def save(folder: str, training: loop.TrainState, job: Job) -> None:
    """Write a checkpoint of the job's training into `folder`."""
    data, rule = job.samples.provenance, job.samples.intensity
    checkpoint.save(folder, training.network(), training.state_dict(), training.state, job.recipe, data, rule)


def reports(
    job: Job, place: RankContext, last: str | None, stream: ingest.Stream | None = None
) -> Iterator[loop.TrainState]:
    """Train as one of the job's workers; gives the training after each new row of its history.

    Closing it ends the stream of batches too.

    Args:
        job: what to train.
        place: which of the workers this is.
        last: URI of the checkpoint to go on from; none: from the start.
        stream: this worker's batches from there on, closed at the end; default: started here.

    Raises:
        loop.NonFiniteLoss: as `loop.run`.
    """
    entered = time.time()
    # A GPU's process needs one thread, for its launches.
    torch.set_num_threads(1 if place.device.type == "cuda" else place.threads)
    torch.backends.cudnn.benchmark = True  # crops are all of one size: the fastest of cuDNN's ways for it is looked for
    values, state = checkpoint.load_training(last) if last else (None, progress.Progress())
    recipe, plan = job.recipe, job.plan()
    samples = job.samples
    stream = stream or job.stream(state.step, place.rank, place.ranks)
    batches = tensors(stream)
    if recipe.augment.device == "cuda":
        batches = gpu_augment.batches(
            batches, plan, recipe.augment, recipe.crop, place.device, samples.intensity.background_level
        )
    with contextlib.closing(stream):
        torch.manual_seed(recipe.seed)
        training = loop.start(segment.build(recipe, place.device, samples.intensity), recipe.optimizer, plan.steps)
        if values is not None:
            training.load(values, state)
        forward = wrap(training.model, recipe, place.ranks, place.device)
        marks = (*job.marks, ("workers", entered), ("network", time.time())) if values is None else ()
        yield from loop.run(
            training,
            forward,
            batches,
            plan,
            recipe.loop,
            recipe.loss,
            recipe.targets,
            validate=_Validation(job.samples, place, recipe.targets).scores,
            on_step=_ticker(job, place.rank, marks),
            sum_over_ranks=_sum_over_ranks,
            checkpoint_requested=PreemptionCheckpoint(training.state.step) if job.watched else lambda step: False,
        )


def report_row(state: progress.Progress, plan: SampleSchedule) -> dict[str, Any]:
    """The last row of the history, and of the run so far `score` (the best), `steps` (of the whole), `progress`
    (percent) and `training_seconds` (with validation).
    """
    row = state.history[-1]
    seconds = sum(one["seconds"] + one["validation_seconds"] for one in state.history)
    return {
        **row,
        SCORE_COLUMN: progress.validation_score(row),
        "score": max(progress.validation_score(one) for one in state.history),
        "steps": plan.steps,
        "progress": 100 * row["step"] / plan.steps,
        "training_seconds": round(seconds, 2),
    }


def wrap(model: nn.Module, recipe: Recipe, ranks: int, device: torch.device) -> nn.Module:
    """The network as the loop calls it: shared among ranks, compiled, or as it is."""
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


class PreemptionCheckpoint:
    """Asks for a checkpoint at each notice that a node of the run is about to go away (spot instances, drained nodes).

    A notice is a change of the nodes announced or of their deadline: the loss of a second node must not cost the steps
    since the first was announced. Every rank asks at the same steps, as Ray Train requires; each question takes some
    milliseconds, so they are ASK_S apart.
    """

    def __init__(self, start: int) -> None:
        self.start, self.begin = start, time.monotonic()
        self.every: int | None = None
        self.answered: PreemptionInfo | None = None

    def __call__(self, step: int) -> bool:
        """Whether to save a checkpoint now, after `step` steps; the same on every rank."""
        done = step - self.start
        if self.every is None:
            if done < PACE_STEPS:
                return False
            steps_a_second = done / (time.monotonic() - self.begin)
            self.every = ray.train.collective.broadcast_from_rank_zero(max(1, round(ASK_S * steps_a_second)))
        if done % self.every:
            return False
        notice = ray.train.get_preemption_info()
        is_new = notice is not None and notice != self.answered
        self.answered = notice
        return is_new


class _Validation:
    """This rank's share of the validation images, whole; sums go over all ranks: none is lost or counted twice."""

    def __init__(self, samples: Samples, place: RankContext, targets: Targets) -> None:
        self.samples, self.device, self.targets = samples, place.device, targets
        self.share = range(place.rank, len(samples.val), place.ranks)

    def scores(self, network: nn.Module) -> dict[str, float]:
        """`val_dice`, `val_iou` (over all pixels) and `val_mean_image_dice`; {} where there are no such images.

        Where the recipe tells cells apart, `val_msa` too: the mean of the images' mSA.
        """
        network.eval()
        _take_buffers_of_rank_0(network)
        rows = [self._row(network, number) for number in self.share]
        table = torch.tensor(rows, dtype=torch.float64, device=self.device).reshape(len(rows), 7)
        *pixels, dice, msa, images = _sum_over_ranks(table.sum(0)).tolist()
        if not images:
            return {}
        scores = {
            "val_dice": pixel_scores.dice(pixels),
            "val_iou": pixel_scores.iou(pixels),
            "val_mean_image_dice": dice / images,
        }
        return scores if self.targets == "foreground" else scores | {"val_msa": msa / images}

    def _row(self, network: nn.Module, number: int) -> list[float]:
        """Of one image: the four counts of its pixels, Dice, mSA (0 where cells are not told apart), 1."""
        sample = self.samples.val_sample(number)
        logits = segment.logits_of_picture(network, sample.image, sample.padding)
        foreground = torch.from_numpy(sample.truth != 0).to(self.device)
        counts = pixel_scores.pixel_counts(logits[None], foreground[None])[0].tolist()
        msa = 0.0
        if self.targets != "foreground":
            maps = torch.sigmoid(logits).cpu().numpy()
            found = watershed.segment(maps, self.targets, watershed.default(self.targets))
            msa = float(instance_scores.segmentation_accuracy(instance_scores.overlaps(found, sample.truth)).mean())
        return [*counts, pixel_scores.dice(counts), msa, 1]


def _send_progress(job: Job, message: dict[str, Any]) -> None:
    """Send a message to the driver without waiting for it."""
    if job.progress is not None:
        job.progress.send.remote(message)


def _ticker(job: Job, rank: int, marks: Sequence[tuple[str, float]]) -> Callable[[int, float], None]:
    """Rank 0 tells the driver of its steps, and once how long the parts took that lay before the end of the first."""
    last = [0.0]

    def on_step(step: int, images_per_s: float) -> None:
        if rank == 0 and time.monotonic() - last[0] > TICK_S:
            if last[0] == 0 and marks:
                done = [*marks, ("first batch and step", time.time())]
                _send_progress(
                    job, {"start": [(name, end - begin) for (_, begin), (name, end) in itertools.pairwise(done)]}
                )
            last[0] = time.monotonic()
            _send_progress(job, {"step": step, "images_per_s": images_per_s})

    return on_step
