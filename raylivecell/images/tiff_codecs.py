"""JPEG 2000 and WebP strips or tiles of TIFF files, decoded by Pillow, which reads their size before their pixels."""

import io
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from raylivecell.core.errors import DamagedImageError, UnsupportedImageError

_SIZE_MARKER = b"\xff\x4f\xff\x51"
_CHANNELS = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "I;16": 1}


def decode_segment(data: bytes, kind: str, shape: tuple[int, int, int], bits: int) -> NDArray[np.unsignedinteger[Any]]:
    """Decode one strip or tile to uint8 or uint16 of `shape`.

    Args:
        data: stream of the segment.
        kind: Pillow's format: `JPEG2000` or `WEBP`.
        shape: rows, columns and samples according to the TIFF tags.
        bits: bits per sample according to the TIFF tags, 8 or 16.
    """
    name = {"JPEG2000": "JPEG 2000", "WEBP": "WebP"}[kind]
    if kind == "JPEG2000":
        _check_precision(data, bits)
    with Image.open(io.BytesIO(data), formats=(kind,)) as image:
        rows, columns, samples = shape
        if image.size != (columns, rows) or _CHANNELS.get(image.mode) != samples:
            raise DamagedImageError(
                f"{name} strip or tile of {image.width} x {image.height} x {image.mode}, expected {columns} x {rows} x "
                f"{samples}"
            )
        pixels = np.asarray(image)
    if pixels.dtype.itemsize * 8 != bits:
        raise UnsupportedImageError(f"{bits}-bit {name} colour; save it with another compression")
    return pixels.astype(f"=u{bits // 8}", copy=False).reshape(shape)


def _check_precision(data: bytes, bits: int) -> None:
    """Refuse samples of other depths, which Pillow would scale, and signed ones, which it would shift.

    The header is that of ISO/IEC 15444-1, A.5.1.
    """
    start = data.find(_SIZE_MARKER, 0, 4096)
    if start < 0 or start + 42 > len(data):
        raise DamagedImageError("JPEG 2000 strip or tile without a header")
    (components,) = struct.unpack_from(">H", data, start + 40)
    depths = set(data[start + 42 : start + 42 + 3 * components : 3])
    if depths != {bits - 1}:
        raise UnsupportedImageError(f"JPEG 2000 samples of a depth other than {bits} bits; save it uncompressed")
