"""The samples of a dataset, opened by the driver: their location and, if they fit into memory, their cache."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from raylivecell.data import combined, shards
from raylivecell.data.combined import Data
from raylivecell.images.intensity import LIVECELL, Intensity
from raylivecell.images.scale import UNSCALED, Scale
from raylivecell.ingest.blocks import (
    CachedSamples,
    Reader,
    ValidationSample,
    decode,
    read_sample,
    read_validation_sample,
)
from raylivecell.runtime import session
from raylivecell.targets.sample_planes import bytes_per_pixel

# Budget of a run, as fractions of the object store's free bytes at its start: decoded training and validation samples
# together, and the streams of all workers or trials. Fractions of the free bytes, so that concurrent runs and sweeps
# never exceed the store: a second run finds at least 45 % free and fills at most 55 % of that.
CACHE_SHARE, STREAM_SHARE = 0.3, 0.25
# Images per decoding task. A process imports for 0.8 s before its first image and decodes one in about 15 ms.
IMAGES_PER_TASK = 64


@dataclass(frozen=True)
class Samples:
    """Training and validation images of a dataset: their location and, if they fit, a decoded copy in the object store.

    The driver opens them once for all workers of a run and all trials of a sweep.
    """

    train: Sequence[shards.Row]
    val: Sequence[shards.Row]
    frame: tuple[int, int]
    """Height and width of the training images; those of the largest if they differ."""
    cached_train: CachedSamples = None
    cached_val: CachedSamples = None
    cells: bool = False
    """Whether samples include labels."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """`combined.provenance` of the data."""
    task_cpus: float = 1.0
    """`Source.task_cpus`."""
    intensity: Intensity = LIVECELL
    """Intensity rule of the dataset: the mapping from stored pixels to grey levels."""
    scale: Scale = UNSCALED
    """Pixel size and cell size of the dataset."""
    datasets: tuple[tuple[int, float], ...] = ()
    """`SampleSchedule.datasets`."""

    def val_sample(self, index: int) -> ValidationSample:
        """Return a validation sample."""
        return (
            ray.get(self.cached_val[index]) if self.cached_val else read_validation_sample(self.val[index], self.cells)
        )


def open_samples(data: Data, cells: bool = False) -> Samples:
    """Open the samples of one dataset or several, with labels if `cells`; needs Ray."""
    budget, cached = cache_budget_bytes(), {}
    rows = {split: combined.list_rows(data, split) for split in ("train", "val")}
    # Training samples first: they are read in every epoch.
    for split, read in (("train", read_sample), ("val", read_validation_sample)):
        size = len(rows[split]) * sample_bytes(data, split, cells)
        cached[split] = cache(rows[split], size, budget, cells, read)
        budget -= size if cached[split] else 0
    frame = max(combined.image_sizes(data, "train"), key=math.prod, default=(0, 0))
    return Samples(
        rows["train"],
        rows["val"],
        frame,
        cached["train"],
        cached["val"],
        cells,
        combined.provenance(data),
        session.task_cpus(),
        combined.intensity(data),
        combined.scale(data),
        () if isinstance(data, str) else combined.sample_counts(data, "train"),
    )


def sample_bytes(data: Data, split: str, cells: bool) -> int:
    """Bytes of the split's largest decoded sample, including masks or labels."""
    pixels = max((height * width for height, width in combined.image_sizes(data, split)), default=0)
    return pixels * bytes_per_pixel(cells)


def cache(
    rows: Sequence[shards.Row], size: float, budget: float, cells: bool = False, read: Reader = read_sample
) -> CachedSamples:
    """Decode the samples into the object store, one object each, if their `size` is within `budget` (both in bytes)."""
    if size > budget:
        return None
    tasks = [rows[first : first + IMAGES_PER_TASK] for first in range(0, len(rows), IMAGES_PER_TASK)]
    return tuple(ref for task_rows in tasks for ref in _decode(read, task_rows, cells))


def _decode(read: Reader, rows: Sequence[shards.Row], cells: bool) -> Sequence["ray.ObjectRef"]:
    refs: Any = decode.options(num_returns=len(rows)).remote(read, rows, cells)
    return refs if len(rows) > 1 else [refs]


def cache_budget_bytes() -> float:
    """Bytes of the object store for decoded samples of training and validation together."""
    return CACHE_SHARE * free_bytes()


def stream_budget_bytes() -> int:
    """Bytes of the object store for the streams of all workers and trials together; call before samples are cached."""
    return int(STREAM_SHARE * free_bytes())


def free_bytes() -> float:
    """Free bytes of the cluster's object store."""
    return float(ray.available_resources().get("object_store_memory", 0))
