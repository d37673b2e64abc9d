"""Faults on real hosts (hosts.py): `python tests/faults.py [NAME ...]`, as root, on Linux; minutes each.

Each fault hits a run of two workers that reads its data from S3 and writes to it. It must end with every step reported
once, and a validation Dice within noise of the undisturbed run's. Prints a table row a fault.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import hosts as rooms
from hosts import Host, Hosts, until

STEPS, REPORT = 400, 40
# A fault must not cost the run more than this, seconds: what RAY.md calls a hang is half an hour.
LIMIT_S = 420.0
DICE_NOISE, LOSS_NOISE = 0.02, 0.05
ROOT = Path(__file__).parents[1]
FLAGS = f"""--recipe small --data s3://cells/data --batch-size 12 --crop 48 48
--phases.0.steps {STEPS} --loop.report-steps {REPORT} --loop.precision float32""".split()


class Fault(NamedTuple):
    """What is done to a run once it has reported some."""

    what: str
    hit: Callable[["Scene"], str]
    workers: str = "2"


class Scene:
    """A run on the hosts."""

    def __init__(self, hosts: Hosts, s3: Any, name: str, workers: str) -> None:
        self.hosts, self.s3, self.name, self.workers = hosts, s3, name, workers
        self.job = self.submit()

    def submit(self) -> subprocess.Popen[bytes]:
        """`raylivecell submit train`, from outside the hosts; goes on with a run that is begun."""
        words = ["raylivecell", "submit", "--address", self.hosts.address(), "train", *FLAGS, "--workers", self.workers]
        words += ["--out", f"s3://cells/runs/{self.name}", "--resume", "auto"]
        with open(self.hosts.root / f"{self.name}.log", "ab") as log:
            return subprocess.Popen(words, cwd=ROOT, env=self.hosts.env(), stdout=log, stderr=log)

    def rows(self) -> list[dict[str, Any]]:
        """What the run has reported."""
        try:
            text = self.s3.get_object(Bucket="cells", Key=f"runs/{self.name}/metrics.jsonl")["Body"].read()
        except self.s3.exceptions.NoSuchKey:
            return []
        return [json.loads(line) for line in text.splitlines()]

    def steps(self) -> int:
        rows = self.rows()
        return int(rows[-1]["step"]) if rows else 0

    def after(self, step: int, limit_s: float = LIMIT_S) -> float:
        """Wait until the run has reported `step`."""
        return until(f"step {step} of {self.name}", lambda: self.steps() >= step or self.ended(), limit_s)

    def ended(self) -> bool:
        if self.job.poll() not in (None, 0):
            raise AssertionError(f"the job ended with {self.job.returncode}: see {self.name}.log")
        return self.job.poll() == 0

    def victim(self) -> Host:
        """A host, not the head, with a training process."""
        found = [host for name, host in self.hosts.hosts.items() if name != "head" and host.pids("RayTrainWorker")]
        assert found, "no training process outside the head"
        return found[-1]

    def wait(self, limit_s: float) -> float:
        """Wait for the end of the job."""
        begin = time.monotonic()
        assert self.job.wait(limit_s) == 0, f"the job ended with {self.job.returncode}: see {self.name}.log"
        return time.monotonic() - begin


def worker_killed(scene: Scene) -> str:
    host = scene.victim()
    return f"{host.kill('RayTrainWorker')} process on {host.address}"


def raylet_killed(scene: Scene) -> str:
    host = scene.victim()
    host.kill("raylet/raylet")
    return f"raylet of {host.address}"


def node_lost_and_added(scene: Scene) -> str:
    host = scene.victim()
    host.kill()
    new = scene.hosts.start_host(f"n{len(scene.hosts.hosts)}", len(scene.hosts.hosts), 1)
    return f"{host.address} gone, {new.address} came"


def drained(scene: Scene) -> str:
    host = scene.victim()
    node = scene.hosts.alive()[host.address]
    words = f"ray drain-node --address {rooms.NET}.10:{rooms.HEAD_PORT} --node-id {node}".split()
    words += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    words += ["--deadline-remaining-seconds", "15"]
    head = scene.hosts.hosts["head"].name
    subprocess.run(["ip", "netns", "exec", head, *words], env=scene.hosts.env(), check=True, capture_output=True)
    before = scene.steps()
    threading.Event().wait(17)
    host.kill()
    return f"{host.address} told at step {before}, gone 17 s later at step {scene.steps()}"


def cut(seconds: float) -> Callable[[Scene], str]:
    def hit(scene: Scene) -> str:
        host = scene.victim()
        host.cable(False)
        threading.Event().wait(seconds)
        host.cable(True)
        return f"{host.address} without network for {seconds:g} s"

    return hit


def driver_killed(scene: Scene) -> str:
    hit = sum(host.kill("jobs/train.py") for host in scene.hosts.hosts.values())
    code = scene.job.wait(120)
    assert code != 0
    scene.job = scene.submit()
    return f"{hit} processes of the driver; submitted again"


def s3_down(scene: Scene) -> str:
    flag = scene.hosts.root / "s3-is-down"
    flag.touch()
    threading.Event().wait(30)
    flag.unlink()
    return "503 for 30 s"


def data_tasks_killed(scene: Scene) -> str:
    hit = 0

    def killed() -> bool:  # they bear that name only while they work
        nonlocal hit
        hit += sum(host.kill("ray::Read_Samples") for host in scene.hosts.hosts.values())
        return hit >= 2

    until("data tasks at work", killed, 60)
    return f"{hit} processes, as the out-of-memory killer does"


def disk_full(scene: Scene) -> str:
    """The disk on which the checkpoint is written before it goes to S3."""
    host = scene.victim()
    inside = ["nsenter", "-m", "-t", str(host.pids("raylet/raylet")[0])]
    subprocess.run([*inside, "dd", "if=/dev/zero", "of=/tmp/full", "bs=1M"], capture_output=True)
    left = subprocess.run([*inside, "df", "--output=avail", "-B1", "/tmp"], capture_output=True, text=True, check=True)
    step = scene.steps()
    until("a report meanwhile, or none", lambda: scene.steps() > step + REPORT, 30, strict=False)
    subprocess.run([*inside, "rm", "/tmp/full"], check=True)
    return f"{left.stdout.split()[-1]} bytes free on {host.address} until step {scene.steps()} (from {step})"


FAULTS = {
    "worker": Fault("a training worker killed (SIGKILL)", worker_killed),
    "raylet": Fault("a node's raylet killed", raylet_killed),
    "drain": Fault("a node drained as a spot preemption", drained),
    "elastic": Fault("a node lost, another one added (--workers 1:3)", node_lost_and_added, "1:3"),
    "cut20": Fault("the network of a node cut for 20 s", cut(20)),
    "driver": Fault("the driver killed, the job submitted again", driver_killed),
    "s3": Fault("S3 answers 503 for 30 s", s3_down),
    "data": Fault("the processes of data tasks killed", data_tasks_killed),
    "disk": Fault("the disk of a worker full for 30 s", disk_full),
    "cut300": Fault("the network of a node cut for 5 minutes", cut(300)),
}


def play(hosts: Hosts, s3: Any, name: str, fault: Fault, calm: dict[str, Any]) -> str:
    """Run, hit, wait, and look at what came out: a row of the table."""
    scene = Scene(hosts, s3, name, fault.workers)
    scene.after(2 * REPORT)
    told, hit_at, step = fault.hit(scene), time.monotonic(), scene.steps()
    recovered = until("a step after the fault", lambda: scene.steps() > step or scene.ended(), LIMIT_S)
    scene.wait(LIMIT_S)
    took = time.monotonic() - hit_at
    row = verified(scene.rows())
    scores = f"Dice {row['val_dice']:.4f} ({calm['val_dice']:.4f}), loss {row['loss']:.5f} ({calm['loss']:.5f})"
    assert abs(row["val_dice"] - calm["val_dice"]) < DICE_NOISE, f"{name}: {scores}"
    assert abs(row["loss"] / calm["loss"] - 1) < LOSS_NOISE, f"{name}: {scores}"
    return f"| {fault.what} | {told} | {recovered:.0f} s | {took:.0f} s | {scores} |"


def verified(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The last row of a run whose every report is there once."""
    assert [row["step"] for row in rows] == list(range(REPORT, STEPS + 1, REPORT)), [row["step"] for row in rows]
    assert [row["samples"] for row in rows] == [12 * row["step"] for row in rows]
    return rows[-1]


def begin(hosts: Hosts) -> Any:
    """The bucket with the data; boto3's client."""
    import boto3
    from conftest import write_tiny_dataset

    env = hosts.env()
    s3 = boto3.client(
        "s3",
        endpoint_url=env["AWS_ENDPOINT_URL"],
        aws_access_key_id="key",
        aws_secret_access_key="secret",
        region_name="us-east-1",
    )
    until("S3", lambda: bool(s3.create_bucket(Bucket="cells")))
    with tempfile.TemporaryDirectory() as folder:
        write_tiny_dataset(Path(folder), images=24)
        for path in Path(folder).rglob("*.*"):
            s3.upload_file(str(path), "cells", f"data/{path.relative_to(folder)}")
    return s3


def main(names: list[str]) -> int:
    """Play the faults; how many went wrong."""
    if reason := rooms.possible():
        sys.exit(f"no hosts can run here: {reason}")
    bad = 0
    root = Path(tempfile.mkdtemp(prefix="faults"))
    with rooms.running(root, {"head": 1, "one": 1, "two": 1, "three": 1}) as hosts:
        s3, begun = begin(hosts), time.monotonic()
        calm = Scene(hosts, s3, "calm", "2")
        until("the first step", lambda: "\nstep " in (root / "calm.log").read_text(), LIMIT_S)
        first = time.monotonic() - begun
        calm.wait(LIMIT_S)
        row, took = verified(calm.rows()), time.monotonic() - begun
        print(f"undisturbed: first step {first:.0f} s after submit, {took:.0f} s in all, logs in {root}", flush=True)
        for name in names or FAULTS:
            try:
                print(play(hosts, s3, name, FAULTS[name], row), flush=True)
            except (AssertionError, TimeoutError, subprocess.SubprocessError) as error:
                bad += 1
                print(f"| {FAULTS[name].what} | FAILED: {error} |", flush=True)
            for number, (host, cpus) in enumerate([(host, 1) for host in list(hosts.hosts.values())]):
                revive(hosts, host, number, cpus)
    return bad


def revive(hosts: Hosts, host: Host, number: int, cpus: int) -> None:
    """A host whose Ray has gone starts it again."""
    if host.address in hosts.alive() and host.pids("raylet/raylet"):
        return
    name = next(key for key, value in hosts.hosts.items() if value is host)
    host.kill()
    if host.ray:
        os.killpg(host.ray.pid, signal.SIGKILL) if host.ray.poll() is None else None
        host.ray.wait()
    rooms.delete(host.name)
    del hosts.hosts[name]
    new = hosts.start_host(f"{name}x", len(list(hosts.root.iterdir())) + 20, cpus)
    until(f"Ray on {new.address}", lambda: new.address in hosts.alive())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
