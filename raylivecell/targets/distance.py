"""Target kind `distance`: the foreground, and two distances within each cell, which separate touching cells best.

    centre_distance     d(pixel, centre) / its maximum in the cell: 0 at the centre, 1 at the farthest pixel
    boundary_distance   d(pixel, outside of the cell) / its maximum in the cell: above 0, and 1 at the centre

The centre of a cell is its pixel farthest from the outside; the image edge does not count as outside. Distances are
Euclidean between pixel centres, 0 in the background.

The maps are drawn after augmentation, from the warped labels. Rotation and flips would preserve maps drawn earlier,
elastic deformation would not: a warped map contains lengths of the undeformed cell. With small.yaml's deformation
(alpha 600, sigma 20), distances to the centre would be wrong by 0.09 on average, and by more than 0.2 in a tenth of the
cell pixels; distances to the boundary by 0.05. The centre of a cell cut by the crop is that of its visible part, as
at prediction for a cell cut by the image edge. Drawing takes 2 ms for a crop of 256 x 256.
"""

from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from raylivecell.targets.base import Target

if TYPE_CHECKING:
    from torch import Tensor

LOSS_SCALE = 10.0
"""Squared errors of distances are about 0.02, a tenth of the other losses."""


class Distance(Target):
    """Distances to the cell's centre and to its boundary."""

    channels = ("foreground", "centre_distance", "boundary_distance")
    prominence = 0.1
    height_expression = "(1 - maps[1] + maps[2]) / 2"

    def draw(self, labels: NDArray[np.uint16], out: NDArray[np.uint8]) -> None:
        """Draw `distances`."""
        for plane, values in zip(out, distances(labels)):
            np.rint(255 * values, out=plane, casting="unsafe")

    def loss(self, logits: "Tensor", maps: "Tensor", foreground: "Tensor", ignored: "Tensor") -> "Tensor":
        """Squared error inside cells only: distances outside, also in ignored pixels, are not used."""
        import torch

        cell_pixels = foreground.sum(dim=(2, 3)).clamp(min=1)
        error = (torch.sigmoid(logits) - maps).square() * foreground
        return LOSS_SCALE * (error.sum(dim=(2, 3)) / cell_pixels).mean()

    def height(self, maps: NDArray[np.float32], cell: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Mean of the proximity to the centre and the distance to the boundary."""
        return ((1 - maps[1] + maps[2]) / 2).astype(np.float32, copy=False)

    def confidence(self, maps: NDArray[np.float32], labels: NDArray[np.int32]) -> NDArray[np.float32]:
        """Foreground probability times agreement: 1 minus the mean difference of both distances from the cell's own.

        Two cells taken for one, a part of a cell, or debris have other distances than the network predicted. Ranking by
        it gives AP50 0.519 on two validation and 0.445 on three test images of LIVECell; by the probability alone 0.469
        and 0.427.
        """
        to_centre, to_boundary = distances(labels)
        difference = cv2.absdiff(maps[1], to_centre) + cv2.absdiff(maps[2], to_boundary)
        return maps[0] * (1 - difference / 2)


def distances(labels: NDArray[np.integer[Any]]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """`centre_distance` and `boundary_distance` of labels (H, W), below 2**24, each float32 (H, W), 0 to 1."""
    cell = labels != 0
    depth = _depth(labels)
    count = int(labels.max(initial=0)) + 1
    max_depth = np.zeros(count, np.float32)
    inside = np.flatnonzero(cell)
    owner, depth_inside = labels.ravel()[inside], depth.ravel()[inside]
    np.maximum.at(max_depth, owner, depth_inside)
    # Of several deepest pixels the first in image order becomes the centre: it is written last.
    deepest = inside[depth_inside == max_depth[owner]][::-1]
    centre = np.zeros(count, np.int64)
    centre[labels.ravel()[deepest]] = deepest
    width = labels.shape[1]
    y, x = np.divmod(inside, width)
    centre_y, centre_x = np.divmod(centre, width)
    radius = np.hypot(y - centre_y[owner], x - centre_x[owner]).astype(np.float32)
    max_radius = np.ones(count, np.float32)  # a cell of one pixel has 0 / 1
    np.maximum.at(max_radius, owner, radius)
    to_centre, to_boundary = (np.zeros(labels.shape, np.float32) for _ in range(2))
    to_centre.ravel()[inside] = radius / max_radius[owner]
    to_boundary.ravel()[inside] = depth_inside / max_depth[owner]
    return to_centre, to_boundary


def _depth(labels: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
    """Distance in pixels from each cell pixel to the nearest pixel outside its cell, float32 (H, W).

    One transform for all cells: the distance to the nearest edge pixel of any cell, plus 1; the cell's own edge is
    always nearer than another cell's. Exact where the nearest outside pixel is straight across the edge, up to 0.42 too
    large where it is across a corner.
    """
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    labels = labels if labels.dtype == np.uint16 else labels.astype(np.float32)  # what OpenCV accepts
    edge = (cv2.dilate(labels, cross) != labels) | (cv2.erode(labels, cross) != labels)
    edge &= labels != 0
    if not edge.any():  # no cell, or one that fills the image
        return (labels != 0).astype(np.float32)
    distance = cv2.distanceTransform((~edge).view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    # OpenCV 5 rounds a square root up or down depending on the array's address: equal depths must be equal to the bit.
    depth = np.sqrt(np.rint(np.square(distance))) + np.float32(1)
    depth[labels == 0] = 0
    return depth


TARGET = Distance()
