"""The download command: checksums, existing files, disks, proxies, interruptions."""

import fcntl
import hashlib
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from download_server import (
    BLOCK,
    GARBAGE,
    TRAIN,
    Server,
    assert_complete,
    assert_unpublished,
    fetch_train,
    s3_headers,
    send_file,
    stall_after,
    status,
)

from raylivecell.core.errors import UserError
from raylivecell.download import fetch as fetching
from raylivecell.download import livecell
from raylivecell.download.livecell import download

pytest_plugins = ("download_server",)


def test_an_undisturbed_download(
    server: Server, sleeps: list[float], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    record = fetch_train(server, tmp_path)
    assert_complete(server, tmp_path)
    assert record["licence"] == "CC BY-NC 4.0"
    assert "CC BY-NC 4.0" in capsys.readouterr().err
    assert sleeps == []
    assert len(server.requests) == 1
    fetch_train(server, tmp_path)
    assert len(server.requests) == 1, "a complete file was requested again"
    assert "already there, verified" in capsys.readouterr().err


def test_md5_etag_is_a_checksum(server: Server, tmp_path: Path) -> None:
    body = server.files[TRAIN]
    server.headers = s3_headers(body)
    damaged = body.replace(b"1", b"2", 1)
    server.script = [lambda handler, _: send_file(handler, damaged)]
    record = fetch_train(server, tmp_path)
    assert len(server.requests) == 2
    assert record["files"][TRAIN]["etag_is_md5"]
    assert_complete(server, tmp_path)


def test_wrong_md5_twice(server: Server, tmp_path: Path) -> None:
    server.headers = s3_headers(b"other bytes")
    with pytest.raises(UserError, match=r"MD5 is .* ETag is .* \(2 times\)"):
        fetch_train(server, tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    "headers",
    [
        s3_headers(b"", etag="0" * 32 + "-17"),
        s3_headers(b"", etag="0" * 32, **{"x-amz-server-side-encryption": "aws:kms"}),
        {"ETag": '"' + "0" * 32 + '"'},
    ],
    ids=["multipart", "encrypted by KMS", "not S3"],
)
def test_other_etags_are_not_a_checksum(
    headers: dict[str, str], server: Server, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    server.headers = headers
    record = fetch_train(server, tmp_path)
    assert not record["files"][TRAIN]["etag_is_md5"]
    assert "no checksum from the server" in capsys.readouterr().err
    assert_complete(server, tmp_path)


def test_expected_size_and_checksum(server: Server, tmp_path: Path) -> None:
    body = server.files[TRAIN]
    name, digest = Path(TRAIN).name, hashlib.sha256(body).hexdigest()
    with pytest.raises(UserError, match=f"is {len(body)} bytes long, not 5"):
        fetch_train(server, tmp_path / "a", size=[f"{name}=5"])
    assert_unpublished(tmp_path / "a")
    with pytest.raises(UserError, match=f"--sha256 is {digest}, not 0000"):
        fetch_train(server, tmp_path / "b", sha256=[f"{name}={'0' * 64}"])
    assert_unpublished(tmp_path / "b")
    requests = len(server.requests)
    for _ in range(2):
        fetch_train(server, tmp_path / "b", sha256=[f"{name}={digest.upper()}"], size=[f"{TRAIN}={len(body)}"])
    assert len(server.requests) == requests, "a mistyped checksum costs no second download"
    assert_complete(server, tmp_path / "b")
    with pytest.raises(UserError, match="as fetched; correct --size or --sha256"):
        fetch_train(server, tmp_path / "b", sha256=[f"{name}={'0' * 64}"])
    assert_complete(server, tmp_path / "b")


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
def test_wrong_options(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--(sha256|size|base-url) "):
        download(tmp_path / "out", ("train",), **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"[" + b[1:]], ids=["shorter", "one byte differs"])
def test_a_file_changed_locally_is_fetched_again(
    damage: Callable[[bytes], bytes], server: Server, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    fetch_train(server, tmp_path)
    target = tmp_path / TRAIN
    damaged = damage(target.read_bytes())
    target.write_bytes(damaged)
    server.script = [status(404)]
    with pytest.raises(UserError, match="HTTP 404"):
        fetch_train(server, tmp_path)
    assert not target.exists(), "a damaged file kept the final name"
    assert "renamed to livecell_coco_train.json.unverified" in capsys.readouterr().err
    fetch_train(server, tmp_path)
    renamed = target.with_name(target.name + ".unverified")
    assert renamed.read_bytes() == damaged
    renamed.unlink()
    assert_complete(server, tmp_path)


def test_a_copy_from_elsewhere_is_verified(server: Server, tmp_path: Path) -> None:
    """A complete file without a record is kept; a file of another length is renamed, never deleted."""
    target = tmp_path / TRAIN
    target.parent.mkdir(parents=True)
    target.write_bytes(server.files[TRAIN])
    fetch_train(server, tmp_path)
    assert [method for method, _, _ in server.requests] == ["HEAD"]
    assert_complete(server, tmp_path)
    (tmp_path / "download.json").unlink()
    target.write_bytes(GARBAGE)
    fetch_train(server, tmp_path)
    renamed = target.with_name(target.name + ".unverified")
    assert renamed.read_bytes() == GARBAGE
    renamed.unlink()
    assert_complete(server, tmp_path)


def test_a_record_of_another_format(tmp_path: Path) -> None:
    (tmp_path / "download.json").write_text('{"files": {"a": {}}}')
    with pytest.raises(UserError, match=r"download\.json is not what raylivecell writes .*; delete it"):
        download(tmp_path, ("train",), "http://127.0.0.1:9")


def test_too_little_free_space(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "disk_usage", lambda path: type("Usage", (), {"free": fetching.SPARE_BYTES + 9}))
    with pytest.raises(UserError, match=r"needs 0\.00 GB more and the disk .* choose another --out"):
        fetch_train(server, tmp_path)
    assert_unpublished(tmp_path)


def test_a_download_resumes_after_a_failed_write(server: Server, tmp_path: Path) -> None:
    """A file size limit in the middle of the second block: the bytes that fit are kept, and the download resumes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (BLOCK + 1000, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write .*: File too large"):
            fetch_train(server, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_unpublished(tmp_path)
    fetch_train(server, tmp_path)
    assert server.ranges() == [None, f"bytes={BLOCK + 1000}-"]
    assert_complete(server, tmp_path)


def test_out_that_is_a_file_is_refused(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    with pytest.raises(UserError, match=r"cannot write .*file"):
        fetch_train(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"content"


def test_two_downloads_at_once(server: Server, tmp_path: Path) -> None:
    partial = fetching.partial_of(tmp_path / TRAIN)
    partial.parent.mkdir(parents=True)
    with open(partial, "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another download is writing"):
            fetch_train(server, tmp_path)
    fetch_train(server, tmp_path)
    assert_complete(server, tmp_path)


def test_through_a_proxy(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.url)
    download(tmp_path, ("train",), "http://livecell.invalid")
    assert server.requests[0][1] == f"http://livecell.invalid/{TRAIN}"
    assert_complete(server, tmp_path)


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_stopped_and_started_again(stop: signal.Signals, server: Server, tmp_path: Path) -> None:
    stalled = threading.Event()
    server.script = [stall_after(2 * BLOCK, stalled)]
    code = f"""
import signal
from pathlib import Path
from raylivecell.download import fetch
from raylivecell.download.livecell import download

signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent in the background may have ignored it
fetch.BLOCK = {BLOCK}
download(Path({str(tmp_path)!r}), ["train"], {server.url!r})
"""
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    assert stalled.wait(60)
    partial = fetching.partial_of(tmp_path / TRAIN)
    while not partial.exists() or partial.stat().st_size < BLOCK:
        assert process.poll() is None
    process.send_signal(stop)
    process.wait()
    assert_unpublished(tmp_path)
    fetch_train(server, tmp_path)
    assert server.ranges()[1] in (f"bytes={BLOCK}-", f"bytes={2 * BLOCK}-")
    assert_complete(server, tmp_path)


def test_remote_paths_of_livecell() -> None:
    """Paths as in the dataset's README."""
    assert len(livecell.FILES["single-cells"]) == 24
    assert livecell.FILES["size-split"][-1] == "annotations/LIVECell_dataset_size_split/4_train50percent.json"
    assert livecell.BASE_URL.startswith("https://")
    assert livecell.FILES["train"] == (TRAIN,)
