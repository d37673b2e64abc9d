"""Measurements of cells equal those of scikit-image; coordinates are those of pixel centres."""

import csv

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from skimage.measure import regionprops

from raylivecell.cells import measure


def compare(labels: np.ndarray, image: np.ndarray) -> None:
    measured = measure.measure(labels, image)
    regions = regionprops(labels, image)
    assert measured.label.tolist() == [region.label for region in regions]
    height, width = labels.shape
    for i, region in enumerate(regions):
        top, left, bottom, right = region.bbox
        bbox = (measured.bbox_x[i], measured.bbox_y[i], measured.bbox_width[i], measured.bbox_height[i])
        assert bbox == (left, top, right - left, bottom - top)
        assert measured.area_px[i] == region.area
        assert (measured.centroid_y[i], measured.centroid_x[i]) == pytest.approx(region.centroid)
        # The minor axis of a straight line is 0 except for rounding, and sqrt(1e-16) is 1e-8.
        assert measured.eccentricity[i] == pytest.approx(region.eccentricity, abs=1e-6)
        assert measured.mean_intensity[i] == pytest.approx(region.intensity_mean)
        assert measured.touches_border[i] == (left == 0 or top == 0 or right == width or bottom == height)


@given(
    hnp.arrays(np.int32, st.tuples(st.integers(1, 12), st.integers(1, 12)), elements=st.integers(0, 4)),
    st.integers(0, 9),
)
def test_any_labels(labels: np.ndarray, seed: int) -> None:
    """Scattered and nested cells and missing labels: all that a label image may contain."""
    compare(labels, np.random.default_rng(seed).integers(0, 256, labels.shape, np.uint8))


def test_ellipses_far_from_the_corner() -> None:
    y, x = np.mgrid[:300, :900]
    labels = np.zeros((300, 900), np.int32)
    labels[(x - 100) ** 2 / 40**2 + (y - 150) ** 2 / 20**2 < 1] = 1
    axes = ((x - 700) + (y - 150), (x - 700) - (y - 150))
    labels[axes[0] ** 2 / 150**2 + axes[1] ** 2 / 30**2 < 1] = 2
    labels[120:180, 400:460] = 3
    compare(labels, (x % 256).astype(np.uint8))
    compare(np.asfortranarray(labels), (y % 256).astype(np.uint8))
    eccentricity = measure.measure(labels, x.astype(np.uint8)).eccentricity
    assert eccentricity == pytest.approx([np.sqrt(1 - (20 / 40) ** 2), np.sqrt(1 - (30 / 150) ** 2), 0], abs=0.005)


def test_lines() -> None:
    labels = np.array([[0, 2, 2], [0, 1, 0]])
    image = np.array([[0, 10, 11], [0, 9, 0]], np.uint8)
    text = measure.lines('a, "b".tif', measure.measure(labels, image), np.array([0.25, 0.123456]))
    rows = list(csv.DictReader(text.splitlines(), measure.COLUMNS))
    assert [row["file"] for row in rows] == ['a, "b".tif'] * 2
    assert rows[0] | {"file": ""} == dict(
        zip(measure.COLUMNS, ["", "1", "1", "1.0", "1.0", "1", "1", "1", "1", "0.0", "9.0", "0.25", "1"])
    )
    assert [rows[1][name] for name in ("centroid_x", "eccentricity", "mean_intensity", "score")] == [
        "1.5",
        "1.0",
        "10.5",
        "0.1235",
    ]
    assert measure.lines("a.tif", measure.measure(labels * 0, image), np.zeros(0)) == ""
