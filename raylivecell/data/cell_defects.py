"""Defects of single cells of one image, and the remaining cells, ready for `drawing.draw_labels`."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from raylivecell.annotations.coco import CellRecord
from raylivecell.annotations.drawing import Cell, Patch
from raylivecell.annotations.rle import Rle, decode, encode_patch, encode_polygons, window_of_runs
from raylivecell.data.config import Rules, rule_of
from raylivecell.images.scale import resize_mask

CellDefects = dict[str, list[tuple[int | str, str]]]
"""Kind of defect -> (annotation id, detail) of each affected cell."""

MAX_PARTS = 100
"""Maximum parts of one cell that are compared with each other."""
TOLERANCE = 1.0
"""Pixels by which an outline may leave the image: LIVECell's reach 704.0 and 520.0, rounding may exceed that."""
DOUBLED_IOU = 0.8
"""Minimum intersection over union of two outlines of one cell drawn twice."""


class CheckedCells(NamedTuple):
    """Result of `check_cells`."""

    cells: list[Cell]
    """Remaining cells."""
    ids: list[int | str]
    """Their annotation ids."""
    regions: list[Cell]
    """Ignore regions."""
    defects: CellDefects


def covered(records: Sequence[CellRecord]) -> float:
    """Return the number of pixels that `records` cover: the sum of their areas, overlaps counted twice."""
    polygon_area = sum(_area(polygon.astype(np.float64)) for record in records for polygon in record.polygons)
    return polygon_area + float(sum(runs[1::2].clip(0).sum() for record in records for _, runs in record.runs))


def areas(records: Sequence[CellRecord]) -> list[float]:
    """Return the area of each cell in square pixels of its annotation, without crowd and ignore regions."""
    cells = [record for record in records if not record.crowd and not record.region]
    return [area for record in cells if (area := covered([record])) > 0]


def is_region(record: CellRecord, rules: Rules) -> bool:
    """Whether a record is an ignore region: selected by `prepare --ignore`, or a crowd by its rule."""
    return bool(record.region) or (record.crowd and rule_of(rules, "crowd_region") == "ignore")


def _area(polygon: NDArray[np.float64]) -> float:
    """Return the area of a polygon (V, 2) in square pixels; 0 if it is degenerate or not finite."""
    if len(polygon) < 3 or not np.isfinite(polygon).all():
        return 0.0
    x, y = (polygon - polygon[0]).T
    doubled_area = x[:-1] @ y[1:] - x[1:] @ y[:-1] + x[-1] * y[0] - x[0] * y[-1]
    return float(abs(doubled_area) / 2)


def check_cells(
    records: Sequence[CellRecord],
    shape: tuple[int, int],
    scale: tuple[float, float],
    rules: Rules,
    split: str | None = None,
) -> CheckedCells:
    """Find the defects of an image's cells and drop those that the rules exclude; separate the ignore regions.

    Args:
        records: the image's annotations.
        shape: (H, W) of the prepared image.
        scale: factors on x and y of the outlines; (1, 1) unless the image is scaled or its size differs from the
            JSON's.
        rules: rule by kind of defect.
        split: split of the image; test keeps doubled contours by default.
    """
    defects: CellDefects = {}
    cells: list[Cell] = []
    ids: list[int | str] = []
    regions: list[Cell] = []
    for record in records:
        if record.crowd and not record.region:
            defects.setdefault("crowd_region", []).append((record.id, ""))
            if rule_of(rules, "crowd_region") == "drop":
                continue
        cell, cell_defects = _check_cell(record, shape, scale, rules)
        for kind, detail in cell_defects:
            defects.setdefault(kind, []).append((record.id, detail))
        if cell is not None and is_region(record, rules):
            regions.append(cell)
        elif cell is not None:
            cells.append(cell)
            ids.append(record.id)
    pairs = doubled_pairs(cells, shape)
    if pairs:
        defects["doubled_contour"] = [(ids[later], f"again {ids[earlier]}") for later, earlier in pairs]
    if rule_of(rules, "doubled_contour", split) == "keep_first":
        remaining = sorted(set(range(len(cells))) - {later for later, _ in pairs})
        cells, ids = [cells[index] for index in remaining], [ids[index] for index in remaining]
    return CheckedCells(cells, ids, regions, defects)


def _check_cell(
    record: CellRecord, shape: tuple[int, int], scale: tuple[float, float], rules: Rules
) -> tuple[Cell | None, list[tuple[str, str]]]:
    """Return the drawable part of one record, or None, and its defects as (kind, detail)."""
    defects: list[tuple[str, str]] = []
    patches: list[Patch] = []
    for size, runs in record.runs:
        listed_shape = (round(shape[0] / scale[1]), round(shape[1] / scale[0]))  # in the JSON
        # Only the columns of the cell: 3,000 full-size masks need seconds.
        window = window_of_runs(size, runs) if size == listed_shape else None
        if window is None:
            return None, [("degenerate_polygon", f"an RLE of {size[1]} x {size[0]} does not fill the image")]
        if window[1].any():
            patches.append(_resize(*window, size, shape))
    polygons = [polygon.astype(np.float64) * scale for polygon in record.polygons]
    drawable = [polygon for polygon in polygons if _encloses_area(polygon)]
    if drawable and not patches and max(float((polygon / scale).max()) for polygon in drawable) <= 1 < min(shape):
        return None, [("degenerate_polygon", "all coordinates are in 0 to 1: fractions of the image's size?")]
    if len(drawable) < len(polygons):
        defects.append(("degenerate_polygon", "under 3 corners, no area or not finite"))
    if any(_is_inside(inner, outer) for inner, outer in itertools.permutations(drawable[:MAX_PARTS], 2)):
        defects.append(("inner_outline", "a part is inside another part of its cell"))
    if not drawable and not patches:
        return None, defects or [("degenerate_polygon", "empty")]
    if drawable and _leaves_image(drawable, shape):
        defects.append(("out_of_bounds", ""))
        if rule_of(rules, "out_of_bounds") == "drop":
            return None, defects
    if not patches:
        return drawable, defects
    if len(patches) == 1 and not drawable:
        return patches[0], defects
    union = decode(encode_polygons(drawable, shape)).astype(bool) if drawable else np.zeros(shape, np.bool_)
    for top, left, mask in patches:
        union[top : top + mask.shape[0], left : left + mask.shape[1]] |= mask.astype(bool)
    return _crop_to_patch(union), defects


def _resize(left: int, mask: NDArray[np.bool_], size: tuple[int, int], shape: tuple[int, int]) -> Patch:
    """Resize a mask (H, w), the columns from `left` of an image `size` (H, W), to the image `shape`; may be empty."""
    cropped = _crop_to_patch(mask)
    top, left, resized = resize_mask(cropped.mask.astype(bool), cropped.top, cropped.left + left, size, shape)
    patch = _crop_to_patch(resized)
    return patch._replace(top=patch.top + top, left=patch.left + left)


def _encloses_area(polygon: NDArray[np.float64]) -> bool:
    """Whether a polygon (V, 2) is finite and not on one line; its signed area may be 0 if it crosses itself."""
    if len(polygon) < 3 or not np.isfinite(polygon).all():
        return False
    x, y = (polygon - polygon[0]).T
    farthest = int(np.argmax(x * x + y * y))
    return bool((x * y[farthest] != y * x[farthest]).any())


def _is_inside(inner: NDArray[np.float64], outer: NDArray[np.float64]) -> bool:
    """Whether every corner of one polygon (V, 2) is inside another."""
    if (inner.min(axis=0) < outer.min(axis=0)).any() or (inner.max(axis=0) > outer.max(axis=0)).any():
        return False
    ring = outer.astype(np.float32)
    return all(cv2.pointPolygonTest(ring, corner, False) > 0 for corner in inner.tolist())


def _leaves_image(polygons: list[NDArray[np.float64]], shape: tuple[int, int]) -> bool:
    corners = np.concatenate(polygons)
    limit = np.array((shape[1], shape[0])) + TOLERANCE
    return bool((corners < -TOLERANCE).any() or (corners > limit).any())


def _rle(cell: Cell, shape: tuple[int, int]) -> Rle:
    """Encode a cell as a mask of its image (H, W)."""
    if isinstance(cell, Patch):
        return encode_patch(cell.mask, cell.top, cell.left, shape)
    return encode_polygons(cell, shape)


def _crop_to_patch(mask: NDArray[np.bool_]) -> Patch:
    """Crop a mask (H, W) to its bounding box."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return Patch(0, 0, np.zeros((0, 0), np.uint8))
    inside = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return Patch(int(rows[0]), int(columns[0]), inside.astype(np.uint8))


def doubled_pairs(cells: Sequence[Cell], shape: tuple[int, int]) -> list[tuple[int, int]]:
    """Return (later, earlier) indices of cells drawn twice; each later cell occurs once.

    Only pairs whose bounding boxes share half of their union are rasterised.
    """
    boxes = np.array([_box(cell) for cell in cells]).reshape(-1, 4)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    pairs = []
    for later in range(1, len(cells)):
        low = np.maximum(boxes[:later, :2], boxes[later, :2])
        high = np.minimum(boxes[:later, 2:], boxes[later, 2:])
        shared = np.prod(np.clip(high - low, 0, None), axis=1)
        # Masks smaller than a pixel have no area, and share none.
        near = (shared > 0) & (shared >= 0.5 * (areas[:later] + areas[later] - shared))
        for earlier in np.flatnonzero(near).tolist():
            if coco_mask.iou([_rle(cells[later], shape)], [_rle(cells[earlier], shape)], [0])[0, 0] >= DOUBLED_IOU:
                pairs.append((later, earlier))
                break
    return pairs


def _box(cell: Cell) -> tuple[float, float, float, float]:
    """Return (left, top, right, bottom) in pixels."""
    if isinstance(cell, Patch):
        return cell.left, cell.top, cell.left + cell.mask.shape[1], cell.top + cell.mask.shape[0]
    corners = np.concatenate(cell)
    return (*corners.min(axis=0).tolist(), *corners.max(axis=0).tolist())
