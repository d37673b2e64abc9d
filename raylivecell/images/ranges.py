"""Files whose parts are read when needed: the directories of a stack of gigabytes, or one plane of it."""

from collections import OrderedDict
from typing import IO, Any

from raylivecell.core.errors import MachineError, os_error_line

BLOCK = 2**16
"""Bytes per read of small parts."""
MAX_BLOCKS = 64
"""Blocks in memory: 4 MiB."""


class RangeReader:
    """A file as an object that is sliced like bytes; MachineError if it cannot be read."""

    def __init__(self, stream: IO[bytes] | Any) -> None:
        """Read from `stream`, which can seek; it remains open."""
        self.stream = stream
        self.size = stream.seek(0, 2)
        self.blocks: OrderedDict[int, bytes] = OrderedDict()

    def __len__(self) -> int:
        return int(self.size)

    def __getitem__(self, part: slice) -> bytes:
        """Return the bytes of a slice without a step."""
        start, stop, _ = part.indices(self.size)
        if stop - start > BLOCK:
            return self._read(start, stop)
        first, last = start // BLOCK, max(start, stop - 1) // BLOCK
        data = b"".join(self._block(number) for number in range(first, last + 1))
        return data[start - first * BLOCK : max(start, stop) - first * BLOCK]

    def _block(self, number: int) -> bytes:
        if number in self.blocks:
            self.blocks.move_to_end(number)
            return self.blocks[number]
        data = self.blocks[number] = self._read(number * BLOCK, min(self.size, (number + 1) * BLOCK))
        if len(self.blocks) > MAX_BLOCKS:
            self.blocks.popitem(last=False)
        return data

    def _read(self, start: int, stop: int) -> bytes:
        size = max(0, stop - start)
        try:
            self.stream.seek(start)
            data = self.stream.read(size)
        except OSError as error:
            raise MachineError(os_error_line(error)) from error
        if len(data) != size:
            raise MachineError(f"the file became shorter while it was read, from {self.size} bytes; run again")
        return bytes(data)


Data = bytes | RangeReader
"""Content of a file."""
