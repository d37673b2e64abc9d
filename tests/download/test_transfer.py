"""One file over HTTP from a server that truncates, changes or refuses it: resumed, restarted, or a clear error."""

import io
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import requests
from download_server import (
    BLOCK,
    GARBAGE,
    TRAIN,
    Answer,
    Server,
    annotations,
    assert_complete,
    assert_unpublished,
    change_to,
    chunked,
    cut,
    fetch_train,
    ignore_range,
    partial_content,
    send_rest,
    stall_after,
    status,
    wrong_length,
)
from requests.adapters import HTTPAdapter

from raylivecell.core.errors import UserError
from raylivecell.download import fetch as fetching
from raylivecell.download.livecell import download

pytest_plugins = ("download_server",)

# By case: the server's script, and the first byte of each Range request (None: no Range).
RECOVERABLE: dict[str, tuple[list[Answer], list[int | None] | None]] = {
    "cut at the first byte": ([cut(0)], [None, None]),
    "cut three times": ([cut(70_000), cut(1), cut(65_536)], [None, 70_000, 70_001, 135_537]),
    "range ignored": ([cut(70_000), ignore_range()], [None, 70_000]),
    "range ignored and cut": ([cut(70_000), ignore_range(66_000)], [None, 70_000, 66_000]),
    "503, 429 and 500": ([status(503), status(429), status(500)], [None] * 4),
    "503 in the middle": ([cut(70_000), status(503)], [None, 70_000, 70_000]),
    "416 to a good range": ([cut(70_000), status(416, Content_Range="bytes */9")], [None, 70_000, None]),
    "416 without a range": ([cut(70_000), status(416)], [None, 70_000, None]),
    "416 to a plain request": ([status(416)], [None, None]),
    "206 with other bytes than requested": (
        [cut(70_000), lambda h, b: send_rest(h, b[70_000:].replace(b"1", b"2"), len(b), start=69_999)],
        [None, 70_000, None],
    ),
    "206 of a file of another length": (
        [cut(70_000), partial_content("bytes 70000-70499/70500", GARBAGE, 500)],
        [None, 70_000, None],
    ),
    "206 with an empty body": ([cut(70_000), partial_content("bytes 70000-79999/*", b"", 0)], [None, 70_000, 70_000]),
    "206 with a reversed range": ([cut(70_000), partial_content("bytes 70000-69999/*", GARBAGE)], [None, 70_000, None]),
    "206 with no Content-Range": ([cut(70_000), partial_content("", GARBAGE)], [None, 70_000, None]),
    "206 to a plain request": ([partial_content("bytes 0-499/500", GARBAGE)], [None, None]),
    "206 with more than announced": (
        [cut(70_000), lambda h, b: send_rest(h, b[70_000:] + b" " * 500, len(b))],
        [None, 70_000, None],
    ),
    "206 beyond the end of the file": (
        [
            cut(70_000),
            lambda h, b: partial_content(f"bytes 70000-{len(b) + 499}/{len(b)}", b[70_000:] + b" " * 500)(h, b),
        ],
        [None, 70_000, None],
    ),
    "206 in two parts": (
        [cut(70_000), lambda h, b: partial_content(f"bytes 70000-89999/{len(b)}", b[70_000:90_000], 20_000)(h, b)],
        [None, 70_000, 90_000],
    ),
    "length overstated once": ([wrong_length(+1000)], None),
    "length understated once": ([wrong_length(-1000)], [None, None]),
    "changed between requests": ([cut(70_000), change_to('"two"', annotations(1))], [None, 70_000]),
    "changed, If-Range ignored": (
        [cut(70_000), change_to('"two"', annotations(1), lambda h, b: send_rest(h, b[70_000:], len(b)))],
        [None, 70_000, None],
    ),
    "chunked": ([chunked(5)], [None]),
    "chunked and cut": ([chunked(5, complete=False)], None),
}


@pytest.mark.parametrize("case", RECOVERABLE)
def test_recovers_the_right_bytes(case: str, server: Server, tmp_path: Path) -> None:
    script, starts = RECOVERABLE[case]
    server.script = list(script)
    fetch_train(server, tmp_path)
    assert_complete(server, tmp_path)
    assert server.script == []
    if starts is not None:
        assert server.ranges() == [start if start is None else f"bytes={start}-" for start in starts]


@pytest.mark.parametrize("seed", range(25))
def test_random_faults(seed: int, server: Server, tmp_path: Path) -> None:
    """The correct bytes of one version of the file, or a clear error and no file with the final name."""
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
                    wrong_length(rng.randrange(-50, 50)),
                    change_to(f'"{number}"', bodies[number], cut(at)),
                    chunked(3, complete=False),
                    partial_content(f"bytes {at}-{at + 499}/{at + 500}", GARBAGE),
                ]
            )
        )
    try:
        fetch_train(server, tmp_path)
    except UserError:
        assert_unpublished(tmp_path)
        server.script = []
        fetch_train(server, tmp_path)
    assert_complete(server, tmp_path)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (cut(0), r"ended at byte 0 of \d+ \(4 times\)"),
        (wrong_length(+1000), r"\(4 times\)"),
        (wrong_length(-1000), r"truncated \(2 times\)"),
        (status(503), "HTTP 503"),
        (status(403), "HTTP 403"),
        (status(204), "answered 204"),
        (status(416), "416"),
        (lambda h, b: h.send_head(200, len(b), Content_Encoding="gzip"), "sent as gzip"),
        (status(302, Location="ftp://127.0.0.1/x"), "redirects to an unsafe address .*ftp:"),
        (lambda h, b: h.wfile.write(b"no HTTP at all\r\n\r\n"), "no answer"),
    ],
)
def test_persistent_faults(answer: Answer, message: str, server: Server, tmp_path: Path) -> None:
    server.script = [answer] * 100
    with pytest.raises(UserError, match=message) as caught:
        fetch_train(server, tmp_path)
    assert "\n" not in str(caught.value)
    assert_unpublished(tmp_path)
    assert len(server.requests) <= 8


def test_no_redirect_from_https_to_http(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def redirect(adapter: HTTPAdapter, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        response = requests.Response()
        response.status_code, response.url, response.request = 302, request.url, request
        response.headers["Location"] = "http://elsewhere.invalid/x"
        response.raw = io.BytesIO()
        return response

    monkeypatch.setattr(HTTPAdapter, "send", redirect)
    with pytest.raises(UserError, match=r"redirects to an unsafe address .*http://elsewhere"):
        download(tmp_path, ("train",), "https://livecell.invalid")
    assert_unpublished(tmp_path)


def test_not_found_is_requested_once(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"livecell_coco_val\.json: HTTP 404 .*--base-url"):
        download(tmp_path, ("val",), server.url)
    assert len(server.requests) == 1
    assert_unpublished(tmp_path)


def test_an_unreachable_server_is_reported(server: Server, sleeps: list[float], tmp_path: Path) -> None:
    url = server.url
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match=r"Connection refused.*check the network, the proxy"):
        download(tmp_path, ("train",), url)
    assert sleeps == [2, 4], "growing waits between four attempts, none before the first retry"
    assert_unpublished(tmp_path)


def test_silent_server(server: Server, sleeps: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection without data for TIMEOUT_S counts as broken; the bytes received before are kept."""
    assert fetching.TIMEOUT_S == 60
    monkeypatch.setattr(fetching, "TIMEOUT_S", 0.5)
    server.script = [stall_after(BLOCK + 100, threading.Event())]
    fetch_train(server, tmp_path)
    assert_complete(server, tmp_path)
    assert server.ranges() == [None, f"bytes={BLOCK}-"], "the complete block that arrived was not kept"
    assert sleeps == [1]


def test_retry_after(server: Server, sleeps: list[float], tmp_path: Path) -> None:
    past = "Wed, 21 Oct 2015 07:28:00 GMT"
    server.script = [status(503, Retry_After="7"), status(429, Retry_After=past), status(503, Retry_After="99999")]
    fetch_train(server, tmp_path)
    assert sleeps == [7, 2, fetching.MAX_RETRY_AFTER_S], "with a date in the past the usual wait applies"
    assert_complete(server, tmp_path)


def test_gives_up_only_without_progress(server: Server, sleeps: list[float], tmp_path: Path) -> None:
    """40 broken connections in a row do not stop the download if each transfers bytes."""
    server.script = [cut(1000)] * 40
    fetch_train(server, tmp_path)
    assert_complete(server, tmp_path)
    assert set(sleeps) == {1}


def test_a_later_run_resumes(server: Server, tmp_path: Path) -> None:
    server.script = [cut(70_000), *[status(503)] * 4]
    with pytest.raises(UserError, match=r"HTTP 503 .*run the command again"):
        fetch_train(server, tmp_path)
    assert_unpublished(tmp_path)
    fetch_train(server, tmp_path)
    assert server.ranges()[-1] == "bytes=70000-"
    assert_complete(server, tmp_path)


@pytest.mark.parametrize("note", [b"", b"{}", b'{"url": 3}', None])
def test_partial_file_without_its_note_starts_over(note: bytes | None, server: Server, tmp_path: Path) -> None:
    write_partial(tmp_path, GARBAGE, note)
    fetch_train(server, tmp_path)
    assert server.ranges() == [None]
    assert_complete(server, tmp_path)


@pytest.mark.parametrize("etag", [None, 'W/"one"'])
def test_no_resume_without_a_strong_etag(etag: str | None, server: Server, tmp_path: Path) -> None:
    server.headers = {} if etag is None else {"ETag": etag}
    server.script = [cut(70_000)]
    fetch_train(server, tmp_path)
    assert server.ranges() == [None, None]
    assert_complete(server, tmp_path)


@pytest.mark.parametrize("surplus", [b"", b"}"], ids=["as long as the file", "longer"])
@pytest.mark.parametrize("is_length_known", [False, True])
def test_partial_at_least_as_long_as_the_file(
    is_length_known: bool, surplus: bytes, server: Server, tmp_path: Path
) -> None:
    """A kill between the last byte and the rename: verified and renamed without a request; surplus bytes: restarted."""
    body = server.files[TRAIN]
    length = len(body) if is_length_known else None
    note = fetching.RemoteFile(url=f"{server.url}/{TRAIN}", length=length, etag='"one"', md5=None)
    write_partial(tmp_path, body + surplus, note.model_dump_json().encode())
    fetch_train(server, tmp_path)
    assert server.ranges() == ([] if is_length_known and not surplus else [None])
    assert_complete(server, tmp_path)


def test_a_note_of_another_url_starts_over(server: Server, tmp_path: Path) -> None:
    note = fetching.RemoteFile(url="http://elsewhere/x", length=len(server.files[TRAIN]), etag='"one"', md5=None)
    write_partial(tmp_path, GARBAGE, note.model_dump_json().encode())
    fetch_train(server, tmp_path)
    assert server.ranges() == [None]
    assert_complete(server, tmp_path)


def write_partial(out: Path, content: bytes, note: bytes | None) -> None:
    partial = fetching.partial_of(out / TRAIN)
    partial.parent.mkdir(parents=True)
    partial.write_bytes(content)
    if note is not None:
        fetching.note_of(partial).write_bytes(note)


def test_proxies_are_used_and_passwords_of_netrc_are_not(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    fetch_train(server, tmp_path / "direct")
    assert all("Authorization" not in headers for _, _, headers in server.requests)
    assert_complete(server, tmp_path / "direct")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="no answer"):
        fetch_train(server, tmp_path / "proxy")
