"""The thresholds that turn a network's maps into cells, chosen on validation images.

One value after the other is tried over a grid while the others stay, and kept where the mean mSA of the images grows;
in rounds, until a round changes nothing. A full grid would hold 6,000 points, this takes some 50 of them.
"""

from collections.abc import Sequence

import numpy as np

from raylivecell.cells import watershed
from raylivecell.cells.watershed import InstanceConfig, Maps
from raylivecell.core.console import track
from raylivecell.recipe import Targets
from raylivecell.scoring import instance_scores

GRID: dict[str, tuple[float, ...]] = {
    "prominence": (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.14, 0.2, 0.28, 0.4),
    "threshold": (0.3, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7),
    "smoothing": (0.0, 0.7, 1.0, 1.5, 2.0, 3.0),
    "min_area": (0, 10, 20, 40, 60, 90),
}
ROUNDS = 3

Case = tuple[Maps, instance_scores.Labels]
"""Maps float32 (C, H, W) of an image, and its true labels (H, W)."""


def calibrate(cases: Sequence[Case], targets: Targets) -> tuple[InstanceConfig, float]:
    """The best thresholds found for `cases`, and the mean mSA with them; at least that of the defaults."""
    best = watershed.default(targets)
    score = mean_msa(cases, targets, best)
    steps = track(_candidates(), "calibrating", ROUNDS * sum(map(len, GRID.values())))
    changed: dict[int, bool] = {}
    for turn, name, value in steps:
        tried = best.model_copy(update={name: value})
        if tried == best or (turn and not changed.get(turn - 1)):
            continue
        found = mean_msa(cases, targets, tried)
        if found > score:
            best, score, changed[turn] = tried, found, True
    return best, score


def mean_msa(cases: Sequence[Case], targets: Targets, config: InstanceConfig) -> float:
    """Mean over images of the mSA of the cells that `config` makes of their maps."""
    pairs = (instance_scores.overlaps(watershed.segment(maps, targets, config), truth) for maps, truth in cases)
    return float(np.mean([instance_scores.segmentation_accuracy(one).mean() for one in pairs]))


def _candidates() -> list[tuple[int, str, float]]:
    return [(turn, name, value) for turn in range(ROUNDS) for name, values in GRID.items() for value in values]
