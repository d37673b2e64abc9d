"""What the network learns from: polygons -> label image -> foreground and border map. Done once, in `prepare`.

1. every cell is rasterised as pycocotools does it, in its own bounding box (18 us a cell; the whole frame takes 1.3 ms)
2. cells are painted largest first, so a small cell lying on a large one keeps its pixels
3. the border map of the original U-Net comes from exact distances to the two nearest cells
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from pydantic import Field
from scipy import ndimage

from raylivecell.core.errors import UserError
from raylivecell.core.settings import StrictModel


class Patch(NamedTuple):
    """A cell's mask cut to its bounding box: a frame of 3,000 cells as whole masks would take 1 GB."""

    top: int
    left: int
    mask: NDArray[np.uint8]
    """0/1 (h, w), inside the frame."""


Cell = Sequence[np.ndarray] | np.ndarray | Patch
"""One cell: its polygons, each float (V, 2) of x, y in COCO pixel coordinates; or its mask, bool or uint8 (H, W); or a
part of that."""

MAX_CELLS = np.iinfo(np.uint16).max


class TargetsConfig(StrictModel):
    """How targets are drawn."""

    border_sigma: float = Field(default=5.0, gt=0)
    """Width of the border map in pixels: sigma in exp(-(d1 + d2)^2 / (2 sigma^2)). 5 is the original U-Net's."""


def draw_labels(cells: Sequence[Cell], shape: tuple[int, int]) -> NDArray[np.uint16]:
    """The label image of `cells`: uint16 `shape` = (H, W), 0 background, k = `cells[k - 1]`.

    A pixel is in a polygon where pycocotools says so; what lies outside the frame is cut off; a cell's polygons are
    united. Where cells overlap the pixel goes to the one of smaller area (in the frame), of equal ones to the earlier.
    A cell may so end without a pixel: `hidden_cells` names them. UserError above 65,535 cells, ValueError for a
    coordinate that is not finite or a mask of another shape.
    """
    if len(cells) > MAX_CELLS:
        raise UserError(f"{len(cells)} cells in one image, labels hold {MAX_CELLS}; cut the image into tiles")
    patches = [rasterise(cell, shape) for cell in cells]
    areas = np.array([np.count_nonzero(patch.mask) for patch in patches], np.int64)
    labels = np.zeros(shape, np.uint16)
    # Largest first; the reversed stable sort paints the earlier of equals last.
    for number in np.argsort(areas, kind="stable")[::-1].tolist():
        top, left, mask = patches[number]
        window = labels[top : top + mask.shape[0], left : left + mask.shape[1]]
        window[mask.view(bool)] = number + 1
    return labels


def hidden_cells(labels: NDArray[np.uint16], count: int) -> list[int]:
    """Indices (from 0) of those of `count` cells that own no pixel of `labels`: outside the frame or wholly covered."""
    seen = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    return [int(index) for index in np.flatnonzero(seen == 0)]


def rasterise(cell: Cell, shape: tuple[int, int]) -> Patch:
    """The part of `cell` that lies in a frame of `shape` (H, W); its mask may be empty."""
    if isinstance(cell, Patch):
        return cell
    if isinstance(cell, np.ndarray) and cell.shape == shape:
        return Patch(0, 0, (cell != 0).view(np.uint8))
    if isinstance(cell, np.ndarray):
        raise ValueError(f"a cell's mask has shape {cell.shape}, its image {shape}")
    polygons = [p for p in (np.asarray(polygon, np.float64) for polygon in cell) if len(p) >= 3]
    if not polygons:
        return Patch(0, 0, np.zeros((0, 0), np.uint8))
    corners = np.concatenate(polygons)
    if not np.isfinite(corners).all():
        raise ValueError("a polygon has a coordinate that is not finite")
    height, width = shape
    left, top = (int(v) for v in np.clip(np.floor(corners.min(axis=0)) - 1, 0, (width, height)))
    right, bottom = (int(v) for v in np.clip(np.ceil(corners.max(axis=0)) + 1, 0, (width, height)))
    if right <= left or bottom <= top:
        return Patch(0, 0, np.zeros((0, 0), np.uint8))
    # pycocotools' time and memory grow with an edge's length: vertices far outside are pulled to one frame away.
    far = np.array((width, height), np.float64)
    # Its grid is a fifth of a pixel, where LIVECell's hundredths often fall: rounded, float32 gives what JSON does.
    flat = [np.round(np.clip(p, -far, 2 * far) - (left, top), 3).ravel().tolist() for p in polygons]
    encoded = coco_mask.frPyObjects(flat, bottom - top, right - left)
    planes = coco_mask.decode(encoded)  # (h, w, polygons)
    return Patch(top, left, planes[..., 0] if len(polygons) == 1 else planes.any(axis=2).view(np.uint8))


def border_map(labels: np.ndarray, sigma: float) -> NDArray[np.uint8]:
    """The U-Net's border weights without their factor: uint8 (H, W), round(255 exp(-(d1 + d2)^2 / (2 sigma^2))).

    `labels`: integers (H, W), 0 background. d1, d2: Euclidean distances in pixels, between pixel centres, to the two
    nearest cells (0 in a cell). 0 where there are fewer than two cells. Exact to 1/255. Source: Ronneberger et al.
    2015, equation 2.

    Beyond R = sigma sqrt(2 ln 510) the value rounds to 0, so each cell's distance is taken only in its bounding box
    widened by R: 350 cells of 520x704 take 20 to 28 ms where the whole frame's transforms take 3 s.
    """
    height, width = labels.shape
    reach = math.ceil(sigma * math.sqrt(2 * math.log(510)))
    nearest = np.full((height, width), np.inf, np.float32)
    second = nearest.copy()
    dense = labels.astype(np.int32)
    for index, box in enumerate(ndimage.find_objects(dense)):
        if box is None:
            continue
        rows, columns = (slice(max(s.start - reach, 0), s.stop + reach) for s in box)
        outside = (dense[rows, columns] != index + 1).view(np.uint8)
        distance = cv2.distanceTransform(outside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        first, after = nearest[rows, columns], second[rows, columns]
        np.minimum(after, np.maximum(first, distance), out=after)
        np.minimum(first, distance, out=first)
    nearest += second
    border = np.zeros((height, width), np.uint8)
    near = nearest <= reach
    border[near] = np.rint(255 * np.exp(-(nearest[near] ** 2) / np.float32(2 * sigma * sigma)))
    return border
