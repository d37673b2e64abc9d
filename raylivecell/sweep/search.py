"""Ray Tune's search algorithm for a sweep: each Ray trial is a trial of the Optuna study (ask, then report results).

Unlike Ray's OptunaSearch, it resumes trials that a killed driver left running, with their numbers and parameters, and
reports stopped trials as pruned and failed ones as failed.
"""

import time
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.trial import Trial, TrialState
from ray.tune.search import Searcher

from raylivecell.recipe import Recipe
from raylivecell.sweep import space
from raylivecell.sweep.space import OBJECTIVES, SweepConfig
from raylivecell.sweep.study import end_of, folder_of

# Columns of a trial's last result that the study stores as user attributes.
ATTRIBUTES = ("steps", "step", "training_seconds", "failed")


class Search(Searcher):
    """Suggests the study's trials and reports their results to it. A trial's config: {"job": {"folder", "values"}}.

    Args:
        study: the study in which trials are created and reported.
        recipe: the starting recipe.
        config: search space and objectives.
        left_running: trials of a killed driver, suggested first.
    """

    def __init__(
        self, study: optuna.Study, recipe: Recipe, config: SweepConfig, left_running: Sequence[Trial] = ()
    ) -> None:
        super().__init__()
        self.study, self.recipe, self.config = study, recipe, config
        self.columns = [OBJECTIVES[objective].column for objective in config.objectives]
        self.left_running = list(left_running)
        self.trials: dict[str, Trial] = {}
        self.started: dict[str, float] = {}
        self.reported: dict[str, set[int]] = {}
        self.ended: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Empty: Tune would write an unused pickle that contains the storage's password."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Write an empty file: the study is the state."""
        with open(checkpoint_path, "wb"):
            pass

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: the study is the state."""

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """Config of the next trial: one that was left running, if any, else a new one."""
        self.started[trial_id] = time.monotonic()
        trial = self.left_running.pop(0) if self.left_running else self.study.ask()
        self.trials[trial_id] = trial
        values = space.suggest(trial, self.recipe, self.config)
        return {"job": {"folder": folder_of(trial.number), "values": values}}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Report the score at its step, once; with several objectives Optuna accepts final values only."""
        if len(self.columns) > 1 or "failed" in result:
            return
        if trial_id not in self.reported:  # may have been reported before a kill
            number = self.trials[trial_id].number
            frozen = next(trial for trial in self.study.get_trials(deepcopy=False) if trial.number == number)
            self.reported[trial_id] = set(frozen.intermediate_values)
        if result["step"] not in self.reported[trial_id]:
            self.reported[trial_id].add(result["step"])
            self.trials[trial_id].report(result["score"], result["step"])

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Report to the study how the trial ended, once: complete, pruned or failed."""
        if trial_id in self.ended:
            return
        self.ended.add(trial_id)
        trial, state = self.trials[trial_id], end_of(None if error else result)
        if result and state is not TrialState.FAIL:
            self.on_trial_result(trial_id, result)  # Tune does not pass on the last result
        attributes = {name: result[name] for name in ATTRIBUTES if result and name in result}
        if state is TrialState.FAIL:
            attributes.setdefault("failed", "crashed")
        attributes["wall_seconds"] = round(time.monotonic() - self.started[trial_id], 2)
        for name, value in attributes.items():
            trial.set_user_attr(name, value)
        final = [result[column] for column in self.columns] if result and state is TrialState.COMPLETE else None
        self.study.tell(trial, final, state=state)
