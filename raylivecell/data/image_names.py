"""Which image file an annotation file means: names as exporters write them, matched with the files that are there.

A name only chooses among the files of the source. It is matched as it is, then without regard to case, Unicode form
and %-encoding, then by its last parts alone: names of another machine (`C:\\data\\a.png`, `../../upload/a.png`).
"""

import posixpath
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import unquote

from raylivecell.core.errors import UserError
from raylivecell.images import formats

SPLIT_WORDS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
EXACT, FOLDED, LAST_PARTS = range(3)
"""How sure a match is: the same name; the same but for case, Unicode form or %; only its last parts, or a file in a
folder of another split."""


@dataclass(frozen=True)
class Match:
    """The files that one name may mean; more than one where it cannot be decided."""

    paths: tuple[str, ...]
    """Relative to the source."""
    strength: int = EXACT


@dataclass(frozen=True)
class ImageFolder:
    """The image files of a source."""

    paths: tuple[str, ...]
    """Relative to the source, sorted."""
    prefix: str
    """The images' folder with a slash at its end, "" for the source itself."""
    by_name: Mapping[str, tuple[str, ...]]
    """Paths by their last part, folded."""
    splits: frozenset[str]
    """The splits that folders are named after."""
    known: frozenset[str]
    """`paths`, to look one up: of 5,000 files of one name in as many folders a search would take a minute."""

    def find(self, file_name: str, split: str, annotation: str) -> Match:
        """Files that `file_name` in the annotation file `annotation` of `split` may mean."""
        plain = _plain(file_name)
        foreign = not is_safe_name(file_name)
        for place in self._places(annotation):
            if (path := place + plain) in self.known:
                strength = FOLDED if foreign else EXACT
                # A name that holds its folder means that folder, whatever split it is named after.
                return Match((path,), strength) if "/" in plain else self._of_split([path], split, strength)
        for name in dict.fromkeys((plain, unquote(plain))):
            candidates = self.by_name.get(_folded(posixpath.basename(name)), ())
            for strength, form in ((EXACT, str), (FOLDED, _folded)):
                found = [path for path in candidates if _ends_with(form(path), form(name))]
                if found:
                    sure = strength if name == plain and not foreign else FOLDED
                    return self._nearest(found, form(name), split, annotation, form, sure)
        return self._by_last_parts(plain, split, annotation)

    def like(self, file_name: str) -> str:
        """The name of a file that differs from `file_name` in its suffix alone; "" where there is none."""
        stem = posixpath.splitext(posixpath.basename(_plain(file_name)))[0]
        names = (stem + suffix for suffix in formats.SUFFIXES)
        return next((self.by_name[_folded(name)][0] for name in names if _folded(name) in self.by_name), "")

    def relative(self, path: str) -> str:
        """`path` relative to the images' folder: a name that no other image has."""
        return path.removeprefix(self.prefix)

    def _nearest(
        self, found: list[str], name: str, split: str, annotation: str, form: Callable[[str], str], strength: int
    ) -> Match:
        """Of several files that end in `name` the one that is right there; else those of the split's folder."""
        places = self._places(annotation)
        for place in dict.fromkeys(places):
            if here := [path for path in found if form(path) == form(place) + name]:
                return self._of_split(here, split, strength)
        near = [path for path in found if places[0] and path.startswith(places[0])]
        return self._of_split(near or found, split, strength)

    def _of_split(self, found: list[str], split: str, strength: int) -> Match:
        """Files in a folder named after the split rule out others (LIVECell: train and val share one)."""
        own = [path for path in found if split in splits_of_folder(path)]
        other = not own and split in self.splits and all(splits_of_folder(path) for path in found)
        return Match(tuple(own or found), LAST_PARTS if other else strength)

    def _places(self, annotation: str) -> tuple[str, ...]:
        """Where names are relative to: the annotation file's folder, the images', the source."""
        own = posixpath.dirname(annotation)
        return (own + "/" if own else "", self.prefix, "")

    def _by_last_parts(self, name: str, split: str, annotation: str) -> Match:
        parts = [part for part in unquote(name).split("/") if part not in ("", "..")]
        for first in range(len(parts)):
            last = "/".join(parts[first:])
            found = [p for p in self.by_name.get(_folded(parts[-1]), ()) if _ends_with(_folded(p), _folded(last))]
            if found:
                return self._nearest(found, _folded(last), split, annotation, _folded, LAST_PARTS)
        return Match(())


def find_images(files: Sequence[str], folder: str | None) -> ImageFolder:
    """Image files of a source's `files`: those under `folder`; by default `images` where there is one, else all."""
    if folder is None:
        folder = "images" if any(path.startswith("images/") and formats.is_image_name(path) for path in files) else ""
    prefix = folder.strip("/") + "/" if folder.strip("/.") else ""
    paths = tuple(path for path in files if path.startswith(prefix) and formats.is_image_name(path))
    if not paths:
        raise UserError(
            f"no image files ({', '.join(formats.SUFFIXES)}) in {folder or 'the source'}; set images to their folder"
        )
    by_name: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        by_name[_folded(posixpath.basename(path))].append(path)
    splits = frozenset().union(*map(splits_of_folder, {posixpath.dirname(path) + "/" for path in paths}))
    grouped = {name: tuple(found) for name, found in by_name.items()}
    return ImageFolder(paths, prefix, grouped, splits, frozenset(paths))


def is_safe_name(name: str) -> bool:
    """Whether a `file_name` of a JSON stays inside the image folder: no absolute path, no `..`, no drive, no NUL."""
    parts = name.replace("\\", "/").split("/")
    return not (name.startswith(("/", "\\", "~")) or ".." in parts or ":" in name or "\0" in name)


def settle(claims: Iterable[tuple[str, str, Match]]) -> list[tuple[str, ...]]:
    """The files of each (file name, split, match): a file that another name means more surely is taken away.

    Where two names mean one file by their last parts alone, neither has it: `a/x.png` and `b/x.png` are two images.
    """
    listed = list(claims)
    owners: dict[str, list[tuple[int, str, str]]] = defaultdict(list)
    for name, split, match in listed:
        for path in match.paths:
            owners[path].append((match.strength, split, _plain(name)))
    settled = []
    for name, split, match in listed:
        mine = (match.strength, split, _plain(name))
        settled.append(tuple(path for path in match.paths if not any(_beats(o, mine) for o in owners[path])))
    return settled


def _beats(other: tuple[int, str, str], mine: tuple[int, str, str]) -> bool:
    """Whether the (strength, split, name) of another image means a file more surely."""
    if other[1:] == mine[1:]:
        return False
    if mine[0] == EXACT:  # a.png is the end of a/a.png, which another image of the split has
        return other[:2] == mine[:2] and other[2].endswith("/" + mine[2])
    return other[0] < mine[0] or (other[0] == mine[0] and other[2] != mine[2])


def splits_of_folder(path: str) -> frozenset[str]:
    """The splits that the folders of `path` are named after; the deepest that is named so decides."""
    for folder in reversed(posixpath.dirname(path).lower().split("/")):
        if named := {SPLIT_WORDS[word] for word in re.findall(r"[a-z]+", folder) if word in SPLIT_WORDS}:
            return frozenset(named)
    return frozenset()


def _ends_with(path: str, name: str) -> bool:
    return path == name or path.endswith("/" + name)


def _plain(file_name: str) -> str:
    """A name with forward slashes, without the host and query of an address and the drive of a path."""
    name = file_name.replace("\\", "/").rpartition("?d=")[2]  # Label Studio: /data/local-files/?d=folder/a.png
    if "://" in name:
        name = re.split(r"[?#]", name.partition("://")[2].partition("/")[2])[0]
    return posixpath.normpath(re.sub(r"^[A-Za-z]:", "", name)).lstrip("/")


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
