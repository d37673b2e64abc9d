"""Network output maps -> cells: labels recovered from ideal maps, and invariants for any maps."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from raylivecell.cells import watershed
from raylivecell.cells.watershed import InstanceConfig
from raylivecell.scoring import instance_scores
from raylivecell.targets import sample_planes
from raylivecell.targets.registry import NAMES, Targets, target

SHAPES = st.tuples(st.integers(1, 90), st.integers(1, 90))
SEEDS = st.integers(0, 10**6)


def ellipses(rng: np.random.Generator, shape: tuple[int, int], distance: float) -> np.ndarray:
    """Labels (uint16) of ellipses with centres at least `distance` apart; many touch, the image edge cuts some."""
    centres: list[np.ndarray] = []
    labels = np.zeros(shape, np.uint16)
    for centre in rng.integers(0, np.array(shape), (80, 2)):
        if all(np.hypot(*(centre - other)) >= distance for other in centres):
            centres.append(centre)
            axes = [int(axis) for axis in rng.integers(6, 11, 2)]
            ellipse = np.zeros(shape, np.uint8)
            cv2.ellipse(ellipse, centre[::-1].tolist(), axes, rng.uniform(0, 180), 0, 360, 1, -1)
            labels[(ellipse > 0) & (labels == 0)] = len(centres)
    return labels


def ideal(labels: np.ndarray, targets: Targets) -> np.ndarray:
    """Error-free maps, float32 (C, H, W); 0 in the background, where the loss does not determine the height map."""
    planes = sample_planes.draw(np.zeros(labels.shape, np.uint8), labels.astype(np.uint32), targets)
    if targets == "distance":
        planes[3, labels == 0] = 255
    return np.concatenate([planes[1:2], planes[3:] / np.float32(255)]).astype(np.float32)


def noise(rng: np.random.Generator, shape: tuple[int, int], targets: Targets) -> np.ndarray:
    """Random maps, smooth or rough, 0 to 1."""
    sigma, level = rng.uniform(0.3, 4), rng.uniform(0.3, 0.7)
    channels = target(targets).channels
    maps = [cv2.GaussianBlur(rng.normal(size=shape).astype(np.float32), (0, 0), sigma) for _ in channels]
    return np.clip(np.stack(maps) * np.float32(sigma) + np.float32(level), 0, 1).astype(np.float32)


@pytest.mark.parametrize("targets", ["boundary", "distance"])
@settings(max_examples=60)
@given(shape=SHAPES, seed=SEEDS)
def test_labels_are_recovered_from_ideal_maps(targets: Targets, shape: tuple[int, int], seed: int) -> None:
    labels = ellipses(np.random.default_rng(seed), shape, distance=16)
    labels[np.isin(labels, np.flatnonzero(np.bincount(labels.ravel()) < 40))] = 0  # cells cut by the image edge
    cells = watershed.segment(ideal(labels, targets), targets, watershed.default(targets))
    assert not cells[~ndimage.binary_fill_holes(labels > 0)].any()
    assert (cells > 0).sum() >= 0.95 * (labels > 0).sum()
    pairs = instance_scores.overlaps(cells, labels)
    assert pairs.cells == pairs.true_cells == instance_scores.true_positives(pairs, 0.7)


@settings(max_examples=40)
@given(st.tuples(st.integers(24, 80), st.integers(24, 80)), SEEDS)
def test_separate_ellipses_of_foreground_get_one_label_each(shape: tuple[int, int], seed: int) -> None:
    """No cell fills the image: one that leaves only two corners free would have a peak in each of the other two."""
    labels = ellipses(np.random.default_rng(seed), shape, distance=24)
    config = watershed.default("foreground").model_copy(update={"min_area": 0})
    cells = watershed.segment(ideal(labels, "foreground"), "foreground", config)
    pairs = instance_scores.overlaps(cells, ndimage.label(labels > 0)[0])
    np.testing.assert_array_equal(pairs.iou, 1)
    assert pairs.cells == pairs.true_cells == len(pairs.iou)


def test_two_touching_discs_of_foreground_are_separated() -> None:
    labels = np.zeros((40, 60), np.uint16)
    cv2.circle(labels, (17, 20), 12, 1, -1)
    cv2.circle(labels, (41, 20), 12, 2, -1)
    cells = watershed.segment(ideal(labels, "foreground"), "foreground", watershed.default("foreground"))
    assert instance_scores.true_positives(instance_scores.overlaps(cells, labels), 0.95) == 2 == cells.max()


@pytest.mark.parametrize("targets", NAMES)
@settings(max_examples=60)
@given(
    shape=SHAPES,
    seed=SEEDS,
    threshold=st.floats(0.2, 0.8),
    smoothing=st.floats(0, 3),
    prominence=st.floats(0, 1),
    min_area=st.integers(0, 120),
)
def test_invariants_for_any_maps(targets: Targets, shape: tuple[int, int], seed: int, **settings_: float) -> None:
    maps = noise(np.random.default_rng(seed), shape, targets)
    original = maps.copy()
    config = InstanceConfig.model_validate(settings_)
    labels = watershed.segment(maps, targets, config)
    np.testing.assert_array_equal(maps, original)
    assert (labels.dtype, labels.shape) == (np.int32, shape)
    sizes = np.bincount(labels.ravel())
    assert (sizes[1:] >= max(config.min_area, 1)).all()  # also: 1 to N without gaps
    np.testing.assert_array_equal(labels, watershed.segment(maps, targets, config))
    again, confidence = watershed.segment_with_confidence(maps, targets, config)
    np.testing.assert_array_equal(again, labels)
    scores = watershed.scores(labels, confidence)
    assert (scores.dtype, scores.shape) == (np.float64, (labels.max(),))
    for label, score in enumerate(scores.tolist(), 1):
        mask = labels == label
        assert score == pytest.approx(confidence[mask].mean(dtype=np.float64))
        assert score <= maps[0][mask].mean(dtype=np.float64) + 1e-6
        assert ndimage.label(mask, np.ones((3, 3)))[1] == 1, "an instance is 8-connected"
        added = mask & (maps[0] <= config.threshold)
        assert not (added & ~ndimage.binary_fill_holes(mask & ~added)).any(), "only holes are filled"
        assert np.bincount(ndimage.label(added)[0].ravel())[1:].max(initial=0) < max(config.min_area, 1)


@pytest.mark.parametrize("targets", NAMES)
@settings(max_examples=30)
@given(shape=SHAPES, seed=SEEDS, smoothing=st.floats(0, 3))
def test_prominence_1_merges_connected_foreground(
    targets: Targets, shape: tuple[int, int], seed: int, smoothing: float
) -> None:
    """Without parts that touch at a corner: basins climb over 8 neighbours, but merge over 4."""
    maps = np.clip(noise(np.random.default_rng(seed), shape, targets), 0.01, 0.99)  # no peak has prominence 1
    config = InstanceConfig(prominence=1, smoothing=smoothing, min_area=0)
    blobs = ndimage.label(maps[0] > config.threshold)[0]
    connected = ndimage.label(blobs, np.ones((3, 3)))[0]
    parts = np.bincount(np.unique(np.stack([connected.ravel(), blobs.ravel()]), axis=1)[0])
    blobs[parts[connected] > 1] = 0
    labels = watershed.segment(maps, targets, config)
    labels[blobs == 0] = 0
    pairs = instance_scores.overlaps(labels, blobs)
    np.testing.assert_array_equal(pairs.iou, 1)
    assert pairs.cells == pairs.true_cells == len(pairs.iou)


@settings(max_examples=60)
@given(shape=SHAPES, seed=SEEDS)
def test_a_pixel_belongs_to_the_basin_of_its_highest_neighbour(shape: tuple[int, int], seed: int) -> None:
    maps = noise(np.random.default_rng(seed), shape, "boundary")
    config = InstanceConfig(prominence=0, smoothing=0, min_area=0)
    labels = watershed.segment(maps, "boundary", config)
    heights = np.where(labels > 0, target("boundary").height(maps, labels > 0), -1)
    around = np.pad(heights, 1, constant_values=-1)
    for y, x in zip(*np.nonzero(labels)):
        neighbours = around[y : y + 3, x : x + 3]
        dy, dx = np.unravel_index(neighbours.argmax(), (3, 3))
        if (neighbours == neighbours.max()).sum() == 1:
            assert labels[y, x] == labels[y + dy - 1, x + dx - 1]
    assert (labels > 0).tolist() == (maps[0] > config.threshold).tolist()


@pytest.mark.parametrize("targets", NAMES)
def test_a_higher_prominence_only_merges(targets: Targets) -> None:
    for seed in range(20):
        maps = noise(np.random.default_rng(seed), (80, 90), targets)
        previous: np.ndarray | None = None
        for prominence in (0, 0.02, 0.1, 0.3, 1):
            labels = watershed.segment(maps, targets, InstanceConfig(prominence=prominence, min_area=0))
            if previous is not None:
                inside = previous > 0
                assert len(np.unique(np.stack([previous, labels])[:, inside], axis=1).T) == previous.max()
            previous = labels


@pytest.mark.parametrize(("prominence", "cells"), [(0.05, 3), (0.19, 3), (0.21, 2), (0.49, 2), (0.51, 1)])
def test_a_peak_counts_by_its_prominence(prominence: float, cells: int) -> None:
    """Ridges of 0.9, 0.7 and 0.8 with saddles of 0.5 and 0.3: the second has prominence 0.2, the third 0.5."""
    profile = np.interp(np.arange(50), [0, 5, 15, 25, 35, 45, 49], [0.6, 0.9, 0.5, 0.7, 0.3, 0.8, 0.6])
    maps = np.ones((2, 10, 50), np.float32)
    maps[1] = 1 - profile
    labels = watershed.segment(maps, "boundary", InstanceConfig(smoothing=0, prominence=prominence))
    assert labels.max() == cells
    assert (labels[0, 5] == labels[0, 25]) == (prominence > 0.2)
    assert (labels[0, 25] == labels[0, 45]) == (prominence > 0.5)


@pytest.mark.parametrize("targets", NAMES)
def test_a_map_without_foreground_has_no_cells(targets: Targets) -> None:
    maps = np.full((len(target(targets).channels), 7, 9), 0.5, np.float32)  # not above 0.5
    labels = watershed.segment(maps, targets, InstanceConfig())
    assert (labels.dtype, labels.shape, labels.any()) == (np.int32, (7, 9), False)
    assert watershed.scores(labels, maps[0]).shape == (0,)


def test_small_holes_are_filled_but_not_at_the_image_edge() -> None:
    maps = np.zeros((1, 40, 60), np.float32)
    maps[0, :, 5:55] = 0.9
    maps[0, 10:14, 20:24] = 0.1  # 16 pixels
    maps[0, 30:35, 20:25] = 0.1  # 25
    maps[0, :3, 30:33] = 0.1  # at the image edge
    config = InstanceConfig(prominence=1, min_area=20)
    expected = maps[0] > 0.5
    expected[10:14, 20:24] = True
    labels = watershed.segment(maps, "foreground", config)
    np.testing.assert_array_equal(labels, expected)
    inside = maps[0][expected]
    assert watershed.scores(labels, maps[0]) == pytest.approx([inside.mean(dtype=np.float64)])


def test_a_hole_between_two_cells_stays() -> None:
    labels = np.repeat(np.array([[1, 2]], np.uint16), 20, axis=1).repeat(30, axis=0)
    maps = ideal(labels, "boundary")
    maps[0, 10:13, 18:22] = 0
    maps[0, 20, 10] = 0  # inside the first cell
    cells = watershed.segment(maps, "boundary", InstanceConfig(smoothing=0, prominence=0.5))
    assert cells.max() == 2
    np.testing.assert_array_equal(cells == 0, (maps[0] == 0) & (np.arange(30) != 20)[:, None])


@settings(max_examples=60)
@given(shape=SHAPES, seed=SEEDS, targets=st.sampled_from(NAMES), quantile=st.floats(0, 1))
def test_exactly_the_cells_below_min_score_are_removed(
    shape: tuple[int, int], seed: int, targets: Targets, quantile: float
) -> None:
    maps = noise(np.random.default_rng(seed), shape, targets)
    config = InstanceConfig(min_area=5)
    labels, confidence = watershed.segment_with_confidence(maps, targets, config)
    scores = watershed.scores(labels, confidence)
    if not len(scores):
        return
    limit = float(np.quantile(scores, quantile))
    filtered = watershed.segment(maps, targets, config.model_copy(update={"min_score": limit}))
    expected = np.where(np.isin(labels, 1 + np.flatnonzero(scores >= limit)), labels, 0)
    np.testing.assert_array_equal(filtered > 0, expected > 0)
    assert filtered.max() == len(np.unique(expected[expected > 0]))


def test_scores_tell_cells_from_merged_and_divided_ones() -> None:
    """Maps of two touching cells: found as they are, as one cell, and in four parts."""
    y, x = np.mgrid[:60, :100]
    labels = np.where((y - 30) ** 2 + (x - 30) ** 2 < 400, 1, np.where((y - 30) ** 2 + (x - 68) ** 2 < 400, 2, 0))
    maps = ideal(labels.astype(np.uint16), "distance")

    def score(cells: np.ndarray) -> float:
        cells = cells.astype(np.int32)
        return float(watershed.scores(cells, target("distance").confidence(maps, cells)).min())

    divided = np.where(labels > 0, 2 * labels - (y < 30), 0)
    assert score(labels) > 0.99
    assert max(score(np.minimum(labels, 1)), score(divided)) < 0.85
