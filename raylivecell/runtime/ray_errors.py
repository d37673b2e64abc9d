"""Turn errors of Ray, and errors raised in its processes, into a UserError: one line with cause and fix.

An exception raised in a task, an actor or a training worker arrives wrapped, up to four levels deep (RayTaskError,
UserCodeException, WorkerGroupError, ControllerError). The chain of causes is searched for an error that the user
can fix; a bug is raised unchanged.
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
    ray.exceptions.TaskUnschedulableError: f"give the cluster the resources it needs {AGAIN}",
    ray.exceptions.ActorUnschedulableError: f"give the cluster the resources it needs {AGAIN}",
    ray.exceptions.RayChannelError: f"a process or a node was lost: see Ray's logs, {AGAIN}",
}
# `package.Class: message`, the last line of a traceback, and the number of an OSError.
ERROR_LINE = re.compile(
    r"^(?P<name>[A-Za-z_][\w.]*Error): (?P<message>(?:\[Errno (?P<number>\d+)\])?.*)$", re.MULTILINE
)
HANDLED = "During handling of the above exception, another exception occurred:"


@contextmanager
def as_user_errors() -> Iterator[None]:
    """Raise a UserError for an error inside the block that the user can fix; other errors pass unchanged.

    Ray Data does not log them: the exception has all details, and `--debug` shows them.
    """
    try:
        with (
            log_levels({"ray.data.exceptions": logging.CRITICAL}),
            without_errors_of(ray_internals.EXECUTION_LOGGER),
        ):
            yield
    except Exception as error:
        explanation = explain(error)
        if explanation is None or explanation is error:
            raise
        raise explanation from error


def explain(error: BaseException) -> UserError | None:
    """Return the UserError for `error` or one of its causes; None for a bug."""
    chain = list(causes(error))
    for cause in chain:
        # RayTaskError(UserError) is also a UserError, but its text is Ray's traceback; its cause is later in the chain.
        if isinstance(cause, UserError) and not isinstance(cause, ray.exceptions.RayError):
            return cause
    for cause in reversed(chain):  # the innermost cause is the most specific
        if line := _line(cause):
            return MachineError(line)
    return None


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield `error` and its causes, outermost first, including those in attributes of Ray's errors."""
    pending, visited = [error], set()
    while pending:
        cause = pending.pop(0)
        if id(cause) in visited:
            continue
        visited.add(id(cause))
        yield cause
        workers = getattr(cause, "worker_failures", None)  # of ray.train.WorkerGroupError: rank -> exception
        candidates = [
            *(workers.values() if isinstance(workers, dict) else ()),
            getattr(cause, "controller_failure", None),  # of ray.train.ControllerError
            getattr(cause, "health_check_failure", None),  # of a training worker that was killed
            getattr(cause, "cause", None),  # of RayTaskError
            cause.__cause__,
        ]
        pending += [cause for cause in candidates if isinstance(cause, BaseException)]


def _line(error: BaseException) -> str:
    """Cause and fix in one line; "" for an error that the user cannot fix."""
    if isinstance(error, ray.exceptions.RayError):
        if isinstance(error, ray.exceptions.RayTaskError):
            return _line_of_traceback(str(error))  # Ray Data's exception has lost its cause
        fix = next((fix for kind, fix in RAY_FIXES.items() if isinstance(error, kind)), None)
        if fix and "low on memory" in str(error):  # Ray's own memory monitor
            fix = OUT_OF_MEMORY
        if "creation task" in str(error):
            return _line_of_traceback(str(error))
        return f"{first_line(error)}; {fix}" if fix else ""
    if isinstance(error, OSError):
        return os_error_line(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # numpy's, torch's
        return f"out of memory: {first_line(error)}; {OUT_OF_MEMORY}"
    return ""


def _line_of_traceback(text: str) -> str:
    """Cause and fix of an error whose traceback arrived as text, in which the original cause is first."""
    matches = list(ERROR_LINE.finditer(text.rpartition(HANDLED)[2]))
    for match in matches:
        if match["name"].endswith(f".{UserError.__name__}"):
            return match["message"]
    for match in matches:
        if match["number"]:
            return os_error_line(OSError(int(match["number"]), match["message"]), match["message"])
        if match["name"].endswith("MemoryError"):
            return f"out of memory: {shortened(match['message'])}; {OUT_OF_MEMORY}"
    return ""


def first_line(error: BaseException) -> str:
    """First line of the error's text, shortened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return shortened(lines[0].rstrip(".:") if lines else type(error).__name__)
