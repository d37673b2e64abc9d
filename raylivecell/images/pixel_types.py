"""Conversion of signed, wide and floating-point pixels to uint8 or uint16: one rule for files and arrays.

The rule never uses the range of one image, which would make the frames of a series incomparable:

- Whole numbers from 0 to 65535, of any type: the same values. int8 becomes uint8, all other types uint16.
- Fractions from 0 to 1: times 65535, rounded.
- Fractions from 0 to 65535 with a maximum of at least 256 (16-bit images after averaging or a flat-field correction):
  rounded, an error of at most half a grey level.
- All others are refused: NaN, infinite and negative values, values above 65535, a maximum between 1 and 256 with
  fractions (a series in 0..1 with a bright pixel, or 8-bit values after filtering: its scale is unknown), and
  floating-point images that contain only 0 and 1 (a mask, or counts).

Two frames of one series are therefore never scaled differently: a frame up to 0.9 is multiplied by 65535, and one up to
1.1 is refused.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raylivecell.core.errors import UnsupportedImageError

MAX_VALUE = 65535
MIN_ROUNDED_MAXIMUM = 256
"""Maximum above which fractions may be rounded: the image has at least 256 grey levels."""
_FIX = "convert all images of the series with one scale to 8 or 16 bit"


def to_unsigned(values: NDArray[Any]) -> NDArray[np.unsignedinteger[Any]]:
    """Convert integers or floating-point numbers of any shape to uint8 or uint16; these are returned unchanged.

    Raises:
        UnsupportedImageError: no rule applies to the values; or a boolean, complex or other type.
    """
    if values.dtype.kind not in "uif":
        raise UnsupportedImageError(f"{values.dtype} pixels; {_FIX}")
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    if values.dtype in (np.uint8, np.uint16) or not values.size:
        return values.astype(values.dtype if values.dtype == np.uint8 else np.uint16, copy=False)
    low, high = values.min().item(), values.max().item()  # NaN if any value is
    if not math.isfinite(low) or not math.isfinite(high):
        raise UnsupportedImageError(f"NaN or infinite values; replace them, and {_FIX}")
    if low < 0 or high > MAX_VALUE:
        raise UnsupportedImageError(f"values from {low:g} to {high:g} do not fit 16 bits; {_FIX}")
    if values.dtype.kind != "f":
        return values.astype(np.uint8 if values.dtype == np.int8 else np.uint16)
    return _of_fractions(values.astype(np.promote_types(values.dtype, np.float32), copy=False), high)


def _of_fractions(values: NDArray[np.floating[Any]], high: float) -> NDArray[np.uint16]:
    """Convert floating-point numbers from 0 to `high`, at most 65535."""
    rounded = np.rint(values)
    whole = bool((rounded == values).all())
    if high <= 1:
        if whole and high == 1:
            raise UnsupportedImageError(f"floating-point values 0 and 1 only, a mask or counts; {_FIX}")
        return np.rint(values * values.dtype.type(MAX_VALUE)).astype(np.uint16)
    if not whole and high < MIN_ROUNDED_MAXIMUM:
        raise UnsupportedImageError(f"fractions from {values.min():g} to {high:g}, of unknown scale; {_FIX}")
    return rounded.astype(np.uint16)
