"""Ray itself: join the cluster that is there or start one here, and run a function over many items on it, in order."""

import importlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import ray

# What both ray.init and Ray Train import: before two threads do, so that neither may find the other's half done.
import ray._common.usage.usage_lib
import ray.autoscaler._private.cli_logger
from ray._private import ray_constants

from raylivecell import placement
from raylivecell.placement import Machine
from raylivecell.process_settings import environment

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


def connect(cpus: int | None = None, importing: str | None = None) -> None:
    """Join the cluster named by RAY_ADDRESS (set inside `ray job submit`), else start Ray on this machine; idempotent.

    Args:
        cpus: logical CPUs of a Ray started here; default: the machine's.
        importing: a module to import meanwhile.
    """
    if ray.is_initialized():
        return
    with ThreadPoolExecutor(1) as beside:
        if importing:
            beside.submit(importlib.import_module, importing)
        if os.environ.get("RAY_ADDRESS"):
            _join()
        else:
            _start(cpus)


def _join() -> None:
    ray.init(log_to_driver=False, logging_level=logging.ERROR)


def _start(cpus: int | None) -> None:
    # address="local": plain init attaches to whatever cluster happens to run on the machine.
    # The dashboard stays on: without the State API, Tune leaks the workers of trials that it stops (ray #54305).
    with _on_loopback(), environment(**ENVIRONMENT):
        ray.init(
            address="local", num_cpus=cpus, include_dashboard=True, log_to_driver=False, logging_level=logging.ERROR
        )


def started_here() -> bool:
    """Whether this process started the Ray that it has joined, which ends with it."""
    node = ray._private.worker._global_node
    return node is not None and node.is_head()


@contextmanager
def _on_loopback() -> Iterator[None]:
    """A Ray started meanwhile listens on 127.0.0.1 alone, as on macOS; on Linux it would on all interfaces."""
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def machines() -> list[Machine]:
    """The living machines of the cluster that this process has joined."""
    alive = [one["Resources"] for one in ray.nodes() if one["Alive"]]
    return [Machine(float(each.get("CPU", 0)), float(each.get("GPU", 0))) for each in alive]


def task_cpus() -> float:
    """CPUs that a task of Ray Data reserves on this cluster."""
    return placement.task_cpus(machines())


def dashboard() -> str | None:
    """The address of the dashboard of the cluster that this process has joined, http://HOST:PORT; none without one."""
    url = ray._private.worker._global_node.webui_url  # type: ignore[attr-defined]
    return f"http://{url}" if url else None


def ordered_map(
    function: Callable[[Item], Result], items: Sequence[Item], at_once: int | None = None
) -> Iterator[Result]:
    """`function` of each item, as Ray tasks of one CPU each, results in order; at most `at_once` in flight.

    Bounded: results wait in the object store, never more than `at_once` of them, so any number of items streams
    through. An exception in a task is raised here as itself. Default `at_once`: twice the cluster's CPUs.
    """
    task: Any = ray.remote(max_retries=3)(function)
    limit = at_once or max(2, 2 * int(ray.cluster_resources().get("CPU", 1)))
    pending: list[ray.ObjectRef] = []
    queue = iter(items)
    for item in queue:
        pending.append(task.remote(item))
        if len(pending) >= limit:
            yield _result(pending.pop(0))
    while pending:
        yield _result(pending.pop(0))


def _result(ref: "ray.ObjectRef") -> Any:
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        raise error.as_instanceof_cause() from None
