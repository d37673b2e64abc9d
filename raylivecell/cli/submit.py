"""A stage of the work as a job of a Ray cluster: `ray job submit`, with care for what it uploads, asks and answers.

Only the job API (HTTP) is spoken: the machine that submits needs no Ray running and no GPU, and may go away meanwhile.
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
from raylivecell.cli.arguments import value_of
from raylivecell.core import addresses
from raylivecell.core.console import console
from raylivecell.core.errors import UserError
from raylivecell.runtime import cluster_address

STAGES = ("prepare", "train", "sweep", "evaluate", "predict")

EXCLUDES = (".git", ".venv", "venv", "data", "runs", "demo", "docs", "tests", "__pycache__", ".*_cache", "*.parquet")
"""What never travels with a job, beside what .gitignore names: patterns as in .gitignore."""

MEBIBYTE = 2**20
# Every node that runs a part of the job fetches the package from the head; the code itself is under 1 MiB.
MAX_UPLOAD_MIB = 32

JOB_ENV = {"RAY_TRAIN_ENABLE_STATE_TRACKING": "1", "PYTHONUNBUFFERED": "1"}
"""What a job's processes find in their environment: runs told to `/api/train/v2/runs/v1`, lines as they come."""

# A job's own folder is a copy on the node it runs on, deleted afterwards.
SHARED_FLAGS = ("--data", "--out", "--source", "--checkpoint", "--images", "--predictions")
# Seconds between two tries to read on in a log, or to submit a job to a head that is not ready; and how many of these.
RECONNECT_S, TRIES = 2.0, 15
# Tries to reach a cluster that does not answer while a job is followed: a head that is restarted is back in minutes.
OUTAGE_TRIES = 300
# Answers that no later try changes: no such job, no access.
FINAL = tuple(f"status code {code}" for code in (400, 401, 403, 404))
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
        return {"env_vars": JOB_ENV | self.env, "excludes": list(EXCLUDES)}

    def metadata(self) -> dict[str, str]:
        """What the dashboard shows of the job."""
        return {"stage": self.stage} | {
            flag.strip("-"): value for flag in ("--data", "--out") if (value := value_of(flag, self.arguments))
        }

    def command(self, address: str, folder: Path) -> str:
        """The same with Ray's own command line."""
        words = ["ray", "job", "submit", "--address", address, "--submission-id", self.name]
        words += ["--working-dir", str(folder), "--runtime-env-json", json.dumps(self.runtime_env())]
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
    named = value_of("--recipe", arguments)
    if not named or "://" in (file := recipe.find(named)) or file.startswith("/"):
        return
    if not (folder / file).is_file():
        raise UserError(f"no recipe at {file} in {folder}, the folder that the job uploads (--working-dir)")


def split(words: Sequence[str], with_value: Collection[str]) -> tuple[list[str], str | None, list[str]]:
    """The words before the stage, the stage (none where there is none), and those after it.

    Args:
        words: of the command line.
        with_value: flags of `submit` that take a value, which may be the name of a stage: `--name train train ...`.
    """
    is_value = False
    for place, word in enumerate(words):
        if word in STAGES and not is_value:
            return list(words[:place]), word, list(words[place + 1 :])
        is_value = word.replace("_", "-") in with_value
    return list(words), None, []


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


def measure(folder: Path, max_upload_mib: float = MAX_UPLOAD_MIB) -> int:
    """Bytes of the files in `folder` that the job takes along.

    Raises:
        UserError: no stages there; more than `max_upload_mib`, naming the largest files.
    """
    if not (folder / "jobs").is_dir():
        raise UserError(f"{folder} has no jobs/: run submit in the project's folder, or name it with --working-dir")
    sizes = upload.sizes(folder, EXCLUDES)
    total = sum(sizes.values())
    if total > max_upload_mib * MEBIBYTE:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
        listed = ", ".join(f"{name} ({sizes[name] / MEBIBYTE:.1f} MiB)" for name in largest)
        raise UserError(
            f"{folder} would upload {total / MEBIBYTE:.1f} MiB, over {max_upload_mib:g}; name in .gitignore what the "
            f"job does not need, or raise --max-upload-mib; the largest are {listed}"
        )
    return total


def connect(address: str | None) -> JobSubmissionClient:
    """The job API at `address` (default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, else a Ray on this machine)."""
    given = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS", "")
    if given.startswith(("http://", "https://")):
        cluster_address.check_listening(given)
    elif given:
        cluster_address.check(given)
    try:
        return JobSubmissionClient(address)
    except Exception as error:  # ConnectionError, of authentication, of versions: all say what is wrong
        told = " ".join(str(error).split())[:300]
        raise UserError(
            f"no job API at {address or 'the address of RAY_API_SERVER_ADDRESS'}: {told}; give --address "
            "http://HEAD:8265 (through `kubectl port-forward` or `ssh -L`) and the cluster's token in RAY_AUTH_TOKEN"
        ) from error


def submit(client: JobSubmissionClient, wanted: Request, folder: Path) -> None:
    """Upload `folder` and submit the job; UserError where the cluster refuses it."""
    for left in reversed(range(TRIES)):
        try:
            client.submit_job(
                entrypoint=wanted.entrypoint(),
                submission_id=wanted.name,
                runtime_env=wanted.runtime_env() | {"working_dir": str(folder)},
                metadata=wanted.metadata(),
                entrypoint_num_cpus=wanted.cpus or None,
                entrypoint_label_selector=wanted.label or None,
            )
            return
        except OSError as error:
            raise UserError(
                f"lost the connection while the job {wanted.name} was submitted ({_line(error)}); see whether it runs "
                f"with `ray job status {wanted.name}` before it is submitted again"
            ) from error
        except (RuntimeError, ValueError) as error:
            # A head that has just started has no agent yet that would run the job.
            if not (left and "try again later" in str(error)):
                raise UserError(f"the cluster refused the job {wanted.name}: {_line(error)}") from error
            time.sleep(RECONNECT_S)


def follow(client: JobSubmissionClient, name: str) -> int:
    """Print what the job prints until it ends; its exit code (1 where it never got so far as to have one)."""
    return ended(asyncio.run(_print_logs(client, name)))


def ended(info: JobDetails) -> int:
    """The exit code of a job that has ended; why, where it has failed, is printed."""
    if info.status == JobStatus.SUCCEEDED:
        return 0
    reason = " ".join(str(info.message or "").split())[:500]
    console.print(f"job {info.submission_id} {info.status.lower()}: {reason}", markup=False)
    return info.driver_exit_code or 1


class _Log:
    """A job's log, each character printed once: a new connection begins with the job's first line."""

    def __init__(self, client: JobSubmissionClient, name: str) -> None:
        self.client, self.name = client, name
        self.printed = 0

    async def print_fresh(self) -> None:
        """Print what is new until the connection ends."""
        seen = 0
        async for text in self.client.tail_job_logs(self.name):
            fresh = text[max(0, self.printed - seen) :]
            seen += len(text)
            self.printed = max(self.printed, seen)
            print(fresh, end="", flush=True)


async def _print_logs(client: JobSubmissionClient, name: str) -> JobDetails:
    """Print the log until the job has ended, through broken connections and outages of the cluster; how it ended.

    Raises:
        UserError: the cluster does not know the job, or has not answered for OUTAGE_TRIES tries.
    """
    log, lost = _Log(client, name), 0
    while True:
        broken: Exception | None = None
        try:
            await log.print_fresh()
        except (RuntimeError, OSError, aiohttp.ClientError) as error:
            broken = error
        try:
            info = client.get_job_info(name)
        except (RuntimeError, OSError) as error:
            lost += 1
            _check_outage(error, name, lost)
        else:
            lost = 0
            if info.status.is_terminal():
                return info
            if broken is not None:
                console.print(f"(connection lost, trying again: {_line(broken)[:120]})", markup=False)
        await asyncio.sleep(RECONNECT_S)


def _check_outage(error: Exception, name: str, lost: int) -> None:
    """Print a line at the first of `lost` failures in a row; UserError where no other try would help."""
    line = _line(error)
    if any(code in line for code in FINAL):
        raise UserError(f"cannot follow the job {name}: {line[:200]}") from error
    if lost == OUTAGE_TRIES:
        minutes = OUTAGE_TRIES * RECONNECT_S / 60
        raise UserError(
            f"no answer for {minutes:.0f} minutes about the job {name}, which may still run ({line[:120]}); see "
            f"`ray job status {name}`, and follow it with `ray job logs {name} --follow`"
        ) from error
    if lost == 1:
        console.print(f"(the cluster does not answer, trying again: {line[:120]})", markup=False)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def run(
    wanted: Request,
    folder: Path,
    address: str | None,
    wait: bool = True,
    stop_on_interrupt: bool = False,
    max_upload_mib: float = MAX_UPLOAD_MIB,
) -> int:
    """Submit and follow; the job's exit code. Ctrl-C leaves the job running, unless `stop_on_interrupt`."""
    size = measure(folder, max_upload_mib)
    client = connect(address)
    console.print(f"{size / MEBIBYTE:.1f} MiB of {folder} to {client.get_address()}; the same by hand:", markup=False)
    print(wanted.command(client.get_address(), folder), flush=True)
    submit(client, wanted, folder)
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
