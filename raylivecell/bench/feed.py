"""`bench feed`: images per second that reach the loop, beside a torch DataLoader running the same functions.

Both read decoded images from memory, transform whole 520x704 frames with the same kernel, use as many processes as
Ray has CPUs, and hand over batches of 8. They run in turn, in one process, so that a machine's drift hits both.
"""

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import psutil
import ray

from raylivecell.bench import frames as bench_frames
from raylivecell.bench.augment import augment_direct
from raylivecell.bench.spread import spread
from raylivecell.ingest import blocks, stream
from raylivecell.ingest.dataset import free_bytes
from raylivecell.ingest.order import SampleSchedule
from raylivecell.recipe import AugmentConfig, PhaseConfig
from raylivecell.runtime import session
from raylivecell.runtime.data_settings import quiet_data
from raylivecell.targets.sample_planes import IMAGE, MASKS

BATCH = 8
# A block of each process is a round. They end together: between rounds no batch lies ready that counts as made at once.
WARM_UP_ROUNDS, MEASURED_ROUNDS = 3, 9
# After so many epochs of one stream the memory is looked at, and what the stream may hold of the object store.
EPOCHS, STREAM_MEMORY = (1, 5, 10, 20), 512 * 2**20
OURS, SAME, DIRECT = "raylivecell", "DataLoader, same kernel", "DataLoader, direct elastic form"


def bench_feed(images: int = 200, repeats: int = 5) -> dict[str, Any]:
    """Images/s of our feed, of a DataLoader with our kernel and of one with the direct form; medians and ratios.

    Args:
        images: frames in memory.
        repeats: how often the three are measured, in turn.

    Returns:
        `processes`: that prepare samples; `images_per_s` and `ratio`: name -> spread; `mib_after_epochs`: of the
        process that reads, of those that prepare, of the object store: epochs -> MiB.
    """
    session.connect()
    with quiet_data():
        return _measure(images, repeats)


def _measure(images: int, repeats: int) -> dict[str, Any]:
    processes = int(ray.cluster_resources()["CPU"])
    frames = bench_frames.frames(images)
    source, warm_up = in_rounds(frames, None, processes)
    ways = {
        OURS: lambda: stream.Stream(source, 0, 0, 1),
        SAME: lambda: iter(bench_frames.loader(bench_frames.Planned(frames, source))),
        DIRECT: lambda: iter(bench_frames.loader(_Direct(frames, source))),
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, start in ways.items():
            speeds[name].append(images_per_s(start(), BATCH, warm_up))
    return {
        "processes": processes,
        "images_per_s": {name: spread(values) for name, values in speeds.items()},
        "ratio": {
            f"{OURS} / {name}": spread([a / b for a, b in zip(speeds[OURS], speeds[name])]) for name in (SAME, DIRECT)
        },
        "mib_after_epochs": memory_after_epochs(source),
    }


def memory_after_epochs(source: blocks.Source) -> dict[str, dict[str, float]]:
    """MiB that one stream holds as epochs go by: who holds it -> "N epochs" -> MiB."""
    phase = PhaseConfig(epochs=max(EPOCHS), originals=False, augmented_copies=1)
    plan = replace(source.schedule, phases=(phase,))
    held: dict[str, dict[str, float]] = {"reading process": {}, "data tasks": {}, "object store": {}}
    epochs = 0
    with closing(stream.Stream(replace(source, schedule=plan), 0, 0, 1, memory=STREAM_MEMORY)) as batches:
        for step, _ in enumerate(batches):
            epochs += plan.epoch_ends(step)
            if plan.epoch_ends(step) and epochs in EPOCHS:
                for name, value in zip(held, _held()):
                    held[name][f"{epochs} epochs"] = round(value / 2**20)
    return held


def _held() -> tuple[float, float, float]:
    """Bytes of this process, of those of data tasks, and in the object store."""
    titles = ((process, " ".join(process.info["cmdline"] or ())) for process in psutil.process_iter(["cmdline"]))
    tasks = [process for process, title in titles if title.startswith(("ray::IDLE", "ray::ReadSamples"))]
    store = ray.cluster_resources()["object_store_memory"] - free_bytes()
    return _private(psutil.Process()), sum(map(_private, tasks)), store


def _private(process: psutil.Process) -> float:
    """Bytes of a process without the object store's, where the system tells them apart (Linux)."""
    info = process.memory_info()
    return float(info.rss - getattr(info, "shared", 0))


def in_rounds(frames: list[np.ndarray], crop: tuple[int, int] | None, processes: int) -> tuple[blocks.Source, int]:
    """The frames as a source of images, each deformed and turned, for some rounds; batches of those for warm-up."""
    samples = bench_frames.samples(frames)
    phase = PhaseConfig(steps=1, originals=False, augmented_copies=1)
    plan = SampleSchedule(0, len(frames), BATCH, (phase,))
    source = blocks.Source(samples.train, plan, AugmentConfig(), crop, samples.frame, samples.cached_train)
    batches = processes * stream.block_steps(source, BATCH, None)
    phase = phase.model_copy(update={"steps": (WARM_UP_ROUNDS + MEASURED_ROUNDS) * batches})
    return replace(source, schedule=replace(plan, phases=(phase,))), WARM_UP_ROUNDS * batches


def images_per_s(batches: Iterator[Any], batch: int, warm_up: int) -> float:
    """How fast `batches` come, after the first `warm_up` of them."""
    for _ in range(warm_up):
        next(batches)
    begin = time.perf_counter()
    count = sum(1 for _ in batches)
    return count * batch / (time.perf_counter() - begin)


class _Direct(bench_frames.Planned):
    """The direct form of the deformation instead of ours."""

    def made_of(self, planes: np.ndarray, key: tuple[int, int, int, int]) -> np.ndarray:
        rng = np.random.default_rng(key)
        image, targets = augment_direct(planes[IMAGE], planes[MASKS].transpose(1, 2, 0), rng, self.source.config)
        return np.concatenate([image[None], targets.transpose(2, 0, 1)])
