"""Decoding of the samples of one TIFF image from its strips or tiles.

Strips and tiles are decompressed by libtiff (LZW: 2.5 times as fast as imagecodecs) through Pillow: they are wrapped as
rows of bytes in a minimal TIFF, which bypasses Pillow's interpretation of the pixels.
"""

import io
import lzma
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import TiffImagePlugin
from PIL.ExifTags import Base as Tag

from raylivecell.core.errors import DamagedImageError, TooManyPixelsError, UnsupportedImageError
from raylivecell.images import jpeg, tiff_codecs
from raylivecell.images.tiff_tags import Directory

NONE, JPEG, LZMA = 1, 7, 34925
WEBP, JPEG_2000 = {34927, 50001}, {33004, 33005, 33007, 34712}
LSM = 34412
"""Tag that marks Zeiss LSM files."""
_FAX = {2: "CCITT RLE", 3: "CCITT group 3", 4: "CCITT group 4"}
_LIBTIFF = {5: "LZW", 8: "deflate", 32946: "deflate", 32773: "PackBits", 50000: "Zstandard"}
_PREDICTED = {5, 8, 32946, 50000, LZMA}
"""Compressions with a predictor; with others libtiff ignores it and tifffile applies it."""
_UNSUPPORTED = {
    6: "old-style JPEG",
    9: "JBIG",
    10: "JBIG",
    22610: "JPEG XR",
    32771: "CCITT RLE with words",
    32809: "ThunderScan",
    32766: "NeXT",
    33003: "JPEG 2000 of YCbCr",
    34661: "JBIG",
    34676: "SGI LogLuv",
    34677: "SGI LogLuv",
    34887: "LERC",
    34892: "lossy JPEG of DNG",
    34926: "old-style Zstandard",
    34933: "PNG",
    34934: "JPEG XR",
    50002: "JPEG XL",
    52546: "JPEG XL",
}
_SUPPORTED = "none, LZW, deflate, PackBits, Zstandard, LZMA, JPEG, JPEG 2000, WebP, CCITT"
_LZMA_MEMORY = 2**28
_CHUNK_BYTES = 2**26
_MAX_SEGMENT_BYTES = 178_956_970
"""Pillow's limit; 8192 x 8192 pixels of 16 bits are 134 MB."""
_BIT_REVERSAL = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_READABLE_BITS = {*range(8, 17), 1, 2, 4, 32, 64}


@dataclass(frozen=True)
class Layout:
    """Storage layout of the samples of an image."""

    width: int
    height: int
    samples: int
    bits: int
    kind: str
    """`u` for unsigned, `i` for signed, `f` for floating-point."""
    compression: int
    predictor: int
    planar: bool
    """Whether each sample is stored in separate strips or tiles."""
    segment_width: int
    segment_rows: int
    tiled: bool
    reversed_bits: bool

    @classmethod
    def of(cls, directory: Directory, samples: int, bits: int, kind: str) -> "Layout":
        """Read the layout from the tags; raise UnreadableImageError if it is not supported."""
        width, height = directory.number(Tag.ImageWidth, 0), directory.number(Tag.ImageLength, 0)
        if width < 1 or height < 1:
            raise DamagedImageError(f"image size {width} x {height}")
        tiled = bool(directory.numbers(Tag.TileWidth))
        rows = min(directory.number(Tag.RowsPerStrip, 0), height) or height
        size = (directory.number(Tag.TileWidth, 0), directory.number(Tag.TileLength, 0)) if tiled else (width, rows)
        if min(size) < 1:
            raise DamagedImageError(f"tile size {size[0]} x {size[1]}")
        planar = directory.number(Tag.PlanarConfiguration, 1)
        if planar not in (1, 2):
            raise DamagedImageError(f"planar configuration {planar}")
        compression, predictor = directory.number(Tag.Compression, 1), directory.number(Tag.Predictor, 1)
        if compression in {JPEG, *WEBP, *JPEG_2000} or (
            compression == NONE and directory.count(LSM)
        ):  # LSM files wrongly state a predictor
            predictor = 1
        _refuse_coding(compression, predictor, bits, samples)
        _refuse_type(compression, predictor, bits, kind)
        reverse = directory.number(Tag.FillOrder, 1) == 2 and compression not in {JPEG, *WEBP, *JPEG_2000}
        is_planar = planar == 2 and samples > 1
        return cls(width, height, samples, bits, kind, compression, predictor, is_planar, *size, tiled, reverse)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of segments in one plane."""
        return -(-self.height // self.segment_rows), -(-self.width // self.segment_width)

    @property
    def padded_pixels(self) -> int:
        """Pixels of all segments of a plane, including padding."""
        down, across = self.grid
        rows = down * self.segment_rows if self.tiled else self.height
        return rows * across * self.segment_width

    @property
    def segment_samples(self) -> int:
        """Samples per pixel in a segment."""
        return 1 if self.planar else self.samples

    @property
    def row_bytes(self) -> int:
        """Bytes of one decompressed row of a segment."""
        return -(-self.segment_width * self.segment_samples * self.bits // 8)

    def rows(self, first: int, count: int) -> int:
        """Count the rows in `count` segments of a plane from segment `first`; the last strip may be shorter."""
        rows = count * self.segment_rows
        return rows if self.tiled else min(rows, self.height - first * self.segment_rows)


def _refuse_coding(compression: int, predictor: int, bits: int, samples: int) -> None:
    if compression not in {NONE, JPEG, LZMA, *WEBP, *JPEG_2000, *_FAX, *_LIBTIFF}:
        name = _UNSUPPORTED.get(compression, f"number {compression}")
        raise UnsupportedImageError(f"TIFF compression {name}; save it with one of: {_SUPPORTED}")
    if compression in _FAX and (bits, samples) != (1, 1):
        raise DamagedImageError(f"{_FAX[compression]} compression with {samples} samples of {bits} bits")
    if (compression == JPEG or compression in WEBP) and bits != 8:
        raise UnsupportedImageError(f"{bits}-bit JPEG or WebP compression; save it with another compression")
    if compression in JPEG_2000 and bits not in (8, 16):
        raise UnsupportedImageError(f"{bits}-bit JPEG 2000 compression; save it with another compression")
    if bits not in _READABLE_BITS:
        raise UnsupportedImageError(f"{bits} bits per sample; save it as 8 or 16 bit")
    if predictor not in (1, 2, 3) or (predictor != 1 and compression not in _PREDICTED):
        raise UnsupportedImageError(f"TIFF predictor {predictor} with this compression; save it without a predictor")


def _refuse_type(compression: int, predictor: int, bits: int, kind: str) -> None:
    numbers = {"u": "unsigned integers", "i": "signed integers", "f": "floating-point numbers"}[kind]
    if kind == "f" and bits not in (16, 32, 64):
        raise UnsupportedImageError(f"{bits}-bit {numbers}; save it as 8 or 16 bit")
    if kind != "u" and (compression in {JPEG, *WEBP, *JPEG_2000} or compression in _FAX):
        raise UnsupportedImageError(f"{numbers} with this compression; save it as 8 or 16 bit")
    if (predictor == 2 and bits not in (8, 16, 32, 64)) or (predictor == 3 and kind != "f"):
        raise UnsupportedImageError(f"TIFF predictor {predictor} on {bits}-bit {numbers}; save it without a predictor")


def read_samples(directory: Directory, layout: Layout, ycbcr: bool, plane: int = 0) -> NDArray[Any]:
    """Decode the samples (H, W, S) in native byte order; below 8 bits as uint8, 9 to 15 bits as uint16.

    `plane` is the number of the plane, in a directory whose tags locate the first of several.

    Raises:
        UnreadableImageError: a segment is missing, outside the file or too short.
    """
    all_segments = list(_segments(directory, layout, plane))
    plane_length = len(all_segments) // (layout.samples if layout.planar else 1)
    planes = []
    for first in range(0, len(all_segments), plane_length):
        segments = all_segments[first : first + plane_length]
        if layout.compression in {JPEG, *WEBP, *JPEG_2000}:
            rows = _decode_pictures(directory, layout, segments, ycbcr)
        else:
            rows = _unpack(_decompress(directory, layout, segments), layout, directory.order)
        planes.append(_assemble(rows, layout))
    return planes[0] if len(planes) == 1 else np.concatenate(planes, axis=2)


def _segments(directory: Directory, layout: Layout, plane: int) -> Iterator[bytes]:
    """Yield the stored bytes of each strip or tile, in tag order."""
    location = (Tag.TileOffsets, Tag.TileByteCounts) if layout.tiled else (Tag.StripOffsets, Tag.StripByteCounts)
    offsets, sizes = (directory.numbers(tag) for tag in location)
    down, across = layout.grid
    count = down * across * (layout.samples if layout.planar else 1)
    if layout.compression == NONE and not any(sizes):
        sizes = tuple(layout.rows(i % (down * across), 1) * layout.row_bytes for i in range(min(count, len(offsets))))
    if len(offsets) != count or len(sizes) != count:
        raise DamagedImageError(f"{len(offsets)} strips or tiles with {len(sizes)} sizes, expected {count}")
    if plane:
        offsets = _offsets_of_plane(layout, offsets, sizes, plane)
    for i, (offset, size) in enumerate(zip(offsets, sizes)):
        if size < 1 or offset < 8 or offset + size > len(directory.data):
            raise DamagedImageError(f"strip or tile {i + 1} of {count} is outside the file, which is truncated")
        segment = directory.data[offset : offset + size]
        yield segment.translate(_BIT_REVERSAL) if layout.reversed_bits else segment


def _offsets_of_plane(layout: Layout, offsets: Sequence[int], sizes: Sequence[int], plane: int) -> tuple[int, ...]:
    """Return the locations of the strips of a plane stored after the first; UnsupportedImageError if it is unknown."""
    consecutive = all(offset + size == following for offset, size, following in zip(offsets, sizes, offsets[1:]))
    plane_bytes = layout.height * layout.row_bytes * (layout.samples if layout.planar else 1)
    if layout.compression != NONE or layout.tiled or not consecutive or sum(sizes) != plane_bytes:
        raise UnsupportedImageError("several planes in one directory, compressed or in parts; save it as a plain stack")
    return tuple(offset + plane * plane_bytes for offset in offsets)


def _decompress(directory: Directory, layout: Layout, segments: Sequence[bytes]) -> NDArray[np.uint8]:
    """Decompress the segments of a plane to rows of bytes (rows, row bytes)."""
    if layout.compression in (NONE, LZMA):
        sizes = [layout.rows(i, 1) * layout.row_bytes for i in range(len(segments))]
        raw = [_raw_bytes(segment, size, layout) for segment, size in zip(segments, sizes)]
        return np.concatenate(raw).reshape(-1, layout.row_bytes)
    size = layout.segment_rows * layout.row_bytes
    if size > _MAX_SEGMENT_BYTES:
        raise UnsupportedImageError(f"compressed strip or tile of {size >> 20} MiB; save it in strips of a few rows")
    step = max(1, _CHUNK_BYTES // size)
    options: dict[int, int] = {
        tag: directory.number(tag, 0) for tag in (Tag.T4Options, Tag.T6Options) if directory.numbers(tag)
    }
    chunks = []
    for first in range(0, len(segments), step):
        chunk = segments[first : first + step]
        chunks.append(_libtiff(layout, chunk, layout.rows(first, len(chunk)), options))
    return chunks[0] if len(chunks) == 1 else np.concatenate(chunks)


def _raw_bytes(segment: bytes, size: int, layout: Layout) -> NDArray[np.uint8]:
    if layout.compression == LZMA:
        segment = lzma.LZMADecompressor(memlimit=_LZMA_MEMORY).decompress(segment, size)
    if len(segment) < size:
        raise DamagedImageError(f"strip or tile of {len(segment)} bytes, expected {size}")
    return np.frombuffer(segment, np.uint8, size)


def _libtiff(layout: Layout, segments: Sequence[bytes], rows: int, options: dict[int, int]) -> NDArray[np.uint8]:
    """Decompress segments to rows of bytes, wrapped as strips of a TIFF whose pixels are bytes (CCITT: bits)."""
    fax = layout.compression in _FAX
    width = layout.segment_width if fax else layout.row_bytes
    tags: dict[int, list[int]] = {
        Tag.ImageWidth: [width],
        Tag.ImageLength: [rows],
        Tag.BitsPerSample: [1 if fax else 8],
        Tag.Compression: [layout.compression],
        Tag.PhotometricInterpretation: [1],
        Tag.SamplesPerPixel: [1],
        Tag.RowsPerStrip: [layout.segment_rows],
    }
    tags |= {code: [value] for code, value in options.items() if fax}
    if _libtiff_undoes_predictor(layout):
        tags[Tag.Predictor] = [2]
    with TiffImagePlugin.TiffImageFile(io.BytesIO(_build_tiff(tags, segments))) as image:
        pixels = np.asarray(image)
    return np.packbits(pixels, axis=1) if fax else pixels


def _libtiff_undoes_predictor(layout: Layout) -> bool:
    """Return whether libtiff undoes the predictor (8-bit grey): 1 ms faster per LIVECell image than NumPy."""
    return layout.predictor == 2 and layout.bits == 8 and layout.segment_samples == 1 and layout.compression in _LIBTIFF


def _build_tiff(tags: dict[int, list[int]], strips: Sequence[bytes]) -> bytes:
    """Build a little-endian TIFF from `tags` and `strips`."""
    sizes = [len(strip) for strip in strips]
    entries_end = 8 + 2 + 12 * (len(tags) + 2) + 4
    start = entries_end + (8 * len(strips) if len(strips) > 1 else 0)
    offsets = list(accumulate(sizes[:-1], initial=start))
    if start + sum(sizes) >= 2**32:
        raise TooManyPixelsError("over 4 GB of compressed pixels; cut it into tiles")
    tags = {**tags, Tag.StripOffsets: offsets, Tag.StripByteCounts: sizes}
    arrays: dict[int, int] = {Tag.StripOffsets: entries_end, Tag.StripByteCounts: entries_end + 4 * len(strips)}
    entries = b"".join(
        struct.pack("<HHII", code, 4, len(values), values[0] if len(values) == 1 else arrays[code])
        for code, values in sorted(tags.items())
    )
    long = np.array(offsets + sizes, "<u4").tobytes() if len(strips) > 1 else b""
    return b"".join([struct.pack("<4sIH", b"II*\0", 8, len(tags)), entries, bytes(4), long, *strips])


def _unpack(rows: NDArray[np.uint8], layout: Layout, order: str) -> NDArray[Any]:
    """Convert rows of bytes to samples (rows, segment width, samples per segment pixel)."""
    shape = (len(rows), layout.segment_width, layout.segment_samples)
    if layout.bits in (8, 16, 32, 64):
        if layout.predictor == 3:
            return _undo_float_predictor(rows, layout).reshape(shape)
        # Predictor 2 adds the bits of floating-point numbers as integers.
        kind = "u" if layout.predictor == 2 else layout.kind
        dtype = np.dtype(f"{order}{kind}{layout.bits // 8}")
        values = rows.view(dtype).reshape(shape)
        values = values.astype(dtype.newbyteorder("="), copy=False)
        if layout.predictor == 2 and not _libtiff_undoes_predictor(layout):
            values = np.cumsum(values, axis=1, dtype=values.dtype)
        return values.view(f"={layout.kind}{layout.bits // 8}")
    if layout.kind != "u":
        raise UnsupportedImageError(f"signed {layout.bits}-bit pixels; save it as 8 or 16 bit")
    count = shape[1] * shape[2]
    step = max(1, 2**20 // count)
    blocks = [_unpack_bits(rows[i : i + step], count, layout.bits) for i in range(0, len(rows), step)]
    return np.concatenate(blocks).reshape(shape)


def _undo_float_predictor(rows: NDArray[np.uint8], layout: Layout) -> NDArray[Any]:
    """Undo predictor 3 (Adobe Photoshop TIFF technical note 3): differences of bytes, sorted by significance."""
    differences = rows.reshape(len(rows), -1, layout.segment_samples)
    sums = np.cumsum(differences, axis=1, dtype=np.uint8).reshape(len(rows), layout.bits // 8, -1)
    values = np.ascontiguousarray(sums.swapaxes(1, 2)).view(f">f{layout.bits // 8}")
    return values.astype(values.dtype.newbyteorder("="))


def _unpack_bits(rows: NDArray[np.uint8], count: int, bits: int) -> NDArray[Any]:
    """Unpack `count` numbers of `bits` bits from each row of bytes, most significant bit first."""
    size = 8 if bits < 8 else 16
    stream = np.unpackbits(rows, axis=1)[:, : count * bits].reshape(len(rows), count, bits)
    padded = np.zeros((len(rows), count, size), np.uint8)
    padded[..., size - bits :] = stream
    packed = np.packbits(padded, axis=2)
    return packed[..., 0] if size == 8 else packed.view(">u2")[..., 0].astype(np.uint16)


def _assemble(rows: NDArray[Any], layout: Layout) -> NDArray[Any]:
    """Arrange vertically stacked segments to (H, W, samples per segment pixel)."""
    if layout.tiled:
        (down, across), samples = layout.grid, rows.shape[2]
        tiles = rows.reshape(down, across, layout.segment_rows, layout.segment_width, samples).swapaxes(1, 2)
        rows = tiles.reshape(down * layout.segment_rows, across * layout.segment_width, samples)
    return rows[: layout.height, : layout.width]


def _decode_pictures(
    directory: Directory, layout: Layout, segments: Sequence[bytes], ycbcr: bool
) -> NDArray[np.unsignedinteger[Any]]:
    """Decode segments that are pictures of their own: JPEG, JPEG 2000 or WebP."""
    shapes = [(layout.rows(i, 1), layout.segment_width, layout.segment_samples) for i in range(len(segments))]
    if layout.compression == JPEG:
        tables = b"".join(directory.texts(Tag.JPEGTables, 2**16))
        return np.concatenate([jpeg.decode_segment(s, tables, shape, ycbcr) for s, shape in zip(segments, shapes)])
    kind = "WEBP" if layout.compression in WEBP else "JPEG2000"
    return np.concatenate(
        [tiff_codecs.decode_segment(s, kind, shape, layout.bits) for s, shape in zip(segments, shapes)]
    )
