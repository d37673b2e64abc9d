"""Reader for the tags of TIFF and BigTIFF files.

It replaces tifffile, which silently repairs contradictory tags, hiding damage, and eagerly reads metadata of many
vendors, without a limit for untrusted files. This reader parses only the requested tags and copies nothing.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from raylivecell.core.errors import DamagedImageError, UnsupportedImageError
from raylivecell.images.ranges import Data

MAX_DIRECTORIES = 10_000
"""Limit on the images of a file; the rest are not counted."""
_MAX_ENTRIES = 4096
"""Limit on the tags of a directory; no known writer reaches it."""
_MAX_VALUES = 2**22
"""Limit on the values of a tag, above any tag read here; as Python integers they need 150 MB."""
_INTEGERS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 13: "I", 16: "Q", 17: "q", 18: "Q"}
_TEXT = (1, 2, 7)
_HEADERS = {b"II*\0": ("<", False), b"MM\0*": (">", False), b"II+\0": ("<", True), b"MM\0+": (">", True)}


class Entry(NamedTuple):
    """Type and location of the values of one tag."""

    kind: int
    """TIFF number of the value type."""
    values: int
    """Number of values."""
    start: int
    """Position of the values in the file."""


@dataclass(frozen=True)
class Directory:
    """The tags of one image in a TIFF file."""

    data: Data
    """The complete file."""
    order: str
    """Byte order, `<` or `>` as in struct."""
    big: bool
    """Whether the file is a BigTIFF."""
    entries: dict[int, list[Entry]]
    """By tag number; a list, since some writers store several image descriptions."""

    def numbers(self, code: int) -> tuple[int, ...]:
        """Return the values of an integer tag, empty if absent; raise DamagedImageError if it is invalid."""
        if code not in self.entries:
            return ()
        kind, count, start = self.entries[code][0]
        if kind not in _INTEGERS:
            raise DamagedImageError(f"TIFF tag {code} is not an integer")
        if count > _MAX_VALUES:
            raise DamagedImageError(f"TIFF tag {code} has {count} values")
        size = count * struct.calcsize(f"={_INTEGERS[kind]}")
        if start + size > len(self.data):
            raise DamagedImageError(f"TIFF tag {code} extends beyond the end of the file")
        return struct.unpack(f"{self.order}{count}{_INTEGERS[kind]}", self.data[start : start + size])

    def number(self, code: int, default: int) -> int:
        """Return the first value of an integer tag, `default` if absent."""
        return (self.numbers(code) or (default,))[0]

    def count(self, code: int) -> int:
        """Return the number of values of a tag, 0 if absent."""
        return self.entries[code][0].values if code in self.entries else 0

    def texts(self, code: int, max_bytes: int) -> list[bytes]:
        """Return the first `max_bytes` bytes of each of the first four text tags with this number."""
        entries = [entry for entry in self.entries.get(code, [])[:4] if entry.kind in _TEXT]
        return [self.data[entry.start : entry.start + min(entry.values, max_bytes)] for entry in entries]


def read_directories(data: Data) -> Iterator[Directory]:
    """Yield the directories of the main chain of a file.

    Raises:
        UnreadableImageError: the chain is broken, cyclic or longer than MAX_DIRECTORIES.
    """
    order, big = _HEADERS[data[:4]]
    offset = _unpack(data, f"{order}Q" if big else f"{order}I", 8 if big else 4)
    seen: set[int] = set()
    while offset:
        if offset in seen:
            raise DamagedImageError("TIFF directories form a cycle")
        if len(seen) == MAX_DIRECTORIES:
            raise UnsupportedImageError(f"contains over {MAX_DIRECTORIES} images; split the file")
        seen.add(offset)
        directory, offset = read_directory(data, order, big, offset)
        yield directory


def read_directory(data: Data, order: str, big: bool, offset: int) -> tuple[Directory, int]:
    """Return the directory at `offset`, and the offset of the next one, 0 after the last."""
    count_format, entry_format, inline_size = ("Q", f"{order}HHQQ", 8) if big else ("H", f"{order}HHII", 4)
    count = _unpack(data, order + count_format, offset)
    start, size = offset + struct.calcsize(f"={count_format}"), struct.calcsize(entry_format)
    end = start + count * size
    if count > _MAX_ENTRIES or end > len(data):
        raise DamagedImageError("TIFF directory extends beyond the end of the file")
    entries: dict[int, list[Entry]] = {}
    for code, kind, values, value in struct.iter_unpack(entry_format, data[start:end]):
        start += size
        letter = _INTEGERS.get(kind, "B" if kind in _TEXT else "")
        inline = letter and values * struct.calcsize(f"={letter}") <= inline_size
        entries.setdefault(code, []).append(Entry(kind, values, start - inline_size if inline else value))
    return Directory(data, order, big, entries), _unpack(data, order + ("Q" if big else "I"), end)


def _unpack(data: Data, number_format: str, offset: int) -> int:
    end = offset + struct.calcsize(number_format)
    if end > len(data):
        raise DamagedImageError("TIFF file is truncated: a directory is beyond its end")
    return int(struct.unpack(number_format, data[offset:end])[0])
