"""Target kind `boundary`: the foreground, and the boundaries of cells as lines two pixels wide."""

from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray

from raylivecell.targets import masked
from raylivecell.targets.base import Target
from raylivecell.targets.dice import dice_loss

if TYPE_CHECKING:
    from torch import Tensor

SQUARE = np.ones((3, 3), np.uint8)


class Boundary(Target):
    """A boundary channel: 1 where the 3 x 3 neighbourhood of a pixel has more than one label."""

    channels = ("foreground", "boundary")
    prominence = 0.1
    height_expression = "maps[0] * (1 - maps[1])"

    def draw(self, labels: NDArray[np.uint16], out: NDArray[np.uint8]) -> None:
        """Draw `boundary`."""
        out[0] = 255 * boundary(labels)

    def loss(self, logits: "Tensor", maps: "Tensor", foreground: "Tensor", ignored: "Tensor") -> "Tensor":
        """BCE plus Dice."""
        return masked.bce(logits, maps, ignored) + dice_loss()(logits, maps)

    def height(self, maps: NDArray[np.float32], cell: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Probability of foreground and no boundary."""
        return maps[0] * (1 - maps[1])


def boundary(labels: NDArray[np.uint16]) -> NDArray[np.bool_]:
    """Pixels whose 3 x 3 neighbourhood has more than one label (background is one), bool (H, W)."""
    return cv2.dilate(labels, SQUARE) != cv2.erode(labels, SQUARE)


TARGET = Boundary()
