"""The command `serve`: the service on this machine, or on the cluster at RAY_ADDRESS, until it is interrupted."""

import logging
import os
import socket
import threading
import time

from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation

from raylivecell.core.console import console
from raylivecell.core.errors import UserError
from raylivecell.core.process_settings import environment, log_levels
from raylivecell.inference import segmenter
from raylivecell.runtime import placement, session
from raylivecell.serving import application
from raylivecell.serving.guard import LOOPBACK_NAMES
from raylivecell.serving.settings import TOKEN_VARIABLE, ServeSettings, token_hash

IN_MEMORY = "/dev/shm"
"""Linux' file system in memory; a Ray that has switched spilling off would use files in /tmp instead."""
ANY_ADDRESS = ("0.0.0.0", "::")


def run(checkpoint: str, host: str, port: int, replicas: int | tuple[int, int] | None, max_request_mib: float) -> None:
    """Serve until the process is interrupted; print the address once images can be segmented.

    Args:
        checkpoint: as `ServeSettings.checkpoint`.
        host: address to listen on; without a token only a loopback address.
        port: port to listen on.
        replicas: processes with the network, or (min, max); None: 1 to half of the CPUs of this machine or cluster.
        max_request_mib: as in `ServeSettings`.

    Raises:
        UserError: no network there, no token for an address that others reach, or the port is in use.
    """
    began = time.monotonic()
    token = os.environ.get(TOKEN_VARIABLE)
    _check_access(host, token)
    hashed = token_hash(token) if token else None
    _check_port(host, port)
    address = application.model_address(checkpoint)
    segmenter.load(address, device="cpu")  # a UserError now: Ray would restart a failing process without end
    console.print(f"starting Ray; the network is {address}", markup=False)
    low, high = replicas if isinstance(replicas, tuple) else (replicas or 1, replicas or _half(os.cpu_count() or 1))
    # An image must not be written to disk: when Ray's memory is full, it spills objects to this folder.
    with environment(**({"RAY_object_spilling_directory": IN_MEMORY} if os.path.isdir(IN_MEMORY) else {})):
        session.connect(cpus=max(2 * high, os.cpu_count() or 1))  # one for each process
    if replicas is None and not session.started_here():
        high = _half(sum(machine.cpus for machine in session.machines()))
    gpus = 0 if address.endswith(segmenter.ONNX) else placement.gpu_slots(session.machines())
    _check_resources(low, gpus)
    settings = ServeSettings(
        checkpoint=address,
        min_replicas=low,
        max_replicas=min(high, gpus) if gpus else high,
        network_gpus=1.0 if gpus else 0.0,
        max_request_mib=max_request_mib,
        require_token=hashed is not None,
        token_sha256=hashed,
    )
    with log_levels({"ray.serve": logging.WARNING}):
        if not session.started_here() and serve.status().proxies:
            raise UserError("Ray Serve already runs on this cluster; use `serve deploy`, or stop it there first")
        try:
            _start(settings, host, port)
            console.print(f"ready after {time.monotonic() - began:.0f} s; {_address(host, port, token)}", markup=False)
            threading.Event().wait()
        finally:
            serve.shutdown()


def _check_access(host: str, token: str | None) -> None:
    """UserError if anyone could use the service, or run code through Ray's ports."""
    if host not in LOOPBACK_NAMES and not token:
        raise UserError(
            f"--host {host} is reachable from other machines: set {TOKEN_VARIABLE} first, such as to the output of "
            "`openssl rand -hex 32`"
        )
    if os.environ.get("RAY_AUTH_MODE", "token") != "token":
        raise UserError(
            "RAY_AUTH_MODE switches Ray's token off; processes of Ray Serve listen on all interfaces and unpickle what "
            "they receive, so anyone could run code here: unset RAY_AUTH_MODE"
        )


def _address(host: str, port: int, token: str | None) -> str:
    """Where the page is, and a request as an example."""
    shown = socket.gethostname() if host in ANY_ADDRESS else f"[{host}]" if ":" in host else host
    url, access = f"http://{shown}:{port}", f"with the token in {TOKEN_VARIABLE}" if token else "on this machine"
    header = f'-H "Authorization: Bearer ${TOKEN_VARIABLE}" ' if token else ""
    return f"open {url} {access}\n    curl {header}-F file=@IMAGE.tif {url}/segment"


def _half(cpus: float) -> int:
    """Processes with the network if as many processes find the cells."""
    return max(1, int(cpus // 2))


def _check_resources(processes: int, gpus: int) -> None:
    """UserError if the GPUs do not suffice; a message if Ray will wait for CPUs."""
    if 0 < gpus < processes:
        raise UserError(f"--replicas {processes}: there are {gpus} GPUs, one for each process with the network")
    cpus = sum(machine.cpus for machine in session.machines())
    if cpus < 2 * processes:
        console.print(f"there are {cpus:g} CPUs, {2 * processes} processes need one each: waiting for more machines")


def _start(settings: ServeSettings, host: str, port: int) -> None:
    count = settings.min_replicas
    console.print(f"starting {count} process{'es' * (count > 1)} with the network, and as many that find the cells")
    serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=HTTPOptions(host=host, port=port))
    try:
        serve.run(application.build(settings), name=application.NAME, route_prefix="/")
    except RuntimeError as error:  # Serve's only error of a deployment that fails, with its traceback as text
        last = str(error).strip().splitlines()[-1]
        raise UserError(
            f"the service does not start: {last[:300]}; every machine must be able to read {settings.checkpoint}"
        ) from error


def _check_port(host: str, port: int) -> None:
    """UserError if nothing can listen on `host` and `port`."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {host}:{port}: {error}; choose another --port or --host") from error
