"""What is wrong with a dataset's images, and the stated rule for each: nothing is dropped without being named.

`apply_rules` runs the checks in this order, each on what the ones before it kept: duplicate_entry, missing_file,
unreadable_image, colour_image, sixteen_bit_image, wrong_size, no_annotations, few_annotations, leak,
identical_pixels. What is wrong with single cells is in `outlines`.
"""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
from pydantic import Field

from raylivecell.annotations.coco import ImageEntry
from raylivecell.core.settings import StrictModel


class DefectRules(StrictModel):
    """What happens to each kind of defect. All are counted and named in dataset.json, whatever the rule."""

    truncated_json: Literal["refuse", "keep_whole_records"] = "refuse"
    """An annotation file that ends early or breaks off: refuse it, or use what comes before the break without the
    image that was being annotated there."""
    bad_record: Literal["drop", "refuse"] = "drop"
    """A record with missing or ill-typed fields, or a file name that leads out of the image folder."""
    duplicate_entry: Literal["keep_most_cells", "keep_first"] = "keep_most_cells"
    """One image file listed twice in a split under different ids: the entry that stays."""
    ambiguous_file: Literal["drop", "take_first"] = "drop"
    """A file name that several files have, in folders of which not one alone is named after the split: none of them, or
    the first (fewest folders, then by name), which may be another image."""
    missing_file: Literal["drop", "refuse"] = "drop"
    """An image that is listed but not there."""
    unreadable_image: Literal["drop", "refuse"] = "drop"
    """A file that holds no picture, or several."""
    colour_image: Literal["convert", "drop"] = "convert"
    """A colour file: converted to its luma (0.299 R + 0.587 G + 0.114 B), or dropped."""
    sixteen_bit_image: Literal["scale", "drop"] = "scale"
    """A 16-bit file: brought to 8 bits by the set's one intensity rule (`intensity` in dataset.json), or dropped."""
    wrong_size: Literal["drop", "keep", "scale"] = "drop"
    """A file whose size is not the one in the JSON: drop it, keep its outlines as they are, or scale them to it."""
    no_annotations: Literal["keep_in_test", "drop", "keep"] = "keep_in_test"
    """A listed image without one annotation; kept, it says that all of it is background. `keep_in_test`: dropped from
    train and val; test keeps its published images."""
    few_annotations: Literal["keep_in_test", "drop", "keep"] = "keep_in_test"
    """Fewer annotations than 20 % of the median of the image's cell type, which also cover under 20 % of what looks
    like cells (local standard deviation over 4 gray levels). Kept, it teaches that cells are background."""
    leak: Literal["keep_test_first", "keep"] = "keep_test_first"
    """The same file or the same pixels in two splits: an image keeps its test place before val before train."""
    identical_pixels: Literal["keep_in_test", "keep_most_cells", "keep"] = "keep_in_test"
    """Two files of one split with the same pixels: the one that stays (in test both)."""
    doubled_contour: Literal["keep_in_test", "keep_first", "keep"] = "keep_in_test"
    """Two outlines of one image that share at least `doubled_iou` of their area: the later one goes (not in test)."""
    doubled_iou: float = Field(default=0.8, gt=0.5, le=1)
    """Intersection over union from which two outlines are one cell drawn twice."""
    out_of_bounds: Literal["clip", "drop"] = "clip"
    """An outline that leaves the image by more than a pixel: cut at the edge, or dropped whole."""
    crowd_region: Literal["auto", "drop", "keep"] = "auto"
    """An annotation with iscrowd set, in COCO a region of many objects: dropped, or kept as one cell. `auto` drops
    them, and stops where they are over a tenth of a file's annotations: CVAT sets iscrowd on each cell drawn by
    brush."""


FIXED_RULES = {
    "unlisted_file": "left out",  # an image file that no annotation file names
    "orphan_annotation": "drop",  # an annotation whose image is not listed
    "inner_outline": "fill",  # a part of a cell inside another part: COCO unites the parts, so that it is no hole
    "degenerate_polygon": "drop",  # an outline with under 3 corners, no area, a value not finite, or a wrong RLE
    "no_picture": "drop",  # one value in every pixel, saturated, or far too dark for its set
    "odd_intensity": "scale to the set",  # background or spread far from the training images'
    "hidden_cell": "drop",  # a cell without a pixel of its own: outside the image or wholly under smaller ones
}
_IN_TEST = {"hidden_cell": "keep for scoring"}  # its outline, where that lies in the image
_IN_TRAINING = {"identical_pixels": "keep_most_cells", "doubled_contour": "keep_first"}
"""Rules without a choice: nothing else can be done."""

ALL = (
    *("truncated_json", "bad_record", "orphan_annotation", "duplicate_entry", "ambiguous_file", "missing_file"),
    *("unlisted_file", "unreadable_image", "colour_image", "sixteen_bit_image", "wrong_size", "no_annotations"),
    *("few_annotations", "leak", "identical_pixels", "no_picture", "odd_intensity", "crowd_region"),
    *("degenerate_polygon", "out_of_bounds", "inner_outline", "doubled_contour", "hidden_cell"),
)
"""Every defect's name, in the order of the table."""

FEW_SHARE, FEW_COVER, VISIBLE_STD = 0.2, 0.2, 4.0
_PLACE = {"test": 0, "val": 1, "train": 2}


@dataclass(frozen=True)
class Defect:
    """One defect found. `ids`: image ids for defects of images, annotation ids for those of cells."""

    defect: str
    rule: str
    file_name: str
    split: str | None
    ids: list[int | str]
    detail: str = ""


@dataclass(frozen=True)
class Entry:
    """One image of one split, as an annotation file lists it."""

    split: str
    annotation: str
    """The annotation file, relative to the source."""
    image: ImageEntry
    path: str | None
    """The image file, relative to the source; None where there is none."""
    cells: int
    cell_type: str
    note: str = ""
    """Why there is no file."""


@dataclass(frozen=True)
class ImageInfo:
    """What an image file turned out to hold; `error` says why where it holds no picture."""

    error: str = ""
    sha256: str = ""
    pixels_sha256: str = ""
    height: int = 0
    width: int = 0
    colour: bool = False
    measures: Sequence[Any] = ()
    """Fields of `grey_levels.Measures`; empty where the file holds no picture."""
    deep: bool = False
    visible: int = 0
    """Pixels that look like cells: see `visible_pixels`."""


Judged = tuple[list[Entry], list[Defect]]


def rule_of(rules: DefectRules, defect: str, split: str | None = None) -> str:
    """The rule that holds for `defect` in `split`: `keep_in_test` and `auto` resolved."""
    if defect in FIXED_RULES:
        return _IN_TEST.get(defect, FIXED_RULES[defect]) if split == "test" else FIXED_RULES[defect]
    rule = str(getattr(rules, defect))
    if rule == "keep_in_test":
        return "keep" if split == "test" else _IN_TRAINING.get(defect, "drop")
    return "drop" if rule == "auto" else rule


def visible_pixels(image: np.ndarray) -> int:
    """How many pixels of a uint8 (H, W) image look like cells: standard deviation in 9x9 over 4 gray levels.

    Or over 3 times the background's where that is more; the background is the calmest tenth. On 14 real LIVECell
    images, whose backgrounds have 0.8 to 1.2, the annotated cells cover 0.43 to 1.3 times as many pixels.
    """
    values = image.astype(np.float32)
    mean = cv2.blur(values, (9, 9))
    variance = cv2.blur(values * values, (9, 9)) - mean * mean
    calm = float(np.percentile(variance[::4, ::4], 10))
    return int(np.count_nonzero(variance > max(VISIBLE_STD**2, 9 * calm)))


def apply_rules(
    entries: Sequence[Entry], facts: Mapping[str, ImageInfo], area: Callable[[Entry], float], rules: DefectRules
) -> Judged:
    """The entries that stay, sorted by (split, file name), and every defect of images that was found.

    Args:
        entries: all, in the order of the annotation files.
        facts: by path, of every file that an entry has.
        area: pixels that an entry's outlines cover (asked only where they are few).
        rules: what to do.
    """
    kept, found = _duplicates(entries, rules)
    checks: list[Callable[[list[Entry]], Judged]] = [
        lambda some: _each(some, "missing_file", rules, lambda e: "" if e.path else e.note or e.image.file_name),
        lambda some: _each(some, "unreadable_image", rules, lambda e: _fact(facts, e).error),
        lambda some: _each(some, "colour_image", rules, lambda e: _if(_fact(facts, e).colour, e.path)),
        lambda some: _each(some, "sixteen_bit_image", rules, lambda e: _if(_fact(facts, e).deep, e.path)),
        lambda some: _each(some, "wrong_size", rules, lambda e: _size_detail(e, _fact(facts, e))),
        lambda some: _each(some, "no_annotations", rules, lambda e: _if(e.cells == 0, f"no cell in {e.annotation}")),
        lambda some: _few(some, facts, area, rules),
        lambda some: _leaks(some, facts, rules),
        lambda some: _identical(some, facts, rules),
    ]
    for check in checks:
        kept, more = check(kept)
        found += more
    return sorted(kept, key=lambda e: (e.split, e.image.file_name, str(e.path), str(e.image.id))), found


def found_in(entry: Entry, defect: str, rules: DefectRules, detail: str, ids: list[int | str] | None = None) -> Defect:
    """A defect of the image `entry`."""
    name, mine = entry.image.file_name, [entry.image.id]
    return Defect(defect, rule_of(rules, defect, entry.split), name, entry.split, mine if ids is None else ids, detail)


def _if(condition: bool, detail: str | None) -> str:
    return (detail or "") if condition else ""


def _fact(facts: Mapping[str, ImageInfo], entry: Entry) -> ImageInfo:
    return facts[entry.path or ""]


def _each(entries: list[Entry], defect: str, rules: DefectRules, detail: Callable[[Entry], str]) -> Judged:
    """A check that looks at one entry at a time: a non-empty `detail` is a defect."""
    details = [(entry, detail(entry)) for entry in entries]
    found = [found_in(entry, defect, rules, text) for entry, text in details if text]
    gone = ("drop", "refuse")
    return [e for e, text in details if not (text and rule_of(rules, defect, e.split) in gone)], found


def _size_detail(entry: Entry, fact: ImageInfo) -> str:
    told = (entry.image.width or fact.width, entry.image.height or fact.height)
    if told == (fact.width, fact.height):
        return ""
    swapped = "; width and height swapped?" if told == (fact.height, fact.width) else ""
    return f"the file is {fact.width} x {fact.height}, {entry.annotation} says {told[0]} x {told[1]}{swapped}"


def _groups(entries: Iterable[Entry], key: Callable[[Entry], Any]) -> list[list[Entry]]:
    groups: dict[Any, list[Entry]] = defaultdict(list)
    for entry in entries:
        groups[key(entry)].append(entry)
    return [group for group in groups.values() if len(group) > 1]


def _without(entries: Sequence[Entry], gone: list[Entry]) -> list[Entry]:
    numbers = {id(entry) for entry in gone}
    return [entry for entry in entries if id(entry) not in numbers]


def _duplicates(entries: Sequence[Entry], rules: DefectRules) -> Judged:
    """One entry a file and split."""
    gone: list[Entry] = []
    found = []
    for group in _groups(entries, lambda e: (e.split, e.path or e.image.file_name)):
        stays = max(group, key=lambda e: e.cells) if rules.duplicate_entry == "keep_most_cells" else group[0]
        gone += [entry for entry in group if entry is not stays]
        listed = ", ".join(f"{entry.image.id} ({entry.cells} cells)" for entry in group)
        detail = f"ids {listed}: {stays.image.id} stays"
        found.append(found_in(stays, "duplicate_entry", rules, detail, [e.image.id for e in group]))
    return _without(entries, gone), found


def _few(
    entries: list[Entry], facts: Mapping[str, ImageInfo], area: Callable[[Entry], float], rules: DefectRules
) -> Judged:
    by_type: dict[str, list[int]] = defaultdict(list)
    for entry in entries:
        by_type[entry.cell_type].append(entry.cells)
    limit = {name: FEW_SHARE * statistics.median(counts) for name, counts in by_type.items()}

    def detail(entry: Entry) -> str:
        if not 0 < entry.cells < limit[entry.cell_type]:
            return ""
        covered, visible = area(entry), _fact(facts, entry).visible
        return _if(
            covered < FEW_COVER * visible,
            f"{entry.cells} cells cover {covered:.0f} of {visible} pixels that look like cells",
        )

    return _each(entries, "few_annotations", rules, detail)


def _leaks(entries: list[Entry], facts: Mapping[str, ImageInfo], rules: DefectRules) -> Judged:
    gone: list[Entry] = []
    found = []
    for group in _groups(entries, lambda e: _fact(facts, e).pixels_sha256):
        group.sort(key=lambda e: (_PLACE[e.split], e.image.file_name))
        first = group[0]
        others = [entry for entry in group if entry.split != first.split]
        if rules.leak == "keep_test_first":
            gone += others
        for entry in others:
            same = "file" if entry.path == first.path else f"pixels as {first.image.file_name}"
            detail = f"same {same} in {first.split} (id {first.image.id}) and {entry.split} (id {entry.image.id})"
            found.append(found_in(entry, "leak", rules, detail, [first.image.id, entry.image.id]))
    return _without(entries, gone), found


def _identical(entries: list[Entry], facts: Mapping[str, ImageInfo], rules: DefectRules) -> Judged:
    gone: list[Entry] = []
    found = []
    for group in _groups(entries, lambda e: (e.split, _fact(facts, e).pixels_sha256)):
        stays = min(group, key=lambda e: (-e.cells, e.image.file_name))
        others = [entry for entry in group if entry is not stays]
        if rule_of(rules, "identical_pixels", stays.split) == "keep_most_cells":
            gone += others
        for entry in others:
            detail = f"same pixels as {stays.image.file_name}"
            found.append(found_in(entry, "identical_pixels", rules, detail, [stays.image.id, entry.image.id]))
    return _without(entries, gone), found
