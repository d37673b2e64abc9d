"""Draw masks and cells on images: outlines of cells, or the agreement of a prediction with the truth in colours.

The colours are near Okabe and Ito's (2008) and differ in lightness, too: distinguishable with every common form of
colour blindness, and on LIVECell's mid-gray background.
"""

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Rgb = tuple[int, int, int]
FOUND: Rgb = (40, 222, 165)
"""Bluish green: edge of the pixels that are cell in truth and prediction."""
FALSE: Rgb = (230, 85, 0)
"""Vermilion: predicted, but not cell."""
MISSED: Rgb = (0, 90, 230)
"""Blue: cell, but not predicted."""
LEGEND = (("found (edge)", FOUND), ("predicted, not cell", FALSE), ("cell, not predicted", MISSED))
OUTLINES: tuple[Rgb, ...] = (
    (240, 228, 66),
    (70, 200, 255),
    (255, 120, 30),
    (60, 235, 150),
    (255, 140, 215),
    (255, 255, 255),
)
"""Yellow, sky blue, orange, green, pink, white: cells' outlines; neighbours differ. Most cells are yellow or blue."""
NEAR = 2
"""Cells are neighbours if at most this number of pixels is between them."""
BAND = 1024  # rows processed at once: a complete mosaic would need 12 bytes per pixel
TINT = 0.55  # weight of the colour in a tinted pixel: the image stays visible


def overlay(image: NDArray[np.uint8], truth: NDArray[Any], prediction: NDArray[Any]) -> NDArray[np.uint8]:
    """Draw the agreement of two masks on an image (`LEGEND`), RGB uint8 (H, W, 3).

    Args:
        image: uint8 (H, W).
        truth: (H, W), cell where not 0.
        prediction: (H, W), cell where not 0.
    """
    canvas = np.repeat(image[..., None], 3, axis=2)
    predicted, cell = prediction != 0, truth != 0
    tint(canvas, predicted & ~cell, FALSE)
    tint(canvas, cell & ~predicted, MISSED)
    canvas[edges(cell & predicted)] = FOUND
    return canvas


def outlined(image: NDArray[np.uint8], labels: NDArray[Any]) -> NDArray[np.uint8]:
    """Draw each cell's outline within its own pixels, neighbours in different colours, RGB uint8 (H, W, 3).

    Args:
        image: uint8 (H, W).
        labels: integers (H, W) below 2^24, 0 for background.
    """
    canvas = np.repeat(image[..., None], 3, axis=2)
    if labels.any():
        lines = edges(labels)
        canvas[lines] = np.array(OUTLINES, np.uint8)[_colours(labels)[labels[lines]]]
    return canvas


def edges(labels: NDArray[Any]) -> NDArray[np.bool_]:
    """Pixels of cells with a 4-neighbour of another label, bool (H, W); the image's border does not count."""
    edge = np.zeros(labels.shape, np.bool_)
    for here, there in (np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1]):
        differ = labels[here] != labels[there]
        edge[here] |= differ
        edge[there] |= differ
    return edge & (labels != 0)


def tint(canvas: NDArray[np.uint8], where: NDArray[np.bool_], colour: Rgb) -> None:
    """Blend a colour into the pixels (H, W) of an RGB image (H, W, 3), in place."""
    canvas[where] = np.rint((1 - TINT) * canvas[where] + TINT * np.array(colour)).astype(np.uint8)


def png(image: NDArray[np.uint8]) -> bytes:
    """PNG of a gray (H, W) or RGB (H, W, 3) image."""
    encoded, data = cv2.imencode(".png", image if image.ndim == 2 else image[..., ::-1])
    if not encoded:
        raise ValueError(f"no PNG of an image of shape {image.shape}")
    return data.tobytes()


def _colours(labels: NDArray[Any]) -> NDArray[np.uint8]:
    """Colour of each label as index into `OUTLINES`: the first that no neighbour with a lower label has.

    If neighbours have all six, label modulo six: in a plane, more than six cells seldom meet.
    """
    neighbours: list[list[int]] = [[] for _ in range(int(labels.max()) + 1)]
    for low, high in _neighbours(labels).tolist():
        neighbours[high].append(low)
    colours = np.zeros(len(neighbours), np.uint8)
    for label, others in enumerate(neighbours):
        used = {int(colours[other]) for other in others}
        free = (colour for colour in range(len(OUTLINES)) if colour not in used)
        colours[label] = next(free, label % len(OUTLINES))
    return colours


def _neighbours(labels: NDArray[Any]) -> NDArray[np.int64]:
    """Pairs of labels with `NEAR` pixels or fewer between them, the lower first, (N, 2)."""
    reach = np.ones((NEAR + 2, NEAR + 2), np.uint8)
    codes = []
    for top in range(0, len(labels), BAND):
        plane = labels[top : top + BAND + NEAR + 1].astype(np.float32)
        highest = cv2.dilate(plane, reach)
        plane[plane == 0] = np.inf
        lowest = cv2.erode(plane, reach)
        mixed = lowest < highest
        codes.append(np.unique(lowest[mixed].astype(np.int64) << 32 | highest[mixed].astype(np.int64)))
    pairs = np.unique(np.concatenate(codes))
    return np.stack([pairs >> 32, pairs & 0xFFFFFFFF], axis=1)
