"""Frames in memory for `bench`, and the rival's way to read them: a torch DataLoader running our own functions."""

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
    """Decoded samples, uint8 (3, 520, 704), of random pixels: the transformations do not look at them."""
    rng = np.random.default_rng(0)
    made = [rng.integers(0, 256, (3, *SIZE), np.uint8) for _ in range(count)]
    for frame in made:
        frame[1] = frame[1] > 128
    return made


def samples(made: Sequence[np.ndarray]) -> Samples:
    """The frames as a dataset that is kept in the object store, without validation images."""
    rows = tuple(shards.Row("memory", number) for number in range(len(made)))
    return Samples(rows, (), SIZE, tuple(ray.put(frame) for frame in made))


class Planned(Dataset):
    """The plan's rows as samples, made in a DataLoader's process."""

    def __init__(self, made: Sequence[np.ndarray], source: blocks.Source) -> None:
        self.made, self.source = made, source
        plan = source.schedule
        self.rows = np.concatenate([plan.rows(step) for step in range(plan.steps)])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> torch.Tensor:
        cv2.setNumThreads(1)
        row = self.rows[place]
        sample = int(row[SAMPLE])
        key = (self.source.schedule.seed, int(row[EPOCH]), sample, int(row[VARIANT]))
        return torch.from_numpy(self.made_of(self.made[sample], key))

    def made_of(self, planes: np.ndarray, key: tuple[int, int, int, int]) -> np.ndarray:
        """A sample transformed."""
        return blocks.transform(planes, key, self.source)


def loader(planned: Planned) -> DataLoader:
    """Batches in the plan's order, by as many processes as Ray has CPUs."""
    # fork: the frames are shared with the processes as they stand; nothing else in this process holds a lock then.
    return DataLoader(
        planned,
        planned.source.schedule.batch_size,
        num_workers=int(ray.cluster_resources()["CPU"]),
        multiprocessing_context="fork",
        prefetch_factor=4,
    )
