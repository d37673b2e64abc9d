"""Ray's session: join a cluster or start Ray on this machine; map a function over many items in order."""

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
# Environment of all Ray processes started on this machine.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # Ray would ask the user before it reports usage statistics
    # Number of times that OpenMP threads (torch's) spin before they sleep; by default 300,000, which delays a step if
    # other processes need the cores. Three concurrent trainings on two cores: 5 images/s each instead of 1.5; a single
    # training keeps its speed (15.3).
    "GOMP_SPINCOUNT": "10000",
    # A local Ray has no other machine to be preempted; the watcher process costs 1.5 s of a core at the start of a run.
    PREEMPTION_WATCHER: "0",
}
# A socket's path may have 107 bytes, up to 72 of them from Ray: /ray/session_DATE_TIME_MICROSECONDS_PID/sockets/NAME.
LONGEST_TEMPORARY_FOLDER = 34
SHORT_TEMPORARY_FOLDER = "/tmp"

_session: Any = None
"""Return value of `ray.init` for the session that `connect` started, joined or found."""
_started_here = False
_empty_folders: list["tempfile.TemporaryDirectory[str]"] = []


def connect(cpus: int | None = None, dashboard: bool = False) -> None:
    """Join the cluster at RAY_ADDRESS (set inside `ray job submit`), or start Ray on this machine; idempotent.

    Args:
        cpus: logical CPUs, if Ray is started here; default: those of the machine.
        dashboard: whether Ray, if started here, has a dashboard and therefore the State API. Without it, Ray Tune leaks
            the workers of stopped trials (ray #54305). It adds 1 s to a command's start.

    Raises:
        UserError: Ray does not answer at RAY_ADDRESS, or cannot start here.
    """
    global _session, _started_here
    if ray.is_initialized():  # by `connect` or a notebook: another ray.init only returns its description
        with log_levels({"ray": logging.ERROR}):  # ray.init changes this level permanently
            _session = ray.init(ignore_reinit_error=True, logging_level=logging.ERROR)
        return
    address = os.environ.get("RAY_ADDRESS", "")
    _started_here = address in ("", "local")
    with keeping_sigterm_handler():
        _session = _start(cpus, dashboard) if _started_here else _join(address)


def _join(address: str) -> Any:
    cluster_address.check(address)
    fix = f"{cluster_address.FIX}; if the cluster has a token, set it in RAY_AUTH_TOKEN"
    with _as_user_error(f"cannot join the cluster at RAY_ADDRESS={address}", fix):
        return ray.init(log_to_driver=False, logging_level=logging.ERROR)


def _start(cpus: int | None, dashboard: bool) -> Any:
    fix = "set RAY_TMPDIR to a folder with a short path that you may write to, or RAY_ADDRESS to a running cluster"
    with _as_user_error("cannot start Ray on this machine", fix), ExitStack() as stack:
        stack.enter_context(environment(**ENVIRONMENT, **_token_without_home()))
        stack.enter_context(replaced_environment(**_short_temporary_folder()))
        stack.enter_context(_away_from_working_folder())
        # Without address="local", ray.init joins any cluster that runs on the machine.
        session = ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=dashboard,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    if (ip := ray.util.get_node_ip_address()) != "127.0.0.1":  # Ray was imported before the variable was set
        console.print(f"Ray listens on {ip}; to keep it on this machine, set {LOOPBACK_ONLY}=0 before importing ray")
    return session


@contextmanager
def _as_user_error(problem: str, fix: str) -> Iterator[None]:
    """Raise an error of `ray.init` as a UserError."""
    try:
        yield
    except Exception as error:  # OSError, RuntimeError, ValueError, ConnectionError, ...: they have no common class
        explanation = explain(error)
        raise UserError(f"{problem}: {explanation or first_line(error)}; {fix}") from error


def _short_temporary_folder() -> dict[str, str]:
    """TMPDIR for Ray's processes, including the dashboard's, if the user's is too long for their sockets."""
    if len(os.fsencode(tempfile.gettempdir())) > LONGEST_TEMPORARY_FOLDER:
        return {"TMPDIR": SHORT_TEMPORARY_FOLDER}
    return {}


def _token_without_home() -> dict[str, str]:
    """Create a token if Ray cannot write one to ~/.ray/auth_token."""
    if "RAY_AUTH_TOKEN_PATH" not in os.environ and not _home_is_writable():
        return {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
    return {}


def _home_is_writable() -> bool:
    try:
        folder = Path.home() / ".ray"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except (OSError, RuntimeError):  # RuntimeError: no home folder
        return False


@contextmanager
def _away_from_working_folder() -> Iterator[None]:
    """Start Ray's processes inside the block in an empty folder, without the working folder on their import path.

    Python imports first from the folder in which a process starts: a downloaded `statistics.py` would be executed. If
    the working folder contains this package, as in a checkout, they start there.
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
        os.environ["PYTHONPATH"] = os.pathsep.join(folder for folder in folders if os.path.realpath(folder) != here)
    previous = os.open(".", os.O_RDONLY)
    os.chdir(empty.name)
    try:
        yield
    finally:
        os.fchdir(previous)
        os.close(previous)
        if search_path is not None:
            os.environ["PYTHONPATH"] = search_path


def started_here() -> bool:
    """Whether this process started its Ray, which then ends with it."""
    return _started_here and ray.is_initialized()


def machines() -> list[Machine]:
    """Machines of the cluster that are alive."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Machine(float(resources.get("CPU", 0)), float(resources.get("GPU", 0))) for resources in alive]


def task_cpus() -> float:
    """CPUs reserved by a task of Ray Data on this cluster."""
    return placement.task_cpus(machines())


def dashboard() -> str | None:
    """Address of the cluster's dashboard, http://HOST:PORT; None without one."""
    url = getattr(_session, "dashboard_url", None)
    return f"http://{url}" if url else None


def ordered_map(
    function: Callable[[Item], Result], items: Sequence[Item], max_concurrent: int | None = None
) -> Iterator[Result]:
    """Yield `function(item)` in order, computed by Ray tasks of one CPU each.

    At most `max_concurrent` results (default: twice the cluster's CPUs) are in flight or in the object store, so that
    any number of items can be streamed. An exception in a task is raised here with the same class.
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
