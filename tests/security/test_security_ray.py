"""Ray with token authentication: who has no token is refused everywhere; what listens, and where."""

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
from conftest import run_apart, write_tiny_dataset
from hosts import until
from ray.core.generated import ray_client_pb2, ray_client_pb2_grpc

pytestmark = [pytest.mark.ray, pytest.mark.slow]
TOKEN = secrets.token_hex(32)


class Head(NamedTuple):
    """A cluster of one node, at work."""

    gcs: str
    """HOST:PORT, as of the other two."""
    dashboard: str
    client: str
    metrics: str


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def environment(home: Path | str, token: str | None) -> dict[str, str]:
    """Of a process whose home is `home`, in which no token lies."""
    env = {"HOME": str(home), "RAY_AUTH_MODE": "token", "RAY_TMPDIR": str(home), "RAY_USAGE_STATS_ENABLED": "0"}
    # As on macOS: a cluster of 127.0.0.1, which its drivers do not take for the machine's other address.
    return env | {"RAY_AUTH_TOKEN": token or "", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


def end(pid: int) -> None:
    """The process and all that it has started."""
    process = psutil.Process(pid)
    started = [*process.children(recursive=True), process]
    for one in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(started, timeout=30)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    names = ("port", "dashboard-port", "ray-client-server-port", "metrics-export-port", "dashboard-agent-listen-port")
    ports = free_ports(len(names))
    flags = [f"--{name}={port}" for name, port in zip(names, ports)]
    words = [Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--num-cpus=2", *flags]
    head = Head(*(f"127.0.0.1:{port}" for port in ports[:4]))
    with tempfile.TemporaryDirectory(prefix="rlc") as home, open(Path(home) / "log", "wb") as log:
        env = os.environ | environment(home, TOKEN)
        process = subprocess.Popen(words, env=env, stdout=log, stderr=log)
        try:
            until("the dashboard", lambda: ask(head, "/api/version", TOKEN)[0] == 200)
            yield head
        finally:
            end(process.pid)
            process.wait()


def ask(head: Head, path: str, token: str | None, body: dict | None = None) -> tuple[int, str]:
    """The dashboard's answer, status and text; 401: not allowed."""
    asked = urllib.request.Request(f"http://{head.dashboard}{path}", json.dumps(body).encode() if body else None)
    if token:
        asked.add_header("Authorization", f"Bearer {token}")
    if body:
        asked.add_header("Content-Type", "application/json")
    try:
        with urllib.request.urlopen(asked, timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


CALLS = ("/api/jobs/", "/api/v0/nodes", "/api/cluster_status", "/nodes?view=summary", "/api/v0/logs", "/timezone")
STRANGERS = (None, "", secrets.token_hex(32), TOKEN[:-1])


@pytest.mark.parametrize("path", CALLS)
def test_the_dashboard(path: str, head: Head) -> None:
    assert {ask(head, path, token)[0] for token in STRANGERS} <= {401, 403}
    assert ask(head, path, TOKEN)[0] not in (401, 403)


def test_a_job(head: Head, tmp_path: Path) -> None:
    job = {"entrypoint": f"touch {tmp_path}/ran", "submission_id": f"job-{secrets.token_hex(4)}"}
    assert {ask(head, "/api/jobs/", token, job)[0] for token in STRANGERS} <= {401, 403}
    assert ask(head, f"/api/jobs/{job['submission_id']}", TOKEN)[0] == 404
    answers: list[tuple[int, str]] = []

    def taken() -> bool:  # by an agent that has started
        answers.append(ask(head, "/api/jobs/", TOKEN, job))
        return answers[-1][0] == 200 or "already exists" in answers[-1][1]

    with contextlib.suppress(TimeoutError):
        until("the job is taken", taken)
    assert taken(), answers[-1]
    until("the job", (tmp_path / "ran").exists)


SUBMITTED = """
import sys
from raylivecell.cli import main as cli
sys.exit(cli.main(["submit", "--address", sys.argv[1], "--working-dir", sys.argv[2], "prepare", "--source", "s3://a/b",
    "--out", "s3://a/c"]))
"""


def test_submit_says_that_it_has_no_token(head: Head, tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "prepare.py").write_text("")
    done = run_apart(SUBMITTED, f"http://{head.dashboard}", str(tmp_path), env=environment(tmp_path, None))
    assert done.returncode == 2
    assert "token" in done.stderr.splitlines()[-1].lower(), done.stderr


JOINED = """
import sys
import ray
ray.init(sys.argv[1], log_to_driver=False)
print("at work:", ray.get(ray.remote(lambda: 6 * 7).remote()))
"""


@pytest.mark.parametrize("token", [None, secrets.token_hex(32), TOKEN])
def test_a_process_that_joins(token: str | None, head: Head, tmp_path: Path) -> None:
    done = run_apart(JOINED, head.gcs, env=environment(tmp_path, token))
    assert ("at work: 42" in done.stdout) == (token == TOKEN), done.stderr[-2000:]
    assert (done.returncode == 0) == (token == TOKEN)
    if token != TOKEN:
        assert "token" in done.stderr.lower()


def test_the_port_of_clients(head: Head) -> None:
    """Of `ray://`: the question that a client asks first."""
    ping = ray_client_pb2.ClusterInfoRequest(type=ray_client_pb2.ClusterInfoType.PING)
    with grpc.insecure_channel(head.client) as channel:
        stub = ray_client_pb2_grpc.RayletDriverStub(channel)

        def told(token: str | None) -> str:
            metadata = [("client_id", "nobody"), *([("authorization", f"Bearer {token}")] if token else [])]
            try:
                stub.ClusterInfo(ping, metadata=metadata, wait_for_ready=True, timeout=60)
                return "answered"
            except grpc.RpcError as error:
                return error.code().name

        assert [told(token) for token in (*STRANGERS, TOKEN)] == ["UNAUTHENTICATED"] * len(STRANGERS) + ["answered"]


def test_a_process_without_authentication(head: Head, tmp_path: Path) -> None:
    done = run_apart(JOINED, head.gcs, env=environment(tmp_path, None) | {"RAY_AUTH_MODE": "disabled"})
    assert done.returncode
    assert "at work" not in done.stdout


def test_metrics_are_open(head: Head) -> None:
    """As SECURITY.md says: numbers and names, to anybody who reaches the port."""
    with urllib.request.urlopen(f"http://{head.metrics}/metrics", timeout=20) as answer:
        assert b"ray_" in answer.read()


LISTENERS = """
import contextlib, json, os, sys, threading
import psutil
from raylivecell.cli import main as cli

found, done = set(), threading.Event()

def look():
    me = psutil.Process()
    ours = {one.pid: one for one in [me, *me.children(recursive=True)]}
    for socket in psutil.net_connections("inet"):
        if socket.status == psutil.CONN_LISTEN and socket.pid in ours:
            with contextlib.suppress(psutil.Error):
                found.add((ours[socket.pid].name(), socket.laddr.ip.removeprefix("::ffff:")))

def watch():
    while not done.wait(0.5):
        look()

def command(arguments):
    from raylivecell.runtime import session as runtime
    runtime.connect(cpus=4, dashboard=True)
    import ray
    ray.get(ray.remote(lambda: 1).remote())
    look()
    told = {"connected": sorted(found)}
    found.clear()
    watcher = threading.Thread(target=watch)
    watcher.start()
    from raylivecell import recipe
    from raylivecell.training import train
    row = train.train(sys.argv[1], sys.argv[2], recipe.load(sys.argv[3]), workers=2)
    done.set()
    watcher.join()
    told |= {"training": sorted(found), "step": row["step"]}
    token = os.path.join(os.environ["HOME"], ".ray")
    told["home"] = sorted(os.listdir(token))
    print(json.dumps(told))

cli.COMMANDS["train"] = ("", command)
sys.exit(cli.main(["train"]))
"""


def test_what_listens_on_a_laptop(tmp_path: Path) -> None:
    """Ray on loopback alone; while two workers train, torch's own store on all interfaces: SECURITY.md says so."""
    data = write_tiny_dataset(tmp_path / "data")
    steps = {"phases": [{"steps": 4}], "crop": [32, 32], "model": {"features": [4]}, "loop": {"precision": "float32"}}
    (tmp_path / "r.yaml").write_text(json.dumps(steps))
    with tempfile.TemporaryDirectory(prefix="rlc") as home:
        env = {"HOME": home, "RAY_TMPDIR": home}
        done = run_apart(LISTENERS, data, str(tmp_path / "run"), str(tmp_path / "r.yaml"), env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert {name for name, _ in told["connected"]} >= {"gcs_server", "raylet"}
    assert {address for _, address in told["connected"]} == {"127.0.0.1"}
    assert told["step"] == 4
    # Ray names a process after what it does: a worker of Ray Train is `ray::RayTrainWorker[.method]`, `ray::execute.X`.
    others = {name for name, address in told["training"] if address != "127.0.0.1"}
    assert all(name.startswith(("ray::RayTrainWorker", "ray::execute.")) for name in others), others
    assert told["home"] == ["auth_token"]
