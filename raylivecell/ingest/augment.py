"""Random transforms of a training sample: pure functions of (image, targets, rng).

1. Nine uniform numbers, drawn in fixed order, determine everything except the elastic field (`RandomParameters`).
2. One map gives the source position of each crop pixel: flips, rotation and elastic deformation combined.
3. One resampling pass with that map: linear for the image, nearest neighbour for the targets.
4. Brightness and contrast are one table of 256 entries.
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

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "RandomParameters":
        """Draw all nine numbers."""
        return cls(*rng.random(len(cls._fields)).tolist())

    def deformed(self, config: AugmentConfig) -> bool:
        """Whether the sample is elastically deformed."""
        return self.elastic < config.elastic.p and max(config.elastic.alpha_x, config.elastic.alpha_y) > 0

    def degrees(self, config: AugmentConfig) -> float:
        """Rotation angle in degrees; 0 without rotation."""
        return (2 * self.angle - 1) * config.rotation.degrees if self.rotation < config.rotation.p else 0.0

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
    """Deform, rotate and flip a sample, crop it at random, and change its brightness and contrast.

    Args:
        image: uint8 (H, W); not modified; H and W below 32,767 (OpenCV's limit).
        targets: uint8 (H, W, C) planes or integer (H, W) labels; not modified. No new values are created.
        rng: for nine uniform numbers, then, if the sample is deformed, the amplitudes of the field.
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
    return recolour(image, draws, config, background), targets


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
        identity = _affine_maps(shape, window, 0.0, (False, False), step)
        return Warp(np.stack(identity), np.arange(256, dtype=np.uint8))
    draws = RandomParameters.draw(rng)
    window = _window(shape, size, draws.top, draws.left)
    affine = _affine_maps(shape, window, draws.degrees(config), draws.flips(config), step)
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


def recolour(image: np.ndarray, draws: RandomParameters, config: AugmentConfig, background: int) -> np.ndarray:
    """Change brightness and contrast in place."""
    if config.brightness == 0 and config.contrast == 0:
        return image
    return cv2.LUT(image, _grey_table(draws, config, background), dst=image)


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

    The transformed image is flip(rotate(deform(source))): the source of its pixel p is q + d, q = c + R F (p - c).
    The field d is drawn at p instead of q: its distribution is the same under flips and rotation, and the displacement
    stays along the source's axes.
    """
    deformed, angle = draws.deformed(config), draws.degrees(config)
    if not deformed and angle == 0:
        return None
    step = elastic.control_step(config.elastic.sigma) if deformed else 1.0
    affine = _affine_maps(shape, window, angle, draws.flips(config), step)
    return elastic.deform(affine, rng, shape, window, config.elastic) if deformed else affine


def _affine_maps(shape: Size, window: Window, angle: float, flips: tuple[bool, bool], step: float) -> Maps:
    """Source x and y, float32 (rows, columns), of the window's control points in the flipped and rotated image."""
    y, x = (elastic.control_points(first, length, step) for first, length in zip(window[:2], window[2:]))
    cy, cx = (shape[0] - 1) / 2, (shape[1] - 1) / 2
    fx, fy = (-1 if flipped else 1 for flipped in flips)
    # Rounded to be exact at quarter turns, where cos or sin is 6e-17: pixels must map to pixels.
    cos, sin = (round(f(math.radians(angle)), 15) for f in (math.cos, math.sin))
    u, v = fx * (x - cx), fy * (y - cy)
    return (
        np.add.outer((cx - sin * v).astype(np.float32), (cos * u).astype(np.float32)),
        np.add.outer((cy + cos * v).astype(np.float32), (sin * u).astype(np.float32)),
    )


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
    factor = (1 + config.contrast) ** (2 * draws.contrast - 1)
    shift = (2 * draws.brightness - 1) * config.brightness
    return np.clip(np.rint((np.arange(256) - background) * factor + background + shift), 0, 255).astype(np.uint8)
