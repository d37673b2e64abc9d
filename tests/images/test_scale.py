"""Cell size: scaled images, and results in the pixels of the original image."""

import math
from collections import Counter
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raylivecell.annotations.coco import CellRecord
from raylivecell.cells.measure import measure
from raylivecell.core.errors import UserError
from raylivecell.data import draw, plan
from raylivecell.data.defects import Defect
from raylivecell.images import scale
from raylivecell.images.scale import Scale, labels_back, resize_image, resize_mask, resize_to, scaled_shape
from raylivecell.inference import segmenter
from raylivecell.network import windows
from raylivecell.network.windows import Maps

FACTORS = st.floats(0.4, 2.5)
SHAPES = st.tuples(st.integers(1, 90), st.integers(1, 90))


def disc(shape: tuple[int, int], x: float, y: float, diameter: float) -> np.ndarray:
    """Fraction of each pixel inside a disc, float32 (H, W); the centre of the top left pixel is x = y = 0."""
    fine = (np.arange(8) + 0.5) / 8 - 0.5
    rows, columns = (np.add.outer(np.arange(side), fine).ravel() for side in shape)
    inside = (rows[:, None] - y) ** 2 + (columns - x) ** 2 <= diameter**2 / 4
    return inside.reshape(shape[0], 8, shape[1], 8).mean((1, 3)).astype(np.float32)


def noisy(image: np.ndarray) -> np.ndarray:
    """Add noise, uint8: a constant background would be padding."""
    rng = np.random.default_rng(0)
    return np.clip(image + rng.normal(0, 1.5, image.shape), 1, 254).round().astype(np.uint8)


def network(image: np.ndarray) -> Maps:
    """Foreground probability that is 0.5 at grey level 170."""
    return np.clip(0.5 + (image[None].astype(np.float32) - 170) / 80, 0, 1)


def segmenter_of(rule: Scale, **config: Any) -> segmenter.Segmenter:
    thresholds = segmenter.InstanceConfig(**{"min_area": 4, "prominence": 0.03, **config})
    return segmenter.Segmenter(network, "foreground", thresholds, "", None, rule)


@given(FACTORS, st.floats(20, 50), st.floats(34, 50), st.floats(34, 40))
@settings(max_examples=60, deadline=None)
def test_a_segmented_disc_keeps_its_place_and_area(factor: float, diameter: float, x: float, y: float) -> None:
    image = noisy(130 + 80 * disc((75, 88), x, y, diameter))
    cells = segmenter_of(Scale(pixel_scale=factor)).segment(image)
    assert (cells.labels.shape, cells.foreground.shape, cells.labels.max()) == (image.shape, image.shape, 1)
    measured = measure(cells.labels, image)
    # Two grids that nearly coincide: at most 0.40 pixels in 32,000 discs. A wrong grid is shifted by half a pixel on
    # both axes, 0.7; the next test finds smaller shifts.
    assert math.hypot(measured.centroid_x[0] - x, measured.centroid_y[0] - y) < 0.5 / min(factor, 1)
    # Few percent; a quarter of a pixel of the network all around in addition, for discs of 8 of its pixels.
    tolerance = 0.02 * math.pi * diameter**2 / 4 + math.pi * diameter / 4 / min(factor, 1)
    assert measured.area_px[0] == pytest.approx(math.pi * diameter**2 / 4, abs=tolerance)
    assert cells.foreground.sum() == pytest.approx(measured.area_px[0], rel=0.02)


@pytest.mark.parametrize("factor", [0.5, 0.7, 1.1, 2.0])
def test_segmented_discs_are_not_shifted_on_average(factor: float) -> None:
    model, rng, shifts = segmenter_of(Scale(pixel_scale=factor)), np.random.default_rng(0), []
    for _ in range(60):
        diameter, x, y = rng.uniform((20, 34, 34), (50, 50, 40))
        image = noisy(130 + 80 * disc((75, 88), x, y, diameter))
        measured = measure(model.segment(image).labels, image)
        shifts.append((measured.centroid_x[0] - x, measured.centroid_y[0] - y))
    np.testing.assert_allclose(np.mean(shifts, axis=0), 0, atol=0.07)  # measured: at most 0.02


@given(FACTORS, st.floats(14, 50), st.floats(34, 50), st.floats(34, 40), st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_prepared_outline_keeps_its_place_and_area(
    factor: float, diameter: float, x: float, y: float, as_runs: bool
) -> None:
    """The outline and the image agree, and both are `factor` times as large."""
    shape = (75, 88)
    image = (100 * disc(shape, x, y, diameter)).round().astype(np.uint8)
    angle = np.linspace(0, 2 * np.pi, 200, endpoint=False)
    outline = diameter / 2 * np.stack([np.cos(angle), np.sin(angle)], 1) + (x + 0.5, y + 0.5)  # corners of pixels
    record = CellRecord(1, False, [outline.astype(np.float32)], [])
    if as_runs:
        mask = (image >= 50).T.ravel()
        edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))
        runs = np.diff(np.concatenate([[0], edges, [mask.size]]))
        record = CellRecord(1, False, [], [(shape, runs)])
    height, width = scaled_shape(shape, factor)
    by_axis = (width / shape[1], height / shape[0])
    entry = plan.ImagePlan("a.png", "a.png", "train", "a.json", 1, "x", "", by_axis, height * width, factor)
    defects: list[Defect] = []
    row = draw.draw_sample(resize_image(image, factor), entry, [record], {}, 5.0, defects)
    assert row is not None
    assert not defects
    measured = measure(row["labels"], row["image"])
    expected_x, expected_y = ((v + 0.5) * by - 0.5 for v, by in zip((x, y), by_axis))
    assert math.hypot(measured.centroid_x[0] - expected_x, measured.centroid_y[0] - expected_y) < 0.5
    area = math.pi * diameter**2 / 4 * by_axis[0] * by_axis[1]
    assert measured.area_px[0] == pytest.approx(area, abs=0.02 * area + 0.25 * math.pi * diameter * factor)
    agreement = (row["image"] >= 50) == (row["labels"] > 0)
    assert (~agreement).sum() < 0.12 * math.pi * diameter * factor * 4, "within a pixel of the outline"


@given(SHAPES, SHAPES, st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_labels_are_those_of_the_nearest_pixels(shape: tuple[int, int], target: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = cv2.resize(rng.integers(0, 4, (4, 5)).astype(np.uint8), shape[::-1], interpolation=cv2.INTER_NEAREST)
    back = labels_back(labels.astype(np.int32), target)
    assert (back.shape, back.dtype) == (target, np.int32)
    assert set(np.unique(back)) <= set(np.unique(labels))
    y, x = ((np.arange(new) + 0.5) * (old / new) for new, old in zip(target, shape))
    low, high = (
        labels[np.clip(np.floor(y - 0.5 + k), 0, shape[0] - 1).astype(int)][
            :, np.clip(np.floor(x - 0.5 + k), 0, shape[1] - 1).astype(int)
        ]
        for k in (0, 1)
    )
    np.testing.assert_array_equal(labels_back(labels, shape), labels)
    uniform = cv2.erode((low == high).astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    assert set(np.unique(back[uniform])) <= {*np.unique(low), *np.unique(high)}
    foreground = labels_back(labels > 0, target)
    np.testing.assert_array_equal(foreground, back > 0)


@pytest.mark.parametrize("factor", [0.4, 0.7, 1.6, 2.5])
def test_outlines_are_smoother_than_nearest_neighbours_and_touching_cells_stay_in_contact(factor: float) -> None:
    shape = (120, 160)
    y, x = np.mgrid[:120, :160]
    truth = np.where((y - 60) ** 2 + (x - 80) ** 2 < 50**2, 1 + (3 * x + y > 300) + 2 * (y > x), 0).astype(np.int32)
    fy, fx = (new / old for new, old in zip(scaled_shape(shape, factor), shape))
    small = scaled_shape(shape, factor)
    index = [np.floor((np.arange(n) + 0.5) / f).astype(int) for n, f in zip(small, (fy, fx))]
    stored = truth[index[0]][:, index[1]]
    back = labels_back(stored, shape)
    nearest = stored[np.floor((np.arange(120) + 0.5) * fy).astype(int)][
        :, np.floor((np.arange(160) + 0.5) * fx).astype(int)
    ]
    assert (back != truth).sum() <= (nearest != truth).sum()
    inside = cv2.erode((truth > 0).astype(np.uint8), np.ones((7, 7), np.uint8)) > 0
    assert (back[inside] > 0).all(), "no gap between touching cells"
    assert len(np.unique(back)) == len(np.unique(truth))


@pytest.mark.parametrize("factor", [0.5, 1.5])
def test_large_images_are_scaled_too(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows and strips: the result is that of one pass."""
    rng = np.random.default_rng(0)
    image = np.full((400, 500), 130, np.float32)
    for y in range(30, 400, 60):
        for x in range(30, 500, 60):
            cv2.circle(image, (x + int(rng.integers(8)), y), int(rng.integers(8, 16)), 210, -1)
    stored = noisy(image)
    model = segmenter_of(Scale(pixel_scale=factor))
    complete = model.segment(stored)
    monkeypatch.setattr(windows, "WHOLE_PIXELS", 20_000)
    in_windows = model.segment(stored)
    assert in_windows.labels.shape == complete.labels.shape == stored.shape
    assert in_windows.labels.max() == complete.labels.max() == len(complete.scores) == 7 * 8
    np.testing.assert_array_equal(in_windows.foreground, complete.foreground)
    np.testing.assert_array_equal(in_windows.labels > 0, complete.labels > 0)


def test_padding_has_no_cell_in_a_scaled_image() -> None:
    image = noisy(130 + 80 * disc((75, 88), 40, 37, 30))
    stored = np.pad(image, ((0, 50), (0, 60)))
    for factor in (0.5, 2.0):
        model = segmenter_of(Scale(pixel_scale=factor))
        frame = model.frame(stored)
        assert frame.padding is not None
        cells = model.segment(stored)
        assert cells.labels.shape == stored.shape
        assert cells.labels.max() == len(cells.scores) == 1
        assert not cells.labels[frame.padding].any()
        assert not cells.foreground[frame.padding].any()
        alone = model.segment(image).labels
        assert (cells.labels[:75, :88] != alone).mean() < 0.01


def test_cells_smaller_than_a_pixel_are_removed_with_their_scores() -> None:
    image = np.full((40, 40), 130, np.uint8)
    image[20, 20], image[4:12, 4:12] = 210, 210
    image = noisy(image)
    cells = segmenter_of(Scale(pixel_scale=8.0), min_area=1).segment(image)
    assert cells.labels.max() == len(cells.scores) == 2
    tiny = segmenter.Cells(np.eye(3, dtype=np.int32) * [1, 0, 2], np.array([0.5, 0.7, 0.9]), np.eye(3) > 0)
    remaining = segmenter._renumbered(tiny._replace(labels=np.eye(3, dtype=np.int32) * [1, 0, 3]), 1)
    np.testing.assert_array_equal(np.diag(remaining.labels), [1, 0, 2])
    np.testing.assert_array_equal(remaining.scores, [0.5, 0.9])


def test_the_diameter_selects_the_factor() -> None:
    rule = Scale(pixel_scale=0.5, diameter=20)
    assert (rule.factor(), rule.factor(40), rule.factor(10)) == (0.5, 0.5, 2)
    model = segmenter_of(rule)
    for diameter in (0, -3, math.nan, 0.1, 1e6):
        with pytest.raises(UserError, match="give the diameter of the cells in pixels"):
            model.factor(diameter)
    with pytest.raises(UserError, match="trained by an older version"):
        segmenter_of(Scale()).segment(np.zeros((9, 9), np.uint8), diameter=20)
    with pytest.raises(segmenter.TooLargeError, match="cut it into tiles"):
        model.segment_frame(model.frame(np.arange(2**24, dtype=np.uint32).astype(np.uint8).reshape(4096, 4096)), 8.0)


def test_scale_of_a_dataset() -> None:
    areas = {100: 3, 400: 2, 1000: 2}
    rule = scale.of_dataset(0.5, areas, [10, 12, 20, 22, 90])
    assert rule.diameter == pytest.approx(2 * math.sqrt(400 / math.pi), abs=1e-3)
    assert (rule.pixel_scale, rule.diameters) == (0.5, (12, 22)), "without the outlier at each end"
    assert scale.of_dataset(2, {}, []) == Scale(pixel_scale=2)
    assert scale.of_dataset(1, Counter({7: 1}), [3.0]).diameter == pytest.approx(2 * math.sqrt(7 / math.pi), abs=1e-3)
    for invalid in ({"pixel_scale": 0}, {"pixel_scale": math.nan}, {"diameter": -1}, {"diameters": (0, 1)}, {"x": 1}):
        with pytest.raises(ValueError, match="validation error"):
            Scale.model_validate(invalid)


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_cells_of_another_size_have_a_warning_in_original_pixels(factor: float) -> None:
    areas = np.full(30, round(math.pi * 25**2))  # diameter 50 at the network's pixel size
    assert Scale(diameter=60).warning(areas, factor) == ()
    assert Scale(diameter=20).warning(areas[:9], factor) == (), "too few cells"
    assert Scale().warning(areas, factor) == ()
    (text,) = Scale(diameter=20).warning(areas, factor)
    sizes = f"median diameter {50 / factor:.1f} px, theirs {20 / factor:.1f}"
    assert text == f"cell size far from the training images': {sizes}"
    assert Scale(diameter=20, diameters=(15, 55)).warning(areas, factor) == (), "one of several cell types"
    assert Scale(diameter=120).warning(areas, factor)


@given(st.data(), SHAPES, st.floats(0.1, 2.5), st.floats(0.1, 2.5), st.sampled_from([1, 40, scale.BAND]))
@settings(max_examples=200, deadline=None)
def test_a_mask_is_resized_alike_in_every_window(
    data: st.DataObject, size: tuple[int, int], vertical: float, horizontal: float, band: int
) -> None:
    """In its bounding box, in a larger window or in the complete image, and as OpenCV resizes it."""
    if data.draw(st.booleans()):
        horizontal = vertical
    shape = scaled_shape((size[0], 1), vertical)[0], scaled_shape((size[1], 1), horizontal)[0]
    top, left = (data.draw(st.integers(0, side - 1)) for side in size)
    bottom, right = (data.draw(st.integers(low + 1, side)) for low, side in zip((top, left), size))
    noise = np.random.default_rng(data.draw(st.integers(0, 99))).random((bottom - top, right - left))
    full = np.zeros(size, bool)
    full[top:bottom, left:right] = cv2.blur(noise, (data.draw(st.sampled_from([1, 5])),) * 2) > 0.5
    wide = data.draw(st.integers(0, top)), data.draw(st.integers(0, left))
    resized = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scale, "BAND", band)
        for first, last in (((0, 0), size), ((top, left), (bottom, right)), (wide, size)):
            y, x, mask = resize_mask(full[first[0] : last[0], first[1] : last[1]], *first, size, shape)
            assert 0 <= y <= y + mask.shape[0] <= shape[0]
            assert 0 <= x <= x + mask.shape[1] <= shape[1]
            resized.append(np.zeros(shape, bool))
            resized[-1][y : y + mask.shape[0], x : x + mask.shape[1]] = mask
    np.testing.assert_array_equal(resized[1], resized[0])
    np.testing.assert_array_equal(resized[2], resized[0])
    if (shape[0] < size[0]) == (shape[1] < size[1]):
        coverage = resize_to(full.astype(np.uint8) * 255, shape).astype(int)
        clear = np.abs(coverage - 127.5) > 2  # rounded by OpenCV
        np.testing.assert_array_equal(resized[0][clear], coverage[clear] > 127)
