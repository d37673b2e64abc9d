"""The cells of an image of any size, in bounded memory. No torch, no Ray.

1. The network's maps come in bands of finished rows (network/windows.py).
2. A strip of them is segmented together with the last rows of the strip before, and every cell is taken from a strip
   that holds the whole of it.

Apart from the labels, the maps of one row of windows and of one strip are in memory at the most: for an image 10,000
pixels wide 0.8 GB with the watershed, however high it is.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from raylivecell.cells import watershed
from raylivecell.cells.watershed import InstanceConfig, Labels
from raylivecell.network.windows import WINDOW, Maps, Network, bands
from raylivecell.recipe import Targets

HALO = 256
"""Rows above and below a strip that are segmented with it."""


def segment(
    network: Network,
    image: NDArray[np.uint8],
    targets: Targets,
    config: InstanceConfig,
    window: int = WINDOW,
    halo: int = HALO,
) -> tuple[Labels, NDArray[np.float64], NDArray[np.bool_]]:
    """The cells of an image of any size, as `watershed.segment` finds them in the maps of the whole image.

    A cell up to 2 `halo` rows high lies whole in a strip, and is taken from there. Of a higher one the parts that the
    strips show are joined where they meet. Where a strip cuts a cell's neighbour, the border between them may differ
    from the whole image's by some pixels: only if one of them is more than `halo` / 2 rows high.

    Args:
        network: probabilities and distances as `recipe.CHANNELS`, 0 to 1, of a window.
        image: uint8 (H, W).
        targets: what the maps mean.
        config: how they become cells.
        window: as of `bands`.
        halo: rows, 1 or more.

    Returns:
        Labels int32 (H, W), 0 background, 1 to N without gaps; scores float64 (N,), each cell's mean foreground
        probability; and where the foreground's probability is over its threshold, bool (H, W).
    """
    labels, foreground = np.zeros(image.shape, np.int32), np.zeros(image.shape, np.bool_)
    pixels, mass = np.zeros(1), np.zeros(1)  # of each label
    cut = np.zeros(0, np.int32)
    for first, end, maps in _strips(bands(network, image, window), image.shape[0], halo):
        rows = slice(first, first + maps.shape[1])
        painted = labels[rows]
        foreground[rows] = maps[0] > config.foreground
        found = watershed.segment(maps, targets, config)
        heirs = _heirs(found, painted[0], cut)
        new = _ours(found, end - first) & _free(found, painted, config.smallest) & (heirs == 0)
        names = np.where(new, len(pixels) - 1 + np.cumsum(new, dtype=np.int32), heirs)
        fresh = np.where(painted == 0, names[found], 0)
        painted += fresh
        inside = np.flatnonzero(fresh)
        owner = fresh.ravel()[inside]
        pixels = _sum(pixels, np.bincount(owner))
        mass = _sum(mass, np.bincount(owner, maps[0].ravel()[inside]))
        cut = names[np.unique(found[-1])]
        del maps, found, fresh, inside, owner  # before the next strip needs the memory
    return labels, mass[1:] / pixels[1:], foreground


def _strips(found: Iterable[tuple[int, Maps]], height: int, halo: int) -> Iterator[tuple[int, int, Maps]]:
    """(first row, last row that is its own, maps): `halo` rows before what is its own, and after it."""
    if halo < 1:
        raise ValueError(f"halo is {halo}; strips must overlap by a row or more")
    held: Maps | None = None
    for row, band in found:
        bottom = row + band.shape[1]
        held = band if held is None else np.concatenate([held, band], axis=1)
        del band
        yield bottom - held.shape[1], height if bottom == height else bottom - halo, held
        held = held[:, -2 * halo :].copy()


def _ours(found: Labels, end: int) -> NDArray[np.bool_]:
    """Of each label (0 to N), whether the cell is this strip's, whose own rows are those before `end`.

    It is if the middle of what is seen of it lies there. The next strip begins a halo before `end`, this one ends
    as many after it: what the next one would cut is this one's, and what this one cuts and the next one does not
    is the next one's.
    """
    boxes = [box[0] for box in ndimage.find_objects(found)]
    return np.array([False, *(box.start + box.stop < 2 * end for box in boxes)])


def _free(found: Labels, painted: Labels, smallest: int) -> NDArray[np.bool_]:
    """Of each label (0 to N), whether most of the cell's pixels, and at least `smallest`, are not painted yet."""
    every = np.bincount(found.ravel())
    taken = np.bincount(found[painted != 0], minlength=len(every))
    return (every > 2 * taken) & (every - taken >= smallest)


def _heirs(found: Labels, above: NDArray[np.int32], cut: NDArray[np.int32]) -> NDArray[np.int32]:
    """For each label (0 to N) the one of `cut` that the cell goes on with, or 0.

    `above` is what is painted in the first row, `cut` the cells that reach beyond the strip before.
    """
    heirs = np.zeros(int(found.max(initial=0)) + 1, np.int32)
    (one, other), times = np.unique(np.stack([found[0], above]), axis=1, return_counts=True)
    order = np.argsort(times, kind="stable")
    heirs[one[order]] = other[order]  # of several the most frequent: it is written last
    heirs[~np.isin(heirs, cut)] = 0
    heirs[0] = 0
    return heirs


def _sum(one: NDArray[np.float64], other: NDArray[Any]) -> NDArray[np.float64]:
    """Sum of two vectors, the shorter one followed by zeros."""
    total = np.zeros(max(len(one), len(other)))
    total[: len(one)] += one
    total[: len(other)] += other
    return total
