"""Conversion of colour images and palette images to one grey channel."""

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from raylivecell.core.errors import UnsupportedImageError

_HUE_RATIO = 8
_MIN_COLOURS, _MAX_STEP, _MAX_DIP, _MIN_RISE = 64, 32, 2, 16
"""Limits for a colour ramp: number of colours; step of a channel; fall and total rise of luma."""


def grey_of_rgb(rgb: NDArray[Any]) -> NDArray[Any]:
    """Convert red, green and blue (H, W, 3), uint8 or uint16, to grey (H, W) of the same dtype.

    Equal channels: their value. Images of one hue (fluorescence saved in colour: one filled channel, or two equal
    ones): the brightest channel of each pixel, since luma would keep 11 % of blue. All others: luma,
    0.299 R + 0.587 G + 0.114 B.
    """
    channels = [np.asarray(channel) for channel in cv2.split(rgb)]
    if np.array_equal(channels[0], channels[1]) and np.array_equal(channels[1], channels[2]):
        return channels[0]
    if _one_hue(channels):
        return np.asarray(cv2.max(cv2.max(channels[0], channels[1]), channels[2]))
    return np.asarray(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY))


def _one_hue(channels: list[NDArray[Any]]) -> bool:
    """Return whether colour outweighs grey and is in one channel (at least 8 times the next) or in two equal ones.

    The colour of a channel is its sum minus the sum of each pixel's smallest channel: white text and grey
    contribute nothing, JPEG artefacts in the empty channels little.
    """
    grey = cv2.sumElems(cv2.min(cv2.min(channels[0], channels[1]), channels[2]))[0]
    colour = [cv2.sumElems(channel)[0] - grey for channel in channels]
    _, second, first = np.argsort(colour)
    if grey > colour[first]:
        return False
    return colour[second] * _HUE_RATIO <= colour[first] or np.array_equal(channels[first], channels[second])


def grey_of_palette(indices: NDArray[np.uint8], table: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Convert a palette image to grey (H, W).

    Grey palette (straight, inverted, any order): the displayed grey. Colour ramp (a lookup table on grey data: at least
    64 colours whose luma rises steadily in small steps): the index, as in Fiji; falling luma: its complement. The first
    and last colour of a ramp may differ (they mark saturation).

    Args:
        indices: (H, W).
        table: (N, 3), the palette's RGB colours.

    Raises:
        UnsupportedImageError: any other palette; its indices carry no brightness.
    """
    top = int(indices.max(initial=0))
    if top >= len(table):
        raise UnsupportedImageError(f"palette of {len(table)} colours, but pixels use index {top}; save it as grey")
    used = table[np.bincount(indices.ravel(), minlength=len(table)) > 0]
    if (used == used[:, :1]).all():
        return np.ascontiguousarray(table[:, 0])[indices]
    if rising := _ramp(table):
        return indices if rising > 0 else (len(table) - 1 - indices).astype(np.uint8)
    raise UnsupportedImageError("colour palette that is not a ramp; save it as grey or RGB")


def _ramp(table: NDArray[np.uint8]) -> int:
    """Return 1 for a colour ramp of rising luma, -1 for falling luma, otherwise 0."""
    inner = table[1:-1].astype(np.float64)
    if len(table) < _MIN_COLOURS or np.abs(np.diff(inner, axis=0)).max() > _MAX_STEP:
        return 0
    luma = inner @ (0.299, 0.587, 0.114)
    for sign in (1, -1):
        rising = sign * luma
        if (rising >= np.maximum.accumulate(rising) - _MAX_DIP).all() and rising[-1] - rising[0] >= _MIN_RISE:
            return sign
    return 0
