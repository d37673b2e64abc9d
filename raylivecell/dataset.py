"""A dataset as a run's driver opens it: where the samples lie, and they themselves, decoded, where memory has room."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator
from ray.data._internal.stats import get_or_create_stats_actor

from raylivecell import runtime, shards
from raylivecell.blocks import PLANES, Kept, Sample, decode, read_sample

# Decoded samples are kept in the object store while they take no more than this part of it.
KEEP_SHARE = 0.3


@dataclass(frozen=True)
class Samples:
    """A dataset's training and validation images: where they lie and, where they fit, decoded in the object store.

    Opened once by the driver, for all workers of a run and all trials of a sweep.
    """

    train: Sequence[shards.Row]
    val: Sequence[shards.Row]
    frame: tuple[int, int]
    """Height and width of the training images; of the largest, where they differ."""
    kept_train: Kept = None
    kept_val: Kept = None
    cells: bool = False
    """Whether samples hold labels."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """`shards.provenance` of the dataset."""
    task_cpus: float = 1.0
    """`Source.task_cpus`."""

    def val_sample(self, number: int) -> Sample:
        """A whole validation image as `read_sample` gives it."""
        return ray.get(self.kept_val[number]) if self.kept_val else read_sample(self.val[number], self.cells)


def open_samples(data: str, cells: bool = False) -> Samples:
    """The samples of the dataset at `data`, with labels where `cells`; needs Ray."""
    # A cluster has one of each, which Ray Train's controller and the first stream would make and wait for: 1.5 s each.
    get_or_create_autoscaling_coordinator()
    get_or_create_stats_actor()
    train, val = (shards.list_rows(data, split) for split in ("train", "val"))
    kept_train = keep(train, sample_bytes(data, "train", cells), cells)
    kept_val = keep(val, sample_bytes(data, "val", cells), cells)
    frame = max(shards.image_sizes(data, "train"), key=math.prod, default=(0, 0))
    return Samples(train, val, frame, kept_train, kept_val, cells, shards.provenance(data), runtime.task_cpus())


def sample_bytes(data: str, split: str, cells: bool) -> int:
    """Bytes of the split's largest image, decoded, with its masks or labels."""
    pixels = max((height * width for height, width in shards.image_sizes(data, split)), default=0)
    return pixels * (5 if cells else len(PLANES))


def keep(rows: Sequence[shards.Row], largest: int, cells: bool = False) -> Kept:
    """The decoded samples in the object store, one object each, where they fit into KEEP_SHARE of it; else none.

    `largest`: bytes of the largest.
    """
    return tuple(decode.remote(row, cells) for row in rows) if largest * len(rows) <= room() else None


def room() -> float:
    """Bytes of the object store that decoded samples may take."""
    return KEEP_SHARE * float(ray.cluster_resources().get("object_store_memory", 0))
