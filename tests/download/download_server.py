"""An HTTP server on 127.0.0.1 that cuts, misreports, changes or refuses files; fixtures of the download tests.

PYTEST_DONT_REWRITE: test modules import it before they name it as a plugin.
"""

import hashlib
import io
import json
import os
import random
import re
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from raylivecell.download import fetch as fetching
from raylivecell.download.livecell import download

TRAIN = "annotations/LIVECell/livecell_coco_train.json"
GARBAGE = b"x" * 500
BLOCK = 1 << 16
"""Bytes per read in these tests: files of 200 kB then have four blocks."""
Answer = Callable[["Handler", bytes], None]


class Handler(BaseHTTPRequestHandler):
    """Sends the next answer of the server's script, then correct answers."""

    server: "Server"

    def log_message(self, *args: Any) -> None:
        pass

    def requested_file(self) -> bytes | None:
        path = re.sub(r"^http://[^/]+", "", self.path)
        self.server.requests.append((self.command, self.path, dict(self.headers)))
        return self.server.files.get(path.lstrip("/"))

    def do_HEAD(self) -> None:
        body = self.requested_file()
        if body is None:
            self.send_error(404)
            return
        self.send_head(200, len(body))

    def do_GET(self) -> None:
        body = self.requested_file()
        if body is None:
            self.send_error(404)
            return
        answer = self.server.script.pop(0) if self.server.script else send_file
        answer(self, body)

    def send_head(self, status: int, length: int | None, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**self.server.headers, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {TRAIN: annotations()}
        self.script: list[Answer] = []
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.headers: dict[str, str] = {"ETag": '"one"'}
        self.release = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def ranges(self) -> list[str | None]:
        return [headers.get("Range") for method, _, headers in self.requests if method == "GET"]

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients close the connection on a wrong answer


def requested_start(handler: Handler) -> int | None:
    """The first byte of a Range request whose If-Range matches; None if the complete file must be sent."""
    match = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
    is_current = handler.headers.get("If-Range", "") == handler.server.headers.get("ETag")
    return int(match[1]) if match and is_current else None


def send_file(handler: Handler, body: bytes, limit: int | None = None) -> None:
    """Send the requested bytes, at most `limit`."""
    start = requested_start(handler)
    if start is None:
        handler.send_head(200, len(body))
        handler.wfile.write(body[:limit])
    elif start >= len(body):
        handler.send_head(416, 0, Content_Range=f"bytes */{len(body)}")
    else:
        handler.send_head(206, len(body) - start, Content_Range=f"bytes {start}-{len(body) - 1}/{len(body)}")
        handler.wfile.write(body[start:][:limit])


def cut(limit: int) -> Answer:
    return lambda handler, body: send_file(handler, body, limit)


def status(code: int, **headers: str) -> Answer:
    return lambda handler, body: handler.send_head(code, 0, **headers)


def ignore_range(limit: int | None = None) -> Answer:
    def answer(handler: Handler, body: bytes) -> None:
        handler.send_head(200, len(body))
        handler.wfile.write(body[:limit])

    return answer


def wrong_length(difference: int) -> Answer:
    def answer(handler: Handler, body: bytes) -> None:
        handler.send_head(200, len(body) + difference)
        handler.wfile.write(body)

    return answer


def partial_content(content_range: str, body: bytes, length: int | None = None) -> Answer:
    def answer(handler: Handler, _: bytes) -> None:
        handler.send_head(206, length, Content_Range=content_range)
        handler.wfile.write(body)

    return answer


def send_rest(handler: Handler, body: bytes, total: int, start: int = 70_000) -> None:
    partial_content(f"bytes {start}-{total - 1}/{total}", body)(handler, body)


def chunked(parts: int, complete: bool = True) -> Answer:
    def answer(handler: Handler, body: bytes) -> None:
        handler.protocol_version = "HTTP/1.1"
        handler.send_head(200, None, Transfer_Encoding="chunked", Connection="close")
        size = -(-len(body) // parts)
        for i in range(parts if complete else parts - 1):
            part = body[i * size : (i + 1) * size]
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
        handler.wfile.write(b"0\r\n\r\n" if complete else b"")
        handler.close_connection = True

    return answer


def stall_after(size: int, stalled: threading.Event) -> Answer:
    """Send `size` bytes, then keep the connection open without sending more."""

    def answer(handler: Handler, body: bytes) -> None:
        handler.send_head(200, len(body))
        handler.wfile.write(body[:size])
        handler.wfile.flush()
        stalled.set()
        handler.server.release.wait(60)

    return answer


def change_to(etag: str, body: bytes, then: Answer = send_file) -> Answer:
    """Replace the file on the server, then answer."""

    def answer(handler: Handler, _: bytes) -> None:
        handler.server.headers = {**handler.server.headers, "ETag": etag}
        handler.server.files[TRAIN] = body
        then(handler, body)

    return answer


def s3_headers(body: bytes, etag: str | None = None, **headers: str) -> dict[str, str]:
    return {"ETag": f'"{etag or hashlib.md5(body).hexdigest()}"', "x-amz-request-id": "7", **headers}


def annotations(seed: int = 0, records: int = 3000) -> bytes:
    """About 200 kB of JSON: more than three blocks."""
    rng = random.Random(seed)
    polygons = [[rng.randrange(5200) / 10 for _ in range(12)] for _ in range(records)]
    return json.dumps({"images": [], "annotations": [{"id": i, "s": [p]} for i, p in enumerate(polygons)]}).encode()


def make_zip(names: list[str], add: Callable[[zipfile.ZipFile], None] = lambda archive: None) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, (name * 50).encode())
        add(archive)
    return stream.getvalue()


@pytest.fixture
def server(sleeps: list[float], monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    instance = Server()
    thread = threading.Thread(target=instance.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield instance
    instance.release.set()
    instance.shutdown()
    thread.join()
    instance.server_close()


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The arguments of all calls of `time.sleep`, which do not wait; four attempts, blocks of 64 KiB."""
    seconds: list[float] = []
    monkeypatch.setattr("time.sleep", seconds.append)
    monkeypatch.setattr(fetching, "ATTEMPTS", 4)
    monkeypatch.setattr(fetching, "BLOCK", BLOCK)
    return seconds


def fetch_train(server: Server, out: Path, **options: Any) -> dict[str, Any]:
    return download(out, ("train",), server.url, **options)


def assert_complete(server: Server, out: Path) -> None:
    """The correct bytes have the final name and a record; no other file remains."""
    body = server.files[TRAIN]
    assert (out / TRAIN).read_bytes() == body
    entry = json.loads((out / "download.json").read_bytes())["files"][TRAIN]
    assert (entry["bytes"], entry["sha256"]) == (len(body), hashlib.sha256(body).hexdigest())
    assert entry["url"].endswith(TRAIN)
    assert [path.name for path in (out / TRAIN).parent.iterdir()] == [Path(TRAIN).name]


def assert_unpublished(out: Path) -> None:
    """No file has a final name, a name that a reader would use, or a record."""
    files = [path for path in out.rglob("*") if path.is_file()]
    assert all(path.name.endswith((".partial", ".partial.note")) for path in files), files
    assert not [path for path in files if path.suffix in (".json", ".zip", ".tif")]
