"""Ray's OptunaSearch, but for this: a trial that a killed driver left running is taken up again under its own number
and with its own parameters; a stopped trial is told as pruned, a bad one as failed.
"""

import time
import warnings
from collections.abc import Sequence
from typing import Any, cast

import optuna
from optuna.trial import TrialState
from ray.tune.search.optuna import OptunaSearch

from raylivecell import space
from raylivecell.recipe import Recipe
from raylivecell.space import OBJECTIVES, SweepConfig
from raylivecell.study import end_of, folder_of

# Where the machine is busy, a question to the study takes over a second, of which Ray would warn the user.
warnings.filterwarnings("ignore", message="Define-by-run function")


class Search(OptunaSearch):
    """Asks the study for trials and tells it of their ends. A trial's config: {"job": {"folder", "values"}}."""

    def __init__(self, study: optuna.Study, recipe: Recipe, config: SweepConfig) -> None:
        columns = [OBJECTIVES[one].column for one in config.objectives]
        modes: list[str] = [OBJECTIVES[one].mode for one in config.objectives]
        super().__init__(
            lambda trial: {"values": space.suggest(trial, recipe, config)},
            metric=columns if len(columns) > 1 else columns[0],
            mode=modes if len(modes) > 1 else modes[0],
            sampler=study.sampler,
            study_name=study.study_name,
            storage=study._storage,
        )
        self.study = study
        self.columns: Sequence[str] = columns
        self.begun: dict[str, float] = {}
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        self.left_running = [trial._trial_id for trial in running]

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune would write a pickle of all this, the storage's password in it, that nobody reads."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the study is the state."""
        with open(checkpoint_path, "wb"):
            pass

    def number(self, trial_id: str) -> int:
        """The study's number of one of Ray's trials."""
        return self._ot_trials[trial_id].number

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """The next trial: one left running, if any, or a new one."""
        self.begun[trial_id] = time.monotonic()
        if self.left_running:
            self._ot_trials[trial_id] = optuna.trial.Trial(cast(optuna.Study, self._ot_study), self.left_running.pop(0))
        chosen = cast(dict[str, Any], super().suggest(trial_id))
        return {"job": {"folder": folder_of(self.number(trial_id)), "values": chosen["values"]}}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Note the score so far under its step."""
        trial = self._ot_trials[trial_id]
        told = self.study._storage.get_trial(trial._trial_id).intermediate_values
        if len(self.columns) == 1 and "failed" not in result and result["step"] not in told:
            trial.report(result["score"], result["step"])

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell the study of the trial's end."""
        if trial_id in self._completed_trials:
            return
        self._completed_trials.add(trial_id)
        trial, state = self._ot_trials[trial_id], end_of(None if error else result)
        if result and state is not TrialState.FAIL:
            self.on_trial_result(trial_id, result)  # Tune leaves out the last one
        trial.set_user_attr("wall_seconds", round(time.monotonic() - self.begun[trial_id], 2))
        for name in ("steps", "step", "training_seconds", "failed"):
            if result and name in result:
                trial.set_user_attr(name, result[name])
        if state is TrialState.FAIL and not (result and "failed" in result):
            trial.set_user_attr("failed", "crashed")
        told = [result[one] for one in self.columns] if result and state is TrialState.COMPLETE else None
        self.study.tell(trial, told, state=state)
