"""Masks drawn on images: outlines where only a prediction is known, agreement in colours where the truth is too.

The colours are near Okabe and Ito's (2008) and differ in lightness too: told apart in every common form of colour
blindness, and on LIVECell's mid-gray background.
"""

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Rgb = tuple[int, int, int]
OUTLINE: Rgb = (240, 228, 66)
"""Yellow: a predicted cell's edge."""
FOUND: Rgb = (40, 222, 165)
"""Bluish green: the edge of what is cell in truth and prediction."""
FALSE: Rgb = (230, 85, 0)
"""Vermilion: predicted, but not cell."""
MISSED: Rgb = (0, 90, 230)
"""Blue: cell, but not predicted."""
LEGEND = (("found (edge)", FOUND), ("predicted, not cell", FALSE), ("cell, not predicted", MISSED))
TINT = 0.55  # the colour's share in a tinted pixel: the image stays legible under it


def overlay(image: NDArray[Any], truth: NDArray[Any] | None, prediction: NDArray[Any]) -> NDArray[np.uint8]:
    """The image with its segmentation drawn on it, RGB uint8 (H, W, 3).

    Args:
        image: uint8 (H, W).
        truth: (H, W), cell where not 0; none: only the prediction's edges are drawn.
        prediction: (H, W), cell where not 0.
    """
    canvas = np.repeat(image[..., None], 3, axis=2)
    said = prediction != 0
    if truth is None:
        canvas[edge(said)] = OUTLINE
        return canvas
    cell = truth != 0
    _tint(canvas, said & ~cell, FALSE)
    _tint(canvas, cell & ~said, MISSED)
    canvas[edge(cell & said)] = FOUND
    return canvas


def edge(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels of the mask that touch its outside (4-neighbours); the image's border is no outside."""
    if mask.size == 0:
        return mask
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    return mask & (cv2.erode(mask.astype(np.uint8), cross, borderType=cv2.BORDER_REPLICATE) == 0)


def png(image: NDArray[np.uint8]) -> bytes:
    """PNG of a gray (H, W) or RGB (H, W, 3) image."""
    done, data = cv2.imencode(".png", image if image.ndim == 2 else image[..., ::-1])
    if not done:
        raise ValueError(f"no PNG of an image of shape {image.shape}")
    return data.tobytes()


def _tint(canvas: NDArray[np.uint8], where: NDArray[np.bool_], colour: Rgb) -> None:
    canvas[where] = np.rint((1 - TINT) * canvas[where] + TINT * np.array(colour)).astype(np.uint8)
