"""A network on images of any size in overlapping windows, in bounded memory. No torch, no Ray.

1. Windows of one size are placed on a fixed grid; the last ones are shifted back inside the image.
2. Where windows overlap, their maps are averaged. A window's weight falls to 0 (as a squared sine) towards those of its
   edges that are inside the image, where the network has context on one side only, but not towards the image edge.
"""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

Maps = NDArray[np.float32]
"""float32 (C, H, W)."""
Network = Callable[[NDArray[np.uint8]], Maps]
"""uint8 (h, w) -> maps float32 (C, h, w)."""

# A 64-channel U-Net needs at most about 1.2 kB per pixel: 2.5 GB at 2 megapixels. LIVECell images have 0.37.
WHOLE_PIXELS = 2**21
"""Images with more pixels are processed in windows."""
WINDOW = 1024
"""Height and width of a window, pixels."""
OVERLAP = 0.25
"""Minimum fraction of a window that the next one also covers."""


def bands(network: Network, image: NDArray[np.uint8], window: int = WINDOW) -> Iterator[tuple[int, Maps]]:
    """Maps of an image, in bands of finished rows from top to bottom; each row occurs once.

    Args:
        network: returns the maps of a window, uint8 (h, w), that may be averaged: logits or probabilities.
        image: uint8 (H, W) of any size; may be a memory map.
        window: height and width of the windows; limited to the image's size.

    Yields:
        First row of the band, and its maps, float32 (C, h, W), a copy that the caller may change.

    Raises:
        ValueError: the maps do not have the window's size.
    """
    height, width = image.shape
    ys, weights_of_rows = _grid(height, window)
    xs, weights_of_columns = _grid(width, window)
    step = ys[1] if len(ys) > 1 else height  # maximum rows of a band: the last windows finish more rows at once
    sums: Maps | None = None  # of the rows from y on
    for y, end, weights_y in zip(ys, [*ys[1:], height], weights_of_rows):
        for x, weights_x in zip(xs, weights_of_columns):
            pixels = np.ascontiguousarray(image[y : y + len(weights_y), x : x + len(weights_x)])
            maps = network(pixels)
            if maps.shape[1:] != pixels.shape:
                raise ValueError(f"the network returned maps {maps.shape} of a window {pixels.shape}")
            if sums is None:
                sums = np.zeros((len(maps), len(weights_y), width), np.float32)
            sums[:, :, x : x + len(weights_x)] += maps * (weights_y[:, None] * weights_x)
        assert sums is not None
        finished = end - y
        for top in range(0, finished, step):
            yield y + top, sums[:, top : min(top + step, finished)].copy()
        sums[:, : sums.shape[1] - finished] = sums[:, finished:]
        sums[:, sums.shape[1] - finished :] = 0


def complete_maps(network: Network, image: NDArray[np.uint8]) -> Maps:
    """Maps of an image (H, W), in one pass or, above `WHOLE_PIXELS`, in windows: float32 (C, H, W)."""
    if image.size <= WHOLE_PIXELS:
        return network(image)
    return np.concatenate([band for _, band in bands(network, image)], axis=1)


def outside_padding(maps: Maps, window: tuple[slice, slice], padding: NDArray[np.bool_]) -> Maps:
    """Maps of an image from those of its `window` (`grey_levels.without_padding`): 0 in `padding`, bool (H, W)."""
    complete = np.zeros((len(maps), *padding.shape), np.float32)
    complete[(slice(None), *window)] = maps
    complete[:, padding] = 0
    return complete


def _grid(size: int, window: int) -> tuple[list[int], list[NDArray[np.float32]]]:
    """First pixel and weights of each window along an axis; the weights sum to 1 in every pixel."""
    window = min(window, size)
    starts = [*range(0, size - window, _step(window)), size - window]
    inside = np.arange(window) + 0.5
    slopes, total = [], np.zeros(size)
    for start in starts:
        from_edge = np.minimum(inside if start else np.inf, window - inside if start + window < size else np.inf)
        slope = np.broadcast_to(np.sin(np.pi / 2 * np.minimum(from_edge / (window * OVERLAP), 1)) ** 2, window)
        total[start : start + window] += slope
        slopes.append(slope)
    weights = [slope / total[start : start + window] for start, slope in zip(starts, slopes)]
    return starts, [weight.astype(np.float32) for weight in weights]


def _step(window: int) -> int:
    return max(1, round(window * (1 - OVERLAP)))
