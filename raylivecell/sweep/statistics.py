"""Statistics of a study: table of trials, importance of each field, trials with a field off against those with it on.

Final scores of trials that ASHA stopped are not comparable with those of complete trials. `early_scores` returns the
scores at the last step that every trial reached.
"""

import csv
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.importance import FanovaImportanceEvaluator
from optuna.trial import FrozenTrial, TrialState

from raylivecell.recipe import Recipe
from raylivecell.scoring import bootstrap
from raylivecell.sweep.space import SweepConfig, is_equal
from raylivecell.sweep.study import finished, values

RESAMPLES = 50
TREES = 32
# Importances from fewer scores are noise.
LEAST_TRIALS = 8


class Importance(NamedTuple):
    """Fraction of the scores' variance that a parameter alone explains, 0 to 1 (fANOVA, Hutter et al. 2014)."""

    name: str
    value: float
    low: float
    high: float
    """90 % bootstrap interval over trials."""
    chance: float
    """Importance that is exceeded in 5 % of studies with shuffled scores."""
    trials: int


class Group(NamedTuple):
    """Scores of a group of trials, their mean and its 95 % bootstrap interval."""

    name: str
    scores: list[float]
    mean: float
    low: float
    high: float


def complete(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that trained to the end."""
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def score(trial: FrozenTrial) -> float | None:
    """First objective; for a stopped trial the score of its last report; None for a failed one."""
    if trial.state is TrialState.COMPLETE:
        return trial.values[0]
    if trial.state is TrialState.FAIL:
        return None
    return trial.intermediate_values[max(trial.intermediate_values)] if trial.intermediate_values else None


def trial_rows(study: optuna.Study, recipe: Recipe, config: SweepConfig) -> list[dict[str, Any]]:
    """One row per finished trial, by number: state, objectives, steps, seconds, field values, failure."""
    front = {trial.number for trial in study.best_trials}
    rows = []
    for trial in finished(study):
        attributes = trial.user_attrs
        scores = trial.values if trial.values else [score(trial), *[None] * (len(config.objectives) - 1)]
        row = {"trial": trial.number, "state": trial.state.name.lower(), **dict(zip(config.objectives, scores))}
        if len(config.objectives) > 1:
            row["pareto"] = trial.number in front
        row |= {name: attributes.get(name) for name in ("step", "steps", "wall_seconds", "training_seconds")}
        rows.append({**row, **values(trial, recipe, config), "failed": attributes.get("failed")})
    return rows


def trials_csv(study: optuna.Study, recipe: Recipe, config: SweepConfig) -> str:
    """`trial_rows` as CSV; fields that a trial did not use are empty."""
    rows = trial_rows(study, recipe, config)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, [*[name for name in columns if name != "failed"], "failed"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def early_scores(study: optuna.Study) -> tuple[float, dict[int, float]]:
    """Percentage of the training that every trial reached, and scores there by trial number, without failed trials."""
    histories = {
        trial.number: {100 * step / trial.user_attrs["steps"]: y for step, y in trial.intermediate_values.items()}
        for trial in finished(study)
        if trial.state is not TrialState.FAIL and trial.intermediate_values
    }
    if not histories:  # with several objectives the study has final values only
        return 100.0, {trial.number: trial.values[0] for trial in complete(study)}
    common = min(max(history) for history in histories.values())
    return common, {
        number: history[max(percent for percent in history if percent <= common + 1e-9)]
        for number, history in histories.items()
        if min(history) <= common
    }


def importances(study: optuna.Study, seed: int = 0) -> list[Importance]:
    """Importance of each searched parameter for the early score, largest first; [] for fewer than LEAST_TRIALS.

    Conditional parameters are evaluated on the trials that have all parameters: the strength of a deformation matters
    only if there is one.
    """
    scores = early_scores(study)[1]
    trials = [trial for trial in finished(study) if trial.number in scores]
    names = list(dict.fromkeys(name for trial in trials for name in trial.params))
    unconditional = [name for name in names if all(name in trial.params for trial in trials)]
    importances_ = _importances(unconditional, trials, scores, seed)
    if len(unconditional) < len(names):
        with_all = [trial for trial in trials if len(trial.params) == len(names)]
        conditional = _importances(names, with_all, scores, seed)
        importances_ += [importance for importance in conditional if importance.name not in unconditional]
    return sorted(importances_, key=lambda importance: -importance.value)


def _importances(
    names: Sequence[str], trials: Sequence[FrozenTrial], scores: dict[int, float], seed: int
) -> list[Importance]:
    """Importances of the parameters `names` over `trials`, each of which has all of them."""
    if len(trials) < LEAST_TRIALS:
        return []
    labels = np.array([scores[trial.number] for trial in trials])
    values_ = _fanova(names, trials, labels)

    def resampled(indices: NDArray[np.int64]) -> NDArray[np.float64]:
        return _fanova(names, [trials[i] for i in indices], labels[indices])

    bounds = bootstrap.interval(
        resampled, np.arange(len(trials)), seed=seed, resamples=RESAMPLES, level=0.9, vectorized=False
    )
    assert bounds is not None
    rng = np.random.default_rng(seed)
    shuffled = [_fanova(names, trials, rng.permutation(labels)) for _ in range(RESAMPLES)]
    chance = np.quantile(shuffled, 0.95, axis=0)
    return [
        Importance(name, float(value), float(low), float(high), float(level), len(trials))
        for name, value, (low, high), level in zip(names, values_, bounds, chance)
    ]


def _fanova(names: Sequence[str], trials: Sequence[FrozenTrial], scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Importance of each parameter; 0 for constant ones."""
    varied = [name for name in names if len({str(trial.params[name]) for trial in trials}) > 1]
    if not varied or np.ptp(scores) == 0:
        return np.zeros(len(names))
    study = optuna.create_study()
    for trial, score_ in zip(trials, scores):
        params = {name: trial.params[name] for name in varied}
        distributions = {name: trial.distributions[name] for name in varied}
        study.add_trial(optuna.create_trial(params=params, distributions=distributions, value=float(score_)))
    importance = FanovaImportanceEvaluator(n_trees=TREES, seed=0).evaluate(study, params=varied)
    return np.array([importance.get(name, 0.0) for name in names])


def off_on_groups(study: optuna.Study, path: str, off: Any, seed: int = 0) -> list[Group]:
    """Early scores of the trials with the field `path` off and on; [] for fewer than two of each."""
    scores = early_scores(study)[1]
    sides: dict[str, list[float]] = {"off": [], "on": []}
    for trial in finished(study):
        if trial.number in scores and path in trial.params:
            sides["off" if is_equal(trial.params[path], off) else "on"].append(scores[trial.number])
    if min(len(side) for side in sides.values()) < 2:
        return []
    return [group(name, side, seed) for name, side in sides.items()]


def group(name: str, scores: Sequence[float], seed: int = 0) -> Group:
    """Summarise the scores of at least two trials: mean and its interval."""
    bounds = bootstrap.interval(np.mean, scores, seed=seed)
    assert bounds is not None
    return Group(name, list(scores), float(np.mean(scores)), *bounds.tolist())


def difference(a: Group, b: Group, seed: int = 0) -> tuple[float, float, float]:
    """Mean of `b` minus mean of `a`, and its 95 % bootstrap interval."""

    def gain(b: NDArray[np.float64], a: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
        return b.mean(axis) - a.mean(axis)

    bounds = bootstrap.interval(gain, b.scores, a.scores, seed=seed)
    assert bounds is not None
    low, high = bounds.tolist()
    return b.mean - a.mean, low, high


def time_spent(study: optuna.Study) -> tuple[float, float]:
    """Total seconds of all trials, and the fraction spent on training and validation."""
    attributes = [trial.user_attrs for trial in finished(study)]
    wall = sum(trial.get("wall_seconds", 0.0) for trial in attributes)
    return wall, sum(trial.get("training_seconds", 0.0) for trial in attributes) / max(wall, 1e-9)
