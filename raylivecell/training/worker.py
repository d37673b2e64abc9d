"""A training process: its stream, its network, the loop, and a checkpoint at each report.

Every rank runs every step and every report, so that no collective operation waits for a missing rank.
"""

import contextlib
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed
from ray.train import Checkpoint
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from raylivecell.ingest import gpu_augment
from raylivecell.ingest.order import SampleSchedule
from raylivecell.ingest.stream import Stream
from raylivecell.network.forward import build
from raylivecell.network.transfer import tensors
from raylivecell.network.unet import UNet
from raylivecell.runs import checkpoint, distillation, parents, progress, start_from, teachers
from raylivecell.runs.run_log import RunLog
from raylivecell.runtime import prometheus
from raylivecell.training import acceleration, gloo, loop, preflight
from raylivecell.training.job import SCORE_COLUMN, TrainJob
from raylivecell.training.preemption import PreemptionCheckpoint
from raylivecell.training.ranks import RankContext, sum_over_ranks
from raylivecell.training.validation import Validation

# Seconds between two progress messages: a remote call each.
MESSAGE_INTERVAL_S = 1.0


def run_worker(job: TrainJob, resume_from: str | None, stream: Stream) -> dict[str, Any] | None:
    """Train as one of Ray Train's workers; returns {"step", "samples"} of a non-finite loss, else None.

    Args:
        job: recipe, samples and settings.
        resume_from: URI of the checkpoint to resume from; None: start a new run.
        stream: this worker's batches, starting at that checkpoint's step.
    """
    ray_context = ray.train.get_context()
    device = ray.train.torch.get_device()
    if not torch.distributed.is_initialized():  # Ray Train forms the group for GPUs only, over NCCL
        gloo.join_process_group()
    # Cores available to this process: a container may be restricted to some of the machine's.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = job.threads or max(1, cores // ray_context.get_local_world_size())
    context = RankContext(ray_context.get_world_rank(), ray_context.get_world_size(), device, threads)
    run_log: RunLog | None = None
    try:
        for training in reports(job, context, resume_from, stream):
            row = report_row(training.state, job.schedule()) if training.state.reported() else {SCORE_COLUMN: -1.0}
            if context.rank != 0:
                ray.train.report(row)
                continue
            with tempfile.TemporaryDirectory() as folder:
                save(folder, training, job)
                ray.train.report(row, Checkpoint.from_directory(folder))
            if training.state.reported():
                job.send_progress({"row": row})
                prometheus.show_run(job.name(), row)
                run_log = run_log or RunLog(job.out, training.state.step)
                run_log.write(training.state.history)
    except loop.NonFiniteLoss as error:
        return {"step": error.step, "samples": error.samples}
    return None


def reports(
    job: TrainJob, context: RankContext, resume_from: str | None, stream: Stream | None = None
) -> Iterator[loop.TrainState]:
    """Train as one of the job's workers; yields the training state after each new row of its history.

    Closing the iterator also ends the stream of batches.

    Args:
        job: recipe, samples and settings.
        context: this worker's rank.
        resume_from: URI of the checkpoint to resume from; None: start a new run.
        stream: this worker's batches, starting at that checkpoint's step; closed at the end. Default: opened here.

    Raises:
        loop.NonFiniteLoss: as `loop.run`.
    """
    started_at = time.time()
    # With a GPU one thread is enough, to launch kernels.
    torch.set_num_threads(1 if context.device.type == "cuda" else context.threads)
    torch.backends.cudnn.benchmark = True  # all crops have one size: let cuDNN choose the fastest algorithm for it
    values, state = checkpoint.load_training(resume_from) if resume_from else (None, progress.Progress())
    recipe, schedule, intensity = job.recipe, job.schedule(), job.samples.intensity
    stream = stream or job.stream(state.step, context.rank, context.ranks)
    batches = tensors(stream)
    if recipe.augment.device == "cuda":
        batches = gpu_augment.batches(
            batches, schedule, recipe.augment, recipe.crop, context.device, intensity.background_level
        )
    with contextlib.closing(stream):
        torch.manual_seed(recipe.seed)
        model = build(recipe, context.device, intensity)
        if job.parents and values is None:
            start_from.load(model, job.out)
        training = loop.start(model, recipe.optimizer, schedule.steps)
        if values is not None:
            training.load(values, state)
        chosen = acceleration.choose(
            recipe, context.device, schedule.steps, lambda: preflight.find_compiler(gpu=False), _on_all_ranks(context)
        )
        if context.rank == 0:
            job.send_progress({"acceleration": str(chosen)})
        forward = wrap(training.model, chosen.compiled, context.ranks, context.device)
        startup = (*job.startup, ("workers", started_at), ("network", time.time())) if values is None else ()
        yield from loop.run(
            training,
            forward,
            batches,
            schedule,
            acceleration.settings(recipe.loop, chosen),
            recipe.loss,
            recipe.targets,
            validate=Validation(job.samples, context, recipe.targets).scores,
            on_step=_progress_sender(job, startup) if context.rank == 0 else lambda step, images_per_s: None,
            sum_over_ranks=sum_over_ranks,
            checkpoint_requested=PreemptionCheckpoint(state.step) if job.poll_preemption else lambda step: False,
            distillation=load_teacher(job, context.device, chosen.compiled) if job.teacher else None,
        )


def _on_all_ranks(context: RankContext) -> Callable[[bool], bool]:
    """Return a function that says whether a condition holds on every rank; every rank must call it equally often."""

    def on_all_ranks(value: bool) -> bool:
        return not sum_over_ranks(torch.tensor(0.0 if value else 1.0, device=context.device)).item()

    return on_all_ranks


def load_teacher(job: TrainJob, device: torch.device, compiled: bool) -> loop.Distillation:
    """Load the run's teacher for the loop; a U-Net is `compiled` as the student is."""
    network = distillation.load(job.out, device)
    if compiled and isinstance(network, UNet):
        network.compile()
    return loop.Distillation(network, job.recipe.distillation.weight)


def wrap(model: nn.Module, compiled: bool, ranks: int, device: torch.device) -> nn.Module:
    """Wrap the network for the loop: distributed over ranks, compiled, both, or unchanged."""
    forward: nn.Module = model
    if ranks > 1:
        forward = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    if compiled:
        forward.compile()
    return forward


def _progress_sender(job: TrainJob, startup: Sequence[tuple[str, float]]) -> Callable[[int, float], None]:
    """Callback that sends the step to the driver, and once the durations of the start-up phases."""
    sent_at = [0.0]

    def on_step(step: int, images_per_s: float) -> None:
        if time.monotonic() - sent_at[0] > MESSAGE_INTERVAL_S:
            if sent_at[0] == 0 and startup:
                phases = itertools.pairwise([*startup, ("first batch and step", time.time())])
                job.send_progress({"start": [(name, end - begin) for (_, begin), (name, end) in phases]})
            sent_at[0] = time.monotonic()
            job.send_progress({"step": step, "images_per_s": images_per_s})

    return on_step


def report_row(state: progress.Progress, schedule: SampleSchedule) -> dict[str, Any]:
    """The last row of the history with figures of the run: `score` (best), `steps` (planned), `progress` (percent),
    `training_seconds` (with validation), and SCORE_COLUMN.
    """
    row = state.history[-1]
    seconds = sum(entry["seconds"] + entry["validation_seconds"] for entry in state.history)
    return {
        **row,
        SCORE_COLUMN: progress.validation_score(row),
        "score": max(progress.validation_score(entry) for entry in state.history),
        "steps": schedule.steps,
        "progress": 100 * row["step"] / schedule.steps,
        "training_seconds": round(seconds, 2),
    }


def save(folder: str, training: loop.TrainState, job: TrainJob) -> None:
    """Write a checkpoint of the job's training into `folder`."""
    data, rule, scale = job.samples.provenance, job.samples.intensity, job.samples.scale
    parents.write(folder, job.parents)
    teachers.write(folder, job.teacher)
    checkpoint.save(folder, training.network(), training.state_dict(), training.state, job.recipe, data, rule, scale)
