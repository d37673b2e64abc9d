"""A trial of a sweep in Ray's processes: train a recipe to the end, or until the scheduler stops it.

`OneWorker` runs the loop inside the trial, and its process runs one trial after another, which saves the imports (4 s)
and the start of Ray Train (10 s). `several_workers` runs Ray Train inside the trial.

A trial's folder is a run's: checkpoint_*/ (best and latest; at the end the best only), metrics.jsonl, tensorboard/.
After any interruption the trial resumes there from its latest checkpoint.
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
# Forward passes of an image for timing: unmeasured, then measured.
WARM_UP, MEASURED = 2, 7


@dataclass(frozen=True)
class SweepContext:
    """Settings that all trials share."""

    recipe: Recipe
    out: str
    samples: Samples
    stream_memory: int
    """Bytes of the object store for the batch streams of one trial."""
    threads: int
    """torch threads in each worker."""
    workers: int
    cpus: float
    """Per worker."""
    gpus: float
    """Per worker."""
    timed: bool
    """Whether to measure milliseconds per image at the end of a trial."""

    def job(self, config: dict[str, Any]) -> TrainJob:
        """Training job for a trial's config; UserError if its values are not a trainable recipe."""
        job = config["job"]
        recipe = space.apply(self.recipe, job["values"])
        preflight.batch_divides(recipe.batch_size, self.workers, "--sweep.workers-per-trial")
        folder = storage.join(self.out, job["folder"])
        return TrainJob(recipe, folder, self.samples, self.stream_memory, self.threads, sweep=self.out)


class OneWorker(tune.Trainable):
    """A trial of one worker: each step trains until the next report."""

    def setup(self, config: dict[str, Any], shared: SweepContext) -> None:  # type: ignore[override]  # by with_parameters
        """Start the process's first trial, the only one to which Ray passes `shared`."""
        self.shared = shared
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Start another trial in this process."""
        self.cleanup()
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        self.reports: Iterator[loop.TrainState] | None = None
        self.run_log: RunLog | None = None
        self.failed: Result | None = None
        try:
            self.job = self.shared.job(config)
            self.last = progress.latest(self.job.out)
            device = torch.device("cuda" if self.shared.gpus else "cpu")
            self.reports = reports(self.job, RankContext(0, 1, device, self.shared.threads), self.last)
        except UserError as error:
            self.failed = _failed(str(error))

    def step(self) -> Result:
        """Train until the next report; an error that a retry would repeat ends the trial as failed, with a reason."""
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
        """Result of the last report; `training` is None if the trial had ended before it was resumed."""
        state = training.state if training else progress.load_state(self.last or "")
        row = report_row(state, self.job.schedule())
        row["done"] = row["step"] >= row["steps"]
        if row["done"] and self.shared.timed:
            # Loaded: the network of `training` may be compiled, that of `predict` is not.
            row["ms_per_image"] = ms_per_image(checkpoint.load_model(self.job.out)[0], self.shared.samples)
        return row

    def _save(self, training: loop.TrainState) -> None:
        state = training.state
        folder = storage.join(self.job.out, progress.name(state.step))
        save(folder, training, self.job)
        best = max(state.history, key=lambda row: (progress.validation_score(row), row["step"]))["step"]
        progress.delete_all_but(self.job.out, {best, state.step})
        self.run_log = self.run_log or RunLog(self.job.out, state.step)
        self.run_log.write(state.history)

    def cleanup(self) -> None:
        """Close the stream of batches, which frees its CPUs, and the run log."""
        if self.reports is not None:
            self.reports.close()  # type: ignore[attr-defined]
        if self.run_log is not None:
            self.run_log.close()


def several_workers(config: dict[str, Any], shared: SweepContext) -> None:
    """Run a trial of several workers with Ray Train in the trial's folder."""
    report = [TuneReportCallback()]
    try:
        job = shared.job(config)
        run = ray_train.trainer(job, shared.workers, shared.cpus, shared.gpus, retries=0, callbacks=report)
        failed = ray_train.fit(run)
    except MachineError:
        raise  # Tune retries the trial
    except UserError as error:
        tune.report(_failed(str(error)))
        return
    if failed:
        tune.report(_failed(f"loss not finite at step {failed['step']}"))
        return
    # metrics.jsonl has the entire history, also of a run that had ended before it was resumed.
    lines = storage.read_bytes(storage.join(job.out, "metrics.jsonl")).splitlines()
    state = progress.Progress(len(lines), [json.loads(line) for line in lines])
    row = report_row(state, job.schedule())
    if shared.timed:
        row["ms_per_image"] = ms_per_image(checkpoint.load_model(job.out)[0], shared.samples)
    tune.report(row)


def ms_per_image(network: nn.Module, samples: Samples) -> float:
    """Median milliseconds per forward pass of a single validation image, on the network's device."""
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
