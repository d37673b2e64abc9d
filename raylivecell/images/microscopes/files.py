"""Microscope files: Zeiss CZI, Leica LIF and Nikon ND2, by the libraries of the extra `formats`.

The libraries read the directory of a file; planes are read one at a time, after a check of their size. A document type
in XML, which could contain entities, is refused, and so is everything whose meaning is not certain: tiles of a mosaic
(their overlap would count cells twice), other axes than time, depth, channel and series, subsampled blocks.
"""

import io
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from raylivecell.core.errors import (
    DamagedImageError,
    MachineError,
    TooManyPixelsError,
    UnreadableImageError,
    UnsupportedImageError,
    shortened,
)
from raylivecell.images.channels import grey_of_rgb
from raylivecell.images.pixel_types import to_unsigned
from raylivecell.images.planes import Position, no_channel
from raylivecell.images.ranges import Data

KINDS = {"Zeiss CZI file": "czi_file", "Leica LIF file": "lif_file", "Nikon ND2 file": "nd2_file"}
"""Module of each kind of file (`file_kinds`)."""
SUFFIXES = (".czi", ".lif", ".nd2")
EXTRA = "pip install 'raylivecell[formats]'"
MAX_XML = 2**26


class FilePlane(NamedTuple):
    """A plane of a microscope file."""

    position: Position
    width: int
    height: int
    read: Callable[[], NDArray[Any]]
    """Return the stored samples: (H, W), or RGB (H, W, 3)."""


class Stream(io.RawIOBase):
    """A seekable binary stream of a file's content, for the libraries."""

    def __init__(self, data: Data) -> None:
        self.data, self.position = data, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move to an offset from the start, the position or the end; ValueError before the start."""
        position = (0, self.position, len(self.data))[whence] + offset
        if position < 0:
            raise ValueError(f"position {position} in a file")
        self.position = position
        return position

    def readinto(self, buffer: Any) -> int:
        """Read at most the size of `buffer`."""
        view = memoryview(buffer).cast("B")
        chunk = self.data[self.position : self.position + len(view)]
        view[: len(chunk)] = chunk
        self.position += len(chunk)
        return len(chunk)


def read_planes(kind: str, data: Data) -> list[FilePlane]:
    """Return the planes of a microscope file, in the order of series, time, depth and channel.

    Args:
        kind: one of KINDS.
        data: content of the file.

    Raises:
        UnreadableImageError: the library is missing; damaged; or contents that are not read.
    """
    try:
        module = import_module(f"raylivecell.images.microscopes.{KINDS[kind]}")
    except ModuleNotFoundError as error:
        raise UnsupportedImageError(f"{kind}, which needs {error.name}: {EXTRA}, or export OME-TIFF") from error
    with translating_errors(kind):
        planes: list[FilePlane] = module.read_planes(data)
    if not planes:
        raise DamagedImageError(f"{kind} without images")
    return sorted(planes, key=lambda plane: [plane.position.get(axis, 0) for axis in "stzc"])


def decode(kind: str, plane: FilePlane, max_pixels: int, channel: int | None) -> tuple[NDArray[Any], bool]:
    """Decode a plane to uint8 or uint16 (H, W), and return whether it is a colour image.

    Args:
        kind: one of KINDS.
        plane: one of `read_planes`.
        max_pixels: limit, checked before any pixel is read.
        channel: colour to return, 0 to 2; default: the grey of the colours.

    Raises:
        UnreadableImageError: unsupported or damaged.
    """
    if plane.width * plane.height > max_pixels:
        size = f"{plane.width} x {plane.height}"
        raise TooManyPixelsError(f"{size} is more than {max_pixels} pixels; cut it into tiles")
    with translating_errors(kind):
        samples = plane.read()
    if samples.shape[:2] != (plane.height, plane.width) or samples.shape[2:] not in ((), (3,)):
        raise DamagedImageError(f"{kind}: an image of {samples.shape}, expected {plane.height} x {plane.width}")
    count = 1 if samples.ndim == 2 else 3
    if channel is not None and not 0 <= channel < count:
        raise no_channel(channel, count)
    pixels = to_unsigned(np.ascontiguousarray(samples))
    if count == 1:
        return pixels, False
    return (grey_of_rgb(pixels) if channel is None else np.ascontiguousarray(pixels[..., channel])), True


@contextmanager
def translating_errors(kind: str) -> Iterator[None]:
    """Turn the errors of a library, which on damaged files are of any type, into DamagedImageError."""
    try:
        yield
    except (UnreadableImageError, MachineError, MemoryError):
        raise
    except Exception as error:
        raise DamagedImageError(
            f"incomplete or corrupt {kind} ({type(error).__name__}: {shortened(str(error))})"
        ) from error


def refuse_entities(xml: bytes | str) -> None:
    """Refuse XML with a document type, which could expand to gigabytes or read other files."""
    text = xml.decode("utf-8", "replace") if isinstance(xml, bytes) else xml
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise UnsupportedImageError("XML with a document type, which could contain entities")


def read_utf16_xml(data: Data, offset: int, characters: int) -> str:
    """Return UTF-16 text of the file after `refuse_entities`."""
    if 2 * characters > MAX_XML or offset + 2 * characters > len(data):
        raise DamagedImageError(f"XML of {2 * characters} bytes, more than the file has or {MAX_XML}")
    text = data[offset : offset + 2 * characters].decode("utf-16-le", "replace")
    refuse_entities(text)
    return text


def unpack(data: Data, offset: int, layout: str) -> tuple[Any, ...]:
    """Unpack a struct at an offset; DamagedImageError if the file is too short."""
    part = data[offset : offset + struct.calcsize(layout)]
    if len(part) != struct.calcsize(layout):
        raise DamagedImageError("the file is truncated")
    return struct.unpack(layout, part)
