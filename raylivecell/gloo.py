"""How training processes on several machines without GPUs find each other.

Gloo asks the machine for the address of its own name. Where /etc/hosts has that as 127.0.0.1 (Debian's installer writes
it so), processes on two machines look for each other on their own loopback: "Gloo connectFullMesh failed, Connection
refused". Ray knows the address at which the other nodes reach this one.
"""

import os
import socket
from dataclasses import dataclass
from typing import Any

import psutil
import ray.util
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

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


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(choose)
        super().on_start(worker_group, backend_config)


@dataclass
class GlooConfig(TorchConfig):
    """Ray Train's set-up of torch.distributed over the interface that Ray uses."""

    backend: str | None = "gloo"

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """What sets it up."""
        return _Backend
