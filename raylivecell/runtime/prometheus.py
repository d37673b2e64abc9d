"""What Prometheus scrapes of a run or a sweep, beside Ray's own metrics: Ray exports each as ray_raylivecell_NAME.

Set where a report is made anyway, on rank 0 alone: a step costs nothing more. Every value carries the tag `run`: the
name of the run's or sweep's folder, of a trial SWEEP/trials/NUMBER.
"""

import functools
from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Gauge

PREFIX = "raylivecell_"
RUN, STATE = "run", "state"

OF_RUN = {
    "loss": "Training loss, the mean since the report before.",
    "val_dice": "Dice over all pixels of the validation images.",
    "val_msa": "mSA of the validation images, of recipes that tell cells apart.",
    "images_per_s": "Images trained on a second, by all workers together, since the report before.",
    "data_wait_fraction": "Share of its time that worker 0 waited for data since the report before, 0 to 1.",
    "samples": "Samples done, of all epochs.",
    "step": "Optimiser steps done.",
    "steps": "Optimiser steps of the whole run.",
}
"""Gauges of a run or trial: the columns of a report's row that are shown."""

SWEEP_BEST, SWEEP_TRIALS = "sweep_best", "sweep_trials"
OF_SWEEP = {
    SWEEP_BEST: "Best score of a sweep's whole trials: validation mSA where cells are told apart, else mean Dice.",
    SWEEP_TRIALS: "Trials of a sweep in each state: waiting, running, complete, pruned, fail.",
}


def show_run(run: str, row: Mapping[str, Any]) -> None:
    """Of the run or trial `run` its last report, as `worker.told` gives it."""
    for name in OF_RUN:
        if name in row:
            _gauge(name).set(float(row[name]), {RUN: _label(run)})


def show_sweep(run: str, trials: Mapping[str, int], best: float | None) -> None:
    """Of the sweep `run` how many trials each state has, zeros too, and the best score so far (none: not shown)."""
    for state, count in trials.items():
        _gauge(SWEEP_TRIALS).set(count, {RUN: _label(run), STATE: state})
    if best is not None:
        _gauge(SWEEP_BEST).set(best, {RUN: _label(run)})


def _label(name: str) -> str:
    r"""A name as Ray's metrics take it, in ASCII: `zelle_\xfc`."""
    return name.encode("ascii", "backslashreplace").decode()


@functools.cache
def _gauge(name: str) -> Gauge:
    tags = (RUN, STATE) if name == SWEEP_TRIALS else (RUN,)
    return Gauge(PREFIX + name, (OF_RUN | OF_SWEEP)[name], tags)
