"""Masks of cells as COCO's compressed run lengths: some 60 bytes a cell, and cells may overlap."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

Rle = dict[str, Any]
"""{"size": [H, W], "counts": bytes}: run lengths down the columns, background first."""


def encode(labels: NDArray[np.integer[Any]]) -> list[Rle]:
    """A mask for each label of an image (H, W), 0 background, in ascending order; labels need not be consecutive."""
    if not labels.any():
        return []
    flat = labels.T.ravel()
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    ends, owner = np.append(starts[1:], flat.size), flat[starts]
    inside = np.flatnonzero(owner)
    inside = inside[np.argsort(owner[inside], kind="stable")]
    owner = owner[inside]
    cells = np.split(inside, np.flatnonzero(owner[1:] != owner[:-1]) + 1)
    return [_compressed(starts[cell], ends[cell], labels.shape) for cell in cells]


def encode_patch(mask: NDArray[np.uint8], top: int, left: int, shape: tuple[int, int]) -> Rle:
    """A mask of 0 and 1 (h, w) that lies at (top, left) of a frame of `shape` (H, W), as a mask of the frame."""
    height, width = mask.shape
    columns = np.zeros((width, height + 2), np.int8)  # a 0 before and after each column
    columns[:, 1:-1] = mask.T
    turns = np.flatnonzero(np.diff(columns.ravel()))
    x, y = np.divmod(turns, height + 2)
    places = (left + x) * shape[0] + top + y
    starts, ends = places[::2], places[1::2]
    if height == shape[0]:  # a run to the frame's bottom may go on at its top
        joined = np.flatnonzero(starts[1:] == ends[:-1])
        starts, ends = np.delete(starts, joined + 1), np.delete(ends, joined)
    return _compressed(starts, ends, shape)


def decode(rle: Rle) -> NDArray[np.uint8]:
    """A mask's pixels, uint8 (H, W), 1 inside."""
    return coco_mask.decode(rle)


def _compressed(starts: NDArray[np.int64], ends: NDArray[np.int64], shape: tuple[int, ...]) -> Rle:
    """A mask of the runs [starts, ends) of a frame (H, W), column after column."""
    height, width = shape
    edges = np.empty(2 * len(starts) + 2, np.int64)
    edges[0], edges[1:-1:2], edges[2:-1:2], edges[-1] = 0, starts, ends, height * width
    counts = np.diff(edges)
    if counts[-1] == 0:
        counts = counts[:-1]
    return coco_mask.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)
