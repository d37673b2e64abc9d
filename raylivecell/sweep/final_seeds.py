"""Train the starting and the best recipe again with fresh seeds: the score that selected a trial is biased upwards.

The candidates are the starting recipe, the best trial's, and for each field of `compare_off` the best trial's with the
field off (or, if it is off there, on as in the best trial that has it on). Each run has a folder like a trial's, with
its recipe.yaml: final/CANDIDATE-seed1, ... Candidates are compared over the seeds with which all of them trained to the
end.
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
from raylivecell.sweep.board import TrialTable
from raylivecell.sweep.space import OBJECTIVES, SweepConfig
from raylivecell.sweep.study import values
from raylivecell.sweep.trial import SweepContext

FOLDER = "final"
Scores = dict[str, dict[int, float]]
"""Best validation score of each run that trained to the end: candidate -> seed (1, 2, ...) -> score."""


def candidates(recipe: Recipe, config: SweepConfig, study: optuna.Study, best: FrozenTrial) -> dict[str, space.Values]:
    """Map each candidate's name to the field values of its recipe, without duplicates.

    The best trial may be the starting recipe.
    """
    name, chosen = f"trial-{best.number}", values(best, recipe, config)
    listed: dict[str, space.Values] = {"start": {}, name: chosen}
    searched = set(space.searched_fields(config))
    for path, off in config.compare_off.items():
        if path not in searched:
            continue
        # A conditional field that the trial did not use has the value of the starting recipe.
        if not space.is_equal(space.get(space.apply(recipe, chosen), path), off):
            listed[f"{name}-{path}-off"] = {**chosen, **dict.fromkeys(space.tied_fields(config, path), off)}
        elif other := _best_with(path, off, recipe, config, study):
            source = space.apply(recipe, values(other, recipe, config))
            switched = [path, *space.strength_fields(config, path)]
            paths = [tied for field in switched for tied in space.tied_fields(config, field)]
            fields = {field: space.get(source, field) for field in paths}
            listed[f"{name}-{path}-of-{other.number}"] = {**chosen, **fields}
    trained: list[Recipe] = []
    distinct = {}
    for candidate, fields in listed.items():
        changed = space.apply(recipe, fields)
        if changed not in trained:
            trained.append(changed)
            distinct[candidate] = fields
    return distinct


def _best_with(path: str, off: Any, recipe: Recipe, config: SweepConfig, study: optuna.Study) -> FrozenTrial | None:
    """The best complete trial by the first objective with the field `path` on; of equal ones the earliest."""
    sign = 1 if OBJECTIVES[config.objectives[0]].mode == "max" else -1
    trials = [
        trial
        for trial in statistics.complete(study)
        if not space.is_equal(space.get(space.apply(recipe, values(trial, recipe, config)), path), off)
    ]
    return max(trials, key=lambda trial: (sign * trial.values[0], -trial.number), default=None)


def run(
    shared: SweepContext, chosen: Mapping[str, space.Values], seeds: int, resources: tuner.TrialResources, retries: int
) -> None:
    """Train each candidate to the end with each of `seeds` fresh seeds, except for runs that have finished before."""
    jobs: list[dict[str, Any]] = [
        {"folder": f"{FOLDER}/{name}-seed{seed}", "values": {**fields, "seed": shared.recipe.seed + seed}}
        for seed in range(1, seeds + 1)
        for name, fields in chosen.items()
    ]
    for job in jobs:
        text = recipes.dump(space.apply(shared.recipe, job["values"]))
        storage.write_bytes(storage.join(shared.out, job["folder"], run_folder.RECIPE), text.encode())
    samples = len(shared.samples.train)
    unfinished = [job for job in jobs if _score(storage.join(shared.out, job["folder"]), samples) is None]
    if unfinished:
        with TrialTable(
            len(jobs), len(jobs) - len(unfinished), None, space.SCORES[shared.recipe.targets], "fresh seeds"
        ) as board:
            entries = {"job": tune.grid_search(unfinished)}
            tuner.run(shared, resources, retries, [tuner.TrialProgress(board, shared.out)], param_space=entries)


def scores(out: str, names: Mapping[str, Any] | list[str], samples: int) -> Scores:
    """Scores of the candidates `names` in the sweep's folder `out`, over the seeds with which all of them finished.

    Args:
        out: the sweep's folder.
        names: candidates.
        samples: number of training images, which determines a run's steps.

    Returns:
        Scores without candidates that never finished; {} if a candidate was never started, or without a common seed.
    """
    started = {name: _seeds(out, name) for name in names}
    if not all(started.values()):
        return {}
    finished: Scores = {}
    for name, seeds in started.items():
        by_seed = {seed: _score(folder_of(out, name, seed), samples) for seed in seeds}
        by_seed_finished = {seed: score for seed, score in by_seed.items() if score is not None}
        if by_seed_finished:
            finished[name] = by_seed_finished
    common = sorted(set.intersection(*map(set, finished.values()))) if finished else []
    return {name: {seed: by_seed[seed] for seed in common} for name, by_seed in finished.items()} if common else {}


def _score(folder: str, samples: int) -> float | None:
    """Best validation score of a run; None unless it trained to the end."""
    if not {"metrics.jsonl", run_folder.RECIPE} <= set(storage.list_names(folder)):
        return None
    recipe = recipes.load(storage.join(folder, run_folder.RECIPE))
    uri = storage.join(folder, "metrics.jsonl")
    with storage.validating(uri, "delete that run's folder to train it again"):
        history = [json.loads(line) for line in storage.read_bytes(uri).splitlines()]
        steps = SampleSchedule(recipe.seed, samples, recipe.batch_size, recipe.phases).steps
        return max(validation_score(row) for row in history) if history and history[-1]["step"] >= steps else None


def winner(out: str, final_scores: Scores, unit: str) -> tuple[str, str]:
    """Folder of the best run of the candidate with the highest mean, and the reason as text.

    Args:
        out: the sweep's folder.
        final_scores: result of `scores`, not empty.
        unit: name of the score, such as validation Dice.
    """
    means = {name: float(np.mean(list(by_seed.values()))) for name, by_seed in final_scores.items()}
    name = max(means, key=lambda name: means[name])
    seed = max(final_scores[name], key=lambda seed: final_scores[name][seed])
    listed = ", ".join(f"{candidate} {mean:.4f}" for candidate, mean in means.items())
    seeds = ", ".join(map(str, final_scores[name]))
    return folder_of(out, name, seed), f"{name}; mean {unit} with fresh seeds {seeds}: {listed}"


def folder_of(out: str, name: str, seed: int) -> str:
    """Folder of a candidate's run with a seed."""
    return storage.join(out, FOLDER, f"{name}-seed{seed}")


def _seeds(out: str, name: str) -> list[int]:
    """Seeds with which a candidate's training has started."""
    heads = [folder.rpartition("-seed") for folder in storage.list_names(storage.join(out, FOLDER))]
    return sorted(int(seed) for head, _, seed in heads if head == name and seed.isdecimal())
