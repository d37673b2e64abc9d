"""Match image names in annotation files, as various tools write them, with files of the source.

A name only selects among the files of the source. It is matched exactly, then ignoring case, Unicode form and
%-encoding, then by its last path parts only, for paths of another machine (`C:\\data\\a.png`, `../../upload/a.png`).
"""

import posixpath
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import unquote

from raylivecell.core.errors import UserError
from raylivecell.images import formats

SPLIT_WORDS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
EXACT, FOLDED, LAST_PARTS = range(3)
"""Kinds of match, best first: same name; same except for case, Unicode form or %-encoding; only the last parts are the
same, or the file is in a folder of another split."""


@dataclass(frozen=True)
class Match:
    """Files that match one name; several if it is ambiguous."""

    paths: tuple[str, ...]
    """Relative to the source."""
    strength: int = EXACT


class Claim(NamedTuple):
    """Match of one image name with a file."""

    strength: int
    split: str
    name: str


def find_images(files: Sequence[str], folder: str | None) -> "ImageFolder":
    """Return the image files in `files` under `folder`, by default `images` if it exists, otherwise all."""
    if folder is None:
        folder = "images" if any(path.startswith("images/") and formats.is_image_name(path) for path in files) else ""
    prefix = folder.strip("/") + "/" if folder.strip("/.") else ""
    paths = tuple(path for path in files if path.startswith(prefix) and formats.is_image_name(path))
    if not paths:
        raise UserError(
            f"no image files ({', '.join(formats.SUFFIXES)}) in {folder or 'the source'}; set --images to their folder"
        )
    by_name: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        by_name[folded(posixpath.basename(path))].append(path)
    splits = frozenset().union(*map(splits_of_folder, {posixpath.dirname(path) + "/" for path in paths}))
    paths_by_name = {name: tuple(members) for name, members in by_name.items()}
    return ImageFolder(paths, prefix, paths_by_name, splits, frozenset(paths))


@dataclass(frozen=True)
class ImageFolder:
    """The image files of a source."""

    paths: tuple[str, ...]
    """Relative to the source, sorted."""
    prefix: str
    """Folder of the images, with a trailing slash; "" for the source itself."""
    by_name: Mapping[str, tuple[str, ...]]
    """Paths by their last part, normalised by `folded`."""
    splits: frozenset[str]
    """Splits that have folders named after them."""
    path_set: frozenset[str]
    """`paths` for look-up: searching 5,000 files of one name in 5,000 folders would take a minute."""

    def find(self, file_name: str, split: str, annotation: str) -> Match:
        """Return the files that match `file_name` in the annotation file `annotation` of `split`."""
        relative = _relative_name(file_name)
        foreign = not is_safe_name(file_name)
        for base in self._base_folders(annotation):
            if (path := base + relative) in self.path_set:
                strength = FOLDED if foreign else EXACT
                # A name with a folder refers to that folder, whatever split the folder is named after.
                return Match((path,), strength) if "/" in relative else self._of_split([path], split, strength)
        for name in dict.fromkeys((relative, unquote(relative))):
            candidates = self.by_name.get(folded(posixpath.basename(name)), ())
            for strength, normalise in ((EXACT, str), (FOLDED, folded)):
                paths = [path for path in candidates if _ends_with(normalise(path), normalise(name))]
                if paths:
                    strength = strength if name == relative and not foreign else FOLDED
                    return self._nearest(paths, normalise(name), split, annotation, normalise, strength)
        return self._by_last_parts(relative, split, annotation)

    def _nearest(
        self, paths: list[str], name: str, split: str, annotation: str, normalise: Callable[[str], str], strength: int
    ) -> Match:
        """Choose among files that end in `name`: those directly in a base folder, else below the annotation's."""
        folders = self._base_folders(annotation)
        for base in dict.fromkeys(folders):
            if direct := [path for path in paths if normalise(path) == normalise(base) + name]:
                return self._of_split(direct, split, strength)
        below = [path for path in paths if folders[0] and path.startswith(folders[0])]
        return self._of_split(below or paths, split, strength)

    def _base_folders(self, annotation: str) -> tuple[str, ...]:
        """Return the folders that names may be relative to: the annotation file's, the images', the source."""
        folder = posixpath.dirname(annotation)
        return (folder + "/" if folder else "", self.prefix, "")

    def _of_split(self, paths: list[str], split: str, strength: int) -> Match:
        """Prefer files in a folder named after the split (LIVECell: train and val share one)."""
        in_split = [path for path in paths if split in splits_of_folder(path)]
        in_other = not in_split and split in self.splits and all(splits_of_folder(path) for path in paths)
        return Match(tuple(in_split or paths), LAST_PARTS if in_other else strength)

    def _by_last_parts(self, name: str, split: str, annotation: str) -> Match:
        """Match the longest trailing part of `name` that any file has."""
        parts = [part for part in unquote(name).split("/") if part not in ("", "..")]
        for first in range(len(parts)):
            end = folded("/".join(parts[first:]))
            paths = [path for path in self.by_name.get(folded(parts[-1]), ()) if _ends_with(folded(path), end)]
            if paths:
                return self._nearest(paths, end, split, annotation, folded, LAST_PARTS)
        return Match(())

    def with_other_suffix(self, file_name: str) -> str:
        """Return a file whose name differs from `file_name` only in its suffix, or ""."""
        stem = posixpath.splitext(posixpath.basename(_relative_name(file_name)))[0]
        names = (folded(stem + suffix) for suffix in formats.SUFFIXES)
        return next((self.by_name[name][0] for name in names if name in self.by_name), "")

    def relative(self, path: str) -> str:
        """Return `path` relative to the image folder: a unique name."""
        return path.removeprefix(self.prefix)


def _relative_name(file_name: str) -> str:
    """Return a name with forward slashes, without the host and query of a URL and the drive of a path."""
    name = file_name.replace("\\", "/").rpartition("?d=")[2]  # Label Studio: /data/local-files/?d=folder/a.png
    if "://" in name:
        name = re.split(r"[?#]", name.partition("://")[2].partition("/")[2])[0]
    return posixpath.normpath(re.sub(r"^[A-Za-z]:", "", name)).lstrip("/")


def is_safe_name(name: str) -> bool:
    """Whether a `file_name` of a JSON stays inside the image folder: no absolute path, `..`, drive or NUL."""
    parts = name.replace("\\", "/").split("/")
    return not (name.startswith(("/", "\\", "~")) or ".." in parts or ":" in name or "\0" in name)


def _ends_with(path: str, name: str) -> bool:
    return path == name or path.endswith("/" + name)


def splits_of_folder(path: str) -> frozenset[str]:
    """Return the splits in the name of the deepest folder of `path` that is named after a split."""
    for folder in reversed(posixpath.dirname(path).lower().split("/")):
        if splits := {SPLIT_WORDS[word] for word in re.findall(r"[a-z]+", folder) if word in SPLIT_WORDS}:
            return frozenset(splits)
    return frozenset()


def folded(name: str) -> str:
    """Normalise case and Unicode form."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def resolve_conflicts(matches: Iterable[tuple[str, str, Match]]) -> list[tuple[str, ...]]:
    """Return the files of each (file name, split, match) that no other name matches better.

    If two names match one file only by their last parts, neither is matched: `a/x.png` and `b/x.png` are two images.
    """
    claims = [(Claim(match.strength, split, _relative_name(name)), match.paths) for name, split, match in matches]
    claims_on: dict[str, list[Claim]] = defaultdict(list)
    for claim, paths in claims:
        for path in paths:
            claims_on[path].append(claim)
    return [
        tuple(path for path in paths if not any(_beats(other, claim) for other in claims_on[path]))
        for claim, paths in claims
    ]


def _beats(other: Claim, claim: Claim) -> bool:
    """Whether another image matches a file better."""
    if (other.split, other.name) == (claim.split, claim.name):
        return False
    if claim.strength == EXACT:  # a.png also matches a/a.png of another image of the split
        return (other.strength, other.split) == (EXACT, claim.split) and other.name.endswith("/" + claim.name)
    return other.strength < claim.strength or (other.strength == claim.strength and other.name != claim.name)
