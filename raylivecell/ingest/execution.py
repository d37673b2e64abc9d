"""A rank's part of the run as Ray Data reads it: one task for each block.

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
    """The blocks of a rank's share, one read task for each.

    One operator; block numbers mapped to samples would be two, which Ray Data fuses only for tasks of a whole CPU.
    """

    def __init__(self, source: Source, share: RankShard, blocks: int) -> None:
        self.work, self.blocks = ray.put((source, share)), blocks

    def estimate_inmemory_data_size(self) -> None:
        """Unknown; the number of blocks is given."""

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        """One of a few hundred bytes for each block."""
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(partial(read_block, number, self.work), unknown) for number in range(self.blocks)]
