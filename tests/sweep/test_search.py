"""Ray Tune's searcher and the Optuna study, without Ray: states of trials, resuming, several objectives."""

import sqlite3
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from raylivecell.core.errors import UserError
from raylivecell.recipe import Recipe
from raylivecell.sweep import space, study, tune
from raylivecell.sweep.search import Search
from raylivecell.sweep.space import SweepConfig

CONFIG = SweepConfig()


def open_study(folder: Path, resume: bool = False, config: SweepConfig = CONFIG) -> optuna.Study:
    return study.open_study(f"sqlite:///{folder}/study.db", "one", Recipe(), config, resume)


def make_search(folder: Path, resume: bool = False, config: SweepConfig = CONFIG) -> Search:
    optuna_study = open_study(folder, resume, config)
    return Search(optuna_study, Recipe(), config, study.left_running(optuna_study, f"sqlite:///{folder}/study.db"))


def row(step: int, score: float, **more: Any) -> dict[str, Any]:
    return {"step": step, "steps": 100, "score": score, **more}


def test_the_first_trial_is_the_starting_recipe(tmp_path: Path) -> None:
    job = make_search(tmp_path).suggest("a")["job"]
    assert job["folder"] == "trials/0000"
    assert space.apply(Recipe(), job["values"]) == Recipe()


def test_each_trial_is_stored_with_its_final_state(tmp_path: Path) -> None:
    search = make_search(tmp_path)
    for name in "abcde":
        search.suggest(name)
    search.on_trial_result("a", row(50, 0.4))
    search.on_trial_complete("a", row(100, 0.7, training_seconds=3.0))
    search.on_trial_result("b", row(10, 0.2))
    search.on_trial_complete("b", row(20, 0.3))
    search.on_trial_complete("c", row(0, -1.0, failed="loss not finite at step 7"))
    search.on_trial_result("d", row(20, 0.9))
    search.on_trial_complete("d", error=True)
    trials = open_study(tmp_path, resume=True).trials
    states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.FAIL, TrialState.RUNNING)
    assert [trial.state for trial in trials] == list(states)
    assert trials[0].value == 0.7
    assert trials[0].intermediate_values == {50: 0.4, 100: 0.7}
    assert trials[0].user_attrs["training_seconds"] == 3.0
    assert trials[1].intermediate_values == {10: 0.2, 20: 0.3}
    assert trials[2].user_attrs["failed"] == "loss not finite at step 7"
    assert trials[3].user_attrs["failed"] == "crashed"
    tune.scheduler(open_study(tmp_path, resume=True), CONFIG)


def test_trials_that_a_killed_driver_left_running_are_resumed(tmp_path: Path) -> None:
    before = make_search(tmp_path)
    jobs = [before.suggest(name)["job"] for name in "abc"]
    before.on_trial_result("b", row(10, 0.2))
    before.on_trial_complete("b", row(100, 0.5))
    after = make_search(tmp_path, resume=True)
    again = [after.suggest(name)["job"] for name in "xyz"]
    assert again[:2] == [jobs[0], jobs[2]], "same trial numbers and values"
    assert again[2]["folder"] == "trials/0003"
    for name in "xyz":
        after.on_trial_complete(name, row(100, 0.6))
    trials = open_study(tmp_path, resume=True).trials
    assert [trial.state for trial in trials] == 4 * [TrialState.COMPLETE]
    assert trials[1].value == 0.5


def test_a_resumed_trial_reports_each_step_once(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    before = make_search(tmp_path)
    before.suggest("a")
    before.on_trial_result("a", row(10, 0.2))
    after = make_search(tmp_path, resume=True)
    after.suggest("x")
    for step, score in ((10, 0.3), (20, 0.4)):
        after.on_trial_result("x", row(step, score))
    after.on_trial_complete("x", row(20, 0.4))
    (trial,) = open_study(tmp_path, resume=True).trials
    assert trial.intermediate_values == {10: 0.2, 20: 0.4}
    assert trial.state is TrialState.PRUNED
    assert not list(recwarn), [str(warning.message) for warning in recwarn]


def test_a_trial_interrupted_during_suggest_gets_its_values(tmp_path: Path) -> None:
    half = open_study(tmp_path).ask()
    half.suggest_float("optimizer.lr", 1e-4, 3e-2, log=True)
    job = make_search(tmp_path, resume=True).suggest("a")["job"]
    assert job["folder"] == "trials/0000"
    assert space.apply(Recipe(), job["values"]) == Recipe()


@pytest.mark.parametrize("sampler", ["tpe", "gp", "qmc", "random"])
def test_a_resumed_search_does_not_repeat_suggestions(tmp_path: Path, sampler: Any) -> None:
    config = SweepConfig(sampler=sampler)
    rates = []
    for round_ in range(3):
        search = make_search(tmp_path, resume=round_ > 0, config=config)
        for index in range(2):
            rates.append(search.suggest(str(index))["job"]["values"]["optimizer.lr"])
            search.on_trial_complete(str(index), row(100, 0.5))
    assert len(set(rates)) == len(rates)


def test_early_stopping_includes_the_trials_before_a_kill(tmp_path: Path) -> None:
    search = make_search(tmp_path)
    for index in range(6):
        search.suggest(str(index))
        search.on_trial_result(str(index), row(20, 0.8))
        search.on_trial_complete(str(index), row(100, 0.9))
    scheduler = tune.scheduler(open_study(tmp_path, resume=True), CONFIG)
    new: Any = type("Trial", (), {"trial_id": "new"})()
    scheduler.on_trial_add(None, new)  # type: ignore[arg-type]
    assert scheduler.on_trial_result(None, new, {"progress": 20.0, "score": 0.1}) == "STOP"  # type: ignore[arg-type]
    assert scheduler.on_trial_result(None, new, {"progress": 20.0, "score": 0.1}) == "CONTINUE", (
        "evaluated once per rung"
    )  # type: ignore[arg-type]


def test_several_objectives_are_stored_in_order(tmp_path: Path) -> None:
    config = SweepConfig(objectives=("dice", "ms_per_image"))
    search = make_search(tmp_path, config=config)
    search.suggest("a")
    search.on_trial_result("a", row(50, 0.4))
    search.on_trial_complete("a", row(100, 0.7, ms_per_image=12.5))
    optuna_study = open_study(tmp_path, resume=True, config=config)
    assert optuna_study.trials[0].values == [0.7, 12.5]
    assert [direction.name for direction in optuna_study.directions] == ["MAXIMIZE", "MINIMIZE"]


def test_no_pickle_contains_the_storage_url(tmp_path: Path) -> None:
    """Tune pickles the searcher into the sweep's folder: it must not contain the password of a database."""
    import cloudpickle

    assert b"study.db" not in cloudpickle.dumps(make_search(tmp_path))


@pytest.mark.parametrize("killed_before", [False, True])
def test_a_study_file_never_appears_without_its_tables(tmp_path: Path, killed_before: bool) -> None:
    """A process that opened it without tables, such as a dashboard, would create them too, and one would fail."""
    file, seen, done = tmp_path / "study.db", [], threading.Event()
    if killed_before:
        (tmp_path / "study.db.new").write_bytes(b"half")

    def open_as_it_appears() -> None:
        while not file.exists() and not done.is_set():
            pass
        with closing(sqlite3.connect(file)) as database:
            seen.extend(name for (name,) in database.execute("select name from sqlite_master where type = 'table'"))

    reader = threading.Thread(target=open_as_it_appears)
    reader.start()
    url = study.StudyFile(str(tmp_path), None).url
    done.set()
    reader.join()
    assert {"studies", "trials", "version_info", "alembic_version"} <= set(seen)
    study.open_study(url, "one", Recipe(), CONFIG, False)
    assert study.StudyFile(str(tmp_path), None).url == url
    assert [summary.study_name for summary in optuna.get_all_study_summaries(url)] == ["one"], "a file in use is kept"


def test_a_study_in_use_or_out_of_reach_is_an_error(tmp_path: Path) -> None:
    open_study(tmp_path)
    make_search(tmp_path).suggest("a")  # killed before its first trial, a sweep may simply be started again
    with pytest.raises(UserError, match="resume it with --resume always"):
        open_study(tmp_path)
    with pytest.raises(UserError, match=r"cannot open Optuna's storage: .*--storage"):
        study.open_study("sqlite:////nowhere/at/all/study.db", "one", Recipe(), CONFIG, False)
    with pytest.raises(UserError, match="cannot open Optuna's storage"):
        study.open_study("study.db", "one", Recipe(), CONFIG, False)
