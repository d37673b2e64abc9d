"""Scores of a segmentation: pixels are counted per image, counts are added, ratios are taken last.

A count is four whole numbers an image, in the order of `COUNTS`: tp, fp, fn, tn. They add up over batches, workers and
cell types without rounding, so one worker and N give the same score. With P the predicted and T the true cell pixels:

    Dice = 2 |P and T| / (|P| + |T|) = 2 tp / (2 tp + fp + fn)        (Dice 1945; the F1 of pixels)
    IoU  = |P and T| / |P or T|      = tp / (tp + fp + fn)            (Jaccard 1912)

An image without a cell in truth and in prediction is right: Dice = IoU = 1.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

COUNTS = ("tp", "fp", "fn", "tn")
Statistic = Callable[[NDArray[np.int64]], float]


@torch.no_grad()
def pixel_counts(logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Counts of each image, on the logits' device: a pixel is cell where its logit is over 0 (probability over 0.5).

    Args:
        logits: float (B, C, H, W), the first channel that of the foreground.
        truth: (B, H, W) bool or integer, cell where not 0.

    Returns:
        int64 (B, 4), columns as `COUNTS`.
    """
    if logits.ndim != 4 or logits.shape[0] != truth.shape[0] or logits.shape[2:] != truth.shape[1:]:
        raise ValueError(
            f"logits {tuple(logits.shape)} and truth {tuple(truth.shape)}: want (B, C, H, W) and (B, H, W)"
        )
    said, cell = logits[:, 0] > 0, truth != 0
    pairs = (said & cell, said & ~cell, ~said & cell, ~said & ~cell)
    return torch.stack([pair.sum(dim=(1, 2)) for pair in pairs], dim=1)


def mask_counts(prediction: NDArray[Any], truth: NDArray[Any]) -> dict[str, int]:
    """Counts of one image as Python ints, by name; both (H, W), cell where not 0."""
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction {prediction.shape} and truth {truth.shape} differ in shape")
    said, cell = prediction != 0, truth != 0
    tp, said_n, cell_n = (int(np.count_nonzero(part)) for part in (said & cell, said, cell))
    return {"tp": tp, "fp": said_n - tp, "fn": cell_n - tp, "tn": said.size - said_n - cell_n + tp}


def as_counts(rows: Iterable[dict[str, Any]]) -> NDArray[np.int64]:
    """Rows that hold tp, fp, fn, tn as one int64 array (N, 4)."""
    return np.array([[row[name] for name in COUNTS] for row in rows], np.int64).reshape(-1, len(COUNTS))


def dice(counts: ArrayLike) -> float:
    """Dice of all pixels together, 0 to 1; counts (4,) or (N, 4). 1 where neither side has a cell."""
    tp, fp, fn, _ = np.asarray(counts, np.int64).reshape(-1, 4).sum(axis=0).tolist()
    return 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 1.0


def iou(counts: ArrayLike) -> float:
    """Intersection over union of all pixels, 0 to 1; counts (4,) or (N, 4). 1 where neither side has a cell."""
    tp, fp, fn, _ = np.asarray(counts, np.int64).reshape(-1, 4).sum(axis=0).tolist()
    return tp / (tp + fp + fn) if tp + fp + fn else 1.0


def image_dice(counts: ArrayLike) -> NDArray[np.float64]:
    """Dice of each image, float64 (N,), from counts (N, 4); 1 where neither side has a cell."""
    tp, fp, fn, _ = np.asarray(counts, np.int64).reshape(-1, 4).T
    total = 2 * tp + fp + fn
    return np.where(total > 0, 2 * tp / np.maximum(total, 1), 1.0)


def mean_image_dice(counts: ArrayLike) -> float:
    """Mean over images of each image's Dice: every image weighs the same, however many cells it has."""
    return float(image_dice(counts).mean())


STATISTICS: dict[str, Statistic] = {"dice": dice, "iou": iou, "mean_image_dice": mean_image_dice}


def bootstrap_interval(
    counts: ArrayLike, statistic: Statistic, seed: int = 0, resamples: int = 2000, level: float = 0.95
) -> list[float] | None:
    """Percentile bootstrap interval of `statistic` over images (Efron and Tibshirani 1993, chapter 13).

    Images are drawn with replacement, pixels are not: those of one image are not independent.

    Args:
        counts: (N, 4), a row an image.
        statistic: of counts (N, 4).
        seed: of the draws; the same seed gives the same interval.
        resamples: number of draws of N images; 2000 settle a 95 % bound to about a tenth of the interval's width.
        level: share of the resampled statistics that lies inside.

    Returns:
        [low, high], or None for fewer than two images, which say nothing of their spread.
    """
    rows = np.asarray(counts, np.int64).reshape(-1, 4)
    if len(rows) < 2:
        return None
    rng = np.random.default_rng(seed)
    values = [statistic(rows[rng.integers(len(rows), size=len(rows))]) for _ in range(resamples)]
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return [float(low), float(high)]


def scores(counts: ArrayLike, seed: int = 0) -> dict[str, Any]:
    """`images`, `dice`, `iou`, `mean_image_dice` and the 95 % `intervals` of the three, of counts (N, 4)."""
    rows = np.asarray(counts, np.int64).reshape(-1, 4)
    values = {name: statistic(rows) for name, statistic in STATISTICS.items()}
    intervals = {name: bootstrap_interval(rows, statistic, seed) for name, statistic in STATISTICS.items()}
    return {"images": len(rows), **values, "intervals": intervals}


def summarise(per_image: Sequence[dict[str, Any]], seed: int = 0) -> dict[str, Any]:
    """Scores of a set of images, in all and per cell type.

    Args:
        per_image: a row an image with `file_name`, `cell_type` and the counts tp, fp, fn, tn; any order.
        seed: of the bootstrap.

    Returns:
        `images`, `dice`, `iou` (sums over pixels), `mean_image_dice`, `intervals` (95 %, by statistic; None for one
        image) and `per_cell_type`: the same five fields for each cell type, by name.
    """
    if not per_image:
        raise ValueError("no image to summarise")
    # Sorted, so that the bootstrap's draws do not hang on the order in which workers finish.
    rows = sorted(per_image, key=lambda row: str(row["file_name"]))
    kinds = sorted({row["cell_type"] for row in rows})
    by_kind = {kind: scores(as_counts(row for row in rows if row["cell_type"] == kind), seed) for kind in kinds}
    return {**scores(as_counts(rows), seed), "per_cell_type": by_kind}
