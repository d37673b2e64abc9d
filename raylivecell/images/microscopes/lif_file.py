"""Leica LIF files, by liffile; imported only if it is installed."""

import io
import itertools
from typing import Any

import liffile
import numpy as np
from numpy.typing import NDArray

from raylivecell.core.errors import DamagedImageError, UnsupportedImageError
from raylivecell.images.microscopes.files import FilePlane, Stream, read_utf16_xml, unpack
from raylivecell.images.planes import Position
from raylivecell.images.ranges import Data

_AXES = {"T": "t", "Z": "z", "C": "c"}
_HEADER = "<IIBI"


def read_planes(data: Data) -> list[FilePlane]:
    """Return the planes of all images (series) of a file.

    liffile opens other files that XLIF and XLEF refer to; the header is that of LIF, whose pixels are in the file.
    """
    characters = unpack(data, 0, _HEADER)[3]
    xml = read_utf16_xml(data, 13, characters)
    if xml.startswith("LMS_Object_File"):
        raise UnsupportedImageError("Leica object file (LOF); export OME-TIFF")
    file = liffile.LifFile(io.BufferedReader(Stream(data)))
    planes: list[FilePlane] = []
    for series, image in enumerate(file.images):
        planes += _planes_of_image(image, series)
    return planes


def _planes_of_image(image: Any, series: int) -> list[FilePlane]:
    if image.is_flim:
        raise UnsupportedImageError(f"FLIM data ({image.name}); export OME-TIFF")
    sizes = dict(image.frames.frame_sizes)
    if list(sizes) not in (["Y", "X"], ["Y", "X", "S"]) or sizes.get("S", 3) != 3:
        raise UnsupportedImageError(f"frames with the axes {' '.join(sizes)} ({image.name}); export OME-TIFF")
    others = {axis: size for axis, size in image.sizes.items() if axis not in sizes}
    if unknown := [axis for axis in others if axis not in _AXES]:
        raise UnsupportedImageError(f"axis {', '.join(unknown)} ({image.name}), such as tiles; export OME-TIFF")
    if not image.memory_block.size:
        raise DamagedImageError(f"no pixels of {image.name}")
    planes = []
    for indices in itertools.product(*(range(size) for size in others.values())):
        frame = dict(zip(others, indices))
        position: Position = {"s": series, **{_AXES[axis]: index for axis, index in frame.items()}}
        planes.append(FilePlane(position, sizes["X"], sizes["Y"], _reader(image, frame)))
    return planes


def _reader(image: Any, frame: dict[str, int]) -> Any:
    def read() -> NDArray[Any]:
        return np.asarray(image.frame(**frame))

    return read
