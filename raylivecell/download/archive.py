"""Check downloaded JSON and zip files, and unpack LIVECell's images.zip.

Zip files are untrusted: paths that leave the folder, links, and more bytes than LIVECell can have are refused.
"""

import os
import posixpath
import re
import stat
import zipfile
import zlib
from pathlib import Path

from raylivecell.core.console import track
from raylivecell.core.errors import UserError
from raylivecell.download.fetch import DamagedFileError, check_free_space

IMAGE_FOLDERS = ("livecell_train_val_images", "livecell_test_images")
MAX_BYTES = 8 << 30
"""Maximum unpacked size of all members: LIVECell's images have 1.3 GB."""
MAX_MEMBER_BYTES = 64 << 20
"""Maximum size of one member, which is unpacked in memory: LIVECell's images have 0.4 MB."""
MAX_MEMBERS = 100_000
"""LIVECell has 5,239 images."""
BLOCK = 1 << 22
_NOT_STRUCTURE = bytes(set(range(256)) - set(b'"{}[]'))
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError)


def check_json(path: Path) -> None:
    """Raise DamagedFileError unless the file is one complete JSON object: truncation leaves a bracket or string open.

    Count brackets outside strings, about 1 s per GB; a parser in Python needs minutes for LIVECell's train JSON.
    """
    depth, in_string, rest, first, last = 0, False, b"", b"", b""
    with open(path, "rb") as stream:
        while block := stream.read(BLOCK):
            text = block.strip()
            first, last = first or text[:1], text[-1:] or last
            block = rest + block
            rest = b"\\" if (len(block) - len(block.rstrip(b"\\"))) % 2 else b""
            block = re.sub(rb"\\.", b"", block[: len(block) - len(rest)], flags=re.DOTALL)
            parts = block.translate(None, _NOT_STRUCTURE).split(b'"')
            outside = b"".join(parts[int(in_string) :: 2])
            in_string ^= len(parts) % 2 == 0
            depth += outside.count(b"{") + outside.count(b"[") - outside.count(b"}") - outside.count(b"]")
    if first != b"{":
        raise DamagedFileError(f"not a JSON object (it starts with {first!r})")
    if last != b"}" or depth or in_string:
        raise DamagedFileError("the JSON is truncated")


def check_zip(path: Path) -> None:
    """Raise DamagedFileError for a wrong directory or CRC, UserError for a refused member."""
    try:
        with zipfile.ZipFile(path) as archive:
            image_members(archive, path)
            if name := archive.testzip():
                raise DamagedFileError(f"member {name} has a wrong CRC")
    except _ZIP_ERRORS as error:
        raise DamagedFileError(f"not a complete zip ({error})") from error


def image_members(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    """Return LIVECell's images by path relative to `images/`, without other members; UserError for a harmful member."""
    advice = "delete it and choose another --base-url"
    members = archive.infolist()
    size = sum(member.file_size for member in members)
    if len(members) > MAX_MEMBERS or size > MAX_BYTES:
        raise UserError(f"{path} contains {len(members)} files of {size / 1e9:.1f} GB, more than LIVECell; {advice}")
    images: dict[str, zipfile.ZipInfo] = {}
    for member in members:
        if reason := _harm(member):
            raise UserError(f"{path}: member {member.filename!r} {reason}; {advice}")
        parts = posixpath.normpath(member.filename).split("/")
        starts = [parts.index(folder) for folder in IMAGE_FOLDERS if folder in parts[:-1]]
        if member.is_dir() or not starts or parts[0] == "__MACOSX" or parts[-1].startswith("."):
            continue
        name = "/".join(parts[starts[0] :])
        if name in images:
            raise UserError(f"{path}: two members would be unpacked to images/{name}; {advice}")
        images[name] = member
    if not images:
        raise UserError(f"{path} has no {' or '.join(IMAGE_FOLDERS)}: it is not LIVECell's; {advice}")
    return images


def _harm(member: zipfile.ZipInfo) -> str | None:
    """Return the reason to refuse a member, or None."""
    name = member.orig_filename
    if name.startswith(("/", "\\", "~")) or ":" in name or "\\" in name or "\0" in name or ".." in name.split("/"):
        return "leaves the folder"
    if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or device"
    if member.file_size > MAX_MEMBER_BYTES:
        return f"has {member.file_size / 1e6:.0f} MB, more than an image of LIVECell"
    return "is encrypted" if member.flag_bits & 1 else None


def unpack(path: Path, out: Path) -> tuple[int, int]:
    """Unpack the images of a zip into `out/images`, which appears only when complete.

    In an existing folder, missing or different (by CRC) images are written atomically, one by one.

    Returns:
        Number of images written, and number of images already present.
    """
    final, partial = out / "images", out / ".images.partial"
    root = final if final.exists() else partial
    with zipfile.ZipFile(path) as archive:
        images = image_members(archive, path)
        missing = [(root / name, member) for name, member in images.items() if not _is_intact(root / name, member)]
        check_free_space(out, sum(member.file_size for _, member in missing), f"unpacking {path}")
        for target, member in track(missing, f"unpacking {path.name}", len(missing)):
            try:
                content = archive.read(member)  # checks the CRC
            except _ZIP_ERRORS as error:
                raise UserError(f"{path}: {member.filename}: {error}; delete it and run again") from error
            temporary = target.with_name(f".{target.name}.partial")
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
            os.replace(temporary, target)
    if root == partial:
        os.replace(partial, final)
    return len(missing), len(images) - len(missing)


def _is_intact(target: Path, member: zipfile.ZipInfo) -> bool:
    if not target.is_file() or target.stat().st_size != member.file_size:
        return False
    return zlib.crc32(target.read_bytes()) == member.CRC
