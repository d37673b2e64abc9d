"""A stage of the work as a job of a Ray cluster: `ray job submit`, with care for what it uploads, asks and answers.

Only the job API (HTTP) is spoken: the machine that submits needs no Ray running and no GPU, and may go away meanwhile.
"""

import asyncio
import json
import logging
import re
import shlex
import tempfile
import time
import uuid
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ray._private.runtime_env.packaging import create_package
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from raylivecell import addresses
from raylivecell.arguments import value_of
from raylivecell.errors import UserError
from raylivecell.progress import console

STAGES = ("prepare", "train", "sweep", "evaluate", "predict")

EXCLUDES = (".git", ".venv", "venv", "data", "runs", "demo", "docs", "tests", "__pycache__", ".*_cache", "*.parquet")
"""What never travels with a job, beside what .gitignore names: patterns as in .gitignore."""

MEBIBYTE = 2**20
# Every node that runs a part of the job fetches the package from the head; the code itself is under 1 MiB.
LARGEST_MIB = 32

JOB_ENV = {"RAY_TRAIN_ENABLE_STATE_TRACKING": "1", "PYTHONUNBUFFERED": "1"}
"""What a job's processes find in their environment: runs told to `/api/train/v2/runs/v1`, lines as they come."""

# A job's own folder is a copy on the node it runs on, deleted afterwards.
SHARED_FLAGS = ("--data", "--out", "--source", "--checkpoint", "--images", "--predictions", "--model")
# Seconds between two tries to read on in a log, or to hand a job to a head that is not ready; and how many of these.
RECONNECT_S, TRIES = 2.0, 15
SECRET_WORDS = ("KEY", "SECRET", "TOKEN", "PASSWORD", "CREDENTIAL")


class Request(NamedTuple):
    """What is asked of the cluster."""

    stage: str
    arguments: tuple[str, ...]
    name: str
    env: dict[str, str]
    cpus: float
    label: dict[str, str]

    def entrypoint(self) -> str:
        """The command, run in the job's folder."""
        return shlex.join(["python", f"jobs/{self.stage}.py", *self.arguments])

    def runtime_env(self) -> dict[str, Any]:
        """Without the folder."""
        return {"env_vars": JOB_ENV | self.env}

    def metadata(self) -> dict[str, str]:
        """What the dashboard shows of the job."""
        return {"stage": self.stage} | {
            flag.strip("-"): value for flag in ("--data", "--out") if (value := value_of(flag, self.arguments))
        }

    def command(self, address: str, folder: Path) -> str:
        """The same with Ray's own command line."""
        runtime_env = self.runtime_env() | {"excludes": list(EXCLUDES)}
        words = ["ray", "job", "submit", "--address", address, "--submission-id", self.name]
        words += ["--working-dir", str(folder), "--runtime-env-json", json.dumps(runtime_env)]
        words += ["--metadata-json", json.dumps(self.metadata())]
        words += ["--entrypoint-num-cpus", f"{self.cpus:g}"] if self.cpus else []
        words += ["--entrypoint-label-selector", json.dumps(self.label)] if self.label else []
        return shlex.join(words) + " -- " + self.entrypoint()


def request(
    stage: str, arguments: Sequence[str], folder: Path, name: str | None, env: Sequence[str], cpus: float, label: str
) -> Request:
    """The request that the words of a command line mean.

    Raises:
        UserError: a path that the cluster would not find; a secret that the dashboard would show.
    """
    addresses.check_arguments([*arguments, *env])
    _check_paths(arguments, folder)
    # Ray puts the name into addresses as it is.
    out = re.sub(r"[^\w.-]", "-", addresses.name(value_of("--out", arguments) or stage), flags=re.ASCII)
    name = name or f"{stage}-{out}-{uuid.uuid4().hex[:6]}"
    return Request(
        stage, tuple(arguments), name, _pairs(env, "--env"), cpus, _pairs([label] if label else [], "--label")
    )


def _check_paths(arguments: Sequence[str], folder: Path) -> None:
    for flag in SHARED_FLAGS:
        value = value_of(flag, arguments)
        if value and "://" not in value and not value.startswith("/"):
            raise UserError(
                f"{flag} {value} lies on this machine, not on the cluster; give s3://..., gs://... or an absolute path "
                "on a disk that all its nodes share"
            )
    recipe = value_of("--recipe", arguments)
    if recipe and "://" not in recipe and not recipe.startswith("/") and not (folder / recipe).is_file():
        raise UserError(f"no recipe at {recipe} in {folder}, which is what the job takes along (--working-dir)")


def _pairs(given: Sequence[str], flag: str) -> dict[str, str]:
    pairs = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not (name and equals):
            raise UserError(f"{flag} {one}: give NAME=VALUE")
        if flag == "--env" and any(word in name.upper() for word in SECRET_WORDS):
            raise UserError(f"--env {name}: a job's environment is shown in the dashboard; give secrets to the nodes")
        pairs[name] = value
    return pairs


def pack(folder: Path, target: Path, largest_mib: float = LARGEST_MIB) -> int:
    """Pack what the job takes along of `folder` into the zip file `target`; its bytes.

    Raises:
        UserError: no stages there; more than `largest_mib`, naming the largest files.
    """
    if not (folder / "jobs").is_dir():
        raise UserError(f"{folder} has no jobs/: run submit in the project's folder, or name it with --working-dir")
    quiet = logging.getLogger(__name__)  # Ray's own tells each .gitignore
    create_package(str(folder), target, include_gitignore=True, excludes=list(EXCLUDES), logger=quiet)
    size = target.stat().st_size
    if size > largest_mib * MEBIBYTE:
        with zipfile.ZipFile(target) as package:
            files = sorted(package.infolist(), key=lambda file: -file.compress_size)[:3]
        told = ", ".join(f"{file.filename} ({file.compress_size / MEBIBYTE:.1f} MiB)" for file in files)
        raise UserError(
            f"{folder} would upload {size / MEBIBYTE:.1f} MiB, over {largest_mib:g}; name in .gitignore what the job "
            f"does not need, or raise --largest-mib; the largest are {told}"
        )
    return size


def connect(address: str | None) -> JobSubmissionClient:
    """The job API at `address` (default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, else a Ray on this machine)."""
    try:
        return JobSubmissionClient(address)
    except Exception as error:  # ConnectionError, of authentication, of versions: all say what is wrong
        told = " ".join(str(error).split())[:300]
        raise UserError(
            f"no job API at {address or 'the address of RAY_API_SERVER_ADDRESS'}: {told}; give --address "
            "http://HEAD:8265 (through `kubectl port-forward` or `ssh -L`) and the cluster's token in RAY_AUTH_TOKEN"
        ) from error


def submit(client: JobSubmissionClient, wanted: Request, package: Path) -> None:
    """Hand over the job; UserError where the cluster refuses it."""
    for left in reversed(range(TRIES)):
        try:
            client.submit_job(
                entrypoint=wanted.entrypoint(),
                submission_id=wanted.name,
                runtime_env=wanted.runtime_env() | {"working_dir": str(package)},
                metadata=wanted.metadata(),
                entrypoint_num_cpus=wanted.cpus or None,
                entrypoint_label_selector=wanted.label or None,
            )
            return
        except (RuntimeError, ValueError) as error:
            told = " ".join(str(error).split())[:300]
            # A head that has just started has no agent yet that would run the job.
            if not (left and "try again later" in told):
                raise UserError(f"the cluster refused the job {wanted.name}: {told}") from error
            time.sleep(RECONNECT_S)


def follow(client: JobSubmissionClient, name: str) -> int:
    """Print what the job prints until it ends; its exit code (1 where it never got so far as to have one)."""
    asyncio.run(_print_logs(client, name))
    info = client.get_job_info(name)
    return ended(info)


def ended(info: JobDetails) -> int:
    """The exit code of a job that has ended, which is told where it has failed."""
    if info.status == JobStatus.SUCCEEDED:
        return 0
    reason = " ".join(str(info.message or "").split())[:500]
    console.print(f"job {info.submission_id} {info.status.lower()}: {reason}", markup=False)
    return info.driver_exit_code or 1


async def _print_logs(client: JobSubmissionClient, name: str) -> None:
    """Through broken connections, each line once: a new connection begins with the job's first line."""
    printed = 0
    while True:
        seen = 0
        try:
            async for text in client.tail_job_logs(name):
                fresh = text[max(0, printed - seen) :]
                seen += len(text)
                printed = max(printed, seen)
                print(fresh, end="", flush=True)
        except (RuntimeError, OSError) as error:
            console.print(f"(connection lost, trying again: {' '.join(str(error).split())[:120]})", markup=False)
        if client.get_job_status(name).is_terminal():
            return
        await asyncio.sleep(RECONNECT_S)


def run(
    wanted: Request,
    folder: Path,
    address: str | None,
    wait: bool = True,
    stop_on_interrupt: bool = False,
    largest_mib: float = LARGEST_MIB,
) -> int:
    """Submit and follow; the job's exit code. Ctrl-C leaves the job running, unless `stop_on_interrupt`."""
    with tempfile.TemporaryDirectory() as scratch:
        package = Path(scratch) / "job.zip"
        size = pack(folder, package, largest_mib)
        client = connect(address)
        console.print(
            f"{size / MEBIBYTE:.1f} MiB of {folder} to {client.get_address()}; the same by hand:", markup=False
        )
        print(wanted.command(client.get_address(), folder), flush=True)
        submit(client, wanted, package)
    if not wait:
        return 0
    try:
        return follow(client, wanted.name)
    except KeyboardInterrupt:
        if stop_on_interrupt:
            client.stop_job(wanted.name)
            console.print(f"stopped: {wanted.name}", markup=False)
        else:
            told = f"--address {client.get_address()} {wanted.name}"
            console.print(f"the job goes on; ray job logs {told} --follow, ray job stop {told}", markup=False)
        return 130
