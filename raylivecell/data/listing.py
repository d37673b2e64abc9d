"""The files of a folder: hidden ones are passed over, links are followed by a stated rule.

A link may lead to any file of the machine, and an unpacked archive may hold one. So a link to a file is followed where
it stays in the folder, or where its target is named by the checksum of its content, as git-annex, DVC and Hugging
Face's cache name files: nobody's private file has such a name. All others only with `follow_links`.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from pyarrow import fs as pafs

from raylivecell.core import console, storage
from raylivecell.core.errors import UserError
from raylivecell.images import formats

_NO_DATA = {"__MACOSX", "@eaDir"}
"""Folders of macOS's archives and of Synology's thumbnails, whose files have the names of the real ones."""

_CONTENT_NAME = re.compile(
    r"/[A-Z0-9_]+(-[a-zA-Z]\d+)*--[0-9a-f]{32,}(\.\w+)*$"  # git-annex: SHA256E-s1234--HASH.tif
    r"|/[0-9a-f]{2}/[0-9a-f]{30}$"  # DVC: files/md5/HA/SH
    r"|/([0-9a-f]{40}|[0-9a-f]{64})$"  # Hugging Face: blobs/HASH
)


@dataclass
class Listing:
    """The files of a folder."""

    infos: dict[str, pafs.FileInfo] = field(default_factory=dict)
    """By path relative to the folder, with forward slashes."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Reason by path, of image and JSON files that cannot be read: links to nothing, names that are not UTF-8."""
    followed: list[str] = field(default_factory=list)
    """Targets of links that lead out of the folder."""


def list_folder(uri: str, follow_links: bool = False) -> Listing:
    """List the folder `uri`; UserError where there is none or where a link is not to be followed."""
    filesystem, root = storage.open_uri(uri)
    if filesystem.get_file_info(root).type != pafs.FileType.Directory:
        raise UserError(f"no folder at {uri}; name the folder that holds the images")
    try:
        if isinstance(filesystem, pafs.LocalFileSystem):
            return _list_local(filesystem, root, follow_links)
        found = filesystem.get_file_info(pafs.FileSelector(root, recursive=True))
    except OSError as error:
        raise UserError(f"cannot list {uri}: {error}; check that it may be read") from error
    files = {info.path[len(root) :].lstrip("/"): info for info in found if info.type == pafs.FileType.File}
    odd = [path for path in files if ".." in path.split("/") or "\0" in path]  # an object store's key may be any text
    if odd:
        raise UserError(f"{uri} holds {odd[0]!r}, a name that leads out of it; rename or delete it")
    return Listing({path: info for path, info in files.items() if not is_hidden(path)})


def show(listing: Listing, folder: str) -> None:
    """Print a line for links that were followed, and one a file that was left out."""
    lines = [f"left out: {path} ({reason})" for path, reason in listing.left_out.items()]
    lines = lines if len(lines) <= 6 else [*lines[:5], f"and {len(lines) - 5} more are left out"]
    if listing.followed:
        where = os.path.commonpath([os.path.dirname(target) for target in listing.followed])
        lines.append(f"{len(listing.followed)} files of {folder} are links to files in {where}: followed")
    for line in lines:
        console.console.print(line, markup=False, highlight=False, soft_wrap=True)


def is_hidden(path: str) -> bool:
    """Whether a file or one of its folders is hidden, or holds no data: `._train.json`, `.git`, `__MACOSX`."""
    return any(part.startswith(".") or part in _NO_DATA for part in path.split("/"))


def ascii_name(path: str) -> str:
    """`path`, printable also where it is not UTF-8."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _list_local(filesystem: pafs.FileSystem, root: str, follow_links: bool) -> Listing:
    listing = Listing()
    paths = []
    for path in sorted(_walk(root, follow_links, listing)):
        relative = path[len(root) :].lstrip("/")
        if not _is_utf8(relative):
            listing.left_out |= {ascii_name(relative): "its name is not UTF-8; rename it"} if _may_be_read(path) else {}
        elif not os.path.islink(path) or _follow(path, root, follow_links, listing):
            paths.append(path)
    infos = filesystem.get_file_info(paths)
    files = (info for info in infos if info.type == pafs.FileType.File)
    listing.infos = {info.path[len(root) :].lstrip("/"): info for info in files}
    return listing


def _walk(root: str, follow_links: bool, listing: Listing) -> Iterator[str]:
    """Paths of all files under `root`; each folder once, however many links lead to it: a circle has no end."""

    def fail(error: OSError) -> None:
        raise error

    waiting, done = [root], set[str]()
    while waiting:
        for folder, folders, files in os.walk(waiting.pop(0), onerror=fail):
            real = os.path.realpath(folder)
            if real in done:
                folders.clear()
                listing.left_out[folder[len(root) :].lstrip("/")] = "a link to a folder that is listed already"
                continue
            done.add(real)
            folders[:] = sorted(name for name in folders if not is_hidden(name))
            links = [path for name in folders if os.path.islink(path := os.path.join(folder, name))]
            if links and not follow_links:
                raise _refused(links[0])
            waiting += links
            yield from (os.path.join(folder, name) for name in files if not is_hidden(name))


def _follow(link: str, root: str, follow_links: bool, listing: Listing) -> bool:
    """Whether the file behind `link` is to be listed; UserError where that must be asked for."""
    if not _may_be_read(link):
        return False
    target = os.path.realpath(link)
    if not os.path.exists(target):
        listing.left_out[link[len(root) :].lstrip("/")] = "a link to a file that is not there: git annex get, dvc pull?"
        return False
    if not os.path.isfile(target):
        raise _refused(link)
    if target.startswith(os.path.realpath(root) + os.sep):
        return True
    if not (follow_links or _CONTENT_NAME.search(target)):
        raise _refused(link)
    listing.followed.append(target)
    return True


def _refused(link: str) -> UserError:
    target = os.path.realpath(link)
    if os.path.exists(target) and not (os.path.isfile(target) or os.path.isdir(target)):
        return UserError(f"{link} is a link to {target}, which is no file; delete it")
    return UserError(f"{link} is a link to {target}; put a copy there, or set --follow-links if you trust the folder")


def _may_be_read(path: str) -> bool:
    return formats.is_image_name(path) or path.lower().endswith(".json")


def _is_utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True
