"""Maps -> cells: what comes back of ideal maps, and what holds for any."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from raylivecell.cells import watershed
from raylivecell.cells.watershed import InstanceConfig
from raylivecell.ingest import target_maps
from raylivecell.recipe import CHANNELS, Targets
from raylivecell.scoring import instance_scores

SHAPES = st.tuples(st.integers(1, 90), st.integers(1, 90))
SEEDS = st.integers(0, 10**6)


def ellipses(rng: np.random.Generator, shape: tuple[int, int], distance: float) -> np.ndarray:
    """Labels, uint16, of ellipses whose centres are so far from each other; many touch, the frame cuts some."""
    centres: list[np.ndarray] = []
    labels = np.zeros(shape, np.uint16)
    for centre in rng.integers(0, np.array(shape), (80, 2)):
        if all(np.hypot(*(centre - other)) >= distance for other in centres):
            centres.append(centre)
            axes = [int(axis) for axis in rng.integers(6, 11, 2)]
            drawn = np.zeros(shape, np.uint8)
            cv2.ellipse(drawn, centre[::-1].tolist(), axes, rng.uniform(0, 180), 0, 360, 1, -1)
            labels[(drawn > 0) & (labels == 0)] = len(centres)
    return labels


def ideal(labels: np.ndarray, targets: Targets) -> np.ndarray:
    """Maps float32 (C, H, W) without an error; the height of the background, which no loss asks for, is 0."""
    planes = target_maps.draw_target_maps(np.zeros(labels.shape, np.uint8), labels.astype(np.uint32), targets)
    if targets == "distance":
        planes[3, labels == 0] = 255
    return np.concatenate([planes[1:2], planes[3:] / np.float32(255)]).astype(np.float32)


def noise(rng: np.random.Generator, shape: tuple[int, int], targets: Targets) -> np.ndarray:
    """Maps of any sort, smooth or rough, 0 to 1."""
    sigma, level = rng.uniform(0.3, 4), rng.uniform(0.3, 0.7)
    maps = [cv2.GaussianBlur(rng.normal(size=shape).astype(np.float32), (0, 0), sigma) for _ in CHANNELS[targets]]
    return np.clip(np.stack(maps) * np.float32(sigma) + np.float32(level), 0, 1).astype(np.float32)


@pytest.mark.parametrize("targets", ["boundary", "distance"])
@settings(max_examples=60)
@given(shape=SHAPES, seed=SEEDS)
def test_ideal_maps_give_the_labels_back(targets: Targets, shape: tuple[int, int], seed: int) -> None:
    labels = ellipses(np.random.default_rng(seed), shape, distance=16)
    labels[np.isin(labels, np.flatnonzero(np.bincount(labels.ravel()) < 40))] = 0  # a cut that leaves hardly a cell
    found = watershed.segment(ideal(labels, targets), targets, watershed.default(targets))
    assert not found[~ndimage.binary_fill_holes(labels > 0)].any()
    assert (found > 0).sum() >= 0.95 * (labels > 0).sum()
    pairs = instance_scores.overlaps(found, labels)
    assert pairs.cells == pairs.true_cells == instance_scores.true_positives(pairs, 0.7)


@settings(max_examples=40)
@given(st.tuples(st.integers(24, 80), st.integers(24, 80)), SEEDS)
def test_a_foreground_of_separate_ellipses_gives_one_label_each(shape: tuple[int, int], seed: int) -> None:
    """No cell fills the image: of one that leaves only two corners free, each of the others would be a peak."""
    labels = ellipses(np.random.default_rng(seed), shape, distance=24)
    config = watershed.default("foreground").model_copy(update={"smallest": 0})
    found = watershed.segment(ideal(labels, "foreground"), "foreground", config)
    pairs = instance_scores.overlaps(found, ndimage.label(labels > 0)[0])
    np.testing.assert_array_equal(pairs.iou, 1)
    assert pairs.cells == pairs.true_cells == len(pairs.iou)


def test_a_foreground_of_two_discs_that_touch_is_cut_at_its_waist() -> None:
    labels = np.zeros((40, 60), np.uint16)
    cv2.circle(labels, (17, 20), 12, 1, -1)
    cv2.circle(labels, (41, 20), 12, 2, -1)
    found = watershed.segment(ideal(labels, "foreground"), "foreground", watershed.default("foreground"))
    assert instance_scores.true_positives(instance_scores.overlaps(found, labels), 0.95) == 2 == found.max()


@pytest.mark.parametrize("targets", CHANNELS)
@settings(max_examples=60)
@given(
    shape=SHAPES,
    seed=SEEDS,
    foreground=st.floats(0.2, 0.8),
    smoothing=st.floats(0, 3),
    prominence=st.floats(0, 1),
    smallest=st.integers(0, 120),
)
def test_what_holds_for_any_maps(targets: Targets, shape: tuple[int, int], seed: int, **settings_: float) -> None:
    maps = noise(np.random.default_rng(seed), shape, targets)
    given_maps = maps.copy()
    config = InstanceConfig.model_validate(settings_)
    labels = watershed.segment(maps, targets, config)
    np.testing.assert_array_equal(maps, given_maps)
    assert (labels.dtype, labels.shape) == (np.int32, shape)
    sizes = np.bincount(labels.ravel())
    assert (sizes[1:] >= max(config.smallest, 1)).all()  # and none is missing: 1 to N without gaps
    np.testing.assert_array_equal(labels, watershed.segment(maps, targets, config))
    scores = watershed.scores(labels, maps[0])
    assert (scores.dtype, scores.shape) == (np.float64, (labels.max(),))
    for label, score in enumerate(scores.tolist(), 1):
        mask = labels == label
        assert score == pytest.approx(maps[0][mask].mean(dtype=np.float64))
        assert ndimage.label(mask, np.ones((3, 3)))[1] == 1, "an instance is connected, if only by a corner"
        added = mask & (maps[0] <= config.foreground)
        assert not (added & ~ndimage.binary_fill_holes(mask & ~added)).any(), "only holes are filled"
        assert np.bincount(ndimage.label(added)[0].ravel())[1:].max(initial=0) < max(config.smallest, 1)


@pytest.mark.parametrize("targets", CHANNELS)
@settings(max_examples=30)
@given(shape=SHAPES, seed=SEEDS, smoothing=st.floats(0, 3))
def test_prominence_1_joins_what_is_connected(
    targets: Targets, shape: tuple[int, int], seed: int, smoothing: float
) -> None:
    """Parts that touch by a corner are left out: a basin's peak is higher than its 8 neighbours, floods go to 4."""
    maps = np.clip(noise(np.random.default_rng(seed), shape, targets), 0.01, 0.99)  # no peak stands out by 1
    config = InstanceConfig(prominence=1, smoothing=smoothing, smallest=0)
    blobs = ndimage.label(maps[0] > config.foreground)[0]
    wide = ndimage.label(blobs, np.ones((3, 3)))[0]
    parts = np.bincount(np.unique(np.stack([wide.ravel(), blobs.ravel()]), axis=1)[0])
    blobs[parts[wide] > 1] = 0
    labels = watershed.segment(maps, targets, config)
    labels[blobs == 0] = 0
    pairs = instance_scores.overlaps(labels, blobs)
    np.testing.assert_array_equal(pairs.iou, 1)
    assert pairs.cells == pairs.true_cells == len(pairs.iou)


@pytest.mark.parametrize("targets", CHANNELS)
def test_more_prominence_only_joins(targets: Targets) -> None:
    for seed in range(20):
        maps = noise(np.random.default_rng(seed), (80, 90), targets)
        finer: np.ndarray | None = None
        for prominence in (0, 0.02, 0.1, 0.3, 1):
            labels = watershed.segment(maps, targets, InstanceConfig(prominence=prominence, smallest=0))
            if finer is not None:
                inside = finer > 0
                assert len(np.unique(np.stack([finer, labels])[:, inside], axis=1).T) == finer.max()
            finer = labels


@pytest.mark.parametrize(("prominence", "cells"), [(0.05, 3), (0.19, 3), (0.21, 2), (0.49, 2), (0.51, 1)])
def test_a_peak_counts_by_what_it_stands_out(prominence: float, cells: int) -> None:
    """Ridges of 0.9, 0.7 and 0.8 with saddles of 0.5 and 0.3: the second stands out by 0.2, the third by 0.5."""
    profile = np.interp(np.arange(50), [0, 5, 15, 25, 35, 45, 49], [0.6, 0.9, 0.5, 0.7, 0.3, 0.8, 0.6])
    maps = np.ones((2, 10, 50), np.float32)
    maps[1] = 1 - profile
    labels = watershed.segment(maps, "boundary", InstanceConfig(smoothing=0, prominence=prominence))
    assert labels.max() == cells
    assert (labels[0, 5] == labels[0, 25]) == (prominence > 0.2)
    assert (labels[0, 25] == labels[0, 45]) == (prominence > 0.5)


@pytest.mark.parametrize("targets", CHANNELS)
def test_a_map_without_foreground_has_no_cells(targets: Targets) -> None:
    maps = np.full((len(CHANNELS[targets]), 7, 9), 0.5, np.float32)  # not over 0.5
    labels = watershed.segment(maps, targets, InstanceConfig())
    assert (labels.dtype, labels.shape, labels.any()) == (np.int32, (7, 9), False)
    assert watershed.scores(labels, maps[0]).shape == (0,)


def test_small_holes_are_filled_but_not_at_the_frame() -> None:
    maps = np.zeros((1, 40, 60), np.float32)
    maps[0, :, 5:55] = 0.9
    maps[0, 10:14, 20:24] = 0.1  # 16 pixels
    maps[0, 30:35, 20:25] = 0.1  # 25
    maps[0, :3, 30:33] = 0.1  # at the frame
    config = InstanceConfig(prominence=1, smallest=20)
    expected = maps[0] > 0.5
    expected[10:14, 20:24] = True
    labels = watershed.segment(maps, "foreground", config)
    np.testing.assert_array_equal(labels, expected)
    inside = maps[0][expected]
    assert watershed.scores(labels, maps[0]) == pytest.approx([inside.mean(dtype=np.float64)])


def test_a_hole_between_two_cells_is_nobodys() -> None:
    labels = np.repeat(np.array([[1, 2]], np.uint16), 20, axis=1).repeat(30, axis=0)
    maps = ideal(labels, "boundary")
    maps[0, 10:13, 18:22] = 0
    maps[0, 20, 10] = 0  # inside the first
    found = watershed.segment(maps, "boundary", InstanceConfig(smoothing=0, prominence=0.5))
    assert found.max() == 2
    np.testing.assert_array_equal(found == 0, (maps[0] == 0) & (np.arange(30) != 20)[:, None])
