"""A block of sample ids -> its samples, decoded, transformed and stacked: the work of Ray Data's tasks.

No torch here: without it, the process of a data task starts 1 s sooner and is 235 MiB smaller.
"""

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import ray
from numpy.typing import NDArray
from ray.data.block import Block, BlockAccessor

from raylivecell.core.process_settings import opencv_threads
from raylivecell.data import shards
from raylivecell.ingest import augment
from raylivecell.ingest.order import EPOCH, SAMPLE, VARIANT, SampleSchedule
from raylivecell.recipe import AugmentConfig
from raylivecell.targets import sample_planes
from raylivecell.targets.registry import Targets

CachedSamples = tuple["ray.ObjectRef", ...] | None
"""Decoded samples in the object store; None: samples are read from the shards every time."""
Sample = np.ndarray | tuple[np.ndarray, np.ndarray]
"""A decoded sample: uint8 (3, H, W) as `sample_planes.STORED`; with labels, the image and `sample_planes.pack`."""


@dataclass(frozen=True)
class Source:
    """Location and transform of the samples; small, sent to every task."""

    rows: Sequence[shards.Row]
    schedule: SampleSchedule
    config: AugmentConfig
    crop: tuple[int, int] | None
    frame: tuple[int, int]
    """Height and width of all images if they are not cropped."""
    cached: CachedSamples = None
    targets: Targets = "foreground"
    task_cpus: float = 1.0
    """CPUs that a Ray Data task reserves."""
    background: int = augment.BACKGROUND
    """Background grey level of the dataset."""

    def shape(self) -> tuple[int, int, int]:
        """Shape of a sample in a block: (2 + C, h, w)."""
        crop = self.crop if self.config.device == "cpu" else None
        return (sample_planes.count(self.targets), *(crop or self.frame))


def read_sample(row: shards.Row, cells: bool = False) -> Sample:
    """Decode a sample; with its labels if `cells`."""
    if not cells:
        sample = shards.read_row(row, (*sample_planes.STORED, "ignore"))
        foreground = sample_planes.with_ignored(sample["foreground"], sample["ignore"])
        return np.stack([sample["image"], foreground, sample["border"]])
    sample = shards.read_row(row, ("image", "labels", "border", "ignore"))
    return sample["image"], sample_planes.pack(sample["labels"], sample["border"], sample["ignore"])


class ValidationSample(NamedTuple):
    """A complete image for validation."""

    image: np.ndarray
    """uint8 (H, W)."""
    truth: np.ndarray
    """(H, W): labels uint16 if the recipe separates cells, otherwise the foreground, uint8 0 or 1."""
    padding: np.ndarray | None
    """bool (H, W), True in the image's padding; None: no padding."""
    ignored: np.ndarray | None = None
    """bool (H, W), True in the ignore region; None: the image is completely annotated."""


def read_validation_sample(row: shards.Row, cells: bool = False) -> ValidationSample:
    """Decode a validation sample; with its labels if `cells`."""
    truth = "labels" if cells else "foreground"
    sample = shards.read_row(row, ("image", truth, "padding", "ignore"))
    return ValidationSample(sample["image"], sample[truth], sample["padding"], sample["ignore"])


Reader = Callable[[shards.Row, bool], Sample | ValidationSample]


def _samples(source: Source, ids: Sequence[int]) -> Iterator[Sample]:
    """Yield the samples with these ids, in this order."""
    if source.cached:
        yield from ray.get([source.cached[sample_id] for sample_id in ids])
    else:
        for sample_id in ids:
            yield read_sample(source.rows[sample_id], source.targets != "foreground")


def transform(
    sample: Sample, key: tuple[int, int, int, int], source: Source, out: np.ndarray | None = None
) -> np.ndarray:
    """Augment or crop a training sample: a pure function of sample and key.

    If `source.config.device` is a GPU, the complete sample is returned unchanged, for `gpu_augment`.

    Args:
        sample: from `read_sample`; not modified.
        key: (seed, epoch, sample id, variant).
        source: settings of the transform.
        out: C-contiguous uint8 (2 + C, h, w) for the result.

    Returns:
        Planes as in `sample_planes`, uint8 (2 + C, h, w).
    """
    if source.config.device == "cuda":
        assert isinstance(sample, np.ndarray), "the recipe allows only foreground targets"
        copy = np.empty_like(sample) if out is None else out
        copy[...] = sample
        return copy
    rng = np.random.default_rng(key)
    if isinstance(sample, tuple):
        if key[3]:
            image, packed = augment.augment(*sample, rng, source.config, source.crop, source.background)
        else:
            image, packed = augment.random_crop(*sample, rng, source.crop)
        return sample_planes.draw(image, packed, source.targets, out)
    if key[3]:
        return augment.augment_planes(sample, rng, source.config, source.crop, out, source.background)
    return augment.random_crop_planes(sample, rng, source.crop, out)


def load(rows: np.ndarray, source: Source) -> np.ndarray:
    """Load the samples of rows (n, 3) of the schedule, as planes uint8 (n, 2 + C, h, w)."""
    batch = empty((len(rows), *source.shape()))
    ids = rows[:, SAMPLE].tolist()
    with opencv_threads(1):  # a task has one CPU
        for sample, sample_id, row, out in zip(_samples(source, ids), ids, rows, batch):
            transform(sample, (source.schedule.seed, int(row[EPOCH]), sample_id, int(row[VARIANT])), source, out)
    return batch


class ReusedMemory:
    """A process's memory for blocks, reused for the next block once nothing refers to the previous one.

    New pages for each block of 70 MB cost 2.4 ms of system time per image, as much as its transform.
    """

    def __init__(self) -> None:
        self.memory = np.empty(0, np.uint8)
        self.last: Callable[[], np.ndarray | None] = lambda: None

    def empty(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """Return an uninitialised array."""
        size = math.prod(shape)
        if self.memory.size < size or self.last() is not None:
            self.memory = np.empty(size, np.uint8)
        # A slice refers to the last array of its chain of bases. An array created from a memoryview is the last one, so
        # it lives as long as any slice or Arrow buffer of it.
        owner = np.frombuffer(self.memory.data, np.uint8)
        self.last = weakref.ref(owner)
        return owner[:size].reshape(shape)


empty = ReusedMemory().empty


@dataclass(frozen=True)
class RankShard:
    """A rank's part of the run, starting at step `start`."""

    start: int
    rank: int
    ranks: int
    block_steps: int
    """Steps per block."""

    def block_rows(self, block: int, schedule: SampleSchedule) -> np.ndarray:
        """Rows of the schedule in a block, in order of steps."""
        first = self.start + block * self.block_steps
        steps = range(first, min(first + self.block_steps, schedule.steps))
        return np.concatenate([schedule.rank_rows(step, self.rank, self.ranks) for step in steps])


def read_block(number: int, work: "ray.ObjectRef[tuple[Source, RankShard]]") -> list[Block]:
    """Block `number` for Ray Data: "planes" uint8 (n, 2 + C, h, w), "rows" int64 (n, 3) of the schedule."""
    source, share = ray.get(work)
    rows = share.block_rows(number, source.schedule)
    return [BlockAccessor.batch_to_block({"planes": load(rows, source), "rows": rows})]


@ray.remote
def decode(read: Reader, rows: Sequence[shards.Row], cells: bool) -> Iterator[Sample | ValidationSample]:
    """Ray task that applies `read` to each row, one object each."""
    for row in rows:
        yield read(row, cells)
