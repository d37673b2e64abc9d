"""Exact conversion between labels and outlines on pixel corners, the convention of ImageJ, QuPath and GeoJSON.

Pixel (row 0, column 0) is the square from (0, 0) to (1, 1). `trace` follows the pixel edges of each cell, `fill`
applies the rule of ImageJ's PolygonFiller; `fill` of the rings of `trace` gives the same pixels again.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from skimage.measure import label as connected_components

from raylivecell.annotations.drawing import Patch
from raylivecell.annotations.errors import AnnotationError

Ring = NDArray[np.int64]
"""Corners of a closed outline, (V, 2) of x and y in pixels; the first is not repeated at the end."""
Polygon = list[Ring]
"""An exterior ring and its holes. The signed area of the exterior ring (x right, y as stored) is positive."""

MAX_COORDINATE = 2.0**31
MAX_WORK = 2**30
"""Maximum pixels that the outlines of one file may cover, plus maximum rows that their edges may cross."""
CHUNK = 2**20
"""Crossings of edges and rows that are computed together."""


class CellOutline(NamedTuple):
    """Outline of one cell."""

    label: int
    polygons: list[Polygon]
    """One per 4-connected part, valid by RFC 7946: simple rings, which touch each other in single points at most."""


class Budget:
    """Remaining work for the outlines of one untrusted file."""

    def __init__(self, work: int = MAX_WORK) -> None:
        self.work = work

    def spend(self, work: int) -> None:
        """Subtract `work`; AnnotationError if too little is left."""
        self.work -= work
        if self.work < 0:
            raise AnnotationError("the outlines cover the image many times; delete outlines that are not cells")


def trace(labels: NDArray[np.integer[Any]]) -> list[CellOutline]:
    """Trace the pixel edges of each cell, in ascending order of label.

    Args:
        labels: integers (H, W), 0 background; labels may have gaps, and cells any number of parts and holes.
    """
    parts = np.pad(connected_components(labels, background=0, connectivity=1), 1)
    if not parts.any():
        return []
    pixels, sides = _edges(parts)
    order, ring_starts = _order_edges(_successors(parts, pixels, sides))
    pixels, sides = pixels[order], sides[order]
    rows, columns = np.divmod(pixels, parts.shape[1])
    corners = np.stack([columns - 1 + np.isin(sides, (1, 2)), rows - 1 + np.isin(sides, (2, 3))], axis=1)
    # Only corners remain: edges that do not continue the direction of the edge before them in their ring.
    before = np.arange(-1, len(sides) - 1)
    before[ring_starts] = np.append(ring_starts[1:], len(sides)) - 1
    corner = np.flatnonzero(sides != sides[before])
    ring_of_edge = np.repeat(np.arange(len(ring_starts)), np.diff(np.append(ring_starts, len(sides))))
    starts = np.searchsorted(corner, ring_starts)
    rings = np.split(corners[corner], starts[1:])
    part_of_ring = parts.ravel()[pixels[ring_starts]]
    label_of_part = np.zeros(parts.max() + 1, np.int64)
    label_of_part[parts[1:-1, 1:-1].ravel()] = labels.ravel()
    polygons: dict[int, Polygon] = {}
    touching = _self_touching(corners[corner], ring_of_edge[corner])
    for number, (ring, part) in enumerate(zip(rings, part_of_ring.tolist())):
        for simple_ring in _split(ring) if number in touching else [ring]:
            polygon = polygons.setdefault(part, [])
            polygon.insert(0 if doubled_area(simple_ring) > 0 else len(polygon), simple_ring)
    outlines: dict[int, list[Polygon]] = {}
    for part in sorted(polygons, key=lambda part: (label_of_part[part], part)):
        outlines.setdefault(int(label_of_part[part]), []).append(polygons[part])
    return [CellOutline(label, parts_of_cell) for label, parts_of_cell in outlines.items()]


def _edges(parts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Edges between a part and its surroundings: flat index of the pixel inside; side 0 top, 1 right, 2 bottom, 3 left.

    The edges are directed clockwise around their pixel as displayed, and sorted by (pixel, side).
    """
    core, (height, width) = parts[1:-1, 1:-1], parts.shape
    keys = []
    for side, (row, column) in enumerate(((0, 1), (1, 2), (2, 1), (1, 0))):
        neighbours = parts[row : row + height - 2, column : column + width - 2]
        y, x = np.nonzero((core != neighbours) & (core != 0))
        keys.append(((y + 1) * width + x + 1) * 4 + side)
    pixels, sides = np.divmod(np.sort(np.concatenate(keys)), 4)
    return pixels, sides


def _outward(width: int) -> tuple[int, int, int, int]:
    """Offsets in a flat image from a pixel to its neighbour on each side; the direction of the edge one side before."""
    return -width, 1, width, -1


def _successors(parts: NDArray[np.int64], pixels: NDArray[np.int64], sides: NDArray[np.int64]) -> NDArray[np.int64]:
    """Index of the edge that follows each edge in its ring.

    At a corner where two pixels of a part touch diagonally the ring stays with its pixel: parts are 4-connected.
    """
    flat, outward = parts.ravel(), np.array(_outward(parts.shape[1]))
    part = flat[pixels]
    ahead = pixels + outward[(sides + 1) % 4]
    diagonal = ahead + outward[sides]
    turns_right, straight = flat[ahead] != part, flat[diagonal] != part
    next_pixels = np.where(turns_right, pixels, np.where(straight, ahead, diagonal))
    next_sides = np.where(turns_right, (sides + 1) % 4, np.where(straight, sides, (sides + 3) % 4))
    return np.searchsorted(pixels * 4 + sides, next_pixels * 4 + next_sides)


def _order_edges(successors: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sort edges by ring and position in the ring; return (order, index in it of the first edge of each ring).

    Pointer doubling: the smallest index of each ring, then each edge's distance to the end of its ring, in
    log2(length of the longest ring) vectorised steps.
    """
    first, jump = np.arange(len(successors)), successors
    while True:
        smallest = np.minimum(first, first[jump])
        if np.array_equal(smallest, first):
            break
        first, jump = smallest, jump[jump]
    last = successors == first
    distance, jump = np.where(last, 0, 1), np.where(last, np.arange(len(successors)), successors)
    while True:
        further = jump[jump]
        if np.array_equal(further, jump):
            break
        distance, jump = distance + distance[jump], further
    order = np.lexsort((-distance, first))
    ring = first[order]
    return order, np.flatnonzero(np.append(True, ring[1:] != ring[:-1]))


def _self_touching(corners: NDArray[np.int64], rings: NDArray[np.int64]) -> set[int]:
    """Numbers of the rings that pass a corner twice; `rings` has the ring's number of each of `corners` (V, 2)."""
    order = np.lexsort((corners[:, 0], corners[:, 1], rings))
    rows = np.column_stack([corners, rings])[order]
    return set(rows[1:][(rows[1:] == rows[:-1]).all(axis=1), 2].tolist())


def _split(ring: Ring) -> list[Ring]:
    """Split a ring at corners that it passes twice into simple rings."""
    simple_rings: list[Ring] = []
    path: list[tuple[int, int]] = []
    position: dict[tuple[int, int], int] = {}
    for x, y in ring.tolist():
        if (x, y) in position:
            start = position[x, y]
            simple_rings.append(np.array(path[start:], np.int64))
            for corner in path[start:]:
                del position[corner]
            del path[start:]
        position[x, y] = len(path)
        path.append((x, y))
    return [*simple_rings, np.array(path, np.int64)]


def doubled_area(ring: Ring) -> int:
    """Return twice the signed area of a ring: positive if clockwise as displayed (RFC 7946: counterclockwise).

    Of the rings of `trace`, exterior ones are positive and holes negative: the sum is twice the area of the cell.
    """
    x, y = ring[:, 0], ring[:, 1]
    return int(x[:-1] @ y[1:] - x[1:] @ y[:-1] + x[-1] * y[0] - x[0] * y[-1])


def fill(polygons: Iterable[Sequence[NDArray[Any]]], shape: tuple[int, int], budget: Budget) -> Patch:
    """Fill outlines like ImageJ: the pixels whose centre is inside, by the even-odd rule within each polygon.

    Source of the rule: ImageJ's PolygonFiller.java. A centre exactly on an outline is inside at a right or lower border
    and outside at a left or upper border, so that outlines with a common border share no pixel.

    Args:
        polygons: their union is filled; each a sequence of rings, (V, 2) of x and y in pixels, closed or not.
        shape: (H, W) of the image, to which the outlines are clipped.
        budget: of the file.

    Returns:
        A mask of the bounding box in the image; it may be empty.

    Raises:
        AnnotationError: a coordinate that is not finite or over 2^31, or an exhausted budget.
    """
    patches = [_fill_polygon(rings, shape, budget) for rings in polygons]
    patches = [patch for patch in patches if patch.mask.size]
    if len(patches) < 2:
        return patches[0] if patches else _EMPTY
    top, left = min(patch.top for patch in patches), min(patch.left for patch in patches)
    bottom = max(patch.top + patch.mask.shape[0] for patch in patches)
    right = max(patch.left + patch.mask.shape[1] for patch in patches)
    budget.spend((bottom - top) * (right - left))
    union = np.zeros((bottom - top, right - left), np.uint8)
    for row, column, mask in patches:
        union[row - top : row - top + mask.shape[0], column - left : column - left + mask.shape[1]] |= mask
    return Patch(top, left, union)


_EMPTY = Patch(0, 0, np.zeros((0, 0), np.uint8))


def _fill_polygon(rings: Sequence[NDArray[Any]], shape: tuple[int, int], budget: Budget) -> Patch:
    closed = [np.asarray(ring, np.float64).reshape(-1, 2) for ring in rings if len(ring)]
    if not closed:
        return _EMPTY
    start = np.concatenate(closed)
    if not (np.abs(start) < MAX_COORDINATE).all():
        raise AnnotationError("an outline has a coordinate that is not a number of pixels; delete it and save again")
    end = np.concatenate([np.roll(ring, -1, axis=0) for ring in closed])
    height, width = shape
    # A row is crossed if its centre line is: from ceil(y - 0.5) of the upper to that of the lower end, exclusive.
    rows_of_ends = np.ceil(np.stack([start[:, 1], end[:, 1]]) - 0.5)
    first, last = np.clip(rows_of_ends.min(axis=0), 0, height), np.clip(rows_of_ends.max(axis=0), 0, height)
    counts = (last - first).astype(np.int64)
    crossed = np.flatnonzero(counts)
    if not len(crossed):
        return _EMPTY
    start, end, first, counts = start[crossed], end[crossed], first[crossed].astype(np.int64), counts[crossed]
    upper = np.where((start[:, 1] <= end[:, 1])[:, None], start, end)
    slope = (end[:, 0] - start[:, 0]) / (end[:, 1] - start[:, 1])
    corners = np.concatenate(closed)[:, 0]
    left, right = (int(x) for x in np.clip((np.floor(corners.min()), np.floor(corners.max()) + 1), 0, width))
    top, bottom = int(first.min()), int((first + counts).max())
    budget.spend(int(counts.sum()) + (bottom - top) * (right - left))
    toggles = np.zeros((bottom - top, right - left + 1), np.uint8)
    for edges in np.split(np.arange(len(counts)), _chunk_ends(counts)):
        edge = np.repeat(edges, counts[edges])
        rows = np.arange(len(edge)) - np.repeat(np.cumsum(counts[edges]) - counts[edges], counts[edges]) + first[edge]
        # PolygonFiller adds 1e-8 pixels, so that rounding errors do not decide on centres on a border.
        x = upper[edge, 0] + (rows + 0.5 - upper[edge, 1]) * slope[edge] + 1e-8
        columns = np.clip(np.floor(x + 0.5), left, right).astype(np.int64)
        positions, repeats = np.unique((rows - top) * toggles.shape[1] + columns - left, return_counts=True)
        toggles.ravel()[positions] ^= (repeats % 2).astype(np.uint8)
    return Patch(top, left, np.bitwise_xor.accumulate(toggles, axis=1)[:, :-1])


def _chunk_ends(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Indices at which edges with these numbers of crossings are split into chunks of about CHUNK crossings."""
    ends = np.cumsum(counts)
    return np.unique(np.searchsorted(ends, np.arange(CHUNK, int(ends[-1]), CHUNK)) + 1)
