"""What each node of the cluster tells of itself, by a process of ours on it."""

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

# Seconds that a node has to start a process, import torch and answer.
PATIENCE_S = 60.0
SHARED_MEMORY = "/dev/shm"


@dataclass(frozen=True)
class Node:
    """A node's own words; `silent` says why there are none."""

    address: str
    resources: dict[str, float]
    silent: str = ""
    versions: tuple[tuple[str, str], ...] = ()
    """Of python, ray, torch and raylivecell."""
    gpus: int = 0
    """That torch sees."""
    shared_memory: int = 0
    """Bytes that /dev/shm can hold; 0 where there is none."""
    clock_s: float = 0.0
    """By how much the node's clock is certainly ahead of the driver's (behind: below 0), seconds."""
    storage_error: str = ""
    """What went wrong when the node wrote a file to --out and read what the driver wrote there."""


@ray.remote(num_cpus=0, max_restarts=0)
class _Probe:
    def told(self, folder: str | None, name: str) -> dict[str, Any]:
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
        return "" if storage.read_bytes(storage.join(folder, name)) == b"driver" else "reads another file of this name"
    except Exception as error:  # of a disk, a network, a cloud: told by `check`
        return " ".join(str(error).split())[:200]


def nodes(out: str | None) -> list[Node]:
    """Every living node; all write to a folder of this call's in `out` and read what the driver wrote there.

    Raises:
        OSError: the driver cannot write there.
    """
    folder, name = (storage.join(out, f".check-{uuid.uuid4().hex}") if out else None), "driver"
    was_there = out is None or storage.exists(out)
    if folder:
        storage.write_bytes(storage.join(folder, name), b"driver")
    try:
        alive = [one for one in ray.nodes() if one["Alive"]]
        probes = [_start(one["NodeID"]) for one in alive]
        asked = [probe.told.remote(folder, name) for probe in probes]
        found = [_node(*each) for each in zip(alive, probes, asked)]
        return [_found_by_driver(node, one, folder, name) for node, one in zip(found, alive)]
    finally:
        if folder:
            storage.delete(folder)
        if out and not was_there:
            storage.delete_empty(out)


def _start(node_id: str) -> Any:
    return _Probe.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)).remote()  # type: ignore[attr-defined]


def _node(alive: dict[str, Any], probe: Any, asked: "ray.ObjectRef") -> Node:
    place = (f"{alive['NodeManagerAddress']}", alive["Resources"])
    try:
        told = ray.get(asked, timeout=PATIENCE_S)
        return Node(*place, **told, clock_s=ahead(lambda: ray.get(probe.clock.remote(), timeout=PATIENCE_S)))
    except Exception as error:  # its process did not start, died or hung: what `check` is to tell
        return Node(*place, silent=" ".join(str(error).split())[:200] or type(error).__name__)
    finally:
        ray.kill(probe)


def ahead(clock: Callable[[], float], now: Callable[[], float] = time.time) -> float:
    """Seconds by which `clock` is certainly ahead of `now` (behind: below 0): what its answer's way cannot explain."""
    before = now()
    told = clock()
    after = now()
    return max(0.0, told - after) + min(0.0, told - before)


def _found_by_driver(node: Node, alive: dict[str, Any], folder: str | None, name: str) -> Node:
    """What a node wrote must be there for others: a folder of the same path on each machine is no shared one."""
    if folder is None or node.silent or node.storage_error:
        return node
    if storage.exists(storage.join(folder, f"{name}-{alive['NodeID']}")):
        return node
    return Node(**{**node.__dict__, "storage_error": "what it writes is not there for this machine"})
