"""One file over HTTP, whole or not at all.

1. Bytes go to `<file>.partial`; `<file>.partial.note` remembers what the server said of them (ETag, length).
2. A broken connection is resumed with Range and If-Range. A file that changed meanwhile, or a server that cannot
   resume, starts over: bytes of two versions are never joined.
3. A whole file is verified (length, MD5 where the ETag is one, its own format, what the user knows of it).
4. Only the caller gives it its final name.

Range requests, If-Range, 206 and 416 as RFC 9110 (sections 13.1.5, 14 and 15) has them.
"""

import errno
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import disk_usage
from typing import Any, BinaryIO

from pydantic import ValidationError

from raylivecell.core import storage
from raylivecell.core.errors import UserError
from raylivecell.download.web import Interrupted, Note, note_from, read_block, request

SPARE_BYTES = 64 << 20
"""Left free on the disk."""


class Damaged(Exception):
    """The bytes are not the file that they claim to be."""


@dataclass(frozen=True)
class Want:
    """What the user knows of a file."""

    size: int | None = None
    """Bytes."""
    sha256: str | None = None
    """64 lower-case hexadecimal digits."""


@dataclass(frozen=True)
class Retry:
    """When to give up."""

    attempts: int = 6
    """Requests in a row that bring the file no farther."""
    sleep: Callable[[float], None] = time.sleep
    """Waits for that many seconds: 1, 2, 4, ... 60, or what Retry-After asks for."""


PATIENT = Retry()


def fetch(
    url: str,
    target: Path,
    check: Callable[[Path], None],
    want: Want = Want(),
    retry: Retry = PATIENT,
    moved: Callable[[int, int | None], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Fetch `url` into `partial_of(target)` and verify it there; `publish(target)` then gives it its name.

    `check` raises Damaged where a whole file is not what it should be; damage is fetched again once. `moved` is told
    (bytes there, bytes in all or None). Returns the file's record: url, bytes, sha256, etag, etag_is_md5.
    UserError where the file cannot be had; bytes worth resuming from stay in the partial file.
    """
    partial = partial_of(target)
    with disk_errors(partial):
        partial.parent.mkdir(parents=True, exist_ok=True)
    in_vain, farthest, damaged = 0, size_of(partial), False
    while True:
        try:
            with _open_alone(partial) as stream:
                note = _receive(url, stream, partial, want, moved)
                return _verify(partial, note, check, want)
        except Damaged as error:
            discard(target)
            if damaged:
                raise UserError(f"{url}: {error}, twice; ask who keeps it, or choose another --base-url") from error
            damaged = True
            say(f"{target.name}: {error}; fetching it again from the first byte")
        except Interrupted as error:
            here = size_of(partial)
            in_vain = 1 if here > farthest else in_vain + 1
            farthest = max(farthest, here)
            if error.over:
                discard(target)
            if in_vain >= retry.attempts:
                raise UserError(
                    f"{url}: {error} ({in_vain} times in a row); check the network and the proxy (https_proxy), then "
                    f"run again: it goes on from byte {size_of(partial)}"
                ) from error
            say(f"{target.name}: {error}; trying again")
            retry.sleep(min(60.0, 2.0 ** (in_vain - 1)) if error.wait_s is None else error.wait_s)


def partial_of(target: Path) -> Path:
    """Where the bytes of `target` wait until they are whole."""
    return target.with_name(target.name + ".partial")


def note_of(partial: Path) -> Path:
    """Where the server's word on `partial` is kept. Not `.json`: a reader of annotations must not take it for one."""
    return partial.with_name(partial.name + ".note")


def size_of(path: Path) -> int:
    """Bytes at `path`, 0 where there is nothing."""
    return path.stat().st_size if path.exists() else 0


def publish(target: Path) -> None:
    """Give the verified partial file of `target` its final name."""
    partial = partial_of(target)
    os.replace(partial, target)
    note_of(partial).unlink(missing_ok=True)


def discard(target: Path) -> None:
    """Delete the partial file of `target`."""
    partial_of(target).unlink(missing_ok=True)
    note_of(partial_of(target)).unlink(missing_ok=True)


def digests(path: Path) -> tuple[str, str]:
    """SHA-256 and MD5 of the file at `path`, hexadecimal, in one reading."""
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            sha256.update(block)
            md5.update(block)
    return sha256.hexdigest(), md5.hexdigest()


def adopt(url: str, target: Path) -> bool:
    """Make a file of unknown origin at `target` a partial one to verify, if the server's file is as long."""
    try:
        with request(url, {}, "HEAD") as response:
            note = note_from(url, response.headers)
    except Interrupted as error:
        raise UserError(f"{url}: {error}; check the network and the proxy (https_proxy), then run again") from error
    if note.length != size_of(target):
        return False
    with disk_errors(target):
        storage.write_json(note_of(partial_of(target)), note.model_dump())
        os.replace(target, partial_of(target))
    return True


def check_room(folder: Path, needed: int, what: str) -> None:
    """UserError where the disk of `folder` has no room for `needed` more bytes."""
    free = disk_usage(folder).free
    if needed > free - SPARE_BYTES:
        raise UserError(
            f"{what} needs {needed / 1e9:.2f} GB more and the disk of {folder} has {free / 1e9:.2f} GB free; "
            "free some or choose another --out"
        )


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns what the disk refuses (full, read-only, quota) into a UserError."""
    try:
        yield
    except OSError as error:
        kept = "; what came is kept" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise UserError(f"cannot write {path}: {error.strerror or error}{kept}; mend that and run again") from error


@contextmanager
def _open_alone(partial: Path) -> Iterator[BinaryIO]:
    """The partial file, opened to read and write, locked until this ends or this process does."""
    with disk_errors(partial):
        stream = os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another download is writing {partial}; wait for it or choose another --out") from error
        yield stream


def _receive(url: str, stream: BinaryIO, partial: Path, want: Want, moved: Callable[[int, int | None], None]) -> Note:
    """Bring `stream` to the end of the file at `url`: what it holds is kept if surely of the same file."""
    known = _known(url, partial)
    have = stream.seek(0, os.SEEK_END) if known else 0
    if known and have and have == known.length:
        return known
    headers = {"Range": f"bytes={have}-", "If-Range": known.validator or ""} if known and have else {}
    with request(url, headers) as response:
        fresh = note_from(url, response.headers)
        if known and have and response.status in (206, 416):
            end: int | None
            end, total = _continued(response, known, fresh, have)
            note = known.model_copy(update={"length": total})
            if response.status == 416:
                return note
        elif response.status == 200:
            note, have, end = fresh, 0, fresh.length
            with disk_errors(partial):
                stream.truncate(0)
                stream.seek(0)
                storage.write_json(note_of(partial), note.model_dump())
        else:
            raise Interrupted(f"answered {response.status} to a plain request", over=True)
        _check_announced(url, note, want)
        check_room(partial.parent, (note.length or have) - have, url)
        have = _copy(response, stream, partial, have, end, note.length, moved)
    if note.length is not None and have < note.length:
        raise Interrupted(f"the connection ended at byte {have} of {note.length}")
    return note


def _known(url: str, partial: Path) -> Note | None:
    """The note on a partial file that can be continued; None where it must start over."""
    try:
        note = Note.model_validate_json(note_of(partial).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
    usable = note.url == url and (note.validator or size_of(partial) == note.length)
    return note if usable and size_of(partial) <= (note.length or size_of(partial)) else None


def _continued(response: Any, known: Note, fresh: Note, have: int) -> tuple[int, int | None]:
    """Where the bytes of a 206 (or a 416: none) end, and the length of the whole file; Interrupted if not the rest."""
    given = response.headers.get("Content-Range", "")
    found = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", given.strip())
    if not found:
        raise Interrupted(f"answered {response.status} with Content-Range {given!r}", over=True)
    total = known.length if found[3] == "*" else int(found[3])
    if fresh.etag not in (None, known.etag) or known.length not in (None, total):
        raise Interrupted("the file changed on the server", over=True)
    if response.status == 416 and total == have:
        return have, have
    if response.status == 416 or found[1] is None or int(found[1]) != have:
        raise Interrupted(f"sent {given!r} for the bytes from {have}", over=True)
    end = int(found[2]) + 1
    if not have < end <= (total or end):
        raise Interrupted(f"sent {given!r} for the bytes from {have}", over=True)
    return end, total


def _copy(
    response: Any,
    stream: BinaryIO,
    partial: Path,
    have: int,
    end: int | None,
    total: int | None,
    moved: Callable[[int, int | None], None],
) -> int:
    """Append the response's body to `stream` (which holds `have` bytes); how many it holds then, on the disk."""
    moved(have, total)
    try:
        while block := read_block(response):
            if end is not None and have + len(block) > end:
                raise Damaged(f"the server sent more than the {end} bytes that it announced")
            with disk_errors(partial):
                _write(stream, block)
            have += len(block)
            moved(have, total)
    finally:
        with disk_errors(partial):
            os.fsync(stream.fileno())
    return have


def _write(stream: BinaryIO, block: bytes) -> None:
    """All of `block`: an unbuffered file may take a part at a time."""
    rest = memoryview(block)
    while rest:
        rest = rest[stream.write(rest) :]


def _check_announced(url: str, note: Note, want: Want) -> None:
    """UserError before the first byte where the server's file is not as long as the user's."""
    if None not in (want.size, note.length) and want.size != note.length:
        raise UserError(f"{url} is {note.length} bytes long, not {want.size}; mend --size or choose another --base-url")


def _verify(partial: Path, note: Note, check: Callable[[Path], None], want: Want) -> dict[str, Any]:
    """The record of a whole file; Damaged or UserError where it is not what it should be."""
    size, (sha256, md5) = size_of(partial), digests(partial)
    if note.md5 and md5 != note.md5:
        raise Damaged(f"MD5 is {md5}, the server's ETag says {note.md5}")
    check(partial)
    for flag, wanted, found in (("--size", want.size, size), ("--sha256", want.sha256, sha256)):
        if wanted not in (None, found):
            raise UserError(
                f"{note.url}: {flag} is {found}, not {wanted}; mend {flag}, or delete {partial} to fetch it again"
            )
    return {"url": note.url, "bytes": size, "sha256": sha256, "etag": note.etag, "etag_is_md5": note.md5 is not None}
