"""Start and best trained anew with fresh seeds: the score by which a trial was chosen flatters it.

The contenders are the starting recipe, the best trial's, and that without elastic deformation (or, where it has none,
with that of the best trial that has). Each run's folder is that of a trial: confirm/CONTENDER-seed1, ...
"""

import json
from collections.abc import Mapping

import numpy as np
import optuna
from optuna.trial import FrozenTrial
from ray import tune

from raylivecell import space, storage, sweep_stats, tuner
from raylivecell.live import Board
from raylivecell.loop import rank
from raylivecell.recipe import Recipe
from raylivecell.space import ELASTIC, SweepConfig
from raylivecell.study import values
from raylivecell.trial import Shared

FOLDER = "confirm"
Scores = dict[str, list[float]]
"""Best validation Dice of each run, by contender, in the order of the seeds."""


def contenders(recipe: Recipe, config: SweepConfig, study: optuna.Study, best: FrozenTrial) -> dict[str, space.Values]:
    """Recipes to train anew, as values of fields, by names that say which trial they are of."""
    name, chosen = f"trial-{best.number}", values(best, recipe, config)
    found: dict[str, space.Values] = {"start": {}, name: chosen}
    if ELASTIC not in config.space:
        return found
    if chosen[ELASTIC] > 0:
        return {**found, f"{name}-elastic-off": {**chosen, ELASTIC: 0.0}}
    having = [trial for trial in sweep_stats.complete(study) if trial.params.get(ELASTIC, 0) > 0]
    if not having:
        return found
    other = max(having, key=lambda trial: (trial.values[0], -trial.number))
    elastic = {path: value for path, value in values(other, recipe, config).items() if path.startswith(ELASTIC[:-1])}
    return {**found, f"{name}-elastic-of-{other.number}": {**chosen, **elastic}}


def run(shared: Shared, chosen: Mapping[str, space.Values], seeds: int, room: tuner.Capacity, retries: int) -> None:
    """Train each contender to its end with each of `seeds` fresh seeds, where that is not done yet."""
    jobs = [
        {"folder": f"{FOLDER}/{name}-seed{seed}", "values": {**fields, "seed": shared.recipe.seed + seed}}
        for seed in range(1, seeds + 1)
        for name, fields in chosen.items()
    ]
    left = [job for job in jobs if not _is_done(shared, job)]
    if left:
        with Board(len(jobs), len(jobs) - len(left), None, space.SCORES[shared.recipe.targets], "confirming") as board:
            entries = {"job": tune.grid_search(left)}
            tuner.run(shared, room, retries, [tuner.Watch(board, shared.out)], param_space=entries)


def _is_done(shared: Shared, job: dict) -> bool:
    steps = _history(storage.join(shared.out, job["folder"]))
    return bool(steps) and steps[-1]["step"] >= shared.job({"job": job}).plan().steps


def _history(folder: str) -> list[dict]:
    if "metrics.jsonl" not in storage.list_names(folder):
        return []
    where = storage.join(folder, "metrics.jsonl")
    with storage.unverified(where, "delete that run's folder, and it is trained again"):
        return [json.loads(line) for line in storage.read_bytes(where).splitlines()]


def scores(out: str, chosen: Mapping[str, space.Values]) -> Scores:
    """Of the contenders' whole runs under `out`; {} unless each has been run as often as the others."""
    found: Scores = {}
    for name in chosen:
        histories = [_history(_folder(out, name, seed)) for seed in range(1, 1 + _seeds(out, name))]
        ends = [history[-1]["step"] if history else 0 for history in histories]
        whole = [history for history, end in zip(histories, ends) if end == max(ends)]
        found[name] = [max(rank(row) for row in history) for history in whole if history]
    counts = {len(one) for one in found.values()}
    return found if len(counts) == 1 and counts != {0} else {}


def winner(out: str, confirmed: Scores) -> tuple[str, str]:
    """The contender with the highest mean: the folder of its best run, and how it won, in words."""
    name = max(confirmed, key=lambda one: float(np.mean(confirmed[one])))
    means = ", ".join(f"{one} {np.mean(runs):.4f}" for one, runs in confirmed.items())
    best = int(np.argmax(confirmed[name])) + 1
    return _folder(out, name, best), f"{name}; mean validation Dice with {len(confirmed[name])} fresh seeds: {means}"


def _folder(out: str, name: str, seed: int) -> str:
    return storage.join(out, FOLDER, f"{name}-seed{seed}")


def _seeds(out: str, name: str) -> int:
    """How many runs there are of a contender."""
    heads = [found.rpartition("-seed")[0] for found in storage.list_names(storage.join(out, FOLDER))]
    return heads.count(name)
