"""Label images compared with pycocotools, border maps compared with their definition."""

import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from scipy import ndimage

from raylivecell.annotations.drawing import border_map, draw_labels, hidden_cells
from raylivecell.core.errors import UserError

SQUARE = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float32)


def square(left: float, top: float, side: float) -> list[np.ndarray]:
    return [SQUARE * side + (left, top)]


def blobs(rng: np.random.Generator, shape: tuple[int, int], count: int) -> np.ndarray:
    y, x = np.mgrid[: shape[0], : shape[1]]
    labels = np.zeros(shape, np.uint16)
    for k in range(1, count + 1):
        cy, cx, r = rng.uniform(0, shape[0]), rng.uniform(0, shape[1]), rng.uniform(1, 9)
        labels[(y - cy) ** 2 + (x - cx) ** 2 <= r * r] = k
    return labels


def border_by_definition(labels: np.ndarray, sigma: float) -> np.ndarray:
    distances = [ndimage.distance_transform_edt(labels != k) for k in np.unique(labels) if k]
    if len(distances) < 2:
        return np.zeros(labels.shape, np.uint8)
    d1, d2 = np.sort(np.stack(distances), axis=0)[:2]
    return np.rint(255 * np.exp(-((d1 + d2) ** 2) / (2 * sigma**2))).astype(np.uint8)


def test_cells_are_drawn_as_by_pycocotools(livecell_mini: Path) -> None:
    text = (livecell_mini / "annotations/LIVECell/livecell_coco_val.json").read_text()
    annotations = json.loads(text)["annotations"]
    annotations = list(annotations.values()) if isinstance(annotations, dict) else annotations
    assert len(annotations) > 100
    for annotation in annotations:
        polygons = annotation["segmentation"]
        expected = coco_mask.decode(coco_mask.frPyObjects(polygons, 520, 704)).any(axis=2)
        mask = draw_labels([[np.array(p, np.float32).reshape(-1, 2) for p in polygons]], (520, 704)) > 0
        np.testing.assert_array_equal(mask, expected)


def test_square_on_the_pixel_grid_is_exact() -> None:
    labels = draw_labels([square(2, 3, 4)], (12, 10))
    expected = np.zeros((12, 10), np.uint16)
    expected[3:7, 2:6] = 1
    np.testing.assert_array_equal(labels, expected)


def test_overlap_belongs_to_the_smaller_cell_then_to_the_earlier() -> None:
    big, small = square(0, 0, 10), square(4, 4, 3)
    for cells, small_id in (([big, small], 2), ([small, big], 1)):
        labels = draw_labels(cells, (16, 16))
        assert (labels == small_id).sum() == 9
        assert (labels == 3 - small_id).sum() == 91
    assert draw_labels([small, small], (16, 16)).max() == 1
    assert hidden_cells(draw_labels([small, small], (16, 16)), 2) == [1]


def test_polygons_of_a_cell_are_united_and_masks_are_drawn() -> None:
    mask = np.zeros((16, 20), bool)
    mask[12:, 15:] = True
    labels = draw_labels([square(0, 0, 4) + square(2, 2, 4), mask, mask.astype(np.uint8) * 255], (16, 20))
    assert (labels == 1).sum() == 16 + 16 - 4
    np.testing.assert_array_equal(labels == 2, mask)
    with pytest.raises(ValueError, match="shape"):
        draw_labels([mask.T], (16, 20))


def test_parts_outside_are_clipped_and_degenerate_cells_are_hidden() -> None:
    cells = [square(-5, -5, 8), square(30, 30, 5), [np.zeros((2, 2))], [], square(-1e9, -1e9, 4e9), square(8, 8, 0)]
    labels = draw_labels(cells, (16, 20))
    assert (labels == 1).sum() == 9
    assert (labels == 5).sum() == 16 * 20 - 9
    assert hidden_cells(labels, len(cells)) == [1, 2, 3, 5]
    with pytest.raises(ValueError, match="finite"):
        draw_labels([[SQUARE * np.nan]], (16, 20))


def test_label_overflow_is_refused() -> None:
    with pytest.raises(UserError, match="65535"):
        draw_labels([[]] * 65_536, (4, 4))
    assert draw_labels([[]] * 65_534 + [square(0, 0, 2)], (4, 4)).max() == 65_535


@pytest.mark.parametrize("sigma", [1.0, 5.0, 12.5])
def test_border_map_equals_its_definition(sigma: float) -> None:
    for seed in range(8):
        rng = np.random.default_rng(seed)
        labels = blobs(rng, (int(rng.integers(5, 90)), int(rng.integers(5, 90))), seed * 5)
        difference = border_map(labels, sigma).astype(int) - border_by_definition(labels, sigma)
        assert np.abs(difference).max() <= 1


def test_border_map_needs_two_cells_and_accepts_sparse_labels() -> None:
    labels = np.zeros((30, 40), np.uint16)
    assert not border_map(labels, 5).any()
    labels[5, 5] = 40_000
    assert not border_map(labels, 5).any()
    labels[5, 6] = 60_000
    labels.setflags(write=False)
    np.testing.assert_array_equal(border_map(labels, 5), border_by_definition(labels, 5))
