"""`download` against a server on 127.0.0.1 that does what servers do: cuts, lies, changes its mind, refuses."""

import errno
import hashlib
import http.client
import io
import json
import os
import random
import re
import signal
import stat
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from raylivecell.core.errors import UserError
from raylivecell.data import image_names, sources
from raylivecell.download import archive, web
from raylivecell.download import fetch as fetching
from raylivecell.download import livecell as module
from raylivecell.download.fetch import Damaged, Retry
from raylivecell.download.livecell import download

TRAIN = "annotations/LIVECell/livecell_coco_train.json"
Answer = Callable[["Handler", bytes], None]


class Handler(BaseHTTPRequestHandler):
    """Answers with the next item of the server's script, then as a good server does."""

    server: "Server"

    def log_message(self, *args: Any) -> None:
        pass

    def body(self) -> bytes | None:
        path = re.sub(r"^http://[^/]+", "", self.path)
        self.server.seen.append((self.command, self.path, dict(self.headers)))
        return self.server.files.get(path.lstrip("/"))

    def do_HEAD(self) -> None:
        body = self.body()
        if body is None:
            self.send_error(404)
            return
        self.head(200, len(body))

    def do_GET(self) -> None:
        body = self.body()
        if body is None:
            self.send_error(404)
            return
        (self.server.script.pop(0) if self.server.script else good)(self, body)

    def head(self, status: int, length: int | None, **headers: str) -> None:
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
        self.files: dict[str, bytes] = {}
        self.script: list[Answer] = []
        self.seen: list[tuple[str, str, dict[str, str]]] = []
        self.headers: dict[str, str] = {"ETag": '"one"'}
        self.release = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def ranges(self) -> list[str | None]:
        return [headers.get("Range") for method, _, headers in self.seen if method == "GET"]

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that hangs up on a liar is no news


def start_of(handler: Handler, body: bytes) -> int | None:
    """The first byte asked for by a Range whose If-Range holds; None where the whole is due."""
    asked = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
    held = handler.headers.get("If-Range", "") == handler.server.headers.get("ETag")
    return int(asked[1]) if asked and held else None


def send(handler: Handler, body: bytes, most: int | None = None) -> None:
    start = start_of(handler, body)
    if start is None:
        handler.head(200, len(body))
        handler.wfile.write(body[:most])
    elif start >= len(body):
        handler.head(416, 0, Content_Range=f"bytes */{len(body)}")
    else:
        handler.head(206, len(body) - start, Content_Range=f"bytes {start}-{len(body) - 1}/{len(body)}")
        handler.wfile.write(body[start:][:most])


def good(handler: Handler, body: bytes) -> None:
    send(handler, body)


def cut(most: int) -> Answer:
    return lambda handler, body: send(handler, body, most)


def status(code: int, **headers: str) -> Answer:
    return lambda handler, body: handler.head(code, 0, **headers)


def ignore_range(most: int | None = None) -> Answer:
    def answer(handler: Handler, body: bytes) -> None:
        handler.head(200, len(body))
        handler.wfile.write(body[:most])

    return answer


def says_length(change: int) -> Answer:
    def answer(handler: Handler, body: bytes) -> None:
        handler.head(200, len(body) + change)
        handler.wfile.write(body)

    return answer


def partial_content(content_range: str, body: bytes, length: int | None = None) -> Answer:
    def answer(handler: Handler, _: bytes) -> None:
        handler.head(206, length, Content_Range=content_range)
        handler.wfile.write(body)

    return answer


def rest(handler: Handler, body: bytes, total: int, start: int = 70_000) -> None:
    partial_content(f"bytes {start}-{total - 1}/{total}", body)(handler, body)


def chunked(parts: int, end: bool = True) -> Answer:
    def answer(handler: Handler, body: bytes) -> None:
        handler.protocol_version = "HTTP/1.1"
        handler.head(200, None, Transfer_Encoding="chunked", Connection="close")
        size = -(-len(body) // parts)
        for i in range(parts if end else parts - 1):
            part = body[i * size : (i + 1) * size]
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
        handler.wfile.write(b"0\r\n\r\n" if end else b"")
        handler.close_connection = True

    return answer


def changes_to(etag: str, body: bytes, then: Answer = good) -> Answer:
    """From now on the server has another file."""

    def answer(handler: Handler, _: bytes) -> None:
        handler.server.headers = {**handler.server.headers, "ETag": etag}
        handler.server.files[TRAIN] = body
        then(handler, body)

    return answer


def annotations(seed: int = 0, records: int = 3000) -> bytes:
    """About 200 kB of JSON: more than three blocks of a download."""
    rng = random.Random(seed)
    polygons = [[rng.randrange(5200) / 10 for _ in range(12)] for _ in range(records)]
    return json.dumps({"images": [], "annotations": [{"id": i, "s": [p]} for i, p in enumerate(polygons)]}).encode()


def zipped(names: list[str], extra: Callable[[zipfile.ZipFile], None] = lambda archive: None) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in names:
            packed.writestr(name, (name * 50).encode())
        extra(packed)
    return stream.getvalue()


IMAGES = [
    "images/livecell_train_val_images/A172/A172_Phase_C7_1_00d00h00m_1.tif",
    "images/livecell_train_val_images/BV2/BV2_Phase_C4_1_00d00h00m_1.tif",
    "images/livecell_test_images/A172_Phase_C7_1_00d04h00m_1.tif",
]


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    running.files[TRAIN] = annotations()
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield running
    running.release.set()
    running.shutdown()
    thread.join()
    running.server_close()


class Waits(list[float]):
    """What sleep was asked for; sleeps not."""

    @property
    def retry(self) -> Retry:
        return Retry(attempts=4, sleep=self.append)


@pytest.fixture
def waits() -> Waits:
    return Waits()


def get(server: Server, out: Path, waits: Waits, **options: Any) -> dict[str, Any]:
    return download(out, ("train",), server.url, retry=waits.retry, **options)


def assert_whole(server: Server, out: Path) -> None:
    """The right bytes under the final name, recorded, and nothing else."""
    body = server.files[TRAIN]
    assert (out / TRAIN).read_bytes() == body
    entry = json.loads((out / "download.json").read_bytes())["files"][TRAIN]
    assert (entry["bytes"], entry["sha256"]) == (len(body), hashlib.sha256(body).hexdigest())
    assert entry["url"].endswith(TRAIN)
    assert [path.name for path in (out / TRAIN).parent.iterdir()] == [Path(TRAIN).name]


def assert_nothing(out: Path) -> None:
    """No file under the final name, none that a reader would take for one, none recorded."""
    found = [path for path in out.rglob("*") if path.is_file()]
    assert all(path.name.endswith((".partial", ".partial.note")) for path in found), found
    assert not [path for path in found if path.suffix in (".json", ".zip", ".tif")]


def test_a_plain_download(server: Server, tmp_path: Path, waits: Waits, capsys: pytest.CaptureFixture) -> None:
    record = get(server, tmp_path, waits)
    assert_whole(server, tmp_path)
    assert record["licence"] == "CC BY-NC 4.0"
    assert "CC BY-NC 4.0" in capsys.readouterr().err
    assert waits == []
    assert len(server.seen) == 1
    get(server, tmp_path, waits)
    assert len(server.seen) == 1, "a whole file was asked for again"
    assert "there already, verified" in capsys.readouterr().err


GARBAGE = b"x" * 500
ENDINGS_WELL: dict[str, tuple[list[Answer], list[str | None]]] = {
    "cut at the first byte": ([cut(0)], [None, None]),
    "cut thrice": ([cut(70_000), cut(1), cut(65_536)], [None, "70000", "70001", "135537"]),
    "range ignored": ([cut(70_000), ignore_range()], [None, "70000"]),
    "range ignored and cut": ([cut(70_000), ignore_range(66_000)], [None, "70000", "66000"]),
    "503, 429 and 500": ([status(503), status(429), status(500)], [None] * 4),
    "503 in the middle": ([cut(70_000), status(503)], [None, "70000", "70000"]),
    "416 to a good range": ([cut(70_000), status(416, Content_Range="bytes */9")], [None, "70000", None]),
    "416 without a range": ([cut(70_000), status(416)], [None, "70000", None]),
    "416 to a plain request": ([status(416)], [None, None]),
    "other bytes than asked for": (
        [cut(70_000), lambda h, b: rest(h, b[70_000:].replace(b"1", b"2"), len(b), start=69_999)],
        [None, "70000", None],
    ),
    "206 of a file of another length": (
        [cut(70_000), partial_content("bytes 70000-70499/70500", GARBAGE, 500)],
        [None, "70000", None],
    ),
    "206 with nothing in it": ([cut(70_000), partial_content("bytes 70000-79999/*", b"", 0)], [None, "70000", "70000"]),
    "206 backwards": ([cut(70_000), partial_content("bytes 70000-69999/*", GARBAGE)], [None, "70000", None]),
    "206 with no Content-Range": ([cut(70_000), partial_content("", GARBAGE)], [None, "70000", None]),
    "206 to a plain request": ([partial_content("bytes 0-499/500", GARBAGE)], [None, None]),
    "206 with more than announced": (
        [cut(70_000), lambda h, b: rest(h, b[70_000:] + b" " * 500, len(b))],
        [None, "70000", None],
    ),
    "206 beyond the end of the file": (
        [
            cut(70_000),
            lambda h, b: partial_content(f"bytes 70000-{len(b) + 499}/{len(b)}", b[70_000:] + b" " * 500)(h, b),
        ],
        [None, "70000", None],
    ),
    "206 in two parts": (
        [cut(70_000), lambda h, b: partial_content(f"bytes 70000-89999/{len(b)}", b[70_000:90_000], 20_000)(h, b)],
        [None, "70000", "90000"],
    ),
    "length overstated once": ([says_length(+1000)], None),
    "length understated once": ([says_length(-1000)], [None, None]),
    "changed between requests": (
        [cut(70_000), changes_to('"two"', annotations(1))],
        [None, "70000"],
    ),
    "changed, and the server does not heed If-Range": (
        [
            cut(70_000),
            changes_to(
                '"two"',
                annotations(1),
                lambda h, b: rest(h, b[70_000:], len(b)),
            ),
        ],
        [None, "70000", None],
    ),
    "chunked": ([chunked(5)], [None]),
    "chunked and cut": ([chunked(5, end=False)], None),
}


@pytest.mark.parametrize("case", ENDINGS_WELL)
def test_ends_with_the_right_bytes(case: str, server: Server, tmp_path: Path, waits: Waits) -> None:
    script, ranges = ENDINGS_WELL[case]
    server.script = list(script)
    get(server, tmp_path, waits)
    assert_whole(server, tmp_path)
    assert server.script == []
    if ranges is not None:
        assert server.ranges() == [start if start is None else f"bytes={start}-" for start in ranges]


@pytest.mark.parametrize("seed", range(25))
def test_any_order_of_mishaps(seed: int, server: Server, tmp_path: Path, waits: Waits) -> None:
    """Right bytes of one version of the file, or a clear error with nothing under the final name."""
    rng = random.Random(seed)
    bodies = [annotations(number, rng.randrange(1, 3000)) for number in range(3)]
    server.files[TRAIN] = bodies[0]
    for _ in range(rng.randrange(1, 8)):
        at, number = rng.randrange(250_000), rng.randrange(3)
        server.script.append(
            rng.choice(
                [
                    cut(at),
                    ignore_range(at),
                    status(503),
                    status(416, Content_Range=f"bytes */{at}"),
                    says_length(rng.randrange(-50, 50)),
                    changes_to(f'"{number}"', bodies[number], cut(at)),
                    chunked(3, end=False),
                    partial_content(f"bytes {at}-{at + 499}/{at + 500}", GARBAGE),
                ]
            )
        )
    try:
        get(server, tmp_path, waits)
    except UserError:
        assert_nothing(tmp_path)
        server.script = []
        get(server, tmp_path, waits)
    assert_whole(server, tmp_path)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (cut(0), "ended at byte 0"),
        (says_length(+1000), "4 times in a row"),
        (says_length(-1000), "cut short, twice"),
        (status(503), "HTTP 503"),
        (status(403), "HTTP 403"),
        (status(204), "answered 204"),
        (status(416), "416"),
        (lambda h, b: h.head(200, len(b), Content_Encoding="gzip"), "is sent as gzip"),
        (status(302, Location="ftp://127.0.0.1/x"), "redirects to ftp:"),
        (lambda h, b: h.wfile.write(b"no HTTP at all\r\n\r\n"), "no answer"),
    ],
)
def test_a_server_that_never_mends(answer: Answer, message: str, server: Server, tmp_path: Path, waits: Waits) -> None:
    server.script = [answer] * 100
    with pytest.raises(UserError, match=message) as caught:
        get(server, tmp_path, waits)
    assert "\n" not in str(caught.value)
    assert_nothing(tmp_path)
    assert len(server.seen) <= 8


def test_not_found_is_not_asked_for_twice(server: Server, tmp_path: Path, waits: Waits) -> None:
    with pytest.raises(UserError, match=r"livecell_coco_val\.json: HTTP 404 .*--base-url"):
        download(tmp_path, ("val",), server.url, retry=waits.retry)
    assert len(server.seen) == 1
    assert_nothing(tmp_path)


def test_no_server(server: Server, tmp_path: Path, waits: Waits) -> None:
    url = server.url
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match=r"Connection refused.*check the network and the proxy"):
        download(tmp_path, ("train",), url, retry=waits.retry)
    assert waits == [1, 2, 4]
    assert_nothing(tmp_path)


def test_a_silent_server(server: Server, tmp_path: Path, waits: Waits, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that stays open and says nothing counts as broken when its time is over."""
    read, calls = http.client.HTTPResponse.read, []

    def silent_once(response: http.client.HTTPResponse, amount: int) -> bytes:
        calls.append(response.fp and response.fp.raw._sock.gettimeout())
        if len(calls) == 2:
            raise TimeoutError("timed out")
        return read(response, amount)

    monkeypatch.setattr(http.client.HTTPResponse, "read", silent_once)
    get(server, tmp_path, waits)
    assert_whole(server, tmp_path)
    assert server.ranges() == [None, f"bytes={web.BLOCK}-"], "the whole block that came was not kept"
    assert calls[0] == web.TIMEOUT_S
    assert waits == [1]


def test_waits_as_long_as_told(server: Server, tmp_path: Path, waits: Waits) -> None:
    past = "Wed, 21 Oct 2015 07:28:00 GMT"
    server.script = [status(503, Retry_After="7"), status(429, Retry_After=past), status(503, Retry_After="99999")]
    get(server, tmp_path, waits)
    assert waits == [7, 0, web.LONGEST_WAIT_S]
    assert_whole(server, tmp_path)


def test_gives_up_only_without_progress(server: Server, tmp_path: Path, waits: Waits) -> None:
    """40 broken connections in a row are no reason to stop while each brings bytes."""
    server.script = [cut(1000)] * 40
    get(server, tmp_path, waits)
    assert_whole(server, tmp_path)
    assert set(waits) == {1}


def test_a_later_run_goes_on(server: Server, tmp_path: Path, waits: Waits) -> None:
    server.script = [cut(70_000), *[status(503)] * 4]
    with pytest.raises(UserError, match="goes on from byte 70000"):
        get(server, tmp_path, waits)
    assert_nothing(tmp_path)
    get(server, tmp_path, waits)
    assert server.ranges()[-1] == "bytes=70000-"
    assert_whole(server, tmp_path)


@pytest.mark.parametrize("note", [b"", b"{}", b'{"url": 3}', None])
def test_a_partial_file_without_its_note_starts_over(
    note: bytes | None, server: Server, tmp_path: Path, waits: Waits
) -> None:
    partial = fetching.partial_of(tmp_path / TRAIN)
    partial.parent.mkdir(parents=True)
    partial.write_bytes(GARBAGE)
    if note is not None:
        fetching.note_of(partial).write_bytes(note)
    get(server, tmp_path, waits)
    assert server.ranges() == [None]
    assert_whole(server, tmp_path)


@pytest.mark.parametrize("etag", [None, 'W/"one"'])
def test_no_strong_etag_no_resume(etag: str | None, server: Server, tmp_path: Path, waits: Waits) -> None:
    server.headers = {} if etag is None else {"ETag": etag}
    server.script = [cut(70_000)]
    get(server, tmp_path, waits)
    assert server.ranges() == [None, None]
    assert_whole(server, tmp_path)


def test_partial_longer_than_the_file(server: Server, tmp_path: Path, waits: Waits) -> None:
    """A note that does not know the length, and more bytes than the server has: 416, then from the first byte."""
    partial = fetching.partial_of(tmp_path / TRAIN)
    partial.parent.mkdir(parents=True)
    partial.write_bytes(server.files[TRAIN] + b"}")
    note = web.Note(url=f"{server.url}/{TRAIN}", length=None, etag='"one"', md5=None)
    fetching.note_of(partial).write_text(note.model_dump_json())
    get(server, tmp_path, waits)
    assert server.ranges()[1:] == [None]
    assert_whole(server, tmp_path)


@pytest.mark.parametrize("length_known", [False, True])
def test_partial_as_long_as_the_file(length_known: bool, server: Server, tmp_path: Path, waits: Waits) -> None:
    """Killed between the last byte and the name: verified and named, not fetched again."""
    body = server.files[TRAIN]
    partial = fetching.partial_of(tmp_path / TRAIN)
    partial.parent.mkdir(parents=True)
    partial.write_bytes(body)
    length = len(body) if length_known else None
    note = web.Note(url=f"{server.url}/{TRAIN}", length=length, etag='"one"', md5=None)
    fetching.note_of(partial).write_text(note.model_dump_json())
    get(server, tmp_path, waits)
    assert server.ranges() == ([] if length_known else [f"bytes={len(body)}-"])
    assert_whole(server, tmp_path)


def amazon(body: bytes, etag: str | None = None, **headers: str) -> dict[str, str]:
    return {"ETag": f'"{etag or hashlib.md5(body).hexdigest()}"', "x-amz-request-id": "7", **headers}


def test_md5_etag_is_a_checksum(server: Server, tmp_path: Path, waits: Waits) -> None:
    body = server.files[TRAIN]
    server.headers = amazon(body)
    damaged = body.replace(b"1", b"2", 1)
    server.script = [lambda handler, _: send(handler, damaged)]
    record = get(server, tmp_path, waits)
    assert len(server.seen) == 2
    assert record["files"][TRAIN]["etag_is_md5"]
    assert_whole(server, tmp_path)


def test_wrong_md5_twice(server: Server, tmp_path: Path, waits: Waits) -> None:
    server.headers = amazon(b"other bytes")
    with pytest.raises(UserError, match=r"MD5 is .* ETag says .*, twice"):
        get(server, tmp_path, waits)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    "headers",
    [
        amazon(b"", etag="0" * 32 + "-17"),
        amazon(b"", etag="0" * 32, **{"x-amz-server-side-encryption": "aws:kms"}),
        {"ETag": '"' + "0" * 32 + '"'},
    ],
    ids=["several pieces", "encrypted by KMS", "not S3"],
)
def test_other_etags_are_no_checksum(
    headers: dict[str, str], server: Server, tmp_path: Path, waits: Waits, capsys: pytest.CaptureFixture
) -> None:
    server.headers = headers
    record = get(server, tmp_path, waits)
    assert not record["files"][TRAIN]["etag_is_md5"]
    assert "the server gives no checksum" in capsys.readouterr().err
    assert_whole(server, tmp_path)


def test_what_the_user_knows(server: Server, tmp_path: Path, waits: Waits) -> None:
    body = server.files[TRAIN]
    name, right = Path(TRAIN).name, hashlib.sha256(body).hexdigest()
    with pytest.raises(UserError, match=f"is {len(body)} bytes long, not 5"):
        get(server, tmp_path / "a", waits, size=[f"{name}=5"])
    assert_nothing(tmp_path / "a")
    with pytest.raises(UserError, match=f"--sha256 is {right}, not 0000"):
        get(server, tmp_path / "b", waits, sha256=[f"{name}={'0' * 64}"])
    assert_nothing(tmp_path / "b")
    asked = len(server.seen)
    for _ in range(2):
        get(server, tmp_path / "b", waits, sha256=[f"{name}={right.upper()}"], size=[f"{TRAIN}={len(body)}"])
    assert len(server.seen) == asked, "a mistyped checksum costs no second download"
    assert_whole(server, tmp_path / "b")
    with pytest.raises(UserError, match="as it was fetched, not what you give"):
        get(server, tmp_path / "b", waits, sha256=[f"{name}={'0' * 64}"])
    assert_whole(server, tmp_path / "b")


@pytest.mark.parametrize(
    "options",
    [
        {"sha256": ["livecell_coco_train.json=abc"]},
        {"sha256": ["elsewhere.json=" + "0" * 64]},
        {"sha256": ["0" * 64]},
        {"size": ["livecell_coco_train.json=-1"]},
        {"base_url": "file:///etc"},
        {"base_url": "livecell"},
    ],
)
def test_mistaken_options(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--(sha256|size|base-url) "):
        download(tmp_path / "out", ("train",), **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"[" + b[1:]], ids=["shorter", "one byte differs"])
def test_a_file_that_changed_here_is_fetched_again(
    damage: Callable[[bytes], bytes], server: Server, tmp_path: Path, waits: Waits, capsys: pytest.CaptureFixture
) -> None:
    get(server, tmp_path, waits)
    target = tmp_path / TRAIN
    damaged = damage(target.read_bytes())
    target.write_bytes(damaged)
    server.script = [status(404)]
    with pytest.raises(UserError, match="HTTP 404"):
        get(server, tmp_path, waits)
    assert not target.exists(), "a damaged file under the final name"
    assert "moved to livecell_coco_train.json.unverified" in capsys.readouterr().err
    get(server, tmp_path, waits)
    aside = target.with_name(target.name + ".unverified")
    assert aside.read_bytes() == damaged
    aside.unlink()
    assert_whole(server, tmp_path)


def test_a_copy_from_elsewhere_is_verified(server: Server, tmp_path: Path, waits: Waits) -> None:
    """A whole file without a record is kept; one of another length is moved aside, never lost."""
    target = tmp_path / TRAIN
    target.parent.mkdir(parents=True)
    target.write_bytes(server.files[TRAIN])
    get(server, tmp_path, waits)
    assert [method for method, _, _ in server.seen] == ["HEAD"]
    assert_whole(server, tmp_path)
    (tmp_path / "download.json").unlink()
    target.write_bytes(GARBAGE)
    get(server, tmp_path, waits)
    aside = target.with_name(target.name + ".unverified")
    assert aside.read_bytes() == GARBAGE
    aside.unlink()
    assert_whole(server, tmp_path)


def test_a_record_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "download.json").write_text('{"files": {"a": {}}}')
    with pytest.raises(UserError, match=r"download\.json is not what download writes; delete it"):
        download(tmp_path, ("train",), "http://127.0.0.1:9")


def test_disk_without_room(server: Server, tmp_path: Path, waits: Waits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "disk_usage", lambda path: type("Usage", (), {"free": fetching.SPARE_BYTES + 9}))
    with pytest.raises(UserError, match=r"needs 0\.00 GB more and the disk .* choose another --out"):
        get(server, tmp_path, waits)
    assert_nothing(tmp_path)


def test_disk_fills_up(server: Server, tmp_path: Path, waits: Waits, monkeypatch: pytest.MonkeyPatch) -> None:
    write = fetching._write

    def fails_late(stream: Any, block: bytes) -> None:
        if stream.tell() > 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(stream, block)

    with monkeypatch.context() as patched:
        patched.setattr(fetching, "_write", fails_late)
        with pytest.raises(UserError, match="No space left on device; what came is kept"):
            get(server, tmp_path, waits)
    assert_nothing(tmp_path)
    get(server, tmp_path, waits)
    assert server.ranges() == [None, f"bytes={web.BLOCK}-"]
    assert_whole(server, tmp_path)


def test_out_is_a_file(server: Server, tmp_path: Path, waits: Waits) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(UserError, match="cannot write"):
        get(server, tmp_path / "file", waits)
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_two_at_once(server: Server, tmp_path: Path, waits: Waits) -> None:
    (tmp_path / TRAIN).parent.mkdir(parents=True)
    with (
        fetching._open_alone(fetching.partial_of(tmp_path / TRAIN)),
        pytest.raises(UserError, match="another download is writing"),
    ):
        get(server, tmp_path, waits)
    get(server, tmp_path, waits)
    assert_whole(server, tmp_path)


def test_through_a_proxy(server: Server, tmp_path: Path, waits: Waits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.url)
    download(tmp_path, ("train",), "http://livecell.invalid", retry=waits.retry)
    assert server.seen[0][1] == f"http://livecell.invalid/{TRAIN}"
    assert_whole(server, tmp_path)


def test_killed_and_started_again(server: Server, tmp_path: Path, waits: Waits) -> None:
    arrived = threading.Event()

    def stalls(handler: Handler, body: bytes) -> None:
        handler.head(200, len(body))
        handler.wfile.write(body[: 2 * web.BLOCK])
        handler.wfile.flush()
        arrived.set()
        handler.server.release.wait(60)

    server.script = [stalls]
    code = "from pathlib import Path; from raylivecell.download.livecell import download; "
    code += f"download(Path({str(tmp_path)!r}), "
    process = subprocess.Popen([sys.executable, "-c", code + f"['train'], {server.url!r})"], stderr=subprocess.DEVNULL)
    assert arrived.wait(60)
    partial = fetching.partial_of(tmp_path / TRAIN)
    while not partial.exists() or partial.stat().st_size < web.BLOCK:
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert_nothing(tmp_path)
    get(server, tmp_path, waits)
    assert server.ranges()[1] in (f"bytes={web.BLOCK}-", f"bytes={2 * web.BLOCK}-")
    assert_whole(server, tmp_path)


def test_images_and_annotations_as_prepare_takes_them(server: Server, tmp_path: Path, waits: Waits) -> None:
    for split in ("val", "test"):
        server.files[TRAIN.replace("train", split)] = annotations(3)
    others = ["__MACOSX/images/livecell_test_images/._a.tif", "images/.DS_Store", "README.md"]
    server.files["images.zip"] = zipped([*IMAGES, *others])
    server.script = [cut(200)]
    download(tmp_path, base_url=server.url + "/", retry=waits.retry)
    files = sorted(sources.list_infos(str(tmp_path)))
    assert sorted(IMAGES) == sorted(image_names.find_images(files, None).paths)
    found = sources.find_annotations(files, {}, str(tmp_path))
    assert found == {split: [TRAIN.replace("train", split)] for split in ("train", "val", "test")}
    assert all((tmp_path / name).read_bytes() == (name * 50).encode() for name in IMAGES)
    assert files == sorted([*IMAGES, "images.zip", "download.json", *(paths[0] for paths in found.values())])


def test_images_missing_or_damaged_are_unpacked_again(server: Server, tmp_path: Path, waits: Waits) -> None:
    server.files["images.zip"] = zipped(IMAGES)
    download(tmp_path, ("images",), server.url, retry=waits.retry)
    (tmp_path / IMAGES[0]).unlink()
    (tmp_path / IMAGES[1]).write_bytes(b"0" * (tmp_path / IMAGES[1]).stat().st_size)
    (tmp_path / "images" / "mine.tif").write_bytes(b"mine")
    assert archive.unpack(tmp_path / "images.zip", tmp_path) == (2, 1)
    assert archive.unpack(tmp_path / "images.zip", tmp_path) == (0, 3)
    assert all((tmp_path / name).read_bytes() == (name * 50).encode() for name in IMAGES)
    assert (tmp_path / "images" / "mine.tif").read_bytes() == b"mine"


def test_unpacking_stopped_half_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No `images` folder until it is whole; what was written is not written again."""
    (tmp_path / "images.zip").write_bytes(zipped(IMAGES))
    write, calls = archive._write, []

    def stops(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write(*arguments)

    monkeypatch.setattr(archive, "_write", stops)
    with pytest.raises(KeyboardInterrupt):
        archive.unpack(tmp_path / "images.zip", tmp_path)
    assert not (tmp_path / "images").exists()
    assert archive.unpack(tmp_path / "images.zip", tmp_path) == (1, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "images.zip"]


def link(packed: zipfile.ZipFile) -> None:
    member = zipfile.ZipInfo("images/livecell_test_images/link.tif")
    member.external_attr = (stat.S_IFLNK | 0o777) << 16
    packed.writestr(member, "/etc/passwd")


def named(name: str) -> Callable[[zipfile.ZipFile], None]:
    return lambda packed: packed.writestr(name, b"harm")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (named("../evil.tif"), "leaves the folder"),
        (named("images/livecell_test_images/../../../evil.tif"), "leaves the folder"),
        (named("/evil.tif"), "leaves the folder"),
        (named("C:/evil.tif"), "leaves the folder"),
        (named("images\\..\\..\\evil.tif"), "leaves the folder"),
        (named("other/livecell_test_images/" + Path(IMAGES[2]).name), "two members would be"),
        (link, "is a link or device"),
    ],
)
def test_harmful_zips(
    harm: Callable[[zipfile.ZipFile], None], message: str, server: Server, tmp_path: Path, waits: Waits
) -> None:
    server.files["images.zip"] = zipped(IMAGES, harm)
    with pytest.raises(UserError, match=message):
        download(tmp_path / "out", ("images",), server.url, retry=waits.retry)
    assert_nothing(tmp_path)
    assert not (tmp_path / "out" / "images").exists()


@pytest.mark.parametrize(("limit", "value"), [("MOST_BYTES", 1000), ("MOST_MEMBERS", 2), ("MOST_MEMBER_BYTES", 100)])
def test_zip_bombs(limit: str, value: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "images.zip"
    place.write_bytes(zipped(IMAGES))
    archive.check_zip(place)
    monkeypatch.setattr(archive, limit, value)
    for refuses in (archive.check_zip, lambda path: archive.unpack(path, tmp_path)):
        with pytest.raises(UserError, match="more than"):
            refuses(place)
    assert [path.name for path in tmp_path.iterdir()] == ["images.zip"]


def test_damaged_zips_are_found(tmp_path: Path) -> None:
    """Cut anywhere; a bit of any byte of a member flipped."""
    place, body = tmp_path / "images.zip", zipped(IMAGES)
    for end in (*range(0, len(body), 11), len(body) - 1):
        place.write_bytes(body[:end])
        with pytest.raises(Damaged):
            archive.check_zip(place)
    with zipfile.ZipFile(io.BytesIO(body)) as packed:
        member = packed.infolist()[1]
        start = member.header_offset + 30 + len(member.filename)
    found = 0
    for at in range(start, start + member.compress_size):
        place.write_bytes(body[:at] + bytes([body[at] ^ 16]) + body[at + 1 :])
        try:
            archive.check_zip(place)
        except Damaged:
            found += 1
        else:  # deflate has bits that mean nothing
            with zipfile.ZipFile(place) as packed:
                assert packed.read(IMAGES[1]) == (IMAGES[1] * 50).encode()
    assert found >= member.compress_size - 2
    place.write_bytes(zipped(["a.txt"]))
    with pytest.raises(UserError, match="it is not LIVECell's"):
        archive.check_zip(place)


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1 << 22])
def test_json_cut_anywhere_is_found(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "BLOCK", block)
    tricky = {"a": [{"b": 'q"}\\'}, "\\\\", '\\"', "{[", "]}"], 'k"\\': {"": []}, "\u00e9": "\u00e9\n"}
    place, body = tmp_path / "a.json", json.dumps(tricky).encode()
    place.write_bytes(b"\n " + body + b" \n\n")
    archive.check_json(place)
    for end in range(len(body)):
        place.write_bytes(body[:end] + b"\n" * (end % 2))
        with pytest.raises(Damaged):
            archive.check_json(place)
    for wrong in (b"<html></html>", b"[]", b"{}]", b"null", b'{}"a}'):
        place.write_bytes(wrong)
        with pytest.raises(Damaged):
            archive.check_json(place)


def test_the_files_are_livecells() -> None:
    """Names as the dataset's README lists them."""
    assert len(module.FILES["single-cells"]) == 24
    assert module.FILES["size-split"][-1] == "annotations/LIVECell_dataset_size_split/4_train50percent.json"
    assert module.BASE_URL.startswith("https://")
    assert module.FILES["train"] == (TRAIN,)
