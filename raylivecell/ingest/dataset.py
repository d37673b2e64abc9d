"""A dataset as a run's driver opens it: where its samples are stored, and, where they fit into memory, the samples."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from raylivecell.data import shards
from raylivecell.images.intensity import LIVECELL, Intensity
from raylivecell.ingest.blocks import (
    PLANES,
    CachedSamples,
    Reader,
    ValidationSample,
    decode,
    read_sample,
    read_validation_sample,
)
from raylivecell.runtime import session

# One run's budget, in shares of the object store's bytes that are free when it starts: decoded training and validation
# samples together; the streams of all its workers or trials. Free bytes, so that runs and sweeps at the same time never
# exceed the store: a second one finds at least 45 % free, and fills at most 55 % of that.
CACHE_SHARE, STREAM_SHARE = 0.3, 0.25
# Images that one task decodes. A process imports for 0.8 s before its first image and decodes one in some 15 ms.
DECODED_AT_ONCE = 64


@dataclass(frozen=True)
class Samples:
    """A dataset's training and validation images: where they lie and, where they fit, decoded in the object store.

    Opened once by the driver, for all workers of a run and all trials of a sweep.
    """

    train: Sequence[shards.Row]
    val: Sequence[shards.Row]
    frame: tuple[int, int]
    """Height and width of the training images; of the largest, where they differ."""
    kept_train: CachedSamples = None
    kept_val: CachedSamples = None
    cells: bool = False
    """Whether samples hold labels."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """`shards.provenance` of the dataset."""
    task_cpus: float = 1.0
    """`Source.task_cpus`."""
    intensity: Intensity = LIVECELL
    """How the set's images became grey levels: the network normalises by its background."""

    def val_sample(self, number: int) -> ValidationSample:
        """A whole validation image."""
        return ray.get(self.kept_val[number]) if self.kept_val else read_validation_sample(self.val[number], self.cells)


def open_samples(data: str, cells: bool = False) -> Samples:
    """The samples of the dataset at `data`, with labels where `cells`; needs Ray."""
    budget, cached = cache_budget_bytes(), {}
    rows = {split: shards.list_rows(data, split) for split in ("train", "val")}
    # Training samples first: they are read in every epoch.
    for split, read in (("train", read_sample), ("val", read_validation_sample)):
        size = len(rows[split]) * sample_bytes(data, split, cells)
        cached[split] = cache(rows[split], size, budget, cells, read)
        budget -= size if cached[split] else 0
    frame = max(shards.image_sizes(data, "train"), key=math.prod, default=(0, 0))
    return Samples(
        rows["train"],
        rows["val"],
        frame,
        cached["train"],
        cached["val"],
        cells,
        shards.provenance(data),
        session.task_cpus(),
        shards.intensity(data),
    )


def sample_bytes(data: str, split: str, cells: bool) -> int:
    """Bytes of the split's largest image, decoded, with its masks or labels."""
    pixels = max((height * width for height, width in shards.image_sizes(data, split)), default=0)
    return pixels * (5 if cells else len(PLANES))


def cache(
    rows: Sequence[shards.Row], size: float, budget: float, cells: bool = False, read: Reader = read_sample
) -> CachedSamples:
    """The decoded samples in the object store, one object each, if their `size` is within `budget`, both in bytes."""
    if size > budget:
        return None
    parts = [rows[first : first + DECODED_AT_ONCE] for first in range(0, len(rows), DECODED_AT_ONCE)]
    return tuple(ref for part in parts for ref in _decoded(read, part, cells))


def _decoded(read: Reader, rows: Sequence[shards.Row], cells: bool) -> Sequence["ray.ObjectRef"]:
    found: Any = decode.options(num_returns=len(rows)).remote(read, rows, cells)
    return found if len(rows) > 1 else [found]


def cache_budget_bytes() -> float:
    """Bytes of the object store for decoded samples, training and validation together."""
    return CACHE_SHARE * free_bytes()


def stream_budget_bytes() -> int:
    """Bytes of the object store for the streams of all workers and trials together; ask before samples fill it."""
    return int(STREAM_SHARE * free_bytes())


def free_bytes() -> float:
    """Bytes of the cluster's object store that no object takes."""
    return float(ray.available_resources().get("object_store_memory", 0))
