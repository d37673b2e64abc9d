"""Ray with token authentication: every interface refuses requests without the token; listening addresses."""

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import grpc
import psutil
import pytest
from conftest import run_python, write_tiny_dataset
from hosts import wait_until
from ray.core.generated import ray_client_pb2, ray_client_pb2_grpc

pytestmark = [pytest.mark.ray, pytest.mark.slow]
TOKEN = secrets.token_hex(32)


class Head(NamedTuple):
    """Addresses (HOST:PORT) of a running cluster of one node."""

    gcs: str
    dashboard: str
    client: str
    metrics: str


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for port in sockets:
            port.bind(("127.0.0.1", 0))
        return [port.getsockname()[1] for port in sockets]


def environment(home: Path | str, token: str | None) -> dict[str, str]:
    """Environment of a process with the home folder `home`, which contains no token file."""
    env = {"HOME": str(home), "RAY_AUTH_MODE": "token", "RAY_TMPDIR": str(home), "RAY_USAGE_STATS_ENABLED": "0"}
    # As on macOS: the cluster uses 127.0.0.1, and drivers do not replace it with the machine's other address.
    return env | {"RAY_AUTH_TOKEN": token or "", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


def kill_tree(pid: int) -> None:
    """Kill a process and its descendants."""
    process = psutil.Process(pid)
    processes = [*process.children(recursive=True), process]
    for member in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(processes, timeout=30)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    names = ("port", "dashboard-port", "ray-client-server-port", "metrics-export-port", "dashboard-agent-listen-port")
    ports = free_ports(len(names))
    flags = [f"--{name}={port}" for name, port in zip(names, ports)]
    command = [Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--num-cpus=2", *flags]
    head = Head(*(f"127.0.0.1:{port}" for port in ports[:4]))
    with tempfile.TemporaryDirectory(prefix="rlc") as home, open(Path(home) / "log", "wb") as log:
        env = os.environ | environment(home, TOKEN)
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        try:
            wait_until("the dashboard", lambda: query_dashboard(head, "/api/version", TOKEN)[0] == 200)
            yield head
        finally:
            kill_tree(process.pid)
            process.wait()


def query_dashboard(head: Head, path: str, token: str | None, body: dict | None = None) -> tuple[int, str]:
    """Status and text of the dashboard's response."""
    request = urllib.request.Request(f"http://{head.dashboard}{path}", json.dumps(body).encode() if body else None)
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    if body:
        request.add_header("Content-Type", "application/json")
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


CALLS = ("/api/jobs/", "/api/v0/nodes", "/api/cluster_status", "/nodes?view=summary", "/api/v0/logs", "/timezone")
WRONG_TOKENS = (None, "", secrets.token_hex(32), TOKEN[:-1])


@pytest.mark.parametrize("path", CALLS)
def test_the_dashboard_needs_the_token(path: str, head: Head) -> None:
    assert {query_dashboard(head, path, token)[0] for token in WRONG_TOKENS} <= {401, 403}
    assert query_dashboard(head, path, TOKEN)[0] not in (401, 403)


def test_a_job_needs_the_token(head: Head, tmp_path: Path) -> None:
    job = {"entrypoint": f"touch {tmp_path}/ran", "submission_id": f"job-{secrets.token_hex(4)}"}
    assert {query_dashboard(head, "/api/jobs/", token, job)[0] for token in WRONG_TOKENS} <= {401, 403}
    assert query_dashboard(head, f"/api/jobs/{job['submission_id']}", TOKEN)[0] == 404
    responses: list[tuple[int, str]] = []

    def is_accepted() -> bool:  # once the job agent has started
        responses.append(query_dashboard(head, "/api/jobs/", TOKEN, job))
        return responses[-1][0] == 200 or "already exists" in responses[-1][1]

    with contextlib.suppress(TimeoutError):
        wait_until("the job is accepted", is_accepted)
    assert is_accepted(), responses[-1]
    wait_until("the job", (tmp_path / "ran").exists)


SUBMIT = """
import sys
from raylivecell.cli import main as cli
sys.exit(cli.main(["submit", "--address", sys.argv[1], "--working-dir", sys.argv[2], "prepare", "--source", "s3://a/b",
    "--out", "s3://a/c"]))
"""


def test_submit_without_a_token_is_refused(head: Head, tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "prepare.py").write_text("")
    process = run_python(SUBMIT, f"http://{head.dashboard}", str(tmp_path), env=environment(tmp_path, None))
    assert process.returncode == 2
    assert "token" in process.stderr.splitlines()[-1].lower(), process.stderr


CONNECT = """
import sys
import ray
ray.init(sys.argv[1], log_to_driver=False)
print("result:", ray.get(ray.remote(lambda: 6 * 7).remote()))
"""


@pytest.mark.parametrize("token", [None, secrets.token_hex(32), TOKEN])
def test_a_driver_needs_the_token(token: str | None, head: Head, tmp_path: Path) -> None:
    process = run_python(CONNECT, head.gcs, env=environment(tmp_path, token))
    assert ("result: 42" in process.stdout) == (token == TOKEN), process.stderr[-2000:]
    assert (process.returncode == 0) == (token == TOKEN)
    if token != TOKEN:
        assert "token" in process.stderr.lower()


def test_the_ray_client_port_needs_the_token(head: Head) -> None:
    """Sends the first request of a `ray://` client."""
    ping = ray_client_pb2.ClusterInfoRequest(type=ray_client_pb2.ClusterInfoType.PING)
    with grpc.insecure_channel(head.client) as channel:
        stub = ray_client_pb2_grpc.RayletDriverStub(channel)

        def outcome(token: str | None) -> str:
            metadata = [("client_id", "nobody"), *([("authorization", f"Bearer {token}")] if token else [])]
            try:
                stub.ClusterInfo(ping, metadata=metadata, wait_for_ready=True, timeout=60)
                return "answered"
            except grpc.RpcError as error:
                return error.code().name

        assert [outcome(token) for token in (*WRONG_TOKENS, TOKEN)] == ["UNAUTHENTICATED"] * len(WRONG_TOKENS) + [
            "answered"
        ]


def test_a_driver_with_authentication_disabled_is_refused(head: Head, tmp_path: Path) -> None:
    process = run_python(CONNECT, head.gcs, env=environment(tmp_path, None) | {"RAY_AUTH_MODE": "disabled"})
    assert process.returncode
    assert "result:" not in process.stdout


def test_metrics_are_open(head: Head) -> None:
    """As documented in SECURITY.md: metric names and values are readable by anyone who reaches the port."""
    with urllib.request.urlopen(f"http://{head.metrics}/metrics", timeout=20) as answer:
        assert b"ray_" in answer.read()


LISTENERS = """
import contextlib, json, os, sys, threading
import psutil
from raylivecell.cli import main as cli

listeners, finished = set(), threading.Event()

def record_listeners():
    root = psutil.Process()
    processes = {process.pid: process for process in [root, *root.children(recursive=True)]}
    for socket in psutil.net_connections("inet"):
        if socket.status == psutil.CONN_LISTEN and socket.pid in processes:
            with contextlib.suppress(psutil.Error):
                listeners.add((processes[socket.pid].name(), socket.laddr.ip.removeprefix("::ffff:")))

def watch():
    while not finished.wait(0.5):
        record_listeners()

def command(arguments):
    from raylivecell.runtime import session as runtime
    runtime.connect(cpus=4, dashboard=True)
    import ray
    ray.get(ray.remote(lambda: 1).remote())
    record_listeners()
    report = {"connected": sorted(listeners)}
    listeners.clear()
    watcher = threading.Thread(target=watch)
    watcher.start()
    from raylivecell import recipe
    from raylivecell.training import train
    row = train.train(sys.argv[1], sys.argv[2], recipe.load(sys.argv[3]), workers=2)
    finished.set()
    watcher.join()
    report |= {"training": sorted(listeners), "step": row["step"]}
    folder = os.path.join(os.environ["HOME"], ".ray")
    report["home"] = sorted(os.listdir(folder))
    print(json.dumps(report))

cli.COMMANDS["train"] = ("", command)
sys.exit(cli.main(["train"]))
"""


def test_listeners_of_a_local_training(tmp_path: Path) -> None:
    """Ray listens on loopback only; while two workers train, torch's store listens on all interfaces."""
    data = write_tiny_dataset(tmp_path / "data")
    steps = {"phases": [{"steps": 4}], "crop": [32, 32], "model": {"features": [4]}, "loop": {"precision": "float32"}}
    (tmp_path / "r.yaml").write_text(json.dumps(steps))
    with tempfile.TemporaryDirectory(prefix="rlc") as home:
        env = {"HOME": home, "RAY_TMPDIR": home}
        process = run_python(LISTENERS, data, str(tmp_path / "run"), str(tmp_path / "r.yaml"), env=env)
    assert process.returncode == 0, process.stderr[-2000:]
    report = json.loads(process.stdout.splitlines()[-1])
    assert {name for name, _ in report["connected"]} >= {"gcs_server", "raylet"}
    assert {address for _, address in report["connected"]} == {"127.0.0.1"}
    assert report["step"] == 4
    # Ray renames processes by task: a worker of Ray Train is `ray::RayTrainWorker[.method]`, `ray::execute.X`. While it
    # does, psutil finds only the first 15 characters.
    others = {name for name, address in report["training"] if address != "127.0.0.1"}
    assert all(name.startswith(("ray::RayTrainWo", "ray::execute.")) for name in others), others
    assert report["home"] == ["auth_token"]
