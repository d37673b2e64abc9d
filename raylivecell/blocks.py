"""A block of the order's numbers -> its samples, decoded, transformed, stacked: what Ray Data's tasks do.

No torch here: a data task's process starts 1 s sooner without it, and is 235 MiB smaller.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import ray

from raylivecell import augment, fields, shards
from raylivecell.order import EPOCH, SAMPLE, VARIANT, Plan

PLANES = ("image", "foreground", "border")

Kept = tuple["ray.ObjectRef", ...] | None
"""Decoded samples in the object store, or none: read from the shards every time."""
Sample = np.ndarray | tuple[np.ndarray, np.ndarray]
"""A decoded sample: uint8 (3, H, W) as PLANES; or, where cells are told apart, the image and `fields.pack`'s."""


@dataclass(frozen=True)
class Source:
    """Where samples come from and what is done to them; small, sent to every task."""

    rows: Sequence[shards.Row]
    plan: Plan
    config: augment.AugmentConfig
    crop: tuple[int, int] | None
    kept: Kept = None
    targets: fields.Targets = "foreground"
    task_cpus: float = 1.0
    """That a task of Ray Data reserves."""


def read_sample(row: shards.Row, cells: bool = False) -> Sample:
    """A sample decoded; `cells`: with its labels."""
    if not cells:
        sample = shards.read_row(row, PLANES)
        return np.stack([sample[name] for name in PLANES])
    sample = shards.read_row(row, ("image", "labels", "border"))
    return sample["image"], fields.pack(sample["labels"], sample["border"])


def _sample(source: Source, sample: int) -> Sample:
    return ray.get(source.kept[sample]) if source.kept else read_sample(source.rows[sample], _tells_cells(source))


def _tells_cells(source: Source) -> bool:
    return source.targets != "foreground"


def transform(
    sample: Sample, key: tuple[int, int, int, int], source: Source, out: np.ndarray | None = None
) -> np.ndarray:
    """A sample as it is trained on, `fields.planes` (h, w), in `out` where given: a pure function of it and the key.

    Where `source.config.device` is a GPU, the whole frame as it is: `device_augment` does the rest.

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
        moved = augment.augment(*sample, rng, source.config, source.crop) if key[3] else None
        return fields.planes(*(moved or augment.plain(*sample, rng, source.crop)), source.targets, out)
    if key[3]:
        return augment.augment_planes(sample, rng, source.config, source.crop, out)
    return augment.plain_planes(sample, rng, source.crop, out)


def load(rows: np.ndarray, source: Source) -> np.ndarray:
    """Rows of the order (n, 3) as planes, uint8 (n, 2 + C, h, w)."""
    cv2.setNumThreads(1)  # a task has one CPU
    planes = 2 + len(fields.CHANNELS[source.targets])
    batch: np.ndarray | None = None
    for place, row in enumerate(rows):
        number = int(row[SAMPLE])
        sample = _sample(source, number)
        if batch is None:
            crop = source.crop if source.config.device == "cpu" else None
            batch = np.empty((len(rows), planes, *(crop or sample[0].shape)), np.uint8)
        transform(sample, (source.plan.seed, int(row[EPOCH]), number, int(row[VARIANT])), source, batch[place])
    assert batch is not None, "a block has rows"
    return batch


@dataclass(frozen=True)
class Share:
    """A rank's part of the run, from a step on."""

    start: int
    rank: int
    ranks: int
    block_steps: int
    """Steps in a block."""

    def block_rows(self, block: int, plan: Plan) -> np.ndarray:
        """Rows of the order in a block, step after step."""
        first = self.start + block * self.block_steps
        steps = range(first, min(first + self.block_steps, plan.steps))
        return np.concatenate([plan.rank_rows(step, self.rank, self.ranks) for step in steps])


def load_blocks(blocks: dict[str, np.ndarray], source: Source, share: Share) -> dict[str, Any]:
    """Blocks by their numbers: {"planes": uint8 (n, 2 + C, h, w), "rows": int64 (n, 3) of the order}."""
    rows = np.concatenate([share.block_rows(int(block), source.plan) for block in blocks["id"]])
    return {"planes": load(rows, source), "rows": rows}


@ray.remote
def decode(row: shards.Row, cells: bool) -> Sample:
    """`read_sample` as a task of Ray's."""
    return read_sample(row, cells)
