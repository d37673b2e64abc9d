"""How training processes without GPUs find each other.

Gloo asks the machine for the address of its own name. Where /etc/hosts has that as 127.0.0.1 (Debian's installer writes
it so), processes on two machines look for each other on their own loopback: "Gloo connectFullMesh failed, Connection
refused". Ray knows the address at which the other nodes reach this one.

Ray Train's own set-up would load torch in the controller too, before there are any workers: 1.7 s of each start.
"""

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
import ray.train
import ray.util
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig

VARIABLE = "GLOO_SOCKET_IFNAME"


def interface(address: str) -> str | None:
    """The name of this machine's network interface with this IP address; none where there is no such."""
    families = (socket.AF_INET, socket.AF_INET6)
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.family in families and entry.address.split("%")[0] == address for entry in entries):
            return name
    return None


def choose() -> None:
    """Let gloo, in this process, use the interface by which Ray speaks; what the user has set stays."""
    name = interface(ray.util.get_node_ip_address())
    if name:
        os.environ.setdefault(VARIABLE, name)


def join(address: str, port: int, timeout_s: int) -> None:
    """Make this training process one of torch's group, which meets at rank 0's address; one alone needs none.

    It stays in it to its end, which is that of the run or of one of the ranks: to leave would be to wait for dead ones.
    """
    context = ray.train.get_context()
    if context.get_world_size() == 1:
        return
    from torch import distributed

    choose()
    host = f"[{address}]" if ":" in address else address
    distributed.init_process_group(
        "gloo",
        init_method=f"tcp://{host}:{port}",
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        timeout=timedelta(seconds=timeout_s),
    )


class _Backend(Backend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(join, *worker_group.execute_single(0, get_address_and_port), backend_config.timeout_s)


@dataclass
class GlooConfig(BackendConfig):
    """Of Ray Train: torch.distributed by gloo over the interface that Ray uses."""

    backend: str = "gloo"
    timeout_s: int = 600
    """After which an operation of the group fails."""

    @property
    def backend_cls(self) -> type[Backend]:
        """What sets it up."""
        return _Backend
