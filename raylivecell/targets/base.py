"""Interface of a target kind. It imports no torch: data tasks draw maps, only training computes losses."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor


class Target(ABC):
    """Output channels of the network, with their drawing from labels, their loss, and the watershed's height map."""

    channels: ClassVar[tuple[str, ...]]
    """Names of the network's output channels, "foreground" first; each is 0 to 1 after a sigmoid."""
    prominence: ClassVar[float]
    """Default of `InstanceConfig.prominence`."""
    height_expression: ClassVar[str]
    """`height` as a Python expression of `maps`, `cell`, `np` and `ndimage` (SciPy), for users of exported networks."""

    @abstractmethod
    def draw(self, labels: NDArray[np.uint16], out: NDArray[np.uint8]) -> None:
        """Draw the channels after the foreground from labels (H, W).

        Args:
            labels: 0 for background; not modified.
            out: uint8 (C - 1, H, W), to fill with 255 times the values, rounded.
        """

    @abstractmethod
    def loss(self, logits: "Tensor", maps: "Tensor", foreground: "Tensor", ignored: "Tensor") -> "Tensor":
        """Loss of the channels after the foreground, a scalar: the mean over images.

        Args:
            logits: float (B, C - 1, H, W), after `masked.fill`.
            maps: float (B, C - 1, H, W), 0 to 1: the output of `draw` / 255, after `masked.fill`.
            foreground: float (B, 1, H, W), 1 in cells.
            ignored: bool (B, 1, H, W), pixels without annotation; none is in a cell.
        """

    @abstractmethod
    def height(self, maps: NDArray[np.float32], cell: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Height map of the watershed, float32 (H, W), 0 to 1: highest in the middle of each cell.

        Args:
            maps: the network's output after the sigmoid, float32 (C, H, W), as `channels`.
            cell: bool (H, W): foreground probability above the threshold.
        """

    def confidence(self, maps: NDArray[np.float32], labels: NDArray[np.int32]) -> NDArray[np.float32]:
        """Confidence in each pixel of the cells that were found, float32 (H, W), 0 to 1; any value outside cells.

        Args:
            maps: as in `height`.
            labels: (H, W), 0 background, 1 to N.

        Returns:
            The foreground probability, unless the kind has maps to compare with the cells.
        """
        return maps[0]
