"""Jobs: what travels, what is refused before it does, and a real one on a real cluster."""

import os
import sys
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobDetails, JobStatus, JobType

from raylivecell import cli, submit
from raylivecell.errors import UserError

ROOT = Path(__file__).parents[1]
TRAIN = ("--recipe", "jobs/small.yaml", "--data", "s3://cells/shards", "--out=s3://cells/runs/first")


def request(stage: str = "train", arguments: tuple[str, ...] = TRAIN, **given: Any) -> submit.Request:
    return submit.request(stage, arguments, ROOT, **({"name": None, "env": (), "cpus": 0, "label": ""} | given))


def test_the_printed_command_is_the_request() -> None:
    wanted = request(env=("NCCL_DEBUG=INFO",), cpus=0.5, label="pool=data", arguments=(*TRAIN, "--seed", "a b"))
    assert wanted.name.startswith("train-first-")
    assert wanted.metadata() == {"stage": "train", "data": "s3://cells/shards", "out": "s3://cells/runs/first"}
    command = wanted.command("http://head:8265", ROOT)
    assert command.startswith(f"ray job submit --address http://head:8265 --submission-id {wanted.name}")
    for part in ("RAY_TRAIN_ENABLE_STATE_TRACKING", "NCCL_DEBUG", "--entrypoint-num-cpus 0.5", '"pool": "data"'):
        assert part in command
    assert command.endswith(" -- " + wanted.entrypoint())
    assert wanted.entrypoint().startswith("python jobs/train.py --recipe jobs/small.yaml")
    assert wanted.entrypoint().endswith("--seed 'a b'")


@pytest.mark.parametrize("stage", submit.STAGES)
def test_every_stage_has_its_script_and_command(stage: str) -> None:
    assert (ROOT / "jobs" / f"{stage}.py").is_file()
    assert stage in cli.COMMANDS


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("", "no stage among no words; give one of prepare, train"),
        ("demo --data /d", "no stage among demo --data /d"),
        ("train --data shards --out /o", "--data shards lies on this machine"),
        ("train --data /d --out=runs/x", "--out runs/x lies on this machine"),
        ("train --data /d --out /o --recipe jobs/smal.yaml", "no recipe at jobs/smal.yaml"),
        ("--env AWS_SECRET_ACCESS_KEY=x train --data /d --out /o", "--env AWS_SECRET_ACCESS_KEY: a job's environment"),
        ("--env NCCL_DEBUG train --data /d --out /o", "--env NCCL_DEBUG: give NAME=VALUE"),
        ("--label spot train --data /d --out /o", "--label spot: give NAME=VALUE"),
        ("--largest-mib 0.01 train --data /d --out /o", "MiB, over 0.01; name in .gitignore"),
        ("--working-dir {tmp} train --data /d --out /o", "{tmp} has no jobs/"),
        ("--address http://127.0.0.1:9 train --data /d --out /o", "no job API at http://127.0.0.1:9"),
    ],
)
def test_a_mistake_is_told_before_anything_is_sent(
    arguments: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert cli.main(["submit", *arguments.format(tmp=tmp_path).split()]) == 2
    assert told.format(tmp=tmp_path) in capsys.readouterr().err


def test_code_and_recipes_travel_and_nothing_else(tmp_path: Path) -> None:
    project = tmp_path / "project"
    for name in ("jobs/train.py", "jobs/my.yaml", "raylivecell/cli.py", "pyproject.toml"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("x")
    left = ("data/a.tif", "runs/r/w.bin", ".git/config", ".venv/bin/python", "big/x.bin", "jobs/__pycache__/a.pyc")
    for name in (*left, "a.parquet", ".mypy_cache/x"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_bytes(os.urandom(100_000))
    (project / ".gitignore").write_text("big/\n")
    size = submit.pack(project, tmp_path / "job.zip")
    with zipfile.ZipFile(tmp_path / "job.zip") as package:
        names = {name for name in package.namelist() if not name.endswith("/")}
    assert names == {"jobs/train.py", "jobs/my.yaml", "raylivecell/cli.py", "pyproject.toml", ".gitignore"}
    assert size == (tmp_path / "job.zip").stat().st_size < 10_000


class Client:
    """Of a job whose log breaks off twice: each connection begins with its first line."""

    def __init__(self, *connections: list[str | Exception]) -> None:
        self.connections = list(connections)

    async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
        for text in self.connections.pop(0):
            if isinstance(text, Exception):
                raise text
            yield text

    def get_job_status(self, name: str) -> JobStatus:
        return JobStatus.RUNNING if self.connections else JobStatus.FAILED

    def get_job_info(self, name: str) -> JobDetails:
        return JobDetails(
            type=JobType.SUBMISSION,
            entrypoint="",
            submission_id=name,
            status=JobStatus.FAILED,
            message="worn out",
            driver_exit_code=3,
        )


def test_a_log_is_told_once_through_broken_connections(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit, "RECONNECT_S", 0)
    broken = RuntimeError("closed")
    client: Any = Client(["one\ntw", broken], ["one\n", broken], ["one\ntwo\nth", "ree\n"])
    assert submit.follow(client, "job") == 3
    told = capsys.readouterr()
    assert told.out == "one\ntwo\nthree\n"
    assert told.err.count("connection lost") == 2
    assert "job job failed: worn out" in told.err


@pytest.mark.slow
def test_a_real_job(
    ray_cluster: None, tiny_dataset: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """Trained by the code that was sent, in a process that knows no more than its flags; and one that is refused."""
    import ray

    monkeypatch.chdir(ROOT)
    address = f"http://{ray._private.worker.global_worker.node.webui_url}"  # type: ignore[attr-defined]
    out = f"{tmp_path}/runs/first"
    flags = f"train --recipe jobs/small.yaml --data {tiny_dataset} --out {out} --workers 1 --batch-size 4 --crop 48 48"
    words = f"{flags} --phases.0.steps 2 --loop.report-steps 1".split()
    # A node's `python` is its image's; here it is that of the tests.
    own = ["submit", "--address", address, "--env", f"PATH={Path(sys.executable).parent}:{os.environ['PATH']}"]
    assert cli.main([*own, *words]) == 0
    assert (Path(out) / "report.html").is_file()
    told = capfd.readouterr().out
    assert "step 2/2" in told
    assert "ray job submit --address" in told
    assert cli.main([*own, *words]) == 2
    assert f"{out} holds a run already" in capfd.readouterr().out
    with pytest.raises(UserError, match="the cluster refused the job same"):
        submit.submit(submit.connect(address), request(name="same"), Path("none.zip"))
