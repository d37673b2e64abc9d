"""What a network of cells learns beside the foreground: boundaries, or distances; drawn from a sample's own labels.

    boundary            1 where a pixel's 3 x 3 neighbours are of more than one label: a line two pixels wide
    centre_distance     d(pixel, centre) / its largest value in the cell, 0 at the centre to 1 at the farthest pixel
    boundary_distance   d(pixel, outside of its cell) / its largest value in the cell, over 0 to 1 at the centre

A cell's centre is its pixel farthest from its outside; the frame's edge is no outside. Distances are Euclidean between
pixel centres, 0 in the background.

They are drawn after augmentation, from the warped labels. Rotation and flips would carry prepared fields along rightly,
elastic deformation would not: a warped distance is the length in the undeformed cell. With small.yaml's deformation
(alpha 600, sigma 20) the distances to the centre are then off by 0.09 in the mean and by more than 0.2 in a tenth of
the cells' pixels, those to the boundary by 0.05. A cell that the crop cuts has the centre of the part that shows, as
cells cut by the frame have at prediction. Drawing takes 2 ms for a crop of 256 x 256.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

from raylivecell.recipe import CHANNELS, Targets

SQUARE = np.ones((3, 3), np.uint8)


def pack(labels: NDArray[np.uint16], border: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """Labels and border map of a sample as one image, so that one pass moves both: uint32 (H, W)."""
    return np.bitwise_or(labels, border.astype(np.uint32) << 16, dtype=np.uint32)


def draw_target_maps(
    image: NDArray[np.uint8], packed: NDArray[np.uint32], targets: Targets, out: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """What is trained on: uint8 (2 + C, H, W) = image, foreground 0/1, border, then the fields of `targets`.

    Fields are 255 times their value, rounded. `image` and `packed` are (H, W); the planes go into `out` where given.
    """
    if out is None:
        out = np.empty((2 + len(CHANNELS[targets]), *image.shape), np.uint8)
    labels = packed.astype(np.uint16)  # the lower half
    out[0], out[1], out[2] = image, labels != 0, packed >> 16
    if targets == "boundary":
        out[3] = 255 * boundary(labels)
    elif targets == "distance":
        for plane, field in zip(out[3:], distances(labels)):
            np.rint(255 * field, out=plane, casting="unsafe")
    return out


def boundary(labels: NDArray[np.uint16]) -> NDArray[np.bool_]:
    """Where two labels (background is one) lie in a pixel's 3 x 3 neighbourhood, bool (H, W)."""
    return cv2.dilate(labels, SQUARE) != cv2.erode(labels, SQUARE)


def distances(labels: NDArray[np.uint16]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """`centre_distance` and `boundary_distance` of labels (H, W), each float32 (H, W) in 0 to 1."""
    cell = labels != 0
    depth = _depth(labels)
    count = int(labels.max(initial=0)) + 1
    deepest = np.zeros(count, np.float32)
    inside = np.flatnonzero(cell)
    owner, depth_inside = labels.ravel()[inside], depth.ravel()[inside]
    np.maximum.at(deepest, owner, depth_inside)
    # Of several deepest pixels the first in the order of the image: the last that is written.
    best = inside[depth_inside == deepest[owner]][::-1]
    centre = np.zeros(count, np.int64)
    centre[labels.ravel()[best]] = best
    width = labels.shape[1]
    y, x = np.divmod(inside, width)
    centre_y, centre_x = np.divmod(centre, width)
    away = np.hypot(y - centre_y[owner], x - centre_x[owner]).astype(np.float32)
    farthest = np.ones(count, np.float32)  # a cell of one pixel has 0 / 1
    np.maximum.at(farthest, owner, away)
    to_centre, to_boundary = (np.zeros(labels.shape, np.float32) for _ in range(2))
    to_centre.ravel()[inside] = away / farthest[owner]
    to_boundary.ravel()[inside] = depth_inside / deepest[owner]
    return to_centre, to_boundary


def _depth(labels: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Distance in pixels of each cell's pixels to the nearest pixel that is not of the cell, float32 (H, W).

    One transform for all cells: each pixel's distance to the nearest edge pixel of any cell, and 1. On the way to
    another cell's edge lies one's own. Exact where the outside lies straight across the edge, as much as 0.42 too
    large where it lies across a corner.
    """
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    edge = (cv2.dilate(labels, cross) != labels) | (cv2.erode(labels, cross) != labels)
    edge &= labels != 0
    if not edge.any():  # one cell fills the frame
        return (labels != 0).astype(np.float32)
    distance = cv2.distanceTransform((~edge).view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    # OpenCV 5 rounds a root up or down by where the array lies in memory: equal depths must be equal to the last bit.
    depth = np.sqrt(np.rint(np.square(distance))) + np.float32(1)
    depth[labels == 0] = 0
    return depth
