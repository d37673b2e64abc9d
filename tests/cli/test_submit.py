"""Jobs: the uploaded files, mistakes that are refused before the upload, and a job on a real cluster."""

import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from ray.job_submission import JobDetails, JobStatus, JobType

from raylivecell.cli import main, submit
from raylivecell.core.errors import UserError

ROOT = Path(__file__).parents[2]
TRAIN = ("--recipe", "small", "--data", "s3://cells/shards", "--out=s3://cells/runs/first")


def request(stage: str = "train", arguments: tuple[str, ...] = TRAIN, **options: Any) -> submit.Request:
    return submit.request(stage, arguments, ROOT, **({"name": None, "env": (), "cpus": 0, "label": ""} | options))


def test_the_printed_command_is_the_request() -> None:
    job = request(env=("NCCL_DEBUG=INFO",), cpus=0.5, label="pool=data", arguments=(*TRAIN, "--seed", "a b"))
    assert job.name.startswith("train-first-")
    assert job.metadata() == {"stage": "train", "data": "s3://cells/shards", "out": "s3://cells/runs/first"}
    command = job.command("http://head:8265", ROOT)
    assert command.startswith(f"ray job submit --address http://head:8265 --submission-id {job.name}")
    for part in ("RAY_TRAIN_ENABLE_STATE_TRACKING", "NCCL_DEBUG", "--entrypoint-num-cpus 0.5", '"pool": "data"'):
        assert part in command
    assert command.endswith(" -- " + job.entrypoint())
    assert job.entrypoint().startswith("python jobs/train.py --recipe small")
    assert job.entrypoint().endswith("--seed 'a b'")


@pytest.mark.parametrize("stage", submit.STAGES)
def test_every_stage_has_its_script_and_command(stage: str) -> None:
    assert (ROOT / "jobs" / f"{stage}.py").is_file()
    assert stage in main.COMMANDS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "no stage in an empty command; give one of prepare, train"),
        ("demo --data /d", "no stage in demo --data /d"),
        ("train --data shards --out /o", "--data shards is on this machine"),
        ("train --data /d --out=runs/x", "--out runs/x is on this machine"),
        ("train --data s3://b/d --data shards --out /o", "--data shards is on this machine"),
        ("train --data /d shards --out /o", "--data shards is on this machine"),
        ("train --data /d --out /o --start-from runs/p", "--start-from runs/p is on this machine"),
        ("train --data /d --out /o --start_from runs/p", "--start-from runs/p is on this machine"),
        ("train --data /d --out /o --recipe smal", "did you mean small?"),
        (
            "--env AWS_SECRET_ACCESS_KEY=x train --data /d --out /o",
            "the dashboard shows a job's environment",
        ),
        ("--env NCCL_DEBUG train --data /d --out /o", "--env NCCL_DEBUG: give NAME=VALUE"),
        ("--label spot train --data /d --out /o", "--label spot: give NAME=VALUE"),
        ("--max-upload-mib 0.01 train --data /d --out /o", "MiB, over 0.01; list in .gitignore"),
        ("--working-dir {tmp} train --data /d --out /o", "{tmp} has no jobs/"),
        ("--address http://127.0.0.1:9 train --data /d --out /o", "no job API at http://127.0.0.1:9"),
        ("train --data s3://K:S@b/d --out /o", "contains a password or"),
        ("train --data=s3://b/d?secret_key=S --out /o", "contains a password or"),
        ("sweep --data /d --out /o --storage postgresql://me:pw@db/x", "contains a password or"),
        (
            "--env MLFLOW_TRACKING_URI=https://me:pw@host train --data /d --out /o",
            "contains a password or",
        ),
        ("--name train", "no stage in --name train"),
    ],
)
def test_a_mistake_is_reported_before_the_upload(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert main.main(["submit", *arguments.format(tmp=tmp_path).split()]) == 2
    assert message.format(tmp=tmp_path) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "own", "stage", "rest"),
    [
        ("train --data /d", [], "train", ["--data", "/d"]),
        ("--name train train --data predict", ["--name", "train"], "train", ["--data", "predict"]),
        ("--name=train --no-wait sweep", ["--name=train", "--no-wait"], "sweep", []),
        ("--no-wait train", ["--no-wait"], "train", []),
        ("--working_dir predict predict", ["--working_dir", "predict"], "predict", []),
        ("--env A=1 B=2 train", ["--env", "A=1", "B=2"], "train", []),
        ("--name train", ["--name", "train"], None, []),
    ],
)
def test_a_flags_value_is_not_taken_for_the_stage(
    words: str, own: list[str], stage: str | None, rest: list[str]
) -> None:
    assert submit.split(words.split(), {"--name", "--working-dir", "--env"}) == (own, stage, rest)


def test_a_flags_value_may_be_the_name_of_a_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[submit.Request] = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(submit, "run", lambda job, *_: requests.append(job) or 0)
    assert main.main(["submit", "--name", "train", "train", "--data", "/d", "--out", "/o", "--recipe", "small"]) == 0
    assert (requests[0].name, requests[0].stage) == ("train", "train")
    assert requests[0].entrypoint() == "python jobs/train.py --data /d --out /o --recipe small"


def test_only_code_and_recipes_are_uploaded(tmp_path: Path) -> None:
    project = tmp_path / "project"
    for name in ("jobs/train.py", "jobs/my.yaml", "raylivecell/cli.py", "pyproject.toml"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("x")
    ignored = ("data/a.tif", "runs/r/w.bin", ".git/config", ".venv/bin/python", "big/x.bin", "jobs/__pycache__/a.pyc")
    for name in (*ignored, "a.parquet", ".mypy_cache/x"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_bytes(os.urandom(100_000))
    (project / ".gitignore").write_text("big/\n")
    assert submit.measure(project) == 4 + len("big/\n")


class Client:
    """Job client of an unreliable cluster whose log connection breaks; each new log starts with the first line."""

    def __init__(self, logs: list[list[str | Exception]], answers: list[JobStatus | Exception]) -> None:
        self.logs, self.answers = logs, answers

    async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
        for text in self.logs.pop(0) if self.logs else []:
            if isinstance(text, Exception):
                raise text
            yield text

    def get_job_info(self, name: str) -> JobDetails:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        code = 3 if answer == JobStatus.FAILED else 0
        details = {"submission_id": name, "status": answer, "message": "worn out", "driver_exit_code": code}
        return JobDetails(type=JobType.SUBMISSION, entrypoint="", **details)


BROKEN, DOWN = RuntimeError("closed"), ConnectionError("refused")
HANDSHAKE = aiohttp.WSServerHandshakeError(None, (), status=503)  # type: ignore[arg-type]  # a proxy's answer


def test_a_log_is_printed_once_across_broken_connections_and_outages(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit, "RECONNECT_S", 0)
    logs: list[list[str | Exception]] = [["one\ntw", BROKEN], [DOWN], [HANDSHAKE], ["one\n", BROKEN]]
    logs.append(["one\ntwo\nth", "ree\n"])
    down = [DOWN, RuntimeError("Request failed with status code 503: no upstream.")]
    client: Any = Client(logs, [JobStatus.RUNNING, *down, JobStatus.RUNNING, JobStatus.FAILED])
    assert submit.follow(client, "job") == 3
    captured = capsys.readouterr()
    assert captured.out == "one\ntwo\nthree\n"
    assert captured.err.count("connection lost") == 2
    assert captured.err.count("does not answer, retrying: refused") == 1, "one line per outage"
    assert "job job failed: worn out" in captured.err


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (DOWN, "no answer for 0 minutes about the job job, which may still run"),
        (
            RuntimeError("Request failed with status code 404: Job job does not exist."),
            "cannot follow the job job: Req",
        ),
        (RuntimeError("Request failed with status code 401: token"), "cannot follow the job job: Request failed"),
    ],
)
def test_following_ends_if_a_retry_does_not_help(answer: Exception, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "RECONNECT_S", 0)
    client: Any = Client([["one\n"]], [answer])
    with pytest.raises(UserError, match=line):
        submit.follow(client, "job")


@pytest.mark.slow
def test_a_real_job(
    ray_cluster: None, tiny_dataset: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """It trains with only the uploaded code and the flags; a second job with the same --out is refused."""
    import ray

    monkeypatch.chdir(ROOT)
    address = f"http://{ray._private.worker.global_worker.node.webui_url}"  # type: ignore[attr-defined]
    out = f"{tmp_path}/runs/first"
    flags = f"train --recipe small --data {tiny_dataset} --out {out} --workers 1 --batch-size 4 --crop 48 48"
    words = f"{flags} --phases.0.steps 2 --loop.report-steps 1".split()
    # On a cluster, `python` is the image's; here it must be the interpreter of the tests.
    own = ["submit", "--address", address, "--env", f"PATH={Path(sys.executable).parent}:{os.environ['PATH']}"]
    assert main.main([*own, *words]) == 0
    assert (Path(out) / "report.html").is_file()
    output = capfd.readouterr().out
    assert "step 2/2" in output
    assert "ray job submit --address" in output
    assert main.main([*own, *words]) == 2
    assert f"{out} already contains a run" in capfd.readouterr().out
    with pytest.raises(UserError, match="the cluster refused the job same"):
        submit.submit(submit.connect(address), request(name="same"), Path("none"))
