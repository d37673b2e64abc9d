"""Elastic deformation by Gaussian-blurred white noise (Simard et al. 2003), in its cosine form.

Noise blurred between mirrors is a sum of cosines with independent amplitudes that fall as exp(-(sigma w)^2 / 2).
Those above w = 2.5 / sigma hold 0.04 % of the variance and are left out, so two small matrix products give the field on
nodes sigma / 3 apart: at sigma 10 in a tenth of the time of noise and blur on every pixel (0.8 and 8.3 ms for 520x704,
`bench augment`).
"""

import math
import threading

import cv2
import numpy as np
from numpy.typing import NDArray

from raylivecell.recipe import ElasticConfig

CUTOFF = 2.5  # highest frequency kept, in units of 1 / sigma
NODES_PER_SIGMA = 3  # linear interpolation between such nodes changes no pixel's standard deviation by 1 %
DIRECT_BELOW = 3.0  # a sigma so small leaves so many frequencies that noise on every pixel is faster
Size = tuple[int, int]
Window = tuple[int, int, int, int]
"""(top, left, h, w)"""
Maps = tuple[np.ndarray, np.ndarray]
"""x and y in the source of each pixel, float32 (h, w)."""
_scratch = threading.local()


def field(rng: np.random.Generator, shape: Size, sigma: float) -> np.ndarray:
    """Displacements of alpha 1 for a whole frame, float32 (2, H, W) = along x, along y; as `field_direct` in law."""
    zero = (np.zeros((1, 1), np.float32),) * 2
    return np.stack(deform(zero, rng, shape, (0, 0, *shape), ElasticConfig(alpha_x=1, alpha_y=1, sigma=sigma)))


def field_direct(rng: np.random.Generator, shape: Size, sigma: float) -> NDArray[np.float32]:
    """The direct form of `field`: uniform(-1, 1) noise on every pixel through `cv2.GaussianBlur`, between mirrors."""
    noise = rng.random((2, *shape), np.float32) * 2 - 1
    return np.stack([cv2.GaussianBlur(n, (0, 0), sigma, borderType=cv2.BORDER_REFLECT) for n in noise])


def node_step(sigma: float) -> float:
    """Pixels between the nodes of a field."""
    return sigma / NODES_PER_SIGMA


def margin(step: float) -> int:
    """Pixels by which the nodes' field is wider than the window on each side: no pixel lies beyond the last node."""
    return math.ceil(step / 2) if step > 1 else 0


def nodes(first: int, length: int, step: float) -> np.ndarray:
    """Places in the frame of the nodes over pixels first .. first + length - 1: at most `step` >= 1 apart.

    They lie as `cv2.resize` takes the pixels of an image to lie that it enlarges to `length` and two margins.
    """
    if step <= 1:
        return first + np.arange(length, dtype=np.float64)
    edge = margin(step)
    full = length + 2 * edge
    count = math.ceil(full / step)
    return first - edge - 0.5 + (np.arange(count) + 0.5) * (full / count)


def deform(
    affine: Maps,
    rng: np.random.Generator,
    shape: Size,
    window: Window,
    config: ElasticConfig,
) -> Maps:
    """`affine` maps on the window's nodes plus alpha_x and alpha_y times a random field: on its pixels, (h, w) each."""
    on_nodes = deform_nodes(affine, rng, shape, window, config)
    x, y = (_enlarge(values, window[2:], node_step(config.sigma), axis) for axis, values in zip("xy", on_nodes))
    return x, y


def deform_nodes(
    affine: Maps, rng: np.random.Generator, shape: Size, window: Window, config: ElasticConfig
) -> list[NDArray[np.float32]]:
    """The maps of `deform` on the window's nodes, x and y."""
    (top, left, h, w), sigma, alphas = window, config.sigma, (config.alpha_x, config.alpha_y)
    if sigma < DIRECT_BELOW:
        noise = field_direct(rng, shape, sigma)[:, top : top + h, left : left + w]
        return [start + np.float32(alpha) * one for start, alpha, one in zip(affine, alphas, noise)]
    step = node_step(sigma)
    along_y = _cosines(nodes(top, h, step), shape[0], sigma, step)
    along_x = _cosines(nodes(left, w, step), shape[1], sigma, step)
    amplitudes = rng.standard_normal((2, along_y.shape[1], along_x.shape[1]), np.float32)
    values: list[NDArray[np.float32]] = []
    for start, alpha, amplitude in zip(affine, alphas, amplitudes):
        grid = np.broadcast_to(start, (len(along_y), len(along_x)))
        # uniform(-1, 1) has variance 1/3. cv2.gemm, for it keeps to one thread where numpy's BLAS takes all cores.
        half = cv2.gemm(along_y, amplitude, alpha / math.sqrt(3), np.empty(0), 0)
        values.append(np.asarray(cv2.gemm(half, along_x, 1, grid, 1, flags=cv2.GEMM_2_T), np.float32))
    return values


def _cosines(places: np.ndarray, length: int, sigma: float, step: float) -> NDArray[np.float32]:
    """One axis of the field's cosine form: float32 (places, frequencies), rows' squares summing to the variance.

    White noise of variance 1 on `length` pixels between mirrors has independent amplitudes of variance 1 in the
    orthonormal cosines (DCT-II); the blur multiplies frequency w by exp(-(sigma w)^2 / 2).
    """
    count = min(length, 1 + math.floor(CUTOFF * length / (math.pi * sigma)))
    frequency = np.arange(count) * (math.pi / length)
    size = np.sqrt(np.where(frequency == 0, 1, 2) / length) * np.exp(-((sigma * frequency) ** 2) / 2)
    if step > 1:
        # Between nodes at distance s the variance falls by (1 - correlation(s)) / 3 in the mean: given back.
        size /= math.sqrt(1 - (1 - math.exp(-((step / sigma) ** 2) / 4)) / 3)
    phase = np.outer(places + 0.5, frequency).astype(np.float32)
    return np.cos(phase, out=phase) * size.astype(np.float32)


def _enlarge(values: np.ndarray, size: Size, step: float, slot: str) -> np.ndarray:
    """Values on `nodes` as values on the (h, w) pixels, by linear interpolation; the slot's next use overwrites it."""
    if step <= 1:
        return values
    (h, w), m = size, margin(step)
    buffer = _buffer((h + 2 * m, w + 2 * m), slot)
    return cv2.resize(values, buffer.shape[::-1], dst=buffer, interpolation=cv2.INTER_LINEAR)[m : m + h, m : m + w]


def _buffer(shape: Size, slot: str) -> NDArray[np.float32]:
    """This thread's float32 array `slot`. New arrays for each call cost 870 page faults, as long as half the work."""
    buffer: NDArray[np.float32] | None = getattr(_scratch, slot, None)
    if buffer is None or buffer.shape != shape:
        buffer = np.empty(shape, np.float32)
        setattr(_scratch, slot, buffer)
    return buffer
