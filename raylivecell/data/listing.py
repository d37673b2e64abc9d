"""List the files of a folder, without hidden files and unsafe links.

An unpacked archive may contain links to any file of the machine. A link to a file is followed only if its target is
inside the folder, or is named by the checksum of its content, as in the stores of git-annex, DVC and Hugging Face:
private files have no such names. All other links need `follow_links`.
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
"""Folders of macOS archives and Synology thumbnails, whose files have the same names as the originals."""

ANNOTATION_SUFFIXES = (".json", ".npy", ".zip", ".roi", ".geojson")
"""Suffixes of annotation files that are no images."""
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
    """Reason by path for image and annotation files that cannot be read: dangling links, names that are not UTF-8."""
    followed: list[str] = field(default_factory=list)
    """Targets of links that lead out of the folder."""


def list_folder(uri: str, follow_links: bool = False) -> Listing:
    """List the folder `uri`; UserError if it does not exist or a link must not be followed."""
    filesystem, root = storage.open_uri(uri)
    if filesystem.get_file_info(root).type != pafs.FileType.Directory:
        raise UserError(f"no folder at {uri}; give the folder of the images")
    try:
        if isinstance(filesystem, pafs.LocalFileSystem):
            return _list_local(filesystem, root, follow_links)
        infos = filesystem.get_file_info(pafs.FileSelector(root, recursive=True))
    except OSError as error:
        raise UserError(f"cannot list {uri}: {error}; check its permissions") from error
    files = {info.path[len(root) :].lstrip("/"): info for info in infos if info.type == pafs.FileType.File}
    # The key of an object may be any text.
    unsafe = [path for path in files if ".." in path.split("/") or "\0" in path]
    if unsafe:
        raise UserError(f"{uri} contains {unsafe[0]!r}, a path out of the folder; rename or delete it")
    return Listing({path: info for path, info in files.items() if not is_hidden(path)})


def _list_local(filesystem: pafs.FileSystem, root: str, follow_links: bool) -> Listing:
    listing = Listing()
    paths = []
    for path in sorted(_walk(root, follow_links, listing)):
        relative = path[len(root) :].lstrip("/")
        if not _is_utf8(relative):
            listing.left_out |= {_printable(relative): "its name is not UTF-8; rename it"} if _is_relevant(path) else {}
        elif not os.path.islink(path) or _follow(path, root, follow_links, listing):
            paths.append(path)
    infos = filesystem.get_file_info(paths)
    files = (info for info in infos if info.type == pafs.FileType.File)
    listing.infos = {info.path[len(root) :].lstrip("/"): info for info in files}
    return listing


def _walk(root: str, follow_links: bool, listing: Listing) -> Iterator[str]:
    """Yield the paths of all files under `root`, listing each folder once, because links may form a cycle."""

    def fail(error: OSError) -> None:
        raise error

    pending, visited = [root], set[str]()
    while pending:
        for folder, folders, files in os.walk(pending.pop(0), onerror=fail):
            real = os.path.realpath(folder)
            if real in visited:
                folders.clear()
                listing.left_out[folder[len(root) :].lstrip("/")] = "a link to a folder that is already listed"
                continue
            visited.add(real)
            folders[:] = sorted(name for name in folders if not is_hidden(name))
            links = [path for name in folders if os.path.islink(path := os.path.join(folder, name))]
            if links and not follow_links:
                raise _link_error(links[0])
            pending += links
            yield from (os.path.join(folder, name) for name in files if not is_hidden(name))


def is_hidden(path: str) -> bool:
    """Whether a file or one of its folders is hidden or contains no data: `._train.json`, `.git`, `__MACOSX`."""
    return any(part.startswith(".") or part in _NO_DATA for part in path.split("/"))


def _is_utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _printable(path: str) -> str:
    """Return `path` as printable text, with escapes for bytes that are not UTF-8."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _is_relevant(path: str) -> bool:
    """Whether the name is that of an image or an annotation file."""
    return formats.is_image_name(path) or path.lower().endswith(ANNOTATION_SUFFIXES)


def _follow(link: str, root: str, follow_links: bool, listing: Listing) -> bool:
    """Whether to list the target of `link`; UserError if that needs `follow_links`."""
    if not _is_relevant(link):
        return False
    target = os.path.realpath(link)
    if not os.path.exists(target):
        listing.left_out[link[len(root) :].lstrip("/")] = "a link to a missing file: git annex get, dvc pull?"
        return False
    if not os.path.isfile(target):
        raise _link_error(link)
    if target.startswith(os.path.realpath(root) + os.sep):
        return True
    if not (follow_links or _CONTENT_NAME.search(target)):
        raise _link_error(link)
    listing.followed.append(target)
    return True


def _link_error(link: str) -> UserError:
    target = os.path.realpath(link)
    if os.path.exists(target) and not (os.path.isfile(target) or os.path.isdir(target)):
        return UserError(f"{link} is a link to {target}, which is not a file; delete it")
    return UserError(f"{link} is a link to {target}; replace it by a copy, or, if you trust it, set --follow-links")


def show(listing: Listing, folder: str) -> None:
    """Print one line for the followed links, and one for each file that is left out."""
    lines = [f"left out: {path} ({reason})" for path, reason in listing.left_out.items()]
    lines = lines if len(lines) <= 6 else [*lines[:5], f"and {len(lines) - 5} more are left out"]
    if listing.followed:
        parent = os.path.commonpath([os.path.dirname(target) for target in listing.followed])
        lines.append(f"followed {len(listing.followed)} links from {folder} to files in {parent}")
    for line in lines:
        console.console.print(line, markup=False, highlight=False, soft_wrap=True)


def list_infos(uri: str, follow_links: bool = False) -> dict[str, pafs.FileInfo]:
    """List every file under the folder `uri`: size and modification time by path; UserError without a folder.

    Includes unreadable images (dangling links, names that are not UTF-8): reading them fails, so that each has a line
    in a result. Prints the files left out and the links followed.
    """
    listing = list_folder(uri, follow_links)
    show(listing, uri)
    unreadable = (path for path in listing.left_out if formats.is_image_name(path))
    return {path: pafs.FileInfo(path, pafs.FileType.File, size=0, mtime_ns=0) for path in unreadable} | listing.infos
