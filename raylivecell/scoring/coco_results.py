"""COCO results files of any tool, read for the images of a split: each record joined to the one image that it means.

An image is named by the path of its file, as far as it is given, or by its id in the annotation file. What may mean two
images is refused, not guessed; a record that cannot be used is counted with its reason, and the others are read.
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

PathParts = tuple[str, ...]
Rank = tuple[int, int]
"""How well a name fits an image: one of the ways below, and how many parts of the path are the same."""
SHOWN = 3
"""Records of a reason that are named."""
UNKNOWN = "of images that the split does not hold"
_BY_WHOLE_PATH, _BY_PATH, _BY_STEM, _BY_BASE_NAME = 4, 3, 2, 1


class Image(NamedTuple):
    """An image of the split."""

    source: str
    """Its path under the folder that was prepared."""
    file_name: str
    """As its annotation file has it."""
    id: str
    """In its annotation file."""
    size: tuple[int, int]
    """Height and width."""


class Results(NamedTuple):
    """What a file says of the images."""

    cells: list[tuple[list[Rle], NDArray[np.float64]]]
    """Masks and scores of each image, in the order of the images."""
    records: int
    """In the file."""
    left_out: dict[str, list[str]]
    """By reason, which records were not used."""
    missing: list[str]
    """Sources of images without a record."""

    def lines(self) -> list[str]:
        """What a user should know before believing the scores."""
        lines = [f"left out: {_several(which)}: {reason}" for reason, which in self.left_out.items()]
        if self.missing:
            more = ", ..." if self.missing[SHOWN:] else ""
            names = ", ".join(self.missing[:SHOWN]) + more
            lines.append(f"{len(self.missing)} of {len(self.cells)} images have no record, so no cell: {names}")
        return lines

    def summary(self) -> dict[str, Any]:
        """The same for metrics.json."""
        counts = {reason: len(which) for reason, which in self.left_out.items()}
        return {"records": self.records, "left_out": counts, "images_without_records": len(self.missing)}


class Reference(NamedTuple):
    """How a record names its image."""

    name: str | None
    id: int | str | None

    def __str__(self) -> str:
        return repr(self.id) if self.name is None else repr(self.name)

    def agrees(self, other: "Reference") -> bool:
        """Whether both may name one image: they do not give two names, two numbers, or two texts as ids."""
        return all(type(one) is not type(another) or one == another for one, another in zip(self, other))


Ranks = dict[Reference, dict[int, Rank]]


class BadRecord(ValueError):
    """A record that cannot be used, and why."""


def read(uri: str, images: Sequence[Image], others: Callable[[], Iterable[str]] = lambda: ()) -> Results:
    """Masks and scores of each of `images`, from the COCO results file at `uri`.

    Args:
        uri: JSON: a list of {"image_id" or "file_name", "segmentation": polygons or RLE, "score"}. A file name goes
            before the id: a path as long as it is known, with or without suffix; anything else is not read.
        images: of the split.
        others: sources of the dataset's other images, with whom a base name must not be shared; called if needed.

    Raises:
        UserError: no such file; no list of records; none that can be used; a name that may mean several images.
    """
    left_out: dict[str, list[str]] = defaultdict(list)
    records = _records(uri)
    by_reference: dict[Reference, list[int]] = defaultdict(list)
    for place, record in enumerate(records):
        try:
            _score(record)
            by_reference[_reference(record)].append(place)
        except BadRecord as error:
            left_out[str(error)].append(f"record {place}")
    joined, dropped = _join(list(by_reference), images, others, uri)
    for reference, reason in dropped.items():
        left_out[reason] += [f"record {place} ({reference})" for place in by_reference[reference]]
    cells: list[tuple[list[Rle], list[float]]] = [([], []) for _ in images]
    places = ((place, image) for reference, image in joined.items() for place in by_reference[reference])
    for place, image in sorted(places):
        try:
            cells[image][0].append(_mask(records[place]["segmentation"], images[image].size))
            cells[image][1].append(_score(records[place]))
        except BadRecord as error:
            left_out[str(error)].append(f"record {place} ({images[image].source})")
    if records and not any(masks for masks, _ in cells):
        raise UserError(_refusal(uri, left_out))
    named = set(joined.values())
    missing = [image.source for number, image in enumerate(images) if number not in named]
    arrays = [(masks, np.array(scores, np.float64)) for masks, scores in cells]
    return Results(arrays, len(records), dict(left_out), missing)


def _refusal(uri: str, left_out: dict[str, list[str]]) -> str:
    reasons = "; ".join(f"{_several(which)}: {reason}" for reason, which in left_out.items())
    names = "give the annotation file's image ids or the images' paths as file_name, and the right --split"
    fields = "give each an image_id or file_name, a segmentation and a score"
    return f"{uri}: no record can be used: {reasons[:500]}; {names if UNKNOWN in left_out else fields}"


def _several(which: Sequence[str]) -> str:
    """`7 records (record 3 ('a.png'), ...)`."""
    named = ", ".join(which[:SHOWN]) + (", ..." if which[SHOWN:] else "")
    return f"{len(which)} record{'s' * (len(which) != 1)} ({named})"


def _records(uri: str) -> list[Any]:
    try:
        records = storage.read_json(uri)
    except FileNotFoundError as error:
        raise UserError(f"no results at {uri}; name a COCO results file") from error
    if not isinstance(records, list):
        raise UserError(f"{uri} is no COCO results file: it holds a {type(records).__name__}, not a list of detections")
    return records


def _reference(record: dict[str, Any]) -> Reference:
    """How a record names its image; BadRecord where it does not."""
    name, identity = record.get("file_name"), record.get("image_id")
    name, identity = (None if isinstance(one, float) and math.isnan(one) else one for one in (name, identity))
    if isinstance(identity, float) and identity.is_integer():
        identity = int(identity)  # a table's column of numbers
    if name is not None and not isinstance(name, str):
        raise BadRecord(f"file_name {name!r} is not text")
    if isinstance(identity, bool) or not isinstance(identity, int | str | None):
        raise BadRecord(f"image_id {identity!r} is neither a whole number nor text")
    if not name and identity is None:
        raise BadRecord("lacks image_id and file_name")
    return Reference(name or None, identity)


def _score(record: Any) -> float:
    """A record's score; BadRecord without one, or without a segmentation."""
    if not isinstance(record, dict) or any(name not in record for name in ("segmentation", "score")):
        raise BadRecord("lacks one of image_id, segmentation, score")
    score = record["score"]
    if isinstance(score, bool) or not isinstance(score, int | float) or not abs(score) <= sys.float_info.max:
        raise BadRecord(f"score {score!r} is not a finite number")
    return float(score)


def _join(
    references: Sequence[Reference], images: Sequence[Image], others: Callable[[], Iterable[str]], uri: str
) -> tuple[dict[Reference, int], dict[Reference, str]]:
    """The image that each reference means; of the others, why they are left out.

    Raises:
        UserError: an image that is named by nothing but what may mean another one too.
    """
    index = _Index(images, others)
    found = _from_one_folder({reference: index.find(reference) for reference in references}, images)
    if not any(found.values()):  # folders that the dataset does not know: the names alone decide
        found = {reference: index.find_by_base_name(reference) for reference in references}
    claims: dict[int, list[Reference]] = defaultdict(list)
    dropped: dict[Reference, str] = {}
    for reference, ranks in found.items():
        best = [image for image, rank in ranks.items() if rank == max(ranks.values())]
        if len(best) == 1:
            claims[best[0]].append(reference)
        else:
            dropped[reference] = _ambiguous([images[one] for one in best]) if best else UNKNOWN
    joined: dict[Reference, int] = {}
    for image, several in claims.items():
        chosen = _strongest(several, {reference: found[reference][image] for reference in several})
        joined |= dict.fromkeys(chosen, image)
        named = ", ".join(str(one.id) if one.id is not None else str(one) for one in several[:SHOWN])
        reason = f"{images[image].source} is named by records of several images (image_id {named})"
        dropped |= {one: reason for one in several if one not in chosen}
    sure = set(joined.values())
    for reference, reason in dropped.items():
        if set(found[reference]) - sure:
            raise UserError(
                f"{uri}: {reference} {reason}; give each record its image's path in the prepared folder as file_name"
            )
    return joined, dropped


def _from_one_folder(found: Ranks, images: Sequence[Image]) -> Ranks:
    """`found`, where names with folders show from which folder all names were made, without what does not fit it.

    `im.png` and `well0/im.png`, found in `images/`, are not both `images/well0/im.png`.
    """
    folders: dict[Reference, dict[int, tuple[int, PathParts]]] = {}
    for reference, ranks in found.items():
        name = _path(reference.name or "")
        sources = {image: _path(images[image].source) for image, rank in ranks.items() if rank[0] >= _BY_PATH}
        fits = {image: _above(name, source) for image, source in sources.items() if _are_one(name, source)}
        folders |= {reference: fits} if fits and reference.name else {}
    if not any(len(_path(reference.name or "")) > 1 for reference in folders):
        return found  # the writer may have dropped the folders
    common = set.intersection(*(set(fits.values()) for fits in folders.values()))
    if len(common) != 1:
        return found
    fitting = {
        reference: {image: rank for image, rank in found[reference].items() if fits.get(image) in common}
        for reference, fits in folders.items()
    }
    return found | fitting


def _above(name: PathParts, source: PathParts) -> tuple[int, PathParts]:
    """What stands before the shorter of two paths in the longer, with its length; under 0 where `name` is longer."""
    longer = source if len(source) >= len(name) else name
    return len(source) - len(name), longer[: abs(len(source) - len(name))]


def _are_one(name: PathParts, source: PathParts) -> bool:
    """Whether one path is the end of the other."""
    common = min(len(name), len(source))
    return name[-common:] == source[-common:]


def _ambiguous(images: Sequence[Image]) -> str:
    named = ", ".join(image.source for image in images[:SHOWN]) + (", ..." if images[SHOWN:] else "")
    return f"may mean any of {len(images)} images ({named})"


def _strongest(references: Sequence[Reference], ranks: dict[Reference, Rank]) -> list[Reference]:
    """Those of the references to one image that are believed: none where equals contradict each other."""
    best = max(ranks.values())
    top = [one for one in references if ranks[one] == best]
    if not all(one.agrees(other) for one in top for other in top):
        return []
    return [one for one in references if all(one.agrees(other) for other in top)]


class _Index:
    """The images of a split by all that they may be called."""

    def __init__(self, images: Sequence[Image], others: Callable[[], Iterable[str]]) -> None:
        self.others, self.counts = others, Counter[str]()
        self.by_id: dict[str, list[int]] = defaultdict(list)
        self.paths = [(_path(image.source), _path(image.file_name)) for image in images]
        self.by_stem: dict[str, set[int]] = defaultdict(set)
        for number, image in enumerate(images):
            self.by_id[image.id].append(number)
            for path in self.paths[number]:
                self.by_stem[_stem(path[-1])].add(number)

    def find(self, reference: Reference) -> dict[int, Rank]:
        """The images that a reference may mean, each with how well it fits."""
        if reference.name is not None:
            return self._by_name(reference.name)
        ranks: dict[int, Rank] = dict.fromkeys(self.by_id.get(str(reference.id), []), (_BY_PATH, 0))
        if isinstance(reference.id, str) and (named := self._by_name(reference.id)):
            best = max(named.values())
            ranks |= {image: (_BY_PATH, 0) if rank == best else (0, 0) for image, rank in named.items()}
        return ranks

    def _by_name(self, name: str) -> dict[int, Rank]:
        path = _path(name)
        near = self._near(path)
        return {image: rank for image in near if (rank := _rank(path, *self.paths[image])) is not None}

    def find_by_base_name(self, reference: Reference) -> dict[int, Rank]:
        """The images of the reference's name in whatever folder, that no other image of the dataset has."""
        name = reference.id if reference.name is None else reference.name
        near = self._near(_path(name)) if isinstance(name, str) else set()
        alone = [image for image in near if self._count(self.paths[image][0][-1]) == 1]
        return dict.fromkeys(alone, (_BY_BASE_NAME, 0))

    def _near(self, path: PathParts) -> set[int]:
        """Images of the same base name, whatever the suffix."""
        return self.by_stem.get(path[-1], set()) | self.by_stem.get(_stem(path[-1]), set())

    def _count(self, base_name: str) -> int:
        """How many images of the dataset have this name, whatever the suffix."""
        if not self.counts:
            self.counts.update(_stem(source[-1]) for source, _ in self.paths)
            self.counts.update(_stem(_path(source)[-1]) for source in self.others())
        return self.counts[_stem(base_name)]


def _rank(name: PathParts, source: PathParts, file_name: PathParts) -> Rank | None:
    """How well a path fits an image: one is the end of the other; None where they are different files.

    A path with folders is compared with `source`: `train/1.png` is not the `1.png` of test.json.
    """
    if name == source:
        return _BY_WHOLE_PATH, len(name)
    for kind, cut in ((_BY_PATH, False), (_BY_STEM, True)):
        ends = []
        for path, is_source in ((source, True), (file_name, False)):
            wanted = {name[-1], _stem(name[-1])} if cut else {name[-1]}
            same = (_stem(path[-1]) if cut else path[-1]) in wanted
            within = is_source or len(name) <= len(path)
            if same and within and _are_one((*name[:-1], ""), (*path[:-1], "")):
                ends.append(min(len(name), len(path)))
        if ends:
            return kind, max(ends)
    return None


def _path(name: str) -> PathParts:
    """The parts of a path as any tool writes it."""
    parts = unicodedata.normalize("NFC", name).replace("\\", "/").split("/")
    return tuple(part for part in parts if part not in ("", ".", "..")) or ("",)


def _stem(base_name: str) -> str:
    return posixpath.splitext(base_name)[0]


def _mask(segmentation: Any, size: tuple[int, int]) -> Rle:
    """A segmentation as one compressed RLE that fills the image (H, W); BadRecord where it is none."""
    try:
        if isinstance(segmentation, list):
            return _of_polygons(segmentation, size)
        stated, counts = list(segmentation["size"]), segmentation["counts"]
        runs = run_lengths(counts.encode("ascii")) if isinstance(counts, str) else np.array(counts)
        if runs.ndim != 1 or runs.dtype.kind not in "iu":
            raise TypeError("counts are neither text nor a list of whole numbers")
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise BadRecord("its segmentation is neither polygons (finite, of 3 corners) nor RLE") from error
    if stated != list(size):
        raise BadRecord(f"its mask is {stated}, the image {list(size)} (height, width)")
    # pycocotools does not look: its `iou` never ends on an RLE that is too short.
    pixels = size[0] * size[1]
    if not ((runs >= 0) & (runs <= pixels)).all() or runs.sum() != pixels:
        raise BadRecord(f"its RLE does not fill the image {stated} (height, width)")
    return compress(runs, size)


def _of_polygons(polygons: list[Any], size: tuple[int, int]) -> Rle:
    """The union of polygons, each [x, y, x, y, ...]; those under three corners are left out. ValueError: none left."""
    corners = [np.array(polygon, np.float64).reshape(-1, 2) for polygon in polygons]
    corners = [polygon for polygon in corners if len(polygon) >= 3]
    if not corners or not all(np.isfinite(polygon).all() for polygon in corners):
        raise ValueError("no polygon of three corners, or one that is not finite")
    return encode_polygons(corners, size)
