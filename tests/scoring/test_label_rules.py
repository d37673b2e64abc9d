"""torch-em's label images: equal to a direct implementation, on drawn cells and on LIVECell's annotations."""

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from raylivecell.annotations.rle import Rle
from raylivecell.scoring.label_rules import MIN_VISIBLE, larger_on_top

SHAPE = (40, 50)
Box = tuple[int, int, int, int]
BOXES = st.lists(st.tuples(st.integers(0, 36), st.integers(0, 46), st.integers(1, 20), st.integers(1, 20)), max_size=12)


def encode(mask: np.ndarray) -> Rle:
    return coco_mask.encode(np.asfortranarray(mask, np.uint8))


def box_mask(box: Box) -> np.ndarray:
    top, left, height, width = box
    mask = np.zeros(SHAPE, bool)
    mask[top : top + height, left : left + width] = True
    return mask


def reference(masks: list[np.ndarray], areas: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Paint complete masks in ascending order of `areas`, then remove the small rest of a cell."""
    labels = np.zeros(shape, int)
    for index in np.argsort(areas, kind="stable"):
        labels[masks[index]] = index + 1
    for label in range(1, len(masks) + 1):
        if (labels == label).sum() < MIN_VISIBLE:
            labels[labels == label] = 0
    return labels


@given(BOXES)
@example([(0, 0, 7, 7)])  # 49 pixels
@example([(0, 0, 5, 10)])  # 50 pixels
@example([(0, 0, 20, 20), (5, 5, 8, 8)])  # hidden under a larger cell
@example([(0, 0, 20, 20), (0, 17, 10, 10)])  # partly hidden
@example([(10, 0, 6, 20), (0, 7, 20, 7)])  # cut into two pieces, which remain one cell
@example([(0, 0, 10, 10), (0, 5, 10, 10)])  # equal areas: the later one is on top
def test_labels_equal_a_direct_implementation(boxes: list[Box]) -> None:
    masks = [box_mask(box) for box in boxes]
    areas = np.array([mask.sum() for mask in masks])
    labels = larger_on_top([encode(mask) for mask in masks], SHAPE)
    assert labels.shape == SHAPE
    np.testing.assert_array_equal(labels, reference(masks, areas, SHAPE))


def test_a_removed_rest_becomes_background() -> None:
    small, large = box_mask((0, 16, 10, 8)), box_mask((0, 0, 20, 20))
    labels = larger_on_top([encode(small), encode(large)], SHAPE)
    assert labels[0, 19] == 2, "the larger cell is on top"
    assert not labels[:, 20:].any(), "40 visible pixels are too few"
    covered = [box_mask((0, 0, 10, 7)), box_mask((0, 5, 8, 9)), box_mask((0, 7, 20, 20))]
    labels = larger_on_top([encode(mask) for mask in covered], SHAPE)
    # 16 pixels of the second cell are visible. They are not given back to the first cell, of which 54 remain.
    np.testing.assert_array_equal(np.unique(labels), [0, 1, 3])
    assert not labels[:8, 5:7].any()
    assert (labels == 1).sum() == 54


def test_run_lengths_of_another_size_are_an_error() -> None:
    with pytest.raises(ValueError, match="cell 1 do not fill"):
        larger_on_top([encode(np.ones((3, 4)))], SHAPE)


@pytest.mark.parametrize("split", ["test", "val"])
def test_livecell_by_its_stated_areas(livecell_mini: Path, split: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(livecell_mini / f"annotations/LIVECell/livecell_coco_{split}.json"))
    for image in coco.dataset["images"]:
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=image["id"]))
        if not annotations:
            continue
        shape = (image["height"], image["width"])
        stated = np.array([annotation["area"] for annotation in annotations])
        expected = reference([coco.annToMask(annotation) != 0 for annotation in annotations], stated, shape)
        labels = larger_on_top([coco.annToRLE(annotation) for annotation in annotations], shape)
        np.testing.assert_array_equal(np.unique(labels), np.unique(expected))
        np.testing.assert_array_equal(labels == 0, expected == 0)
        assert (labels != expected).sum() < 1e-3 * (expected != 0).sum(), image["file_name"]
