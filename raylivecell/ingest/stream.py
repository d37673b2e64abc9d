"""Augmented uint8 batches in the order of the schedule, streamed by Ray Data.

1. Each rank's share of the schedule (ingest/order.py) is divided into numbered blocks of about 64 samples.
2. A Ray Data task turns a block number into its samples: read, transform, stack. One execution serves the complete run,
   so that no epoch waits for the previous one (one dataset per epoch is a third as fast).
3. The rank's process receives the blocks in order and slices its batches from them without a copy.

No torch here: a training process starts its stream before it imports torch, so that both run at the same time.

Each rank has its own stream instead of a part of one split stream: its samples then depend only on (seed, step, rank),
no coordinator is needed, and no row is dropped to make the parts equal.
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

# Maximum samples and bytes of a block. After each task a core waits about 40 ms for the next: two cores process 490
# complete images per second in blocks of 61, and 390 in blocks of 32; crops of 256x256 arrive at 990, 1,380 and 1,660
# per second in blocks of 64, 128 and 256.
BLOCK_SAMPLES, BLOCK_BYTES = 256, 64 * 2**20
# Minimum number of blocks that fit into a stream's memory: one in use, one prefetched, and the rest in tasks.
STREAM_BLOCKS = 8


class Stream(Iterator[Batch]):
    """Batches of `rank` from step `start` to the end of the schedule; prefetches one block.

    A batch is {"planes": uint8 (b, 2 + C, h, w), "rows": int64 (b, 3) of the schedule}, b = batch_size / ranks:
    read-only views of the object store. The stream starts at construction; close it if it may not be read to its end.

    Args:
        source: samples and transforms.
        start: first step.
        rank: DDP rank of this process, 0 to `ranks` - 1.
        ranks: number of processes that share each batch.
        memory: bytes of the object store this stream may fill; None: Ray Data's own limit.
    """

    def __init__(self, source: Source, start: int, rank: int, ranks: int, memory: int | None = None) -> None:
        batch = source.schedule.batch_size // ranks
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
        """Stop reading: ends the tasks and frees their CPUs and the object store."""
        self._fetcher.shutdown(cancel_futures=True)
        self._blocks.close()
        self._batches.close()
        gc.collect()  # executions are reference cycles that keep blocks alive: 50 MiB after three trials


def block_steps(source: Source, batch: int, memory: int | None) -> int:
    """Steps per block, of `batch` samples each, for a stream with `memory` bytes of the object store."""
    block_bytes = BLOCK_BYTES if memory is None else min(BLOCK_BYTES, memory // STREAM_BLOCKS)
    return max(1, min(BLOCK_SAMPLES, block_bytes // math.prod(source.shape())) // batch)


def _blocks(source: Source, share: RankShard, memory: int | None) -> Generator[Batch, None, None]:
    """Yield the blocks of the share in order, read by Ray Data tasks."""
    count = -(-(source.schedule.steps - share.start) // share.block_steps)
    if count <= 0:
        return
    settings = {
        "execution_options": ExecutionOptions(
            preserve_order=True, resource_limits=ExecutionResources(object_store_memory=memory)
        ),
        "raise_original_map_exception": True,  # otherwise Ray Data's own error hides the name of a bad shard
        "target_max_block_size": None,  # otherwise large blocks are split, possibly within a batch
    }
    with scheduler_pace() as callbacks:
        with data_settings(**settings, custom_execution_callback_classes=callbacks):
            dataset = ray.data.read_datasource(
                SamplesDatasource(source, share, count), override_num_blocks=count, num_cpus=source.task_cpus
            )
        dataset.set_name(f"rank_{share.rank}")  # shown in the dashboard
        # No prefetching: if reading stops early, Ray Data's prefetching thread never ends nor frees its blocks (2.60).
        yield from cast(Any, dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0))
