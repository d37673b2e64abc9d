"""Prometheus metrics of runs and sweeps, in addition to Ray's own; Ray exports each as ray_raylivecell_NAME.

They are set at each report, on rank 0 only, so they cost no time per step. Every value has the tag `run`: the name of
the folder of the run or sweep; for a trial SWEEP/trials/NUMBER.
"""

import functools
from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Gauge

PREFIX = "raylivecell_"
RUN, STATE = "run", "state"

OF_RUN = {
    "loss": "Mean training loss since the previous report.",
    "val_dice": "Dice over all pixels of the validation images.",
    "val_msa": "mSA of the validation images, for instance recipes.",
    "images_per_s": "Images per second of all workers together since the previous report.",
    "data_wait_fraction": "Fraction of time that worker 0 waited for data since the previous report, 0 to 1.",
    "samples": "Samples trained on, over all epochs.",
    "step": "Optimiser steps done.",
    "steps": "Optimiser steps of the complete run.",
}
"""Gauges of a run or trial, by column of a report's row."""

SWEEP_BEST, SWEEP_TRIALS = "sweep_best", "sweep_trials"
OF_SWEEP = {
    SWEEP_BEST: "Best validation score of a sweep's complete trials: mSA for instance recipes, otherwise mean Dice.",
    SWEEP_TRIALS: "Trials of a sweep in each state: waiting, running, complete, pruned, fail.",
}


def show_run(run: str, row: Mapping[str, Any]) -> None:
    """Set the gauges of a run or trial to its last report, a row of `worker.report_row`."""
    for name in OF_RUN:
        if name in row:
            _gauge(name).set(float(row[name]), {RUN: _label(run)})


def show_sweep(run: str, trials: Mapping[str, int], best: float | None) -> None:
    """Set the gauges of a sweep: number of trials per state, including zeros, and the best score, if any."""
    for state, count in trials.items():
        _gauge(SWEEP_TRIALS).set(count, {RUN: _label(run), STATE: state})
    if best is not None:
        _gauge(SWEEP_BEST).set(best, {RUN: _label(run)})


def _label(name: str) -> str:
    r"""Convert a name to ASCII, which Ray's metrics require: `zelle_\xfc`."""
    return name.encode("ascii", "backslashreplace").decode()


@functools.cache
def _gauge(name: str) -> Gauge:
    tags = (RUN, STATE) if name == SWEEP_TRIALS else (RUN,)
    return Gauge(PREFIX + name, (OF_RUN | OF_SWEEP)[name], tags)
