"""Facts about each node of the cluster, collected by an actor on it."""

import os
import platform
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raylivecell.core import storage
from raylivecell.core.version import __version__

# Time for a node to start a process, import torch and answer.
TIMEOUT_S = 60.0
SHARED_MEMORY = "/dev/shm"


@dataclass(frozen=True)
class Node:
    """Facts about a node; only the first three are set if it did not answer."""

    address: str
    resources: dict[str, float]
    no_answer: str = ""
    """Why the node did not answer; "" if it did."""
    versions: tuple[tuple[str, str], ...] = ()
    """Name and version of python, ray, torch and raylivecell, sorted."""
    gpus: int = 0
    """Number of GPUs that torch finds."""
    shared_memory: int = 0
    """Size of /dev/shm in bytes; 0 without one."""
    clock_s: float = 0.0
    """Lower bound of the offset of the node's clock from the driver's, seconds; negative if behind."""
    storage_error: str = ""
    """Why the node could not write to --out or read the driver's file there; "" if it could."""


@ray.remote(num_cpus=0, max_restarts=0)
class _Probe:
    def facts(self, folder: str | None, name: str) -> dict[str, Any]:
        import torch

        versions = {"python": platform.python_version(), "ray": ray.__version__, "torch": torch.__version__}
        return {
            "versions": tuple(sorted((versions | {"raylivecell": __version__}).items())),
            "gpus": torch.cuda.device_count(),
            "shared_memory": shutil.disk_usage(SHARED_MEMORY).total if os.path.isdir(SHARED_MEMORY) else 0,
            "storage_error": _storage_error(folder, name) if folder else "",
        }

    def clock(self) -> float:
        return time.time()


def _storage_error(folder: str, name: str) -> str:
    try:
        storage.write_bytes(storage.join(folder, f"{name}-{ray.get_runtime_context().get_node_id()}"), b"node")
        return (
            "" if storage.read_bytes(storage.join(folder, name)) == b"driver" else "finds a different file of this name"
        )
    except Exception as error:  # of a disk, a network or a cloud; `check` reports it
        return " ".join(str(error).split())[:200]


def collect(out: str | None) -> list[Node]:
    """Collect facts from all live nodes; each writes to a temporary folder in `out` and reads the driver's file.

    Raises:
        OSError: the driver cannot write to `out`.
    """
    folder, name = (storage.join(out, f".check-{uuid.uuid4().hex}") if out else None), "driver"
    existed = out is None or storage.exists(out)
    if folder:
        storage.write_bytes(storage.join(folder, name), b"driver")
    try:
        records = [record for record in ray.nodes() if record["Alive"]]
        probes = [_start(record["NodeID"]) for record in records]
        facts = [probe.facts.remote(folder, name) for probe in probes]
        nodes = [_node(*arguments) for arguments in zip(records, probes, facts)]
        return [_checked_by_driver(node, record, folder, name) for node, record in zip(nodes, records)]
    finally:
        if folder:
            storage.delete(folder)
        if out and not existed:
            storage.delete_empty(out)


def _start(node_id: str) -> Any:
    return _Probe.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)).remote()  # type: ignore[attr-defined]


def _node(record: dict[str, Any], probe: Any, facts: "ray.ObjectRef") -> Node:
    address, resources = f"{record['NodeManagerAddress']}", record["Resources"]
    try:
        values = ray.get(facts, timeout=TIMEOUT_S)
        offset = clock_offset(lambda: ray.get(probe.clock.remote(), timeout=TIMEOUT_S))
        return Node(address, resources, **values, clock_s=offset)
    except Exception as error:  # the actor did not start, died or hung; `check` reports it
        return Node(address, resources, no_answer=" ".join(str(error).split())[:200] or type(error).__name__)
    finally:
        ray.kill(probe)


def clock_offset(clock: Callable[[], float], now: Callable[[], float] = time.time) -> float:
    """Offset of `clock` from `now` in seconds, minus what the call's latency can explain; negative if behind."""
    before = now()
    remote = clock()
    after = now()
    return max(0.0, remote - after) + min(0.0, remote - before)


def _checked_by_driver(node: Node, record: dict[str, Any], folder: str | None, name: str) -> Node:
    """Check that the driver finds the node's file: a folder at the same path on each machine need not be shared."""
    if folder is None or node.no_answer or node.storage_error:
        return node
    if storage.exists(storage.join(folder, f"{name}-{record['NodeID']}")):
        return node
    return Node(**{**node.__dict__, "storage_error": "the driver does not find the file that the node wrote"})
