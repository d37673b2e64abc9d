"""`bench train`: images/s of loader, training step and both, compared with a plain PyTorch loop and a DataLoader.

All train the same network on the same decoded frames in memory, with the same transformations, loss, optimiser and
batches, on this machine's CPUs or its first GPU. They run in turn, so that a drift of the machine's speed affects all.
"""

import contextlib
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
from ray.train import UserCallback
from torch import Tensor, nn

from raylivecell.bench import frames, step
from raylivecell.bench.feed import images_per_s
from raylivecell.bench.figures import Figures, Options, measure_in_turn, ratios, summaries, summary
from raylivecell.bench.step import CROP, INTERVALS, MONAI, OURS, PLAIN
from raylivecell.ingest import blocks
from raylivecell.ingest import stream as ingest
from raylivecell.ingest.order import SampleSchedule
from raylivecell.network.transfer import tensors
from raylivecell.network.unet import build_model, count_parameters
from raylivecell.recipe import PhaseConfig, Recipe
from raylivecell.runtime import session
from raylivecell.runtime.data_settings import quiet_data
from raylivecell.training import ray_train
from raylivecell.training.job import TrainJob

# Steps per measured interval of a complete run; the first interval is warm-up.
RUN_INTERVAL_STEPS = 20
# Batches of the loader alone: 24 blocks of 64; for the first 6 the object store allocates new pages.
LOADER_WARM_UP, LOADER_BATCHES = 384, 1536
# Ray Train's actors, which share the machine with a run.
RAY_TRAIN_ACTORS = (
    "TrainController",
    "TrainStateActor",
    "SynchronizationActor",
    "PreemptionWatcher",
    "DatasetManager",
    "PlacementGroupCleaner",
)


def bench(options: Options) -> Figures:
    """Images/s of each variant, and ratios within a turn.

    Args:
        options: `images` frames of 520x704 in memory; `repeats` runs of each variant, in turn.

    Returns:
        `images_per_s`: variant -> summary; `ratio`: "A / B" -> summary; `data_wait_fraction`; `ray_train_cpu_share`:
        fraction of all cores used by Ray Train's processes; `device`, `parameters`, `batch`, `crop`.
    """
    session.connect()
    setup = _Setup(options.images)
    with quiet_data():
        speeds = measure_in_turn(setup.variants(), options.repeats)
    pairs = [
        (f"loader: {OURS}", "loader: DataLoader"),
        (f"both: {OURS}", f"both: {PLAIN}, DataLoader"),
        (f"both: {OURS}", f"both: {OURS}, no Ray Train"),
        (f"step: {OURS}", f"step: {PLAIN}"),
        (f"step: {OURS}", f"step: {MONAI}"),
    ]
    return {
        "device": str(setup.device),
        "parameters": count_parameters(build_model(setup.recipe.model)),
        "batch": setup.recipe.batch_size,
        "crop": list(CROP),
        "images_per_s": summaries(speeds),
        "data_wait_fraction": summary(setup.data_waits),
        "ray_train_cpu_share": summary(setup.ray_train_shares),
        "ratio": ratios(speeds, pairs),
    }


class _Setup:
    """Frames and recipe shared by all variants, and one batch for the steps alone."""

    def __init__(self, images: int) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.step_recipe = step.recipe(self.device)
        phases = (PhaseConfig(steps=INTERVALS * RUN_INTERVAL_STEPS, originals=False, augmented_copies=1),)
        self.recipe = self.step_recipe.model_copy(
            # The precision of the step's recipe, as in the baselines.
            update={
                "phases": phases,
                "loop": self.step_recipe.loop.model_copy(update={"report_steps": RUN_INTERVAL_STEPS}),
            }
        )
        self.frames = frames.frames(images)
        self.samples = frames.samples(self.frames)
        self.job = TrainJob(self.recipe, "", self.samples, int(ray.cluster_resources()["object_store_memory"] / 4))
        self.source = self._source(INTERVALS * RUN_INTERVAL_STEPS)
        self.planes = torch.from_numpy(blocks.load(self.source.schedule.rows(0), self.source))
        self.data_waits: list[float] = []
        self.ray_train_shares: list[float] = []

    def variants(self) -> dict[str, Callable[[], float]]:
        """Map each variant's name to a run that returns images/s."""
        batch, source = self.recipe.batch_size, self._source(LOADER_WARM_UP + LOADER_BATCHES)
        repeated = itertools.repeat(self.planes)
        gpu_augment = self.recipe.augment.model_copy(update={"device": "cuda"})
        gpu_recipe = self.recipe.model_copy(update={"augment": gpu_augment})
        gpu_variants = {f"both: {OURS}, augment.device: cuda": lambda: self._run(gpu_recipe)}
        return {
            f"loader: {OURS}": lambda: images_per_s(self._stream(source), batch, LOADER_WARM_UP),
            "loader: DataLoader": lambda: images_per_s(iter(self._loader(source)), batch, LOADER_WARM_UP),
            f"step: {OURS}": lambda: step.loop_speed(self.step_recipe, self.planes, self.device),
            f"step: {PLAIN}": lambda: self._plain(build_model(self.recipe.model), repeated, step.INTERVAL_STEPS),
            f"step: {MONAI}": lambda: self._plain(step.basic_unet(self.recipe), repeated, step.INTERVAL_STEPS),
            f"both: {OURS}": lambda: self._run(self.recipe),
            f"both: {OURS}, no Ray Train": self._run_here,
            f"both: {PLAIN}, DataLoader": lambda: self._plain(
                build_model(self.recipe.model), self._loader(self.source), RUN_INTERVAL_STEPS
            ),
            **(gpu_variants if self.device.type == "cuda" else {}),
        }

    def _source(self, steps: int) -> blocks.Source:
        phases = (PhaseConfig(steps=steps, originals=False, augmented_copies=1),)
        schedule = SampleSchedule(0, len(self.frames), self.recipe.batch_size, phases)
        samples = self.samples
        return blocks.Source(samples.train, schedule, self.recipe.augment, CROP, samples.frame, samples.cached_train)

    def _stream(self, source: blocks.Source) -> ingest.Stream:
        return ingest.Stream(source, 0, 0, 1, self.job.stream_memory)

    def _loader(self, source: blocks.Source) -> Iterable[Tensor]:
        return frames.loader(frames.ScheduledDataset(self.frames, source))

    def _run(self, recipe: Recipe) -> float:
        """Images/s of a complete run with Ray Train, as by `raylivecell train`, reports included."""
        with tempfile.TemporaryDirectory() as folder:
            job = TrainJob(recipe, f"{folder}/run", self.samples, self.job.stream_memory)
            gpus = float(self.device.type == "cuda")
            log = Path(folder, "processes.jsonl")
            ray_train.fit(ray_train.trainer(job, 1, 1.0, gpus, retries=0, callbacks=[_CpuTimeLog(str(log))]))
            first, *_, last = [json.loads(line) for line in log.read_text().splitlines()]
            rows = [json.loads(line) for line in Path(folder, "run/metrics.jsonl").read_text().splitlines()]
        seconds = last["time"] - first["time"]
        self.ray_train_shares.append((last["cpu_seconds"] - first["cpu_seconds"]) / seconds / psutil.cpu_count())
        self.data_waits.append(sum(row["data_wait_fraction"] for row in rows[1:]) / len(rows[1:]))
        return step.history_speed(rows, self.recipe.batch_size)

    def _run_here(self) -> float:
        """Images/s of the same run in this process, without Ray Train."""
        with contextlib.closing(self._stream(self.source)) as stream:
            return step.history_speed(step.run_loop(self.recipe, tensors(stream), self.device), self.recipe.batch_size)

    def _plain(self, network: nn.Module, batches: Iterable[Tensor], steps: int) -> float:
        return step.plain_loop_speed(network.to(self.device), batches, self.recipe, self.device, steps)


class _CpuTimeLog(UserCallback):
    """Logs the CPU time of Ray Train's processes after each report.

    These are its controller, which is this process or an actor, and its helper actors.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def after_report(self, run_context: Any, metrics: Any, checkpoint: Any) -> None:
        """Append a line: seconds since 1970, CPU seconds."""
        cpu_seconds = 0.0
        for process in psutil.process_iter(["cmdline", "cpu_times"]):
            title = " ".join(process.info["cmdline"] or ())
            helper = title.startswith("ray::") and any(name in title for name in RAY_TRAIN_ACTORS)
            if helper or process.pid == os.getpid():
                cpu_seconds += process.info["cpu_times"].user + process.info["cpu_times"].system
        with open(self.path, "a") as file:
            file.write(json.dumps({"time": time.time(), "cpu_seconds": cpu_seconds}) + "\n")
