"""How training processes without GPUs form a torch process group, over gloo.

Gloo asks the machine for the address of its own host name. Where /etc/hosts has that as 127.0.0.1 (Debian's installer
writes it so), processes on two machines look for each other on their own loopback: "Gloo connectFullMesh failed,
Connection refused". Ray knows the address at which the other nodes reach this one.

The workers do it themselves: Ray Train's TorchConfig would import torch in its controller, before there are any workers
(1.7 s of each start).
"""

import os
import socket
from datetime import timedelta

import psutil
import ray.train
import ray.train.collective
import ray.util

VARIABLE = "GLOO_SOCKET_IFNAME"
# An operation of the group fails after this time.
TIMEOUT_S = 600


def interface(address: str) -> str | None:
    """Name of this machine's network interface with this IP address, if any."""
    families = (socket.AF_INET, socket.AF_INET6)
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.family in families and entry.address.split("%")[0] == address for entry in entries):
            return name
    return None


def choose() -> None:
    """Let gloo in this process use the interface that Ray uses, unless the user has set one."""
    name = interface(ray.util.get_node_ip_address())
    if name:
        os.environ.setdefault(VARIABLE, name)


def rendezvous() -> str:
    """URL at which the group can meet: this node's address, which Ray knows, and a free port on it."""
    address = ray.util.get_node_ip_address()
    ipv6 = ":" in address
    with socket.socket(socket.AF_INET6 if ipv6 else socket.AF_INET) as bound:
        bound.bind(("", 0))
        port = bound.getsockname()[1]
    return f"tcp://[{address}]:{port}" if ipv6 else f"tcp://{address}:{port}"


def join() -> None:
    """Make this training process a member of torch's process group, which meets at rank 0; a single one needs none.

    It stays a member until it ends: to leave the group would be to wait for ranks that have died.
    """
    context = ray.train.get_context()
    if context.get_world_size() == 1:
        return
    from torch import distributed

    choose()
    url = ray.train.collective.broadcast_from_rank_zero(rendezvous() if context.get_world_rank() == 0 else None)
    distributed.init_process_group(
        "gloo",
        init_method=url,
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        timeout=timedelta(seconds=TIMEOUT_S),
    )
