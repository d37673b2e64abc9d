"""LIVECell from its public bucket to a folder that `prepare` takes.

1. Each missing or incomplete file is fetched (fetch.py), verified, recorded in `livecell.json`, then renamed.
2. `images.zip` is unpacked into `images/`.

Run again, it verifies what is there by the recorded size and SHA-256 and fetches only what is missing or differs.
"""

import os
import re
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from raylivecell.core import storage
from raylivecell.core.console import PLAIN_EVERY_S, console
from raylivecell.core.errors import UserError
from raylivecell.data.description import LIVECELL_CITATION, LIVECELL_LICENCE
from raylivecell.download import archive
from raylivecell.download.fetch import PATIENT, Retry, Want, adopt, digests, disk_errors, fetch, publish

BASE_URL = "https://livecell-dataset.s3.eu-central-1.amazonaws.com/LIVECell_dataset_2021/"
"""As the dataset's README gives it; annotation records have `url` fields that answer 401 and are never used."""
RECORD = "download.json"
FORMAT_VERSION = 1

Group = Literal["images", "train", "val", "test", "single-cells", "size-split"]
CELL_TYPES = ("a172", "bt474", "bv2", "huh7", "mcf7", "shsy5y", "skbr3", "skov3")
_NOTES = "annotations/"
FILES: dict[Group, tuple[str, ...]] = {
    "images": ("images.zip",),
    "train": (_NOTES + "LIVECell/livecell_coco_train.json",),
    "val": (_NOTES + "LIVECell/livecell_coco_val.json",),
    "test": (_NOTES + "LIVECell/livecell_coco_test.json",),
    "single-cells": tuple(
        f"{_NOTES}LIVECell_single_cells/{cell_type}/{split}.json"
        for cell_type in CELL_TYPES
        for split in ("train", "val", "test")
    ),
    "size-split": tuple(
        f"{_NOTES}LIVECell_dataset_size_split/{number}_train{percent}percent.json"
        for number, percent in enumerate((2, 4, 5, 25, 50))
    ),
}
"""Paths under the base URL, and under the output folder."""


def download(
    out: Path,
    files: Sequence[Group] = ("images", "train", "val", "test"),
    base_url: str = BASE_URL,
    sha256: Sequence[str] = (),
    size: Sequence[str] = (),
    retry: Retry = PATIENT,
) -> dict[str, Any]:
    """Fetch LIVECell's `files` (1.3 GB of images, the same again unpacked, up to 2.1 GB of annotations) into `out`.

    `sha256` and `size` are FILE=HEX and FILE=BYTES, FILE a name or path of one of the files. Returns what it writes to
    `out/download.json`: licence, citation and, for every file ever fetched into `out`, url, bytes, sha256 and etag.
    UserError where a file cannot be had or stored; nothing partial then has a final name.
    """
    paths = [path for group in dict.fromkeys(files) for path in FILES[group]]
    base_url = _checked(base_url)
    wants = _wants(paths, sha256, size)
    record = _read_record(out)
    _say(f"LIVECell is {LIVECELL_LICENCE}: for research and other non-commercial use. Cite: {LIVECELL_CITATION}")
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    for path in paths:
        if not _is_whole(out / path, record["files"].get(path), wants[path]):
            _fetch_one(base_url, out, path, wants[path], retry, record)
    if "images.zip" in paths:
        with _bar("unpacking images.zip", of_bytes=False) as moved:
            written, kept = archive.unpack(out / "images.zip", out, moved)
        _say(f"images: {written} unpacked, {kept} there already")
    _say(f"LIVECell is in {out}; next: raylivecell prepare --source {out} --out DATA")
    return record


def _checked(base_url: str) -> str:
    parts = urllib.parse.urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UserError(f"--base-url {base_url} is no http:// or https:// address; the default is {BASE_URL}")
    return base_url.rstrip("/") + "/"


def _wants(paths: Sequence[str], sha256: Sequence[str], size: Sequence[str]) -> dict[str, Want]:
    """What the user's FILE=VALUE arguments say of each path."""
    hashes = _pairs(paths, sha256, "--sha256", r"[0-9a-fA-F]{64}", "64 hexadecimal digits")
    sizes = _pairs(paths, size, "--size", r"[0-9]+", "bytes")
    known = {path: int(value) for path, value in sizes.items()}
    return {path: Want(known.get(path), hashes.get(path, "").lower() or None) for path in paths}


def _pairs(paths: Sequence[str], given: Sequence[str], flag: str, pattern: str, form: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for pair in given:
        name, _, value = pair.rpartition("=")
        named = [path for path in paths if path == name or path.endswith("/" + name)]
        if len(named) != 1:
            raise UserError(f"{flag} {pair}: FILE={form}, FILE one of {', '.join(paths)}")
        if not re.fullmatch(pattern, value):
            raise UserError(f"{flag} {pair}: {value!r} is not {form}")
        found[named[0]] = value
    return found


def _read_record(out: Path) -> dict[str, Any]:
    """`out/download.json`, or an empty one."""
    place = out / RECORD
    legal = {"format_version": FORMAT_VERSION, "licence": LIVECELL_LICENCE, "citation": LIVECELL_CITATION}
    if not place.exists():
        return {**legal, "files": {}}
    try:
        files = storage.read_json(place)["files"]
        if all({"bytes", "sha256"} <= set(entry) for entry in files.values()):
            return {**legal, "files": files}
    except (UserError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(f"{place} is not what download writes; delete it, and the files are verified or fetched anew")


def _is_whole(target: Path, entry: Mapping[str, Any] | None, want: Want) -> bool:
    """Whether `target` is as recorded; if not it is moved aside and said so. UserError if the user wants another."""
    if entry is None or not target.exists():
        return False
    size = target.stat().st_size
    wrong = None
    if size != entry["bytes"]:
        wrong = f"has {size} bytes, recorded were {entry['bytes']}"
    elif (sha256 := digests(target)[0]) != entry["sha256"]:
        wrong = f"has SHA-256 {sha256}, recorded was {entry['sha256']}"
    elif want.size not in (None, size) or want.sha256 not in (None, sha256):
        raise UserError(
            f"{target} has {size} bytes and SHA-256 {sha256}, as it was fetched, not what you give; mend --size or "
            "--sha256, or delete it to fetch it again"
        )
    if wrong is None:
        _say(f"{target.name}: there already, verified")
        return True
    _move_aside(target, wrong)
    return False


def _move_aside(target: Path, why: str) -> None:
    aside = target.with_name(target.name + ".unverified")
    with disk_errors(aside):
        os.replace(target, aside)
    _say(f"{target.name} {why}: moved to {aside.name}, fetching it again")


def _fetch_one(base_url: str, out: Path, path: str, want: Want, retry: Retry, record: dict[str, Any]) -> None:
    """Fetch, verify, record, name. The record comes first: a kill in between costs a verification, not a download."""
    url, target = base_url + path, out / path
    if target.exists() and not adopt(url, target):
        _move_aside(target, "was not fetched by this command and is not as long as the server's")
    check = archive.check_zip if path.endswith(".zip") else archive.check_json
    with _bar(target.name) as moved:
        entry = fetch(url, target, check, want, retry, moved, _say)
    record["files"][path] = entry
    with disk_errors(out / RECORD):
        storage.write_json(out / RECORD, record)
        publish(target)
    checksum = "size, MD5 and content" if entry["etag_is_md5"] else "size and content (the server gives no checksum)"
    _say(f"{target.name}: {entry['bytes']} bytes, {checksum} verified, SHA-256 {entry['sha256']}")


def _say(line: str) -> None:
    console.print(line, soft_wrap=True, markup=False)


@contextmanager
def _bar(what: str, of_bytes: bool = True) -> Iterator[Callable[[int, int | None], None]]:
    """Shows how far it is, in a terminal as a bar, elsewhere a line every few seconds; call it with (done, total)."""
    if not console.is_terminal:
        yield _plain(what, " bytes" if of_bytes else "")
        return
    amounts = (DownloadColumn(), TransferSpeedColumn()) if of_bytes else (TextColumn("{task.completed}/{task.total}"),)
    columns = (TextColumn("{task.description}"), BarColumn(), *amounts, TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _plain(what: str, unit: str) -> Callable[[int, int | None], None]:
    last = time.monotonic()

    def moved(done: int, total: int | None) -> None:
        nonlocal last
        if time.monotonic() - last > PLAIN_EVERY_S:
            last = time.monotonic()
            print(f"{what}: {done}/{total or '?'}{unit}", file=sys.stderr, flush=True)

    return moved
