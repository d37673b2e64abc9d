"""From the index of samples to augmented, ordered uint8 batches, streamed by Ray Data.

1. Each rank's share of the run's order (order.py) is cut into blocks of about 64 samples: a block is a number.
2. Ray Data tasks turn a block's number into its samples: read, transform, stack. One execution serves the whole
   run, so that no epoch waits for the last one (a dataset an epoch: a third of the speed).
3. The rank's process takes the blocks in order and slices its batches from them without a copy.

A rank has a stream of its own instead of a part of one split stream: what it sees then depends on (seed, step, rank)
alone, no coordinator stands between, and no row is dropped to make the parts equal.
"""

import gc
import time
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import ray
import ray.data
import torch
from ray.data import ExecutionOptions, ExecutionResources
from ray.data._internal.execution.execution_callback import ExecutionCallback
from torch import Tensor

from raylivecell import shards
from raylivecell.blocks import PLANES, Kept, Sample, Share, Source, decode, load_blocks, read_sample

# Batches are views of the object store, which is read-only; the loop only reads them.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")

# Ray Data's costs of a task (30 to 100 ms) are spread over so many samples: three nodes of a CPU each do 2.5 to 2.75
# times the work of one, with 32 samples 2.3 to 2.4 times (`bench scale`); 8 halve the speed.
BLOCK_SAMPLES = 64
# Shortest time between two rounds of Ray Data's scheduler, seconds; see _Unhurried.
ROUND_S = 0.05
# Decoded samples are kept in the object store while they take no more than this part of it.
KEEP_SHARE = 0.3


def task_cpus() -> float:
    """CPUs that a task of Ray Data reserves: 1; on several machines without GPUs 0.5, and so do workers there.

    On them reservations of 0.6 would leave 0.4 of a CPU on each machine and no room for a task on any, and Ray Data
    would wait for ever; as it would where a machine is lost, and workers of a whole CPU each take all that is left.
    """
    machines = sum(one["Alive"] for one in ray.nodes())
    return 1.0 if machines == 1 or ray.cluster_resources().get("GPU", 0) else 0.5


class _Unhurried(ExecutionCallback):
    """Lets Ray Data's scheduler rest between rounds.

    It runs in a thread of the process that reads, and while that process holds blocks enough it turns without a pause
    and holds Python's lock: it had 84 % of it, and training on two cores ran at half its speed (Ray 2.60).
    """

    def __init__(self) -> None:
        self.last = 0.0

    def on_execution_step(self, executor: Any) -> None:
        """Sleep for what is left of the round."""
        time.sleep(max(0.0, self.last + ROUND_S - time.monotonic()))
        self.last = time.monotonic()


class Stream(Iterator[dict[str, Tensor]]):
    """Batches of `rank` from step `start` to the end of the plan; the next block is fetched while one is used.

    Each is {"planes": uint8 (b, 2 + C, h, w), "rows": int64 (b, 3) of the order}, b = batch_size / ranks, read-only.
    It works from its making on; close it where it may not be read to its end.

    Args:
        source: samples and transformations.
        start: the first step.
        rank: this process's place among `ranks`.
        ranks: processes that share each batch.
        memory: bytes of the object store this stream may fill; default: Ray Data's own limit.
    """

    def __init__(self, source: Source, start: int, rank: int, ranks: int, memory: int | None = None) -> None:
        batch = source.plan.batch_size // ranks
        share = Share(start, rank, ranks, max(1, BLOCK_SAMPLES // batch))
        self._blocks = _blocks(source, share, memory)
        self._fetcher = ThreadPoolExecutor(1, "blocks")
        self._batches = self._slices(batch, self._fetcher.submit(next, self._blocks, None))

    def __next__(self) -> dict[str, Tensor]:
        return next(self._batches)

    def _slices(self, batch: int, fetched: Future) -> Generator[dict[str, Tensor], None, None]:
        while (block := fetched.result()) is not None:
            fetched = self._fetcher.submit(next, self._blocks, None)
            for first in range(0, len(block["rows"]), batch):
                yield {name: torch.from_numpy(values[first : first + batch]) for name, values in block.items()}

    def close(self) -> None:
        """Stop reading: its tasks end, its CPUs and the object store are free."""
        self._fetcher.shutdown(cancel_futures=True)
        self._blocks.close()
        self._batches.close()
        gc.collect()  # an execution is a cycle of objects with blocks in hand: 50 MiB after three trials


def _blocks(source: Source, share: Share, memory: int | None) -> Generator[dict[str, np.ndarray], None, None]:
    """The share's blocks in order, made by Ray Data tasks."""
    blocks = -(-(source.plan.steps - share.start) // share.block_steps)
    if blocks <= 0:
        return
    context = ray.data.DataContext.get_current()
    context.execution_options = ExecutionOptions(
        preserve_order=True, resource_limits=ExecutionResources(object_store_memory=memory)
    )
    context.enable_progress_bars = False
    context.custom_execution_callback_classes = [_Unhurried]
    context.raise_original_map_exception = True  # else a bad shard's name is lost in Ray Data's own error
    context.execution_no_progress_timeout_s = 300  # starved of CPUs, it would hang for 30 minutes
    dataset = ray.data.range(blocks, override_num_blocks=blocks).map_batches(
        cast(Any, load_blocks),
        batch_size=None,
        fn_kwargs={"source": source, "share": share},
        num_cpus=source.task_cpus,
    )
    dataset.set_name(f"rank_{share.rank}")  # in the dashboard
    # Ray Data's own thread that prefetches would never end, nor let go of its blocks, where we stop early (2.60).
    yield from cast(Any, dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0))


@dataclass(frozen=True)
class Samples:
    """A dataset's training and validation images: where they lie and, where they fit, decoded in the object store.

    Opened once by the driver, for all workers of a run and all trials of a sweep.
    """

    train: Sequence[shards.Row]
    val: Sequence[shards.Row]
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
    train, val = (shards.list_rows(data, split) for split in ("train", "val"))
    kept_train = keep(train, sample_bytes(data, "train", cells), cells)
    kept_val = keep(val, sample_bytes(data, "val", cells), cells)
    return Samples(train, val, kept_train, kept_val, cells, shards.provenance(data), task_cpus())


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
