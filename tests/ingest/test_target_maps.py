"""What is drawn of labels to be learnt, against its definition."""

from collections.abc import Callable

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from raylivecell.ingest import target_maps
from raylivecell.recipe import CHANNELS, Targets

SHAPES = st.tuples(st.integers(1, 70), st.integers(1, 70))
SEEDS = st.integers(0, 10**6)
MOVES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "up and down": np.flipud,
    "left and right": np.fliplr,
    "quarter turn": np.rot90,
    "half turn": lambda image: np.rot90(image, 2),
}


def cells(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Labels, uint16 and not consecutive, of ellipses and of single pixels that cover each other and the frame."""
    labels = np.zeros(shape, np.uint16)
    for _ in range(rng.integers(0, 12)):
        centre = [int(rng.integers(0, size)) for size in shape[::-1]]
        axes = rng.integers(0, 16, 2).tolist()
        cv2.ellipse(labels, centre, axes, rng.uniform(0, 180), 0, 360, int(rng.integers(1, 2**16)), -1)
    return labels


def depth(labels: np.ndarray) -> np.ndarray:
    """Distance of each cell's pixels to the nearest pixel that is not of the cell; without one, 1."""
    found = np.zeros(labels.shape)
    for label in np.unique(labels[labels > 0]):
        mask = labels == label
        found[mask] = 1.0 if mask.all() else ndimage.distance_transform_edt(mask)[mask]
    return found


def alone(labels: np.ndarray, to_boundary: np.ndarray) -> np.ndarray:
    """Where the background is, or a cell with one deepest pixel: of several the centre may be any."""
    return np.bincount(labels[to_boundary > 1 - 1e-6], minlength=2**16)[labels] <= 1


def largest(labels: np.ndarray, values: np.ndarray) -> np.ndarray:
    """In each pixel the largest value in its cell."""
    return ndimage.maximum(values, labels, np.arange(labels.max(initial=0) + 1))[labels]


@settings(max_examples=60)
@given(SHAPES, SEEDS)
def test_distances_are_their_definition(shape: tuple[int, int], seed: int) -> None:
    """The transform of all cells at once is up to 0.42 pixels off that of each alone."""
    labels = cells(np.random.default_rng(seed), shape)
    to_centre, to_boundary = target_maps.distances(labels)
    inside = labels > 0
    for field in (to_centre, to_boundary):
        assert (field.dtype, field.shape) == (np.float32, shape)
        assert not field[~inside].any()
        assert field.min() >= 0
        assert field.max() <= 1
    assert (to_boundary[inside] > 0).all()
    np.testing.assert_array_equal(largest(labels, to_boundary)[inside], 1)
    truth = depth(labels)
    deepest = largest(labels, truth)[inside]
    assert (np.abs(to_boundary[inside] * deepest - truth[inside]) <= 0.85).all()
    # The centre is a deepest pixel, and the field grows with the distance from it, to 1 where it is farthest.
    for label in np.unique(labels[inside]):
        mask = labels == label
        y, x = np.nonzero(mask)
        [centre, *others] = np.flatnonzero(to_centre[mask] == 0)
        assert not others
        assert to_boundary[mask][centre] == 1
        away = np.hypot(y - y[centre], x - x[centre])
        np.testing.assert_allclose(to_centre[mask], away / max(away.max(), 1), atol=1e-6)


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
@settings(max_examples=30)
@given(shape=SHAPES, seed=SEEDS)
def test_fields_move_with_the_labels(
    move: Callable[[np.ndarray], np.ndarray], shape: tuple[int, int], seed: int
) -> None:
    labels = cells(np.random.default_rng(seed), shape)
    turned = np.ascontiguousarray(move(labels))
    np.testing.assert_array_equal(target_maps.boundary(turned), move(target_maps.boundary(labels)))
    to_centre, to_boundary = target_maps.distances(labels)
    moved_centre, moved_boundary = target_maps.distances(turned)
    np.testing.assert_allclose(moved_boundary, move(to_boundary), atol=1e-6)
    clear = alone(labels, to_boundary)
    np.testing.assert_allclose(moved_centre[move(clear)], move(to_centre)[move(clear)], atol=1e-6)


def test_the_frame_is_no_outside() -> None:
    labels = np.zeros((9, 20), np.uint16)
    labels[:, :10] = 7
    _, to_boundary = target_maps.distances(labels)
    expected = np.arange(10, 0, -1) / 10  # deepest at the frame
    np.testing.assert_allclose(to_boundary[:, :10], np.broadcast_to(expected, (9, 10)), atol=1e-6)
    full = np.full((6, 8), 3, np.uint16)
    to_centre, to_boundary = target_maps.distances(full)
    np.testing.assert_array_equal(to_boundary, 1)
    assert (to_centre[0, 0], to_centre[-1, -1]) == (0, 1)  # every pixel is as deep: the first is the centre
    assert not target_maps.boundary(full).any()


def test_cells_that_touch_are_outside_of_each_other() -> None:
    labels = np.repeat(np.array([[1, 2, 0]], np.uint16), 5, axis=1).repeat(4, axis=0)
    _, to_boundary = target_maps.distances(labels)
    np.testing.assert_allclose(to_boundary[2], [1, 0.8, 0.6, 0.4, 0.2, 1 / 3, 2 / 3, 1, 2 / 3, 1 / 3] + 5 * [0])
    np.testing.assert_array_equal(np.flatnonzero(target_maps.boundary(labels)[2]), [4, 5, 9, 10])


@settings(max_examples=40)
@given(SHAPES, SEEDS)
def test_boundaries_are_where_neighbours_differ(shape: tuple[int, int], seed: int) -> None:
    labels = cells(np.random.default_rng(seed), shape)
    around = np.lib.stride_tricks.sliding_window_view(np.pad(labels, 1, mode="edge"), (3, 3)).reshape(*shape, 9)
    np.testing.assert_array_equal(target_maps.boundary(labels), (around != around[..., :1]).any(axis=2))


@pytest.mark.parametrize("targets", CHANNELS)
@settings(max_examples=20)
@given(shape=SHAPES, seed=SEEDS)
def test_planes_hold_what_was_packed(targets: Targets, shape: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    image, border = rng.integers(0, 256, (2, *shape), np.uint8)
    labels = cells(rng, shape)
    labels[0, 0], border[0, 0] = 65_535, 255
    packed = target_maps.pack(labels, border)
    assert (packed.dtype, packed.shape) == (np.uint32, shape)
    np.testing.assert_array_equal(packed & 0xFFFF, labels)
    np.testing.assert_array_equal(packed >> 16, border)
    draw_target_maps = target_maps.draw_target_maps(image, packed, targets)
    assert (draw_target_maps.dtype, draw_target_maps.shape) == (np.uint8, (2 + len(CHANNELS[targets]), *shape))
    out = np.full_like(draw_target_maps, 99)
    assert target_maps.draw_target_maps(image, packed, targets, out) is out
    for drawn in (draw_target_maps, out):
        np.testing.assert_array_equal(drawn[:3], [image, labels > 0, border])
        if targets == "boundary":
            np.testing.assert_array_equal(drawn[3], 255 * target_maps.boundary(labels))
        elif targets == "distance":
            distances = np.stack(target_maps.distances(labels))
            clear = alone(labels, distances[1])
            np.testing.assert_allclose(drawn[3:, clear] / 255, distances[:, clear], atol=0.502 / 255)


def test_the_same_labels_give_the_same_fields() -> None:
    rng = np.random.default_rng(0)
    labels = [cells(rng, (70, 90)) for _ in range(20)]
    first = [np.stack(target_maps.distances(image)) for image in labels]
    for _ in range(20):
        kept = [np.empty(rng.integers(1, 3000)) for _ in range(20)]  # so that memory is handed out differently
        np.testing.assert_array_equal(np.stack([np.stack(target_maps.distances(image)) for image in labels]), first)
        del kept
