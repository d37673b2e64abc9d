"""A wrong RAY_ADDRESS is reported within seconds, without starting Ray."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from raylivecell.core.errors import UserError
from raylivecell.runtime import cluster_address

SETTINGS = bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))


@contextlib.contextmanager
def server(answer: bytes | None) -> Iterator[int]:
    """Port of a server that sends `answer` to each connection; None: it accepts connections but sends nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    connections.append(connection)
                    if answer is not None:
                        connection.recv(1000)
                        connection.sendall(answer)
                        connection.close()

        connections: list[socket.socket] = []
        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]
        for connection in connections:
            connection.close()


@pytest.fixture(autouse=True)
def short_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_address, "TIMEOUT_S", 0.2)


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (SETTINGS, None),
        (None, "no answer within 0.2 s"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "speaks HTTP"),
        (b"SSH-2.0-x\r\n", "another program listens on that port"),
        (b"", "another program listens on that port"),
    ],
)
@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_server_that_is_not_ray_is_reported(answer: bytes | None, problem: str | None, scheme: str) -> None:
    with server(answer) as port:
        address = f"{scheme}127.0.0.1:{port}"
        if problem is None:
            cluster_address.check(address)
            return
        with pytest.raises(UserError, match=f"RAY_ADDRESS={address}: .*{problem}.*; give RAY_ADDRESS=HOST:6379"):
            cluster_address.check(address)


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("http://head:8265", "is the address of a dashboard"),
        ("https://head:8265", "is the address of a dashboard"),
        ("redis://head:6379", "is not an address of Ray"),
        ("head", "has no valid host and port"),
        ("head:", "has no valid host and port"),
        (":6379", "has no valid host and port"),
        ("head:65536", "has no valid host and port"),
        ("head.invalid:6379", "Ray does not answer"),
        (f"{'h' * 70}:6379", "Ray does not answer"),
        ("127.0.0.1:1", "refused"),
        ("ray://127.0.0.1:1", "refused"),
        ("[::1]:1", "Ray does not answer"),
    ],
)
def test_an_invalid_address_is_reported(address: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem) as raised:
        cluster_address.check(address)
    assert address in str(raised.value)


def test_a_stale_record_of_a_cluster_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    cluster_address.check("auto")  # left to Ray
    record = tmp_path / "ray" / "ray_current_cluster"
    record.parent.mkdir()
    record.write_text("127.0.0.1:1\n")
    with pytest.raises(UserError, match=f"127.0.0.1:1 in {record}"):
        cluster_address.check("auto")
    with server(SETTINGS) as port:
        record.write_text(f"127.0.0.1:{port}")
        cluster_address.check("auto")
