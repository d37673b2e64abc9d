"""Tags of TIFF and BigTIFF files as they are stored.

Not by tifffile: it repairs contradictory tags, which hides damage, and it reads metadata of many vendors eagerly, which
has no bound for an untrusted file. Here only the requested tags are read, and nothing is copied.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from raylivecell.core.errors import DamagedImageError, UnsupportedImageError

MAX_DIRECTORIES = 10_000
"""A file with more is refused without counting them."""
_MAX_ENTRIES = 4096
"""More tags than any writer's directory."""
_MAX_VALUES = 2**22
"""More values than any tag that is read here; as Python integers they fill 150 MB."""
_INTEGERS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 13: "I", 16: "Q", 17: "q", 18: "Q"}
_TEXT = (1, 2, 7)
_HEADERS = {b"II*\0": ("<", False), b"MM\0*": (">", False), b"II+\0": ("<", True), b"MM\0+": (">", True)}


class Entry(NamedTuple):
    """One tag: where its values are."""

    kind: int
    """Number of the values' type."""
    values: int
    """How many."""
    start: int
    """Position of the values in the file."""


@dataclass(frozen=True)
class Directory:
    """The tags of one image in a TIFF file."""

    data: bytes
    """The complete file."""
    order: str
    """`<` or `>`, as in struct."""
    big: bool
    """Whether the file is a BigTIFF."""
    entries: dict[int, list[Entry]]
    """By tag number; some writers repeat the image description."""

    def numbers(self, code: int) -> tuple[int, ...]:
        """Values of an integer tag; empty where it is absent. DamagedImageError where it cannot be read."""
        if code not in self.entries:
            return ()
        kind, count, start = self.entries[code][0]
        if kind not in _INTEGERS:
            raise DamagedImageError(f"TIFF tag {code} is not an integer")
        if count > _MAX_VALUES:
            raise DamagedImageError(f"TIFF tag {code} has {count} values")
        size = struct.calcsize(f"={_INTEGERS[kind]}")
        if start + count * size > len(self.data):
            raise DamagedImageError(f"TIFF tag {code} reaches beyond the end of the file")
        return struct.unpack_from(f"{self.order}{count}{_INTEGERS[kind]}", self.data, start)

    def number(self, code: int, default: int) -> int:
        """First value of an integer tag, `default` where it is absent."""
        return (self.numbers(code) or (default,))[0]

    def count(self, code: int) -> int:
        """Number of values of a tag, 0 where it is absent."""
        return self.entries[code][0].values if code in self.entries else 0

    def texts(self, code: int, most: int) -> list[bytes]:
        """Starts, of at most `most` bytes, of the first four text tags of that number."""
        entries = [entry for entry in self.entries.get(code, [])[:4] if entry.kind in _TEXT]
        return [self.data[entry.start : entry.start + min(entry.values, most)] for entry in entries]


def read_directories(data: bytes) -> Iterator[Directory]:
    """The directories of a file's main chain, in order.

    Raises:
        UnreadableImageError: a chain that is broken, circular or longer than MAX_DIRECTORIES.
    """
    order, big = _HEADERS[data[:4]]
    offset = _unpack(data, f"{order}Q" if big else f"{order}I", 8 if big else 4)
    seen: set[int] = set()
    while offset:
        if offset in seen:
            raise DamagedImageError("TIFF directories that form a circle")
        if len(seen) == MAX_DIRECTORIES:
            raise UnsupportedImageError(f"holds over {MAX_DIRECTORIES} images; save each as a file of its own")
        seen.add(offset)
        directory, offset = read_directory(data, order, big, offset)
        yield directory


def read_directory(data: bytes, order: str, big: bool, offset: int) -> tuple[Directory, int]:
    """The directory at `offset`, and the offset of the next one, 0 after the last."""
    number, form, room = ("Q", f"{order}HHQQ", 8) if big else ("H", f"{order}HHII", 4)
    count = _unpack(data, order + number, offset)
    start, size = offset + struct.calcsize(f"={number}"), struct.calcsize(form)
    end = start + count * size
    if count > _MAX_ENTRIES or end > len(data):
        raise DamagedImageError("TIFF directory that reaches beyond the end of the file")
    entries: dict[int, list[Entry]] = {}
    for code, kind, values, value in struct.iter_unpack(form, data[start:end]):
        start += size
        letter = _INTEGERS.get(kind, "B" if kind in _TEXT else "")
        inline = letter and values * struct.calcsize(f"={letter}") <= room
        entries.setdefault(code, []).append(Entry(kind, values, start - room if inline else value))
    return Directory(data, order, big, entries), _unpack(data, order + ("Q" if big else "I"), end)


def _unpack(data: bytes, form: str, offset: int) -> int:
    if offset + struct.calcsize(form) > len(data):
        raise DamagedImageError("TIFF file that is cut off: a directory is beyond its end")
    return int(struct.unpack_from(form, data, offset)[0])
