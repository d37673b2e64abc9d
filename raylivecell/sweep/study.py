"""The Optuna study of a sweep: opened where it was left; its trials as values of recipe fields.

The study alone says what is done (Ray's own state is a pickle, and lags behind it): a kill between any two lines loses
no trial and repeats none.
"""

import logging
import tempfile
import warnings
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.study import StudyDirection
from optuna.trial import FixedTrial, FrozenTrial, TrialState

from raylivecell.core import addresses, storage
from raylivecell.core.errors import UserError
from raylivecell.core.process_settings import log_levels
from raylivecell.recipe import Recipe
from raylivecell.sweep import space
from raylivecell.sweep.space import OBJECTIVES, SweepConfig

FILE = "study.db"
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


class StudyFile:
    """Where the study lies: at the URL given, else in study.db in the sweep's folder.

    SQLite wants a local disk: where the folder is in an object store, study.db there is a copy, renewed by `publish`.
    What it lacks after a kill, the trials' own folders still hold.
    """

    def __init__(self, out: str, url: str | None) -> None:
        self.copy = storage.join(out, FILE) if url is None and not storage.is_local(out) else None
        if url is not None:
            self.url = url
            return
        self.path = storage.join(tempfile.mkdtemp(prefix="study-") if self.copy else out, FILE)
        Path(self.path).parent.mkdir(parents=True, exist_ok=True)
        if self.copy and storage.exists(self.copy):
            storage.write_bytes(self.path, storage.read_bytes(self.copy))
        _make_whole(Path(self.path))
        self.url = _sqlite(self.path)

    def publish(self) -> None:
        """Renew the copy, if there is one."""
        if self.copy:
            storage.write_bytes(self.copy, storage.read_bytes(self.path))


def _sqlite(path: str) -> str:
    """The URL of a database file of any name."""
    return sqlalchemy.URL.create("sqlite", database=path).render_as_string()


def _make_whole(path: Path) -> None:
    """Let the file appear with its tables in it, where there is none.

    Whoever opens a file without tables makes them: a dashboard opened in the very second in which a sweep begins would
    make one end with "table ... already exists".
    """
    if path.exists():
        return
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)
    with _quiet():
        made = optuna.storages.RDBStorage(_sqlite(str(new)))
    made.remove_session()
    made.engine.dispose()
    new.rename(path)


def _quiet() -> AbstractContextManager[None]:
    """Optuna logs each study that is created."""
    return log_levels({"optuna": logging.WARNING})


def open_study(url: str, name: str, recipe: Recipe, config: SweepConfig, resume: bool) -> optuna.Study:
    """The study `name` in the Optuna storage at `url`; UserError where the storage cannot be opened or is in use."""
    modes = {"max": StudyDirection.MAXIMIZE, "min": StudyDirection.MINIMIZE}
    directions = [modes[OBJECTIVES[one].mode] for one in config.objectives]
    if url.startswith("redis"):
        raise UserError("Optuna keeps pickles in Redis, which run when they are read; give --storage a database's URL")
    try:
        with _quiet():
            study = optuna.create_study(storage=url, study_name=name, directions=directions, load_if_exists=True)
        trials = study.trials
    except Exception as error:  # of whatever driver the URL names
        told = addresses.redacted(str(error).splitlines()[0])
        raise UserError(f"cannot open Optuna's storage: {told}; give --storage a URL such as sqlite:///F.db") from error
    begun = [trial for trial in trials if trial.state is not TrialState.WAITING]
    if begun and not resume:
        raise UserError(
            f"the storage holds a study {name} already; continue it with --resume always, or choose another --out"
        )
    if not trials:
        study.enqueue_trial(space.start(recipe, config))
    study.sampler = sampler(config, len(study.trials))
    return study


def sampler(config: SweepConfig, trials: int) -> optuna.samplers.BaseSampler:
    """The sampler to go on with after so many trials: its numbers must not begin again when a sweep is resumed."""
    seed = config.seed + trials
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if config.sampler == "tpe":  # grouped, so that fields with a condition are learned together too
            return optuna.samplers.TPESampler(seed=seed, n_startup_trials=8, group=True, multivariate=True)
        if config.sampler == "gp":
            return optuna.samplers.GPSampler(seed=seed)
        if config.sampler == "qmc":  # its sequence is continued by the study itself, for one seed
            return optuna.samplers.QMCSampler(seed=config.seed, scramble=True)
    return optuna.samplers.RandomSampler(seed=seed)


def left_running(study: optuna.Study, url: str) -> list[optuna.trial.Trial]:
    """Trials that a killed driver left running in the study, whose storage is at `url`, by number."""
    running = [trial.number for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))]
    if not running:
        return []
    storage = optuna.storages.get_storage(url)
    key = storage.get_study_id_from_name(study.study_name)
    return [
        optuna.trial.Trial(study, storage.get_trial_id_from_study_id_trial_number(key, number)) for number in running
    ]


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that have come to an end, a bad one too, by number."""
    return study.get_trials(deepcopy=False, states=FINISHED)


def values(trial: FrozenTrial, recipe: Recipe, config: SweepConfig) -> space.Values:
    """The trial's values of recipe fields."""
    return space.suggest(FixedTrial(trial.params), recipe, config)


def end_of(result: dict[str, Any] | None) -> TrialState:
    """What became of a trial whose last result this is; none: it crashed."""
    if not result or "step" not in result or "failed" in result:
        return TrialState.FAIL
    return TrialState.COMPLETE if result["step"] >= result["steps"] else TrialState.PRUNED


def folder_of(number: int) -> str:
    """The folder of a trial, in that of the sweep."""
    return f"trials/{number:04d}"
