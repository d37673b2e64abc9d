"""The planes of a training sample, uint8 (2 + C, H, W): image, foreground, border, then the maps of its target kind.

The foreground is 0, CELL or IGNORED (a pixel without annotation), the border map 255 times the exponential weight
between touching cells (network/losses.py), the maps 255 times their values, rounded. A batch of samples is uint8
(B, 2 + C, H, W).

If maps are drawn after augmentation, a decoded sample is its image and `pack` of its labels and border map.
"""

import numpy as np
from numpy.typing import NDArray

from raylivecell.targets.registry import Targets, target

IMAGE, FOREGROUND, BORDER = range(3)
MASKS = slice(FOREGROUND, BORDER + 1)
"""The planes that are resampled by nearest neighbour."""
MAPS = slice(BORDER + 1, None)
IGNORED_BIT = 24
"""Bit of `pack` that is set at ignored pixels; labels are below, then the border map."""
CELL, IGNORED = 1, 2
"""Values of the foreground plane, which is 0 in the background."""
STORED = ("image", "foreground", "border")
"""Columns of a dataset's shards with the planes before MAPS, in order."""


def count(targets: Targets) -> int:
    """Number of planes of a sample: 2 + C, where C is the number of output channels."""
    return len(STORED) + len(target(targets).channels) - 1


def bytes_per_pixel(labels: bool) -> int:
    """Bytes per pixel of a decoded sample: of its STORED planes, or with `labels` of its image and `pack`."""
    return 1 + np.dtype(np.uint32).itemsize if labels else len(STORED)


def pack(
    labels: NDArray[np.uint16], border: NDArray[np.uint8], ignored: NDArray[np.bool_] | None = None
) -> NDArray[np.uint32]:
    """Pack labels, border map and ignored pixels into one image, uint32 (H, W), so that one pass warps all."""
    packed = np.bitwise_or(labels, border.astype(np.uint32) << 16, dtype=np.uint32)
    if ignored is not None:
        packed[ignored] |= 1 << IGNORED_BIT
    return packed


def unpack(packed: NDArray[np.uint32]) -> tuple[NDArray[np.uint16], NDArray[np.uint8], NDArray[np.bool_]]:
    """Return the labels, the border map and the ignored pixels from the result of `pack`."""
    return packed.astype(np.uint16), (packed >> 16).astype(np.uint8), packed >= 1 << IGNORED_BIT


def with_ignored(foreground: NDArray[np.uint8], ignored: NDArray[np.bool_] | None) -> NDArray[np.uint8]:
    """Return a foreground (H, W) of 0 and CELL with IGNORED at the pixels `ignored` that are in no cell."""
    return foreground if ignored is None else np.where(ignored & (foreground == 0), np.uint8(IGNORED), foreground)


def draw(
    image: NDArray[np.uint8], packed: NDArray[np.uint32], targets: Targets, out: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """Draw the planes of a sample from its image and `pack`, both (H, W), in `out` if given."""
    if out is None:
        out = np.empty((count(targets), *image.shape), np.uint8)
    labels, border, ignored = unpack(packed)
    out[IMAGE], out[FOREGROUND], out[BORDER] = image, labels != 0, border
    out[FOREGROUND][ignored & (labels == 0)] = IGNORED
    target(targets).draw(labels, out[MAPS])
    return out
