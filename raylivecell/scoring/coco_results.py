"""Read COCO results files of any tool and match each record with an image of a split.

A record refers to its image by its complete or partial path, or by its id in the annotation file. Ambiguous
references are errors, never guesses; unusable records are counted by reason, all others are read.
"""

import math
import posixpath
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from raylivecell.annotations.rle import Rle, compress, encode_polygons, run_lengths
from raylivecell.core import storage
from raylivecell.core.errors import UserError
from raylivecell.images import planes

PathParts = tuple[str, ...]
Rank = tuple[int, int]
"""Quality of a match between a name and an image: kind of match (below) and number of equal path parts."""
SHOWN = 3
"""Maximum records listed per reason."""
UNKNOWN = "of images that the split does not contain"
_BY_FULL_PATH, _BY_PATH, _BY_STEM, _BY_BASE_NAME = 4, 3, 2, 1


class Image(NamedTuple):
    """An image of the split."""

    source: str
    """Path relative to the prepared folder; address of a plane (`planes.address`)."""
    file_name: str
    """File name in the annotation file."""
    id: str
    """Id in the annotation file."""
    size: tuple[int, int]
    """Height and width."""


class Results(NamedTuple):
    """Content of a results file for the images of a split."""

    cells: list[tuple[list[Rle], NDArray[np.float64]]]
    """Masks and scores of each image, in the order of the images."""
    records: int
    """Number of records in the file."""
    left_out: dict[str, list[str]]
    """Records that were not used, by reason."""
    missing: list[str]
    """Sources of images without a record."""

    def lines(self) -> list[str]:
        """Return warnings about unused records and missing images, which affect the scores."""
        lines = [f"left out: {_listed(which)}: {reason}" for reason, which in self.left_out.items()]
        if self.missing:
            more = ", ..." if self.missing[SHOWN:] else ""
            names = ", ".join(self.missing[:SHOWN]) + more
            lines.append(f"{len(self.missing)} of {len(self.cells)} images have no record, so no cells: {names}")
        return lines

    def summary(self) -> dict[str, Any]:
        """Return the counts of these for metrics.json."""
        counts = {reason: len(which) for reason, which in self.left_out.items()}
        return {"records": self.records, "left_out": counts, "images_without_records": len(self.missing)}


class Reference(NamedTuple):
    """Reference of a record to its image."""

    name: str | None
    id: int | str | None

    def __str__(self) -> str:
        return repr(self.id) if self.name is None else repr(self.name)

    def agrees(self, other: "Reference") -> bool:
        """Whether both may refer to the same image: names, and ids of the same type, do not differ."""
        return all(type(a) is not type(b) or a == b for a, b in zip(self, other))


Ranks = dict[Reference, dict[int, Rank]]


class BadRecord(ValueError):
    """A record that cannot be used; the message is the reason."""


def read(uri: str, images: Sequence[Image], others: Callable[[], Iterable[str]] = lambda: ()) -> Results:
    """Read the masks and scores of each of `images` from the COCO results file at `uri`.

    Args:
        uri: JSON: a list of {"image_id" or "file_name", "segmentation": polygons or RLE, "score"}. A file name
            takes precedence over the id: a path of any length, with or without suffix; other keys are ignored.
        images: images of the split.
        others: returns sources of the dataset's other images, which must not share a base name; called only if needed.

    Raises:
        UserError: the file is missing or not a list of records, no record is usable, or a name is ambiguous.
    """
    left_out: dict[str, list[str]] = defaultdict(list)
    records = _records(uri)
    by_reference: dict[Reference, list[int]] = defaultdict(list)
    for index, record in enumerate(records):
        try:
            _score(record)
            by_reference[_reference(record)].append(index)
        except BadRecord as error:
            left_out[str(error)].append(f"record {index}")
    joined, dropped = _join(list(by_reference), images, others, uri)
    for reference, reason in dropped.items():
        left_out[reason] += [f"record {index} ({reference})" for index in by_reference[reference]]
    cells: list[tuple[list[Rle], list[float]]] = [([], []) for _ in images]
    indices = ((index, image) for reference, image in joined.items() for index in by_reference[reference])
    for index, image in sorted(indices):
        try:
            cells[image][0].append(_mask(records[index]["segmentation"], images[image].size))
            cells[image][1].append(_score(records[index]))
        except BadRecord as error:
            left_out[str(error)].append(f"record {index} ({images[image].source})")
    if records and not any(masks for masks, _ in cells):
        raise UserError(_refusal(uri, left_out))
    referenced = set(joined.values())
    missing = [image.source for number, image in enumerate(images) if number not in referenced]
    arrays = [(masks, np.array(scores, np.float64)) for masks, scores in cells]
    return Results(arrays, len(records), dict(left_out), missing)


def _refusal(uri: str, left_out: dict[str, list[str]]) -> str:
    reasons = "; ".join(f"{_listed(which)}: {reason}" for reason, which in left_out.items())
    names = "give the annotation file's image ids or the images' paths as file_name, and the right --split"
    fields = "give each an image_id or file_name, a segmentation and a score"
    return f"{uri}: no record can be used: {reasons[:500]}; {names if UNKNOWN in left_out else fields}"


def _listed(which: Sequence[str]) -> str:
    """`7 records (record 3 ('a.png'), ...)`."""
    text = ", ".join(which[:SHOWN]) + (", ..." if which[SHOWN:] else "")
    return f"{len(which)} record{'s' * (len(which) != 1)} ({text})"


def _records(uri: str) -> list[Any]:
    try:
        records = storage.read_json(uri)
    except FileNotFoundError as error:
        raise UserError(f"no results at {uri}; give a COCO results file") from error
    if not isinstance(records, list):
        raise UserError(
            f"{uri} is not a COCO results file: it contains a {type(records).__name__}, not a list of detections"
        )
    return records


def _reference(record: dict[str, Any]) -> Reference:
    """Return the reference of a record to its image; BadRecord without one."""
    name, identity = record.get("file_name"), record.get("image_id")
    name, identity = (None if isinstance(key, float) and math.isnan(key) else key for key in (name, identity))
    if isinstance(identity, float) and identity.is_integer():
        identity = int(identity)  # as in a column of a table
    if name is not None and not isinstance(name, str):
        raise BadRecord(f"file_name {name!r} is not text")
    if isinstance(identity, bool) or not isinstance(identity, int | str | None):
        raise BadRecord(f"image_id {identity!r} is neither an integer nor text")
    if not name and identity is None:
        raise BadRecord("lacks image_id and file_name")
    return Reference(name or None, identity)


def _score(record: Any) -> float:
    """Return the score of a record; BadRecord without a score or a segmentation."""
    if not isinstance(record, dict) or any(name not in record for name in ("segmentation", "score")):
        raise BadRecord("lacks one of image_id, segmentation, score")
    score = record["score"]
    if isinstance(score, bool) or not isinstance(score, int | float) or not abs(score) <= sys.float_info.max:
        raise BadRecord(f"score {score!r} is not a finite number")
    return float(score)


def _join(
    references: Sequence[Reference], images: Sequence[Image], others: Callable[[], Iterable[str]], uri: str
) -> tuple[dict[Reference, int], dict[Reference, str]]:
    """Return the image of each reference, and the reason for each reference that is left out.

    Raises:
        UserError: all references to an image are ambiguous.
    """
    index = _Index(images, others)
    matches = _from_one_folder({reference: index.find(reference) for reference in references}, images)
    if not any(matches.values()):  # folders outside the dataset: match by base name only
        matches = {reference: index.find_by_base_name(reference) for reference in references}
    claims: dict[int, list[Reference]] = defaultdict(list)
    dropped: dict[Reference, str] = {}
    for reference, ranks in matches.items():
        best = [image for image, rank in ranks.items() if rank == max(ranks.values())]
        if len(best) == 1:
            claims[best[0]].append(reference)
        else:
            dropped[reference] = _ambiguous([images[image] for image in best]) if best else UNKNOWN
    joined: dict[Reference, int] = {}
    for image, claimants in claims.items():
        chosen = _strongest(claimants, {reference: matches[reference][image] for reference in claimants})
        joined |= dict.fromkeys(chosen, image)
        ids = ", ".join(str(item if item.id is None else item.id) for item in claimants[:SHOWN])
        reason = f"{images[image].source} matches records of several images (image_id {ids})"
        dropped |= {reference: reason for reference in claimants if reference not in chosen}
    matched = set(joined.values())
    for reference, reason in dropped.items():
        if set(matches[reference]) - matched:
            raise UserError(
                f"{uri}: {reference} {reason}; give each record its image's path in the prepared folder as file_name"
            )
    return joined, dropped


def _from_one_folder(matches: Ranks, images: Sequence[Image]) -> Ranks:
    """Restrict matches to the base folder of all names, if the names with folders determine it.

    `im.png` and `well0/im.png`, both relative to `images/`, are not both `images/well0/im.png`.
    """
    folders: dict[Reference, dict[int, tuple[int, PathParts]]] = {}
    for reference, ranks in matches.items():
        name = _path(reference.name or "")
        sources = {image: _source(images[image], name) for image, rank in ranks.items() if rank[0] >= _BY_PATH}
        fits = {image: _above(name, source) for image, source in sources.items() if _is_suffix(name, source)}
        folders |= {reference: fits} if fits and reference.name else {}
    if not any(len(_path(reference.name or "")) > 1 for reference in folders):
        return matches  # the writer may have dropped the folders
    common = set.intersection(*(set(fits.values()) for fits in folders.values()))
    if len(common) != 1:
        return matches
    fitting = {
        reference: {image: rank for image, rank in matches[reference].items() if fits.get(image) in common}
        for reference, fits in folders.items()
    }
    return matches | fitting


def _above(name: PathParts, source: PathParts) -> tuple[int, PathParts]:
    """Return the part of the longer path before the shorter one, and its length, negative if `name` is longer."""
    longer = source if len(source) >= len(name) else name
    return len(source) - len(name), longer[: abs(len(source) - len(name))]


def _is_suffix(name: PathParts, source: PathParts) -> bool:
    """Whether one path is the end of the other."""
    common = min(len(name), len(source))
    return name[-common:] == source[-common:]


def _ambiguous(images: Sequence[Image]) -> str:
    sources = ", ".join(image.source for image in images[:SHOWN]) + (", ..." if images[SHOWN:] else "")
    return f"may mean any of {len(images)} images ({sources})"


def _strongest(references: Sequence[Reference], ranks: dict[Reference, Rank]) -> list[Reference]:
    """Return the accepted references to one image: empty if the best ones contradict each other."""
    best = max(ranks.values())
    top = [reference for reference in references if ranks[reference] == best]
    if not all(a.agrees(b) for a in top for b in top):
        return []
    return [reference for reference in references if all(reference.agrees(other) for other in top)]


class _Index:
    """Images of a split, by id and by the stem of their file name."""

    def __init__(self, images: Sequence[Image], others: Callable[[], Iterable[str]]) -> None:
        self.images, self.others, self.counts = images, others, Counter[str]()
        self.by_id: dict[str, list[int]] = defaultdict(list)
        self.paths = [(_path(image.source), _path(image.file_name)) for image in images]
        self.by_stem: dict[str, set[int]] = defaultdict(set)
        for number, image in enumerate(images):
            self.by_id[image.id].append(number)
            for path in (*self.paths[number], _path(planes.split_address(image.source)[0])):
                self.by_stem[_stem(path[-1])].add(number)

    def find(self, reference: Reference) -> dict[int, Rank]:
        """Return the images that match a reference, with the rank of each match."""
        if reference.name is not None:
            return self._by_name(reference.name)
        ranks: dict[int, Rank] = dict.fromkeys(self.by_id.get(str(reference.id), []), (_BY_PATH, 0))
        if isinstance(reference.id, str) and (ranks_by_name := self._by_name(reference.id)):
            best = max(ranks_by_name.values())
            ranks |= {image: (_BY_PATH, 0) if rank == best else (0, 0) for image, rank in ranks_by_name.items()}
        return ranks

    def _by_name(self, name: str) -> dict[int, Rank]:
        path = _path(name)
        ranks = {n: _rank(path, _source(self.images[n], path), self.paths[n][1]) for n in self._near(path)}
        return {image: rank for image, rank in ranks.items() if rank is not None}

    def find_by_base_name(self, reference: Reference) -> dict[int, Rank]:
        """Return images in any folder with the reference's base name, if it is unique in the dataset."""
        name = reference.id if reference.name is None else reference.name
        near = self._near(_path(name)) if isinstance(name, str) else set()
        alone = [image for image in near if self._count(self.paths[image][0][-1]) == 1]
        return dict.fromkeys(alone, (_BY_BASE_NAME, 0))

    def _near(self, path: PathParts) -> set[int]:
        """Return images of the same base name, with any suffix."""
        return self.by_stem.get(path[-1], set()) | self.by_stem.get(_stem(path[-1]), set())

    def _count(self, base_name: str) -> int:
        """Count the images of the dataset with this base name and any suffix."""
        if not self.counts:
            sources = (*(image.source for image in self.images), *self.others())
            self.counts.update(_stem(_path(planes.split_address(source)[0])[-1]) for source in sources)
        return self.counts[_stem(planes.split_address(base_name)[0])]


def _rank(name: PathParts, source: PathParts, file_name: PathParts) -> Rank | None:
    """Return the rank of a match if one path is the end of the other; None for different files.

    A path with folders is compared with `source`: `train/1.png` is not the `1.png` of test.json.
    """
    if name == source:
        return _BY_FULL_PATH, len(name)
    for kind, cut in ((_BY_PATH, False), (_BY_STEM, True)):
        ends = []
        for path, is_source in ((source, True), (file_name, False)):
            names = {name[-1], _stem(name[-1])} if cut else {name[-1]}
            same = (_stem(path[-1]) if cut else path[-1]) in names
            within = is_source or len(name) <= len(path)
            if same and within and _is_suffix((*name[:-1], ""), (*path[:-1], "")):
                ends.append(min(len(name), len(path)))
        if ends:
            return kind, max(ends)
    return None


def _path(name: str) -> PathParts:
    """Split a path, as written by any tool, into its parts."""
    parts = unicodedata.normalize("NFC", name).replace("\\", "/").split("/")
    return tuple(part for part in parts if part not in ("", ".", "..")) or ("",)


def _stem(base_name: str) -> str:
    """Name without its suffix; a plane remains: `w0#t1` of `w0.tif#t1`, because other planes are other images."""
    file, plane = planes.split_address(base_name)
    return planes.address(posixpath.splitext(file)[0], plane or "")


def _source(image: Image, name: PathParts) -> PathParts:
    """Path of an image, without its plane if `name` has none: the dataset contains one plane of a file."""
    has_plane = planes.split_address(name[-1])[1] is not None
    return _path(image.source if has_plane else planes.split_address(image.source)[0])


def _mask(segmentation: Any, size: tuple[int, int]) -> Rle:
    """Convert a segmentation to one compressed RLE of the image (H, W); BadRecord if it is not valid."""
    try:
        if isinstance(segmentation, list):
            return _of_polygons(segmentation, size)
        stated, counts = list(segmentation["size"]), segmentation["counts"]
        runs = run_lengths(counts.encode("ascii")) if isinstance(counts, str) else np.array(counts)
        if runs.ndim != 1 or runs.dtype.kind not in "iu":
            raise TypeError("counts are neither text nor a list of integers")
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise BadRecord("its segmentation is neither polygons (finite, at least 3 corners) nor RLE") from error
    if stated != list(size):
        raise BadRecord(f"its mask is {stated}, the image {list(size)} (height, width)")
    # pycocotools does not check this: its `iou` hangs on an RLE that is too short.
    pixels = size[0] * size[1]
    if not ((runs >= 0) & (runs <= pixels)).all() or runs.sum() != pixels:
        raise BadRecord(f"its RLE does not fill the image {stated} (height, width)")
    return compress(runs, size)


def _of_polygons(polygons: list[Any], size: tuple[int, int]) -> Rle:
    """Encode the union of polygons [x, y, x, y, ...] of three or more corners; ValueError if none remains."""
    corners = [np.array(polygon, np.float64).reshape(-1, 2) for polygon in polygons]
    corners = [polygon for polygon in corners if len(polygon) >= 3]
    if not corners or not all(np.isfinite(polygon).all() for polygon in corners):
        raise ValueError("no polygon of three corners, or one that is not finite")
    return encode_polygons(corners, size)
