"""Read, write and list files at a URI: a local path or anything `pyarrow.fs` opens (s3://, gs://); see `addresses`.

Every write is atomic: a reader sees the old file or the complete new one, never a part. Object stores guarantee that
for a single PUT; on a local disk a temporary file is written, flushed and renamed.
"""

import csv
import functools
import json
import os
import re
import shutil
import tempfile
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pyarrow import fs as pafs

from raylivecell.core import addresses
from raylivecell.core.errors import UserError

_PARTIAL = re.compile(r"\..*\.[0-9a-f]{32}\.partial", re.DOTALL)
_NAME_BYTES = 200
"""Bytes of a file's name used in the name of its temporary file, whose limit is 255."""
_SETTINGS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE")
"""Environment variables that a filesystem reads when it is opened."""
_LOCAL = pafs.LocalFileSystem()
# lru_cache alone calls the function twice if two threads request the same root at the same time.
_OPENING = threading.Lock()


def open_uri(uri: str | Path) -> tuple[pafs.FileSystem, str]:
    """Return the filesystem of `uri` and the plain path in it (no trailing slash). A local path may be relative.

    Raises:
        UserError: an unknown filesystem; a password or an access key in the URI; a local path that is not UTF-8.
    """
    parts = addresses.split(str(uri))
    if parts is None:
        return _LOCAL, addresses.local_path(str(uri))
    with _OPENING:
        filesystem, bucket = _open_root(parts.root(), tuple(os.environ.get(name) for name in _SETTINGS))
    return filesystem, "/".join(part for part in (bucket, parts.path) if part)


@functools.lru_cache(maxsize=32)
def _open_root(root: str, settings: tuple[str | None, ...]) -> tuple[pafs.FileSystem, str]:
    """Open the filesystem at the URI `root`; also return its bucket. Cached, because every client has threads.

    Args:
        root: scheme, bucket and options of a URI; it contains no credentials.
        settings: values of the environment variables _SETTINGS, from which the filesystem takes its endpoint.
    """
    try:
        filesystem, bucket = pafs.FileSystem.from_uri(root)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"cannot open {root}: {reason}; use a local path, s3://bucket/path or gs://bucket/path"
        ) from error
    return filesystem, bucket.rstrip("/")


def join(uri: str | Path, *parts: str) -> str:
    """Append plain names or paths to `uri`."""
    return addresses.join(str(uri), *parts)


def absolute(uri: str | Path) -> str:
    """Normalise `uri` so that it means the same in any process: local paths become absolute."""
    return addresses.absolute(str(uri))


def is_local(uri: str | Path) -> bool:
    """Whether `uri` is on this machine's disks."""
    return addresses.split(str(uri)) is None


def exists(uri: str | Path) -> bool:
    """Whether there is a file or a folder at `uri`."""
    filesystem, path = open_uri(uri)
    return filesystem.get_file_info(path).type != pafs.FileType.NotFound


def list_names(uri: str | Path) -> list[str]:
    """List the names of the files and folders directly in the folder `uri`, sorted; [] if it does not exist."""
    filesystem, path = open_uri(uri)
    try:
        if isinstance(filesystem, pafs.LocalFileSystem):
            return sorted(os.listdir(path))  # Arrow cannot list a name that is not UTF-8
        infos = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    except (NotADirectoryError, FileNotFoundError):
        return []
    return sorted(info.base_name for info in infos)


def read_bytes(uri: str | Path) -> bytes:
    """Read the file at `uri`; FileNotFoundError if it does not exist."""
    filesystem, path = open_uri(uri)
    with filesystem.open_input_file(path) as stream:
        return stream.read()


def write_bytes(uri: str | Path, data: bytes) -> None:
    """Write `data` at `uri` atomically, creating parent folders."""
    filesystem, path = open_uri(uri)
    if isinstance(filesystem, pafs.LocalFileSystem):
        with _replacing(Path(path)) as partial:
            partial.write(data)
        return
    with filesystem.open_output_stream(path) as stream:
        stream.write(data)


@contextmanager
def writing(uri: str | Path) -> Iterator[IO[bytes]]:
    """Open a stream for a file of any size; it appears at `uri`, complete, when the block ends without an error."""
    filesystem, path = open_uri(uri)
    if isinstance(filesystem, pafs.LocalFileSystem):
        with _replacing(Path(path)) as partial:
            yield partial
        return
    # A started upload cannot be undone, so it starts after the last write.
    with tempfile.TemporaryFile() as spool:
        yield spool
        spool.seek(0)
        with filesystem.open_output_stream(path) as stream:
            shutil.copyfileobj(spool, stream, 2**24)


def move(uri: str | Path, target: str | Path) -> None:
    """Move a file within its filesystem, creating parent folders; atomic on a local disk."""
    filesystem, path = open_uri(uri)
    target_path = open_uri(target)[1]
    if isinstance(filesystem, pafs.LocalFileSystem):
        Path(target_path).parent.mkdir(parents=True, exist_ok=True)
    filesystem.move(path, target_path)


def is_partial(name: str) -> bool:
    """Whether `name` is the name of a temporary file of this module."""
    return _PARTIAL.fullmatch(name) is not None


def remove_partial_files(uri: str | Path) -> None:
    """Delete temporary files that killed writers left behind under the folder `uri`, on a local disk."""
    filesystem, path = open_uri(uri)
    if isinstance(filesystem, pafs.LocalFileSystem):
        for folder, _, names in os.walk(path):
            for name in filter(is_partial, names):
                Path(folder, name).unlink(missing_ok=True)


def read_json(uri: str | Path) -> Any:
    """Read the JSON file at `uri`; UserError if it is not JSON, FileNotFoundError if it does not exist."""
    text = read_bytes(uri)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{uri} is not JSON ({error}); download or create it again") from error


@contextmanager
def validating(uri: str | Path, hint: str = "download or create it again") -> Iterator[None]:
    """Turn errors caused by unexpected content of the file at `uri`, which is not trusted, into a UserError."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, csv.Error) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{uri} is not what raylivecell writes ({reason}); {hint}") from error


def write_json(uri: str | Path, value: Any) -> None:
    """Write `value` as indented JSON at `uri`, atomically."""
    write_bytes(uri, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def delete(uri: str | Path) -> None:
    """Delete the file or folder at `uri`, if it exists."""
    filesystem, path = open_uri(uri)
    kind = filesystem.get_file_info(path).type
    if kind == pafs.FileType.Directory:
        filesystem.delete_dir(path)
    elif kind == pafs.FileType.File:
        filesystem.delete_file(path)


def delete_empty(uri: str | Path) -> None:
    """Delete the folder at `uri`, if it exists and is empty."""
    filesystem, path = open_uri(uri)
    if filesystem.get_file_info(path).type == pafs.FileType.Directory and not list_names(uri):
        filesystem.delete_dir(path)


@contextmanager
def _replacing(target: Path) -> Iterator[IO[bytes]]:
    target.parent.mkdir(parents=True, exist_ok=True)
    name = target.name.encode()[:_NAME_BYTES].decode(errors="ignore")
    partial = target.with_name(f".{name}.{uuid.uuid4().hex}.partial")
    try:
        with open(partial, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
