"""Instance scores of one label image against another: mean segmentation accuracy, panoptic quality, counts.

A predicted cell is correct at a threshold if its intersection over union with a true cell reaches it; each cell has at
most one partner. With tp, fp and fn the numbers of correct, wrong and missed cells:

    SA(t)  = tp / (tp + fp + fn)                   (as in PASCAL VOC; Cellpose's "average precision")
    mSA    = mean of SA(t) over t = 0.50, 0.55, ..., 0.95
    PQ     = (sum of the partners' IoU) / (tp + fp / 2 + fn / 2) at 0.5      (Kirillov et al. 2019)

An image without cells in truth and prediction is correct: all scores are 1.

In a partly annotated image, a predicted cell with more than half of its pixels in the ignore region is left out
(`without_ignored`). It cannot be a match: the region contains no pixel of a true cell, so its IoU is below 0.5.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

Labels = NDArray[np.integer[Any]]
THRESHOLDS = np.arange(50, 100, 5) / 100
MAX_COUNTED = 2**20
"""Integers up to which a table of counts has at most 8 MiB."""


class Overlaps(NamedTuple):
    """Pairs of cells that share pixels."""

    cells: int
    """Number of predicted cells."""
    true_cells: int
    prediction: NDArray[np.int64]
    """(K,) index of each pair's predicted cell, 0 to cells - 1."""
    truth: NDArray[np.int64]
    """(K,) index of each pair's true cell."""
    iou: NDArray[np.float64]
    """(K,), above 0, up to 1."""


def overlaps(prediction: Labels, truth: Labels) -> Overlaps:
    """Return the overlapping cells of two label images (H, W), 0 background; labels need not be consecutive.

    The table contains only pairs that occur, instead of a matrix: sufficient for 460 thousand cells.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction {prediction.shape} and truth {truth.shape} differ in shape")
    predicted_labels, predicted_area = _counted(prediction[prediction != 0])
    true_labels, true_area = _counted(truth[truth != 0])
    both = (prediction != 0) & (truth != 0)
    predicted, true = np.searchsorted(predicted_labels, prediction[both]), np.searchsorted(true_labels, truth[both])
    codes, shared = _counted(predicted * len(true_labels) + true)
    rows, columns = np.divmod(codes.astype(np.int64), max(len(true_labels), 1))
    iou = shared / (predicted_area[rows] + true_area[columns] - shared)
    return Overlaps(len(predicted_area), len(true_area), rows, columns, iou)


def _counted(values: Labels) -> tuple[Labels, NDArray[np.int64]]:
    """Distinct integers of (K,), ascending, and how often each occurs. Small ones are counted: sorting is slower."""
    if values.size and values.min() >= 0 and values.max() <= MAX_COUNTED:
        counts = np.bincount(values.astype(np.int64, copy=False))
        distinct = np.flatnonzero(counts)
        return distinct, counts[distinct]
    return np.unique(values, return_counts=True)


def without_ignored(prediction: Labels, ignored: NDArray[np.bool_] | None) -> Labels:
    """Return `prediction` (H, W) with 0 for the cells with more than half of their pixels in `ignored`, bool (H, W)."""
    if ignored is None or not ignored.any():
        return prediction
    labels, numbers = np.unique(prediction, return_inverse=True)
    numbers = numbers.reshape(prediction.shape)
    areas, inside = np.bincount(numbers.ravel()), np.bincount(numbers[ignored], minlength=len(labels))
    return np.where((2 * inside > areas)[numbers], 0, prediction)


def true_positives(pairs: Overlaps, threshold: float) -> int:
    """Return the size of the largest one-to-one matching of cells with an IoU of at least `threshold`."""
    near = pairs.iou >= threshold - 1e-12
    if not near.any():
        return 0
    ones = np.ones(int(near.sum()), np.int8)
    graph = csr_array((ones, (pairs.prediction[near], pairs.truth[near])), (pairs.cells, pairs.true_cells))
    return int((maximum_bipartite_matching(graph, perm_type="column") >= 0).sum())


def segmentation_accuracy(pairs: Overlaps) -> NDArray[np.float64]:
    """Return SA at each of THRESHOLDS, float64 (10,)."""
    if pairs.cells + pairs.true_cells == 0:
        return np.ones(len(THRESHOLDS))
    tp = np.array([true_positives(pairs, threshold) for threshold in THRESHOLDS])
    return tp / (pairs.cells + pairs.true_cells - tp)


def panoptic_quality(pairs: Overlaps) -> float:
    """Return PQ at IoU over 0.5, where partners are always unique."""
    if pairs.cells + pairs.true_cells == 0:
        return 1.0
    matched = pairs.iou[pairs.iou > 0.5]
    return float(matched.sum() / (0.5 * (pairs.cells + pairs.true_cells)))


def instance_scores(prediction: Labels, truth: Labels, ignored: NDArray[np.bool_] | None = None) -> dict[str, float]:
    """Scores of one image: `msa`, `sa50`, `sa75`, `pq`, `cells`, `true_cells`, `count_error` and `confluence_error`.

    `count_error` is (predicted - true cells) / true cells (divided by 1 without true cells); `confluence_error` is the
    predicted minus the true fraction of pixels in cells. `ignored`, bool (H, W), without pixels of true cells: the
    ignore region, whose pixels and predicted cells are left out.
    """
    pairs = overlaps(without_ignored(prediction, ignored), truth)
    accuracy = segmentation_accuracy(pairs)
    return {
        "msa": float(accuracy.mean()),
        "sa50": float(accuracy[0]),
        "sa75": float(accuracy[5]),
        "pq": panoptic_quality(pairs),
        "cells": pairs.cells,
        "true_cells": pairs.true_cells,
        "count_error": (pairs.cells - pairs.true_cells) / max(pairs.true_cells, 1),
        "confluence_error": _fraction(prediction != 0, ignored) - _fraction(truth != 0, ignored),
    }


def _fraction(mask: NDArray[np.bool_], ignored: NDArray[np.bool_] | None) -> float:
    """Fraction of the pixels (H, W) outside `ignored` that are in `mask`; 0 if all are ignored."""
    counted = mask if ignored is None else mask[~ignored]
    return float(counted.mean()) if counted.size else 0.0
