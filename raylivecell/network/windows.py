"""Images of any size through a network, in overlapping windows, in bounded memory. No torch, no Ray.

1. Windows of one size are placed on a fixed grid; the last ones are shifted back inside the image.
2. Where windows overlap, their maps are averaged. A window's weight falls to nothing (as a squared sine) towards those
   of its edges that are inside the image, where the network saw one side only, and not towards the image's own.
"""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

Maps = NDArray[np.float32]
"""float32 (C, H, W)."""
Network = Callable[[NDArray[np.uint8]], Maps]
"""uint8 (h, w) -> maps float32 (C, h, w)."""

# A 64-channel U-Net needs about 1.2 kB a pixel at its widest place: 2.5 GB at 2 megapixels. LIVECell has 0.37.
WHOLE_PIXELS = 2**21
"""Images of more pixels go through the network in windows."""
WINDOW = 1024
"""Height and width of a window, pixels."""
OVERLAP = 0.25
"""Part of a window that the next one covers too, at the least."""


def bands(network: Network, image: NDArray[np.uint8], window: int = WINDOW) -> Iterator[tuple[int, Maps]]:
    """Maps of an image, in bands of finished rows from top to bottom, each row once.

    Args:
        network: maps of a window, uint8 (h, w), of any sort that may be averaged: logits or probabilities.
        image: uint8 (H, W) of any size; it may be a memory map.
        window: height and width of the windows; the image's own where that is less.

    Yields:
        The band's first row, and its maps, float32 (C, h, W), the receiver's to keep.

    Raises:
        ValueError: the maps are not of the window's size.
    """
    height, width = image.shape
    ys, high = _grid(height, window)
    xs, wide = _grid(width, window)
    step = ys[1] if len(ys) > 1 else height  # the last windows finish more rows than that at once
    held: Maps | None = None
    for y, end, weights_y in zip(ys, [*ys[1:], height], high):
        for x, weights_x in zip(xs, wide):
            pixels = np.ascontiguousarray(image[y : y + len(weights_y), x : x + len(weights_x)])
            maps = network(pixels)
            if maps.shape[1:] != pixels.shape:
                raise ValueError(f"the network made maps {maps.shape} of a window {pixels.shape}")
            if held is None:
                held = np.zeros((len(maps), len(weights_y), width), np.float32)
            held[:, :, x : x + len(weights_x)] += maps * (weights_y[:, None] * weights_x)
        assert held is not None
        done = end - y
        for top in range(0, done, step):
            yield y + top, held[:, top : min(top + step, done)].copy()
        held[:, : held.shape[1] - done] = held[:, done:]
        held[:, held.shape[1] - done :] = 0


def _grid(size: int, window: int) -> tuple[list[int], list[NDArray[np.float32]]]:
    """First pixels of the windows along an axis, and each window's weights, which sum to 1 in every pixel."""
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
