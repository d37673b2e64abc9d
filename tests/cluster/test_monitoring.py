"""cluster/monitoring: a real Prometheus scrapes a real run and sweep, and answers every query of the dashboard."""

import json
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import ray
from conftest import missing
from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled

from raylivecell.recipe import LoopConfig, ModelConfig, PhaseConfig, Recipe
from raylivecell.runtime import prometheus as gauges
from raylivecell.runtime import session
from raylivecell.sweep.space import Dimension, SweepConfig
from raylivecell.sweep.sweep import sweep
from raylivecell.training.job import TrainJob
from raylivecell.training.train import train

FOLDER = Path(__file__).parents[2] / "cluster" / "monitoring"
CONFIG = (FOLDER / "prometheus.yml").read_text()
BOARD = json.loads((FOLDER / "grafana-dashboard.json").read_text())
OURS = {f"ray_{gauges.PREFIX}{name}" for name in gauges.OF_RUN | gauges.OF_SWEEP}
RAYS = {
    "ray_node_cpu_utilization",
    "ray_node_gpus_utilization",
    "ray_node_mem_used_host",
    "ray_node_mem_total_host",
    "ray_object_store_memory",
    "ray_resources",
}
NEEDS_GPU = {"ray_node_gpus_utilization"}
RUN, SWEEP = "watched", "searched"
DEADLINE_S = 60
RECIPE = Recipe(
    batch_size=4,
    crop=(32, 40),
    targets="distance",
    phases=(PhaseConfig(steps=4),),
    model=ModelConfig(features=(4, 8), norm="group"),
    loop=LoopConfig(report_steps=2, precision="float32"),
)
SPACE = SweepConfig(
    objectives=("msa",), space={"optimizer.lr": Dimension(low=1e-5, high=1e-2, log=True)}, early_stopping=False
)


def expressions(board: dict[str, Any]) -> dict[str, str]:
    """Every query of the panels, by "TITLE REF"."""
    return {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in board["panels"]
        for target in panel.get("targets", [])
    }


def names(expression: str) -> set[str]:
    """The metrics that a query asks for."""
    return set(re.findall(r"\bray_\w+", expression))


def problems(board: dict[str, Any]) -> list[str]:
    """What is wrong with a dashboard, so far as that can be told without Grafana."""
    found = []
    ids = [panel["id"] for panel in board["panels"]]
    found += [f"panel id {one} twice" for one in set(ids) if ids.count(one) > 1]
    variables = {one["name"] for one in board["templating"]["list"]}
    for panel in board["panels"]:
        place = panel["gridPos"]
        if place["x"] + place["w"] > 24:
            found.append(f"{panel['title']} is wider than the dashboard")
        legends = " ".join(target.get("legendFormat", "") for target in panel.get("targets", []))
        queries = " ".join(target["expr"] for target in panel.get("targets", []))
        grouped = {word.strip() for group in re.findall(r"by \(([^)]*)\)", queries) for word in group.split(",")}
        found += [
            f"{panel['title']}: no {label}" for label in re.findall(r"{{(\w+)}}", legends) if label not in grouped
        ]
    for name in re.findall(r"\$\{?(\w+)", json.dumps(board)):
        if name not in variables and name != "__all":
            found.append(f"no variable {name}")
    found += [
        f"{title}: no metric {name}"
        for title, expression in expressions(board).items()
        for name in names(expression) - OURS - RAYS
    ]
    return found + [f"{name} is in no panel" for name in OURS - names(" ".join(expressions(board).values()))]


def test_the_dashboard_is_well_formed() -> None:
    assert problems(BOARD) == []
    assert BOARD["schemaVersion"] == 42, "the last of this kind of dashboard"
    assert expressions(BOARD)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('"id": 3,', '"id": 2,', "panel id 2 twice"),
        ("ray_raylivecell_val_msa", "ray_raylivecell_msa", "no metric ray_raylivecell_msa"),
        ("ray_raylivecell_val_msa", "ray_raylivecell_val_dice", "ray_raylivecell_val_msa is in no panel"),
        ('"name": "run"', '"name": "runs"', "no variable run"),
        ("{{state}}", "{{status}}", "Trials: no status"),
        ('"x": 16', '"x": 17', "wider"),
    ],
)
def test_a_broken_dashboard_is_found(old: str, new: str, told: str) -> None:
    text = json.dumps(BOARD)
    assert old in text
    assert any(told in problem for problem in problems(json.loads(text.replace(old, new))))


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    tool = shutil.which("promtool")
    if not tool:
        missing("no promtool: install Debian's package prometheus")
    return subprocess.run([tool, *arguments], capture_output=True, text=True, timeout=60)


def by_http(config: str) -> str:
    """The configuration as its comments tell to change it for another machine."""
    head, tail = config.split("    # http_sd_configs:")
    head = re.sub(r"    file_sd_configs:\n.*\n", "", head)
    return head + "    # http_sd_configs:".replace("# ", "") + tail.replace("    # ", "    ")


@pytest.mark.parametrize("config", [CONFIG, by_http(CONFIG)], ids=["list", "http"])
def test_the_configuration_is_one_of_prometheus(config: str, tmp_path: Path) -> None:
    (tmp_path / "prometheus.yml").write_text(config)
    checked = promtool("check", "config", "--syntax-only", str(tmp_path / "prometheus.yml"))
    assert checked.returncode == 0, checked.stderr
    (tmp_path / "prometheus.yml").write_text(config.replace("_sd_configs", "_sd_config"))
    assert promtool("check", "config", "--syntax-only", str(tmp_path / "prometheus.yml")).returncode != 0


def test_every_query_is_one_of_prometheus(tmp_path: Path) -> None:
    def checked(queries: dict[str, str]) -> int:
        rules = [{"record": f"query_{number}", "expr": query} for number, query in enumerate(queries.values())]
        (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
        return promtool("check", "rules", str(tmp_path / "rules.yml")).returncode

    assert checked(expressions(BOARD)) == 0
    for title, query in expressions(BOARD).items():
        assert checked({title: query.replace(")", "", 1)}) != 0, title


def test_a_run_is_named_by_its_folder_and_a_trial_by_its_sweep_too() -> None:
    def name(out: str, sweep: str | None = None) -> str:
        return TrainJob(RECIPE, out, None, 0, sweep=sweep).name()  # type: ignore[arg-type]

    assert name("s3://cells/runs/one") == name("/runs/one") == "one"
    assert name("s3://cells/sweeps/two/trials/0003", "s3://cells/sweeps/two") == "two/trials/0003"
    assert name("/two/final/start-seed1", "/two") == "two/final/start-seed1"


def test_gauges_are_set_with_all_their_tags(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[tuple[str, ...], float] = {}

    def note(gauge: Any, value: float, tags: dict[str, str]) -> None:
        assert tuple(tags) == gauge.info["tag_keys"]
        told[(gauge.info["name"], *tags.values())] = value

    monkeypatch.setattr("ray.util.metrics.Gauge.set", note)
    gauges.show_run("one", {"loss": 0.5, "val_dice": 0.75, "epoch": 3, "lr": 0.1})
    trials = {"complete": 2, "pruned": 1, "fail": 0}
    gauges.show_sweep("two", trials, None)
    expected: dict[tuple[str, ...], float] = {("raylivecell_loss", "one"): 0.5, ("raylivecell_val_dice", "one"): 0.75}
    assert told == expected | {("raylivecell_sweep_trials", "two", state): count for state, count in trials.items()}


class Prometheus(NamedTuple):
    """A real one, on this machine."""

    url: str
    config: Path

    def ask(self, path: str, **query: Any) -> Any:
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(query)}", timeout=10) as answer:
            return json.load(answer)["data"]

    def series(self, expression: str, since: float) -> list[dict[str, Any]]:
        """As Grafana asks for a panel: values of each second from `since` to now."""
        found = self.ask("query_range", query=expression, start=since, end=time.time(), step=1)
        return found["result"]

    def up(self, by: str) -> int:
        """Targets found through `by` that answer."""
        targets = self.ask("targets", state="active")["activeTargets"]
        return sum(one["health"] == "up" and by in one["discoveredLabels"] for one in targets)

    def reload(self, config: str) -> None:
        self.config.write_text(config)
        urllib.request.urlopen(urllib.request.Request(f"{self.url}/-/reload", method="POST"), timeout=10)


def until(what: str, ask: Callable[[], Any]) -> Any:
    """What `ask` answers, once that is something."""
    end, pause, last = time.monotonic() + DEADLINE_S, threading.Event(), None
    while time.monotonic() < end:
        try:
            if answer := ask():
                return answer
        except OSError as error:
            last = error
        pause.wait(0.2)
    raise AssertionError(f"not within {DEADLINE_S} s: {what} ({last})")


def quick(config: str) -> str:
    """The configuration, but with a scrape each second."""
    return config.replace("scrape_interval: 10s", "scrape_interval: 1s")


@pytest.fixture(scope="module")
def prometheus(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    program = shutil.which("prometheus")
    if not program:
        missing("no Prometheus: install Debian's package prometheus")
    folder = tmp_path_factory.mktemp("prometheus")
    nodes = Path(ray._private.worker._global_node.get_session_dir_path()).parent / "prom_metrics_service_discovery.json"
    (config := folder / "prometheus.yml").write_text(quick(CONFIG).replace(f"/tmp/ray/{nodes.name}", str(nodes)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [program, f"--config.file={config}", f"--storage.tsdb.path={folder}/data", "--web.enable-lifecycle"]
    with (
        open(folder / "log", "w") as log,
        subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=log, stderr=log) as running,
    ):
        server = Prometheus(f"http://{address}", config)
        until("Prometheus scrapes Ray's nodes", lambda: server.up("__meta_filepath"))
        yield server
        running.terminate()


class Watched(NamedTuple):
    """What Prometheus has seen."""

    since: float
    last: dict[str, Any]
    best: float


@pytest.fixture(scope="module")
def watched(prometheus: Prometheus, tiny_dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """The run `watched` and the sweep `searched`: no other test on this cluster has these names."""
    folder, since = tmp_path_factory.mktemp("watched"), time.time()
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")  # as in every job of a cluster
        last = train(tiny_dataset, str(folder / RUN), RECIPE)
    study = sweep(tiny_dataset, str(folder / SWEEP), RECIPE, SPACE, trials=2)
    return Watched(since, last, study.best_value)


@pytest.mark.slow
def test_prometheus_answers_every_query_of_the_dashboard(prometheus: Prometheus, watched: Watched) -> None:
    gpus = ray.cluster_resources().get("GPU", 0)
    for title, expression in expressions(BOARD).items():
        if gpus or not names(expression) & NEEDS_GPU:
            query = expression.replace("$run", f"({RUN}|{SWEEP})")
            until(f"{title}: {query}", lambda query=query: prometheus.series(query, watched.since))
    assert not prometheus.series(f"ray_{gauges.PREFIX}accuracy", watched.since)


@pytest.mark.slow
def test_what_it_scraped_is_what_the_run_reported(prometheus: Prometheus, watched: Watched) -> None:
    def last(name: str, *labels: str) -> float:
        (series,) = prometheus.series(f"max by (run) (ray_{gauges.PREFIX}{name}{{{','.join(labels)}}})", watched.since)
        return float(series["values"][-1][1])

    assert watched.last["step"] == 4
    for name in gauges.OF_RUN.keys() & watched.last.keys():
        until(name, lambda name=name: last(name, f'run="{RUN}"') == pytest.approx(watched.last[name]))
    until("best", lambda: last(gauges.SWEEP_BEST, f'run="{SWEEP}"') == pytest.approx(watched.best))
    until("trials", lambda: last(gauges.SWEEP_TRIALS, f'run="{SWEEP}"', 'state="complete"') == 2)


@pytest.mark.slow
def test_the_choice_of_runs_holds_the_run_and_the_sweep(prometheus: Prometheus, watched: Watched) -> None:
    (variable,) = (one for one in BOARD["templating"]["list"] if one["name"] == "run")
    selector, label = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"]).groups()  # type: ignore[union-attr]
    found = prometheus.ask(f"label/{label}/values", **{"match[]": selector})
    assert {RUN, SWEEP, f"{SWEEP}/trials/0000", f"{SWEEP}/trials/0001"} <= set(found)
    shown = {re.search(variable["regex"].strip("/"), one).group(1) for one in found}  # type: ignore[union-attr]
    assert {RUN, SWEEP} <= shown
    assert not any("/" in one for one in shown)


@pytest.mark.slow
def test_the_nodes_are_found_from_another_machine_too(prometheus: Prometheus, tmp_path: Path) -> None:
    token = "".join(get_auth_headers_if_auth_enabled({}).values()).removeprefix("Bearer ")
    (tmp_path / "token").write_text(token)
    config = quick(by_http(CONFIG)).replace("/etc/prometheus/ray-token", str(tmp_path / "token"))
    prometheus.reload(config.replace("http://HEAD:8265", str(session.dashboard())))
    until("Prometheus scrapes what the dashboard lists", lambda: prometheus.up("__meta_url"))


@pytest.mark.slow
def test_the_dashboard_tells_of_the_run(watched: Watched) -> None:
    request = urllib.request.Request(f"{session.dashboard()}/api/train/v2/runs/v1")
    for name, value in get_auth_headers_if_auth_enabled({}).items():
        request.add_header(name, value)
    with urllib.request.urlopen(request, timeout=10) as answer:
        runs = {run["name"]: run["status"] for run in json.load(answer)["train_runs"]}
    assert runs[RUN] == "FINISHED"
