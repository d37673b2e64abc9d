"""Jobs: what travels, what is refused before it does, and a real one on a real cluster."""

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
    assert wanted.entrypoint().startswith("python jobs/train.py --recipe small")
    assert wanted.entrypoint().endswith("--seed 'a b'")


@pytest.mark.parametrize("stage", submit.STAGES)
def test_every_stage_has_its_script_and_command(stage: str) -> None:
    assert (ROOT / "jobs" / f"{stage}.py").is_file()
    assert stage in main.COMMANDS


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("", "no stage among no words; give one of prepare, train"),
        ("demo --data /d", "no stage among demo --data /d"),
        ("train --data shards --out /o", "--data shards lies on this machine"),
        ("train --data /d --out=runs/x", "--out runs/x lies on this machine"),
        ("train --data /d --out /o --recipe smal", "did you mean small?"),
        ("--env AWS_SECRET_ACCESS_KEY=x train --data /d --out /o", "--env AWS_SECRET_ACCESS_KEY: a job's environment"),
        ("--env NCCL_DEBUG train --data /d --out /o", "--env NCCL_DEBUG: give NAME=VALUE"),
        ("--label spot train --data /d --out /o", "--label spot: give NAME=VALUE"),
        ("--max-upload-mib 0.01 train --data /d --out /o", "MiB, over 0.01; name in .gitignore"),
        ("--working-dir {tmp} train --data /d --out /o", "{tmp} has no jobs/"),
        ("--address http://127.0.0.1:9 train --data /d --out /o", "no job API at http://127.0.0.1:9"),
        ("train --data s3://K:S@b/d --out /o", "contains a password or"),
        ("train --data=s3://b/d?secret_key=S --out /o", "contains a password or"),
        ("sweep --data /d --out /o --storage postgresql://me:pw@db/x", "contains a password or"),
        (
            "--env MLFLOW_TRACKING_URI=https://me:pw@host train --data /d --out /o",
            "contains a password or",
        ),
        ("--name train", "no stage among --name train"),
    ],
)
def test_a_mistake_is_told_before_anything_is_sent(
    arguments: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert main.main(["submit", *arguments.format(tmp=tmp_path).split()]) == 2
    assert told.format(tmp=tmp_path) in capsys.readouterr().err


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
def test_the_stage_is_no_flags_value(words: str, own: list[str], stage: str | None, rest: list[str]) -> None:
    assert submit.split(words.split(), {"--name", "--working-dir", "--env"}) == (own, stage, rest)


def test_a_stages_name_may_be_a_flags_value(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[submit.Request] = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(submit, "run", lambda wanted, *_: seen.append(wanted) or 0)
    assert main.main(["submit", "--name", "train", "train", "--data", "/d", "--out", "/o", "--recipe", "small"]) == 0
    assert (seen[0].name, seen[0].stage) == ("train", "train")
    assert seen[0].entrypoint() == "python jobs/train.py --data /d --out /o --recipe small"


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
    assert submit.measure(project) == 4 + len("big/\n")


class Client:
    """Of a job whose log breaks off, on a cluster that does not always answer; each log begins with its first line."""

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
HANDSHAKE = aiohttp.WSServerHandshakeError(None, (), status=503)  # type: ignore[arg-type]  # what a proxy answers


def test_a_log_is_told_once_through_broken_connections_and_outages(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit, "RECONNECT_S", 0)
    logs: list[list[str | Exception]] = [["one\ntw", BROKEN], [DOWN], [HANDSHAKE], ["one\n", BROKEN]]
    logs.append(["one\ntwo\nth", "ree\n"])
    down = [DOWN, RuntimeError("Request failed with status code 503: no upstream.")]
    client: Any = Client(logs, [JobStatus.RUNNING, *down, JobStatus.RUNNING, JobStatus.FAILED])
    assert submit.follow(client, "job") == 3
    told = capsys.readouterr()
    assert told.out == "one\ntwo\nthree\n"
    assert told.err.count("connection lost") == 2
    assert told.err.count("does not answer, trying again: refused") == 1, "once an outage"
    assert "job job failed: worn out" in told.err


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
def test_following_ends_where_no_other_try_helps(answer: Exception, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "RECONNECT_S", 0)
    client: Any = Client([["one\n"]], [answer])
    with pytest.raises(UserError, match=line):
        submit.follow(client, "job")


@pytest.mark.slow
def test_a_real_job(
    ray_cluster: None, tiny_dataset: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """Trained by the code that was sent, in a process that knows no more than its flags; and one that is refused."""
    import ray

    monkeypatch.chdir(ROOT)
    address = f"http://{ray._private.worker.global_worker.node.webui_url}"  # type: ignore[attr-defined]
    out = f"{tmp_path}/runs/first"
    flags = f"train --recipe small --data {tiny_dataset} --out {out} --workers 1 --batch-size 4 --crop 48 48"
    words = f"{flags} --phases.0.steps 2 --loop.report-steps 1".split()
    # A node's `python` is its image's; here it is that of the tests.
    own = ["submit", "--address", address, "--env", f"PATH={Path(sys.executable).parent}:{os.environ['PATH']}"]
    assert main.main([*own, *words]) == 0
    assert (Path(out) / "report.html").is_file()
    told = capfd.readouterr().out
    assert "step 2/2" in told
    assert "ray job submit --address" in told
    assert main.main([*own, *words]) == 2
    assert f"{out} holds a run already" in capfd.readouterr().out
    with pytest.raises(UserError, match="the cluster refused the job same"):
        submit.submit(submit.connect(address), request(name="same"), Path("none"))
