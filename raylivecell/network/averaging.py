"""Test-time augmentation: maps averaged over turned, mirrored and scaled versions of an image. No torch, no Ray.

The maps of all target kinds are probabilities or fractions of a cell's size: they do not change with the scale.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

from raylivecell.images.scale import resize_to
from raylivecell.network.windows import Maps, Network, complete_maps

VERSIONS = (
    (1.0, 0, False),
    (0.8, 1, False),
    (1.25, 2, False),
    (0.9, 3, False),
    (1.1, 0, True),
    (1.0, 1, True),
    (0.8, 2, True),
    (1.25, 3, True),
)
"""Scale, quarter turns, and whether the image is mirrored before: each flip and turn once, 8.4 times the pixels.

mSA of five unseen LIVECell images, two networks: 0.304 and 0.308; with the eight flips and turns alone 0.294 and 0.298;
with one pass 0.278 and 0.282. On another microscope (Usiigaci, four networks) scales make no difference: 0.239 against
0.241; one pass 0.212."""
MIN_SIDE = 64
"""Images are not scaled to fewer pixels than this on a side: networks halve them up to five times."""


def averaged(network: Network) -> Network:
    """Return `network`, with its maps averaged over the eight `VERSIONS` of an image."""

    def mean(image: NDArray[np.uint8]) -> Maps:
        total = np.zeros((), np.float32)
        for version in VERSIONS:
            total = total + _maps_of_version(network, image, *version)
        return np.ascontiguousarray(total / np.float32(len(VERSIONS)))

    return mean


def _maps_of_version(network: Network, image: NDArray[np.uint8], scale: float, turns: int, mirrored: bool) -> Maps:
    """Maps of one version of `image`, turned and scaled back: float32 (C, H, W)."""
    height, width = image.shape
    scaled = (round(scale * height), round(scale * width)) if min(image.shape) * scale >= MIN_SIDE else image.shape
    seen = resize_to(image, scaled)
    seen = np.ascontiguousarray(np.rot90(seen[:, ::-1] if mirrored else seen, turns))
    maps = np.rot90(complete_maps(network, seen), -turns, (1, 2))
    maps = np.ascontiguousarray(maps[..., ::-1] if mirrored else maps)
    if scaled == image.shape:
        return maps
    return np.stack([cv2.resize(channel, (width, height), interpolation=cv2.INTER_LINEAR) for channel in maps])
