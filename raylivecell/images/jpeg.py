"""JPEG streams: their frame header, and those inside TIFF files, whose tables and colour space are in TIFF tags."""

import io
import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from raylivecell.core.errors import DamagedImageError, UnsupportedImageError

_SOI, _EOI, _SOS = 0xD8, 0xD9, 0xDA
_FRAMES = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
_BASELINE = {0xC0, 0xC1, 0xC2}
_ADOBE = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0"


class Frame(NamedTuple):
    """Header of a JPEG frame."""

    kind: int
    """Marker: 0xC0 baseline, 0xC2 progressive, 0xC3 lossless, 0xF7 JPEG-LS, ..."""
    bits: int
    height: int
    width: int
    components: int


def frame_of(data: bytes) -> Frame | None:
    """The frame header of a JPEG stream; None where there is none before the first scan."""
    for marker, start, end in _markers(data):
        if marker in _FRAMES and start + 6 <= min(end, len(data)):
            bits, height, width, components = struct.unpack_from(">BHHB", data, start)
            return Frame(marker, bits, height, width, components)
    return None


def refuse_frame(frame: Frame) -> None:
    """UnsupportedImageError for a kind of JPEG that is not read."""
    if frame.bits != 8:
        raise UnsupportedImageError(f"{frame.bits}-bit JPEG; save it as 8 or 16 bit TIFF or PNG")
    if frame.kind not in _BASELINE:
        raise UnsupportedImageError("JPEG of a rare kind (lossless, arithmetic or JPEG-LS); save it as TIFF or PNG")


def decode_segment(data: bytes, tables: bytes, shape: tuple[int, int, int], ycbcr: bool) -> NDArray[np.uint8]:
    """One JPEG-compressed strip or tile of a TIFF file.

    Args:
        data: its stream.
        tables: the JPEGTables tag, or nothing.
        shape: rows, columns and samples that the tags promise.
        ycbcr: whether three components are YCbCr, which comes back as RGB; else they are taken as they are.
    """
    frame = frame_of(data)
    if frame is None:
        raise DamagedImageError("JPEG strip or tile without a header")
    refuse_frame(frame)
    if (frame.width, frame.components) != shape[1:] or not 0 <= frame.height - shape[0] < 16:
        raise DamagedImageError(f"JPEG strip or tile of {frame.width} x {frame.height} x {frame.components}")
    # The TIFF tag decides on the colour space, not the stream's own APP0 and APP14.
    stream = b"\xff\xd8" + _ADOBE + bytes([ycbcr]) + _tables(tables) + _without_app(data)
    with Image.open(io.BytesIO(stream), formats=("JPEG",)) as image:
        pixels = np.asarray(image)
    return pixels.reshape(frame.height, frame.width, -1)[: shape[0]]


def _markers(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of each segment's content, up to and with the first scan's header."""
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # a fill byte
            place += 1
            continue
        if marker in (_SOI, _EOI):
            return
        length = int.from_bytes(data[place + 2 : place + 4], "big")
        yield marker, place + 4, place + 2 + length
        if marker == _SOS:
            return
        place += 2 + max(length, 2)


def _tables(data: bytes) -> bytes:
    """The tables of a JPEGTables tag without its SOI and EOI."""
    return b"".join(data[start - 4 : end] for _, start, end in _markers(data))


def _without_app(data: bytes) -> bytes:
    """A stream without its SOI and the application segments before its first scan."""
    parts, end = [], 2
    for marker, start, end in _markers(data):
        if not 0xE0 <= marker <= 0xEF:
            parts.append(data[start - 4 : end])
    return b"".join([*parts, data[end:]])
