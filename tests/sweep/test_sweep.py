"""Sweeps on Ray: results, kills, several workers, other databases, the report in a browser."""

import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from conftest import job_env, kill_at, skip_or_fail
from hostile import pickled
from hosts import wait_until
from optuna.trial import TrialState
from quick_trial import quick_trial

from raylivecell import recipe as recipes
from raylivecell.core.errors import UserError
from raylivecell.recipe import (
    AugmentConfig,
    ElasticConfig,
    LoopConfig,
    ModelConfig,
    OptimizerConfig,
    PhaseConfig,
    Recipe,
)
from raylivecell.runs import checkpoint, progress
from raylivecell.sweep import space, statistics, sweep, tune
from raylivecell.sweep.space import Condition, Dimension, SweepConfig

pytestmark = pytest.mark.ray
RECIPE = Recipe(
    batch_size=4,
    crop=(32, 32),
    phases=(PhaseConfig(steps=30, originals=False, augmented_copies=1),),
    model=ModelConfig(features=(4, 8), norm="group"),
    optimizer=OptimizerConfig(lr=3e-3),
    augment=AugmentConfig(elastic=ElasticConfig(alpha_x=200, alpha_y=200, sigma=10)),
    loop=LoopConfig(report_steps=3),
)
ELASTIC_ON = {"augment.elastic.p": Condition(above=0)}
CONFIG = SweepConfig(
    space={
        "optimizer.lr": Dimension(low=1e-5, high=3e-2, log=True),
        "loss.bce_weight": Dimension(low=0, high=1),
        "augment.elastic.p": Dimension(low=0, high=1, step=0.5),
        "augment.elastic.alpha_x": Dimension(
            low=50, high=1500, log=True, tied_to=("augment.elastic.alpha_y",), when=ELASTIC_ON
        ),
        "augment.elastic.sigma": Dimension(low=4, high=40, log=True, when=ELASTIC_ON),
    }
)
ENDS = (TrialState.COMPLETE, TrialState.PRUNED)


def history(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def study_of(out: Path) -> optuna.Study:
    return optuna.load_study(study_name=None, storage=f"sqlite:///{out}/study.db")


def make_quick(patch: pytest.MonkeyPatch) -> None:
    """Use trials that take milliseconds, and fewer samples per importance in reports (50 take 2 s of a core)."""
    patch.setattr(tune, "OneWorker", quick_trial())
    patch.setattr(statistics, "RESAMPLES", 5)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)


@pytest.fixture(scope="module")
def swept(tiny_dataset: str, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of ten quick trials with two final seeds."""
    out = tmp_path_factory.mktemp("sweep") / "one \u00fc"
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
        sweep.sweep(tiny_dataset, str(out), RECIPE, CONFIG, trials=10, seeds=2, max_concurrent=1)
    return out


def test_every_trial_ends_and_keeps_only_its_best_checkpoint(swept: Path) -> None:
    trials = study_of(swept).trials
    assert len(trials) == 10
    assert {trial.state for trial in trials} <= set(ENDS)
    assert {trial.state for trial in trials} == set(ENDS), "some were stopped early, some not"
    for trial in trials:
        run = swept / "trials" / f"{trial.number:04d}"
        rows = history(run)
        steps = [row["step"] for row in rows]
        assert steps == list(range(3, steps[-1] + 1, 3))
        assert (steps[-1] == 30) == (trial.state is TrialState.COMPLETE)
        best = max(rows, key=lambda row: (row["val_mean_image_dice"], row["step"]))
        assert [path.name for path in run.glob("checkpoint_*")] == [progress.name(best["step"])]
        assert list((run / "tensorboard").iterdir())
        assert trial.user_attrs["step"] == steps[-1]


def test_best_yaml_is_the_best_candidate(swept: Path) -> None:
    """With final seeds the best is the candidate with the highest mean, not the trial with the luckiest score."""
    study = study_of(swept)
    runs = {path.name: history(path) for path in (swept / "final").iterdir()}
    best = study.best_trial.number
    names = ["start", f"trial-{best}"] if best else ["start"]  # trial 0 is the start
    assert {f"{name}-seed{seed}" for name in names for seed in (1, 2)} <= runs.keys()
    assert len(runs) == 2 * len(names) + 2, "plus the best trial without (or with) elastic deformation"
    assert {rows[-1]["step"] for rows in runs.values()} == {30}
    scores: dict[str, list[float]] = {}
    for name in sorted(runs):
        assert checkpoint.load_model(str(swept / "final" / name))[1].seed == int(name[-1])
        scores.setdefault(name[:-6], []).append(max(row["val_mean_image_dice"] for row in runs[name]))
    winner = max(scores, key=lambda name: sum(scores[name]))
    lucky = 1 + max(range(2), key=lambda index: scores[winner][index])
    best_network, recipe = checkpoint.load_model(str(swept))
    network, same = checkpoint.load_model(str(swept / "final" / f"{winner}-seed{lucky}"))
    assert recipe == same == recipes.load(swept / "best.yaml")
    assert all(a.equal(b) for a, b in zip(network.state_dict().values(), best_network.state_dict().values()))


def test_the_table_has_the_values_of_each_trial(swept: Path) -> None:
    study = study_of(swept)
    rows = list(csv.DictReader((swept / "trials.csv").open()))
    assert [int(row["trial"]) for row in rows] == list(range(10))
    assert float(rows[0]["optimizer.lr"]) == RECIPE.optimizer.lr
    assert float(rows[study.best_trial.number]["dice"]) == study.best_value


@pytest.mark.slow
def test_the_report_is_self_contained_in_a_browser(swept: Path, browser: Any) -> None:
    address = (swept / "report.html").as_uri()
    browser.get(address)
    heads = [head.text for head in browser.find_elements("css selector", "h2")]
    assert {"The search", "Training with fresh seeds", "Each field", "The best recipe"} <= set(heads)
    assert [entry for entry in browser.get_log("browser") if entry["level"] != "INFO"] == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [
        entry["params"]["request"]["url"] for entry in messages if entry["method"] == "Network.requestWillBeSent"
    ]
    assert address in requests
    assert [url for url in requests if url != address and not url.startswith("data:")] == []
    sizes = browser.execute_script("return [...document.images].map(i => i.naturalWidth)")
    assert len(sizes) > 8
    assert min(sizes) > 0, "every image is loaded"


@pytest.mark.slow
def test_optuna_dashboard_opens_the_study(swept: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = str(Path(sys.executable).parent / "optuna-dashboard")
    command = [program, f"sqlite:///{swept}/study.db", "--host", "127.0.0.1", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            studies = json.loads(_fetch(f"http://127.0.0.1:{port}/api/studies", server))["study_summaries"]
        finally:
            server.terminate()
    assert [entry["study_name"] for entry in studies] == [str(swept)]


def _fetch(url: str, server: subprocess.Popen) -> bytes:
    """Content of `url`, once the server responds."""
    content: list[bytes] = []

    def answered() -> bool:
        assert server.poll() is None, "the server ended"
        with urllib.request.urlopen(url) as answer:
            content.append(answer.read())
        return True

    wait_until("an answer", answered)
    return content[0]


def test_a_sweep_in_use_is_an_error_and_a_resumed_one_adds_trials(
    swept: Path, tiny_dataset: str, quick: None, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="already contains a run"):
        sweep.sweep(tiny_dataset, str(swept), RECIPE, CONFIG, trials=10)
    other = RECIPE.model_copy(update={"seed": 5})
    with pytest.raises(UserError, match="another recipe or search"):
        sweep.sweep(tiny_dataset, str(swept), other, CONFIG, trials=12, resume=True)
    with pytest.raises(UserError, match="no run to resume"):
        sweep.sweep(tiny_dataset, str(swept) + "-none", RECIPE, CONFIG, trials=2, resume=True)
    tune_files = [path for path in (swept / "tune").rglob("*") if path.is_file()]
    assert {"tuner", "searcher-state"} <= {path.stem.partition("-2")[0] for path in tune_files}
    for path in (*tune_files, swept / "tune" / "trainable.pkl", *(path.parent / "params.pkl" for path in tune_files)):
        path.write_bytes(pickled(tmp_path / "ran"))  # Ray Tune's own pickles are untrusted: they are never loaded
    before = [(trial.params, trial.datetime_complete) for trial in study_of(swept).trials]
    sweep.sweep(tiny_dataset, str(swept), RECIPE, CONFIG, trials=12, resume=True, max_concurrent=1)
    after = [(trial.params, trial.datetime_complete) for trial in study_of(swept).trials]
    assert after[:10] == before, "no trial is repeated"
    assert len(after) == 12
    assert {trial.state for trial in study_of(swept).trials} <= set(ENDS)
    assert not (tmp_path / "ran").exists()


DRIVER = """
import sys
from raylivecell.sweep import space
from raylivecell.sweep import sweep
data, out, trials = sys.argv[1:]
recipe, config = space.load(out + "-recipe.yaml")
resume = sweep.storage.exists(out + "/recipe.yaml")
sweep.sweep(data, out, recipe, config, int(trials), resume=resume, max_concurrent=2)
"""


@pytest.mark.slow
def test_a_sweep_killed_repeatedly_ends_with_all_trials(tiny_dataset: str, ray_cluster: None, tmp_path: Path) -> None:
    """The driver is killed during the first trials, and then stopped by Ctrl-C."""
    out, trials = tmp_path / "killed", 6
    Path(f"{out}-recipe.yaml").write_text(space.dump(RECIPE, CONFIG))
    env = os.environ | job_env()
    finished: dict[int, tuple] = {}
    kills = [
        (signal.SIGKILL, lambda done, started: started > done >= 1),
        (signal.SIGINT, lambda done, started: done >= 3),
    ]
    for signal_number, is_due in kills:
        driver = subprocess.Popen([sys.executable, "-c", DRIVER, tiny_dataset, str(out), str(trials)], env=env)

        def due(driver: subprocess.Popen = driver, is_due: Callable[[int, int], bool] = is_due) -> bool:
            assert driver.poll() is None, "the sweep ended by itself"
            return is_due(*_counts(out))

        wait_until("the time of the kill", due, 300)  # each read of the study takes 20 ms of a core
        driver.send_signal(signal_number)
        driver.wait()
        for trial in study_of(out).trials:
            if trial.state.is_finished():
                now = (trial.state, trial.params, trial.datetime_complete)
                assert finished.setdefault(trial.number, now) == now, "a finished trial is not repeated"
    study = sweep.sweep(tiny_dataset, str(out), RECIPE, CONFIG, trials, resume=True, max_concurrent=2)
    assert [trial.number for trial in study.trials] == list(range(trials))
    assert {trial.state for trial in study.trials} <= set(ENDS)
    for number, (state, params, end) in finished.items():
        trial = study.trials[number]
        assert (trial.state, trial.params, trial.datetime_complete) == (state, params, end)
    for trial in study.trials:
        steps = [row["step"] for row in history(out / "trials" / f"{trial.number:04d}")]
        assert steps == sorted(set(steps)), "each step is reported once despite the kills"


def _counts(out: Path) -> tuple[int, int]:
    """Numbers of finished and of started trials."""
    if not (out / "study.db").exists():
        return 0, 0
    try:
        trials = study_of(out).trials
    except ValueError:  # no study in it yet
        return 0, 0
    started = [trial for trial in trials if trial.state is not TrialState.WAITING]
    return sum(trial.state.is_finished() for trial in trials), len(started)


@pytest.mark.slow
def test_a_killed_trial_resumes_and_a_hopeless_one_fails_with_its_reason(
    tiny_dataset: str, ray_cluster: None, tmp_path: Path
) -> None:
    out = tmp_path / "hit"
    config = SweepConfig(
        space={"optimizer.lr": Dimension(choices=(3e-3, 1e30)), "model.features": Dimension(choices=([4, 8], [4] * 8))},
        shares=(),
        sampler="random",
        early_stopping=False,
    )
    thread, killed = kill_at(out / "trials" / "0000", 4, "ray::OneWorker", "ray::ResourceTrainable")
    study = sweep.sweep(tiny_dataset, str(out), RECIPE, config, trials=8, max_concurrent=1)
    thread.join()
    assert killed
    assert study.trials[0].state is TrialState.COMPLETE
    assert [row["step"] for row in history(out / "trials" / "0000")] == list(range(3, 31, 3))
    reasons = {(t.params["optimizer.lr"], t.params["model.features"]): t.user_attrs.get("failed") for t in study.trials}
    assert reasons[3e-3, "[4, 8]"] is None
    assert all("not finite" in why for (lr, deep), why in reasons.items() if lr > 1 and deep == "[4, 8]")
    assert all("at least 256" in why for (_, deep), why in reasons.items() if deep != "[4, 8]")
    assert len(reasons) > 2, "some trials failed"


@pytest.mark.slow
def test_trials_with_several_workers_stop_early_without_a_hang(
    tiny_dataset: str, ray_cluster: None, tmp_path: Path
) -> None:
    out, config = tmp_path / "nested", CONFIG.model_copy(update={"workers_per_trial": 2, "grace": 0.3})
    study = sweep.sweep(tiny_dataset, str(out), RECIPE, config, trials=3)
    assert [trial.number for trial in study.trials] == [0, 1, 2]
    assert {trial.state for trial in study.trials} <= set(ENDS)
    for trial in study.trials:
        assert len(list((out / "trials" / f"{trial.number:04d}").glob("checkpoint_*"))) == 1
    best = recipes.load(out / "best.yaml")
    assert best == checkpoint.load_model(str(out))[1]
    assert best.optimizer.lr == study.best_trial.params["optimizer.lr"]


def test_stopping_workers_needs_the_state_api(
    tiny_dataset: str, ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(**_: object) -> None:
        raise ConnectionError("no dashboard")

    monkeypatch.setattr("ray.util.state.list_nodes", silent)
    config = CONFIG.model_copy(update={"workers_per_trial": 2})
    with pytest.raises(UserError, match=r"State API does not respond \(no dashboard\)"):
        sweep.sweep(tiny_dataset, str(tmp_path / "out"), RECIPE, config, trials=3)
    assert not (tmp_path / "out").exists()


def test_dice_against_speed_gives_a_pareto_front(
    tiny_dataset: str, ray_cluster: None, quick: None, tmp_path: Path
) -> None:
    out = tmp_path / "front"
    features = Dimension(choices=([4, 8], [2, 4], [32, 64]))
    config = SweepConfig(space={"model.features": features}, shares=(), objectives=("dice", "ms_per_image"))
    study = sweep.sweep(tiny_dataset, str(out), RECIPE, config, trials=4, max_concurrent=1)
    assert all(trial.values[1] > 0 for trial in study.trials)
    assert "Pareto front" in (out / "report.html").read_text()
    rows = list(csv.DictReader((out / "trials.csv").open()))
    assert {int(row["trial"]) for row in rows if row["pareto"] == "True"} == {t.number for t in study.best_trials}


@pytest.fixture
def postgres() -> Iterator[str]:
    """URL of a new PostgreSQL server."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl")) + [
        Path(path) for path in [shutil.which("pg_ctl")] if path
    ]
    if not programs:
        skip_or_fail("no PostgreSQL server: install Debian's package postgresql")
    # PostgreSQL refuses to run as root.
    user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="pg") as folder:
        if user:
            shutil.chown(folder, "postgres")
        tools = programs[-1].parent
        data = f"{folder}/data"
        run = {"check": True, "stdout": subprocess.DEVNULL, "cwd": folder}
        subprocess.run([*user, tools / "initdb", "-D", data, "-U", "cells", "-A", "trust"], **run)  # type: ignore[call-overload]
        options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1"
        subprocess.run(
            [*user, tools / "pg_ctl", "-D", data, "-w", "-o", options, "-l", f"{folder}/log", "start"], **run
        )  # type: ignore[call-overload]
        yield f"postgresql+pg8000://cells@127.0.0.1:{port}/postgres"
        subprocess.run([*user, tools / "pg_ctl", "-D", data, "-w", "-m", "fast", "stop"], **run)  # type: ignore[call-overload]


@pytest.mark.slow
def test_postgresql_and_mlflow(
    tiny_dataset: str, ray_cluster: None, quick: None, tmp_path: Path, postgres: str
) -> None:
    import mlflow

    out, tracking = tmp_path / "stored", f"sqlite:///{tmp_path}/mlflow.db"
    sweep.sweep(tiny_dataset, str(out), RECIPE, CONFIG, trials=2, study_url=postgres, mlflow=tracking, max_concurrent=1)
    sweep.sweep(
        tiny_dataset,
        str(out),
        RECIPE,
        CONFIG,
        trials=3,
        resume=True,
        study_url=postgres,
        mlflow=tracking,
        max_concurrent=1,
    )
    study = optuna.load_study(study_name=str(out), storage=postgres)
    assert [trial.state.is_finished() for trial in study.trials] == [True] * 3
    assert not (out / "study.db").exists()
    client = mlflow.MlflowClient(tracking)
    experiment = client.get_experiment_by_name(str(out))
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 3
    logged = {round(run.data.metrics["score"], 6) for run in runs}
    stored = {round(t.intermediate_values[max(t.intermediate_values)], 6) for t in study.trials}
    assert logged == stored
    assert all("job/values/optimizer.lr" in run.data.params for run in runs)
