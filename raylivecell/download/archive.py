"""Are downloaded JSON and zip files whole, and LIVECell's images.zip into its layout.

Zip files come from a network: names that leave the folder, links, and more bytes than LIVECell can have are refused.
"""

import os
import posixpath
import re
import stat
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from raylivecell.core.errors import UserError
from raylivecell.download.fetch import Damaged, check_room, disk_errors

IMAGE_FOLDERS = ("livecell_train_val_images", "livecell_test_images")
MOST_BYTES = 8 << 30
"""Unpacked, at most: LIVECell's images are 1.3 GB."""
MOST_MEMBER_BYTES = 64 << 20
"""One member, which is unpacked in memory: LIVECell's images are 0.4 MB."""
MOST_MEMBERS = 100_000
"""LIVECell has 5,239 images."""
BLOCK = 1 << 22
_NOT_STRUCTURE = bytes(set(range(256)) - set(b'"{}[]'))


def check_json(path: Path) -> None:
    """Damaged where the file is not one JSON object to its end: cut anywhere, it has a bracket or string open.

    Counts brackets outside strings, about 1 s a GB; a parser in Python needs minutes for LIVECell's train JSON.
    """
    depth, in_string, rest, first, last = 0, False, b"", b"", b""
    with open(path, "rb") as stream:
        while block := stream.read(BLOCK):
            words = block.strip()
            first, last = first or words[:1], words[-1:] or last
            block = rest + block
            escaped = len(block) - len(block.rstrip(b"\\"))
            rest = b"\\" if escaped % 2 else b""
            block = re.sub(rb"\\.", b"", block[: len(block) - len(rest)], flags=re.DOTALL) if b"\\" in block else block
            parts = block.translate(None, _NOT_STRUCTURE).split(b'"')
            outside = b"".join(parts[int(in_string) :: 2])
            in_string ^= len(parts) % 2 == 0
            depth += outside.count(b"{") + outside.count(b"[") - outside.count(b"}") - outside.count(b"]")
    if first != b"{":
        raise Damaged(f"is no JSON object (it begins with {first!r})")
    if last != b"}" or depth or in_string:
        raise Damaged("is JSON cut short")


def check_zip(path: Path) -> None:
    """Damaged where the zip's directory or a member's CRC is wrong; UserError where a member is refused."""
    try:
        with zipfile.ZipFile(path) as archive:
            places(archive, path)
            if bad := archive.testzip():
                raise Damaged(f"member {bad} has a wrong CRC")
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise Damaged(f"is no whole zip ({error})") from error


def places(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    """Where each image of LIVECell goes, relative to `images/` with forward slashes; other members are not in it.

    UserError where any member could do harm.
    """
    members = archive.infolist()
    unpacked = sum(member.file_size for member in members)
    if len(members) > MOST_MEMBERS or unpacked > MOST_BYTES:
        raise UserError(
            f"{path} holds {len(members)} files of {unpacked / 1e9:.1f} GB, far more than LIVECell; delete it and "
            "choose another --base-url"
        )
    found: dict[str, zipfile.ZipInfo] = {}
    for member in members:
        if reason := _harm(member):
            raise UserError(f"{path}: member {member.filename!r} {reason}; delete it and choose another --base-url")
        place = _place(member)
        if place in found:
            raise UserError(f"{path}: two members would be images/{place}; delete it and choose another --base-url")
        if place:
            found[place] = member
    if not found:
        raise UserError(f"{path} holds no {' or '.join(IMAGE_FOLDERS)}; it is not LIVECell's, delete it")
    return found


def _harm(member: zipfile.ZipInfo) -> str | None:
    """Why a member is refused, or None."""
    name = member.orig_filename
    if name.startswith(("/", "\\", "~")) or ":" in name or "\\" in name or "\0" in name or ".." in name.split("/"):
        return "leaves the folder"
    kind = stat.S_IFMT(member.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or device"
    if member.file_size > MOST_MEMBER_BYTES:
        return f"has {member.file_size / 1e6:.0f} MB, more than an image of LIVECell can have"
    return "is encrypted" if member.flag_bits & 1 else None


def _place(member: zipfile.ZipInfo) -> str | None:
    """The part of a member's name from LIVECell's image folder on; None for a folder and for what is no image."""
    parts = posixpath.normpath(member.filename).split("/")
    starts = [parts.index(folder) for folder in IMAGE_FOLDERS if folder in parts[:-1]]
    if member.is_dir() or not starts or parts[0] == "__MACOSX" or parts[-1].startswith("."):
        return None
    return "/".join(parts[starts[0] :])


def unpack(path: Path, out: Path, moved: Callable[[int, int], None] = lambda done, total: None) -> tuple[int, int]:
    """The images of the zip at `path` under `out/images`; images written, and images that were there whole (by CRC).

    A new `images` folder appears whole or not at all; in one that is there, images missing or different are written
    one by one, each atomically. `moved` is told (images done, images in all).
    """
    final, fresh = out / "images", out / ".images.partial"
    root = final if final.exists() else fresh
    written = 0
    with zipfile.ZipFile(path) as archive:
        found = places(archive, path)
        missing = {place: member for place, member in found.items() if not _is_whole(root / place, member)}
        check_room(out, sum(member.file_size for member in missing.values()), f"unpacking {path}")
        moved(len(found) - len(missing), len(found))
        for place, member in missing.items():
            _write(archive, member, root / place)
            written += 1
            moved(len(found) - len(missing) + written, len(found))
    if root == fresh:
        with disk_errors(final):
            os.replace(fresh, final)
    return written, len(found) - written


def _is_whole(target: Path, member: zipfile.ZipInfo) -> bool:
    if not target.is_file() or target.stat().st_size != member.file_size:
        return False
    return zlib.crc32(target.read_bytes()) == member.CRC


def _write(archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> None:
    """Write one member atomically. Images are small (0.3 MB): whole in memory; `read` checks the CRC."""
    try:
        content = archive.read(member)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(f"{archive.filename}: {member.filename}: {error}; run again to fetch it anew") from error
    partial = target.with_name(f".{target.name}.partial")
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        os.replace(partial, target)
