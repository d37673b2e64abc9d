"""Random transforms of a training sample: pure functions of (image, targets, rng).

1. Uniform numbers, drawn in fixed order, determine everything except the random fields (`RandomParameters`).
2. One map gives the source position of each crop pixel: flips, rotation, zoom and elastic deformation combined.
3. One resampling pass with that map: linear for the image, nearest neighbour for the targets.
4. Blur.
5. Brightness, contrast and gamma are one table of 256 entries.
6. Uneven background and noise are added in one pass.
"""

import math
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from raylivecell.ingest import elastic
from raylivecell.ingest.elastic import Maps, Size, Window
from raylivecell.recipe import AugmentConfig
from raylivecell.targets.sample_planes import IMAGE, MASKS, STORED

SMALLEST_BLUR = 0.3
"""Sigma in pixels below which the neighbours of a pixel get less than a hundredth of its weight."""
DARKEST = 32
"""Lowest grey level at which the slope of gamma is normalised."""
BACKGROUND = 128
"""Background grey level of LIVECell; for other datasets pass `Intensity.background_level`."""


class RandomParameters(NamedTuple):
    """Uniform numbers in [0, 1), always drawn in this order, so that no setting changes the numbers of another."""

    top: float
    left: float
    elastic: float
    rotation: float
    angle: float
    flip_x: float
    flip_y: float
    brightness: float
    contrast: float
    scale: float
    gamma: float
    blur: float
    noise: float
    shading: float
    fields: float
    """Seed of the noise and the uneven background."""

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "RandomParameters":
        """Draw all numbers."""
        return cls(*rng.random(len(cls._fields)).tolist())

    def deformed(self, config: AugmentConfig) -> bool:
        """Whether the sample is elastically deformed."""
        return self.elastic < config.elastic.p and max(config.elastic.alpha_x, config.elastic.alpha_y) > 0

    def degrees(self, config: AugmentConfig) -> float:
        """Rotation angle in degrees; 0 without rotation."""
        return (2 * self.angle - 1) * config.rotation.degrees if self.rotation < config.rotation.p else 0.0

    def zoom(self, config: AugmentConfig) -> float:
        """Factor by which the sample is enlarged."""
        return _factor(self.scale, config.scale)

    def flips(self, config: AugmentConfig) -> tuple[bool, bool]:
        """Whether to flip along x and along y."""
        return self.flip_x < config.flip, self.flip_y < config.flip


def augment(
    image: np.ndarray,
    targets: np.ndarray,
    rng: np.random.Generator,
    config: AugmentConfig,
    size: Size | None = None,
    background: int = BACKGROUND,
) -> tuple[np.ndarray, np.ndarray]:
    """Deform, zoom, rotate and flip a sample, crop it at random, and change its grey levels.

    Args:
        image: uint8 (H, W); not modified; H and W below 32,767 (OpenCV's limit).
        targets: uint8 (H, W, C) planes or integer (H, W) labels; not modified. No new values are created.
        rng: for `RandomParameters`, then, if the sample is deformed, the amplitudes of the field.
        config: strengths and probabilities.
        size: (h, w) of the crop; None: the complete image. Smaller images are first padded by reflection.
        background: background grey level of the dataset, for contrast and a constant border.

    Returns:
        image uint8 (h, w) and targets (h, w, ...), C-contiguous, sharing no memory with the inputs.
    """
    image, targets = _pad(image, size), _pad(targets, size)
    draws = RandomParameters.draw(rng)
    window = _window(image.shape[:2], size, draws.top, draws.left)
    maps = _maps(image.shape[:2], window, draws, rng, config)
    if maps is None:
        flips = draws.flips(config)
        image, targets = _crop(flip(image, flips), window), _crop(flip(targets, flips), window)
    else:
        image = remap(image, maps, cv2.INTER_LINEAR, config.border, background)
        targets = _remap_targets(targets, maps, config.border)
    return add_fields(recolour(blur(image, draws, config), draws, config, background), draws, config), targets


def augment_planes(
    planes: NDArray[np.uint8],
    rng: np.random.Generator,
    config: AugmentConfig,
    size: Size | None = None,
    out: NDArray[np.uint8] | None = None,
    background: int = BACKGROUND,
) -> NDArray[np.uint8]:
    """`augment` of planes uint8 (3, H, W) as `sample_planes.STORED`; the same rng gives the same pixels.

    Returns:
        uint8 (3, h, w); `out` if given (C-contiguous), so that a batch is filled without another copy.
    """
    image, targets = augment(planes[IMAGE], planes[MASKS].transpose(1, 2, 0), rng, config, size, background)
    if out is None:
        out = np.empty((len(STORED), *image.shape), np.uint8)
    out[IMAGE] = image
    for channel, plane in enumerate(out[MASKS]):
        cv2.extractChannel(targets, channel, dst=plane)
    return out


def random_crop(
    image: np.ndarray, targets: np.ndarray, rng: np.random.Generator, size: Size | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Crop at random, with the shapes and rules of `augment`; draws two uniform numbers (top, left)."""
    image, targets = _pad(image, size), _pad(targets, size)
    window = _window(image.shape[:2], size, *rng.random(2).tolist())
    return _crop(image, window), _crop(targets, window)


def random_crop_planes(
    planes: NDArray[np.uint8], rng: np.random.Generator, size: Size | None = None, out: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """`random_crop` of planes uint8 (C, H, W), as (C, h, w), in `out` if given; the same rng gives the same pixels."""
    padded = _pad(planes.transpose(1, 2, 0), size).transpose(2, 0, 1)
    top, left, h, w = _window(padded.shape[1:], size, *rng.random(2).tolist())
    if out is None:
        out = np.empty((len(planes), h, w), np.uint8)
    np.copyto(out, padded[:, top : top + h, left : left + w])
    return out


class Warp(NamedTuple):
    """The transform of a sample by `augment` or `random_crop`, for another device to apply."""

    maps: NDArray[np.float32]
    """Source x and y, (2, rows, columns), at the crop's control points, `elastic.control_step` apart."""
    table: NDArray[np.uint8]
    """New value of each grey level, (256,)."""


def warp_of(
    shape: Size,
    rng: np.random.Generator,
    config: AugmentConfig,
    size: Size | None,
    augmented: bool,
    background: int = BACKGROUND,
) -> Warp:
    """Warp of an image of `shape`, at least as large as the crop, with the random numbers of `augment` or
    `random_crop`.

    Args:
        shape: (H, W) of the image.
        rng: as in `augment`, or in `random_crop`.
        config: strengths and probabilities.
        size: (h, w) of the crop; None: the complete image.
        augmented: `augment` instead of `random_crop`.
        background: background grey level of the dataset.
    """
    step = elastic.control_step(config.elastic.sigma)
    if not augmented:
        window = _window(shape, size, *rng.random(2).tolist())
        y, x = (elastic.control_points(first, length, step) for first, length in zip(window[:2], window[2:]))
        identity = np.stack(np.meshgrid(x, y)).astype(np.float32)
        return Warp(identity, np.arange(256, dtype=np.uint8))
    draws = RandomParameters.draw(rng)
    window = _window(shape, size, draws.top, draws.left)
    affine = _affine_maps(shape, window, draws, config, step)
    maps = (
        elastic.deform_control_points(affine, rng, shape, window, config.elastic) if draws.deformed(config) else affine
    )
    return Warp(np.stack(maps), _grey_table(draws, config, background))


def flip(array: np.ndarray, flips: tuple[bool, bool]) -> np.ndarray:
    """Return a view of `array`, flipped along x if `flips[0]` and along y if `flips[1]`."""
    return array[:: -1 if flips[1] else 1, :: -1 if flips[0] else 1]


def remap(array: np.ndarray, maps: Maps, interpolation: int, border: str, fill: int) -> np.ndarray:
    """`cv2.remap`; pixels outside the image are reflected, or `fill`."""
    mode = cv2.BORDER_REFLECT_101 if border == "reflect" else cv2.BORDER_CONSTANT
    return cv2.remap(array, *maps, interpolation, borderMode=mode, borderValue=(fill,) * 4)


def blur(image: np.ndarray, draws: RandomParameters, config: AugmentConfig) -> np.ndarray:
    """Blur by a Gaussian, in place."""
    sigma = draws.blur * config.blur
    if sigma < SMALLEST_BLUR:
        return image
    return cv2.GaussianBlur(image, (0, 0), sigma, dst=image, borderType=cv2.BORDER_REFLECT_101)


def recolour(image: np.ndarray, draws: RandomParameters, config: AugmentConfig, background: int) -> np.ndarray:
    """Change brightness, contrast and gamma in place."""
    if config.brightness == 0 and config.contrast == 0 and config.gamma == 0:
        return image
    return cv2.LUT(image, _grey_table(draws, config, background), dst=image)


def add_fields(image: np.ndarray, draws: RandomParameters, config: AugmentConfig) -> np.ndarray:
    """Add an uneven background and noise, in place."""
    if config.noise == 0 and config.shading == 0:
        return image
    rng = np.random.default_rng(int(draws.fields * 2**53))
    # The lowest cosines of each axis: sums of slopes and bowls, with standard deviation 1 over all pixels and fields.
    rows, columns = (
        np.cos(np.pi * np.outer((np.arange(length) + 0.5) / length, np.arange(3))) * (1, math.sqrt(2), math.sqrt(2))
        for length in image.shape
    )
    amplitudes = rng.standard_normal((3, 3)) * (draws.shading * config.shading / math.sqrt(8))
    amplitudes[0, 0] = 0  # brightness
    # cv2.gemm uses one thread, numpy's BLAS all cores.
    half = cv2.gemm(rows, amplitudes, 1, np.empty(0), 0)
    added = np.asarray(cv2.gemm(half, columns, 1, np.empty(0), 0, flags=cv2.GEMM_2_T), np.float32)
    if config.noise:
        added += rng.standard_normal(image.shape, np.float32) * np.float32(draws.noise * config.noise)
    return cv2.add(image, added, dst=image, dtype=cv2.CV_8U)


def _factor(draw: float, strength: float) -> float:
    """exp(u), with u from -log(1 + strength) to log(1 + strength) for a draw from 0 to 1."""
    return (1 + strength) ** (2 * draw - 1)


def _pad(array: np.ndarray, size: Size | None) -> np.ndarray:
    """Pad `array` (H, W, ...) by reflection to at least `size`; unchanged if large enough."""
    if size is None or (array.shape[0] >= size[0] and array.shape[1] >= size[1]):
        return array
    missing = [max(0, minimum - length) for minimum, length in zip(size, array.shape)]
    edges = [(m // 2, m - m // 2) for m in missing] + [(0, 0)] * (array.ndim - 2)
    return np.pad(array, edges, mode="reflect")


def _window(shape: Size, size: Size | None, top: float, left: float) -> Window:
    """(top, left, h, w) of a crop; `top` and `left` in [0, 1) select among all positions uniformly."""
    h, w = size or shape
    return math.floor(top * (shape[0] - h + 1)), math.floor(left * (shape[1] - w + 1)), h, w


def _crop(array: np.ndarray, window: Window) -> np.ndarray:
    top, left, h, w = window
    return array[top : top + h, left : left + w].copy()


def _maps(
    shape: Size, window: Window, draws: RandomParameters, rng: np.random.Generator, config: AugmentConfig
) -> Maps | None:
    """Source x and y of each pixel of the window, float32 (h, w); None if the sample is at most flipped.

    The transformed image is zoom(flip(rotate(deform(source)))): the source of its pixel p is q + d, q = c + R F p',
    with p' relative to the centre c, divided by the zoom (`_unzoomed`). The field d is drawn at p instead of q: its
    distribution is the same under flips, rotation and zoom, and the displacement stays along the source's axes.
    """
    deformed, angle = draws.deformed(config), draws.degrees(config)
    if not deformed and angle == 0 and config.scale == 0:
        return None
    step = elastic.control_step(config.elastic.sigma) if deformed else 1.0
    affine = _affine_maps(shape, window, draws, config, step)
    return elastic.deform(affine, rng, shape, window, config.elastic) if deformed else affine


def _affine_maps(shape: Size, window: Window, draws: RandomParameters, config: AugmentConfig, step: float) -> Maps:
    """Source x and y, float32 (rows, columns), of the window's control points in the transformed image."""
    zoom, angle, flips = draws.zoom(config), draws.degrees(config), draws.flips(config)
    y, x = (
        _unzoomed(elastic.control_points(first, length, step), first, length, full, draw, zoom)
        for first, length, full, draw in zip(window[:2], window[2:], shape, (draws.top, draws.left))
    )
    cy, cx = (shape[0] - 1) / 2, (shape[1] - 1) / 2
    fx, fy = (-1 if flipped else 1 for flipped in flips)
    # Rounded to be exact at quarter turns, where cos or sin is 6e-17: pixels must map to pixels.
    cos, sin = (round(f(math.radians(angle)), 15) for f in (math.cos, math.sin))
    u, v = fx * x, fy * y
    return (
        np.add.outer((cx - sin * v).astype(np.float32), (cos * u).astype(np.float32)),
        np.add.outer((cy + cos * v).astype(np.float32), (sin * u).astype(np.float32)),
    )


def _unzoomed(positions: np.ndarray, first: int, length: int, full: int, draw: float, zoom: float) -> np.ndarray:
    """Positions in the crop -> in the image that the zoom enlarges, relative to the image's centre, along one axis.

    The crop shows length / zoom pixels, at a place that `draw` (0 to 1) selects uniformly among all inside the image,
    or in its middle if they are more than the image's.
    """
    if zoom == 1:
        return positions - (full - 1) / 2
    return (draw - 0.5) * max(0.0, full - length / zoom) + (positions - first - (length - 1) / 2) / zoom


def _remap_targets(targets: np.ndarray, maps: Maps, border: str) -> np.ndarray:
    """Resample `targets` at `maps` by nearest neighbour, each pixel viewed as a dtype that is fast to copy.

    Two uint8 planes as one of uint16 take 0.2 ms, as two channels 0.6 ms (520x704).
    """
    shape, dtype = targets.shape, targets.dtype
    if targets.ndim == 3 and dtype == np.uint8 and shape[2] == 2:
        if not targets.flags.c_contiguous:
            targets = cv2.merge([targets[..., 0], targets[..., 1]])
        pairs = targets.view(np.uint16)[..., 0]
        return remap(pairs, maps, cv2.INTER_NEAREST, border, 0)[..., None].view(np.uint8)
    carrier = {1: np.uint8, 2: np.uint16, 4: np.float32, 8: np.float64}[dtype.itemsize]
    warped = remap(np.ascontiguousarray(targets).view(carrier), maps, cv2.INTER_NEAREST, border, 0)
    return warped.reshape(*warped.shape[:2], *shape[2:]).view(dtype)


def _grey_table(draws: RandomParameters, config: AugmentConfig, background: int) -> NDArray[np.uint8]:
    """New value of each grey level, (256,)."""
    gamma, levels = _factor(draws.gamma, config.gamma), np.arange(256.0)
    if gamma != 1:
        # Level and slope at the background stay: brightness and contrast change these. A black one has no slope.
        curved = 255 * (levels / 255) ** gamma
        slope = gamma * (max(background, DARKEST) / 255) ** (gamma - 1)
        levels = (curved - curved[background]) / slope + background
    shift = (2 * draws.brightness - 1) * config.brightness
    levels = (levels - background) * _factor(draws.contrast, config.contrast) + background + shift
    return np.clip(np.rint(levels), 0, 255).astype(np.uint8)
