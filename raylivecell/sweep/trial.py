"""A trial of a sweep in Ray's processes: a recipe trained to its end, or as far as it is let.

`OneWorker` runs the loop inside the trial, and its process serves one trial after another: imports (4 s) and Ray
Train's own start (10 s) are not paid again. `several_workers` is Ray Train inside the trial.

A trial's folder is that of a run: checkpoint_*/ (the best and the last; in the end the best), metrics.jsonl,
tensorboard/. Whatever ends it, the trial goes on there from its last checkpoint.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from torch import nn

from raylivecell.core import storage
from raylivecell.core.errors import MachineError, UserError
from raylivecell.ingest.dataset import Samples
from raylivecell.network import forward
from raylivecell.recipe import Recipe
from raylivecell.runs import checkpoint, progress
from raylivecell.runs.run_log import RunLog
from raylivecell.runtime import prometheus
from raylivecell.sweep import space
from raylivecell.training import loop, preflight, ray_train
from raylivecell.training.job import TrainJob
from raylivecell.training.worker import RankContext, report_row, reports, save

Result = dict[str, Any]
# Runs of an image through the network before those that are measured, and those.
WARM_UP, MEASURED = 2, 7


@dataclass(frozen=True)
class SweepContext:
    """What all trials are told."""

    recipe: Recipe
    out: str
    samples: Samples
    stream_memory: int
    """Bytes of the object store for the streams of one trial."""
    threads: int
    """torch's threads in each worker."""
    workers: int
    cpus: float
    """Of each worker."""
    gpus: float
    """Of each worker."""
    timed: bool
    """Whether milliseconds an image are measured at the end."""

    def job(self, config: dict[str, Any]) -> TrainJob:
        """The run that a trial's config asks for; UserError where its values are no recipe that can be trained."""
        asked = config["job"]
        recipe = space.apply(self.recipe, asked["values"])
        preflight.batch_divides(recipe.batch_size, self.workers, "--sweep.workers-per-trial")
        folder = storage.join(self.out, asked["folder"])
        return TrainJob(recipe, folder, self.samples, self.stream_memory, self.threads, sweep=self.out)


class OneWorker(tune.Trainable):
    """A trial of one worker: each step trains up to the next report."""

    def setup(self, config: dict[str, Any], shared: SweepContext) -> None:  # type: ignore[override]  # by with_parameters
        """Make ready; Ray gives `shared` to the process's first trial only."""
        self.shared = shared
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take on another trial in this process."""
        self.cleanup()
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        self.reports: Iterator[loop.TrainState] | None = None
        self.journal: RunLog | None = None
        self.failed: Result | None = None
        try:
            self.job = self.shared.job(config)
            self.last = progress.latest(self.job.out)
            device = torch.device("cuda" if self.shared.gpus else "cpu")
            self.reports = reports(self.job, RankContext(0, 1, device, self.shared.threads), self.last)
        except UserError as error:
            self.failed = _failed(str(error))

    def step(self) -> Result:
        """Train up to the next report; what no other try would change ends the trial as failed, with the reason."""
        if self.failed or self.reports is None:
            return self.failed or {}
        try:
            training = next(self.reports, None)
            if training is not None:
                self._save(training)
            row = self._result(training)
        except loop.NonFiniteLoss as error:
            return _failed(f"loss not finite at step {error.step}")
        except torch.OutOfMemoryError as error:
            return _failed(f"out of GPU memory: {str(error).splitlines()[0]}"[:200])
        except UserError as error:
            return _failed(str(error))
        prometheus.show_run(self.job.name(), row)
        return row

    def _result(self, training: loop.TrainState | None) -> Result:
        """Of the row just made; without one, the trial had ended before it was taken up again."""
        state = training.state if training else progress.load_state(self.last or "")
        row = report_row(state, self.job.schedule())
        row["done"] = row["step"] >= row["steps"]
        if row["done"] and self.shared.timed:
            network = training.network() if training else checkpoint.load_model(self.job.out)[0]
            row["ms_per_image"] = ms_per_image(network, self.shared.samples)
        return row

    def _save(self, training: loop.TrainState) -> None:
        state = training.state
        folder = storage.join(self.job.out, progress.name(state.step))
        save(folder, training, self.job)
        best = max(state.history, key=lambda row: (progress.validation_score(row), row["step"]))["step"]
        progress.delete_all_but(self.job.out, {best, state.step})
        self.journal = self.journal or RunLog(self.job.out, state.step)
        self.journal.write(state.history)

    def cleanup(self) -> None:
        """End the stream of batches, which frees its CPUs, and the journal."""
        if self.reports is not None:
            self.reports.close()  # type: ignore[attr-defined]
        if self.journal is not None:
            self.journal.close()


def several_workers(config: dict[str, Any], shared: SweepContext) -> None:
    """A trial of several workers: Ray Train in the folder of the trial."""
    report = [TuneReportCallback()]
    try:
        job = shared.job(config)
        run = ray_train.trainer(job, shared.workers, shared.cpus, shared.gpus, retries=0, callbacks=report)
        failed = ray_train.fit(run)
    except MachineError:
        raise  # Tune tries the trial again
    except UserError as error:
        tune.report(_failed(str(error)))
        return
    if failed:
        tune.report(_failed(f"loss not finite at step {failed['step']}"))
        return
    # The whole history is in the metrics file, also that of a run which had ended before it was taken up again.
    lines = storage.read_bytes(storage.join(job.out, "metrics.jsonl")).splitlines()
    state = progress.Progress(len(lines), [json.loads(line) for line in lines])
    row = report_row(state, job.schedule())
    if shared.timed:
        row["ms_per_image"] = ms_per_image(checkpoint.load_model(job.out)[0], shared.samples)
    tune.report(row)


def ms_per_image(network: nn.Module, samples: Samples) -> float:
    """Median milliseconds of a whole validation image through the network, where it lies, one at a time."""
    network.eval()
    device = next(network.parameters()).device
    image = torch.from_numpy(samples.val_sample(0).image.copy())[None].to(device)
    seconds = []
    for _ in range(WARM_UP + MEASURED):
        begin = time.perf_counter()
        forward.logits(network, image).sum().item()  # waits for the device
        seconds.append(time.perf_counter() - begin)
    return round(1000 * sorted(seconds[WARM_UP:])[MEASURED // 2], 2)


def _failed(reason: str) -> Result:
    return {"failed": reason, "score": -1.0, "step": 0, "steps": 1, "progress": 0.0, "done": True}
