"""Run a stage as a job on a Ray cluster: `ray job submit` with checks of the upload, the paths and the connection.

It uses only the job API (HTTP): the submitting machine needs no running Ray and no GPU, and may disconnect.
"""

import asyncio
import json
import os
import re
import shlex
import time
import uuid
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from raylivecell import recipe
from raylivecell.cli import upload
from raylivecell.cli.arguments import value_of, values_of
from raylivecell.core import addresses
from raylivecell.core.console import console
from raylivecell.core.errors import UserError
from raylivecell.runtime import cluster_address

STAGES = ("prepare", "train", "sweep", "evaluate", "predict")

EXCLUDES = (".git", ".venv", "venv", "data", "runs", "demo", "docs", "tests", "__pycache__", ".*_cache", "*.parquet")
"""Patterns, as in .gitignore, of files that are never uploaded, in addition to .gitignore's own."""

MEBIBYTE = 2**20
# Each node of the job downloads the upload from the head; the code itself has under 1 MiB.
MAX_UPLOAD_MIB = 32

JOB_ENV = {"RAY_TRAIN_ENABLE_STATE_TRACKING": "1", "PYTHONUNBUFFERED": "1"}
"""Environment variables of a job: to list its runs at `/api/train/v2/runs/v1`, and to print lines without buffering."""

# A job runs in a copy of the uploaded folder, which is deleted afterwards: these flags need shared paths.
SHARED_FLAGS = (
    *("--data", "--out", "--source", "--checkpoint", "--images", "--predictions", "--labels"),
    *("--start-from", "--teacher"),
)
# Seconds between attempts to reconnect to a log or to submit to a head that is not ready; maximum attempts to submit.
RECONNECT_S, TRIES = 2.0, 15
# Attempts to reach a cluster that does not answer while following a job; a head restarts within minutes.
OUTAGE_TRIES = 300
# Errors that a retry does not change: no such job, no access.
FINAL = tuple(f"status code {code}" for code in (400, 401, 403, 404))
SECRET_WORDS = ("KEY", "SECRET", "TOKEN", "PASSWORD", "CREDENTIAL")


class Request(NamedTuple):
    """A job to submit."""

    stage: str
    arguments: tuple[str, ...]
    name: str
    env: dict[str, str]
    cpus: float
    label: dict[str, str]

    def entrypoint(self) -> str:
        """Command line of the job, run in its folder."""
        return shlex.join(["python", f"jobs/{self.stage}.py", *self.arguments])

    def runtime_env(self) -> dict[str, Any]:
        """Ray's runtime environment, without the working folder."""
        return {"env_vars": JOB_ENV | self.env, "excludes": list(EXCLUDES)}

    def metadata(self) -> dict[str, str]:
        """Metadata shown by the dashboard."""
        return {"stage": self.stage} | {
            flag.strip("-"): value
            for flag in ("--data", "--out")
            if (value := ", ".join(values_of(flag, self.arguments)))
        }

    def command(self, address: str, folder: Path) -> str:
        """Equivalent command line of Ray."""
        words = ["ray", "job", "submit", "--address", address, "--submission-id", self.name]
        words += ["--working-dir", str(folder), "--runtime-env-json", json.dumps(self.runtime_env())]
        words += ["--metadata-json", json.dumps(self.metadata())]
        words += ["--entrypoint-num-cpus", f"{self.cpus:g}"] if self.cpus else []
        words += ["--entrypoint-label-selector", json.dumps(self.label)] if self.label else []
        return shlex.join(words) + " -- " + self.entrypoint()


def request(
    stage: str, arguments: Sequence[str], folder: Path, name: str | None, env: Sequence[str], cpus: float, label: str
) -> Request:
    """Build the request for a stage and its arguments.

    Raises:
        UserError: a path that the cluster cannot read; a secret that the dashboard would show.
    """
    addresses.check_arguments([*arguments, *env])
    _check_paths(arguments, folder)
    # Ray does not escape the name in URLs.
    out = re.sub(r"[^\w.-]", "-", addresses.name(value_of("--out", arguments) or stage), flags=re.ASCII)
    name = name or f"{stage}-{out}-{uuid.uuid4().hex[:6]}"
    return Request(
        stage, tuple(arguments), name, _pairs(env, "--env"), cpus, _pairs([label] if label else [], "--label")
    )


def _check_paths(arguments: Sequence[str], folder: Path) -> None:
    for flag in SHARED_FLAGS:
        for value in values_of(flag, arguments):
            if "://" not in value and not value.startswith("/"):
                raise UserError(
                    f"{flag} {value} is on this machine, not on the cluster; give s3://..., gs://... or an absolute "
                    "path on a disk that all its nodes share"
                )
    name = value_of("--recipe", arguments)
    if not name or "://" in (file := recipe.find(name)) or file.startswith("/"):
        return
    if not (folder / file).is_file():
        raise UserError(f"no recipe at {file} in {folder}, the folder that the job uploads (--working-dir)")


def split(words: Sequence[str], with_value: Collection[str]) -> tuple[list[str], str | None, list[str]]:
    """Split a command line into arguments of `submit`, the stage (None if missing) and arguments of the stage.

    Args:
        words: arguments of the command line.
        with_value: flags of `submit` with a value, which may be the name of a stage: `--name train train ...`.
    """
    is_value = False
    for index, word in enumerate(words):
        if word in STAGES and not is_value:
            return list(words[:index]), word, list(words[index + 1 :])
        is_value = word.replace("_", "-") in with_value
    return list(words), None, []


def _pairs(texts: Sequence[str], flag: str) -> dict[str, str]:
    pairs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise UserError(f"{flag} {text}: give NAME=VALUE")
        if flag == "--env" and any(word in name.upper() for word in SECRET_WORDS):
            raise UserError(f"--env {name}: the dashboard shows a job's environment; set secrets on the nodes")
        pairs[name] = value
    return pairs


def measure(folder: Path, max_upload_mib: float = MAX_UPLOAD_MIB) -> int:
    """Bytes of the files in `folder` to upload.

    Raises:
        UserError: there is no jobs/ folder; more than `max_upload_mib`, with the names of the largest files.
    """
    if not (folder / "jobs").is_dir():
        raise UserError(f"{folder} has no jobs/: run submit in the project's folder, or give it as --working-dir")
    sizes = upload.sizes(folder, EXCLUDES)
    total = sum(sizes.values())
    if total > max_upload_mib * MEBIBYTE:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
        largest_files = ", ".join(f"{name} ({sizes[name] / MEBIBYTE:.1f} MiB)" for name in largest)
        raise UserError(
            f"{folder} would upload {total / MEBIBYTE:.1f} MiB, over {max_upload_mib:g}; list in .gitignore the files "
            f"that the job does not need, or raise --max-upload-mib; the largest files are {largest_files}"
        )
    return total


def connect(address: str | None) -> JobSubmissionClient:
    """Connect to the job API at `address` (default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS or Ray on this machine)."""
    target = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS", "")
    if target.startswith(("http://", "https://")):
        cluster_address.check_listening(target)
    elif target:
        cluster_address.check(target)
    try:
        return JobSubmissionClient(address)
    except Exception as error:  # connection, authentication, versions: the messages are clear
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"no job API at {address or 'the address of RAY_API_SERVER_ADDRESS'}: {reason}; give --address "
            "http://HEAD:8265 (through `kubectl port-forward` or `ssh -L`) and the cluster's token in RAY_AUTH_TOKEN"
        ) from error


def submit(client: JobSubmissionClient, job: Request, folder: Path) -> None:
    """Upload `folder` and submit the job; UserError if the cluster refuses it."""
    for attempts_left in reversed(range(TRIES)):
        try:
            client.submit_job(
                entrypoint=job.entrypoint(),
                submission_id=job.name,
                runtime_env=job.runtime_env() | {"working_dir": str(folder)},
                metadata=job.metadata(),
                entrypoint_num_cpus=job.cpus or None,
                entrypoint_label_selector=job.label or None,
            )
            return
        except OSError as error:
            raise UserError(
                f"lost the connection while the job {job.name} was submitted ({_line(error)}); check with "
                f"`ray job status {job.name}` whether it runs before you submit it again"
            ) from error
        except (RuntimeError, ValueError) as error:
            # A head that has just started has no agent to run the job yet.
            if not (attempts_left and "try again later" in str(error)):
                raise UserError(f"the cluster refused the job {job.name}: {_line(error)}") from error
            time.sleep(RECONNECT_S)


def follow(client: JobSubmissionClient, name: str) -> int:
    """Print the job's output until it ends; return its exit code (1 if its process never started)."""
    return ended(asyncio.run(_print_logs(client, name)))


def ended(info: JobDetails) -> int:
    """Exit code of a job that has ended; print the reason if it failed."""
    if info.status == JobStatus.SUCCEEDED:
        return 0
    reason = " ".join(str(info.message or "").split())[:500]
    console.print(f"job {info.submission_id} {info.status.lower()}: {reason}", markup=False)
    return info.driver_exit_code or 1


class _Log:
    """A job's log, printed once although every new connection starts with the first line."""

    def __init__(self, client: JobSubmissionClient, name: str) -> None:
        self.client, self.name = client, name
        self.printed = 0

    async def print_new(self) -> None:
        """Print new text until the connection ends."""
        received = 0
        async for text in self.client.tail_job_logs(self.name):
            new = text[max(0, self.printed - received) :]
            received += len(text)
            self.printed = max(self.printed, received)
            print(new, end="", flush=True)


async def _print_logs(client: JobSubmissionClient, name: str) -> JobDetails:
    """Print the log until the job has ended, across broken connections and outages; return its final state.

    Raises:
        UserError: the job does not exist, or the cluster did not answer OUTAGE_TRIES times.
    """
    log, failures = _Log(client, name), 0
    while True:
        broken: Exception | None = None
        try:
            await log.print_new()
        except (RuntimeError, OSError, aiohttp.ClientError) as error:
            broken = error
        try:
            info = client.get_job_info(name)
        except (RuntimeError, OSError) as error:
            failures += 1
            _check_outage(error, name, failures)
        else:
            failures = 0
            if info.status.is_terminal():
                return info
            if broken is not None:
                console.print(f"(connection lost, retrying: {_line(broken)[:120]})", markup=False)
        await asyncio.sleep(RECONNECT_S)


def _check_outage(error: Exception, name: str, failures: int) -> None:
    """Print a line at the first of consecutive `failures`; UserError if a retry does not help."""
    line = _line(error)
    if any(code in line for code in FINAL):
        raise UserError(f"cannot follow the job {name}: {line[:200]}") from error
    if failures == OUTAGE_TRIES:
        minutes = OUTAGE_TRIES * RECONNECT_S / 60
        raise UserError(
            f"no answer for {minutes:.0f} minutes about the job {name}, which may still run ({line[:120]}); check "
            f"`ray job status {name}`, and follow it with `ray job logs {name} --follow`"
        ) from error
    if failures == 1:
        console.print(f"(the cluster does not answer, retrying: {line[:120]})", markup=False)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def run(
    job: Request,
    folder: Path,
    address: str | None,
    wait: bool = True,
    stop_on_interrupt: bool = False,
    max_upload_mib: float = MAX_UPLOAD_MIB,
) -> int:
    """Submit a job, follow its log, return its exit code. Ctrl-C stops the job only with `stop_on_interrupt`."""
    size = measure(folder, max_upload_mib)
    client = connect(address)
    console.print(f"{size / MEBIBYTE:.1f} MiB of {folder} to {client.get_address()}; equivalent command:", markup=False)
    print(job.command(client.get_address(), folder), flush=True)
    submit(client, job, folder)
    if not wait:
        return 0
    try:
        return follow(client, job.name)
    except KeyboardInterrupt:
        if stop_on_interrupt:
            client.stop_job(job.name)
            console.print(f"stopped: {job.name}", markup=False)
        else:
            target = f"--address {client.get_address()} {job.name}"
            console.print(f"the job continues; ray job logs {target} --follow, ray job stop {target}", markup=False)
        return 130
