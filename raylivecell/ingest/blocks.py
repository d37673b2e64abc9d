"""A block of the order's numbers -> its samples, decoded, transformed, stacked: what Ray Data's tasks do.

No torch here: a data task's process starts 1 s sooner without it, and is 235 MiB smaller.
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
from raylivecell.ingest import augment, target_maps
from raylivecell.ingest.order import EPOCH, SAMPLE, VARIANT, SampleSchedule
from raylivecell.recipe import CHANNELS, AugmentConfig, Targets

PLANES = ("image", "foreground", "border")

CachedSamples = tuple["ray.ObjectRef", ...] | None
"""Decoded samples in the object store, or none: read from the shards every time."""
Sample = np.ndarray | tuple[np.ndarray, np.ndarray]
"""A decoded sample: uint8 (3, H, W) as PLANES; or, where cells are told apart, the image and `target_maps.pack`'s."""


@dataclass(frozen=True)
class Source:
    """Where samples come from and what is done to them; small, sent to every task."""

    rows: Sequence[shards.Row]
    plan: SampleSchedule
    config: AugmentConfig
    crop: tuple[int, int] | None
    frame: tuple[int, int]
    """Height and width of an image, where no crop is taken: all are equally large then."""
    kept: CachedSamples = None
    targets: Targets = "foreground"
    task_cpus: float = 1.0
    """That a task of Ray Data reserves."""
    background: int = augment.BACKGROUND
    """Grey level of the set's background."""

    def shape(self) -> tuple[int, int, int]:
        """Of a sample as it is sent: (2 + C, h, w)."""
        crop = self.crop if self.config.device == "cpu" else None
        return (2 + len(CHANNELS[self.targets]), *(crop or self.frame))


def read_sample(row: shards.Row, cells: bool = False) -> Sample:
    """A sample decoded; `cells`: with its labels."""
    if not cells:
        sample = shards.read_row(row, PLANES)
        return np.stack([sample[name] for name in PLANES])
    sample = shards.read_row(row, ("image", "labels", "border"))
    return sample["image"], target_maps.pack(sample["labels"], sample["border"])


class ValidationSample(NamedTuple):
    """A whole image that a network is scored on."""

    image: np.ndarray
    """uint8 (H, W)."""
    truth: np.ndarray
    """(H, W): labels uint16 where the recipe segments single cells, else the foreground, uint8 0 or 1."""
    padding: np.ndarray | None
    """bool (H, W), where the frame is padding; None: nowhere."""


def read_validation_sample(row: shards.Row, cells: bool = False) -> ValidationSample:
    """A validation sample decoded; `cells`: with its labels."""
    truth = "labels" if cells else "foreground"
    sample = shards.read_row(row, ("image", truth, "padding"))
    return ValidationSample(sample["image"], sample[truth], sample["padding"])


Reader = Callable[[shards.Row, bool], Sample | ValidationSample]


def _samples(source: Source, numbers: Sequence[int]) -> Iterator[Sample]:
    """The samples of these numbers, in their order."""
    if source.kept:
        yield from ray.get([source.kept[number] for number in numbers])
    else:
        for number in numbers:
            yield read_sample(source.rows[number], source.targets != "foreground")


def transform(
    sample: Sample, key: tuple[int, int, int, int], source: Source, out: np.ndarray | None = None
) -> np.ndarray:
    """A training sample as planes (h, w) (`draw_target_maps`), in `out` if given: a pure function of sample and key.

    Where `source.config.device` is a GPU, the whole frame as it is: `gpu_augment` does the rest.

    Args:
        sample: as `read_sample` gives it; never written.
        key: (seed, epoch, sample id, variant).
        source: what is done to it.
        out: C-contiguous uint8 (2 + C, h, w).
    """
    if source.config.device == "cuda":  # by the process that trains
        assert isinstance(sample, np.ndarray), "the recipe sees to that"
        whole = np.empty_like(sample) if out is None else out
        whole[...] = sample
        return whole
    rng = np.random.default_rng(key)
    if isinstance(sample, tuple):
        moved = augment.augment(*sample, rng, source.config, source.crop, source.background) if key[3] else None
        return target_maps.draw_target_maps(*(moved or augment.plain(*sample, rng, source.crop)), source.targets, out)
    if key[3]:
        return augment.augment_planes(sample, rng, source.config, source.crop, out, source.background)
    return augment.plain_planes(sample, rng, source.crop, out)


def load(rows: np.ndarray, source: Source) -> np.ndarray:
    """Rows of the order (n, 3) as planes, uint8 (n, 2 + C, h, w)."""
    batch = empty((len(rows), *source.shape()))
    numbers = rows[:, SAMPLE].tolist()
    with opencv_threads(1):  # a task has one CPU
        for sample, number, row, out in zip(_samples(source, numbers), numbers, rows, batch):
            transform(sample, (source.plan.seed, int(row[EPOCH]), number, int(row[VARIANT])), source, out)
    return batch


class ReusedMemory:
    """A process's memory for blocks, used again for the next one once nothing refers to the last.

    Fresh pages for each block of 70 MB cost 2.4 ms an image of the system's time, as much as its transformation.
    """

    def __init__(self) -> None:
        self.memory = np.empty(0, np.uint8)
        self.last: Callable[[], np.ndarray | None] = lambda: None

    def empty(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """An array of undefined values."""
        size = math.prod(shape)
        if self.memory.size < size or self.last() is not None:
            self.memory = np.empty(size, np.uint8)
        # An array over a memoryview, not over an array, is what its slices, and Arrow's buffers, refer to: so it is
        # alive as long as any of them.
        owner = np.frombuffer(self.memory.data, np.uint8)
        self.last = weakref.ref(owner)
        return owner[:size].reshape(shape)


empty = ReusedMemory().empty


@dataclass(frozen=True)
class RankShard:
    """A rank's part of the run, from a step on."""

    start: int
    rank: int
    ranks: int
    block_steps: int
    """Steps in a block."""

    def block_rows(self, block: int, plan: SampleSchedule) -> np.ndarray:
        """Rows of the order in a block, step after step."""
        first = self.start + block * self.block_steps
        steps = range(first, min(first + self.block_steps, plan.steps))
        return np.concatenate([plan.rank_rows(step, self.rank, self.ranks) for step in steps])


def read_block(number: int, work: "ray.ObjectRef[tuple[Source, RankShard]]") -> list[Block]:
    """A block by its number, as Ray Data has it: "planes" uint8 (n, 2 + C, h, w), "rows" int64 (n, 3) of the order."""
    source, share = ray.get(work)
    rows = share.block_rows(number, source.plan)
    return [BlockAccessor.batch_to_block({"planes": load(rows, source), "rows": rows})]


@ray.remote
def decode(read: Reader, rows: Sequence[shards.Row], cells: bool) -> Iterator[Sample | ValidationSample]:
    """Each row as `read` gives it, as a task of Ray's: an object for each."""
    for row in rows:
        yield read(row, cells)
