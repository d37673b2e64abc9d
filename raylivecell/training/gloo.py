"""The gloo process group of training processes without GPUs.

By default gloo resolves the machine's host name. If /etc/hosts maps it to 127.0.0.1 (as Debian's installer does),
processes on two machines connect to their own loopback: "Gloo connectFullMesh failed, Connection refused". Gloo is
therefore set to the interface of the address at which Ray's other nodes reach this one.

Workers form the group themselves: Ray Train's TorchConfig would import torch in its controller before any worker starts
(1.7 s per start).
"""

import os
import socket
from datetime import timedelta

import psutil
import ray.train
import ray.train.collective
import ray.util

VARIABLE = "GLOO_SOCKET_IFNAME"
# Time limit of each collective operation.
TIMEOUT_S = 600


def join_process_group() -> None:
    """Join torch's process group at rank 0's address; does nothing for a single process.

    Processes never leave it explicitly: that would wait for ranks that have died.
    """
    context = ray.train.get_context()
    if context.get_world_size() == 1:
        return
    from torch import distributed

    set_interface()
    url = ray.train.collective.broadcast_from_rank_zero(rendezvous_url() if context.get_world_rank() == 0 else None)
    distributed.init_process_group(
        "gloo",
        init_method=url,
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        timeout=timedelta(seconds=TIMEOUT_S),
    )


def set_interface() -> None:
    """Make gloo in this process use Ray's network interface, unless the user has set one."""
    name = interface(ray.util.get_node_ip_address())
    if name:
        os.environ.setdefault(VARIABLE, name)


def interface(address: str) -> str | None:
    """Name of this machine's network interface with this IP address, if any."""
    families = (socket.AF_INET, socket.AF_INET6)
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.family in families and entry.address.split("%")[0] == address for entry in entries):
            return name
    return None


def rendezvous_url() -> str:
    """URL for the group's rendezvous: this node's address in Ray, and a free port."""
    address = ray.util.get_node_ip_address()
    ipv6 = ":" in address
    with socket.socket(socket.AF_INET6 if ipv6 else socket.AF_INET) as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    return f"tcp://[{address}]:{port}" if ipv6 else f"tcp://{address}:{port}"
