"""cluster/monitoring: Prometheus scrapes a real run, sweep and service, and answers every query of the dashboard."""

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

import cv2
import httpx
import numpy as np
import pytest
import ray
from conftest import skip_or_fail
from ray import serve
from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled
from ray.serve.config import HTTPOptions, ProxyLocation

from raylivecell.recipe import LoopConfig, ModelConfig, PhaseConfig, Recipe
from raylivecell.runtime import prometheus as gauges
from raylivecell.runtime import session
from raylivecell.serving import application
from raylivecell.serving.node_metrics import Recorder
from raylivecell.serving.settings import ServeSettings
from raylivecell.sweep.space import Dimension, SweepConfig
from raylivecell.sweep.sweep import sweep
from raylivecell.training.job import TrainJob
from raylivecell.training.train import train

FOLDER = Path(__file__).parents[2] / "cluster" / "monitoring"
CONFIG = (FOLDER / "prometheus.yml").read_text()
DASHBOARD = json.loads((FOLDER / "grafana-dashboard.json").read_text())
SERIES = {"Counter": "total", "Histogram": "bucket"}
OUR_METRICS = {f"ray_{gauges.PREFIX}{name}" for name in gauges.OF_RUN | gauges.OF_SWEEP}
OUR_METRICS |= {f"ray_{metric.info['name']}_{SERIES[type(metric).__name__]}" for metric in vars(Recorder()).values()}
RAY_METRICS = {
    "ray_node_cpu_utilization",
    "ray_node_gpus_utilization",
    "ray_node_mem_used_host",
    "ray_node_mem_total_host",
    "ray_object_store_memory",
    "ray_resources",
    "ray_serve_deployment_queued_queries",
    "ray_serve_deployment_replica_healthy",
    "ray_serve_replica_processing_queries",
}
GPU_METRICS = {"ray_node_gpus_utilization"}
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


def expressions(dashboard: dict[str, Any]) -> dict[str, str]:
    """Queries of the panels: "TITLE REF" -> query."""
    return {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in dashboard["panels"]
        for target in panel.get("targets", [])
    }


def names(expression: str) -> set[str]:
    """Metrics in a query."""
    return set(re.findall(r"\bray_\w+", expression))


def problems(dashboard: dict[str, Any]) -> list[str]:
    """Errors in a dashboard, as far as they can be detected without Grafana."""
    errors = []
    ids = [panel["id"] for panel in dashboard["panels"]]
    errors += [f"panel id {number} twice" for number in set(ids) if ids.count(number) > 1]
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    for panel in dashboard["panels"]:
        position = panel["gridPos"]
        if position["x"] + position["w"] > 24:
            errors.append(f"{panel['title']} is wider than the dashboard")
        legends = " ".join(target.get("legendFormat", "") for target in panel.get("targets", []))
        queries = " ".join(target["expr"] for target in panel.get("targets", []))
        grouped = {word.strip() for group in re.findall(r"by \(([^)]*)\)", queries) for word in group.split(",")}
        errors += [
            f"{panel['title']}: no {label}" for label in re.findall(r"{{(\w+)}}", legends) if label not in grouped
        ]
    for name in re.findall(r"\$\{?(\w+)", json.dumps(dashboard)):
        if name not in variables and name != "__all":
            errors.append(f"no variable {name}")
    errors += [
        f"{title}: no metric {name}"
        for title, expression in expressions(dashboard).items()
        for name in names(expression) - OUR_METRICS - RAY_METRICS
    ]
    return errors + [
        f"{name} is in no panel" for name in OUR_METRICS - names(" ".join(expressions(dashboard).values()))
    ]


def test_dashboard_is_well_formed() -> None:
    assert problems(DASHBOARD) == []
    assert DASHBOARD["schemaVersion"] == 42, "the last version of this JSON format"
    assert expressions(DASHBOARD)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"id": 3,', '"id": 2,', "panel id 2 twice"),
        ("ray_raylivecell_val_msa", "ray_raylivecell_msa", "no metric ray_raylivecell_msa"),
        ("ray_raylivecell_val_msa", "ray_raylivecell_val_dice", "ray_raylivecell_val_msa is in no panel"),
        ('"name": "run"', '"name": "runs"', "no variable run"),
        ("{{state}}", "{{status}}", "Trials: no status"),
        ("serve_seconds_bucket", "serve_seconds", "no metric ray_raylivecell_serve_seconds"),
        ("serve_images_total", "serve_requests_total", "ray_raylivecell_serve_images_total is in no panel"),
        ('"x": 16', '"x": 17', "wider"),
    ],
)
def test_broken_dashboard_is_rejected(old: str, new: str, message: str) -> None:
    text = json.dumps(DASHBOARD)
    assert old in text
    assert any(message in problem for problem in problems(json.loads(text.replace(old, new))))


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    tool = shutil.which("promtool")
    if not tool:
        skip_or_fail("no promtool: install Debian's package prometheus")
    return subprocess.run([tool, *arguments], capture_output=True, text=True, timeout=60)


def with_http_discovery(config: str) -> str:
    """The configuration edited for another machine, as its comments describe."""
    head, tail = config.split("    # http_sd_configs:")
    head = re.sub(r"    file_sd_configs:\n.*\n", "", head)
    return head + "    # http_sd_configs:".replace("# ", "") + tail.replace("    # ", "    ")


@pytest.mark.parametrize("config", [CONFIG, with_http_discovery(CONFIG)], ids=["list", "http"])
def test_prometheus_accepts_the_configuration(config: str, tmp_path: Path) -> None:
    (tmp_path / "prometheus.yml").write_text(config)
    done = promtool("check", "config", "--syntax-only", str(tmp_path / "prometheus.yml"))
    assert done.returncode == 0, done.stderr
    (tmp_path / "prometheus.yml").write_text(config.replace("_sd_configs", "_sd_config"))
    assert promtool("check", "config", "--syntax-only", str(tmp_path / "prometheus.yml")).returncode != 0


def test_prometheus_accepts_every_query(tmp_path: Path) -> None:
    def check(queries: dict[str, str]) -> int:
        rules = [{"record": f"query_{number}", "expr": query} for number, query in enumerate(queries.values())]
        (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
        return promtool("check", "rules", str(tmp_path / "rules.yml")).returncode

    assert check(expressions(DASHBOARD)) == 0
    for title, query in expressions(DASHBOARD).items():
        assert check({title: query.replace(")", "", 1)}) != 0, title


def test_run_label_is_the_folder_name_and_for_trials_the_path_in_the_sweep() -> None:
    def name(out: str, sweep: str | None = None) -> str:
        return TrainJob(RECIPE, out, None, 0, sweep=sweep).name()  # type: ignore[arg-type]

    assert name("s3://cells/runs/one") == name("/runs/one") == "one"
    assert name("s3://cells/sweeps/two/trials/0003", "s3://cells/sweeps/two") == "two/trials/0003"
    assert name("/two/final/start-seed1", "/two") == "two/final/start-seed1"


def test_gauges_are_set_with_all_their_tags(monkeypatch: pytest.MonkeyPatch) -> None:
    values: dict[tuple[str, ...], float] = {}

    def record(gauge: Any, value: float, tags: dict[str, str]) -> None:
        assert tuple(tags) == gauge.info["tag_keys"]
        values[(gauge.info["name"], *tags.values())] = value

    monkeypatch.setattr("ray.util.metrics.Gauge.set", record)
    gauges.show_run("one", {"loss": 0.5, "val_dice": 0.75, "epoch": 3, "lr": 0.1})
    trials = {"complete": 2, "pruned": 1, "fail": 0}
    gauges.show_sweep("two", trials, None)
    expected: dict[tuple[str, ...], float] = {("raylivecell_loss", "one"): 0.5, ("raylivecell_val_dice", "one"): 0.75}
    assert values == expected | {("raylivecell_sweep_trials", "two", state): count for state, count in trials.items()}


class Prometheus(NamedTuple):
    """A Prometheus server on this machine."""

    url: str
    config: Path

    def query(self, path: str, **parameters: Any) -> Any:
        with urllib.request.urlopen(
            f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}", timeout=10
        ) as response:
            return json.load(response)["data"]

    def series(self, expression: str, since: float) -> list[dict[str, Any]]:
        """Run a panel's query as Grafana does: one value per second from `since` to now."""
        return self.query("query_range", query=expression, start=since, end=time.time(), step=1)["result"]

    def healthy_targets(self, label: str) -> int:
        """Number of healthy targets with the discovery label `label`."""
        targets = self.query("targets", state="active")["activeTargets"]
        return sum(target["health"] == "up" and label in target["discoveredLabels"] for target in targets)

    def reload(self, config: str) -> None:
        self.config.write_text(config)
        urllib.request.urlopen(urllib.request.Request(f"{self.url}/-/reload", method="POST"), timeout=10)


def wait_until(what: str, attempt: Callable[[], Any]) -> Any:
    """Call `attempt` until its result is true; return that result."""
    end, pause, last = time.monotonic() + DEADLINE_S, threading.Event(), None
    while time.monotonic() < end:
        try:
            if result := attempt():
                return result
        except OSError as error:
            last = error
        pause.wait(0.2)
    raise AssertionError(f"not within {DEADLINE_S} s: {what} ({last})")


def every_second(config: str) -> str:
    """The configuration with a scrape interval of one second."""
    return config.replace("scrape_interval: 10s", "scrape_interval: 1s")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def prometheus(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    program = shutil.which("prometheus")
    if not program:
        skip_or_fail("no Prometheus: install Debian's package prometheus")
    folder = tmp_path_factory.mktemp("prometheus")
    nodes = Path(ray._private.worker._global_node.get_session_dir_path()).parent / "prom_metrics_service_discovery.json"
    (config := folder / "prometheus.yml").write_text(every_second(CONFIG).replace(f"/tmp/ray/{nodes.name}", str(nodes)))
    address = f"127.0.0.1:{free_port()}"
    command = [program, f"--config.file={config}", f"--storage.tsdb.path={folder}/data", "--web.enable-lifecycle"]
    with (
        open(folder / "log", "w") as log,
        subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=log, stderr=log) as process,
    ):
        server = Prometheus(f"http://{address}", config)
        wait_until("Prometheus scrapes Ray's nodes", lambda: server.healthy_targets("__meta_filepath"))
        yield server
        process.terminate()


class Scraped(NamedTuple):
    """A run and a sweep that Prometheus has scraped: start time, last row of the run, best value of the sweep."""

    since: float
    last: dict[str, Any]
    best: float


@pytest.fixture(scope="module")
def scraped(prometheus: Prometheus, tiny_dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Scraped:
    """Run `train` and `sweep` under names that no other test on this cluster uses."""
    folder, since = tmp_path_factory.mktemp("scraped"), time.time()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")  # as in every job of a cluster
        last = train(tiny_dataset, str(folder / RUN), RECIPE)
    study = sweep(tiny_dataset, str(folder / SWEEP), RECIPE, SPACE, trials=2)
    return Scraped(since, last, study.best_value)


@pytest.fixture(scope="module")
def served(scraped: Scraped, random_checkpoint: str) -> Iterator[None]:
    """A service on the same cluster that has segmented one image and refused another file."""
    options = HTTPOptions(host="127.0.0.1", port=free_port())
    serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=options)
    try:
        built = application.build(ServeSettings(checkpoint=random_checkpoint, require_token=False))
        serve.run(built, name=application.NAME, route_prefix="/")
        image = cv2.imencode(".png", np.zeros((40, 40), np.uint8))[1].tobytes()
        for body, status in ((image, 200), (b"text", 415)):
            response = httpx.post(f"http://127.0.0.1:{options.port}/segment", content=body, timeout=60)
            assert response.status_code == status, response.text
        yield
    finally:
        serve.shutdown()


@pytest.mark.slow
@pytest.mark.usefixtures("served")
def test_prometheus_answers_every_query_of_the_dashboard(prometheus: Prometheus, scraped: Scraped) -> None:
    gpus = ray.cluster_resources().get("GPU", 0)
    for title, expression in expressions(DASHBOARD).items():
        if gpus or not names(expression) & GPU_METRICS:
            query = expression.replace("$run", f"({RUN}|{SWEEP})")
            wait_until(f"{title}: {query}", lambda query=query: prometheus.series(query, scraped.since))
    assert not prometheus.series(f"ray_{gauges.PREFIX}accuracy", scraped.since)


@pytest.mark.slow
def test_scraped_values_are_those_that_the_run_reported(prometheus: Prometheus, scraped: Scraped) -> None:
    def last(name: str, *labels: str) -> float:
        (series,) = prometheus.series(f"max by (run) (ray_{gauges.PREFIX}{name}{{{','.join(labels)}}})", scraped.since)
        return float(series["values"][-1][1])

    assert scraped.last["step"] == 4
    for name in gauges.OF_RUN.keys() & scraped.last.keys():
        wait_until(name, lambda name=name: last(name, f'run="{RUN}"') == pytest.approx(scraped.last[name]))
    wait_until("best", lambda: last(gauges.SWEEP_BEST, f'run="{SWEEP}"') == pytest.approx(scraped.best))
    wait_until("trials", lambda: last(gauges.SWEEP_TRIALS, f'run="{SWEEP}"', 'state="complete"') == 2)


@pytest.mark.slow
@pytest.mark.usefixtures("served")
def test_scraped_counts_are_those_of_the_service(prometheus: Prometheus, scraped: Scraped) -> None:
    def last(name: str) -> float:
        return float(prometheus.series(f"sum(ray_raylivecell_serve_{name})", scraped.since)[0]["values"][-1][1])

    for name in ("images_total", 'requests_total{status="200"}', 'requests_total{status="415"}'):
        assert wait_until(name, lambda name=name: last(name)) == 1
    assert last("seconds_count") == 2


@pytest.mark.slow
def test_variable_run_lists_the_run_and_the_sweep(prometheus: Prometheus, scraped: Scraped) -> None:
    (variable,) = (entry for entry in DASHBOARD["templating"]["list"] if entry["name"] == "run")
    selector, label = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"]).groups()  # type: ignore[union-attr]
    values = prometheus.query(f"label/{label}/values", **{"match[]": selector})
    assert {RUN, SWEEP, f"{SWEEP}/trials/0000", f"{SWEEP}/trials/0001"} <= set(values)
    options = {re.search(variable["regex"].strip("/"), value).group(1) for value in values}  # type: ignore[union-attr]
    assert {RUN, SWEEP} <= options
    assert not any("/" in option for option in options)


@pytest.mark.slow
def test_nodes_are_discovered_from_another_machine(prometheus: Prometheus, tmp_path: Path) -> None:
    token = "".join(get_auth_headers_if_auth_enabled({}).values()).removeprefix("Bearer ")
    (tmp_path / "token").write_text(token)
    config = every_second(with_http_discovery(CONFIG)).replace("/etc/prometheus/ray-token", str(tmp_path / "token"))
    prometheus.reload(config.replace("http://HEAD:8265", str(session.dashboard())))
    wait_until(
        "Prometheus scrapes the nodes that the dashboard lists", lambda: prometheus.healthy_targets("__meta_url")
    )


@pytest.mark.slow
def test_ray_dashboard_lists_the_run(scraped: Scraped) -> None:
    request = urllib.request.Request(f"{session.dashboard()}/api/train/v2/runs/v1")
    for name, value in get_auth_headers_if_auth_enabled({}).items():
        request.add_header(name, value)
    with urllib.request.urlopen(request, timeout=10) as response:
        runs = {run["name"]: run["status"] for run in json.load(response)["train_runs"]}
    assert runs[RUN] == "FINISHED"
