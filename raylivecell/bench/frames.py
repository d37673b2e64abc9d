"""Frames in memory for `bench`, and the baseline that loads them: a torch DataLoader running our functions."""

from collections.abc import Sequence

import cv2
import numpy as np
import ray
import torch
from torch.utils.data import DataLoader, Dataset

from raylivecell.data import shards
from raylivecell.ingest import blocks
from raylivecell.ingest.dataset import Samples
from raylivecell.ingest.order import EPOCH, SAMPLE, VARIANT

SIZE = (520, 704)


def frames(count: int) -> list[np.ndarray]:
    """Decoded samples, uint8 (3, 520, 704), of random pixels: the transformations do not depend on their values."""
    rng = np.random.default_rng(0)
    planes = [rng.integers(0, 256, (3, *SIZE), np.uint8) for _ in range(count)]
    for frame in planes:
        frame[1] = frame[1] > 128
    return planes


def samples(planes: Sequence[np.ndarray]) -> Samples:
    """Samples of the frames, cached in the object store, without validation images."""
    rows = tuple(shards.Row("memory", number) for number in range(len(planes)))
    return Samples(rows, (), SIZE, tuple(ray.put(frame) for frame in planes))


class ScheduledDataset(Dataset):
    """Samples in the order of the source's schedule, transformed in a DataLoader's process."""

    def __init__(self, planes: Sequence[np.ndarray], source: blocks.Source) -> None:
        self.planes, self.source = planes, source
        schedule = source.schedule
        self.rows = np.concatenate([schedule.rows(step) for step in range(schedule.steps)])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        cv2.setNumThreads(1)
        row = self.rows[index]
        sample = int(row[SAMPLE])
        key = (self.source.schedule.seed, int(row[EPOCH]), sample, int(row[VARIANT]))
        return torch.from_numpy(self.transform(self.planes[sample], key))

    def transform(self, planes: np.ndarray, key: tuple[int, int, int, int]) -> np.ndarray:
        """Augment one sample."""
        return blocks.transform(planes, key, self.source)


def loader(dataset: ScheduledDataset) -> DataLoader:
    """DataLoader in the schedule's order, with one process per CPU of Ray."""
    # fork shares the frames with the processes without a copy; no other thread of this process holds a lock then.
    return DataLoader(
        dataset,
        dataset.source.schedule.batch_size,
        num_workers=int(ray.cluster_resources()["CPU"]),
        multiprocessing_context="fork",
        prefetch_factor=4,
    )
