"""LIVECell's COCO protocol: average precision and recall of instances, ranked by a score, which may overlap.

LIVECell changes three of COCO's rules (pycocotools' COCOeval, the reference of the tests): one category,
up to 2,000 detections per image, and areas split at 18^2 and 31^2 pixels (Edlund et al. 2021). IoU and area are those
of masks.

    AP     precision interpolated at 101 recalls, mean over IoU 0.50, 0.55, ..., 0.95
    AFNR   average false-negative ratio: mean over the same IoU thresholds of 1 - recall

COCOeval loops over every pair of cells forty times in Python. Here only pairs with an IoU of at least 0.5 are
processed, most of them vectorised: an image of 300 cells takes some milliseconds.

An ignore region is one annotation with iscrowd: a detection without a match is ignored at an IoU threshold if at least
that fraction of its area is in the region.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from raylivecell.annotations.rle import Rle
from raylivecell.scoring import bootstrap

# Computed as in COCOeval, because an IoU or a recall may equal a threshold to the last bit.
THRESHOLDS = np.linspace(0.5, 0.95, 10)
LIMITS = np.minimum(THRESHOLDS, 1 - 1e-10)
RECALLS = np.linspace(0, 1, 101)
MAX_DETECTIONS = 2000
"""Detections per image that count, best first."""
AREAS = ((0.0, 1e10), (0.0, 324.0), (324.0, 961.0), (961.0, 1e10))
"""All, small, medium, large: smallest and largest area in pixels, inclusive."""
AVERAGE, FIRST, SECOND = slice(None), 0, 5  # thresholds of AP, AP50, AP75
PRECISIONS: tuple[tuple[str, int, slice], ...] = (
    ("ap", 0, AVERAGE),
    ("ap50", 0, slice(0, 1)),
    ("ap75", 0, slice(5, 6)),
    ("aps", 1, AVERAGE),
    ("apm", 2, AVERAGE),
    ("apl", 3, AVERAGE),
)
CATEGORY = 1


class Matches(NamedTuple):
    """Detections of an image, best first, matched with the true cells."""

    scores: NDArray[np.float64]
    """(D,)"""
    matched: NDArray[np.bool_]
    """(4, 10, D): whether the detection is matched with a true cell, by area range and IoU threshold."""
    ignored: NDArray[np.bool_]
    """(4, 10, D): whether the detection is ignored: it is outside the area range, or in the ignore region."""
    truths: NDArray[np.int64]
    """(4,): number of true cells in each area range."""


def match(
    prediction: Sequence[Rle], scores: NDArray[np.float64], truth: Sequence[Rle], region: Rle | None = None
) -> Matches:
    """Match the detections and true cells of one image as COCOeval does.

    Best first, each detection is matched with the unmatched true cell of the largest IoU that reaches the threshold;
    cells in the area range have precedence. `region`: the ignore region, which contains no pixel of a true cell.
    """
    order = np.argsort(-scores, kind="stable")[:MAX_DETECTIONS]
    detections = [prediction[i] for i in order.tolist()]
    true_area = _areas(truth)
    outside = np.array([(true_area < low) | (true_area > high) for low, high in AREAS])
    matched = np.zeros((len(AREAS), len(THRESHOLDS), len(detections)), bool)
    ignored = np.zeros_like(matched)
    if detections and truth:
        iou = coco_mask.iou(detections, list(truth), [0] * len(truth))
        _pair(iou, outside, matched, ignored)
    area = _areas(detections)
    unmatched_outside = np.array([(area < low) | (area > high) for low, high in AREAS])
    ignored |= ~matched & unmatched_outside[:, None]
    if region is not None and detections:
        inside = coco_mask.iou(detections, [region], [1])[:, 0]  # with iscrowd: over the area of the detection
        ignored |= ~matched & (inside >= LIMITS[:, None])
    return Matches(scores[order].astype(np.float64), matched, ignored, (~outside).sum(1))


def _areas(rles: Sequence[Rle]) -> NDArray[np.float64]:
    # One call per mask: with more than 255 masks in one call, pycocotools 2.0.11 raises OverflowError under numpy 2.
    return np.array([coco_mask.area(rle) for rle in rles], np.float64)


def _pair(
    iou: NDArray[np.float64], outside: NDArray[np.bool_], matched: NDArray[np.bool_], ignored: NDArray[np.bool_]
) -> None:
    """Fill `matched` and `ignored` (4, 10, D) from `iou` (D, G) and whether true cells are outside the area (4, G)."""
    rows, columns = np.nonzero(iou >= LIMITS[0])
    if not len(rows):
        return
    alone = (np.bincount(rows)[rows] == 1) & (np.bincount(columns)[columns] == 1)
    detections, truths = rows[alone], columns[alone]
    # Vectorised: pairs of cells without other candidates.
    hit = iou[detections, truths] >= LIMITS[:, None]
    matched[:, :, detections] = hit
    ignored[:, :, detections] = hit & outside[:, truths][:, None]
    if alone.all():
        return
    contested = _by_detection(rows[~alone], columns[~alone], iou)
    for area in range(len(outside)):
        for level, limit in enumerate(LIMITS.tolist()):
            used: set[int] = set()
            for detection, candidates in contested:
                best = _best(candidates, limit, used, outside[area])
                if best is not None:
                    used.add(best)
                    matched[area, level, detection] = True
                    ignored[area, level, detection] = outside[area, best]


def _by_detection(
    rows: NDArray[np.intp], columns: NDArray[np.intp], iou: NDArray[np.float64]
) -> list[tuple[int, list[tuple[int, float]]]]:
    """Return (detection, its candidates as (true cell, IoU) in order of true cell), best detection first."""
    groups: dict[int, list[tuple[int, float]]] = {}
    for row, column in zip(rows.tolist(), columns.tolist()):
        groups.setdefault(row, []).append((column, float(iou[row, column])))
    return sorted(groups.items())


def _best(
    candidates: Iterable[tuple[int, float]], limit: float, used: set[int], outside: NDArray[np.bool_]
) -> int | None:
    """Return the unused candidate of the largest IoU (ties: the last); those in the area range have precedence."""
    best: int | None = None
    for is_outside in (False, True):
        largest = limit
        for truth, value in candidates:
            if truth not in used and bool(outside[truth]) == is_outside and value >= largest:
                best, largest = truth, value
        if best is not None:
            return best
    return None


def average_precision(matches: Sequence[Matches]) -> dict[str, float | None]:
    """`ap`, `ap50`, `ap75`, `aps`, `apm`, `apl`, `ar100`, `ar500`, `ar2000` and `afnr`, 0 to 1.

    `aps`, `apm`, `apl`: small, medium and large cells, by AREAS. `ar100`, `ar500`, `ar2000`: the best 100, 500 and
    2,000 detections of each image. None without such a true cell.
    """
    table = _Table(matches)
    weights = np.ones(len(matches))
    values: dict[str, float | None] = {}
    for name, area, levels in PRECISIONS:
        values[name] = _mean(table.precision(area, weights, levels))
    for limit in (100, 500, MAX_DETECTIONS):
        values[f"ar{limit}"] = _mean(table.recall(limit, weights))
    values["afnr"] = None if values["ar2000"] is None else 1 - values["ar2000"]
    return values


def interval(matches: Sequence[Matches], seed: int = 0, resamples: int = 200) -> dict[str, list[float] | None]:
    """95 % bootstrap intervals over images of `ap`, `ap50`, `ap75` and `afnr`; None for one image or no true cell.

    200 resamples determine a bound to about a fifth of the interval's width, in ten seconds for 1,564 images of 300
    cells.
    """
    names = ("ap", "ap50", "ap75", "afnr")
    if not any(image.truths[0] for image in matches):
        return dict.fromkeys(names)
    table = _Table(matches)

    def statistics(indices: NDArray[np.int64]) -> NDArray[np.float64]:
        weights = np.bincount(indices, minlength=len(matches)).astype(np.float64)
        precision, recall = table.precision(0, weights), _mean(table.recall(MAX_DETECTIONS, weights))
        if precision is None or recall is None:  # no true cell in the resampled images
            return np.full(len(names), np.nan)
        return np.array([precision.mean(), precision[FIRST].mean(), precision[SECOND].mean(), 1 - recall])

    indices = np.arange(len(matches))
    bounds = bootstrap.interval(statistics, indices, seed=seed, resamples=resamples, vectorized=False)
    return dict.fromkeys(names) if bounds is None else dict(zip(names, bounds.tolist()))


def _mean(values: NDArray[np.float64] | None) -> float | None:
    return None if values is None else float(values.mean())


class _Table:
    """Detections of many images, best first; weights per image represent bootstrap resamples."""

    def __init__(self, matches: Sequence[Matches]) -> None:
        scores = np.concatenate([match.scores for match in matches])
        order = np.argsort(-scores, kind="stable")
        self.image = np.repeat(np.arange(len(matches)), [len(match.scores) for match in matches])[order]
        self.detection_rank = np.concatenate([np.arange(len(match.scores)) for match in matches])[order]
        self.counted = ~np.concatenate([match.ignored for match in matches], axis=2)[..., order]
        right = np.concatenate([match.matched for match in matches], axis=2)[..., order] & self.counted
        self.true_positives = [[np.flatnonzero(level) for level in area] for area in right]
        self.truths = np.stack([match.truths for match in matches])

    def precision(self, area: int, weights: NDArray[np.float64], levels: slice = AVERAGE) -> NDArray[np.float64] | None:
        """Precision at RECALLS for each IoU threshold of `levels`, (T, 101); None without a true cell."""
        truths = float(self.truths[:, area] @ weights)
        if not truths:
            return None
        weight = weights[self.image]
        table = np.zeros((len(THRESHOLDS[levels]), len(RECALLS)))
        for row, right, counted in zip(table, self.true_positives[area][levels], self.counted[area, levels]):
            # Precision is needed only at true positives: other detections count only in the denominator.
            true_positives = np.cumsum(weight[right])
            precision = true_positives / (np.cumsum(weight * counted)[right] + np.spacing(1))
            # The best precision at this recall or a higher one.
            precision = np.maximum.accumulate(precision[::-1])[::-1]
            positions = np.searchsorted(true_positives / truths, RECALLS, side="left")
            within = positions < len(true_positives)
            row[within] = precision[positions[within]]
        return table

    def recall(self, limit: int, weights: NDArray[np.float64]) -> NDArray[np.float64] | None:
        """Fraction of all true cells found by the best `limit` detections of each image, by threshold, (10,)."""
        truths = float(self.truths[:, 0] @ weights)
        if not truths:
            return None
        counted = np.where(self.detection_rank < limit, weights[self.image], 0.0)
        return np.array([counted[right].sum() for right in self.true_positives[0]]) / truths


def results(image_id: int | str, rles: Sequence[Rle], scores: NDArray[np.float64]) -> list[dict[str, Any]]:
    """Return the records of a COCO results file for one image."""
    areas = _areas(rles).astype(int).tolist()
    boxes = coco_mask.toBbox(list(rles)).tolist() if rles else []
    return [
        {
            "image_id": image_id,
            "category_id": CATEGORY,
            "segmentation": {"size": list(rle["size"]), "counts": rle["counts"].decode()},
            "score": round(score, 6),
            "bbox": box,
            "area": area,
        }
        for rle, score, box, area in zip(rles, scores.tolist(), boxes, areas)
    ]
