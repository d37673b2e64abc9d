"""Draw masks and cells on images: outlines of cells, or a prediction's agreement with the ground truth in colour.

The colours are close to Okabe and Ito's (2008) and also differ in lightness: distinguishable with every common form of
colour blindness, and on LIVECell's mid-grey background.
"""

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Rgb = tuple[int, int, int]
FOUND: Rgb = (40, 222, 165)
"""Bluish green: edge of the true positive pixels."""
FALSE: Rgb = (230, 85, 0)
"""Vermilion: false positive."""
MISSED: Rgb = (0, 90, 230)
"""Blue: false negative."""
HATCH: Rgb = (255, 255, 255)
"""White: lines on an ignore region, HATCH_WIDTH pixels wide, one every HATCH_PERIOD pixels."""
HATCH_WIDTH, HATCH_PERIOD = 2, 10
LEGEND = (("found (edge)", FOUND), ("predicted, not cell", FALSE), ("cell, not predicted", MISSED))
OUTLINES: tuple[Rgb, ...] = (
    (240, 228, 66),
    (70, 200, 255),
    (255, 120, 30),
    (60, 235, 150),
    (255, 140, 215),
    (255, 255, 255),
)
"""Outline colours: yellow, sky blue, orange, green, pink, white. Most cells are yellow or blue; neighbours differ."""
NEAR = 2
"""Largest distance of neighbouring cells: pixels between them."""
BAND = 1024  # rows processed at once: an entire mosaic would need 12 bytes per pixel
TINT = 0.55  # weight of the colour in a tinted pixel: the image stays visible


def overlay(image: NDArray[np.uint8], truth: NDArray[Any], prediction: NDArray[Any]) -> NDArray[np.uint8]:
    """Draw the agreement of two masks on an image, in the colours of `LEGEND`; RGB uint8 (H, W, 3).

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
    """Pixels of cells with a 4-neighbour of another label, bool (H, W); the image's border is not an edge."""
    edge = np.zeros(labels.shape, np.bool_)
    for current, previous in (np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1]):
        differ = labels[current] != labels[previous]
        edge[current] |= differ
        edge[previous] |= differ
    return edge & (labels != 0)


def tint(canvas: NDArray[np.uint8], where: NDArray[np.bool_], colour: Rgb) -> None:
    """Blend a colour into the pixels (H, W) of an RGB image (H, W, 3), in place."""
    canvas[where] = np.rint((1 - TINT) * canvas[where] + TINT * np.array(colour)).astype(np.uint8)


def hatch(canvas: NDArray[np.uint8], where: NDArray[np.bool_]) -> None:
    """Draw diagonal lines on the pixels (H, W) of an RGB image (H, W, 3), in place: an ignore region."""
    rows, columns = np.ogrid[: where.shape[0], : where.shape[1]]
    tint(canvas, where & ((rows + columns) % HATCH_PERIOD < HATCH_WIDTH), HATCH)


def png(image: NDArray[np.uint8]) -> bytes:
    """PNG of a grey (H, W) or RGB (H, W, 3) image."""
    encoded, data = cv2.imencode(".png", image if image.ndim == 2 else image[..., ::-1])
    if not encoded:
        raise ValueError(f"no PNG of an image of shape {image.shape}")
    return data.tobytes()


def _colours(labels: NDArray[Any]) -> NDArray[np.uint8]:
    """Greedy colouring: index into `OUTLINES` by label, the first unused by neighbours with a lower label.

    If these use all six, label modulo six: more than six cells seldom meet.
    """
    lower_neighbours: list[list[int]] = [[] for _ in range(int(labels.max()) + 1)]
    for low, high in _neighbours(labels).tolist():
        lower_neighbours[high].append(low)
    colours = np.zeros(len(lower_neighbours), np.uint8)
    for label, neighbours in enumerate(lower_neighbours):
        used = {int(colours[neighbour]) for neighbour in neighbours}
        free = (colour for colour in range(len(OUTLINES)) if colour not in used)
        colours[label] = next(free, label % len(OUTLINES))
    return colours


def _neighbours(labels: NDArray[Any]) -> NDArray[np.int64]:
    """Pairs of labels with `NEAR` pixels or fewer between them, the lower first, (N, 2)."""
    kernel = np.ones((NEAR + 2, NEAR + 2), np.uint8)
    codes = []
    for top in range(0, len(labels), BAND):
        plane = labels[top : top + BAND + NEAR + 1].astype(np.float32)
        highest = cv2.dilate(plane, kernel)
        plane[plane == 0] = np.inf
        lowest = cv2.erode(plane, kernel)
        mixed = lowest < highest
        codes.append(np.unique(lowest[mixed].astype(np.int64) << 32 | highest[mixed].astype(np.int64)))
    pairs = np.unique(np.concatenate(codes))
    return np.stack([pairs >> 32, pairs & 0xFFFFFFFF], axis=1)
