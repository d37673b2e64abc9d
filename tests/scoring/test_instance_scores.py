"""Instance scores, compared with a slow reference and in cases with known scores."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from raylivecell.scoring import instance_scores as im


def discs(rng: np.random.Generator, cells: int, size: int = 48) -> np.ndarray:
    """A label image of overlapping discs with non-consecutive labels."""
    labels = np.zeros((size, size), np.int32)
    y, x = np.ogrid[:size, :size]
    for label in range(cells):
        cy, cx, r = *rng.integers(0, size, 2), rng.integers(1, 9)
        labels[(y - cy) ** 2 + (x - cx) ** 2 <= r * r] = 3 * label + 2
    return labels


def moved(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Copy of the labels in which cells are shifted by up to two pixels, some are lost and some split."""
    shifted = np.roll(labels, rng.integers(-2, 3, 2), (0, 1))
    for label in np.unique(shifted)[1:]:
        chance = rng.random()
        if chance < 0.15:
            shifted[shifted == label] = 0
        elif chance < 0.3:
            where = np.argwhere(shifted == label)
            half = where[: len(where) // 2]
            shifted[tuple(half.T)] = 1000 + label
    return shifted


def reference(prediction: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, float]:
    """SA at each threshold and PQ, computed with a full IoU matrix and the Hungarian method."""
    predicted = [prediction == label for label in np.unique(prediction) if label]
    true = [truth == label for label in np.unique(truth) if label]
    if not predicted and not true:
        return np.ones(10), 1.0
    iou = np.array([[(a & b).sum() / (a | b).sum() for b in true] for a in predicted]).reshape(
        len(predicted), len(true)
    )
    accuracies = []
    for threshold in im.THRESHOLDS:
        near = iou >= threshold - 1e-12
        rows, columns = linear_sum_assignment(-near.astype(float))
        tp = int(near[rows, columns].sum())
        accuracies.append(tp / (len(predicted) + len(true) - tp))
    return np.array(accuracies), float(iou[iou > 0.5].sum() / (0.5 * (len(predicted) + len(true))))


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(0, 25))
def test_scores_equal_the_slow_reference(seed: int, cells: int) -> None:
    rng = np.random.default_rng(seed)
    truth = discs(rng, cells)
    for prediction in (moved(truth, rng), discs(rng, cells), np.zeros_like(truth)):
        pairs = im.overlaps(prediction, truth)
        accuracy, pq = reference(prediction, truth)
        np.testing.assert_allclose(im.segmentation_accuracy(pairs), accuracy)
        assert im.panoptic_quality(pairs) == pytest.approx(pq)


@settings(max_examples=30)
@given(st.integers(0, 10**6))
def test_scores_do_not_depend_on_labels_and_are_symmetric(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = discs(rng, 15)
    prediction = moved(truth, rng)
    scores = im.instance_scores(prediction, truth)
    # Names above MAX_COUNTED, negative ones, and an unsigned type that NumPy does not convert to int64 by itself.
    for factor, dtype in ((1, np.int64), (im.MAX_COUNTED, np.int64), (-1, np.int32), (3, np.uint64)):
        renamed = (rng.permutation(5000)[prediction] + 1) * factor
        renamed[prediction == 0] = 0
        assert im.instance_scores(renamed.astype(dtype), truth) == pytest.approx(scores)
    swapped = im.instance_scores(truth, prediction)
    for name in ("msa", "sa50", "sa75", "pq"):
        assert swapped[name] == pytest.approx(scores[name])


def test_cases_with_known_scores() -> None:
    truth = np.zeros((10, 20), int)
    truth[:, 2:6], truth[:, 10:14] = 1, 2
    assert im.instance_scores(truth, truth) == {
        **dict.fromkeys(("msa", "sa50", "sa75", "pq"), 1.0),
        "cells": 2,
        "true_cells": 2,
        "count_error": 0.0,
        "confluence_error": 0.0,
    }
    first_cell = np.where(truth == 1, 7, 0)
    scores = im.instance_scores(first_cell, truth)
    assert (scores["msa"], scores["pq"], scores["count_error"]) == (0.5, pytest.approx(2 / 3), -0.5)
    assert scores["confluence_error"] == pytest.approx(-0.2)
    nothing = np.zeros_like(truth)
    assert im.instance_scores(nothing, nothing)["msa"] == 1.0
    assert im.instance_scores(nothing, truth)["msa"] == 0.0
    assert im.instance_scores(truth, nothing)["count_error"] == 2.0


def test_one_half_of_a_split_cell_matches() -> None:
    """Both halves have an IoU of 0.5: one is a true positive, the other a false positive."""
    truth = np.zeros((4, 8), int)
    truth[1:3, 2:6] = 1
    halves = truth.copy()
    halves[1:3, 4:6] = 2
    assert im.true_positives(im.overlaps(halves, truth), 0.5) == 1
    assert im.segmentation_accuracy(im.overlaps(halves, truth))[0] == 0.5


@settings(max_examples=50)
@given(st.integers(0, 10**6), st.integers(0, 8))
def test_predicted_cells_in_the_ignore_region_change_no_score(seed: int, cells: int) -> None:
    """Scores are those of the prediction without cells that are mostly in the region, over all other pixels."""
    rng = np.random.default_rng(seed)
    truth = discs(rng, cells)
    prediction = moved(truth, rng)
    ignored = (discs(rng, 3) > 0) & (truth == 0)
    mostly = [
        label
        for label in np.unique(prediction)
        if label and 2 * ignored[prediction == label].sum() > (prediction == label).sum()
    ]
    without = np.where(np.isin(prediction, mostly), 0, prediction)
    scores, expected = im.instance_scores(prediction, truth, ignored), im.instance_scores(without, truth)
    fractions = [float((labels != 0)[~ignored].mean()) if not ignored.all() else 0 for labels in (prediction, truth)]
    assert scores == {**expected, "confluence_error": fractions[0] - fractions[1]}
    more = np.where(ignored & (prediction == 0), prediction.max() + 1 + rng.integers(0, 5), prediction)
    assert im.instance_scores(more, truth, ignored) == scores
    assert im.instance_scores(prediction, truth, np.zeros_like(ignored)) == im.instance_scores(prediction, truth)


def test_different_shapes_are_an_error() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        im.overlaps(np.zeros((2, 3), int), np.zeros((3, 2), int))
