"""Where a source keeps its annotation files and images: LIVECell's layouts, and any folder of COCO JSON and images.

Local folders and object stores alike; paths here are relative to the source, with forward slashes.
"""

import fnmatch
import os
import posixpath
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pyarrow import fs as pafs

from raylivecell import images, storage
from raylivecell.errors import UserError
from raylivecell.shards import SPLITS

_SPLIT_WORDS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def list_files(uri: str) -> list[str]:
    """Every file under the folder `uri`, as sorted relative paths; UserError where there is no such folder."""
    return sorted(list_infos(uri))


def list_infos(uri: str) -> dict[str, pafs.FileInfo]:
    """What `list_files` lists, with each file's size and time of change."""
    filesystem, root = storage.open_uri(uri)
    if filesystem.get_file_info(root).type != pafs.FileType.Directory:
        raise UserError(f"no folder at {uri}; name the folder that holds the images")
    if isinstance(filesystem, pafs.LocalFileSystem):
        _refuse_links(root)
    try:
        found = filesystem.get_file_info(pafs.FileSelector(root, recursive=True))
    except OSError as error:
        raise UserError(f"cannot list {uri}: {error}; check that it may be read") from error
    files = {info.path[len(root) :].lstrip("/"): info for info in found if info.type == pafs.FileType.File}
    odd = [path for path in files if ".." in path.split("/") or "\0" in path]  # an object store's key may be any text
    if odd:
        raise UserError(f"{uri} holds {odd[0]!r}, a name that leads out of it; rename or delete it")
    return files


def _refuse_links(root: str) -> None:
    """UserError for a symbolic link that leads out of the folder, or to a folder: two in a circle are 2^40 paths."""
    real = os.path.realpath(root)
    for folder, folders, files in os.walk(root):
        for link in filter(os.path.islink, (os.path.join(folder, name) for name in (*folders, *files))):
            target = os.path.realpath(link)
            if os.path.isdir(target) or not target.startswith(real + os.sep):
                raise UserError(f"{link} is a link to {target}; put a copy there, or name the folder it leads to")


def split_of(path: str) -> str | None:
    """The one split that a file's name speaks of (`livecell_coco_train.json`, `val.json`), else None."""
    words = re.findall(r"[a-z]+", posixpath.basename(path).lower())
    named = {_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS}
    return named.pop() if len(named) == 1 else None


def find_annotations(files: Sequence[str], chosen: Mapping[str, str], source: str) -> dict[str, list[str]]:
    """Annotation files by split, in the order train, val, test.

    `chosen` (split -> path or pattern such as `LIVECell_single_cells/*/train.json`) decides; without it
    `livecell_coco_{train,val,test}.json`, wherever they are, then any JSON named after one split. UserError where
    none is found or where several could be meant.
    """
    jsons = [path for path in files if path.lower().endswith(".json")]
    if chosen:
        return {split: _match(jsons, chosen[split], source) for split in SPLITS if split in chosen}
    by_split: dict[str, list[str]] = defaultdict(list)
    for path in jsons:
        if split := split_of(path):
            by_split[split].append(path)
    found = {}
    for split in SPLITS:
        official = [path for path in by_split[split] if posixpath.basename(path) == f"livecell_coco_{split}.json"]
        paths = official or by_split[split]
        if paths and not _siblings(paths):
            raise UserError(
                f"{source} holds {len(paths)} annotation files for {split} ({', '.join(paths[:4])}, ...); "
                f"choose with --annotations {split} PATH"
            )
        if paths:
            found[split] = paths
    if not found:
        hint = f"found {', '.join(jsons[:4])}; " if jsons else ""
        raise UserError(
            f"no annotation JSON named after train, val or test in {source}; {hint}choose with --annotations train PATH"
        )
    return found


def _siblings(paths: Sequence[str]) -> bool:
    """Whether `paths` are one file, or files of one name in folders side by side (one a cell type)."""
    names = {posixpath.basename(path) for path in paths}
    parents = {posixpath.dirname(posixpath.dirname(path)) for path in paths}
    return len(paths) == 1 or (len(names) == 1 and len(parents) == 1)


def _match(jsons: Sequence[str], pattern: str, source: str) -> list[str]:
    wanted = pattern.removeprefix(source.rstrip("/") + "/").removeprefix("./")
    found = [path for path in jsons if path == wanted] or [p for p in jsons if fnmatch.fnmatchcase(p, wanted)]
    if not found:
        raise UserError(f"no annotation file {pattern} in {source}; give its path inside the source")
    return found


def is_safe_name(name: str) -> bool:
    """Whether a `file_name` of a JSON stays inside the image folder: no absolute path, no `..`, no drive, no NUL."""
    parts = name.replace("\\", "/").split("/")
    return not (name.startswith(("/", "\\", "~")) or ".." in parts or ":" in name or "\0" in name)


@dataclass(frozen=True)
class ImageFolder:
    """The image files of a source, found by the names that annotation files use."""

    paths: tuple[str, ...]
    """Relative to the source, sorted."""
    by_name: Mapping[str, tuple[str, ...]]
    """Paths by their last part."""

    def candidates(self, file_name: str) -> list[str]:
        """Paths that `file_name` may mean: those ending in the whole of it, else those of its last part."""
        name = posixpath.normpath(file_name.replace("\\", "/"))
        found = self.by_name.get(posixpath.basename(name), ())
        return [path for path in found if path == name or path.endswith("/" + name)] or list(found)

    def find(self, file_name: str, split: str) -> list[str]:
        """Paths that `file_name` of `split` may mean, the best first; more than one where that is a guess.

        Those in a folder named after the split rule out others (LIVECell: train and val share one).
        """
        found = self.candidates(file_name)
        own = [path for path in found if _in_folder_of(path, split)] or found
        return sorted(own, key=lambda path: (path.count("/"), path))


def find_images(files: Sequence[str], folder: str | None) -> ImageFolder:
    """Image files of a source's `files`: those under `folder`; by default `images` where there is one, else all."""
    if folder is None:
        folder = "images" if any(path.startswith("images/") for path in files) else ""
    prefix = folder.strip("/") + "/" if folder.strip("/.") else ""
    paths = tuple(path for path in files if path.startswith(prefix) and images.is_image_name(path))
    if not paths:
        raise UserError(
            f"no image files ({', '.join(images.SUFFIXES)}) in {folder or 'the source'}; set images to their folder"
        )
    by_name: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        by_name[posixpath.basename(path)].append(path)
    return ImageFolder(paths, {name: tuple(found) for name, found in by_name.items()})


def _in_folder_of(path: str, split: str) -> bool:
    words = re.findall(r"[a-z]+", posixpath.dirname(path).lower())
    return any(_SPLIT_WORDS.get(word) == split for word in words)
