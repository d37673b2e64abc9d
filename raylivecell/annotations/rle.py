"""Masks in COCO's run-length encoding (RLE): about 60 bytes per cell; cells may overlap.

1. `encode...`, `compress`         label image, patch, polygons or run lengths -> compressed RLE
   `label_runs`, `patch_runs`      label image or patch -> run lengths
2. `decode`                        compressed RLE -> mask
3. `run_lengths`, `mask_of_runs`   untrusted RLE -> run lengths -> mask; pycocotools may crash or hang on these
   `window_of_runs`                the same, only the columns that contain the mask
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

Rle = dict[str, Any]
"""{"size": [H, W], "counts": bytes}: compressed run lengths, column-major, background first."""


def encode(labels: NDArray[np.integer[Any]]) -> list[Rle]:
    """Encode the mask of each label of an image (H, W), 0 background, in ascending order; labels may have gaps."""
    return [compress(runs, labels.shape) for runs in label_runs(labels).values()]


def label_runs(labels: NDArray[np.integer[Any]]) -> dict[int, NDArray[np.int64]]:
    """Return label -> run lengths of its mask, in ascending order; like `encode`, but not compressed."""
    if not labels.any():
        return {}
    flat = labels.T.ravel()
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    ends, run_labels = np.append(starts[1:], flat.size), flat[starts]
    foreground = np.flatnonzero(run_labels)
    foreground = foreground[np.argsort(run_labels[foreground], kind="stable")]
    run_labels = run_labels[foreground]
    cells = np.split(foreground, np.flatnonzero(run_labels[1:] != run_labels[:-1]) + 1)
    return {int(flat[starts[cell[0]]]): _runs_of_intervals(starts[cell], ends[cell], labels.shape) for cell in cells}


def encode_patch(mask: NDArray[np.uint8], top: int, left: int, shape: tuple[int, int]) -> Rle:
    """Encode a mask of 0 and 1 (h, w), placed at (top, left), as a mask of the image `shape` (H, W)."""
    return compress(patch_runs(mask, top, left, shape), shape)


def patch_runs(mask: NDArray[np.uint8], top: int, left: int, shape: tuple[int, int]) -> NDArray[np.int64]:
    """Return the run lengths of a mask of 0 and 1 (h, w), placed at (top, left) in the image `shape` (H, W)."""
    height, width = mask.shape
    columns = np.zeros((width, height + 2), np.int8)  # a 0 before and after each column
    columns[:, 1:-1] = mask.T
    edges = np.flatnonzero(np.diff(columns.ravel()))
    x, y = np.divmod(edges, height + 2)
    positions = (left + x) * shape[0] + top + y
    starts, ends = positions[::2], positions[1::2]
    if height == shape[0]:  # a run that reaches the bottom may continue at the top of the next column
        continued = np.flatnonzero(starts[1:] == ends[:-1])
        starts, ends = np.delete(starts, continued + 1), np.delete(ends, continued)
    return _runs_of_intervals(starts, ends, shape)


def encode_polygons(polygons: Iterable[np.ndarray], shape: tuple[int, int]) -> Rle:
    """Encode the union of polygons, each (V, 2) of finite x and y in pixels, as a mask of the image `shape` (H, W)."""
    height, width = shape
    limit = np.array((width, height))  # pycocotools' time and memory grow with the length of an edge
    flat = [np.clip(polygon, -limit, 2 * limit).ravel().tolist() for polygon in polygons]
    return coco_mask.merge(coco_mask.frPyObjects(flat, height, width))


def compress(runs: NDArray[np.integer[Any]], shape: tuple[int, ...]) -> Rle:
    """Compress run lengths that fill the image `shape` (H, W)."""
    height, width = shape
    return coco_mask.frPyObjects({"size": [height, width], "counts": runs.tolist()}, height, width)


def decode(rle: Rle) -> NDArray[np.uint8]:
    """Decode a mask: uint8 (H, W), 1 inside."""
    return coco_mask.decode(rle)


def run_lengths(text: bytes) -> NDArray[np.int64]:
    """Decode the run lengths in COCO's compressed RLE text; damaged text may give negative ones.

    Format (cocoapi, maskApi.c, rleToString): 5 bits per character, offset 48, least significant first, bit 6 set if
    more follow, sign in bit 5 of the last character; from run 4 on, the difference from the run two before.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        if shift > 60:  # larger than any image; without a limit the number and the time per step grow
            return np.array([-1], np.int64)
        bits = character - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    return np.array([max(min(run, 2**40), -1) for run in runs], np.int64)


def window_of_runs(shape: tuple[int, int], runs: NDArray[np.int64]) -> tuple[int, NDArray[np.bool_]] | None:
    """Decode run lengths in the columns that contain the mask.

    Args:
        shape: (H, W) of the image.
        runs: column-major, background first.

    Returns:
        The first of these columns and the mask in them, bool (H, w); None if `runs` do not fill the image exactly.
    """
    height, width = shape
    if (runs < 0).any() or int(runs.sum()) != height * width:
        return None
    ends = np.cumsum(runs)
    inside = np.flatnonzero(runs[1::2]) * 2 + 1
    if not len(inside):
        return 0, np.zeros((height, 0), bool)
    left = int(ends[inside[0] - 1]) // height
    right = -(-int(ends[inside[-1]]) // height)
    edges = np.clip(ends, left * height, right * height)
    values = (np.arange(len(runs)) % 2).astype(bool)
    mask = np.repeat(values, np.diff(edges, prepend=left * height)).reshape(right - left, height).T
    return left, mask


def mask_of_runs(size: tuple[int, int], runs: NDArray[np.int64]) -> NDArray[np.bool_] | None:
    """Decode run lengths into a mask, bool `size` (H, W); None if they do not fill it exactly."""
    height, width = size
    if (runs < 0).any() or int(runs.sum()) != height * width:
        return None
    values = (np.arange(len(runs)) % 2).astype(bool)
    return np.repeat(values, runs).reshape(width, height).T


def _runs_of_intervals(starts: NDArray[np.int64], ends: NDArray[np.int64], shape: tuple[int, ...]) -> NDArray[np.int64]:
    """Run lengths of a mask of pixels [start, end), counted column-major, of the image `shape` (H, W)."""
    edges = np.empty(2 * len(starts) + 2, np.int64)
    edges[0], edges[1:-1:2], edges[2:-1:2], edges[-1] = 0, starts, ends, shape[0] * shape[1]
    runs = np.diff(edges)
    return runs if runs[-1] else runs[:-1]
