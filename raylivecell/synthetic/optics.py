"""Render masks as an 8-bit phase-contrast-like image with the background at 128.

1. Cells: a bright line along the contour, a dark line inside it, a nucleus with nucleoli; contrast varies along them.
2. Texture inside cells, strongest around the nucleus: noise and dots (vesicles) with a ring of opposite sign.
3. Debris: specks, threads, out-of-focus rings.
4. Optics: blur, then subtraction of the local mean (as LIVECell's images are normalised, so that thresholding
   fails: foreground and background both average 128), uneven gain, stripes, noise.

Grey-level profiles follow real ones: +15 to +22 in the first two pixels of a round cell and -13 to -20 in the fourth;
+3 and -2 for flat cells, which differ from the background by their standard deviation (12 to 14; background 2).
"""

import cv2
import numpy as np
from numpy.typing import NDArray

from raylivecell.synthetic.cell_shapes import HEIGHT, WIDTH, Bytes, Kind, Mask, distance

Image = NDArray[np.float32]


def _noise(rng: np.random.Generator, sigma: float) -> Image:
    """Sample a Gaussian random field (HEIGHT, WIDTH), zero mean, unit standard deviation, smooth over `sigma` px."""
    # Smooth fields are sampled on a coarse grid: same appearance, a tenth of the time.
    step = max(1, int(sigma / 3))
    coarse = rng.standard_normal((HEIGHT // step + 2, WIDTH // step + 2), dtype=np.float32)
    field = cv2.GaussianBlur(coarse, (0, 0), sigma / step)
    if step > 1:
        field = cv2.resize(field, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    field = field[:HEIGHT, :WIDTH]
    return np.asarray((field - field.mean()) / field.std(), np.float32)


def _dots(rng: np.random.Generator, density: float, sigma: float) -> Image:
    """Sample sparse dots, two thirds dark, each with a ring of opposite sign; unit standard deviation."""
    field = np.zeros((HEIGHT, WIDTH), np.float32)
    count = int(density * HEIGHT * WIDTH)
    strength = rng.choice([-1.0, -1.0, 1.0], count) * rng.uniform(0.4, 1.2, count)
    field[rng.integers(0, HEIGHT, count), rng.integers(0, WIDTH, count)] = strength
    field = cv2.GaussianBlur(field, (0, 0), sigma) - cv2.GaussianBlur(field, (0, 0), sigma * 1.8)
    return np.asarray(field / field.std(), np.float32)


def _padded(mask: Mask, pad: int) -> Mask:
    """Enlarge the window of a mask by `pad` px, clipped to the image."""
    height, width = mask.pixels.shape
    top, left = min(pad, mask.y), min(pad, mask.x)
    bottom, right = min(pad, HEIGHT - mask.y - height), min(pad, WIDTH - mask.x - width)
    pixels = cv2.copyMakeBorder(mask.pixels, top, bottom, left, right, cv2.BORDER_CONSTANT, value=0)
    return Mask(mask.cell, mask.x - left, mask.y - top, np.asarray(pixels, np.uint8), [])


def _depth(pixels: Bytes) -> Image:
    """Distance (px) of each pixel inside a cell to its contour, of which the image edge is no part."""
    return np.asarray(cv2.distanceTransform(pixels, cv2.DIST_L2, 3), np.float32)


def _nucleus(mask: Mask, kind: Kind, strength: float, rng: np.random.Generator) -> Image:
    """Grey levels of the nucleus: a thin dark line, a thin bright line inside it, one to three dark nucleoli."""
    cell, (height, width) = mask.cell, mask.pixels.shape
    size = float(np.clip(cell.radius * rng.uniform(0.38, 0.52), 3.0, 10.0))
    shift = rng.normal(0, 0.12 * cell.radius, 2)
    x = np.arange(mask.x, mask.x + width, dtype=np.float32)[None] + 0.5 - cell.x - shift[0]
    y = np.arange(mask.y, mask.y + height, dtype=np.float32)[:, None] + 0.5 - cell.y - shift[1]
    elongation = rng.uniform(1.0, 1.35)
    edge = np.sqrt(x**2 * elongation + y**2 / elongation) - size
    grey = strength * (0.7 * np.exp(-((edge + 1.8) ** 2)) - np.exp(-(edge**2) / 1.3))
    for _ in range(rng.integers(1, 4)):
        centre = rng.normal(0, 0.4 * size, 2)
        grey -= 2.4 * strength * np.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / rng.uniform(1.2, 2.4))
    return np.asarray(grey, np.float32)


def _lines(mask: Mask, depth: Image, kind: Kind, contrast: float, variation_field: Image) -> Image:
    """Grey levels of the bright line on the contour and the dark line inside it."""
    if mask.cell.rounded:
        is_round_line = kind.rounded > 0.5
        rim, dark = (kind.rim, kind.dark) if is_round_line else (max(2.2 * kind.rim, 32.0), max(2.5 * kind.dark, 28.0))
        variation: Image | float = 1.0
    else:
        # The rim of flat cells is only partly visible: its mean in real images is 3, its standard deviation 12.
        rim, dark = kind.rim, kind.dark
        variation = np.clip(0.9 + 0.7 * variation_field[mask.window], 0.15, 2.6)
    bright = np.exp(-(((depth - 1.4) / 0.85) ** 2))
    inner = np.exp(-(((depth - 4.0) / 1.7) ** 2)) + 0.25 * (depth > 3)
    return np.asarray(contrast * variation * (rim * bright - dark * inner), np.float32)


def _centre_line(mask: Mask, depth: Image) -> Image:
    """Draw the dark centre line (0 to 1) of thin processes, where the two bright lines of the contour would merge."""
    layer = np.zeros(mask.pixels.shape, np.float32)
    for spine in mask.spines:
        fixed = np.round((spine - (mask.x + 0.5, mask.y + 0.5)) * 16).astype(np.int32)
        cv2.polylines(layer, [fixed], False, 1.0, 1, cv2.LINE_AA, 4)
    return np.where(depth < 3.2, layer, 0).astype(np.float32)


def _draw_cell(
    canvas: Image, weight: Image, variation_field: Image, mask: Mask, kind: Kind, rng: np.random.Generator
) -> None:
    """Add one cell's lines to `canvas` and its texture's strength to `weight`."""
    mask = _padded(mask, 2)
    inside, depth = mask.pixels > 0, _depth(mask.pixels)
    contrast = float(np.exp(0.24 * rng.normal()))
    lines = _lines(mask, depth, kind, contrast, variation_field)
    lines -= contrast * (kind.rim + kind.dark) * _centre_line(mask, depth)
    nucleus = _nucleus(mask, kind, kind.nucleus * contrast, rng)
    canvas[mask.window] += np.where(inside, lines + nucleus, 0).astype(np.float32)
    core = np.exp(-((distance(mask) / rng.uniform(0.45, 0.7)) ** 2))
    strength = (
        contrast
        * (0.4 + 1.0 * core)
        * np.minimum(depth / 1.5, 1)
        * (1.6 if mask.cell.rounded and kind.rounded < 0.5 else 1.0)
    )
    window = weight[mask.window]
    np.maximum(window, np.where(inside, strength, 0), out=window)


def _debris(canvas: Image, kind: Kind, rng: np.random.Generator) -> None:
    """Add specks (dark with a bright ring), threads and, rarely, out-of-focus rings; none is a cell."""
    for _ in range(rng.poisson(kind.debris)):
        x, y, size = rng.uniform(0, WIDTH), rng.uniform(0, HEIGHT), float(np.exp(rng.normal(-0.1, 0.35)))
        _stamp(canvas, x, y, size, -rng.uniform(15, 70))
    for _ in range(rng.poisson(kind.debris / 14)):
        heading = np.cumsum(rng.normal(0, 0.35, 14)) + rng.uniform(0, 2 * np.pi)
        steps = np.stack([np.cos(heading), np.sin(heading)], 1) * rng.uniform(0.6, 3.0)
        path = np.cumsum(steps, 0) + rng.uniform((0, 0), (WIDTH, HEIGHT))
        line = np.round(path * 16).astype(np.int32)
        layer = np.zeros_like(canvas)
        cv2.polylines(layer, [line], False, 1.0, 1, cv2.LINE_AA, 4)
        canvas += rng.uniform(10, 30) * (cv2.GaussianBlur(layer, (0, 0), 1.6) * 2.2 - layer)
    if rng.random() < 0.25:
        ring = np.zeros_like(canvas)
        centre = int(rng.uniform(0, WIDTH)), int(rng.uniform(0, HEIGHT))
        cv2.circle(ring, centre, int(rng.uniform(12, 40)), 1.0, 5)
        canvas += rng.uniform(-14, 14) * cv2.GaussianBlur(ring, (0, 0), rng.uniform(4, 8))


def _stamp(canvas: Image, x: float, y: float, size: float, grey: float) -> None:
    """Add a dot of radius `size` and its ring of opposite sign."""
    reach = int(5 * size) + 2
    x0, x1, y0, y1 = max(int(x) - reach, 0), int(x) + reach + 1, max(int(y) - reach, 0), int(y) + reach + 1
    window = canvas[y0:y1, x0:x1]
    if window.size == 0:
        return
    xs = np.arange(x0, x0 + window.shape[1], dtype=np.float32)[None] - x
    ys = np.arange(y0, y0 + window.shape[0], dtype=np.float32)[:, None] - y
    distances = np.hypot(xs, ys) / size
    window += grey * (np.exp(-(distances**2)) - 0.45 * np.exp(-((distances - 2.1) ** 2) / 0.5))


def _stripes(rng: np.random.Generator) -> Image:
    """Draw faint interference stripes, as in many real images: 0 to 1.2 grey levels."""
    angle, period = rng.uniform(0, np.pi), rng.uniform(5, 14)
    x, y = np.arange(WIDTH, dtype=np.float32)[None], np.arange(HEIGHT, dtype=np.float32)[:, None]
    wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) * (2 * np.pi / period))
    return np.asarray(rng.uniform(0, 1.2) * rng.random() * wave, np.float32)


def _sharpened(image: Image, sigma: float, amount: float) -> Image:
    """Apply an unsharp mask with radius `sigma` px."""
    return np.asarray(image + amount * (image - cv2.GaussianBlur(image, (0, 0), sigma)), np.float32)


def render(kind: Kind, masks: list[Mask], rng: np.random.Generator) -> Bytes:
    """Render the image (HEIGHT, WIDTH) uint8; it depends only on the arguments."""
    canvas, weight = np.zeros((HEIGHT, WIDTH), np.float32), np.zeros((HEIGHT, WIDTH), np.float32)
    variation_field = _noise(rng, 4.0)
    for mask in masks:
        _draw_cell(canvas, weight, variation_field, mask, kind, rng)
    weight *= np.exp(0.45 * _noise(rng, 3.0))
    canvas += weight * (kind.grain * _noise(rng, 0.5) + kind.vesicles * _dots(rng, 0.03, 0.75))
    _debris(canvas, kind, rng)
    blurred = cv2.GaussianBlur(canvas, (0, 0), rng.uniform(*kind.psf))
    # Phase contrast and LIVECell's normalisation both subtract the local mean. Neighbouring pixels correlate by 0.2 to
    # 0.5 inside cells, pixels two apart by -0.1, which requires sharpening.
    contrast = _sharpened(blurred - cv2.GaussianBlur(blurred, (0, 0), 6.0), 1.3, 0.6)
    gain = rng.uniform(0.85, 1.15) * (1 + 0.12 * _noise(rng, 120.0))
    illumination = 0.35 * _noise(rng, 60.0) + _stripes(rng)
    sensor = rng.uniform(0.6, 1.05) * _sharpened(_noise(rng, 0.55), 1.3, 0.6)
    image = 128 + contrast * gain + illumination + sensor
    return np.asarray(np.clip(np.round(image), 3, 255), np.uint8)
