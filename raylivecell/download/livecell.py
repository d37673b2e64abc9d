"""LIVECell from its public bucket to a folder for `prepare --source`.

1. Each missing or different file is fetched, verified, recorded in `download.json`, then renamed.
2. `images.zip` is unpacked into `images/`.

A second run verifies existing files by their recorded size and SHA-256, and fetches only missing or different ones.
"""

import os
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from raylivecell.core import storage
from raylivecell.core.console import console
from raylivecell.core.errors import UserError, os_error_line
from raylivecell.data.description import LIVECELL_CITATION, LIVECELL_LICENCE
from raylivecell.download import archive
from raylivecell.download.fetch import Expected, adopt, fetch, publish, sha256_and_md5

BASE_URL = "https://livecell-dataset.s3.eu-central-1.amazonaws.com/LIVECell_dataset_2021/"
"""From the dataset's README. The `url` fields of its annotation records answer 401 and are not used."""
RECORD = "download.json"
FORMAT_VERSION = 1

Group = Literal["images", "train", "val", "test", "single-cells", "size-split"]
CELL_TYPES = ("a172", "bt474", "bv2", "huh7", "mcf7", "shsy5y", "skbr3", "skov3")
SPLITS = ("train", "val", "test")
SIZE_SPLITS = ("0_train2", "1_train4", "2_train5", "3_train25", "4_train50")
FILES: dict[Group, tuple[str, ...]] = {
    "images": ("images.zip",),
    "train": ("annotations/LIVECell/livecell_coco_train.json",),
    "val": ("annotations/LIVECell/livecell_coco_val.json",),
    "test": ("annotations/LIVECell/livecell_coco_test.json",),
    "single-cells": tuple(
        f"annotations/LIVECell_single_cells/{cell}/{split}.json" for cell in CELL_TYPES for split in SPLITS
    ),
    "size-split": tuple(f"annotations/LIVECell_dataset_size_split/{name}percent.json" for name in SIZE_SPLITS),
}
"""Paths relative to the base URL and to the output folder."""


def download(
    out: Path,
    files: Sequence[Group] = ("images", "train", "val", "test"),
    base_url: str = BASE_URL,
    sha256: Sequence[str] = (),
    size: Sequence[str] = (),
) -> dict[str, Any]:
    """Fetch the groups `files` of LIVECell (1.2 GB of images, unpacked, up to 2.1 GB of annotations) into `out`.

    Args:
        sha256, size: FILE=HEX and FILE=BYTES; FILE is the name or path of one file.

    Returns:
        The content of `out/download.json`: licence, citation and, for every file ever fetched into `out`, url, bytes,
        sha256 and etag.

    Raises:
        UserError: a file cannot be fetched or stored; partial files never have a final name.
    """
    paths = [path for group in dict.fromkeys(files) for path in FILES[group]]
    address = urllib.parse.urlsplit(base_url)
    if address.scheme not in ("http", "https") or not address.netloc:
        raise UserError(f"--base-url {base_url} is not an http:// or https:// address; the default is {BASE_URL}")
    hashes = _values_by_path(paths, sha256, "--sha256", r"[0-9a-fA-F]{64}", "64 hexadecimal digits")
    sizes = _values_by_path(paths, size, "--size", r"[0-9]{1,18}", "bytes")
    record = _read_record(out)
    _print(f"LIVECell is {LIVECELL_LICENCE}: for research and other non-commercial use. Cite: {LIVECELL_CITATION}")
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path in paths:
            expected = Expected(int(sizes[path]) if path in sizes else None, hashes.get(path, "").lower() or None)
            if not _is_intact(out / path, record["files"].get(path), expected):
                _fetch_and_record(base_url.rstrip("/") + "/", out, path, expected, record)
        if "images.zip" in paths:
            written, unchanged = archive.unpack(out / "images.zip", out)
            _print(f"images: {written} unpacked, {unchanged} already there")
    except OSError as error:
        raise UserError(os_error_line(error, f"cannot write {error.filename or out}: {error.strerror}")) from error
    _print(f"LIVECell is in {out}; next: raylivecell prepare --source {out} --out DATA")
    return record


def _values_by_path(paths: Sequence[str], pairs: Sequence[str], flag: str, pattern: str, form: str) -> dict[str, str]:
    """Parse FILE=VALUE pairs."""
    values: dict[str, str] = {}
    for pair in pairs:
        name, _, value = pair.rpartition("=")
        matches = [path for path in paths if path == name or path.endswith("/" + name)]
        if len(matches) != 1 or not re.fullmatch(pattern, value):
            raise UserError(f"{flag} {pair}: give FILE=VALUE; VALUE is {form}, FILE one of {', '.join(paths)}")
        values[matches[0]] = value
    return values


def _read_record(out: Path) -> dict[str, Any]:
    """Return `out/download.json`, or an empty record."""
    record = {"format_version": FORMAT_VERSION, "licence": LIVECELL_LICENCE, "citation": LIVECELL_CITATION, "files": {}}
    path = out / RECORD
    if path.exists():
        with storage.validating(path, "delete it; existing files are then verified or fetched again"):
            record["files"] = {
                name: {key: entry[key] for key in ("url", "bytes", "sha256", "etag", "etag_is_md5")}
                for name, entry in storage.read_json(path)["files"].items()
            }
    return record


def _is_intact(target: Path, entry: Mapping[str, Any] | None, expected: Expected) -> bool:
    """Whether `target` matches its record; if not, rename it. UserError if the user expects another file."""
    if entry is None or not target.exists():
        return False
    size, sha256 = target.stat().st_size, sha256_and_md5(target)[0]
    if (size, sha256) != (entry["bytes"], entry["sha256"]):
        _set_aside(target, f"has {size} bytes and SHA-256 {sha256}, recorded: {entry['bytes']} and {entry['sha256']}")
        return False
    if expected.size not in (None, size) or expected.sha256 not in (None, sha256):
        raise UserError(
            f"{target} has {size} bytes and SHA-256 {sha256}, as fetched; correct --size or --sha256, or delete "
            "it to fetch it again"
        )
    _print(f"{target.name}: already there, verified")
    return True


def _set_aside(target: Path, reason: str) -> None:
    renamed = target.with_name(target.name + ".unverified")
    os.replace(target, renamed)
    _print(f"{target.name} {reason}: renamed to {renamed.name}, fetching it again")


def _fetch_and_record(base_url: str, out: Path, path: str, expected: Expected, record: dict[str, Any]) -> None:
    """Fetch a file. It is recorded before it is renamed: a kill in between costs a verification, not a download."""
    url, target = base_url + path, out / path
    if target.exists() and not adopt(url, target):
        _set_aside(target, "has no record, and its length is not the server's")
    check = archive.check_zip if path.endswith(".zip") else archive.check_json
    record["files"][path] = entry = fetch(url, target, check, expected)
    storage.write_json(out / RECORD, record)
    publish(target)
    checksum = "size, MD5 and content" if entry["etag_is_md5"] else "size and content (no checksum from the server)"
    _print(f"{target.name}: {entry['bytes']} bytes, {checksum} verified, SHA-256 {entry['sha256']}")


def _print(line: str) -> None:
    console.print(line, soft_wrap=True, markup=False)
