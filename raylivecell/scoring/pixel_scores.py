"""Pixel scores: count pixels per image, add the counts, compute ratios last.

The counts of an image are four integers, in the order of `COUNTS`: tp, fp, fn, tn. They add up over batches,
workers and cell types without rounding, so one worker and N workers give the same score. With P the predicted and
T the true cell pixels:

    Dice = 2 |P and T| / (|P| + |T|) = 2 tp / (2 tp + fp + fn)        (Dice 1945; the F1 of pixels)
    IoU  = |P and T| / |P or T|      = tp / (tp + fp + fn)            (Jaccard 1912)

An image without cells in truth and prediction is correct: Dice = IoU = 1.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from raylivecell.scoring import bootstrap

COUNTS = ("tp", "fp", "fn", "tn")


@torch.no_grad()
def pixel_counts(logits: torch.Tensor, truth: torch.Tensor, ignored: torch.Tensor | None = None) -> torch.Tensor:
    """Count each image's pixels on the logits' device: a pixel is in a cell if its logit is over 0 (p > 0.5).

    Args:
        logits: float (B, C, H, W), channel 0 is the foreground.
        truth: (B, H, W) bool or integer, 0 is background.
        ignored: bool (B, H, W), pixels to leave out; None: all are counted.

    Returns:
        int64 (B, 4), columns as `COUNTS`.
    """
    if logits.ndim != 4 or logits.shape[0] != truth.shape[0] or logits.shape[2:] != truth.shape[1:]:
        raise ValueError(
            f"logits {tuple(logits.shape)} and truth {tuple(truth.shape)}: expected (B, C, H, W) and (B, H, W)"
        )
    predicted, cell = logits[:, 0] > 0, truth != 0
    pairs = [predicted & cell, predicted & ~cell, ~predicted & cell, ~predicted & ~cell]
    if ignored is not None:
        pairs = [pair & ~ignored for pair in pairs]
    return torch.stack([pair.sum(dim=(1, 2)) for pair in pairs], dim=1)


def mask_counts(
    prediction: NDArray[Any], truth: NDArray[Any], ignored: NDArray[np.bool_] | None = None
) -> dict[str, int]:
    """Return the counts of one image as Python ints, by name; both (H, W), 0 is background.

    Pixels of `ignored`, bool (H, W), are left out.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction {prediction.shape} and truth {truth.shape} differ in shape")
    predicted, cell = prediction != 0, truth != 0
    if ignored is not None:
        predicted, cell = predicted[~ignored], cell[~ignored]
    tp, positives, cells = (int(np.count_nonzero(mask)) for mask in (predicted & cell, predicted, cell))
    return {"tp": tp, "fp": positives - tp, "fn": cells - tp, "tn": predicted.size - positives - cells + tp}


def as_counts(rows: Iterable[dict[str, Any]]) -> NDArray[np.int64]:
    """Return the counts of rows with tp, fp, fn and tn: int64 (N, 4)."""
    return np.array([[row[name] for name in COUNTS] for row in rows], np.int64).reshape(-1, len(COUNTS))


def _dice(tp: NDArray[np.int64], fp: NDArray[np.int64], fn: NDArray[np.int64], axis: int = -1) -> NDArray[np.float64]:
    tp, wrong = tp.sum(axis), fp.sum(axis) + fn.sum(axis)
    return np.where(tp + wrong > 0, 2 * tp / np.maximum(2 * tp + wrong, 1), 1.0)


def _iou(tp: NDArray[np.int64], fp: NDArray[np.int64], fn: NDArray[np.int64], axis: int = -1) -> NDArray[np.float64]:
    tp, wrong = tp.sum(axis), fp.sum(axis) + fn.sum(axis)
    return np.where(tp + wrong > 0, tp / np.maximum(tp + wrong, 1), 1.0)


def dice(counts: ArrayLike) -> float:
    """Dice of all pixels together, 0 to 1; counts (4,) or (N, 4). 1 if neither side has a cell."""
    return float(_dice(*np.asarray(counts, np.int64).reshape(-1, 4).T[:3]))


def iou(counts: ArrayLike) -> float:
    """Intersection over union of all pixels, 0 to 1; counts (4,) or (N, 4). 1 if neither side has a cell."""
    return float(_iou(*np.asarray(counts, np.int64).reshape(-1, 4).T[:3]))


def image_dice(counts: ArrayLike) -> NDArray[np.float64]:
    """Dice of each image, float64 (N,), from counts (N, 4); 1 if neither side has a cell."""
    columns = np.asarray(counts, np.int64).reshape(-1, 4).T[:3]
    return _dice(*columns[..., None])


def mean_image_dice(counts: ArrayLike) -> float:
    """Mean over images of each image's Dice: every image has the same weight, however many cells it has."""
    return float(image_dice(counts).mean())


def scores(counts: ArrayLike, seed: int = 0) -> dict[str, Any]:
    """Score counts (N, 4): `images`, `dice`, `iou`, `mean_image_dice` and the 95 % `intervals` of these three.

    The bootstrap resamples images, not pixels: the pixels of an image are not independent.
    """
    rows = np.asarray(counts, np.int64).reshape(-1, 4)
    bounds = {
        "dice": bootstrap.interval(_dice, *rows.T[:3], seed=seed, paired=True),
        "iou": bootstrap.interval(_iou, *rows.T[:3], seed=seed, paired=True),
        "mean_image_dice": bootstrap.interval(np.mean, image_dice(rows), seed=seed),
    }
    return {
        "images": len(rows),
        "dice": dice(rows),
        "iou": iou(rows),
        "mean_image_dice": mean_image_dice(rows),
        "intervals": {name: None if bound is None else bound.tolist() for name, bound in bounds.items()},
    }
