"""Planes of a TIFF file: which image is which time, depth or channel, by the metadata of the program that wrote it.

Most files have a directory per plane. ImageJ (above 4 GB) and tifffile (`truncate=True`) write one directory for all
planes, which are stored without compression one after the other.
"""

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from PIL.ExifTags import Base as Tag

from raylivecell.core.errors import DamagedImageError, UnsupportedImageError
from raylivecell.images import ome_xml
from raylivecell.images.planes import Position
from raylivecell.images.tiff_tags import Directory

_STK_PLANES, _NIH_HEADER, _IMAGE_DEPTH = 33629, 43314, 32997  # tags without a name in Pillow
_MICRO_MANAGER = 51123
"""Tag of Micro-Manager: JSON with the indices of its plane."""
_MICRO_MANAGER_AXES = {"PositionIndex": "s", "FrameIndex": "t", "SliceIndex": "z", "ChannelIndex": "c"}
_MAX_TEXT = 2**24
"""Limit on an image description: OME-XML has 300 bytes per plane."""
_MAX_PLANES = 10_000_000


class Plane(NamedTuple):
    """Location of a plane in a TIFF file."""

    directory: Directory
    position: Position
    number: int = 0
    """Number of the plane among those of its directory."""


def planes(directories: Sequence[tuple[int, Directory]]) -> list[Plane]:
    """Return the planes of a file in the order of storage.

    Args:
        directories: each image's number in the chain of directories, and its directory.

    Raises:
        UnreadableImageError: metadata that lists more planes than the file has, or in an unsupported way.
    """
    images = [directory for _, directory in directories]
    _refuse_other_stacks(images)
    source, positions = _described(directories)
    if len(positions) == len(images):
        return [Plane(directory, position) for directory, position in zip(images, positions)]
    if len(images) == 1 and source in ("ImageJ", "tifffile"):
        return [Plane(images[0], position, number) for number, position in enumerate(positions)]
    raise DamagedImageError(
        f"contains {len(images)} of the {len(positions)} planes in its {source} metadata; the file is truncated, or "
        "the planes are in other files"
    )


def _described(directories: Sequence[tuple[int, Directory]]) -> tuple[str, list[Position]]:
    """Return the program or format that describes the planes, and their positions."""
    images = [directory for _, directory in directories]
    unknown = [{"p": number} for number in range(len(images))]
    if len(images) > 1 and (positions := _micro_manager(images)):
        return "Micro-Manager", positions
    for text in _descriptions(images[0]):
        if text.startswith(b"ImageJ="):
            return "ImageJ", _image_j(text) or unknown
        if text.startswith(b"{") and (shape := _shaped(text, images[0])):
            return "tifffile", _of_series(images, shape) or unknown
        if b"<OME" in text[:4096] or b":OME" in text[:4096]:
            samples = images[0].number(Tag.SamplesPerPixel, 1)
            return "OME-XML", ome_xml.positions(text, [number for number, _ in directories], samples) or unknown
    return "", unknown


def _descriptions(directory: Directory) -> list[bytes]:
    """Return the image descriptions; DamagedImageError if one is truncated: it may have described planes."""
    entries = directory.entries.get(Tag.ImageDescription, [])
    if any(entry.start + entry.values > len(directory.data) for entry in entries):
        raise DamagedImageError("the image description extends beyond the end of the file, which is truncated")
    return directory.texts(Tag.ImageDescription, _MAX_TEXT)


def _refuse_other_stacks(images: Sequence[Directory]) -> None:
    """Refuse several planes in one directory in formats that are not read."""
    for directory in images:
        for count, source in (
            (directory.number(_IMAGE_DEPTH, 1), "ImageDepth"),
            (directory.count(_STK_PLANES), "MetaMorph STK"),
            (_nih_planes(directory), "NIH Image"),
        ):
            if count > 1:
                raise UnsupportedImageError(f"contains {count} planes ({source}); save each as a separate file")


def _nih_planes(directory: Directory) -> int:
    header = b"".join(directory.texts(_NIH_HEADER, 512))
    return int.from_bytes(header[260:262], "big" if directory.order == ">" else "little")


def _grid(sizes: Mapping[str, int]) -> list[Position]:
    """Return the positions of all planes, the last axis fastest."""
    if math.prod(sizes.values()) > _MAX_PLANES:
        raise DamagedImageError(f"metadata of {math.prod(sizes.values())} planes")
    return [dict(zip(sizes, indices)) for indices in itertools.product(*map(range, sizes.values()))]


def _image_j(text: bytes) -> list[Position] | None:
    """Return the planes of an ImageJ stack: time, then depth, then channel; None if it does not describe any."""
    counts = {key: int(value) for key, value in re.findall(rb"(?m)^(\w{1,20})=(\d{1,9})\s*?$", text[:4096])}
    sizes = {axis: max(1, counts.get(key, 1)) for axis, key in (("t", b"frames"), ("z", b"slices"), ("c", b"channels"))}
    images = max(counts.get(b"images", 1), math.prod(sizes.values()))
    if images == 1:
        return None
    return _grid(sizes) if math.prod(sizes.values()) == images else _grid({"p": images})


def _shaped(text: bytes, directory: Directory) -> dict[str, int] | None:
    """Return the sizes of the axes that tifffile describes; None if the shape does not match this image."""
    header = text[:4096].rstrip(b"\0 \n")
    match = re.search(rb'"shape"\s?:\s?(\[[\d\s,]{1,500}\])', header)
    shape = json.loads(match[1]) if match and re.fullmatch(rb"\[\s*\d{1,9}(\s*,\s*\d{1,9})*\s*\]", match[1]) else []
    samples = directory.number(Tag.SamplesPerPixel, 1)
    size = (directory.number(Tag.ImageLength, 0), directory.number(Tag.ImageWidth, 0))
    if size not in itertools.pairwise(shape):
        return None
    count = math.prod(shape) // max(1, size[0] * size[1] * samples)
    axes = match[1].decode() if (match := re.search(rb'"axes"\s?:\s?"([A-Z]{2,20})"', header)) else ""
    spatial = {"Y", "X", "S"} if samples > 1 else {"Y", "X"}
    sizes = {axis.lower(): length for axis, length in zip(axes, shape) if axis not in spatial and length > 1}
    if len(axes) != len(shape) or math.prod(sizes.values()) != count or not set(sizes) <= {*"tzc"}:
        return {"p": count}
    return sizes


def _of_series(images: Sequence[Directory], sizes: Mapping[str, int]) -> list[Position] | None:
    """Return the planes of a file of one tifffile series; None for one plane, or for several series."""
    if (count := math.prod(sizes.values())) == 1 or count == len(images):
        return _grid(sizes) if count > 1 else None
    series = [shape for d in images for text in d.texts(Tag.ImageDescription, 4096) if (shape := _shaped(text, d))]
    if len(series) > 1 and sum(math.prod(shape.values()) for shape in series) == len(images):
        return None
    return _grid(sizes)


def _micro_manager(images: Sequence[Directory]) -> list[Position] | None:
    """Return the indices that Micro-Manager stores with each plane, in any order; None for other files."""
    positions = []
    for directory in images:
        text = b"".join(directory.texts(_MICRO_MANAGER, 2**18)[:1])
        indices = dict(re.findall(rb'"(\w+Index)"\s*:\s*(\d{1,6})\b', text))
        positions.append({axis: int(indices.get(key.encode(), 0)) for key, axis in _MICRO_MANAGER_AXES.items()})
        if not indices:
            return None
    if len({tuple(position.values()) for position in positions}) < len(positions):
        raise DamagedImageError("Micro-Manager metadata that gives several images the same indices")
    return positions
