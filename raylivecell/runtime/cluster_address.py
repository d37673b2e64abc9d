"""Check the address of a Ray cluster within seconds; Ray itself waits for over 400 s if nothing answers.

A cluster has two addresses: HOST:6379 (GCS) and ray://HOST:10001 (client server). Both speak gRPC over HTTP/2, whose
servers begin each connection with a SETTINGS frame, so a port that is open but silent is detected too.
"""

import os
import socket
import sys
import tempfile
import threading
from pathlib import Path

from raylivecell.core.errors import UserError

TIMEOUT_S = 5.0
CLIENT_PORT = 10001
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))  # RFC 9113, 3.4: an empty SETTINGS
FRAME_HEAD = 9
SETTINGS = 4
NOT_RAY = "another program listens on that port"
FIX = "give RAY_ADDRESS=HOST:6379 of a running cluster, or unset it to start Ray on this machine"


def check(address: str) -> None:
    """Check that Ray answers at `address`, a value of RAY_ADDRESS: HOST:PORT, ray://HOST:PORT or auto.

    Raises:
        UserError: nothing answers within TIMEOUT_S, or the address is invalid.
    """
    source = f"RAY_ADDRESS={address}"
    if address == "auto":
        file = _recorded_address()
        if not file.is_file():
            return  # Ray searches for its processes on this machine, and fails at once if none runs
        address = file.read_text().strip()
        source += f" ({address} in {file})"
    scheme, separator, rest = address.rpartition("://")
    if scheme in ("http", "https"):
        raise UserError(f"{source} is the address of a dashboard, which only `submit` uses; {FIX}")
    if separator and scheme != "ray":
        raise UserError(f"{source} is not an address of Ray; {FIX}")
    host, port = _host_and_port(rest if scheme or ":" in rest else "", CLIENT_PORT if scheme else None, source)
    if problem := _connection_problem(
        TIMEOUT_S, host, port, speaks_grpc=os.environ.get("RAY_USE_TLS", "0") in ("", "0")
    ):
        raise UserError(f"Ray does not answer at {source}: {problem}; {FIX}")


def check_listening(url: str) -> None:
    """Check that something accepts connections at `url`, http://HOST:PORT; UserError if nothing does."""
    scheme, _, rest = url.rpartition("://")
    host, port = _host_and_port(rest.partition("/")[0], 443 if scheme == "https" else 80, url)
    if problem := _connection_problem(TIMEOUT_S, host, port, speaks_grpc=False):
        raise UserError(f"no job API at {url}: {problem}; give --address http://HOST:8265 of a running cluster")


def _recorded_address() -> Path:
    """File in which `ray start` records the address of this machine's cluster; Ray never deletes a stale one."""
    folder = os.environ.get("RAY_TMPDIR")
    if folder is None and sys.platform.startswith("linux"):
        folder = os.environ.get("TMPDIR", "/tmp")
    return Path(folder or tempfile.gettempdir(), "ray", "ray_current_cluster")


def _host_and_port(text: str, default: int | None, source: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon and default is not None:
        host, port = text, str(default)
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"{source} has no valid host and port; {FIX}")
    return host.strip("[]"), int(port)


def _connection_problem(seconds: float, host: str, port: int, speaks_grpc: bool) -> str:
    """Describe the problem of the connection to `host`:`port`; "" if the server answers.

    Runs in a thread, because a name lookup has no time limit and would delay signals.
    """
    problems: list[str] = []
    thread = threading.Thread(
        target=lambda: problems.append(_handshake_problem(seconds, host, port, speaks_grpc)), daemon=True
    )
    thread.start()
    thread.join(seconds + 1)
    return problems[0] if problems else f"no answer within {seconds:g} s"


def _handshake_problem(seconds: float, host: str, port: int, speaks_grpc: bool) -> str:
    try:
        with socket.create_connection((host, port), seconds) as connection:
            if not speaks_grpc:
                return ""
            connection.sendall(PREFACE)
            head = b""
            while len(head) < FRAME_HEAD:
                part = connection.recv(FRAME_HEAD - len(head))
                if not part:
                    break
                head += part
    except TimeoutError:
        return f"no answer within {seconds:g} s"
    except (ConnectionResetError, BrokenPipeError):
        return NOT_RAY
    except (OSError, UnicodeError) as error:  # UnicodeError: not a valid host name
        return str(error)
    if head.startswith(b"HTTP/"):
        return "that port speaks HTTP, as a dashboard does"
    return "" if len(head) == FRAME_HEAD and head[3] == SETTINGS else NOT_RAY
