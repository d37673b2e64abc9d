"""What is wrong with single cells of one image, and the cells that stay, ready for `drawing.draw_labels`."""

import itertools
from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from raylivecell.annotations.coco import CellRecord
from raylivecell.annotations.drawing import Cell, Patch
from raylivecell.annotations.rle import Rle, decode, encode_patch, encode_polygons, mask_of_runs
from raylivecell.data.defects import DefectRules, rule_of

CellDefects = dict[str, list[tuple[int | str, str]]]
"""Defect -> (annotation id, detail) of each cell that has it."""

MAX_PARTS = 100
"""Of one cell, that are compared with each other."""
TOLERANCE = 1.0
"""Pixels by which an outline may leave the image: LIVECell's touch 704.0 and 520.0, rounding may go past."""


def check_cells(
    records: Sequence[CellRecord],
    shape: tuple[int, int],
    scale: tuple[float, float],
    rules: DefectRules,
    split: str | None = None,
) -> tuple[list[Cell], list[int | str], CellDefects]:
    """The cells that stay, their annotation ids, and what was found.

    Args:
        records: one image's annotations.
        shape: (H, W) of the image file.
        scale: factors on x and y of the outlines: (1, 1) but for an image of another size than its JSON says.
        rules: what to do.
        split: of the image; test keeps doubled contours by default.
    """
    found: CellDefects = {}
    cells: list[Cell] = []
    ids: list[int | str] = []
    for record in records:
        if record.crowd:
            found.setdefault("crowd_region", []).append((record.id, ""))
            if rule_of(rules, "crowd_region") == "drop":
                continue
        cell, defects = _usable(record, shape, scale, rules)
        for defect, detail in defects:
            found.setdefault(defect, []).append((record.id, detail))
        if cell is not None:
            cells.append(cell)
            ids.append(record.id)
    pairs = doubled(cells, shape, rules.doubled_iou)
    if pairs:
        found["doubled_contour"] = [(ids[later], f"again {ids[earlier]}") for later, earlier in pairs]
    if rule_of(rules, "doubled_contour", split) == "keep_first":
        stay = sorted(set(range(len(cells))) - {later for later, _ in pairs})
        cells, ids = [cells[index] for index in stay], [ids[index] for index in stay]
    return cells, ids, found


def _usable(
    record: CellRecord, shape: tuple[int, int], scale: tuple[float, float], rules: DefectRules
) -> tuple[Cell | None, list[tuple[str, str]]]:
    """The drawable part of one record, None where there is none, and its defects."""
    defects: list[tuple[str, str]] = []
    masks: list[NDArray[np.bool_]] = []
    for size, runs in record.runs:
        told = (round(shape[0] / scale[1]), round(shape[1] / scale[0]))  # by the JSON
        mask = mask_of_runs(size, runs) if size == told else None
        if mask is None:
            return None, [("degenerate_polygon", f"an RLE of {size[1]} x {size[0]} does not fill the image")]
        masks.append(mask if told == shape else _resized(mask, shape))
    polygons = [polygon.astype(np.float64) * scale for polygon in record.polygons]
    drawable = [polygon for polygon in polygons if _encloses(polygon)]
    if drawable and not masks and max(float(polygon.max()) for polygon in drawable) <= 1 < min(shape):
        return None, [("degenerate_polygon", "all coordinates are in 0 to 1: fractions of the image's size?")]
    if len(drawable) < len(polygons):
        defects.append(("degenerate_polygon", "under 3 corners, no area or not finite"))
    if any(_within(inner, outer) for inner, outer in itertools.permutations(drawable[:MAX_PARTS], 2)):
        defects.append(("inner_outline", "a part lies in another part of its cell"))
    if not drawable and not any(mask.any() for mask in masks):
        return None, defects or [("degenerate_polygon", "empty")]
    if drawable and _outside(drawable, shape):
        defects.append(("out_of_bounds", ""))
        if rules.out_of_bounds == "drop":
            return None, defects
    if masks:
        masks += [decode(encode_polygons([polygon], shape)).astype(bool) for polygon in drawable]
        return _patch(np.logical_or.reduce(masks)), defects
    return drawable, defects


def _resized(mask: NDArray[np.bool_], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """A mask at another size (H, W), each pixel that of the nearest."""
    return cv2.resize(mask.astype(np.uint8), (shape[1], shape[0]), interpolation=cv2.INTER_NEAREST).astype(bool)


def _patch(mask: NDArray[np.bool_]) -> Patch:
    """A mask (H, W) cut to its bounding box."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return Patch(0, 0, np.zeros((0, 0), np.uint8))
    inside = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return Patch(int(rows[0]), int(columns[0]), inside.astype(np.uint8))


def _encloses(polygon: NDArray[np.float64]) -> bool:
    """Whether a polygon (V, 2) is finite and has corners off one line; one that crosses itself has no signed area."""
    if len(polygon) < 3 or not np.isfinite(polygon).all():
        return False
    x, y = (polygon - polygon[0]).T
    far = int(np.argmax(x * x + y * y))
    return bool((x * y[far] != y * x[far]).any())


def _within(inner: NDArray[np.float64], outer: NDArray[np.float64]) -> bool:
    """Whether every corner of one polygon (V, 2) is inside another."""
    if (inner.min(axis=0) < outer.min(axis=0)).any() or (inner.max(axis=0) > outer.max(axis=0)).any():
        return False
    ring = outer.astype(np.float32)
    return all(cv2.pointPolygonTest(ring, corner, False) > 0 for corner in inner.tolist())


def _area(polygon: NDArray[np.float64]) -> float:
    """Area of a polygon (V, 2) in square pixels; 0 where it has none or is not finite."""
    if len(polygon) < 3 or not np.isfinite(polygon).all():
        return 0.0
    x, y = (polygon - polygon[0]).T
    twice = x[:-1] @ y[1:] - x[1:] @ y[:-1] + x[-1] * y[0] - x[0] * y[-1]
    return float(abs(twice) / 2)


def covered(records: Sequence[CellRecord]) -> float:
    """Pixels that `records` cover, overlaps counted twice: the sum of their areas."""
    polygons = sum(_area(polygon.astype(np.float64)) for record in records for polygon in record.polygons)
    return polygons + float(sum(runs[1::2].clip(0).sum() for record in records for _, runs in record.runs))


def _outside(polygons: list[NDArray[np.float64]], shape: tuple[int, int]) -> bool:
    corners = np.concatenate(polygons)
    limit = np.array((shape[1], shape[0])) + TOLERANCE
    return bool((corners < -TOLERANCE).any() or (corners > limit).any())


def doubled(cells: Sequence[Cell], shape: tuple[int, int], least: float) -> list[tuple[int, int]]:
    """(later, earlier) indices of cells whose masks' intersection over union is at least `least`, each later one once.

    Only pairs whose bounding boxes share half of their union are rasterised.
    """
    boxes = np.array([_box(cell) for cell in cells]).reshape(-1, 4)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    pairs = []
    for later in range(1, len(cells)):
        low = np.maximum(boxes[:later, :2], boxes[later, :2])
        high = np.minimum(boxes[:later, 2:], boxes[later, 2:])
        shared = np.prod(np.clip(high - low, 0, None), axis=1)
        for earlier in np.flatnonzero(shared >= 0.5 * (areas[:later] + areas[later] - shared)).tolist():
            if coco_mask.iou([_rle(cells[later], shape)], [_rle(cells[earlier], shape)], [0])[0, 0] >= least:
                pairs.append((later, earlier))
                break
    return pairs


def _box(cell: Cell) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) in pixels."""
    if isinstance(cell, Patch):
        return cell.left, cell.top, cell.left + cell.mask.shape[1], cell.top + cell.mask.shape[0]
    corners = np.concatenate(cell)
    return (*corners.min(axis=0).tolist(), *corners.max(axis=0).tolist())


def _rle(cell: Cell, shape: tuple[int, int]) -> Rle:
    """Encode a cell as a mask of its image (H, W)."""
    if isinstance(cell, Patch):
        return encode_patch(cell.mask, cell.top, cell.left, shape)
    return encode_polygons(cell, shape)
