"""Scores of several images: every field, in any order of the images."""

import json

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from raylivecell.annotations.rle import Rle
from raylivecell.scoring import scores
from raylivecell.scoring.average_precision import Matches
from raylivecell.scoring.scores import GroundTruth, Prediction

CELL_TYPES = ("A172", "BV2", "MCF7")


def squares(rng: np.random.Generator) -> np.ndarray:
    """Label image of up to nine squares, each shifted by up to three pixels."""
    labels = np.zeros((60, 60), np.int32)
    for label in range(1, 10):
        top, left = 20 * ((label - 1) // 3) + rng.integers(0, 4), 20 * ((label - 1) % 3) + rng.integers(0, 4)
        if rng.random() < 0.9:
            labels[top : top + 12, left : left + 12] = label
    return labels


def rles(labels: np.ndarray) -> list[Rle]:
    return [coco_mask.encode(np.asfortranarray(labels == label, np.uint8)) for label in np.unique(labels)[1:]]


def scored(images: int) -> tuple[list[dict], list[Matches]]:
    rng = np.random.default_rng(0)
    rows, matches = [], []
    for number in range(images):
        labels, truth = squares(rng), squares(rng)
        cells = rles(labels)
        prediction = Prediction(labels > 0, labels, cells, rng.random(len(cells)))
        row, match = scores.of_image(prediction, GroundTruth(truth, rles(truth)))
        rows.append({"file_name": f"{number:03d}.tif", "cell_type": CELL_TYPES[number % 3], **row})
        matches.append(match)
    return rows, matches


def test_summary_has_every_field_and_is_independent_of_the_order() -> None:
    rows, matches = scored(30)
    summary = scores.summarise(rows, matches)
    by_type = summary["per_cell_type"]
    assert by_type.keys() == set(CELL_TYPES)
    assert all(values.keys() == summary.keys() - {"macro", "per_cell_type"} for values in by_type.values())
    assert sum(values["images"] for values in by_type.values()) == summary["images"] == 30
    assert summary["macro"]["msa"] == pytest.approx(np.mean([values["msa"] for values in by_type.values()]))
    for name, (low, high) in summary["intervals"].items():
        assert low < summary[name] < high
    assert json.loads(json.dumps(summary)) == scores.summarise(rows[::-1], matches[::-1])


def test_a_single_image_has_no_interval_and_zero_images_are_an_error() -> None:
    assert set(scores.summarise(*scored(1))["intervals"].values()) == {None}
    with pytest.raises(ValueError, match="no image"):
        scores.summarise([], [])
