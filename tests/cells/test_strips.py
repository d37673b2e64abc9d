"""Overlapping windows and strips, compared with processing the complete image at once."""

import itertools
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

from raylivecell.cells import strips, watershed
from raylivecell.cells.watershed import InstanceConfig
from raylivecell.network import forward
from raylivecell.network import windows as tiles
from raylivecell.scoring import instance_scores
from raylivecell.targets import sample_planes
from raylivecell.targets.registry import NAMES, Targets, target

Network = Callable[[np.ndarray], np.ndarray]
WINDOW, HALO = 64, 48
SIZES = st.tuples(st.integers(1, 210), st.integers(1, 210))
SEEDS = st.integers(0, 10**6)


def mosaic(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Labels of adjacent and overlapping ellipses, also across every strip edge; up to 24 rows high, half of HALO."""
    labels = np.zeros(shape, np.uint16)
    for label in range(1, 2 + shape[0] * shape[1] // 250):
        centre = [int(rng.integers(0, size)) for size in shape[::-1]]
        axes = rng.integers(5, 13, 2).tolist()
        cv2.ellipse(labels, centre, axes, rng.uniform(0, 180), 0, 360, label, -1)
    return labels


def encoded(labels: np.ndarray, targets: Targets) -> tuple[np.ndarray, Network]:
    """An image whose pixels encode the ideal maps at that pixel, and the network that decodes them."""
    planes = sample_planes.draw(np.zeros(labels.shape, np.uint8), labels.astype(np.uint32), targets)
    cell, maps = planes[sample_planes.FOREGROUND], planes[sample_planes.MAPS]
    if targets == "foreground":
        return cell, lambda image: (image > 0)[None].astype(np.float32)
    if targets == "boundary":
        return cell + 2 * (maps[0] > 0), lambda image: np.stack([image & 1, image >> 1]).astype(np.float32)
    height = (255 - maps[0].astype(np.int32) + maps[1]) // 4  # 0 to 127

    def distances(image: np.ndarray) -> np.ndarray:
        height = (image & 127) / np.float32(127)
        return np.stack([image >> 7, 1 - height, height]).astype(np.float32)

    return (cell * (128 + height)).astype(np.uint8), distances


def blurred(network: Network) -> Network:
    """A network that uses neighbouring pixels, which are missing at the edges of its window."""
    return lambda image: np.stack([cv2.blur(plane, (3, 3)) for plane in network(image)])


def grey(image: np.ndarray) -> np.ndarray:
    """Two maps that depend only on the pixel itself."""
    return np.stack([image, 255 - image]).astype(np.float32)


@settings(max_examples=60)
@given(SIZES, st.integers(1, 80), SEEDS)
def test_bands_are_the_maps_of_the_complete_image_row_by_row(shape: tuple[int, int], window: int, seed: int) -> None:
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
        maps[:] = np.nan  # must not affect later bands
    assert row == shape[0]
    assert set(windows) == {((min(window, shape[0]), min(window, shape[1])), np.dtype(np.uint8), True)}


def test_maps_of_an_image_that_fits_in_a_window_are_unchanged() -> None:
    image = np.random.default_rng(0).integers(0, 256, (31, 64), np.uint8)
    maps = np.random.default_rng(1).random((3, 31, 64), np.float32)
    bands = [band for _, band in tiles.bands(lambda _: maps, image, 64)]
    np.testing.assert_array_equal(np.concatenate(bands, axis=1), maps)


@settings(max_examples=30)
@given(st.tuples(st.integers(3, 200), st.integers(3, 200)))
def test_window_edges_hardly_count_inside_the_image(shape: tuple[int, int]) -> None:
    """Each window has an error of 1 in its outermost pixels; the windows that overlap it have none there."""

    def network(pixels: np.ndarray) -> np.ndarray:
        error = np.ones((1, *pixels.shape), np.float32)
        error[:, 1:-1, 1:-1] = 0
        return error

    error = np.concatenate([maps for _, maps in tiles.bands(network, np.zeros(shape, np.uint8), 64)], axis=1)[0]
    assert error[1:-1, 1:-1].max() < 0.01
    np.testing.assert_allclose(error[[0, -1]], 1, atol=1e-5)  # no other window covers the image edge


def test_maps_of_another_size_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"\(1, 1, 1\) of a window \(64, 64\)"):
        next(tiles.bands(lambda _: np.zeros((1, 1, 1), np.float32), np.zeros((99, 99), np.uint8), 64))


def assert_same(labels: np.ndarray, expected: np.ndarray, exceptions: int = 0) -> None:
    """Check for equal numbers of cells and a counterpart of each cell, with at most `exceptions` exceptions.

    Where the maps are equal, the order of flooding assigns a pixel between two cells to either: up to five of 37.
    """
    pairs = instance_scores.overlaps(labels, expected)
    assert abs(pairs.cells - pairs.true_cells) <= exceptions
    assert instance_scores.true_positives(pairs, 0.75) >= pairs.true_cells - exceptions


@pytest.mark.parametrize("targets", NAMES)
@pytest.mark.parametrize("uses_neighbours", [False, True])
@settings(max_examples=40)
@given(shape=SIZES, seed=SEEDS)
def test_strips_give_the_cells_of_the_complete_image(
    targets: Targets, uses_neighbours: bool, shape: tuple[int, int], seed: int
) -> None:
    """Maps of a network that uses neighbours differ by about 0.002 at window edges, enough to merge at some saddles."""
    image, network = encoded(mosaic(np.random.default_rng(seed), shape), targets)
    network = blurred(network) if uses_neighbours else network
    maps = network(image)
    config = watershed.default(targets)
    expected = watershed.segment(maps, targets, config)
    labels, scores, foreground = strips.segment(network, image, targets, config, WINDOW, HALO)
    assert (labels.dtype, labels.shape, scores.dtype, foreground.dtype) == (np.int32, shape, np.float64, np.bool_)
    np.testing.assert_array_equal(np.unique(labels[labels > 0]), np.arange(1, len(scores) + 1))
    assert_same(labels, expected, exceptions=2 + expected.max() // 50 if uses_neighbours else 0)
    assert (foreground != (maps[0] > config.threshold)).mean() < 0.01 * uses_neighbours + 1e-9
    np.testing.assert_allclose(scores, watershed.scores(labels, target(targets).confidence(maps, labels)), atol=0.01)


def test_a_strip_owns_no_cell_whose_neighbours_it_cuts() -> None:
    """The rest of a cut neighbour, without its peak, would be merged into the cell."""
    config = watershed.default("foreground")
    for seed in range(25):
        image, network = encoded(mosaic(np.random.default_rng(seed), (260, 200)), "foreground")
        labels, _, _ = strips.segment(network, image, "foreground", config, WINDOW, HALO)
        assert_same(labels, watershed.segment(network(image), "foreground", config))


@pytest.mark.parametrize("targets", NAMES)
@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 300), st.integers(3, 300)), max_size=6), st.integers(12, 40))
def test_cells_of_any_height_are_complete(targets: Targets, bars: list[tuple[int, int]], halo: int) -> None:
    """Bars of up to 300 rows; a strip contains at most 2 * 40 + 36 of them."""
    labels = np.zeros((320, 90), np.uint16)
    for label, (top, height) in enumerate(bars, 1):
        labels[top : top + height, 14 * label - 10 : 14 * label] = label
    image, network = encoded(labels, targets)
    config = InstanceConfig(prominence=1, smoothing=0)
    cells, scores, _ = strips.segment(network, image, targets, config, window=48, halo=halo)
    pairs = instance_scores.overlaps(cells, labels)
    np.testing.assert_array_equal(pairs.iou, 1)
    assert pairs.cells == pairs.true_cells == len(pairs.iou)
    expected = watershed.scores(cells, target(targets).confidence(network(image), cells))
    heights = np.array([np.ptp(np.nonzero(cells == label)[0]) + 1 for label in range(1, 1 + len(scores))])
    in_one_strip = heights <= (halo if targets == "distance" else 320)  # distances in a part are not those of the cell
    np.testing.assert_allclose(scores[in_one_strip], expected[in_one_strip], atol=1e-6)


def test_exactly_one_of_two_strips_owns_a_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    """No cell is lost or duplicated if all cells are two rows longer in every second strip."""
    image = np.zeros((163, 64), np.uint8)
    for y in range(5, 150, 15):
        image[y : y + 12, 10:50] = 1
    config, network = InstanceConfig(prominence=1), encoded(image, "foreground")[1]
    segment, calls = watershed.segment, itertools.count()
    expected = segment(network(image), "foreground", config)

    def longer_every_second_time(maps: np.ndarray, *args: object) -> tuple[np.ndarray, np.ndarray]:
        cells = segment(maps, *args)
        if next(calls) % 2:
            cells[2:] = np.maximum(cells[2:], cells[:-2])
        return cells, maps[0]

    monkeypatch.setattr(watershed, "segment_with_confidence", longer_every_second_time)
    for halo in range(16, 40):
        labels, _, _ = strips.segment(network, image, "foreground", config, 48, halo)
        assert labels.max() == expected.max() == 10
        assert instance_scores.true_positives(instance_scores.overlaps(labels, expected), 0.8) == 10


def test_a_cell_continues_the_one_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Full-height bars one column apart, shifted three columns to the left in every second strip."""
    calls, columns = itertools.count(), np.arange(60)

    def shifted_every_second_time(maps: np.ndarray, *_: object) -> tuple[np.ndarray, np.ndarray]:
        shifted = columns + 3 * (next(calls) % 2)
        return np.broadcast_to((shifted // 12 + 1) * (shifted % 12 > 0), maps.shape[1:]).astype(np.int32), maps[0]

    monkeypatch.setattr(watershed, "segment_with_confidence", shifted_every_second_time)
    config = InstanceConfig(min_area=0)
    labels, _, _ = strips.segment(grey, np.ones((300, 60), np.uint8), "foreground", config, 48, 20)
    bars = labels.reshape(300, 5, 12)
    assert (bars[:, :, 3:9] == bars[:1, :, 3:4]).all()
    assert len(set(bars[0, :, 3].tolist())) == 5
    gaps = bars[:, :, 9]
    assert ((gaps == 0) | (gaps == bars[:, :, 8])).all()
    assert (gaps == 0).any()


def test_an_image_without_cells_and_a_halo_of_zero() -> None:
    def empty(pixels: np.ndarray) -> np.ndarray:
        return np.zeros((1, *pixels.shape), np.float32)

    image = np.zeros((150, 70), np.uint8)
    labels, scores, foreground = strips.segment(empty, image, "foreground", InstanceConfig(), 64, 16)
    assert (labels.any(), scores.shape, foreground.any()) == (False, (0,), False)
    with pytest.raises(ValueError, match="halo is 0"):
        strips.segment(empty, image, "foreground", InstanceConfig(), 64, 0)


@pytest.mark.parametrize("shape", [(1030, 70), (70, 1030), (1100, 1100)])
def test_torch_networks_are_blended_alike(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = nn.Conv2d(1, 2, 3, padding=1)
    images = torch.randint(0, 256, (2, *shape), dtype=torch.uint8)
    expected = forward.logits(network, images)
    monkeypatch.setattr(tiles, "WHOLE_PIXELS", 1)
    in_windows = forward.logits(network, images)
    torch.testing.assert_close(in_windows, expected, atol=2e-2, rtol=0)
    assert not torch.equal(in_windows, expected)


MEMORY = """
    import numpy as np
    from raylivecell.cells import strips
    from raylivecell.cells.watershed import InstanceConfig

    squares = (np.arange(40) - 20) ** 2
    image = np.tile((np.add.outer(squares, squares) < 150).astype(np.uint8), (250, 250))

    def network(pixels):
        return np.broadcast_to(pixels, (3, *pixels.shape)).astype(np.float32)

    labels, scores, _ = strips.segment(network, image, "distance", InstanceConfig())
    with open("/proc/self/status") as status:
        peak = next(line.split()[1] for line in status if line.startswith("VmHWM"))
    print(labels.max(), scores.min(), peak)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory in /proc")
def test_memory_is_bounded() -> None:
    """10,000 x 10,000 pixels and 62,500 cells: image, labels and foreground take 0.6 GB, the maps would take 1.2 GB."""
    command = [sys.executable, "-c", textwrap.dedent(MEMORY)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    cells, score, peak_kib = map(float, done.stdout.split())
    assert (cells, round(score, 3)) == (62_500, 0.52)  # the distances of this network are not those of its cells
    assert peak_kib * 1024 < 1.6e9
