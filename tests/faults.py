"""Inject faults on several hosts (hosts.py): `python tests/faults.py [NAME ...]`, as root, on Linux; minutes each.

Each fault affects a run of two workers that reads its data from S3 and writes to it. The run must end with every step
reported once, and a validation Dice within noise of the undisturbed run's. Prints a table row per fault.
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

import hosts as network
from hosts import Host, Hosts, wait_until

STEPS, REPORT = 400, 40
# Maximum delay by a fault, in seconds; a hang of Ray would cost half an hour.
LIMIT_S = 420.0
DICE_NOISE, LOSS_NOISE = 0.02, 0.05
ROOT = Path(__file__).parents[1]
FLAGS = f"""--recipe small --data s3://cells/data --batch-size 12 --crop 48 48
--phases.0.steps {STEPS} --loop.report-steps {REPORT} --loop.precision float32""".split()


class Fault(NamedTuple):
    """A fault; `inject` disturbs a run after its first reports and returns a description of its action."""

    description: str
    inject: Callable[["Run"], str]
    workers: str = "2"


class Run:
    """A training run on the hosts."""

    def __init__(self, hosts: Hosts, s3: Any, name: str, workers: str) -> None:
        self.hosts, self.s3, self.name, self.workers = hosts, s3, name, workers
        self.job = self.submit()

    def submit(self) -> subprocess.Popen[bytes]:
        """Run `raylivecell submit train` from outside the hosts; a started run resumes."""
        words = ["raylivecell", "submit", "--address", self.hosts.address(), "train", *FLAGS, "--workers", self.workers]
        words += ["--out", f"s3://cells/runs/{self.name}", "--resume", "auto"]
        with open(self.hosts.root / f"{self.name}.log", "ab") as log:
            return subprocess.Popen(words, cwd=ROOT, env=self.hosts.env(), stdout=log, stderr=log)

    def rows(self) -> list[dict[str, Any]]:
        """Rows that the run has reported."""
        try:
            text = self.s3.get_object(Bucket="cells", Key=f"runs/{self.name}/metrics.jsonl")["Body"].read()
        except self.s3.exceptions.NoSuchKey:
            return []
        return [json.loads(line) for line in text.splitlines()]

    def steps(self) -> int:
        rows = self.rows()
        return int(rows[-1]["step"]) if rows else 0

    def wait_for_step(self, step: int, limit_s: float = LIMIT_S) -> float:
        """Wait until the run has reported `step`."""
        return wait_until(f"step {step} of {self.name}", lambda: self.steps() >= step or self.ended(), limit_s)

    def ended(self) -> bool:
        if self.job.poll() not in (None, 0):
            raise AssertionError(f"the job ended with {self.job.returncode}: see {self.name}.log")
        return self.job.poll() == 0

    def victim(self) -> Host:
        """A host other than the head with a training process."""
        workers = [host for name, host in self.hosts.hosts.items() if name != "head" and host.pids("RayTrainWorker")]
        assert workers, "no training process outside the head"
        return workers[-1]

    def wait(self, limit_s: float) -> float:
        """Wait for the end of the job; return the seconds."""
        begin = time.monotonic()
        assert self.job.wait(limit_s) == 0, f"the job ended with {self.job.returncode}: see {self.name}.log"
        return time.monotonic() - begin


def kill_worker(run: Run) -> str:
    host = run.victim()
    return f"{host.kill('RayTrainWorker')} process on {host.address}"


def kill_raylet(run: Run) -> str:
    host = run.victim()
    host.kill("raylet/raylet")
    return f"raylet of {host.address}"


def replace_node(run: Run) -> str:
    host = run.victim()
    host.kill()
    new = run.hosts.start_host(f"n{len(run.hosts.hosts)}", len(run.hosts.hosts), 1)
    return f"{host.address} lost, {new.address} added"


def drain_node(run: Run) -> str:
    host = run.victim()
    node = run.hosts.alive()[host.address]
    words = f"ray drain-node --address {network.NET}.10:{network.HEAD_PORT} --node-id {node}".split()
    words += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    words += ["--deadline-remaining-seconds", "15"]
    head = run.hosts.hosts["head"].name
    subprocess.run(["ip", "netns", "exec", head, *words], env=run.hosts.env(), check=True, capture_output=True)
    before = run.steps()
    threading.Event().wait(17)
    host.kill()
    return f"{host.address} draining at step {before}, lost 17 s later at step {run.steps()}"


def cut_network(seconds: float) -> Callable[[Run], str]:
    def inject(run: Run) -> str:
        host = run.victim()
        host.set_cable(False)
        threading.Event().wait(seconds)
        host.set_cable(True)
        return f"{host.address} without network for {seconds:g} s"

    return inject


def kill_driver(run: Run) -> str:
    killed = sum(host.kill("jobs/train.py") for host in run.hosts.hosts.values())
    code = run.job.wait(120)
    assert code != 0
    run.job = run.submit()
    return f"{killed} processes of the driver; submitted again"


def stop_s3(run: Run) -> str:
    flag = run.hosts.root / "s3-is-down"
    flag.touch()
    threading.Event().wait(30)
    flag.unlink()
    return "503 for 30 s"


def kill_data_tasks(run: Run) -> str:
    killed = 0

    def kill() -> bool:  # processes have this title only while they run a task
        nonlocal killed
        killed += sum(host.kill("ray::ReadSamples") for host in run.hosts.hosts.values())
        return killed >= 2

    wait_until("data tasks running", kill, 60)
    return f"{killed} processes, as by the out-of-memory killer"


def fill_disk(run: Run) -> str:
    """Fill the disk on which the checkpoint is written before its upload to S3."""
    host = run.victim()
    on_host = ["nsenter", "-m", "-t", str(host.pids("raylet/raylet")[0])]
    subprocess.run([*on_host, "dd", "if=/dev/zero", "of=/tmp/full", "bs=1M"], capture_output=True)
    free = subprocess.run([*on_host, "df", "--output=avail", "-B1", "/tmp"], capture_output=True, text=True, check=True)
    step = run.steps()
    wait_until("a report while the disk is full", lambda: run.steps() > step + REPORT, 30, strict=False)
    subprocess.run([*on_host, "rm", "/tmp/full"], check=True)
    return f"{free.stdout.split()[-1]} bytes free on {host.address} until step {run.steps()} (from {step})"


FAULTS = {
    "worker": Fault("a training worker killed (SIGKILL)", kill_worker),
    "raylet": Fault("a node's raylet killed", kill_raylet),
    "drain": Fault("a node drained as a spot preemption", drain_node),
    "elastic": Fault("a node lost, another one added (--workers 1:3)", replace_node, "1:3"),
    "cut20": Fault("the network of a node cut for 20 s", cut_network(20)),
    "driver": Fault("the driver killed, the job submitted again", kill_driver),
    "s3": Fault("S3 answers 503 for 30 s", stop_s3),
    "data": Fault("the processes of data tasks killed", kill_data_tasks),
    "disk": Fault("the disk of a worker full for 30 s", fill_disk),
    "cut300": Fault("the network of a node cut for 5 minutes", cut_network(300)),
}


def run_with_fault(hosts: Hosts, s3: Any, name: str, fault: Fault, expected: dict[str, Any]) -> str:
    """Run with a fault and compare the last row with the undisturbed run's; return a row of the table."""
    run = Run(hosts, s3, name, fault.workers)
    run.wait_for_step(2 * REPORT)
    action, begin, step = fault.inject(run), time.monotonic(), run.steps()
    recovered = wait_until("a step after the fault", lambda: run.steps() > step or run.ended(), LIMIT_S)
    run.wait(LIMIT_S)
    total = time.monotonic() - begin
    row = check_reports(run.rows())
    scores = f"Dice {row['val_dice']:.4f} ({expected['val_dice']:.4f}), loss {row['loss']:.5f} ({expected['loss']:.5f})"
    assert abs(row["val_dice"] - expected["val_dice"]) < DICE_NOISE, f"{name}: {scores}"
    assert abs(row["loss"] / expected["loss"] - 1) < LOSS_NOISE, f"{name}: {scores}"
    return f"| {fault.description} | {action} | {recovered:.0f} s | {total:.0f} s | {scores} |"


def check_reports(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Check that every report occurs once; return the last row."""
    assert [row["step"] for row in rows] == list(range(REPORT, STEPS + 1, REPORT)), [row["step"] for row in rows]
    assert [row["samples"] for row in rows] == [12 * row["step"] for row in rows]
    return rows[-1]


def upload_dataset(hosts: Hosts) -> Any:
    """Create the bucket and upload the dataset; return the boto3 client."""
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
    wait_until("S3", lambda: bool(s3.create_bucket(Bucket="cells")))
    with tempfile.TemporaryDirectory() as folder:
        write_tiny_dataset(Path(folder), images=24)
        for path in Path(folder).rglob("*.*"):
            s3.upload_file(str(path), "cells", f"data/{path.relative_to(folder)}")
    return s3


def main(names: list[str]) -> int:
    """Inject the faults one after another; return the number of failures."""
    if reason := network.unsupported_reason():
        sys.exit(f"cannot simulate hosts: {reason}")
    failures = 0
    root = Path(tempfile.mkdtemp(prefix="faults"))
    with network.running_hosts(root, {"head": 1, "one": 1, "two": 1, "three": 1}) as hosts:
        s3, begin = upload_dataset(hosts), time.monotonic()
        undisturbed = Run(hosts, s3, "undisturbed", "2")
        wait_until("the first step", lambda: "\nstep " in (root / "undisturbed.log").read_text(), LIMIT_S)
        first = time.monotonic() - begin
        undisturbed.wait(LIMIT_S)
        row, total = check_reports(undisturbed.rows()), time.monotonic() - begin
        print(f"undisturbed: first step {first:.0f} s after submit, {total:.0f} s in all, logs in {root}", flush=True)
        for name in names or FAULTS:
            try:
                print(run_with_fault(hosts, s3, name, FAULTS[name], row), flush=True)
            except (AssertionError, TimeoutError, subprocess.SubprocessError) as error:
                failures += 1
                print(f"| {FAULTS[name].description} | FAILED: {error} |", flush=True)
            for number, (host, cpus) in enumerate([(host, 1) for host in list(hosts.hosts.values())]):
                revive(hosts, host, number, cpus)
    return failures


def revive(hosts: Hosts, host: Host, number: int, cpus: int) -> None:
    """Replace a host whose Ray has died with a new host."""
    if host.address in hosts.alive() and host.pids("raylet/raylet"):
        return
    name = next(key for key, value in hosts.hosts.items() if value is host)
    host.kill()
    if host.ray:
        os.killpg(host.ray.pid, signal.SIGKILL) if host.ray.poll() is None else None
        host.ray.wait()
    network.delete(host.name)
    del hosts.hosts[name]
    new = hosts.start_host(f"{name}x", len(list(hosts.root.iterdir())) + 20, cpus)
    wait_until(f"Ray on {new.address}", lambda: new.address in hosts.alive())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
