"""Tune the watershed thresholds on validation images.

Coordinate search on a grid: each threshold in turn is set to the value with the highest mean mSA, until a round changes
none (at most 3 rounds). This evaluates about 60 points; the full grid has 28,800.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from raylivecell.cells import watershed
from raylivecell.cells.watershed import InstanceConfig, Maps
from raylivecell.core.console import track
from raylivecell.recipe import Targets
from raylivecell.scoring import instance_scores

GRID: dict[str, tuple[float, ...]] = {
    "prominence": (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.14, 0.2, 0.28, 0.4),
    "threshold": (0.3, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7, 0.8),
    "smoothing": (0.0, 0.7, 1.0, 1.5, 2.0, 3.0),
    "min_area": (0, 10, 20, 40, 60, 90),
    "min_score": (0.0, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85),
}
ROUNDS = 3

Case = tuple[Maps, instance_scores.Labels, NDArray[np.bool_] | None]
"""Predicted maps of an image, float32 (C, H, W), its ground-truth labels (H, W), and its ignore region, if any."""


def calibrate(cases: Sequence[Case], targets: Targets) -> tuple[InstanceConfig, float]:
    """The best thresholds for `cases`, and their mean mSA, which is at least that of the defaults."""
    best = watershed.default(targets)
    score = mean_msa(cases, targets, best)
    candidates = [(turn, name, value) for turn in range(ROUNDS) for name, values in GRID.items() for value in values]
    steps = track(candidates, "calibrating", len(candidates))
    changed: dict[int, bool] = {}
    for turn, name, value in steps:
        config = best.model_copy(update={name: value})
        if config == best or (turn and not changed.get(turn - 1)):
            continue
        msa = mean_msa(cases, targets, config)
        if msa > score:
            best, score, changed[turn] = config, msa, True
    return best, score


def mean_msa(cases: Sequence[Case], targets: Targets, config: InstanceConfig) -> float:
    """Mean mSA over images, of the cells segmented by the watershed with `config`."""
    scores = []
    for maps, truth, ignored in cases:
        labels = instance_scores.without_ignored(watershed.segment(maps, targets, config), ignored)
        scores.append(instance_scores.segmentation_accuracy(instance_scores.overlaps(labels, truth)).mean())
    return float(np.mean(scores))
