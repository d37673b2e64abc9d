"""Nikon ND2 files: the metadata by nd2, the pixels of a frame here; imported only if nd2 is installed.

nd2 returns zeros for frames that are missing or truncated, and decompresses metadata without a limit: both are checked
here. Layout of chunks: nd2's `_parse/_chunk_decode.py`; of metadata: its `_parse/_clx_lite.py`.
"""

import io
import math
import struct
import zlib
from typing import Any

import nd2
import numpy as np
from numpy.typing import NDArray

from raylivecell.core.errors import DamagedImageError, UnreadableImageError, UnsupportedImageError
from raylivecell.images.microscopes.files import MAX_XML, FilePlane, Stream, refuse_entities, unpack
from raylivecell.images.planes import Position
from raylivecell.images.ranges import Data

_MAGIC = 0x0ABECEDA
_MAP_START, _MAP_END = b"ND2 FILEMAP SIGNATURE NAME 0001!", b"ND2 CHUNK MAP SIGNATURE 0000001!"
_METADATA = [
    b"%b%b" % (name, end)
    for name, ends in ((b"ImageAttributes", b"!"), (b"ImageMetadata", b"!"), (b"ImageMetadataSeq", b"|0!"))
    for end in (ends, b"LV" + ends)
]
"""Chunks that nd2 decodes for the size and the axes."""
_FRAME = b"ImageDataSeq|%d!"
_AXES = {"T": "t", "Z": "z", "P": "s"}
_MAX_FRAMES = 1_000_000
_MAX_METADATA = 2**26
"""Limit on metadata after decompression; a file of thousands of positions has a few MB."""
_STRING, _BYTES, _LEVEL, _COMPRESSED = 8, 9, 11, 76
_SIZES = {1: 1, 2: 4, 3: 4, 4: 8, 5: 8, 6: 8, 7: 8}
"""Bytes of the fixed-size types of a value."""


def read_planes(data: Data) -> list[FilePlane]:
    """Return the planes of a file: each channel of each frame that was acquired."""
    chunks = _chunks(data)
    budget = [_MAX_METADATA]
    for name in _METADATA:
        if name in chunks:
            _check_metadata(_chunk(data, chunks[name]), budget)
    with nd2.ND2File(io.BufferedReader(Stream(data))) as file:
        if math.prod(loop.count for loop in file.experiment) > _MAX_FRAMES:
            raise DamagedImageError("ND2 metadata of over a million frames")
        attributes, frames = file.attributes, file.loop_indices or ({},)
    numbers = [number for number in range(len(frames)) if _FRAME % number in chunks]
    stored = sum(name.startswith(b"ImageDataSeq|") for name in chunks)
    if len(numbers) != stored or any(axis not in _AXES for axis in frames[0]):
        raise UnsupportedImageError(f"ND2 of {stored} frames, described as {' x '.join(frames[0])}; export OME-TIFF")
    channels = attributes.channelCount or 1
    if attributes.componentCount != channels or attributes.tileWidthPx or attributes.compressionType == "lossy":
        raise UnsupportedImageError("ND2 of colours, tiles or lossy compression; export OME-TIFF")
    width, height = attributes.widthPx or 0, attributes.heightPx
    if width < 1 or height < 1:
        raise DamagedImageError(f"ND2 image of {width} x {height}")
    planes = []
    for number in numbers:
        position: Position = {_AXES[axis]: index for axis, index in frames[number].items()}
        for channel in range(channels):
            read = _Reader(data, chunks[_FRAME % number], attributes, channel)
            planes.append(FilePlane({**position, "c": channel}, width, height, read))
    return planes


class _Reader:
    """Reads one channel of one frame."""

    def __init__(self, data: Data, offset: int, attributes: Any, channel: int) -> None:
        self.data, self.offset, self.attributes, self.channel = data, offset, attributes, channel

    def __call__(self) -> NDArray[Any]:
        """Return the pixels (H, W), of which all must be in the file."""
        a = self.attributes
        dtype = np.dtype({8: "<u1", 16: "<u2", 32: "<f4"}[a.bitsPerComponentInMemory])
        pixel_bytes = a.componentCount * dtype.itemsize
        row_bytes = a.widthBytes or a.widthPx * pixel_bytes
        if row_bytes < a.widthPx * pixel_bytes or row_bytes > 2 * a.widthPx * pixel_bytes + 4096:
            raise DamagedImageError(f"ND2 rows of {row_bytes} bytes for {a.widthPx} pixels of {pixel_bytes}")
        size = a.heightPx * row_bytes
        raw = _chunk(self.data, self.offset)[8:]  # after the time
        if a.compressionType == "lossless":
            raw = zlib.decompressobj().decompress(raw, size)
        if len(raw) < size:
            raise DamagedImageError(f"ND2 frame of {len(raw)} bytes, expected {size}")
        rows = np.frombuffer(raw, np.uint8, size).reshape(a.heightPx, row_bytes)
        pixels = np.ascontiguousarray(rows[:, : a.widthPx * pixel_bytes]).view(dtype)
        return pixels.reshape(a.heightPx, a.widthPx, a.componentCount)[..., self.channel]


def _chunks(data: Data) -> dict[bytes, int]:
    """Return the offset of each chunk by name, from the map at the end of the file."""
    signature, start = unpack(data, len(data) - 40, "<32sQ")
    if signature != _MAP_END:
        raise DamagedImageError("ND2 file without its map at the end: it is truncated")
    table, position, chunks = _chunk(data, start, _MAP_START), 0, dict[bytes, int]()
    while True:
        end = table.index(b"!", position) + 1
        name = table[position:end]
        if name == _MAP_END:
            return chunks
        chunks[name] = struct.unpack_from("<Q", table, end)[0]
        position = end + 16


def _chunk(data: Data, offset: int, name: bytes = b"") -> bytes:
    """Return the content of a chunk, complete."""
    magic, name_length, length = unpack(data, offset, "<IIQ")
    start = offset + 16 + name_length
    if magic != _MAGIC or start + length > len(data) or not data[offset + 16 : start][: len(name)] == name:
        raise DamagedImageError(f"ND2 chunk at {offset} is incomplete")
    return data[start : start + length]


def _check_metadata(chunk: bytes, budget: list[int]) -> None:
    """Refuse metadata with entities, or that decompresses to more than the budget."""
    if len(chunk) > MAX_XML:
        raise DamagedImageError(f"ND2 metadata of {len(chunk)} bytes")
    if chunk.startswith(b"<"):
        refuse_entities(chunk)
    else:
        _walk(io.BytesIO(chunk), 1, budget)


def _walk(stream: io.BytesIO, count: int, budget: list[int]) -> None:
    """Walk through metadata like nd2's `json_from_clx_lite_variant`, decompressing within the budget."""
    for _ in range(count):
        start, header = stream.tell(), stream.read(2)
        if len(header) < 2:
            return
        kind, name_length = header
        if kind == _COMPRESSED:
            stream.seek(10, 1)
            _walk(_decompress(stream.read(), budget), 1, budget)
            return
        stream.seek(2 * name_length, 1)
        if kind == _LEVEL:
            items, length = struct.unpack("<IQ", stream.read(12))
            _walk(io.BytesIO(stream.read(max(0, length - (stream.tell() - start)))), items, budget)
            stream.seek(8 * items, 1)
        elif kind == _BYTES:
            content = stream.read(struct.unpack("<Q", stream.read(8))[0])
            try:
                _walk(io.BytesIO(content), 1, budget)  # nd2 tries the same
            except UnreadableImageError:
                raise
            except (struct.error, zlib.error, OverflowError, ValueError):
                continue  # other bytes
        elif kind == _STRING:
            while stream.read(2) not in (b"\0\0", b""):
                pass
        else:
            stream.seek(_SIZES.get(kind, 0), 1)


def _decompress(stored: bytes, budget: list[int]) -> io.BytesIO:
    content = zlib.decompressobj().decompress(stored, budget[0] + 1)
    budget[0] -= len(content)
    if budget[0] < 0:
        raise DamagedImageError(f"ND2 metadata that decompresses to over {_MAX_METADATA} bytes")
    return io.BytesIO(content)
