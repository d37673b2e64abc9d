"""One place that turns an error of Ray, or one that crossed Ray, into a UserError: one line with cause and fix.

An exception raised in a task, an actor or a training worker arrives wrapped, up to four deep (RayTaskError,
UserCodeException, WorkerGroupError, ControllerError). The chain of causes is searched for what the user can fix; an
error that only a bug explains stays as it is.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

import ray.exceptions

from raylivecell.core.errors import AGAIN, MachineError, UserError, os_error_line, shortened
from raylivecell.core.process_settings import log_levels, without_errors_of
from raylivecell.runtime import ray_internals

OUT_OF_MEMORY = f"lower batch_size or crop, use fewer --workers, or a machine with more memory, {AGAIN}"
RAY_FIXES: dict[type[Exception], str] = {
    ray.exceptions.OutOfDiskError: f"free space there, or set RAY_TMPDIR to a larger disk, {AGAIN}",
    ray.exceptions.ObjectStoreFullError: f"give Ray more shared memory (/dev/shm; docker --shm-size), {AGAIN}",
    ray.exceptions.OutOfMemoryError: OUT_OF_MEMORY,
    ray.exceptions.RuntimeEnvSetupError: f"correct the job's runtime environment {AGAIN}",
    ray.exceptions.AuthenticationError: "set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token",
    ray.exceptions.NodeDiedError: f"see the logs of that node, {AGAIN}",
    ray.exceptions.LocalRayletDiedError: f"see Ray's logs (memory, disk), {AGAIN}",
    ray.exceptions.WorkerCrashedError: f"it was killed or ran out of memory: see Ray's logs, {AGAIN}",
    ray.exceptions.RayActorError: f"it was killed or ran out of memory: see Ray's logs, {AGAIN}",
    ray.exceptions.ObjectLostError: f"a process or a node was lost: see Ray's logs, {AGAIN}",
    ray.exceptions.TaskUnschedulableError: f"give the cluster what it needs {AGAIN}",
    ray.exceptions.ActorUnschedulableError: f"give the cluster what it needs {AGAIN}",
    ray.exceptions.RayChannelError: f"a process or a node was lost: see Ray's logs, {AGAIN}",
}
# `package.Class: message`, the last line of a traceback, and the number of an OSError.
ERROR_LINE = re.compile(
    r"^(?P<name>[A-Za-z_][\w.]*Error): (?P<message>(?:\[Errno (?P<number>\d+)\])?.*)$", re.MULTILINE
)
HANDLED = "During handling of the above exception, another exception occurred:"


@contextmanager
def as_user_errors() -> Iterator[None]:
    """Raise a UserError for each error inside the block that the user can fix; other errors stay as they are.

    Ray Data logs none of them meanwhile: the exception holds all, and `--debug` shows it.
    """
    try:
        with (
            log_levels({"ray.data.exceptions": logging.CRITICAL}),
            without_errors_of(ray_internals.EXECUTION_LOGGER),
        ):
            yield
    except Exception as error:
        found = explain(error)
        if found is None or found is error:
            raise
        raise found from error


def explain(error: BaseException) -> UserError | None:
    """The UserError for `error` or for the first of its causes that has one; None for what only a bug explains."""
    chain = list(causes(error))
    for cause in chain:
        # RayTaskError(UserError) is a UserError too, whose text is Ray's traceback; its cause follows.
        if isinstance(cause, UserError) and not isinstance(cause, ray.exceptions.RayError):
            return cause
    for cause in reversed(chain):  # the innermost cause is the most exact
        if line := _line(cause):
            return MachineError(line)
    return None


def causes(error: BaseException) -> Iterator[BaseException]:
    """`error` and all that led to it, outermost first, through Ray's own ways to carry a cause."""
    waiting, seen = [error], set()
    while waiting:
        cause = waiting.pop(0)
        if id(cause) in seen:
            continue
        seen.add(id(cause))
        yield cause
        workers = getattr(cause, "worker_failures", None)  # of ray.train.WorkerGroupError: rank -> exception
        carried = [
            *(workers.values() if isinstance(workers, dict) else ()),
            getattr(cause, "controller_failure", None),  # of ray.train.ControllerError
            getattr(cause, "health_check_failure", None),  # of a training worker that was killed
            getattr(cause, "cause", None),  # of RayTaskError
            cause.__cause__,
        ]
        waiting += [one for one in carried if isinstance(one, BaseException)]


def _line(error: BaseException) -> str:
    """Cause and fix in one line; "" for an error that no user can fix."""
    if isinstance(error, ray.exceptions.RayError):
        if isinstance(error, ray.exceptions.RayTaskError):
            return _of_traceback(str(error))  # Ray Data's own exception loses its cause on the way
        fix = next((fix for kind, fix in RAY_FIXES.items() if isinstance(error, kind)), None)
        if fix and "low on memory" in str(error):  # Ray's own memory monitor
            fix = OUT_OF_MEMORY
        if "creation task" in str(error):
            return _of_traceback(str(error))
        return f"{first_line(error)}; {fix}" if fix else ""
    if isinstance(error, OSError):
        return os_error_line(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # numpy's, torch's
        return f"out of memory: {first_line(error)}; {OUT_OF_MEMORY}"
    return ""


def _of_traceback(text: str) -> str:
    """The line for an error that arrived as the text of a traceback, which names the first cause first."""
    found = list(ERROR_LINE.finditer(text.rpartition(HANDLED)[2]))
    for match in found:
        if match["name"].endswith(f".{UserError.__name__}"):
            return match["message"]
    for match in found:
        if match["number"]:
            return os_error_line(OSError(int(match["number"]), match["message"]), match["message"])
        if match["name"].endswith("MemoryError"):
            return f"out of memory: {shortened(match['message'])}; {OUT_OF_MEMORY}"
    return ""


def first_line(error: BaseException) -> str:
    """The first line of the error's text, shortened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return shortened(lines[0].rstrip(".:") if lines else type(error).__name__)
