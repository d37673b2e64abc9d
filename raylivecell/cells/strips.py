"""Cells of an image of any size, in bounded memory. No torch, no Ray.

1. The network's maps arrive in bands of finished rows (network/windows.py).
2. Strips of these rows overlap by a halo and are segmented one after another; each cell is taken from a strip that
   contains it completely.

In addition to the labels, memory contains the maps of at most one row of windows and one strip: 0.8 GB with the
watershed for an image 10,000 pixels wide, whatever its height.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from raylivecell.cells import watershed
from raylivecell.cells.watershed import InstanceConfig, Labels
from raylivecell.network.windows import WINDOW, Maps, Network, bands
from raylivecell.targets.registry import Targets

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
    """Segment an image of any size, with the result of `watershed.segment` on the maps of the complete image.

    A cell of up to 2 `halo` rows is taken from a strip that contains it completely. The parts of a taller cell are
    scored one by one, and joined where the strips meet. If a strip cuts a neighbour of a cell, their common border
    may differ by some pixels from the result on the complete image, but only if one of the two is more than `halo`
    / 2 rows high.

    Args:
        network: returns the maps of a window, channels as in `Target.channels`, 0 to 1.
        image: uint8 (H, W).
        targets: target kind of the network.
        config: thresholds of the watershed.
        window: as in `bands`.
        halo: rows, 1 or more.

    Returns:
        Labels int32 (H, W), 0 background, 1 to N without gaps; scores float64 (N,), the mean confidence in the
        pixels of each cell; and bool (H, W), whether the foreground probability is above its threshold.
    """
    labels, foreground = np.zeros(image.shape, np.int32), np.zeros(image.shape, np.bool_)
    areas, score_sums = np.zeros(1), np.zeros(1)  # by label
    cut = np.zeros(0, np.int32)
    for first, own_end, maps in _strips(bands(network, image, window), image.shape[0], halo):
        rows = slice(first, first + maps.shape[1])
        previous = labels[rows]
        foreground[rows] = maps[0] > config.threshold
        cells, confidence = watershed.segment_with_confidence(maps, targets, config)
        continued = _continued(cells, previous[0], cut)
        new = _owned(cells, own_end - first) & _unlabelled(cells, previous, config.min_area) & (continued == 0)
        numbers = np.where(new, len(areas) - 1 + np.cumsum(new, dtype=np.int32), continued)
        added = np.where(previous == 0, numbers[cells], 0)
        previous += added
        inside = np.flatnonzero(added)
        owner = added.ravel()[inside]
        areas = _add(areas, np.bincount(owner))
        score_sums = _add(score_sums, np.bincount(owner, confidence.ravel()[inside]))
        cut = numbers[np.unique(cells[-1])]
        del maps, cells, confidence, added, inside, owner  # free the memory for the next strip
    return labels, score_sums[1:] / areas[1:], foreground


def _strips(row_bands: Iterable[tuple[int, Maps]], height: int, halo: int) -> Iterator[tuple[int, int, Maps]]:
    """Yield (first row, end of own rows, maps) of each strip; its maps extend `halo` rows beyond its own rows."""
    if halo < 1:
        raise ValueError(f"halo is {halo}; strips must overlap by at least one row")
    strip: Maps | None = None
    for row, band in row_bands:
        bottom = row + band.shape[1]
        strip = band if strip is None else np.concatenate([strip, band], axis=1)
        del band
        yield bottom - strip.shape[1], height if bottom == height else bottom - halo, strip
        strip = strip[:, -2 * halo :].copy()


def _owned(cells: Labels, end: int) -> NDArray[np.bool_]:
    """For each label (0 to N), whether the cell belongs to this strip, whose own rows are those before `end`.

    It does if the middle row of its visible part is an own row. The next strip starts a halo before `end`, this one
    ends a halo after it: a cell that the next strip would cut belongs to this strip, and a cell that only this strip
    cuts belongs to the next.
    """
    rows = [box[0] for box in ndimage.find_objects(cells)]
    return np.array([False, *(row.start + row.stop < 2 * end for row in rows)])


def _unlabelled(cells: Labels, previous: Labels, min_area: int) -> NDArray[np.bool_]:
    """For each label (0 to N), whether most of its pixels, and at least `min_area`, have no label in `previous`."""
    areas = np.bincount(cells.ravel())
    overlap = np.bincount(cells[previous != 0], minlength=len(areas))
    return (areas > 2 * overlap) & (areas - overlap >= min_area)


def _continued(cells: Labels, above: NDArray[np.int32], cut: NDArray[np.int32]) -> NDArray[np.int32]:
    """For each label (0 to N), the label in `cut` of the cell that it continues, or 0.

    `above` are the previous labels of the first row, `cut` the cells that extend beyond the previous strip.
    """
    continued = np.zeros(int(cells.max(initial=0)) + 1, np.int32)
    (label, label_above), counts = np.unique(np.stack([cells[0], above]), axis=1, return_counts=True)
    order = np.argsort(counts, kind="stable")
    continued[label[order]] = label_above[order]  # the most frequent label is written last
    continued[~np.isin(continued, cut)] = 0
    continued[0] = 0
    return continued


def _add(a: NDArray[np.float64], b: NDArray[Any]) -> NDArray[np.float64]:
    """Sum of two vectors, the shorter one padded with zeros."""
    total = np.zeros(max(len(a), len(b)))
    total[: len(a)] += a
    total[: len(b)] += b
    return total
