"""Fetch one file over HTTP: resumed, verified, and renamed only when complete.

1. Bytes are appended to `FILE.partial`; `FILE.partial.note` stores the server's ETag and length.
2. An interrupted transfer resumes with Range and If-Range (RFC 9110, sections 13.1.5 and 14). If the file changed on
   the server, or the server cannot resume, it restarts: bytes of two versions are never mixed.
3. `fetch` verifies the length, the MD5 (if the ETag is one), the format, and the size and SHA-256 that the user
   expects. The caller then renames the file with `publish`.
"""

import fcntl
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import disk_usage
from typing import IO, Any

import requests
from pydantic import ValidationError
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError, ProtocolError
from urllib3.response import BaseHTTPResponse
from urllib3.util import Retry

from raylivecell.core import storage
from raylivecell.core.console import ProgressBar, console
from raylivecell.core.errors import UserError, shortened
from raylivecell.core.settings import StrictModel
from raylivecell.core.version import __version__

ATTEMPTS = 6
"""Maximum consecutive requests without progress."""
TIMEOUT_S = 60.0
"""Maximum time without data from the server."""
MAX_BACKOFF_S, MAX_RETRY_AFTER_S = 60.0, 300.0
BLOCK = 1 << 16
"""Bytes per read: the maximum loss if the connection breaks, and the unit of the progress display."""
SPARE_BYTES = 64 << 20
"""Free space to leave on the disk."""
NETWORK_HINT = (
    "check the network, the proxy (https_proxy) and its CA file (REQUESTS_CA_BUNDLE), then run the same command again "
    "to resume"
)


class DamagedFileError(Exception):
    """The received bytes are wrong: the file must be fetched again from the first byte."""


@dataclass(frozen=True)
class Expected:
    """Size in bytes and SHA-256 (64 lower-case hexadecimal digits) of a file, as given by the user."""

    size: int | None = None
    sha256: str | None = None


class RemoteFile(StrictModel):
    """Identity of a file on the server, stored in `FILE.partial.note`."""

    url: str
    length: int | None
    etag: str | None
    """As sent, including quotes and W/."""
    md5: str | None
    """The ETag if it is the file's MD5."""

    @classmethod
    def from_headers(cls, url: str, headers: Mapping[str, str]) -> "RemoteFile":
        """Parse the headers of a response.

        S3's ETag is the MD5 of an object uploaded in one piece without KMS encryption; multipart ETags end in -N.
        ETags of other servers may look like an MD5 without being one.
        """
        length, etag = headers.get("Content-Length", ""), headers.get("ETag")
        is_s3 = any(name.lower().startswith("x-amz") for name in headers) or headers.get("Server") == "AmazonS3"
        has_kms = "aws:kms" in headers.get("x-amz-server-side-encryption", "")
        digest = re.fullmatch(r'"([0-9a-f]{32})"', etag or "")
        return cls(
            url=url,
            length=int(length) if re.fullmatch(r"[0-9]{1,18}", length) else None,
            etag=etag,
            md5=digest[1] if digest and is_s3 and not has_kms else None,
        )


class _ReportedRetry(Retry):
    """Retry that prints its reason."""

    def sleep(self, response: BaseHTTPResponse | None = None) -> None:
        cause = self.history[-1]
        console.print(f"{shortened(str(cause.error or f'HTTP {cause.status}'))}; retrying", markup=False)
        super().sleep(response)

    def get_retry_after(self, response: BaseHTTPResponse) -> float | None:
        seconds = super().get_retry_after(response)
        return None if seconds is None else min(seconds, MAX_RETRY_AFTER_S)


def fetch(url: str, target: Path, check: Callable[[Path], None], expected: Expected = Expected()) -> dict[str, Any]:
    """Fetch `url` into `partial_of(target)` and verify it there.

    Args:
        check: raises DamagedFileError if the content is wrong; the file is then fetched once more.

    Returns:
        The file's record: url, bytes, sha256, etag, etag_is_md5.

    Raises:
        UserError: the file cannot be fetched; the partial file remains, to resume from.
    """
    partial = partial_of(target)
    partial.parent.mkdir(parents=True, exist_ok=True)
    failures, restarts, farthest = 0, 0, size_of(partial)
    while True:
        try:
            with _locked(partial) as stream:
                remote = _transfer(url, stream, partial, expected)
                return _verify(partial, remote, check, expected)
        except (HTTPError, DamagedFileError) as error:
            received = size_of(partial)
            failures = 1 if received > farthest else failures + 1
            farthest = max(farthest, received)
            if isinstance(error, DamagedFileError):
                restarts += 1
                partial.unlink()
                note_of(partial).unlink(missing_ok=True)
            if failures >= ATTEMPTS or restarts > 1:
                raise UserError(f"{url}: {error} ({max(failures, restarts)} times); {NETWORK_HINT}") from error
            console.print(f"{target.name}: {error}; retrying", markup=False)
            time.sleep(min(MAX_BACKOFF_S, 2.0 ** (failures - 1)))


def partial_of(target: Path) -> Path:
    """Return the path at which `target` is stored until it is complete."""
    return target.with_name(target.name + ".partial")


def note_of(partial: Path) -> Path:
    """Return the path of the description of `partial`; not `.json`, which could be mistaken for annotations."""
    return partial.with_name(partial.name + ".note")


def size_of(path: Path) -> int:
    """Return the size of the file at `path` in bytes, 0 if it does not exist."""
    return path.stat().st_size if path.exists() else 0


def publish(target: Path) -> None:
    """Rename the verified partial file to `target`."""
    os.replace(partial_of(target), target)
    note_of(partial_of(target)).unlink(missing_ok=True)


def sha256_and_md5(path: Path) -> tuple[str, str]:
    """Compute both digests of a file, hexadecimal, in one pass."""
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            sha256.update(block)
            md5.update(block)
    return sha256.hexdigest(), md5.hexdigest()


def adopt(url: str, target: Path) -> bool:
    """Rename a file without a record to a partial file, to verify it; False if its length is not the server's."""
    with _request(url, {}, "HEAD") as response:
        remote = RemoteFile.from_headers(url, response.headers)
    if remote.length != size_of(target):
        return False
    storage.write_json(note_of(partial_of(target)), remote.model_dump())
    os.replace(target, partial_of(target))
    return True


def check_free_space(folder: Path, needed: int, purpose: str) -> None:
    """Raise UserError if `needed` more bytes do not fit on the disk of `folder`."""
    free = disk_usage(folder).free
    if needed > free - SPARE_BYTES:
        raise UserError(
            f"{purpose} needs {needed / 1e9:.2f} GB more and the disk of {folder} has {free / 1e9:.2f} GB free; "
            "free space there or choose another --out"
        )


@contextmanager
def _locked(partial: Path) -> Iterator[IO[bytes]]:
    """Open the partial file for appending, with a lock against other downloads."""
    with open(partial, "ab", buffering=0) as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another download is writing {partial}; wait for it or choose another --out") from error
        try:
            yield stream
        finally:
            os.fsync(stream.fileno())


def _session(url: str) -> requests.Session:
    """Create a session with the environment's proxies and certificates, but without the passwords of ~/.netrc."""
    session = requests.Session()
    session.trust_env = False
    proxies = requests.utils.get_environ_proxies(url)
    session.proxies = {scheme: proxies[scheme] for scheme in ("http", "https") if scheme in proxies}
    session.verify = os.environ.get("REQUESTS_CA_BUNDLE") or True
    return session


def _request(url: str, headers: Mapping[str, str], method: str = "GET") -> requests.Response:
    """Send a request; retry without an answer or on transient statuses. The caller closes the response (2xx or 416)."""
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # _ReportedRetry prints the same
    session, transient = _session(url), (408, 425, 429, 500, 502, 503, 504)
    retry = _ReportedRetry(
        ATTEMPTS - 1,
        other=0,
        backoff_factor=1,
        backoff_max=MAX_BACKOFF_S,
        status_forcelist=transient,
        raise_on_status=False,
    )
    session.adapters.clear()  # no redirect from https to http, nor to ftp
    for scheme in ("https://", "http://")[: 2 if url.lower().startswith("http:") else 1]:
        session.mount(scheme, HTTPAdapter(max_retries=retry))
    headers = {"User-Agent": f"raylivecell/{__version__}", "Accept-Encoding": "identity", **headers}
    try:
        response = session.request(method, url, headers=headers, stream=True, timeout=TIMEOUT_S)
    except requests.exceptions.InvalidSchema as error:
        raise UserError(f"{url} redirects to an unsafe address ({error}); choose another --base-url") from error
    except requests.RequestException as error:
        cause = getattr(error.args[0], "reason", error) if error.args else error
        raise UserError(f"{url}: no answer ({shortened(str(cause))}); {NETWORK_HINT}") from error
    status, encoding = response.status_code, response.headers.get("Content-Encoding", "identity")
    if (status < 400 or status == 416) and encoding == "identity":
        return response
    response.close()
    problem = f"HTTP {status} {response.reason}" if status >= 400 else f"sent as {encoding}, which was not requested"
    raise UserError(f"{url}: {problem}; check --base-url, or run the command again later")


def _transfer(url: str, stream: IO[bytes], partial: Path, expected: Expected) -> RemoteFile:
    """Append the missing bytes of the file at `url` to the partial file."""
    previous = _resumable(url, partial)
    received = size_of(partial) if previous else 0
    if previous and received == previous.length:
        return previous
    headers = {"Range": f"bytes={received}-", "If-Range": previous.etag or ""} if previous and received else {}
    with _request(url, headers) as response:
        remote = RemoteFile.from_headers(url, response.headers)
        end = remote.length
        if previous and received and response.status_code in (206, 416):
            remote, end = previous, _range_end(response, previous, received)
        elif response.status_code == 200:
            received = 0
            stream.truncate(0)
            storage.write_json(note_of(partial), remote.model_dump())
        else:
            raise DamagedFileError(f"answered {response.status_code} to a request for all bytes")
        if None not in (expected.size, remote.length) and expected.size != remote.length:
            raise UserError(f"{url} is {remote.length} bytes long, not {expected.size}; correct --size or --base-url")
        check_free_space(partial.parent, (remote.length or received) - received, url)
        response.raw.enforce_content_length = False  # a short body keeps its last block, and is reported below
        with ProgressBar(partial.stem, end, " bytes") as bar:
            # A block is lost when the connection is reset within it: small ones, so that each attempt gets further.
            while block := response.raw.read(BLOCK, decode_content=False):
                if end is not None and received + len(block) > end:
                    raise DamagedFileError(f"the server sent more than the {end} bytes that it announced")
                rest = memoryview(block)
                while rest:  # an unbuffered file may write a part
                    rest = rest[stream.write(rest) :]
                received += len(block)
                bar.update(received)
    if remote.length is not None and received < remote.length:
        raise ProtocolError(f"the connection ended at byte {received} of {remote.length}")
    return remote


def _resumable(url: str, partial: Path) -> RemoteFile | None:
    """Return the identity of a partial file that is complete or can be resumed (strong ETag, known length)."""
    try:
        remote = RemoteFile.model_validate_json(note_of(partial).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
    size, has_strong_etag = size_of(partial), (remote.etag or "").startswith('"')
    is_part = remote.length is not None and (size == remote.length or (size < remote.length and has_strong_etag))
    return remote if remote.url == url and is_part else None


def _range_end(response: requests.Response, previous: RemoteFile, start: int) -> int:
    """Return the end of the byte range in a response to a range request."""
    text = response.headers.get("Content-Range", "")
    match = re.fullmatch(rf"bytes {start}-([0-9]{{1,18}})/({previous.length}|\*)", text.strip())
    end = int(match[1]) + 1 if match else 0
    if response.headers.get("ETag") not in (None, previous.etag):
        raise DamagedFileError("the file changed on the server")
    if response.status_code == 416 or not start < end <= (previous.length or 0):
        raise DamagedFileError(f"the server sent {response.status_code} {text!r} for the bytes from {start}")
    return end


def _verify(partial: Path, remote: RemoteFile, check: Callable[[Path], None], expected: Expected) -> dict[str, Any]:
    """Return the record of a complete file; DamagedFileError or UserError if it is not the expected file."""
    size, (sha256, md5) = size_of(partial), sha256_and_md5(partial)
    if remote.md5 not in (None, md5):
        raise DamagedFileError(f"MD5 is {md5}, the server's ETag is {remote.md5}")
    check(partial)
    for flag, value, actual in (("--size", expected.size, size), ("--sha256", expected.sha256, sha256)):
        if value not in (None, actual):
            raise UserError(
                f"{remote.url}: {flag} is {actual}, not {value}; correct {flag}, or delete {partial} to fetch it again"
            )
    return {"url": remote.url, "bytes": size, "sha256": sha256, "etag": remote.etag, "etag_is_md5": bool(remote.md5)}
