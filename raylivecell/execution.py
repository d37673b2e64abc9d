"""What Ray Data is given to execute: a task for each block, and a pace for its scheduler.

No torch here, as in blocks.py: every task reads these classes.
"""

import time
from functools import partial
from typing import Any

import ray
import ray.data
from ray.data._internal.execution import streaming_executor_state
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask

from raylivecell.blocks import Share, Source, read_block

# Shortest time between two rounds of Ray Data's scheduler, seconds: while blocks lie ready, and while none does.
ROUND_S, HURRY_S = 0.05, 0.02


class SamplesDatasource(ray.data.Datasource):
    """A rank's share as Ray Data reads it: a task a block.

    One operator, where numbers mapped to samples would be two: they are fused for tasks of a whole CPU alone.
    """

    def __init__(self, source: Source, share: Share, blocks: int) -> None:
        self.work, self.blocks = ray.put((source, share)), blocks

    def estimate_inmemory_data_size(self) -> None:
        """Unknown; the number of blocks is given."""

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        """One of a few hundred bytes for each block."""
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(partial(read_block, number, self.work), unknown) for number in range(self.blocks)]


class Paced(ExecutionCallback):
    """Sets the pace of Ray Data's scheduler, which runs in a thread of the process that reads (Ray 2.60).

    Without rests it turns without a pause once all its tasks have ended, and holds Python's lock for 84 % of the time:
    training on two cores ran at half its speed. While tasks run, a round waits for all of them, by itself for up to
    0.1 s, and two rounds pass before one that ended is replaced: where tasks take 0.2 s, cores idled half of the time.
    """

    def __init__(self) -> None:
        self.last = 0.0

    def before_execution_starts(self, executor: Any) -> None:
        """Shorten a round's wait."""
        streaming_executor_state.WAIT_FOR_TASK_COMPLETION_TIMEOUT_S = HURRY_S

    def on_execution_step(self, executor: Any) -> None:
        """Sleep for what is left of the round."""
        pause = ROUND_S if executor._output_node[1].output_queue else HURRY_S
        time.sleep(max(0.0, self.last + pause - time.monotonic()))
        self.last = time.monotonic()
