"""Statistics of a study: real effects are detected, others are not reported."""

import csv
import io
import math

import numpy as np
import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from raylivecell.recipe import Recipe
from raylivecell.sweep import space, statistics
from raylivecell.sweep.space import ELASTIC, Dimension, SweepConfig

LR, SHARE, ALPHA = "optimizer.lr", "loss.bce_weight", "augment.elastic.alpha_x"
DISTRIBUTIONS = {
    LR: FloatDistribution(1e-4, 3e-2, log=True),
    SHARE: FloatDistribution(0, 1),
    ELASTIC: FloatDistribution(0, 1, step=0.25),
    ALPHA: FloatDistribution(50, 1500, log=True),
}


def make_study(trials: int, gain: float, seed: int = 0) -> optuna.Study:
    """A study whose scores depend on the learning rate and rise by `gain` with deformation; a third is pruned."""
    rng = np.random.default_rng(seed)
    study = optuna.create_study(direction="maximize")
    for number in range(trials):
        params = {LR: float(10 ** rng.uniform(-4, -1.6)), SHARE: float(rng.uniform()), ELASTIC: 0.5 * (number % 2)}
        if params[ELASTIC]:
            params[ALPHA] = float(rng.uniform(50, 1500))
        early = 0.7 + 0.1 * (math.log10(params[LR]) + 3) + gain * (params[ELASTIC] > 0) + rng.normal(0, 0.005)
        pruned = number % 3 == 2
        history = {20: early} if pruned else {20: early, 100: early + 0.1}
        study.add_trial(
            optuna.create_trial(
                state=TrialState.PRUNED if pruned else TrialState.COMPLETE,
                params=params,
                distributions={name: DISTRIBUTIONS[name] for name in params},
                value=list(history.values())[-1],
                intermediate_values=history,
                user_attrs={"steps": 100, "wall_seconds": 10.0, "training_seconds": 8.0},
            )
        )
    params = {LR: 1e-3, SHARE: 0.5, ELASTIC: 0.0}
    attributes = {"failed": "crashed"}
    distributions = {name: DISTRIBUTIONS[name] for name in params}
    study.add_trial(
        optuna.create_trial(state=TrialState.FAIL, params=params, distributions=distributions, user_attrs=attributes)
    )
    return study


def test_trials_are_compared_at_the_last_step_that_all_reached() -> None:
    study = make_study(12, 0.0)
    at, scores = statistics.early_scores(study)
    assert at == 20
    assert scores == {trial.number: trial.intermediate_values[20] for trial in study.trials[:12]}


def test_only_fields_that_matter_exceed_the_chance_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 20)  # 50 take 18 s
    importances = {importance.name: importance for importance in statistics.importances(make_study(40, 0.0))}
    assert importances[LR].value > 0.8
    assert importances[LR].low > importances[LR].chance
    for name in (SHARE, ELASTIC, ALPHA):
        assert importances[name].value < importances[name].chance
    assert importances[ALPHA].trials == 20, "importance among the trials that have the field"
    assert importances[LR].trials == 40


def test_too_few_trials_give_no_result() -> None:
    assert statistics.importances(make_study(6, 0.0)) == []
    assert statistics.off_on_groups(make_study(3, 0.0), ELASTIC, 0.0) == []


@pytest.mark.parametrize("gain", [-0.1, 0.0, 0.1])
def test_interval_of_off_against_on_contains_the_true_gain(gain: float) -> None:
    """In 40 studies the 95 % interval misses the true gain at most four times (binomial, p < 0.05 for five)."""
    misses = 0
    for seed in range(40):
        off, on = statistics.off_on_groups(make_study(40, gain, seed), ELASTIC, 0.0)
        _, low, high = statistics.difference(off, on)
        misses += not low <= gain <= high
    assert misses <= 4


def test_the_table_has_every_trial() -> None:
    study = make_study(12, 0.0)
    config = SweepConfig(
        space={
            LR: Dimension(low=1e-4, high=3e-2, log=True),
            SHARE: Dimension(low=0, high=1),
            ELASTIC: Dimension(low=0, high=1, step=0.25),
            ALPHA: Dimension(low=50, high=1500, log=True, when={ELASTIC: space.Condition(above=0)}),
        },
        shares=(),
    )
    rows = list(csv.DictReader(io.StringIO(statistics.trials_csv(study, Recipe(), config))))
    assert [int(row["trial"]) for row in rows] == list(range(13))
    assert [row["state"] for row in rows[:3]] == ["complete", "complete", "pruned"]
    assert rows[12]["failed"] == "crashed"
    for row, trial in zip(rows, study.trials[:12]):
        assert float(row["dice"]) == statistics.score(trial)
        assert float(row[LR]) == trial.params[LR]
        assert (row[ALPHA] == "") == (trial.params[ELASTIC] == 0)
    assert statistics.time_spent(study) == (120.0, pytest.approx(0.8))
