"""A Ray Data source for a rank's part of the run: one task per block.

No torch here, as in ingest/blocks.py: every task imports this.
"""

from functools import partial
from typing import Any

import ray
import ray.data
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask

from raylivecell.ingest.blocks import RankShard, Source, read_block


class SamplesDatasource(ray.data.Datasource):
    """The blocks of a rank, one read task each.

    One operator: mapping block numbers to samples would be two, which Ray Data fuses only if tasks reserve 1.0 CPU.
    """

    def __init__(self, source: Source, share: RankShard, blocks: int) -> None:
        self.work, self.blocks = ray.put((source, share)), blocks

    def estimate_inmemory_data_size(self) -> None:
        """Return None, unknown; the number of blocks is set by the caller."""

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        """Return one task per block, a few hundred bytes each."""
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(partial(read_block, number, self.work), unknown) for number in range(self.blocks)]
