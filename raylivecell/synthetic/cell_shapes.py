"""Positions and masks of synthetic cells: the ground truth from which `optics` renders the image.

1. `place`: sample centres and sizes; colonies grow by placing a new cell next to an existing one.
2. `_outlines`: free shape of a cell: an irregular ellipse, plus tapered, bent processes for some cell lines.
3. `draw_masks`: each pixel is assigned to the cell whose centre is nearest (in units of its radius), so that crowded
   cells have the straight borders of a confluent layer; then a few cells grow over their neighbours' edges.

Lengths are in pixels, areas in square pixels, angles in radians. The parameters of a cell line were measured on 14 real
LIVECell images (cells per image, median area, foreground fraction, grey-level profile across the contour) or estimated
by eye.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

HEIGHT, WIDTH = 520, 704
CELLS = (40, 750)
"""Minimum and maximum cells per image; the images of livecell-mini have 42 to 768."""
MAX_OVERLAP = 0.02
"""Maximum fraction of foreground pixels in two cells; LIVECell's is up to 0.03; 0.01 is left for polygon rounding."""

Floats = NDArray[np.float64]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Kind:
    """Appearance of one cell line. Pairs are ranges (low, high), sampled uniformly unless documented otherwise."""

    name: str
    cells: tuple[int, int]
    """Cells per image; log-uniform."""
    radius: float
    """Median radius of a cell's body; log-normal with standard deviation `spread`."""
    spread: float
    aspect: tuple[float, float]
    """Length over width of the body."""
    ragged: float
    """Depth of the outline's waves, as a fraction of the radius."""
    processes: tuple[int, int]
    """Number of tapered processes per cell (inclusive)."""
    reach: tuple[float, float]
    """Length of a process from the centre, in radii."""
    process_width: float
    """Half width of a process at its base, in radii."""
    gather: float
    """Probability of placing a new cell next to an existing one instead of at a random position."""
    tight: float
    """Minimum distance of two centres divided by the sum of their radii; below 1, neighbours deform each other."""
    rounded: float
    """Fraction of rounded-up cells: smaller, circular, bright, on top of the others."""
    rim: float
    """Grey levels of the bright line along the contour; `dark`: of the dark line inside it."""
    dark: float
    grain: float
    """Standard deviation of the fine texture in grey levels; `vesicles`: of its dots."""
    vesicles: float
    nucleus: float
    """Grey levels of the line around the nucleus."""
    psf: tuple[float, float]
    """Range of the image blur (sigma)."""
    debris: float
    """Mean number of specks per image."""


KINDS = (
    Kind("A172", (90, 280), 17.5, 0.34, (1.1, 2.6), 0.22, (1, 3), (1.4, 3.0), 0.6, 0.85, 0.8, 0.04, 8, 4, 5.5, 5, 7,
         (0.38, 0.5), 12),
    Kind("BT474", (120, 420), 11.8, 0.28, (1.0, 1.7), 0.16, (0, 1), (1.2, 1.6), 0.6, 0.96, 0.72, 0.03, 12, 6, 6, 5, 8,
         (0.38, 0.55), 45),
    Kind("BV2", (200, 720), 8.2, 0.08, (1.0, 1.12), 0.04, (0, 0), (1.0, 1.2), 0.2, 0.84, 0.86, 0.85, 32, 20, 15, 9, 5,
         (0.45, 0.6), 25),
    Kind("Huh7", (48, 150), 18.5, 0.36, (1.0, 1.7), 0.18, (0, 2), (1.2, 1.6), 0.6, 0.78, 0.78, 0.06, 5, 2, 6, 7, 9,
         (0.36, 0.5), 60),
    Kind("MCF7", (130, 720), 8.9, 0.24, (1.0, 1.8), 0.16, (0, 1), (1.2, 1.6), 0.5, 0.975, 0.7, 0.025, 15, 7, 11, 6, 10,
         (0.38, 0.55), 18),
    Kind("SHSY5Y", (150, 430), 6.8, 0.22, (1.6, 3.2), 0.12, (3, 6), (1.8, 4.6), .6, 0.93, 0.76, 0.04, 10, 7, 6, 4, 6,
         (0.6, 0.8), 14),
    Kind("SkBr3", (130, 330), 9.6, 0.14, (1.0, 1.3), 0.06, (0, 1), (1.1, 1.4), 0.35, 0.45, 0.92, 0.76, 25, 18, 11, 8,
         9, (0.5, 0.7), 20),
    Kind("SKOV3", (50, 150), 17.0, 0.36, (1.0, 2.0), 0.16, (0, 2), (1.2, 1.8), 0.5, 0.55, 0.88, 0.1, 11, 5, 6, 7, 11,
         (0.5, 0.7), 12),
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """Parameters of one cell: centre, body radius, length over width, direction, whether it is rounded up."""

    x: float
    y: float
    radius: float
    aspect: float
    angle: float
    rounded: bool


@dataclass
class Mask:
    """Mask of a cell: `pixels` (h, w) uint8 0/1, its top left corner at (x, y) in the image."""

    cell: Cell
    x: int
    y: int
    pixels: Bytes
    spines: list[Floats]
    """Centre lines of its processes, (V, 2) x, y."""

    @property
    def window(self) -> tuple[slice, slice]:
        """Slices (rows, columns) of the image that `pixels` covers."""
        height, width = self.pixels.shape
        return slice(self.y, self.y + height), slice(self.x, self.x + width)


def place(kind: Kind, count: int, rng: np.random.Generator) -> list[Cell]:
    """Sample about `count` cells of `kind`, fewer if they do not fit; centres may be slightly outside the image."""
    cells: list[Cell] = []
    placed = np.empty((count, 3))
    for _ in range(count * 12):
        if len(cells) == count:
            break
        cell = _sample_cell(kind, placed[: len(cells)], rng)
        x, y, radii = placed[: len(cells)].T
        too_close = np.hypot(x - cell.x, y - cell.y) < kind.tight * (radii + cell.radius)
        # A rounded cell may be on top of one flat cell.
        if too_close.sum() > (1 if cell.rounded and kind.rounded < 0.5 else 0):
            continue
        placed[len(cells)] = cell.x, cell.y, cell.radius
        cells.append(cell)
    return cells


def _sample_cell(kind: Kind, placed: Floats, rng: np.random.Generator) -> Cell:
    rounded = bool(rng.random() < kind.rounded)
    radius = kind.radius * float(np.exp(kind.spread * np.clip(rng.normal(), -2, 2.2)))
    if rounded and kind.rounded < 0.5:
        radius = float(np.clip(kind.radius * 0.62, 6.5, 10.5)) * rng.uniform(0.8, 1.2)
    aspect = rng.uniform(1.0, 1.12) if rounded else rng.uniform(*kind.aspect)
    if len(placed) and rng.random() < kind.gather:
        x, y, other_radius = placed[rng.integers(len(placed))]
        angle = rng.uniform(0, 2 * np.pi)
        step = kind.tight * (radius + other_radius) * rng.uniform(1.0, 1.25)
        x, y = x + step * np.cos(angle), y + step * np.sin(angle)
    else:
        x, y = rng.uniform(0, WIDTH), rng.uniform(0, HEIGHT)
    x = float(np.clip(x, -0.3 * radius, WIDTH + 0.3 * radius))
    y = float(np.clip(y, -0.3 * radius, HEIGHT + 0.3 * radius))
    return Cell(x, y, radius, aspect, rng.uniform(0, np.pi), rounded)


def _body(cell: Cell, ragged: float, scale: float, rng: np.random.Generator) -> Floats:
    """Draw the outline of a body of area about pi (scale radius)^2: a wavy ellipse or one with 5 to 8 corners."""
    if cell.rounded or rng.random() < 0.35:
        theta = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        waves = np.arange(2, 8)
        depth = ragged * rng.normal(size=6) / waves**0.8
        radius_factor = 1 + (depth[:, None] * np.cos(waves[:, None] * theta + rng.uniform(0, 2 * np.pi, (6, 1)))).sum(0)
    else:
        corners = rng.integers(5, 9)
        theta = (np.arange(corners) + rng.uniform(-0.3, 0.3, corners)) * (2 * np.pi / corners)
        # A hexagon needs 1.15 times the radius of a circle of equal area.
        radius_factor = 1.15 * np.exp(1.3 * ragged * rng.normal(size=corners))
    reach = cell.radius * scale * np.clip(radius_factor, 0.5, 1.8)
    along, across = reach * np.cos(theta) * cell.aspect**0.5, reach * np.sin(theta) / cell.aspect**0.5
    return _turned(cell, along, across)


def _turned(cell: Cell, along: Floats, across: Floats) -> Floats:
    cos, sin = np.cos(cell.angle), np.sin(cell.angle)
    return np.stack([cell.x + along * cos - across * sin, cell.y + along * sin + across * cos], axis=1)


def _process(cell: Cell, kind: Kind, end: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Draw outline and centre line of a tapered, bent process; even and odd `end` are at opposite body poles."""
    t = np.linspace(0, 1, 12)
    length = cell.radius * rng.uniform(*kind.reach) * cell.aspect**0.5
    heading = end * np.pi + rng.normal(0, 0.5 if end < 2 else 1.1) + rng.normal(0, 0.7) * t
    along, across = np.cumsum(np.cos(heading)) * length / 12, np.cumsum(np.sin(heading)) * length / 12
    # At least 1.6 px at the tip: LIVECell's annotators drew neurites 3 to 5 px wide.
    half = np.maximum(kind.process_width * cell.radius * (1 - t) ** 2.5, 1.6)
    side = np.stack([-np.sin(heading), np.cos(heading)]) * half
    left = _turned(cell, along + side[0], across + side[1])
    right = _turned(cell, along - side[0], across - side[1])
    return np.concatenate([left, right[::-1]]), _turned(cell, along, across)


def _outlines(cell: Cell, kind: Kind, rng: np.random.Generator) -> tuple[list[Floats], list[Floats]]:
    """Draw closed outlines (V, 2) x, y, whose union is the cell's free shape, and the centre lines of its processes."""
    if cell.rounded:
        return [_body(cell, 0.03, 1.0, rng)], []
    # Crowded cells are drawn larger, because neighbours reduce them.
    is_crowded = kind.tight < 0.85
    body = _body(cell, kind.ragged, 1.3 if is_crowded else 1.0, rng)
    ends = rng.integers(kind.processes[0], kind.processes[1] + 1)
    processes = [_process(cell, kind, end, rng) for end in range(ends)]
    return [body, *(outline for outline, _ in processes)], [spine for _, spine in processes]


def _rasterise(cell: Cell, kind: Kind, rng: np.random.Generator) -> Mask | None:
    """Rasterise the free shape inside the image; None if it is outside."""
    outlines, spines = _outlines(cell, kind, rng)
    points = np.concatenate(outlines)
    x0, y0 = np.maximum(np.floor(points.min(0)).astype(int) - 1, 0)
    x1, y1 = np.minimum(np.ceil(points.max(0)).astype(int) + 2, (WIDTH, HEIGHT))
    if x1 - x0 < 4 or y1 - y0 < 4:
        return None
    pixels = np.zeros((y1 - y0, x1 - x0), np.uint8)
    for outline in outlines:
        # 4 fractional bits; pixel centres are at +0.5 in image coordinates.
        fixed = np.round((outline - (x0 + 0.5, y0 + 0.5)) * 16).astype(np.int32)
        cv2.fillPoly(pixels, [fixed], 1, shift=4)
    return Mask(cell, int(x0), int(y0), pixels, spines)


def distance(mask: Mask) -> NDArray[np.float32]:
    """Distances of the mask's pixels to the cell's centre in units of its elliptic radius, (h, w) float32."""
    cell, (height, width) = mask.cell, mask.pixels.shape
    x = np.arange(mask.x, mask.x + width, dtype=np.float32) + 0.5 - cell.x
    y = (np.arange(mask.y, mask.y + height, dtype=np.float32) + 0.5 - cell.y)[:, None]
    cos, sin = np.cos(cell.angle), np.sin(cell.angle)
    along, across = x * cos + y * sin, y * cos - x * sin
    squared = along**2 / cell.aspect + across**2 * cell.aspect
    result: NDArray[np.float32] = (np.sqrt(squared) / cell.radius).astype(np.float32)
    return result


def draw_masks(kind: Kind, cells: list[Cell], rng: np.random.Generator) -> list[Mask]:
    """Draw the masks of cells with at least 40 visible px; at most `MAX_OVERLAP` of the foreground is in two cells."""
    free_masks = [mask for cell in cells if (mask := _rasterise(cell, kind, rng)) is not None]
    lowest_cost = np.full((HEIGHT, WIDTH), np.inf, np.float32)
    owner = np.zeros((HEIGHT, WIDTH), np.int32)
    for number, mask in enumerate(free_masks, 1):
        # Rounded cells are on top: their distance is divided by three.
        cost = distance(mask) * (0.33 if mask.cell.rounded else 1.0)
        is_nearest = (mask.pixels > 0) & (cost < lowest_cost[mask.window])
        lowest_cost[mask.window][is_nearest] = cost[is_nearest]
        owner[mask.window][is_nearest] = number
    visible = []
    for number, mask in enumerate(free_masks, 1):
        mask.pixels = _largest_part(_smooth(owner[mask.window] == number, kind))
        if mask.pixels.sum() >= 40:
            visible.append(mask)
    _add_overlap(visible, rng)
    return visible


def _smooth(assigned: NDArray[np.bool_], kind: Kind) -> Bytes:
    """Round the corners of assigned pixels, except for cell lines with thin processes, which would vanish."""
    pixels = assigned.astype(np.uint8)
    if kind.processes[1] > 2:
        return pixels
    return (cv2.GaussianBlur(pixels * 255, (5, 5), 1.2, borderType=cv2.BORDER_REPLICATE) > 127).astype(np.uint8)


def _largest_part(pixels: Bytes) -> Bytes:
    count, labels, stats, _ = cv2.connectedComponentsWithStats(pixels, connectivity=4)
    if count <= 2:
        return pixels
    return (labels == 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))).astype(np.uint8)


def _add_overlap(masks: list[Mask], rng: np.random.Generator) -> None:
    """Grow some cells over their neighbours' edges by one or two pixels, within `MAX_OVERLAP`."""
    depth = np.zeros((HEIGHT, WIDTH), np.uint8)
    for mask in masks:
        depth[mask.window] += mask.pixels
    budget = MAX_OVERLAP * rng.uniform(0.2, 0.7) * float((depth > 0).sum()) - float((depth > 1).sum())
    element = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (3, 3))
    for index in rng.permutation(len(masks)):
        mask = masks[index]
        dilated = cv2.dilate(mask.pixels, element, iterations=int(rng.integers(1, 3)))
        added = (dilated > 0) & (mask.pixels == 0) & (depth[mask.window] == 1)
        if added.sum() > budget:
            continue
        budget -= float(added.sum())
        mask.pixels = np.where(added, 1, mask.pixels).astype(np.uint8)
        depth[mask.window] += added


def draw_frame_masks(kind: Kind, rng: np.random.Generator) -> list[Mask]:
    """Draw the `CELLS[0]` to `CELLS[1]` masks of one image of `kind`; `rng` determines the result."""
    low, high = kind.cells
    count = int(np.exp(rng.uniform(np.log(low), np.log(high))))
    while True:
        masks = draw_masks(kind, place(kind, count, rng), rng)
        if len(masks) >= CELLS[0]:
            return masks[: CELLS[1]]
        count += CELLS[0] // 4


def polygon(mask: Mask) -> list[float]:
    """Return the contour [x0, y0, x1, y1, ...] of a cell, in LIVECell's coordinates: pixel (0, 0) covers 0 to 1.

    It is traced on a mask interpolated to four times the resolution, so that it runs between pixel centres, and has 5
    to 140 points.
    """
    padded = cv2.copyMakeBorder(mask.pixels * 255, 2, 2, 2, 2, cv2.BORDER_CONSTANT)
    fine = cv2.resize(padded, None, fx=4, fy=4, interpolation=cv2.INTER_LINEAR)
    contours, _ = cv2.findContours((fine > 127).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    contour = max(contours, key=len)
    tolerance = 1.6
    points = cv2.approxPolyDP(contour, tolerance, True)
    while len(points) > 140:
        tolerance *= 1.3
        points = cv2.approxPolyDP(contour, tolerance, True)
    if len(points) < 5:
        points = contour[:: max(1, len(contour) // 12)]
    vertices = (points.reshape(-1, 2) + 0.5) / 4 - 2 + (mask.x, mask.y)
    vertices = np.clip(vertices, 0, (WIDTH, HEIGHT))
    return [round(float(value), 2) for value in vertices.ravel()]
