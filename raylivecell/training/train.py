"""The driver of a training run: checks, Ray, decoded samples, Ray Train around the loop, the report.

1. The driver runs the preflight checks, caches decoded samples in the object store if they fit, and starts Ray Train
   (training/ray_train.py), whose run folder is --out.
2. Each worker (training/worker.py) streams its batches, loads the latest checkpoint and runs the loop.
3. The driver displays progress and at the end writes report.html.

Ray Data, Ray Train and plotting libraries are imported where they are used: while Ray starts, or at the end.
"""

import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ray

from raylivecell import recipe as recipes
from raylivecell.core import storage
from raylivecell.core.console import console
from raylivecell.core.errors import UserError
from raylivecell.data import combined, shards
from raylivecell.data.combined import Data
from raylivecell.images.scale import Scale
from raylivecell.recipe import Recipe
from raylivecell.runs import folder, parents, progress, teachers
from raylivecell.runtime import session
from raylivecell.training import messages, preflight
from raylivecell.training.display import ProgressDisplay

if TYPE_CHECKING:
    from raylivecell.runs import distillation
    from raylivecell.runs.start_from import Opened
    from raylivecell.training.job import TrainJob

# Validation images shown in the report.
OVERLAYS = 6


def train(
    data: str | Sequence[str],
    out: str,
    recipe: Recipe,
    workers: int | tuple[int, int] = 1,
    resume: bool = False,
    retries: int = 3,
    began: float | None = None,
    start_from: str | None = None,
    data_weights: Sequence[float] = (),
    teacher: str | None = None,
) -> dict[str, Any]:
    """Train `recipe` on the dataset at `data`; returns the last row of metrics.

    Args:
        data: URI of a prepared dataset, or of several, whose images are converted to the intensities of the first.
        out: URI of the run's folder: checkpoint_*/, metrics.jsonl, tensorboard/, recipe.yaml, report.html.
        recipe: what to train.
        workers: training processes, or (min, max) for a run that grows and shrinks with the cluster.
        resume: continue the run in `out` from its latest checkpoint; otherwise `out` must not contain a run.
        retries: maximum number of restarts from the latest checkpoint after a worker died.
        start_from: checkpoint or run whose weights a new run starts with, where their shapes fit; a resumed run must
            have started from it, and does not read it again.
        data_weights: for several datasets, the share of each in the samples of an epoch; default: every sample once.
        teacher: checkpoint or run whose maps the network learns, if the recipe's distillation.weight is above 0; a
            resumed run has a copy of it.
        began: start of the command, seconds since 1970, for the reported time to the first step; default: now.

    Raises:
        UserError: no such data; `out` in use, or no run to resume there; too few CPUs; a non-finite loss;
            a parent or a teacher that does not fit.
    """
    startup = [("", began or time.time()), ("imports", time.time())]
    datasets, out = combined.of(data, data_weights), storage.absolute(out)
    preflight.batch_divides(recipe.batch_size, workers)
    scale = _check_data(datasets, recipe)
    resumed = _check_run_folder(out, datasets, recipe, resume)
    parent = _open_parent(out, start_from, recipe, resumed, scale)
    opened_teacher = _open_teacher(out, teacher, recipe, resumed, datasets, scale)
    startup.append(("dataset", time.time()))
    session.connect()
    startup.append(("Ray", time.time()))
    from raylivecell.ingest.dataset import open_samples, stream_budget_bytes

    preflight.hardware(recipe)
    most = workers if isinstance(workers, int) else workers[1]
    gpus, cpus = preflight.worker_gpus(workers), preflight.worker_cpus(most)
    preflight.gpus_work()
    if line := folder.reopen(out, resume):
        console.print(line, soft_wrap=True, markup=False)
    if not resumed:
        parents.store(out, parent.weights if parent else b"", parent.chain if parent else ())
        teachers.store(out, *((opened_teacher.files, opened_teacher.teacher) if opened_teacher else ({}, None)))
    folder.initialise(out, datasets, recipes.dump(recipe))
    stream_memory = stream_budget_bytes()
    samples = open_samples(datasets, recipe.targets != "foreground")
    mailbox = messages.open_mailbox()
    from raylivecell.training.job import TrainJob

    startup.append(("samples sent", time.time()))
    job = TrainJob(
        recipe,
        out,
        samples,
        stream_memory,
        mailbox=mailbox,
        poll_preemption=not session.started_here(),
        startup=tuple(startup),
        resumed=resume,
        parents=parents.of_run(out),
        teacher=teachers.of_run(out),
    )
    _run(job, mailbox, workers, cpus, gpus, retries)
    return _write_report(datasets, out, recipe)


def _run(job: "TrainJob", mailbox: Any, workers: int | tuple[int, int], cpus: float, gpus: float, retries: int) -> None:
    """Train on Ray, showing progress; a failure is recorded in the run's folder and raised as UserError."""
    from raylivecell.training import ray_train  # Ray Train, 0.6 s, while tasks decode the samples

    with ProgressDisplay(job.schedule().steps, lambda: ray.get(mailbox.read.remote())):
        try:
            failed = ray_train.fit(ray_train.trainer(job, workers, cpus, gpus, retries))
        except UserError as error:
            raise _record_failure(job.out, str(error)) from error
    if failed:
        rows = [job.samples.train[index] for index in failed["samples"]]
        raise _record_non_finite_loss(job.out, failed["step"], rows)


def _check_data(datasets: Data, recipe: Recipe) -> Scale:
    """Check that the data and the network fit the recipe, and print what the user should know; returns the scale."""
    preflight.samples_fit(datasets, recipe)
    scale = combined.scale(datasets)
    network_line = preflight.network(recipe)
    for line in (*combined.scale_notes(datasets), *([network_line] if network_line else [])):
        console.print(line, markup=False, soft_wrap=True)
    return scale


def _check_run_folder(out: str, data: Data, recipe: Recipe, resume: bool) -> bool:
    """Check that `out` is unused, or has a run to resume with the same recipe: Ray would resume any run there.

    Returns whether it has one.
    """
    if not folder.check_resumable(out, data, resume):
        return False
    old = recipes.load(storage.join(out, folder.RECIPE))
    changed = ", ".join(name for name in Recipe.model_fields if getattr(old, name) != getattr(recipe, name))
    if changed:
        restart = ", or start again without --resume always" if folder.failure(out) else ""
        raise UserError(f"the run at {out} has another recipe ({changed}); resume it with {out}/recipe.yaml{restart}")
    return True


def _open_parent(out: str, start_from: str | None, recipe: Recipe, resumed: bool, scale: Scale) -> "Opened | None":
    """Read the network from which a new run starts, and print its origin; check that a resumed run started from it.

    `scale` is that of the data.
    """
    if resumed:
        chain = parents.of_run(out)
        parents.check_same(out, chain, start_from)
        if chain:
            console.print(f"the run {parents.describe(chain[0])}", markup=False, soft_wrap=True)
        return None
    if start_from is None:
        return None
    from raylivecell.runs.start_from import open_parent  # torch

    opened = open_parent(start_from, recipe, scale)
    for line in opened.lines:
        console.print(line, markup=False, soft_wrap=True)
    return opened


def _open_teacher(
    out: str, teacher: str | None, recipe: Recipe, resumed: bool, data: Data, scale: Scale
) -> "distillation.Opened | None":
    """Read the network whose maps a new run learns, and print its origin; check that a resumed run learns from it.

    `scale` is that of the data.
    """
    opened, origin = None, None
    if resumed:
        origin = teachers.of_run(out)
        teachers.check_same(out, origin, teacher)
    preflight.teacher(data, recipe, teacher is not None or origin is not None)
    if teacher is not None and not resumed:
        from raylivecell.runs.distillation import open_teacher  # torch

        opened = open_teacher(teacher, recipe, combined.intensity(data), scale)
        origin = opened.teacher
    if origin is not None:
        console.print(f"the network {teachers.describe(origin)}", markup=False, soft_wrap=True)
    return opened


def _record_failure(out: str, reason: str, hint: str = "") -> UserError:
    """Record in `out` that the run failed, so that a new run may use the folder; returns the error for the user."""
    try:
        last = progress.latest(out)
        saved = progress.load_state(last).step if last else 0
        folder.mark_failed(out, folder.Failure(reason, saved))
    except (OSError, UserError):  # perhaps the same disk or network fails: the user must still see the reason
        return UserError(f"{reason}{hint}")
    resumed = f", and --resume always continues after step {saved}" if saved else ""
    return UserError(f"{reason}{hint}; the same command then starts a new run and keeps the files of this one{resumed}")


def _record_non_finite_loss(out: str, step: int, rows: Sequence[shards.Row]) -> UserError:
    """Record that the loss was NaN or infinite for the batch of the samples in `rows`."""
    names = ", ".join(sorted({shards.read_row(row, ["file_name"])["file_name"] for row in rows}))
    hint = "; lower optimizer.lr or set optimizer.clip_norm, and check those images"
    return _record_failure(out, f"the loss became NaN or infinite at step {step}, in the batch of {names}", hint)


def _write_report(data: Data, out: str, recipe: Recipe) -> dict[str, Any]:
    """Write report.html from the run's files; returns the last row of metrics."""
    from raylivecell.reports import pictures, training  # torch and matplotlib
    from raylivecell.runs import checkpoint

    history = [json.loads(line) for line in storage.read_bytes(storage.join(out, "metrics.jsonl")).splitlines()]
    network, _ = checkpoint.load_model(out)
    panels = pictures.overlays(network, data, "val", OVERLAYS)
    training.write_run_report(
        out,
        recipes.dump(recipe),
        history,
        panels,
        combined.description(data),
        parents.of_run(out),
        teachers.of_run(out),
    )
    console.print(f"written: {out}/report.html, checkpoint_*/, metrics.jsonl, tensorboard/", markup=False)
    return history[-1]
