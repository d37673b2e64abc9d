"""`bench feed`: images/s that reach the training loop, compared with a torch DataLoader running the same functions.

Both read decoded images from memory, transform full 520x704 frames with the same kernel, use as many processes as Ray
has CPUs, and yield batches of 8. They run in turn in one process, so that a drift of the machine's speed affects both.
"""

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import psutil
import ray

from raylivecell.bench import frames
from raylivecell.bench.augment import augment_direct
from raylivecell.bench.figures import Figures, Options, measure_in_turn, ratios, summaries
from raylivecell.ingest import blocks, stream
from raylivecell.ingest.dataset import free_bytes
from raylivecell.ingest.order import SampleSchedule
from raylivecell.recipe import AugmentConfig, PhaseConfig
from raylivecell.runtime import session
from raylivecell.runtime.data_settings import quiet_data
from raylivecell.targets.sample_planes import IMAGE, MASKS

BATCH = 8
# A round is one block per process. Measurement starts and ends between rounds, when no finished batches are queued:
# these would take no time.
WARM_UP_ROUNDS, MEASURED_ROUNDS = 3, 9
# Epochs of one stream after which memory is measured; object store limit of the stream, bytes.
EPOCHS, STREAM_MEMORY = (1, 5, 10, 20), 512 * 2**20
OURS, SAME, DIRECT = "raylivecell", "DataLoader, same kernel", "DataLoader, direct elastic form"


def bench(options: Options) -> Figures:
    """Images/s of our stream, of a DataLoader with our kernel and of one with the direct form.

    Args:
        options: `images` frames in memory; `repeats` runs of the three, in turn.

    Returns:
        `processes`: number of processes that prepare samples; `images_per_s` and `ratio`: name -> summary;
        `mib_after_epochs`: memory of reading process, data tasks and object store: name -> epochs -> MiB.
    """
    session.connect()
    with quiet_data():
        return _measure(options)


def _measure(options: Options) -> Figures:
    processes = int(ray.cluster_resources()["CPU"])
    planes = frames.frames(options.images)
    source, warm_up = in_rounds(planes, None, processes)
    batches = {
        OURS: lambda: stream.Stream(source, 0, 0, 1),
        SAME: lambda: iter(frames.loader(frames.ScheduledDataset(planes, source))),
        DIRECT: lambda: iter(frames.loader(_DirectDataset(planes, source))),
    }

    def speed(name: str) -> float:
        return images_per_s(batches[name](), BATCH, warm_up)

    speeds = measure_in_turn({name: partial(speed, name) for name in batches}, options.repeats)
    return {
        "processes": processes,
        "images_per_s": summaries(speeds),
        "ratio": ratios(speeds, [(OURS, SAME), (OURS, DIRECT)]),
        "mib_after_epochs": memory_after_epochs(source),
    }


def memory_after_epochs(source: blocks.Source) -> dict[str, dict[str, float]]:
    """Memory after EPOCHS of one stream: processes or store -> "N epochs" -> MiB."""
    phase = PhaseConfig(epochs=max(EPOCHS), originals=False, augmented_copies=1)
    schedule = replace(source.schedule, phases=(phase,))
    memory: dict[str, dict[str, float]] = {"reading process": {}, "data tasks": {}, "object store": {}}
    epochs = 0
    with closing(stream.Stream(replace(source, schedule=schedule), 0, 0, 1, memory=STREAM_MEMORY)) as batches:
        for step, _ in enumerate(batches):
            epochs += schedule.epoch_ends(step)
            if schedule.epoch_ends(step) and epochs in EPOCHS:
                for name, value in zip(memory, _memory()):
                    memory[name][f"{epochs} epochs"] = round(value / 2**20)
    return memory


def _memory() -> tuple[float, float, float]:
    """Bytes of this process, of the data tasks' processes, and in the object store."""
    titles = ((process, " ".join(process.info["cmdline"] or ())) for process in psutil.process_iter(["cmdline"]))
    tasks = [process for process, title in titles if title.startswith(("ray::IDLE", "ray::ReadSamples"))]
    store = ray.cluster_resources()["object_store_memory"] - free_bytes()
    return _private_bytes(psutil.Process()), sum(map(_private_bytes, tasks)), store


def _private_bytes(process: psutil.Process) -> float:
    """Memory of a process, on Linux without the shared pages of the object store."""
    info = process.memory_info()
    return float(info.rss - getattr(info, "shared", 0))


def in_rounds(planes: list[np.ndarray], crop: tuple[int, int] | None, processes: int) -> tuple[blocks.Source, int]:
    """Source of all rounds' samples, each frame deformed and rotated, and the number of warm-up batches."""
    samples = frames.samples(planes)
    phase = PhaseConfig(steps=1, originals=False, augmented_copies=1)
    schedule = SampleSchedule(0, len(planes), BATCH, (phase,))
    source = blocks.Source(samples.train, schedule, AugmentConfig(), crop, samples.frame, samples.cached_train)
    batches = processes * stream.block_steps(source, BATCH, None)
    phase = phase.model_copy(update={"steps": (WARM_UP_ROUNDS + MEASURED_ROUNDS) * batches})
    return replace(source, schedule=replace(schedule, phases=(phase,))), WARM_UP_ROUNDS * batches


def images_per_s(batches: Iterator[Any], batch: int, warm_up: int) -> float:
    """Images/s of `batches` after the first `warm_up` of them."""
    for _ in range(warm_up):
        next(batches)
    begin = time.perf_counter()
    count = sum(1 for _ in batches)
    return count * batch / (time.perf_counter() - begin)


class _DirectDataset(frames.ScheduledDataset):
    """Deforms with the direct form instead of our kernel."""

    def transform(self, planes: np.ndarray, key: tuple[int, int, int, int]) -> np.ndarray:
        rng = np.random.default_rng(key)
        image, targets = augment_direct(planes[IMAGE], planes[MASKS].transpose(1, 2, 0), rng, self.source.config)
        return np.concatenate([image[None], targets.transpose(2, 0, 1)])
