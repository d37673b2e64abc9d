"""`bench train`: images/s of training beside a plain PyTorch loop with a DataLoader: loader, step, and both together.

All train the same network on the same decoded frames from memory, with the same transformations, loss, optimiser and
batches, on this machine's CPUs or its first GPU. They run in turn, so that a machine's drift hits all.
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
from raylivecell.bench.spread import spread
from raylivecell.bench.step import CROP, MONAI, OURS, PARTS, PLAIN
from raylivecell.ingest import blocks
from raylivecell.ingest import stream as ingest
from raylivecell.ingest.order import SampleSchedule
from raylivecell.network.transfer import tensors
from raylivecell.network.unet import build_model, count_parameters
from raylivecell.recipe import LoopConfig, PhaseConfig, Recipe
from raylivecell.runtime import session
from raylivecell.runtime.data_settings import quiet_data
from raylivecell.training import ray_train
from raylivecell.training.job import Job

# Steps of a whole run between two looks at the clock; the first such part is warm-up.
RUN_PART = 20
# Batches of the loader alone: 24 blocks of 64, after 6 for which the object store takes fresh pages of memory.
LOADER_WARM_UP, LOADER_BATCHES = 384, 1536
# Ray Train's own processes, which share the machine with a run.
RAY_TRAIN = (
    "TrainController",
    "TrainStateActor",
    "SynchronizationActor",
    "PreemptionWatcher",
    "DatasetManager",
    "PlacementGroupCleaner",
)


def bench_train(images: int = 64, repeats: int = 5) -> dict[str, Any]:
    """Images/s of each way with median and spread, and ratios turn by turn.

    Args:
        images: frames of 520x704 in memory.
        repeats: how often each is measured, in turn.

    Returns:
        `images_per_s`: way -> spread; `ratio`: "A / B" -> spread; `data_wait_fraction`; `ray_train_cpu_share`:
        of all cores, in Ray Train's own processes; `device`, `parameters`, `batch`, `crop`.
    """
    session.connect()
    bench = _Bench(images)
    ways = bench.ways()
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    with quiet_data():
        for _ in range(repeats):
            for name, way in ways.items():
                speeds[name].append(way())
    pairs = [
        (f"loader: {OURS}", "loader: DataLoader"),
        (f"both: {OURS}", f"both: {PLAIN}, DataLoader"),
        (f"both: {OURS}", f"both: {OURS}, no Ray Train"),
        (f"step: {OURS}", f"step: {PLAIN}"),
        (f"step: {OURS}", f"step: {MONAI}"),
    ]
    return {
        "device": str(bench.device),
        "parameters": count_parameters(build_model(bench.recipe.model)),
        "batch": bench.recipe.batch_size,
        "crop": list(CROP),
        "images_per_s": {name: spread(values) for name, values in speeds.items()},
        "data_wait_fraction": spread(bench.waits),
        "ray_train_cpu_share": spread(bench.ray_train),
        "ratio": {f"{a} / {b}": spread([x / y for x, y in zip(speeds[a], speeds[b])]) for a, b in pairs},
    }


class _Bench:
    """What all ways share: frames, recipe, and one batch for steps alone."""

    def __init__(self, images: int) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.step = step.recipe(self.device)
        phases = (PhaseConfig(steps=PARTS * RUN_PART, originals=False, augmented_copies=1),)
        self.recipe = self.step.model_copy(update={"phases": phases, "loop": LoopConfig(report_steps=RUN_PART)})
        self.frames = frames.frames(images)
        self.samples = frames.samples(self.frames)
        self.job = Job(self.recipe, "", self.samples, int(ray.cluster_resources()["object_store_memory"] / 4))
        self.source = self._source(PARTS * RUN_PART)
        self.planes = torch.from_numpy(blocks.load(self.source.schedule.rows(0), self.source))
        self.waits: list[float] = []
        self.ray_train: list[float] = []

    def ways(self) -> dict[str, Callable[[], float]]:
        """What is measured: name -> images/s."""
        batch, many = self.recipe.batch_size, self._source(LOADER_WARM_UP + LOADER_BATCHES)
        repeated = itertools.repeat(self.planes)
        moved = self.recipe.augment.model_copy(update={"device": "cuda"})
        on_gpu = self.recipe.model_copy(update={"augment": moved})
        gpu_alone = {f"both: {OURS}, augment.device: cuda": lambda: self._run(on_gpu)}
        return {
            f"loader: {OURS}": lambda: images_per_s(self._stream(many), batch, LOADER_WARM_UP),
            "loader: DataLoader": lambda: images_per_s(iter(self._loader(many)), batch, LOADER_WARM_UP),
            f"step: {OURS}": lambda: step.ours(self.step, self.planes, self.device),
            f"step: {PLAIN}": lambda: self._plain(build_model(self.recipe.model), repeated, step.PART),
            f"step: {MONAI}": lambda: self._plain(step.monai(self.recipe), repeated, step.PART),
            f"both: {OURS}": lambda: self._run(self.recipe),
            f"both: {OURS}, no Ray Train": self._run_here,
            f"both: {PLAIN}, DataLoader": lambda: self._plain(
                build_model(self.recipe.model), self._loader(self.source), RUN_PART
            ),
            **(gpu_alone if self.device.type == "cuda" else {}),
        }

    def _source(self, steps: int) -> blocks.Source:
        phases = (PhaseConfig(steps=steps, originals=False, augmented_copies=1),)
        plan = SampleSchedule(0, len(self.frames), self.recipe.batch_size, phases)
        held = self.samples
        return blocks.Source(held.train, plan, self.recipe.augment, CROP, held.frame, held.cached_train)

    def _stream(self, source: blocks.Source) -> ingest.Stream:
        return ingest.Stream(source, 0, 0, 1, self.job.stream_memory)

    def _loader(self, source: blocks.Source) -> Iterable[Tensor]:
        return frames.loader(frames.Planned(self.frames, source))

    def _run(self, recipe: Recipe) -> float:
        """As `raylivecell train` does it, reports and all."""
        with tempfile.TemporaryDirectory() as folder:
            job = Job(recipe, f"{folder}/run", self.samples, self.job.stream_memory)
            gpus = float(self.device.type == "cuda")
            told = Path(folder, "processes.jsonl")
            ray_train.fit(ray_train.trainer(job, 1, 1.0, gpus, retries=0, callbacks=[_Accounts(str(told))]))
            first, *_, last = [json.loads(line) for line in told.read_text().splitlines()]
            rows = [json.loads(line) for line in Path(folder, "run/metrics.jsonl").read_text().splitlines()]
        seconds = last["time"] - first["time"]
        self.ray_train.append((last["cpu_seconds"] - first["cpu_seconds"]) / seconds / psutil.cpu_count())
        self.waits.append(sum(row["data_wait_fraction"] for row in rows[1:]) / len(rows[1:]))
        return step.speed(rows, self.recipe.batch_size)

    def _run_here(self) -> float:
        """The same in this process."""
        with contextlib.closing(self._stream(self.source)) as stream:
            return step.speed(step.train(self.recipe, tensors(stream), self.device), self.recipe.batch_size)

    def _plain(self, network: nn.Module, batches: Iterable[Tensor], part: int) -> float:
        return step.plain(network.to(self.device), batches, self.recipe, self.device, part)


class _Accounts(UserCallback):
    """Writes down after each report what the processes of Ray Train have taken of the CPUs: its controller's, which is
    this one or an actor's, and its helpers'."""

    def __init__(self, path: str) -> None:
        self.path = path

    def after_report(self, run_context: Any, metrics: Any, checkpoint: Any) -> None:
        """A line: seconds since 1970, seconds of CPU."""
        spent = 0.0
        for process in psutil.process_iter(["cmdline", "cpu_times"]):
            title = " ".join(process.info["cmdline"] or ())
            helper = title.startswith("ray::") and any(name in title for name in RAY_TRAIN)
            if helper or process.pid == os.getpid():
                spent += process.info["cpu_times"].user + process.info["cpu_times"].system
        with open(self.path, "a") as file:
            file.write(json.dumps({"time": time.time(), "cpu_seconds": spent}) + "\n")
