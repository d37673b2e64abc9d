"""Where a source keeps its annotation files and images: LIVECell's layouts, and any folder of COCO JSON and images.

Local folders and object stores alike; paths here are relative to the source, with forward slashes.
"""

import fnmatch
import posixpath
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from pyarrow import fs as pafs

from raylivecell.core.errors import UserError
from raylivecell.data.image_names import SPLIT_WORDS, splits_of_folder
from raylivecell.data.listing import list_folder, show
from raylivecell.data.shards import SPLITS
from raylivecell.images.formats import is_image_name


def list_infos(uri: str, follow_links: bool = False) -> dict[str, pafs.FileInfo]:
    """Every file under the folder `uri`, relative path -> size and time of change; UserError where there is none.

    With images that cannot be read: links to nothing and names that are not UTF-8. Reading them fails, so that each
    has its line in a result. Prints what was left out or followed.
    """
    listing = list_folder(uri, follow_links)
    show(listing, uri)
    lost = (path for path in listing.left_out if is_image_name(path))
    return {path: pafs.FileInfo(path, pafs.FileType.File, size=0, mtime_ns=0) for path in lost} | listing.infos


def split_of(path: str) -> str | None:
    """The one split that a file's name speaks of (`livecell_coco_train.json`, `val.json`), else None."""
    words = re.findall(r"[a-z]+", posixpath.basename(path).lower())
    named = {SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS}
    return named.pop() if len(named) == 1 else None


def split_of_folder(path: str) -> str | None:
    """The one split that a file's folders are named after (Roboflow: `valid/_annotations.coco.json`), else None."""
    named = splits_of_folder(path)
    return next(iter(named)) if len(named) == 1 else None


def find_annotations(files: Sequence[str], chosen: Mapping[str, str], source: str) -> dict[str, list[str]]:
    """Annotation files by split, in the order train, val, test.

    `chosen` (split -> path or pattern such as `LIVECell_single_cells/*/train.json`) decides; without it
    `livecell_coco_{train,val,test}.json`, wherever they are, then any JSON named after one split, then any in a folder
    named so. UserError where none is found or where several could be meant.
    """
    jsons = [path for path in files if path.lower().endswith(".json")]
    if chosen:
        return {split: _match(jsons, chosen[split], source) for split in SPLITS if split in chosen}
    by_split: dict[str, list[str]] = defaultdict(list)
    by_name = any(split_of(path) for path in jsons)
    for path in jsons:
        if split := split_of(path) if by_name else split_of_folder(path):
            by_split[split].append(path)
    found = {}
    for split in SPLITS:
        official = [path for path in by_split[split] if posixpath.basename(path) == f"livecell_coco_{split}.json"]
        paths = official or by_split[split]
        if paths and not _siblings(paths):
            raise UserError(
                f"{source} holds {len(paths)} annotation files for {split} ({', '.join(paths[:4])}, ...); "
                f"choose with --annotations {split} PATH{_one_an_image(paths, files)}"
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
    depths = {path.count("/") for path in paths}
    return len(paths) == 1 or len(names) == len(parents) == len(depths) == 1


def _one_an_image(paths: Sequence[str], files: Sequence[str]) -> str:
    stems = {posixpath.splitext(path)[0] for path in files if is_image_name(path)}
    if 2 * sum(posixpath.splitext(path)[0] in stems for path in paths) <= len(paths):
        return ""
    return " (one JSON an image, as LabelMe and others write, is not read: export COCO)"


def _match(jsons: Sequence[str], pattern: str, source: str) -> list[str]:
    wanted = pattern.removeprefix(source.rstrip("/") + "/").removeprefix("./")
    found = [path for path in jsons if path == wanted] or [p for p in jsons if fnmatch.fnmatchcase(p, wanted)]
    if not found:
        raise UserError(f"no annotation file {pattern} in {source}; give its path inside the source")
    return found
