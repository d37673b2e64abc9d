"""The network's maps -> instance labels, by a watershed whose seeds are the peaks of a height map.

1. a pixel is cell where its foreground probability is over a threshold
2. the height is highest in the middle of a cell; what it is made of depends on what the network learnt (`height`)
3. from each peak a basin is flooded downwards, inside the foreground
4. basins that meet high up, compared with the lower of their peaks, are one cell: a peak counts where it stands out by
   `prominence` (the h-maxima of Soille, Morphological Image Analysis, 2003, chapter 6; basins joined at their saddles)
5. small cells go, small holes are filled

An instance's score is the mean foreground probability of its pixels: 0 to 1, what detections are ranked by in AP.
"""

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from raylivecell.core.settings import StrictModel
from raylivecell.ingest.target_maps import SQUARE
from raylivecell.recipe import Targets

Labels = NDArray[np.int32]
Maps = NDArray[np.float32]
# A distance transform in pixels as a height of 0 to 1: a cell of LIVECell is seldom 32 pixels deep.
DEEPEST = 32.0


class InstanceConfig(StrictModel):
    """How maps become cells; `evaluate --calibrate` chooses the values on validation images."""

    foreground: float = Field(0.5, gt=0, lt=1)
    """A pixel is cell where its probability is over this."""
    smoothing: float = Field(1.0, ge=0)
    """Sigma of the Gaussian that smooths the height, pixels."""
    prominence: float = Field(0.1, ge=0, le=1)
    """A peak of the height (0 to 1) is a cell of its own where the way to a higher one leads down by this or more."""
    smallest: int = Field(20, ge=0)
    """Cells of fewer pixels are left out."""


def default(targets: Targets) -> InstanceConfig:
    """Values to begin with."""
    return InstanceConfig(prominence={"foreground": 0.03, "boundary": 0.1, "distance": 0.1}[targets])


def segment(maps: Maps, targets: Targets, config: InstanceConfig) -> Labels:
    """Labels int32 (H, W), 0 background, 1 to N without gaps, of maps float32 (C, H, W) as `recipe.CHANNELS`."""
    cell = maps[0] > config.foreground
    if not cell.any():
        return np.zeros(cell.shape, np.int32)
    heights = height(maps, cell, targets)
    if config.smoothing:
        cv2.GaussianBlur(heights, (0, 0), config.smoothing, dst=heights)
    heights[~cell] = 0
    return _cleaned(_joined(_basins(heights, cell), heights, config.prominence), config.smallest)


def height(maps: Maps, cell: NDArray[np.bool_], targets: Targets) -> NDArray[np.float32]:
    """What is highest in the middle of cells: float32 (H, W), 0 to 1.

    foreground: the distance to the outside of the mask. boundary: foreground and no boundary. distance: the mean of
    nearness to the centre and distance to the boundary.
    """
    if targets == "foreground":
        depth = cv2.distanceTransform(cell.view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        # OpenCV 5 rounds roots up or down by where the array lies in memory; squares are whole numbers.
        squares = np.rint(np.square(np.minimum(depth, np.float32(DEEPEST))))
        return np.asarray(np.sqrt(squares) / np.float32(DEEPEST), np.float32)
    if targets == "boundary":
        return maps[0] * (1 - maps[1])
    return ((1 - maps[1] + maps[2]) / 2).astype(np.float32, copy=False)


def scores(labels: Labels, probability: NDArray[np.float32]) -> NDArray[np.float64]:
    """Mean of the foreground probability (H, W) over each instance of `labels` (1 to N), float64 (N,)."""
    flat = labels.ravel()
    counts = np.bincount(flat)
    return (np.bincount(flat, probability.ravel()) / np.maximum(counts, 1))[1:]


def _basins(heights: NDArray[np.float32], cell: NDArray[np.bool_]) -> Labels:
    """A basin for each peak."""
    from skimage.segmentation import watershed  # 0.2 s

    peaks = (cv2.dilate(heights, SQUARE) == heights) & cell
    seeds = cv2.connectedComponents(peaks.view(np.uint8))[1]
    return watershed(-heights, seeds, mask=cell)


def _joined(basins: Labels, heights: NDArray[np.float32], prominence: float) -> Labels:
    """Basins whose peaks do not stand out, joined to the neighbour over the highest saddle."""
    count = int(basins.max()) + 1
    inside = np.flatnonzero(basins)
    peak = np.zeros(count, np.float32)
    np.maximum.at(peak, basins.ravel()[inside], heights.ravel()[inside])
    low, high, saddle = _saddles(basins, heights)
    parent = list(range(count))
    top = peak.tolist()

    def root(basin: int) -> int:
        while parent[basin] != basin:
            parent[basin] = basin = parent[parent[basin]]
        return basin

    for a, b, level in zip(low.tolist(), high.tolist(), saddle.tolist()):  # highest saddle first
        a, b = root(a), root(b)
        if a == b:
            continue
        if top[a] < top[b]:
            a, b = b, a
        if top[b] - level < prominence:
            parent[b] = a
    return np.array([root(basin) for basin in range(count)], np.int32)[basins]


def _saddles(basins: Labels, heights: NDArray[np.float32]) -> tuple[NDArray, NDArray, NDArray]:
    """Pairs of basins that touch (4-neighbours) and the highest place on the border between them, highest first."""
    ones, twos, levels = [], [], []
    for here, there in (((slice(None), slice(1, None)), (slice(None), slice(-1))), ((slice(1, None),), (slice(-1),))):
        a, b = basins[here], basins[there]
        touch = (a != b) & (a > 0) & (b > 0)
        ones.append(a[touch])
        twos.append(b[touch])
        levels.append(np.minimum(heights[here][touch], heights[there][touch]))
    one, two, level = np.concatenate(ones), np.concatenate(twos), np.concatenate(levels)
    order = np.argsort(-level, kind="stable")
    low, high, level = np.minimum(one, two)[order], np.maximum(one, two)[order], level[order]
    first = np.sort(np.unique(low.astype(np.int64) * (int(basins.max()) + 1) + high, return_index=True)[1])
    return low[first], high[first], level[first]


def _cleaned(labels: Labels, smallest: int) -> Labels:
    """Without instances of fewer pixels than `smallest` and without their small holes, numbered 1 to N."""
    sizes = np.bincount(labels.ravel())
    keep = sizes >= max(smallest, 1)
    keep[0] = False
    table = np.where(keep, np.cumsum(keep), 0).astype(np.int32)
    return _filled(table[labels], smallest)


def _filled(labels: Labels, largest: int) -> Labels:
    """Holes of fewer pixels than `largest` inside one instance, given to it."""
    _, parts, stats, _ = cv2.connectedComponentsWithStats((labels == 0).view(np.uint8), connectivity=4)
    height, width = labels.shape
    left, top, w, h, area = stats.T
    small = (area < largest) & (left > 0) & (top > 0) & (left + w < width) & (top + h < height)
    small[0] = False  # what is no hole
    flat = labels.ravel()
    inside = np.flatnonzero(small[parts])
    part = parts.ravel()[inside]
    around = np.concatenate([flat[inside + step] for step in (-width, -1, 1, width)])
    owner, owned = np.zeros(len(stats), np.int32), np.tile(part, 4)[around > 0]
    around = around[around > 0]
    owner[owned] = around
    owner[owned[owner[owned] != around]] = 0  # more than one instance around it
    flat[inside] = owner[part]
    return labels
