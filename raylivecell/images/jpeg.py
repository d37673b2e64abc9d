"""JPEG frame headers, and JPEG strips or tiles of TIFF files, with tables and colour space in TIFF tags."""

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


class FrameHeader(NamedTuple):
    """Header of a JPEG frame."""

    kind: int
    """Marker: 0xC0 baseline, 0xC2 progressive, 0xC3 lossless, 0xF7 JPEG-LS, ..."""
    bits: int
    height: int
    width: int
    components: int


def frame_of(data: bytes) -> FrameHeader | None:
    """Read the frame header of a JPEG stream; None without one before the first scan."""
    for marker, start, end in _markers(data):
        if marker in _FRAMES and start + 6 <= min(end, len(data)):
            bits, height, width, components = struct.unpack_from(">BHHB", data, start)
            return FrameHeader(marker, bits, height, width, components)
    return None


def refuse_frame(frame: FrameHeader) -> None:
    """Raise UnsupportedImageError for an unsupported kind of JPEG."""
    if frame.bits != 8:
        raise UnsupportedImageError(f"{frame.bits}-bit JPEG; save it as 8 or 16 bit TIFF or PNG")
    if frame.kind not in _BASELINE:
        raise UnsupportedImageError("JPEG of a rare kind (lossless, arithmetic or JPEG-LS); save it as TIFF or PNG")


def decode_segment(data: bytes, tables: bytes, shape: tuple[int, int, int], ycbcr: bool) -> NDArray[np.uint8]:
    """Decode one JPEG-compressed strip or tile of a TIFF file.

    Args:
        data: JPEG stream of the segment.
        tables: the JPEGTables tag, or empty.
        shape: rows, columns and samples according to the tags.
        ycbcr: whether three components are YCbCr, to be converted to RGB; otherwise they are returned unchanged.
    """
    frame = frame_of(data)
    if frame is None:
        raise DamagedImageError("JPEG strip or tile without a header")
    refuse_frame(frame)
    if (frame.width, frame.components) != shape[1:] or not 0 <= frame.height - shape[0] < 16:
        raise DamagedImageError(f"JPEG strip or tile of {frame.width} x {frame.height} x {frame.components}")
    # The TIFF tag determines the colour space, not APP0 and APP14 in the stream.
    stream = b"\xff\xd8" + _ADOBE + bytes([ycbcr]) + _strip_soi_eoi(tables) + _strip_application_segments(data)
    with Image.open(io.BytesIO(stream), formats=("JPEG",)) as image:
        pixels = np.asarray(image)
    return pixels.reshape(frame.height, frame.width, -1)[: shape[0]]


def _markers(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield marker, start and end of each segment's content, up to and including the first scan header."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        if marker in (_SOI, _EOI):
            return
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        yield marker, position + 4, position + 2 + length
        if marker == _SOS:
            return
        position += 2 + max(length, 2)


def _strip_soi_eoi(data: bytes) -> bytes:
    """Return the content of a JPEGTables tag without SOI and EOI."""
    return b"".join(data[start - 4 : end] for _, start, end in _markers(data))


def _strip_application_segments(data: bytes) -> bytes:
    """Return a stream without SOI and without the application segments before the first scan."""
    parts, end = [], 2
    for marker, start, end in _markers(data):
        if not 0xE0 <= marker <= 0xEF:
            parts.append(data[start - 4 : end])
    return b"".join([*parts, data[end:]])
