"""`bench feed`: images per second that reach the loop, beside a torch DataLoader running the same functions.

Both read decoded images from memory, transform whole 520x704 frames with the same kernel, use as many processes as
Ray has CPUs, and hand over batches of 8. They run in turn, in one process, so that a machine's drift hits both.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import numpy as np
import ray
import torch
from torch.utils.data import DataLoader, Dataset

from raylivecell import augment, ingest, runtime, shards
from raylivecell.bench_spread import spread
from raylivecell.order import EPOCH, SAMPLE, VARIANT, PhaseConfig, Plan

BATCH = 8
WARM_UP_BATCHES = 20
MEASURED_BATCHES = 150


def bench_feed(images: int = 200, repeats: int = 5) -> dict[str, Any]:
    """Images/s of our feed, of a DataLoader with our kernel and of one with the direct form; medians and ratios.

    Args:
        images: frames in memory (random pixels: the transformations do not look at them).
        repeats: how often the three are measured, in turn.
    """
    runtime.connect()
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (3, 520, 704), np.uint8) for _ in range(images)]
    for frame in frames:
        frame[1] = frame[1] > 128
    steps = WARM_UP_BATCHES + MEASURED_BATCHES
    plan = Plan(0, images, BATCH, (PhaseConfig(steps=steps, plain=False, transformed=1),))
    config = augment.AugmentConfig()
    rows = tuple(shards.Row("memory", i) for i in range(images))
    source = ingest.Source(rows, plan, config, None, tuple(ray.put(frame) for frame in frames))
    processes = int(ray.cluster_resources()["CPU"])
    ways = {
        "raylivecell": lambda: ingest.Stream(source, 0, 0, 1),
        "DataLoader, same kernel": lambda: _loader(_Frames(frames, source, direct=False), processes),
        "DataLoader, direct elastic form": lambda: _loader(_Frames(frames, source, direct=True), processes),
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, start in ways.items():
            speeds[name].append(_images_per_s(start()))
    ours = speeds["raylivecell"]
    return {
        "processes": processes,
        "images_per_s": {name: spread(values) for name, values in speeds.items()},
        "ratio": {
            f"raylivecell / {name}": spread([a / b for a, b in zip(ours, speeds[name])]) for name in list(ways)[1:]
        },
    }


class _Frames(Dataset):
    """The plan's rows as samples, made in a DataLoader's process."""

    def __init__(self, frames: Sequence[np.ndarray], source: ingest.Source, direct: bool) -> None:
        self.frames, self.source, self.direct = frames, source, direct
        plan = source.plan
        self.rows = np.concatenate([plan.rows(step) for step in range(plan.steps)])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> torch.Tensor:
        cv2.setNumThreads(1)
        row = self.rows[place]
        sample = int(row[SAMPLE])
        key = (self.source.plan.seed, int(row[EPOCH]), sample, int(row[VARIANT]))
        if not self.direct:
            return torch.from_numpy(ingest.transform(self.frames[sample], key, self.source))
        planes = self.frames[sample]
        rng = np.random.default_rng(key)
        image, targets = augment.augment_direct(planes[0], planes[1:].transpose(1, 2, 0), rng, self.source.config)
        return torch.from_numpy(np.concatenate([image[None], targets.transpose(2, 0, 1)]))


def _loader(frames: _Frames, processes: int) -> Iterator[torch.Tensor]:
    # fork: the frames are shared with the processes as they stand; nothing else in this process holds a lock then.
    return iter(DataLoader(frames, BATCH, num_workers=processes, multiprocessing_context="fork", prefetch_factor=4))


def _images_per_s(batches: Iterator[Any]) -> float:
    for _ in range(WARM_UP_BATCHES):
        next(batches)
    begin = time.perf_counter()
    count = sum(1 for _ in batches)
    return count * BATCH / (time.perf_counter() - begin)
