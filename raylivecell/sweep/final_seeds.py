"""Start and best trained again with fresh seeds: the score by which a trial was chosen is too high.

The candidates are the starting recipe, the best trial's, and for each field of `compare_off` the best trial's with it
off (or, if it is off there, on as in the best trial that has it on). Each run has a folder as a trial has, with the
run's recipe.yaml: final/CANDIDATE-seed1, ... Candidates are compared over the seeds with which all of them trained to
their end.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial
from ray import tune

from raylivecell import recipe as recipes
from raylivecell.core import storage
from raylivecell.ingest.order import SampleSchedule
from raylivecell.recipe import Recipe
from raylivecell.runs import folder as run_folder
from raylivecell.runs.progress import validation_score
from raylivecell.sweep import space, statistics
from raylivecell.sweep import tune as tuner
from raylivecell.sweep.space import OBJECTIVES, SweepConfig
from raylivecell.sweep.study import values
from raylivecell.sweep.trial import SweepContext
from raylivecell.training.display import TrialTable

FOLDER = "final"
Scores = dict[str, dict[int, float]]
"""Best validation score of each run that trained to its end, by candidate and seed (1, 2, ...)."""


def candidates(recipe: Recipe, config: SweepConfig, study: optuna.Study, best: FrozenTrial) -> dict[str, space.Values]:
    """Recipes to train again, as values of fields, by names that say which trial they are of.

    A candidate whose recipe is that of an earlier one is left out: the best trial may be the starting recipe.
    """
    name, chosen = f"trial-{best.number}", values(best, recipe, config)
    candidates: dict[str, space.Values] = {"start": {}, name: chosen}
    searched = set(space.searched_fields(config))
    for path, off in config.compare_off.items():
        if path not in searched:
            continue
        # A conditional field that the trial did not use has the value of the starting recipe.
        if not space.is_equal(space.get(space.apply(recipe, chosen), path), off):
            candidates[f"{name}-{path}-off"] = {**chosen, **dict.fromkeys(space.tied_fields(config, path), off)}
        elif other := _best_with(path, off, recipe, config, study):
            source = space.apply(recipe, values(other, recipe, config))
            switched = [path, *space.strength_fields(config, path)]
            fields = {field: space.get(source, field) for one in switched for field in space.tied_fields(config, one)}
            candidates[f"{name}-{path}-of-{other.number}"] = {**chosen, **fields}
    trained: list[Recipe] = []
    distinct = {}
    for candidate, fields in candidates.items():
        changed = space.apply(recipe, fields)
        if changed not in trained:
            trained.append(changed)
            distinct[candidate] = fields
    return distinct


def _best_with(path: str, off: Any, recipe: Recipe, config: SweepConfig, study: optuna.Study) -> FrozenTrial | None:
    """The best finished trial by the first objective, the earliest of equals, in which the field `path` is on."""
    sign = 1 if OBJECTIVES[config.objectives[0]].mode == "max" else -1
    trials = [
        trial
        for trial in statistics.complete(study)
        if not space.is_equal(space.get(space.apply(recipe, values(trial, recipe, config)), path), off)
    ]
    return max(trials, key=lambda trial: (sign * trial.values[0], -trial.number), default=None)


def run(
    shared: SweepContext, chosen: Mapping[str, space.Values], seeds: int, room: tuner.TrialResources, retries: int
) -> None:
    """Train each candidate to its end with each of `seeds` fresh seeds, where that is not done yet."""
    jobs: list[dict[str, Any]] = [
        {"folder": f"{FOLDER}/{name}-seed{seed}", "values": {**fields, "seed": shared.recipe.seed + seed}}
        for seed in range(1, seeds + 1)
        for name, fields in chosen.items()
    ]
    for job in jobs:
        text = recipes.dump(space.apply(shared.recipe, job["values"]))
        storage.write_bytes(storage.join(shared.out, job["folder"], run_folder.RECIPE), text.encode())
    samples = len(shared.samples.train)
    left = [job for job in jobs if _score(storage.join(shared.out, job["folder"]), samples) is None]
    if left:
        with TrialTable(
            len(jobs), len(jobs) - len(left), None, space.SCORES[shared.recipe.targets], "confirming"
        ) as board:
            entries = {"job": tune.grid_search(left)}
            tuner.run(shared, room, retries, [tuner.TrialProgress(board, shared.out)], param_space=entries)


def scores(out: str, names: Mapping[str, Any] | list[str], samples: int) -> Scores:
    """Scores of the candidates `names` under `out`, over the seeds that all of them finished.

    Args:
        out: the sweep's folder.
        names: of the candidates.
        samples: training images of the dataset, which with the recipe decide a run's steps.

    Returns:
        A candidate that finished with no seed is left out. {} where a candidate was never begun, or no seed is left.
    """
    begun = {name: _seeds(out, name) for name in names}
    if not all(begun.values()):
        return {}
    found: Scores = {}
    for name, seeds in begun.items():
        each = {seed: _score(folder_of(out, name, seed), samples) for seed in seeds}
        found[name] = {seed: score for seed, score in each.items() if score is not None}
    finished = {name: each for name, each in found.items() if each}
    common = set.intersection(*(set(each) for each in finished.values())) if finished else set()
    return {name: {seed: each[seed] for seed in sorted(common)} for name, each in finished.items()} if common else {}


def _score(folder: str, samples: int) -> float | None:
    """Best validation score of a run; none unless it trained to its end."""
    if not {"metrics.jsonl", run_folder.RECIPE} <= set(storage.list_names(folder)):
        return None
    recipe = recipes.load(storage.join(folder, run_folder.RECIPE))
    where = storage.join(folder, "metrics.jsonl")
    with storage.validating(where, "delete that run's folder, and it is trained again"):
        history = [json.loads(line) for line in storage.read_bytes(where).splitlines()]
        steps = SampleSchedule(recipe.seed, samples, recipe.batch_size, recipe.phases).steps
        return max(validation_score(row) for row in history) if history and history[-1]["step"] >= steps else None


def winner(out: str, confirmed: Scores, unit: str) -> tuple[str, str]:
    """The candidate with the highest mean: the folder of its best run, and why, in words.

    Args:
        out: the sweep's folder.
        confirmed: what `scores` returned, not empty.
        unit: what the scores are, such as validation Dice.
    """
    means = {name: float(np.mean(list(each.values()))) for name, each in confirmed.items()}
    name = max(means, key=lambda one: means[one])
    seed = max(confirmed[name], key=lambda one: confirmed[name][one])
    listed = ", ".join(f"{one} {mean:.4f}" for one, mean in means.items())
    seeds = ", ".join(str(one) for one in confirmed[name])
    return folder_of(out, name, seed), f"{name}; mean {unit} with fresh seeds {seeds}: {listed}"


def folder_of(out: str, name: str, seed: int) -> str:
    """The folder of a candidate's run with a seed."""
    return storage.join(out, FOLDER, f"{name}-seed{seed}")


def _seeds(out: str, name: str) -> list[int]:
    """Seeds with which a candidate was begun."""
    heads = [folder.rpartition("-seed") for folder in storage.list_names(storage.join(out, FOLDER))]
    return sorted(int(seed) for head, _, seed in heads if head == name and seed.isdecimal())
