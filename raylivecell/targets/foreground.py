"""Target kind `foreground`: cell or background, as in the paper."""

from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray

from raylivecell.targets.base import Target

if TYPE_CHECKING:
    from torch import Tensor

MAX_DEPTH = 32.0
"""Pixels from the background at which the height reaches 1; LIVECell cells are seldom deeper."""


class Foreground(Target):
    """Only the foreground channel; the height is the distance to the background."""

    channels = ("foreground",)
    prominence = 0.03
    height_expression = "np.minimum(ndimage.distance_transform_edt(cell), 32) / 32"

    def draw(self, labels: NDArray[np.uint16], out: NDArray[np.uint8]) -> None:
        """Draw nothing."""

    def loss(self, logits: "Tensor", maps: "Tensor", foreground: "Tensor", ignored: "Tensor") -> "Tensor":
        """Return zero."""
        return logits.new_zeros(())

    def height(self, maps: NDArray[np.float32], cell: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Distance to the background, up to MAX_DEPTH pixels, as a fraction of MAX_DEPTH."""
        depth = cv2.distanceTransform(cell.view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        # OpenCV 5 rounds a square root up or down depending on the array's address; squared distances are integers.
        squares = np.rint(np.square(np.minimum(depth, np.float32(MAX_DEPTH))))
        return np.asarray(np.sqrt(squares) / np.float32(MAX_DEPTH), np.float32)


TARGET = Foreground()
