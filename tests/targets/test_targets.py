"""Target maps drawn from labels, compared with their definitions."""

from collections.abc import Callable

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from raylivecell.targets import sample_planes
from raylivecell.targets.boundary import boundary
from raylivecell.targets.distance import distances
from raylivecell.targets.registry import NAMES, Targets, target

SHAPES = st.tuples(st.integers(1, 70), st.integers(1, 70))
SEEDS = st.integers(0, 10**6)
TRANSFORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "up and down": np.flipud,
    "left and right": np.fliplr,
    "quarter turn": np.rot90,
    "half turn": lambda image: np.rot90(image, 2),
}


def cells(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Non-consecutive labels (uint16) of overlapping ellipses and single pixels, some at the image edge."""
    labels = np.zeros(shape, np.uint16)
    for _ in range(rng.integers(0, 12)):
        centre = [int(rng.integers(0, size)) for size in shape[::-1]]
        axes = rng.integers(0, 16, 2).tolist()
        cv2.ellipse(labels, centre, axes, rng.uniform(0, 180), 0, 360, int(rng.integers(1, 2**16)), -1)
    return labels


def depth(labels: np.ndarray) -> np.ndarray:
    """Distance from each cell pixel to the nearest pixel outside its cell; 1 if the cell fills the image."""
    distance = np.zeros(labels.shape)
    for label in np.unique(labels[labels > 0]):
        mask = labels == label
        distance[mask] = 1.0 if mask.all() else ndimage.distance_transform_edt(mask)[mask]
    return distance


def unambiguous(labels: np.ndarray, to_boundary: np.ndarray) -> np.ndarray:
    """Mask of the background and of cells with a single deepest pixel; with several, any of them may be the centre."""
    return np.bincount(labels[to_boundary > 1 - 1e-6], minlength=2**16)[labels] <= 1


def maximum_per_cell(labels: np.ndarray, values: np.ndarray) -> np.ndarray:
    """For each pixel the maximum of the values in its cell."""
    return ndimage.maximum(values, labels, np.arange(labels.max(initial=0) + 1))[labels]


@settings(max_examples=60)
@given(SHAPES, SEEDS)
def test_distances_match_their_definition(shape: tuple[int, int], seed: int) -> None:
    """One distance transform for all cells differs by up to 0.42 pixels from a transform per cell."""
    labels = cells(np.random.default_rng(seed), shape)
    to_centre, to_boundary = distances(labels)
    inside = labels > 0
    for plane in (to_centre, to_boundary):
        assert (plane.dtype, plane.shape) == (np.float32, shape)
        assert not plane[~inside].any()
        assert plane.min() >= 0
        assert plane.max() <= 1
    assert (to_boundary[inside] > 0).all()
    np.testing.assert_array_equal(maximum_per_cell(labels, to_boundary)[inside], 1)
    truth = depth(labels)
    deepest = maximum_per_cell(labels, truth)[inside]
    assert (np.abs(to_boundary[inside] * deepest - truth[inside]) <= 0.85).all()
    # The centre is a deepest pixel; the map increases with the distance from it, up to 1 at the farthest pixel.
    for label in np.unique(labels[inside]):
        mask = labels == label
        y, x = np.nonzero(mask)
        [centre, *others] = np.flatnonzero(to_centre[mask] == 0)
        assert not others
        assert to_boundary[mask][centre] == 1
        radius = np.hypot(y - y[centre], x - x[centre])
        np.testing.assert_allclose(to_centre[mask], radius / max(radius.max(), 1), atol=1e-6)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@settings(max_examples=30)
@given(shape=SHAPES, seed=SEEDS)
def test_maps_follow_flips_and_rotations_of_the_labels(
    transform: Callable[[np.ndarray], np.ndarray], shape: tuple[int, int], seed: int
) -> None:
    labels = cells(np.random.default_rng(seed), shape)
    transformed = np.ascontiguousarray(transform(labels))
    np.testing.assert_array_equal(boundary(transformed), transform(boundary(labels)))
    to_centre, to_boundary = distances(labels)
    new_centre, new_boundary = distances(transformed)
    np.testing.assert_allclose(new_boundary, transform(to_boundary), atol=1e-6)
    clear = transform(unambiguous(labels, to_boundary))
    np.testing.assert_allclose(new_centre[clear], transform(to_centre)[clear], atol=1e-6)


def test_the_image_edge_does_not_count_as_outside() -> None:
    labels = np.zeros((9, 20), np.uint16)
    labels[:, :10] = 7
    _, to_boundary = distances(labels)
    expected = np.arange(10, 0, -1) / 10  # deepest at the image edge
    np.testing.assert_allclose(to_boundary[:, :10], np.broadcast_to(expected, (9, 10)), atol=1e-6)
    full = np.full((6, 8), 3, np.uint16)
    to_centre, to_boundary = distances(full)
    np.testing.assert_array_equal(to_boundary, 1)
    assert (to_centre[0, 0], to_centre[-1, -1]) == (0, 1)  # all pixels are equally deep: the first is the centre
    assert not boundary(full).any()


def test_a_touching_cell_counts_as_outside() -> None:
    labels = np.repeat(np.array([[1, 2, 0]], np.uint16), 5, axis=1).repeat(4, axis=0)
    _, to_boundary = distances(labels)
    np.testing.assert_allclose(to_boundary[2], [1, 0.8, 0.6, 0.4, 0.2, 1 / 3, 2 / 3, 1, 2 / 3, 1 / 3] + 5 * [0])
    np.testing.assert_array_equal(np.flatnonzero(boundary(labels)[2]), [4, 5, 9, 10])


@settings(max_examples=40)
@given(SHAPES, SEEDS)
def test_boundaries_are_pixels_with_different_neighbours(shape: tuple[int, int], seed: int) -> None:
    labels = cells(np.random.default_rng(seed), shape)
    neighbours = np.lib.stride_tricks.sliding_window_view(np.pad(labels, 1, mode="edge"), (3, 3)).reshape(*shape, 9)
    np.testing.assert_array_equal(boundary(labels), (neighbours != neighbours[..., :1]).any(axis=2))


@pytest.mark.parametrize("targets", NAMES)
@settings(max_examples=20)
@given(shape=SHAPES, seed=SEEDS)
def test_planes_contain_the_packed_labels_and_border(targets: Targets, shape: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    image, border = rng.integers(0, 256, (2, *shape), np.uint8)
    labels = cells(rng, shape)
    labels[0, 0], border[0, 0] = 65_535, 255
    packed = sample_planes.pack(labels, border)
    assert (packed.dtype, packed.shape) == (np.uint32, shape)
    assert sample_planes.bytes_per_pixel(labels=True) == image.itemsize + packed.itemsize
    np.testing.assert_array_equal(packed & 0xFFFF, labels)
    np.testing.assert_array_equal(packed >> 16, border)
    planes = sample_planes.draw(image, packed, targets)
    assert (planes.dtype, planes.shape) == (np.uint8, (2 + len(target(targets).channels), *shape))
    out = np.full_like(planes, 99)
    assert sample_planes.draw(image, packed, targets, out) is out
    for result in (planes, out):
        np.testing.assert_array_equal(result[:3], [image, labels > 0, border])
        if targets == "boundary":
            np.testing.assert_array_equal(result[3], 255 * boundary(labels))
        elif targets == "distance":
            expected = np.stack(distances(labels))
            clear = unambiguous(labels, expected[1])
            np.testing.assert_allclose(result[3:, clear] / 255, expected[:, clear], atol=0.502 / 255)


def test_the_same_labels_give_the_same_maps() -> None:
    rng = np.random.default_rng(0)
    labels = [cells(rng, (70, 90)) for _ in range(20)]
    first = [np.stack(distances(image)) for image in labels]
    for _ in range(20):
        blockers = [np.empty(rng.integers(1, 3000)) for _ in range(20)]  # so that arrays have other addresses
        np.testing.assert_array_equal(np.stack([np.stack(distances(image)) for image in labels]), first)
        del blockers


@given(st.sampled_from(NAMES), SEEDS, SHAPES)
def test_the_height_expression_computes_the_height_map(name: Targets, seed: int, shape: tuple[int, int]) -> None:
    rng, kind = np.random.default_rng(seed), target(name)
    maps = rng.random((len(kind.channels), *shape), np.float32)
    cell = maps[0] > 0.3
    height = eval(kind.height_expression, {"maps": maps, "cell": cell, "np": np, "ndimage": ndimage})
    # OpenCV has no border of zeros either: a cell that fills the image has no distance.
    if not cell.all():
        np.testing.assert_allclose(height, kind.height(maps, cell), atol=1e-5)
