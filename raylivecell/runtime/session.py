"""Ray: join the cluster that is there or start one here, and run a function over many items on it, in order."""

import logging
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import ray

from raylivecell.core.console import console
from raylivecell.core.errors import UserError
from raylivecell.core.process_settings import LOOPBACK_ONLY, environment, log_levels, replaced_environment
from raylivecell.core.signals import keeping_sigterm_handler
from raylivecell.runtime import cluster_address, placement
from raylivecell.runtime.placement import Machine
from raylivecell.runtime.ray_errors import as_user_errors, explain, first_line

Item = TypeVar("Item")
Result = TypeVar("Result")

PREEMPTION_WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
# The environment of a Ray that starts here, and of all its processes.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # Ray asks before it reports its use; this project's users are not asked
    # How often OpenMP's threads, torch's, look for one another before they sleep. By default 300,000 times: where
    # anything else needs a core, a step waits for threads that wait. Three trainings at once on two cores: 5 images/s
    # each instead of 1.5; one alone is as fast as before (15.3).
    "GOMP_SPINCOUNT": "10000",
    # No other machine can be preempted; the process that would watch for it costs the start of a run 1.5 s of a core.
    PREEMPTION_WATCHER: "0",
}
# A socket's path may have 107 bytes; Ray appends up to 72: /ray/session_DATE_TIME_MICROSECONDS_PID/sockets/NAME.
LONGEST_TEMPORARY_FOLDER = 34
SHORT_TEMPORARY_FOLDER = "/tmp"

_session: Any = None
"""What `ray.init` has returned for the Ray that `connect` started, joined or found."""
_started_here = False
_empty_folders: list["tempfile.TemporaryDirectory[str]"] = []


def connect(cpus: int | None = None, dashboard: bool = False) -> None:
    """Join the cluster named by RAY_ADDRESS (set inside `ray job submit`), else start Ray on this machine; idempotent.

    Args:
        cpus: logical CPUs of a Ray started here; default: the machine's.
        dashboard: whether a Ray started here has a dashboard and so the State API, which Ray Tune needs: without it,
            Tune leaks the workers of trials that it stops (ray #54305). It takes 1 s of a command's start.

    Raises:
        UserError: no Ray answers at RAY_ADDRESS, or none can start here.
    """
    global _session, _started_here
    if ray.is_initialized():  # by `connect`, or by a notebook, whose Ray a second ray.init only describes
        with log_levels({"ray": logging.ERROR}):  # which ray.init sets, and leaves so
            _session = ray.init(ignore_reinit_error=True, logging_level=logging.ERROR)
        return
    address = os.environ.get("RAY_ADDRESS", "")
    _started_here = address in ("", "local")
    with keeping_sigterm_handler():
        _session = _start(cpus, dashboard) if _started_here else _join(address)


def _join(address: str) -> Any:
    cluster_address.check(address)
    fix = f"{cluster_address.FIX}; a cluster with a token needs it in RAY_AUTH_TOKEN"
    with _one_line(f"cannot join the Ray at RAY_ADDRESS={address}", fix):
        return ray.init(log_to_driver=False, logging_level=logging.ERROR)


def _start(cpus: int | None, dashboard: bool) -> Any:
    fix = "set RAY_TMPDIR to a folder with a short path that you may write, or RAY_ADDRESS to a running Ray"
    with _one_line("cannot start Ray on this machine", fix), ExitStack() as stack:
        stack.enter_context(environment(**ENVIRONMENT, **_token_without_home()))
        stack.enter_context(replaced_environment(**_short_temporary_folder()))
        stack.enter_context(_away_from_working_folder())
        # address="local": plain init attaches to whatever cluster happens to run on the machine.
        session = ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=dashboard,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    if (ip := ray.util.get_node_ip_address()) != "127.0.0.1":  # Ray was imported before; a command sets the variable
        console.print(f"Ray listens on {ip}; to keep it on this machine, set {LOOPBACK_ONLY}=0 before importing ray")
    return session


@contextmanager
def _one_line(what: str, fix: str) -> Iterator[None]:
    """Raise what goes wrong in `ray.init` as a UserError."""
    try:
        yield
    except Exception as error:  # OSError, RuntimeError, ValueError, ConnectionError, ...: it has no error of its own
        found = explain(error)
        raise UserError(f"{what}: {found or first_line(error)}; {fix}") from error


def _short_temporary_folder() -> dict[str, str]:
    """TMPDIR for Ray's processes where the user's is too long for their sockets, the dashboard's parts included."""
    if len(os.fsencode(tempfile.gettempdir())) > LONGEST_TEMPORARY_FOLDER:
        return {"TMPDIR": SHORT_TEMPORARY_FOLDER}
    return {}


def _token_without_home() -> dict[str, str]:
    """A token for a Ray that cannot write one to ~/.ray/auth_token."""
    if "RAY_AUTH_TOKEN_PATH" not in os.environ and not _home_is_writable():
        return {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
    return {}


def _home_is_writable() -> bool:
    try:
        folder = Path.home() / ".ray"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return False


@contextmanager
def _away_from_working_folder() -> Iterator[None]:
    """An empty working folder for the processes that Ray starts inside the block, and no other on their import path.

    They import from the folder in which they start, before all others: a downloaded `statistics.py` would be executed.
    Where this package itself is in the working folder, as in a checkout, they start there.
    """
    here = os.path.realpath(".")
    if here == str(Path(__file__).resolve().parents[2]):
        yield
        return
    empty = tempfile.TemporaryDirectory(prefix="raylivecell-", ignore_cleanup_errors=True)
    _empty_folders.append(empty)  # deleted when this process ends
    search_path = os.environ.get("PYTHONPATH")
    if search_path is not None:
        folders = [os.path.abspath(folder) for folder in search_path.split(os.pathsep) if folder]
        os.environ["PYTHONPATH"] = os.pathsep.join(one for one in folders if os.path.realpath(one) != here)
    before = os.open(".", os.O_RDONLY)
    os.chdir(empty.name)
    try:
        yield
    finally:
        os.fchdir(before)
        os.close(before)
        if search_path is not None:
            os.environ["PYTHONPATH"] = search_path


def started_here() -> bool:
    """Whether this process started the Ray that it has joined, which ends with it."""
    return _started_here and ray.is_initialized()


def machines() -> list[Machine]:
    """The living machines of the cluster that this process has joined."""
    alive = [one["Resources"] for one in ray.nodes() if one["Alive"]]
    return [Machine(float(each.get("CPU", 0)), float(each.get("GPU", 0))) for each in alive]


def task_cpus() -> float:
    """CPUs that a task of Ray Data reserves on this cluster."""
    return placement.task_cpus(machines())


def dashboard() -> str | None:
    """The address of the dashboard of the cluster that `connect` has joined, http://HOST:PORT; None without one."""
    url = getattr(_session, "dashboard_url", None)
    return f"http://{url}" if url else None


def ordered_map(
    function: Callable[[Item], Result], items: Sequence[Item], max_concurrent: int | None = None
) -> Iterator[Result]:
    """`function` of each item, as Ray tasks of one CPU each, results in order; at most `max_concurrent` in flight.

    Bounded: results wait in the object store, never more than `max_concurrent` of them, so any number of items streams
    through. An exception in a task is raised here as one of its class. Default: twice the cluster's CPUs.
    """
    task: Any = ray.remote(max_retries=3)(function)
    limit = max_concurrent or max(2, 2 * int(ray.cluster_resources().get("CPU", 1)))
    pending: list[ray.ObjectRef] = []
    queue = iter(items)
    for item in queue:
        pending.append(task.remote(item))
        if len(pending) >= limit:
            yield _result(pending.pop(0))
    while pending:
        yield _result(pending.pop(0))


def _result(ref: "ray.ObjectRef") -> Any:
    with as_user_errors():
        return ray.get(ref)
