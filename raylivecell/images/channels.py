"""One gray picture from the channels of a colour image or from the indices of a palette image."""

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from raylivecell.core.errors import UnsupportedImageError

_HUE_SHARE = 8
_MIN_RAMP, _MAX_STEP, _DIP, _MIN_RISE = 64, 32, 2, 16


def gray_of_rgb(rgb: NDArray[Any]) -> NDArray[Any]:
    """Gray picture (H, W) of red, green and blue (H, W, 3), uint8 or uint16, of the same dtype.

    Equal channels: their value. A picture of one hue (fluorescence saved in colour: one filled channel, or two equal
    ones): the brightest channel of each pixel, as luma would keep 11 % of blue. All other colour: luma,
    0.299 R + 0.587 G + 0.114 B.
    """
    channels = [np.asarray(channel) for channel in cv2.split(rgb)]
    if np.array_equal(channels[0], channels[1]) and np.array_equal(channels[1], channels[2]):
        return channels[0]
    if _one_hue(channels):
        return np.asarray(cv2.max(cv2.max(channels[0], channels[1]), channels[2]))
    return np.asarray(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY))


def _one_hue(channels: list[NDArray[Any]]) -> bool:
    """Whether colour outweighs gray, and is in one channel (at least 8 times the next) or in two equal ones.

    A channel's colour is its sum less the sum of each pixel's smallest channel: white text and gray weigh nothing,
    and JPEG's traces in the empty channels weigh little.
    """
    gray = cv2.sumElems(cv2.min(cv2.min(channels[0], channels[1]), channels[2]))[0]
    colour = [cv2.sumElems(channel)[0] - gray for channel in channels]
    _, second, first = np.argsort(colour)
    if gray > colour[first]:
        return False
    return colour[second] * _HUE_SHARE <= colour[first] or np.array_equal(channels[first], channels[second])


def gray_of_palette(indices: NDArray[np.uint8], table: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Gray picture (H, W) of a palette image.

    Gray palette (straight, inverted, any order): the gray that is shown. Colour ramp (a lookup table on gray data:
    at least 64 colours whose luma rises steadily and in small steps): the index, as Fiji has it; falling: its
    complement. The first and last colour may stand out (they mark saturation).

    Args:
        indices: (H, W).
        table: (N, 3), the colours.

    Raises:
        UnreadableImageError: any other palette; its indices carry no brightness.
    """
    top = int(indices.max(initial=0))
    if top >= len(table):
        raise UnsupportedImageError(f"palette of {len(table)} colours, but colour {top} is used; save it as gray")
    used = table[np.bincount(indices.ravel(), minlength=len(table)) > 0]
    if (used == used[:, :1]).all():
        return np.ascontiguousarray(table[:, 0])[indices]
    if rising := _ramp(table):
        return indices if rising > 0 else (len(table) - 1 - indices).astype(np.uint8)
    raise UnsupportedImageError("colour palette that is no ramp; save it as gray or RGB")


def _ramp(table: NDArray[np.uint8]) -> int:
    """1 for a colour ramp that gets brighter, -1 for one that gets darker, else 0."""
    inner = table[1:-1].astype(np.float64)
    if len(table) < _MIN_RAMP or np.abs(np.diff(inner, axis=0)).max() > _MAX_STEP:
        return 0
    luma = inner @ (0.299, 0.587, 0.114)
    for sign in (1, -1):
        rising = sign * luma
        if (rising >= np.maximum.accumulate(rising) - _DIP).all() and rising[-1] - rising[0] >= _MIN_RISE:
            return sign
    return 0
