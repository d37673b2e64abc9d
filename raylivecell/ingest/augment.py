"""Random transformations of a training sample: pure functions of (image, targets, rng).

1. nine uniform numbers decide everything but the shape of the deformation (`_RandomParameters`, in this fixed order)
2. one map takes each pixel of the crop to its place in the source: flips, rotation and elastic deformation in one
3. one resampling pass: linear for the image, nearest for the targets, both by the same map
4. brightness and contrast as one table of 256 entries
"""

import math
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from raylivecell.ingest import elastic
from raylivecell.ingest.elastic import Maps, Size, Window, field_direct
from raylivecell.recipe import AugmentConfig

BACKGROUND = 128
"""Grey level of the background of LIVECell; of other sets `Intensity.background_level`, given as an argument."""


class _RandomParameters(NamedTuple):
    """Uniform numbers in [0, 1), drawn in this order whatever the config: one field's value moves no other's draw."""

    top: float
    left: float
    elastic: float
    rotation: float
    angle: float
    flip_x: float
    flip_y: float
    brightness: float
    contrast: float


def augment(
    image: np.ndarray,
    targets: np.ndarray,
    rng: np.random.Generator,
    config: AugmentConfig,
    size: Size | None = None,
    background: int = BACKGROUND,
) -> tuple[np.ndarray, np.ndarray]:
    """A deformed, rotated, flipped random crop with other brightness and contrast.

    Args:
        image: uint8 (H, W); never written, H and W under 32,767 (OpenCV's limit).
        targets: uint8 (H, W, C) planes or integer (H, W) labels; never written. No value is made that is not in it.
        rng: gives nine uniform numbers, then, where the sample is deformed, the field's amplitudes.
        config: what is done.
        size: (h, w) of the crop; None: the whole frame. Where the image is smaller it is first widened by reflection.
        background: grey level of the set's background, for contrast and a constant border.

    Returns:
        image uint8 (h, w) and targets (h, w, ...), C-contiguous, sharing no memory with the inputs.
    """
    image, targets = _widen(image, size), _widen(targets, size)
    draws = _RandomParameters(*rng.random(len(_RandomParameters._fields)).tolist())
    window = _window(image.shape[:2], size, draws.top, draws.left)
    maps = _maps(image.shape[:2], window, draws, rng, config)
    if maps is None:
        flips = _flips(draws, config)
        image, targets = _cut(_flipped(image, flips), window), _cut(_flipped(targets, flips), window)
    else:
        image = _remap(image, maps, cv2.INTER_LINEAR, config.border, background)
        targets = _remap_targets(targets, maps, config.border)
    return _recolour(image, draws, config, background), targets


def augment_planes(
    planes: NDArray[np.uint8],
    rng: np.random.Generator,
    config: AugmentConfig,
    size: Size | None = None,
    out: NDArray[np.uint8] | None = None,
    background: int = BACKGROUND,
) -> NDArray[np.uint8]:
    """`augment` of uint8 (3, H, W) = image and two target planes, as (3, h, w): the same pixels for the same rng.

    `out`, C-contiguous uint8 (3, h, w), is filled and returned, so that a batch is made without another copy.
    """
    image, targets = augment(planes[0], planes[1:].transpose(1, 2, 0), rng, config, size, background)
    return _to_planes(image, targets, out)


def plain(
    image: np.ndarray, targets: np.ndarray, rng: np.random.Generator, size: Size | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """A random crop and nothing else: shapes and rules as in `augment`; two uniform numbers (top, left) are drawn."""
    image, targets = _widen(image, size), _widen(targets, size)
    window = _window(image.shape[:2], size, *rng.random(2).tolist())
    return _cut(image, window), _cut(targets, window)


def plain_planes(
    planes: NDArray[np.uint8], rng: np.random.Generator, size: Size | None = None, out: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """`plain` of uint8 (C, H, W) planes, as (C, h, w), in `out` where given: the same pixels for the same rng."""
    pixels = _widen(planes.transpose(1, 2, 0), size).transpose(2, 0, 1)
    top, left, h, w = _window(pixels.shape[1:], size, *rng.random(2).tolist())
    if out is None:
        out = np.empty((len(planes), h, w), np.uint8)
    np.copyto(out, pixels[:, top : top + h, left : left + w])
    return out


class Warp(NamedTuple):
    """What `augment` or `plain` would do to a sample, as another device can do it."""

    maps: NDArray[np.float32]
    """x and y in the source, (2, rows, columns), on the nodes of the crop that are `elastic.node_step` apart."""
    table: NDArray[np.uint8]
    """What each grey level becomes, (256,)."""


def move(
    shape: Size,
    rng: np.random.Generator,
    config: AugmentConfig,
    size: Size | None,
    transformed: bool,
    background: int = BACKGROUND,
) -> Warp:
    """The move of a frame of `shape`, no smaller than the crop, by the same numbers as `augment`, or else `plain`."""
    step = elastic.node_step(config.elastic.sigma)
    if not transformed:
        window = _window(shape, size, *rng.random(2).tolist())
        still = _affine_on_nodes(shape, window, 0.0, (False, False), step)
        return Warp(np.stack(still), np.arange(256, dtype=np.uint8))
    draws = _RandomParameters(*rng.random(len(_RandomParameters._fields)).tolist())
    window = _window(shape, size, draws.top, draws.left)
    affine = _affine_on_nodes(shape, window, _angle(draws, config), _flips(draws, config), step)
    maps = elastic.deform_nodes(affine, rng, shape, window, config.elastic) if _deformed(draws, config) else affine
    return Warp(np.stack(maps), _recolouring(draws, config, background))


def augment_direct(
    image: np.ndarray, targets: np.ndarray, rng: np.random.Generator, config: AugmentConfig
) -> tuple[np.ndarray, np.ndarray]:
    """What one would write by hand, for `bench`: `field_direct`, then one pass for it and another for the rotation."""
    draws = _RandomParameters(*rng.random(len(_RandomParameters._fields)).tolist())
    height, width = image.shape
    if draws.elastic < config.elastic.p:
        dx, dy = field_direct(rng, (height, width), config.elastic.sigma)
        x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
        maps = (x + dx * config.elastic.alpha_x, y + dy * config.elastic.alpha_y)
        image = _remap(image, maps, cv2.INTER_LINEAR, config.border, BACKGROUND)
        targets = _remap(targets, maps, cv2.INTER_NEAREST, config.border, 0)
    if draws.rotation < config.rotation.p:
        matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), _angle(draws, config), 1)
        border = cv2.BORDER_REFLECT_101
        image = cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=border)
        targets = cv2.warpAffine(targets, matrix, (width, height), flags=cv2.INTER_NEAREST, borderMode=border)
    flips = _flips(draws, config)
    image, targets = _flipped(image, flips), _flipped(targets, flips)
    return _recolour(np.ascontiguousarray(image), draws, config, BACKGROUND), np.ascontiguousarray(targets)


def _widen(array: np.ndarray, size: Size | None) -> np.ndarray:
    """`array` (H, W, ...), reflected at its edges to at least `size`; itself where it is large enough."""
    if size is None or (array.shape[0] >= size[0] and array.shape[1] >= size[1]):
        return array
    missing = [max(0, want - have) for want, have in zip(size, array.shape)]
    edges = [(m // 2, m - m // 2) for m in missing] + [(0, 0)] * (array.ndim - 2)
    return np.pad(array, edges, mode="reflect")


def _window(shape: Size, size: Size | None, top: float, left: float) -> Window:
    """(top, left, h, w) of a crop; `top` and `left` in [0, 1) choose among all places alike."""
    h, w = size or shape
    return math.floor(top * (shape[0] - h + 1)), math.floor(left * (shape[1] - w + 1)), h, w


def _cut(array: np.ndarray, window: Window) -> np.ndarray:
    top, left, h, w = window
    return array[top : top + h, left : left + w].copy()


def _flipped(array: np.ndarray, flips: tuple[bool, bool]) -> np.ndarray:
    """A view of `array` with x and y turned round where `flips` says so."""
    return array[:: -1 if flips[1] else 1, :: -1 if flips[0] else 1]


def _maps(
    shape: Size, window: Window, draws: _RandomParameters, rng: np.random.Generator, config: AugmentConfig
) -> Maps | None:
    """x and y in the source of each pixel of the window, float32 (h, w); None where nothing but flips is done.

    The transformed frame is flip(rotate(deform(source))): the source of its pixel p is q + d, q = c + R F (p - c).
    The field d is drawn where p is, not where q is: its law is the same wherever it is turned to, and the displacement
    stays along the source's axes.
    """
    strength = config.elastic
    deformed, angle = _deformed(draws, config), _angle(draws, config)
    if not deformed and angle == 0:
        return None
    affine = _affine_on_nodes(
        shape, window, angle, _flips(draws, config), elastic.node_step(strength.sigma) if deformed else 1.0
    )
    return elastic.deform(affine, rng, shape, window, strength) if deformed else affine


def _deformed(draws: _RandomParameters, config: AugmentConfig) -> bool:
    return draws.elastic < config.elastic.p and max(config.elastic.alpha_x, config.elastic.alpha_y) > 0


def _angle(draws: _RandomParameters, config: AugmentConfig) -> float:
    """Degrees."""
    return (2 * draws.angle - 1) * config.rotation.degrees if draws.rotation < config.rotation.p else 0.0


def _flips(draws: _RandomParameters, config: AugmentConfig) -> tuple[bool, bool]:
    """Along x, along y."""
    return draws.flip_x < config.flip, draws.flip_y < config.flip


def _affine_on_nodes(shape: Size, window: Window, angle: float, flips: tuple[bool, bool], step: float) -> Maps:
    y, x = (elastic.nodes(first, length, step) for first, length in zip(window[:2], window[2:]))
    return _affine_maps(x, y, shape, angle, flips)


def _affine_maps(x: np.ndarray, y: np.ndarray, shape: Size, angle: float, flips: tuple[bool, bool]) -> Maps:
    """Source x and y, float32 (len(y), len(x)), of a grid of places in the flipped and rotated frame."""
    cy, cx = (shape[0] - 1) / 2, (shape[1] - 1) / 2
    fx, fy = (-1 if flip else 1 for flip in flips)
    # Exact at quarter turns, where cos or sin is 6e-17: pixels must fall on pixels.
    cos, sin = (round(f(math.radians(angle)), 15) for f in (math.cos, math.sin))
    u, v = fx * (x - cx), fy * (y - cy)
    return (
        np.add.outer((cx - sin * v).astype(np.float32), (cos * u).astype(np.float32)),
        np.add.outer((cy + cos * v).astype(np.float32), (sin * u).astype(np.float32)),
    )


def _remap(array: np.ndarray, maps: Maps, interpolation: int, border: str, fill: int) -> np.ndarray:
    """`cv2.remap`; outside lies the mirror image, or `fill`."""
    mode = cv2.BORDER_REFLECT_101 if border == "reflect" else cv2.BORDER_CONSTANT
    return cv2.remap(array, *maps, interpolation, borderMode=mode, borderValue=(fill,) * 4)


def _remap_targets(targets: np.ndarray, maps: Maps, border: str) -> np.ndarray:
    """Nearest values of `targets` at `maps`. Nearest moves bytes, so a pixel travels as whatever type is fast.

    Two uint8 planes as one of uint16: 0.2 ms, as two channels 0.6 ms (520x704).
    """
    shape, dtype = targets.shape, targets.dtype
    if targets.ndim == 3 and dtype == np.uint8 and shape[2] == 2:
        if not targets.flags.c_contiguous:
            targets = cv2.merge([targets[..., 0], targets[..., 1]])
        packed = targets.view(np.uint16)[..., 0]
        return _remap(packed, maps, cv2.INTER_NEAREST, border, 0)[..., None].view(np.uint8)
    carrier = {1: np.uint8, 2: np.uint16, 4: np.float32, 8: np.float64}[dtype.itemsize]
    moved = _remap(np.ascontiguousarray(targets).view(carrier), maps, cv2.INTER_NEAREST, border, 0)
    return moved.reshape(*moved.shape[:2], *shape[2:]).view(dtype)


def _recolour(image: np.ndarray, draws: _RandomParameters, config: AugmentConfig, background: int) -> np.ndarray:
    """`image` with the drawn brightness and contrast."""
    if config.brightness == 0 and config.contrast == 0:
        return image
    return cv2.LUT(image, _recolouring(draws, config, background), dst=image)


def _recolouring(draws: _RandomParameters, config: AugmentConfig, background: int) -> NDArray[np.uint8]:
    """What each grey level becomes, (256,)."""
    factor = (1 + config.contrast) ** (2 * draws.contrast - 1)
    shift = (2 * draws.brightness - 1) * config.brightness
    return np.clip(np.rint((np.arange(256) - background) * factor + background + shift), 0, 255).astype(np.uint8)


def _to_planes(image: np.ndarray, targets: np.ndarray, out: NDArray[np.uint8] | None) -> NDArray[np.uint8]:
    """uint8 (h, w) and (h, w, 2) as C-contiguous (3, h, w), in `out` where given."""
    if out is None:
        out = np.empty((3, *image.shape), np.uint8)
    out[0] = image
    for channel in range(2):
        cv2.extractChannel(targets, channel, dst=out[1 + channel])
    return out
