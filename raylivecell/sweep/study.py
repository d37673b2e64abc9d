"""The Optuna study of a sweep: create or resume it, and read its trials as values of recipe fields.

The study is the only record of finished trials (Ray's state is a pickle, and lags behind): a kill at any time neither
loses nor repeats a trial.
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
    """Location of the study: `url`, else study.db in the sweep's folder.

    SQLite needs a local disk: in an object store, study.db is a copy that `publish` updates. Results that the copy
    lacks after a kill are still in the trials' folders.
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
        _create_tables(Path(self.path))
        self.url = _sqlite(self.path)

    def publish(self) -> None:
        """Update the copy, if there is one."""
        if self.copy:
            storage.write_bytes(self.copy, storage.read_bytes(self.path))


def _sqlite(path: str) -> str:
    """URL of a SQLite file, with any characters in its name."""
    return sqlalchemy.URL.create("sqlite", database=path).render_as_string()


def _create_tables(path: Path) -> None:
    """Create the database file, if it does not exist, atomically with its tables.

    Each process that opens a file without tables creates them: if a sweep and a dashboard did so at the same time, one
    would fail with "table ... already exists".
    """
    if path.exists():
        return
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)
    with _quiet():
        database = optuna.storages.RDBStorage(_sqlite(str(new)))
    database.remove_session()
    database.engine.dispose()
    new.rename(path)


def _quiet() -> AbstractContextManager[None]:
    """Suppress Optuna's log line for each new study."""
    return log_levels({"optuna": logging.WARNING})


def open_study(url: str, name: str, recipe: Recipe, config: SweepConfig, resume: bool) -> optuna.Study:
    """Open the study `name` in the Optuna storage at `url`; UserError if the storage cannot be opened or is in use."""
    modes = {"max": StudyDirection.MAXIMIZE, "min": StudyDirection.MINIMIZE}
    directions = [modes[OBJECTIVES[objective].mode] for objective in config.objectives]
    if url.startswith("redis"):
        raise UserError(
            "Optuna stores pickles in Redis, which execute code when read; give --storage the URL of a database"
        )
    try:
        with _quiet():
            study = optuna.create_study(storage=url, study_name=name, directions=directions, load_if_exists=True)
        trials = study.trials
    except Exception as error:  # from any database driver
        message = addresses.redacted(str(error).splitlines()[0])
        raise UserError(
            f"cannot open Optuna's storage: {message}; give --storage a URL such as sqlite:///F.db"
        ) from error
    started = [trial for trial in trials if trial.state is not TrialState.WAITING]
    if started and not resume:
        raise UserError(
            f"the storage already contains a study {name}; resume it with --resume always, or choose another --out"
        )
    if not trials:
        study.enqueue_trial(space.start_parameters(recipe, config))
    study.sampler = sampler(config, len(study.trials))
    return study


def sampler(config: SweepConfig, trials: int) -> optuna.samplers.BaseSampler:
    """Sampler seeded with the number of existing `trials`: a resumed sweep must not repeat its random numbers."""
    seed = config.seed + trials
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if config.sampler == "tpe":  # grouped: fields with a condition are modelled jointly, too
            return optuna.samplers.TPESampler(seed=seed, n_startup_trials=8, group=True, multivariate=True)
        if config.sampler == "gp":
            return optuna.samplers.GPSampler(seed=seed)
        if config.sampler == "qmc":  # continues its sequence if the seed is the same
            return optuna.samplers.QMCSampler(seed=config.seed, scramble=True)
    return optuna.samplers.RandomSampler(seed=seed)


def left_running(study: optuna.Study, url: str) -> list[optuna.trial.Trial]:
    """Trials that a killed driver left running in the study, whose storage is at `url`, by number."""
    running = [trial.number for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))]
    if not running:
        return []
    database = optuna.storages.get_storage(url)
    study_id = database.get_study_id_from_name(study.study_name)
    ids = [database.get_trial_id_from_study_id_trial_number(study_id, number) for number in running]
    return [optuna.trial.Trial(study, trial_id) for trial_id in ids]


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """Complete, pruned and failed trials, by number."""
    return study.get_trials(deepcopy=False, states=FINISHED)


def values(trial: FrozenTrial, recipe: Recipe, config: SweepConfig) -> space.Values:
    """Values of the searched recipe fields in a trial."""
    return space.suggest(FixedTrial(trial.params), recipe, config)


def end_of(result: dict[str, Any] | None) -> TrialState:
    """Final state of a trial with this last result; None means that it crashed."""
    if not result or "step" not in result or "failed" in result:
        return TrialState.FAIL
    return TrialState.COMPLETE if result["step"] >= result["steps"] else TrialState.PRUNED


def folder_of(number: int) -> str:
    """Folder of a trial, relative to the sweep's folder."""
    return f"trials/{number:04d}"
