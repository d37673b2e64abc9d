"""Zeiss CZI files: the directory by czifile, the pixels of a block here; imported only if czifile is installed.

czifile decodes neither Zstandard, which ZEN writes today, nor with a limit on the size of the result. Source of the
layout: Zeiss, "DOC-ZISRAW, CZI File Format", 2016 and libCZI's "compression" chapter.
"""

import io
from typing import Any

import czifile
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from raylivecell.core.errors import DamagedImageError, UnsupportedImageError
from raylivecell.images.microscopes.files import EXTRA, FilePlane, Stream
from raylivecell.images.planes import Position
from raylivecell.images.ranges import Data

_AXES = {"S": "s", "T": "t", "Z": "z", "C": "c"}
_TYPES = {"<u1", "<u2", "<f4", "<i4", "<3u1", "<3u2"}
_NONE, _JPEG, _LZW, _JPEG_XR, _ZSTD, _ZSTD_HEADER = 0, 1, 2, 4, 5, 6


def read_planes(data: Data) -> list[FilePlane]:
    """Return the planes of a file: its full-size blocks, of which each must be a plane."""
    file = czifile.CziFile(io.BufferedReader(Stream(data)), multifile=False)
    if file.header.file_part:
        raise UnsupportedImageError("part of a CZI of several files; export OME-TIFF")
    planes: dict[tuple[tuple[str, int], ...], FilePlane] = {}
    for entry in file.subblock_directory:
        if entry.pyramid_type or any(size.stored_size != size.size for size in entry.dimension_entries):
            continue  # a reduced copy
        plane = _plane(data, entry)
        key = tuple(sorted(plane.position.items()))
        if key in planes:
            raise UnsupportedImageError("CZI of several tiles per plane (mosaic); export it stitched, as OME-TIFF")
        planes[key] = plane
    return list(planes.values())


def _plane(data: Data, entry: Any) -> FilePlane:
    dimensions = {dimension.dimension: dimension for dimension in entry.dimension_entries}
    if not {"X", "Y"} <= set(dimensions):
        raise DamagedImageError("CZI block without X and Y")
    position: Position = {}
    for name, dimension in dimensions.items():
        if name in ("X", "Y", "M"):
            continue
        if dimension.size != 1 or dimension.start < 0 or (name not in _AXES and dimension.start):
            raise UnsupportedImageError(f"CZI with the axis {name}; export OME-TIFF")
        if name in _AXES:
            position[_AXES[name]] = dimension.start
    width, height = dimensions["X"].size, dimensions["Y"].size
    if width < 1 or height < 1:
        raise DamagedImageError(f"CZI block of {width} x {height}")
    return FilePlane(position, width, height, lambda: _read(data, entry, (height, width)))


def _read(data: Data, entry: Any, shape: tuple[int, int]) -> NDArray[Any]:
    """Decode a block to (H, W), or RGB (H, W, 3)."""
    if entry.dtype not in _TYPES:
        raise UnsupportedImageError(f"CZI pixels of the type {entry.pixel_type}; export OME-TIFF")
    samples = 3 if entry.dtype[1] == "3" else 1
    dtype = np.dtype(f"<{entry.dtype[-2:]}")
    block = entry.data_segment()
    size = shape[0] * shape[1] * samples * dtype.itemsize
    if not 0 < block.data_size <= 2 * size + 2**16 or block.data_offset + block.data_size > len(data):
        raise DamagedImageError(f"CZI block of {block.data_size} bytes for {size} bytes of pixels")
    stored = data[block.data_offset : block.data_offset + block.data_size]
    if entry.compression in (_JPEG, _JPEG_XR):
        return _decode_picture(stored, entry.compression, (*shape, samples), dtype)
    raw = _decompress(stored, entry.compression, size, dtype.itemsize)
    if len(raw) < size:
        raise DamagedImageError(f"CZI block of {len(raw)} bytes, expected {size}")
    pixels = np.frombuffer(raw, dtype, size // dtype.itemsize).reshape(*shape, samples)
    return pixels[..., ::-1] if samples == 3 else pixels[..., 0]  # stored as BGR


def _decompress(stored: bytes, compression: int, size: int, itemsize: int) -> bytes:
    """Decompress to at most `size` bytes."""
    if compression == _NONE:
        return stored
    if compression not in (_ZSTD, _ZSTD_HEADER):
        raise UnsupportedImageError(f"CZI compression {'LZW' if compression == _LZW else compression}; export OME-TIFF")
    split = False
    if compression == _ZSTD_HEADER:
        # Its size, then an optional chunk of type 1, whose lowest bit says that low and high bytes are separate.
        length = stored[0]
        split = length == 3 and stored[1] == 1 and bool(stored[2] & 1)
        if length not in (1, 3) or (length == 3 and stored[1] != 1):
            raise UnsupportedImageError(f"CZI compression with a header of {length} bytes; export OME-TIFF")
        stored = stored[length:]
    raw = pa.decompress(stored, decompressed_size=size, codec="zstd", asbytes=True)
    if split and itemsize == 2:
        return np.frombuffer(raw, np.uint8).reshape(2, -1).T.tobytes()
    return raw


def _decode_picture(stored: bytes, compression: int, shape: tuple[int, int, int], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Decode JPEG or JPEG XR to (H, W), or RGB (H, W, 3)."""
    if compression == _JPEG:
        with Image.open(io.BytesIO(stored), formats=("JPEG",)) as image:
            if (image.height, image.width) != shape[:2] or len(image.getbands()) != shape[2]:
                raise DamagedImageError(f"JPEG of {image.width} x {image.height} in a CZI block")
            pixels = np.asarray(image)
    else:
        try:
            import imagecodecs
        except ModuleNotFoundError as error:
            raise UnsupportedImageError(f"CZI compressed by JPEG XR, which needs imagecodecs: {EXTRA}") from error
        # The result's array is given: a picture of another size is refused before it is decoded.
        array = np.empty(shape if shape[2] == 3 else shape[:2], dtype)
        pixels = imagecodecs.jpegxr_decode(stored, out=array)
    if pixels.dtype != dtype:
        raise DamagedImageError(f"{pixels.dtype} picture in a CZI block of {dtype}")
    return pixels
