"""From the index of samples to augmented, ordered uint8 batches, streamed by Ray Data.

1. Each rank's share of the run's order (ingest/order.py) is cut into blocks of about 64 samples: a block is a number.
2. Ray Data tasks turn a block's number into its samples: read, transform, stack. One execution serves the whole
   run, so that no epoch waits for the last one (a dataset an epoch: a third of the speed).
3. The rank's process takes the blocks in order and slices its batches from them without a copy.

No torch here: a training process starts its stream before it imports torch, so that both happen at the same time.

A rank has a stream of its own instead of a part of one split stream: what it sees then depends on (seed, step, rank)
alone, no coordinator stands between, and no row is dropped to make the parts equal.
"""

import gc
import math
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast

import numpy as np
import ray.data
from ray.data import ExecutionOptions, ExecutionResources

from raylivecell.ingest.blocks import RankShard, Source
from raylivecell.ingest.execution import SamplesDatasource
from raylivecell.runtime.data_settings import data_settings
from raylivecell.runtime.ray_internals import scheduler_pace

Batch = dict[str, np.ndarray]

# A task's samples: at most so many, of so many bytes together. After each task a core waits some 40 ms for the next:
# two cores do 490 whole frames a second in blocks of 61, and 390 in blocks of 32; crops of 256x256 come at 990, 1,380
# and 1,660 a second in blocks of 64, 128 and 256.
BLOCK_SAMPLES, BLOCK_BYTES = 256, 64 * 2**20
# Blocks that a stream's memory has room for at least: one that is read, one ahead, and those of some tasks.
STREAM_BLOCKS = 8


class Stream(Iterator[Batch]):
    """Batches of `rank` from step `start` to the end of the plan; the next block is fetched while one is used.

    Each is {"planes": uint8 (b, 2 + C, h, w), "rows": int64 (b, 3) of the order}, b = batch_size / ranks, read-only:
    views of the object store.
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
        share = RankShard(start, rank, ranks, block_steps(source, batch, memory))
        self._blocks = _blocks(source, share, memory)
        self._fetcher = ThreadPoolExecutor(1, "blocks")
        self._batches = self._slices(batch, self._fetcher.submit(next, self._blocks, None))

    def __next__(self) -> Batch:
        return next(self._batches)

    def _slices(self, batch: int, fetched: Future) -> Generator[Batch, None, None]:
        while (block := fetched.result()) is not None:
            fetched = self._fetcher.submit(next, self._blocks, None)
            for first in range(0, len(block["rows"]), batch):
                yield {name: values[first : first + batch] for name, values in block.items()}

    def close(self) -> None:
        """Stop reading: its tasks end, its CPUs and the object store are free."""
        self._fetcher.shutdown(cancel_futures=True)
        self._blocks.close()
        self._batches.close()
        gc.collect()  # an execution is a cycle of objects with blocks in hand: 50 MiB after three trials


def block_steps(source: Source, batch: int, memory: int | None) -> int:
    """Steps of a block, of `batch` samples each, in a stream of `memory` bytes of the object store."""
    room = BLOCK_BYTES if memory is None else min(BLOCK_BYTES, memory // STREAM_BLOCKS)
    return max(1, min(BLOCK_SAMPLES, room // math.prod(source.shape())) // batch)


def _blocks(source: Source, share: RankShard, memory: int | None) -> Generator[Batch, None, None]:
    """The share's blocks in order, made by Ray Data tasks."""
    count = -(-(source.plan.steps - share.start) // share.block_steps)
    if count <= 0:
        return
    settings = {
        "execution_options": ExecutionOptions(
            preserve_order=True, resource_limits=ExecutionResources(object_store_memory=memory)
        ),
        "raise_original_map_exception": True,  # else a bad shard's name is lost in Ray Data's own error
        "target_max_block_size": None,  # else a large block is cut, and not between two batches
    }
    with scheduler_pace() as callbacks:
        with data_settings(**settings, custom_execution_callback_classes=callbacks):
            dataset = ray.data.read_datasource(
                SamplesDatasource(source, share, count), override_num_blocks=count, num_cpus=source.task_cpus
            )
        dataset.set_name(f"rank_{share.rank}")  # in the dashboard
        # Ray Data's thread that prefetches would never end, nor release its blocks, where we stop early (2.60).
        yield from cast(Any, dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0))
