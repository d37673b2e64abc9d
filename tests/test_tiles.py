"""Overlapping windows and strips against the whole image at once."""

import subprocess
import sys
import textwrap
from collections.abc import Callable

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from raylivecell import fields, instance_metrics, instances, segment, tiles
from raylivecell.fields import Targets
from raylivecell.instances import InstanceConfig

Network = Callable[[np.ndarray], np.ndarray]
WINDOW, HALO = 64, 48
SIZES = st.tuples(st.integers(1, 210), st.integers(1, 210))
SEEDS = st.integers(0, 10**6)


def mosaic(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Labels of ellipses side by side and over each other, on every seam: up to 24 rows, half of HALO, high."""
    labels = np.zeros(shape, np.uint16)
    for label in range(1, 2 + shape[0] * shape[1] // 250):
        centre = [int(rng.integers(0, size)) for size in shape[::-1]]
        axes = rng.integers(5, 13, 2).tolist()
        cv2.ellipse(labels, centre, axes, rng.uniform(0, 180), 0, 360, label, -1)
    return labels


def encoded(labels: np.ndarray, targets: Targets) -> tuple[np.ndarray, Network]:
    """An image of which every pixel tells the ideal maps there, and the network that reads them."""
    planes = fields.planes(np.zeros(labels.shape, np.uint8), labels.astype(np.uint32), targets)
    cell, drawn = planes[1], planes[3:]
    if targets == "foreground":
        return cell, lambda image: (image > 0)[None].astype(np.float32)
    if targets == "boundary":
        return cell + 2 * (drawn[0] > 0), lambda image: np.stack([image & 1, image >> 1]).astype(np.float32)
    height = (255 - drawn[0].astype(np.int32) + drawn[1]) // 4  # 0 to 127

    def distances(image: np.ndarray) -> np.ndarray:
        near = (image & 127) / np.float32(127)
        return np.stack([image >> 7, 1 - near, near]).astype(np.float32)

    return (cell * (128 + height)).astype(np.uint8), distances


def blurred(network: Network) -> Network:
    """One that looks at neighbours, and sees none at its window's edges."""
    return lambda image: np.stack([cv2.blur(plane, (3, 3)) for plane in network(image)])


def grey(image: np.ndarray) -> np.ndarray:
    """Two maps of one pixel each."""
    return np.stack([image, 255 - image]).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(1, 80), SEEDS)
def test_bands_are_the_maps_of_the_whole_row_by_row(shape: tuple[int, int], window: int, seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    windows = []

    def network(pixels: np.ndarray) -> np.ndarray:
        windows.append((pixels.shape, pixels.dtype, pixels.flags.c_contiguous))
        return grey(pixels)

    row = 0
    for first, maps in tiles.bands(network, image, window):
        assert (first, maps.dtype, maps.shape[0], maps.shape[2]) == (row, np.float32, 2, shape[1])
        np.testing.assert_allclose(maps, grey(image[row : row + maps.shape[1]]), atol=1e-3)
        row += maps.shape[1]
        maps[:] = np.nan  # it is the receiver's: what comes later does not change
    assert row == shape[0]
    assert set(windows) == {((min(window, shape[0]), min(window, shape[1])), np.dtype(np.uint8), True)}


def test_what_fits_in_a_window_is_not_touched() -> None:
    image = np.random.default_rng(0).integers(0, 256, (31, 64), np.uint8)
    maps = np.random.default_rng(1).random((3, 31, 64), np.float32)
    [(row, found)] = tiles.bands(lambda _: maps, image, 64)
    assert row == 0
    np.testing.assert_array_equal(found, maps)


@settings(max_examples=30, deadline=None)
@given(st.tuples(st.integers(64, 200), st.integers(64, 200)))
def test_what_a_window_says_at_its_edges_hardly_counts_inside_the_image(shape: tuple[int, int]) -> None:
    """Each window errs by 1 in its outermost two pixels; the others that see them know better."""

    def network(pixels: np.ndarray) -> np.ndarray:
        error = np.ones((1, *pixels.shape), np.float32)
        error[:, 2:-2, 2:-2] = 0
        return error

    found = np.concatenate([maps for _, maps in tiles.bands(network, np.zeros(shape, np.uint8), 64)], axis=1)[0]
    assert found[2:-2, 2:-2].max(initial=0) < 0.02
    np.testing.assert_allclose(found[[0, -1]], 1, atol=1e-5)  # the frame has no other witness


def test_maps_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(1, 1, 1\) of a window \(64, 64\)"):
        next(tiles.bands(lambda _: np.zeros((1, 1, 1), np.float32), np.zeros((99, 99), np.uint8), 64))


def assert_same(found: np.ndarray, whole: np.ndarray) -> None:
    pairs = instance_metrics.overlaps(found, whole)
    assert pairs.cells == pairs.true_cells
    assert instance_metrics.true_positives(pairs, 0.98) == pairs.cells


@pytest.mark.parametrize("targets", fields.CHANNELS)
@pytest.mark.parametrize("lens", [lambda network: network, blurred])
@settings(max_examples=40, deadline=None)
@given(shape=SIZES, seed=SEEDS)
def test_strips_give_the_cells_of_the_whole(
    targets: Targets, lens: Callable[[Network], Network], shape: tuple[int, int], seed: int
) -> None:
    image, network = encoded(mosaic(np.random.default_rng(seed), shape), targets)
    maps = lens(network)(image)
    config = instances.default(targets)
    whole = instances.segment(maps, targets, config)
    labels, scores, foreground = tiles.segment(lens(network), image, targets, config, WINDOW, HALO)
    assert (labels.dtype, labels.shape, scores.dtype, foreground.dtype) == (np.int32, shape, np.float64, np.bool_)
    np.testing.assert_array_equal(np.unique(labels[labels > 0]), np.arange(1, len(scores) + 1))
    assert_same(labels, whole)
    np.testing.assert_array_equal(foreground, maps[0] > config.foreground)
    np.testing.assert_allclose(scores, instances.scores(labels, maps[0]), atol=0.01)
