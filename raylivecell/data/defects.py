"""Defects of images: find them, apply the rule for each kind (`config.DEFECT_KINDS`), report them.

1. `apply_rules`     checks in this order, each on the images that passed the previous ones: duplicate_entry,
                     missing_file, unreadable_image, colour_image, sixteen_bit_image, wrong_size, no_annotations,
                     few_annotations, leak, identical_pixels
2. `intensity_rule`  the one intensity rule of the dataset, then `check_intensity`: no_picture, odd_intensity
3. `print_table`, `summary`  print a table; return a summary in one line

Defects of single cells are in `cell_defects`. All defects are counted and listed in dataset.json, whatever their rules.
"""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from raylivecell.annotations.coco import ImageEntry
from raylivecell.core import console
from raylivecell.data.config import DEFECT_KINDS, Rules, rule_of
from raylivecell.images import intensity
from raylivecell.images.grey_levels import Measures
from raylivecell.images.intensity import Intensity

FEW_CELLS, FEW_COVERAGE = 0.2, 0.2
"""Thresholds of few_annotations: fractions of the median count and of the pixels that look like cells."""
SPLIT_PRIORITY = {"test": 0, "val": 1, "train": 2}
"""Priority of the splits for an image listed in several."""
MAX_REASONS, MAX_NAMES = 4, 3
"""Maximum printed reasons per defect, and names per reason; dataset.json has all."""


@dataclass(frozen=True)
class Defect:
    """One defect. `ids`: image ids for defects of images, annotation ids for defects of cells."""

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
    """The image file, relative to the source; None if missing."""
    cells: int
    cell_type: str
    missing_reason: str = ""
    """Reason if the file is missing."""


@dataclass(frozen=True)
class ImageInfo:
    """Content of an image file; `error` is the reason if it contains no usable image."""

    error: str = ""
    sha256: str = ""
    pixels_sha256: str = ""
    height: int = 0
    width: int = 0
    colour: bool = False
    measures: Sequence[Any] = ()
    """Fields of `grey_levels.Measures`; empty with an `error`."""
    deep: bool = False
    """Whether the pixels have 16 bits."""
    visible: int = 0
    """Pixels that look like cells: see `draw.visible_pixels`."""
    place: Sequence[Any] | None = None
    """Fields of `planes.Place`; None if the file is no stack."""


Checked = tuple[list[Entry], list[Defect]]
"""Remaining entries and the defects found."""


def apply_rules(
    entries: Sequence[Entry],
    infos: Mapping[str, ImageInfo],
    covered_pixels: Callable[[Entry], float],
    rules: Rules,
    labelled: bool = True,
) -> Checked:
    """Return the remaining entries, sorted by (split, file name), and all defects of images.

    Args:
        entries: all entries, in the order of the annotation files.
        infos: image information by path, for the files of all entries.
        covered_pixels: number of pixels that an entry's outlines cover, in pixels of the annotation; called only for
            images with few outlines.
        rules: rule by kind.
        labelled: whether the source has annotations.
    """

    def info(entry: Entry) -> ImageInfo:
        return infos[entry.path or ""]

    remaining, defects = _check_duplicates(entries, rules)
    checks: list[Callable[[list[Entry]], Checked]] = [
        lambda entries: _check_each(entries, "missing_file", rules, _missing),
        lambda entries: _check_each(entries, "unreadable_image", rules, lambda e: info(e).error),
        lambda entries: _check_each(entries, "colour_image", rules, lambda e: _if(info(e).colour, e.path)),
        lambda entries: _check_each(entries, "sixteen_bit_image", rules, lambda e: _if(info(e).deep, e.path)),
        lambda entries: _check_each(entries, "wrong_size", rules, lambda e: _size_difference(e, info(e))),
        lambda entries: _check_each(
            entries, "no_annotations", rules, lambda e: _if(labelled and not e.cells, f"no cell in {e.annotation}")
        ),
        lambda entries: _check_few(entries, infos, covered_pixels, rules),
        lambda entries: _check_leaks(entries, infos, rules),
        lambda entries: _check_identical(entries, infos, rules),
    ]
    for check in checks:
        remaining, more = check(remaining)
        defects += more
    return sorted(remaining, key=lambda e: (e.split, e.image.file_name, str(e.path), str(e.image.id))), defects


def _check_duplicates(entries: Sequence[Entry], rules: Rules) -> Checked:
    """Keep one entry per file and split."""
    dropped_entries: list[Entry] = []
    defects = []
    most_cells = rule_of(rules, "duplicate_entry") == "keep_most_cells"
    for group in _groups(entries, lambda e: (e.split, e.path or e.image.file_name)):
        kept_entry = max(group, key=lambda e: e.cells) if most_cells else group[0]
        dropped_entries += [entry for entry in group if entry is not kept_entry]
        ids = ", ".join(f"{entry.image.id} ({entry.cells} cells)" for entry in group)
        detail = f"ids {ids}: {kept_entry.image.id} is kept"
        defects.append(image_defect(kept_entry, "duplicate_entry", rules, detail, [e.image.id for e in group]))
    return _without(entries, dropped_entries), defects


def _groups(entries: Iterable[Entry], key: Callable[[Entry], Any]) -> list[list[Entry]]:
    """Return the groups of two or more entries with the same key."""
    groups: dict[Any, list[Entry]] = defaultdict(list)
    for entry in entries:
        groups[key(entry)].append(entry)
    return [group for group in groups.values() if len(group) > 1]


def image_defect(entry: Entry, kind: str, rules: Rules, detail: str, ids: list[int | str] | None = None) -> Defect:
    """Return a defect of the image `entry`; `ids`: by default the id of the image."""
    rule = rule_of(rules, kind, entry.split)
    return Defect(kind, rule, entry.image.file_name, entry.split, [entry.image.id] if ids is None else ids, detail)


def _without(entries: Sequence[Entry], dropped_entries: list[Entry]) -> list[Entry]:
    identities = {id(entry) for entry in dropped_entries}
    return [entry for entry in entries if id(entry) not in identities]


def _check_each(entries: list[Entry], kind: str, rules: Rules, detail: Callable[[Entry], str]) -> Checked:
    """Check one entry at a time: a `detail` that is not empty is a defect."""
    details = [(entry, detail(entry)) for entry in entries]
    defects = [image_defect(entry, kind, rules, text) for entry, text in details if text]
    dropping = ("drop", "refuse")
    return [e for e, text in details if not (text and rule_of(rules, kind, e.split) in dropping)], defects


def _missing(entry: Entry) -> str:
    return "" if entry.path else entry.missing_reason or entry.image.file_name


def _if(condition: bool, detail: str | None) -> str:
    return (detail or "") if condition else ""


def _size_difference(entry: Entry, info: ImageInfo) -> str:
    size = listed_size(entry, info)
    if size == (info.width, info.height):
        return ""
    swapped = "; width and height swapped?" if size == (info.height, info.width) else ""
    verb = "lists" if entry.annotation.lower().endswith(".json") else "has"
    return f"the file is {info.width} x {info.height}, {entry.annotation} {verb} {size[0]} x {size[1]}{swapped}"


def listed_size(entry: Entry, info: ImageInfo) -> tuple[int, int]:
    """Return (width, height) from the annotation file, or from the image file if not listed."""
    return entry.image.width or info.width, entry.image.height or info.height


def _check_few(
    entries: list[Entry], infos: Mapping[str, ImageInfo], covered_pixels: Callable[[Entry], float], rules: Rules
) -> Checked:
    counts_by_type: dict[str, list[int]] = defaultdict(list)
    for entry in entries:
        counts_by_type[entry.cell_type].append(entry.cells)
    limit = {cell_type: FEW_CELLS * statistics.median(counts) for cell_type, counts in counts_by_type.items()}

    def detail(entry: Entry) -> str:
        if not 0 < entry.cells < limit[entry.cell_type]:
            return ""
        info = infos[entry.path or ""]
        covered, visible = covered_pixels(entry), info.visible
        if rule_of(rules, "wrong_size") == "scale":  # to pixels of the file
            width, height = listed_size(entry, info)
            covered *= (info.width * info.height) / (width * height)
        text = f"{entry.cells} cells cover {covered:.0f} of {visible} pixels that look like cells"
        return _if(covered < FEW_COVERAGE * visible, text)

    return _check_each(entries, "few_annotations", rules, detail)


def _check_leaks(entries: list[Entry], infos: Mapping[str, ImageInfo], rules: Rules) -> Checked:
    dropped_entries: list[Entry] = []
    defects = []
    for group in _groups(entries, lambda e: infos[e.path or ""].pixels_sha256):
        group.sort(key=lambda e: (SPLIT_PRIORITY[e.split], e.image.file_name))
        first = group[0]
        others = [entry for entry in group if entry.split != first.split]
        if rule_of(rules, "leak") == "keep_test_first":
            dropped_entries += others
        for entry in others:
            same = "file" if entry.path == first.path else f"pixels as {first.image.file_name}"
            detail = f"same {same} in {first.split} (id {first.image.id}) and {entry.split} (id {entry.image.id})"
            defects.append(image_defect(entry, "leak", rules, detail, [first.image.id, entry.image.id]))
    return _without(entries, dropped_entries), defects


def _check_identical(entries: list[Entry], infos: Mapping[str, ImageInfo], rules: Rules) -> Checked:
    dropped_entries: list[Entry] = []
    defects = []
    for group in _groups(entries, lambda e: (e.split, infos[e.path or ""].pixels_sha256)):
        kept_entry = min(group, key=lambda e: (-e.cells, e.image.file_name))
        others = [entry for entry in group if entry is not kept_entry]
        if rule_of(rules, "identical_pixels", kept_entry.split) == "keep_most_cells":
            dropped_entries += others
        for entry in others:
            detail = f"same pixels as {kept_entry.image.file_name}"
            defects.append(
                image_defect(entry, "identical_pixels", rules, detail, [kept_entry.image.id, entry.image.id])
            )
    return _without(entries, dropped_entries), defects


def intensity_rule(entries: Sequence[Entry], infos: Mapping[str, ImageInfo], kind: intensity.Kind) -> Intensity:
    """Choose the intensity rule from the training images; from all images if there are none."""
    train = [entry for entry in entries if entry.split == "train"]
    return intensity.choose([_measures(entry, infos) for entry in train or entries], kind)


def _measures(entry: Entry, infos: Mapping[str, ImageInfo]) -> Measures:
    return Measures(*infos[entry.path or ""].measures)


def check_intensity(entries: Sequence[Entry], infos: Mapping[str, ImageInfo], rule: Intensity, rules: Rules) -> Checked:
    """Drop unusable images; report them and images with unusual intensities."""
    remaining, defects = [], []
    for entry in entries:
        fit = intensity.fit(_measures(entry, infos), rule)
        if fit.usable:
            remaining.append(entry)
        warnings = [text for text in fit.warnings if not text.startswith("padding")]
        if warnings:
            kind = "odd_intensity" if fit.usable else "no_picture"
            defects.append(image_defect(entry, kind, rules, "; ".join(warnings)))
    return remaining, defects


def print_table(defects: Sequence[Defect], title: str) -> None:
    """Print a table of the defects, then their files and reasons; print nothing without defects."""
    rows: dict[tuple[str, str], list[Defect]] = defaultdict(list)
    order = list(DEFECT_KINDS)
    for defect in sorted(defects, key=lambda defect: order.index(defect.defect)):
        rows[defect.defect, defect.rule].append(defect)
    if not rows:
        return
    table = Table(title=title, title_justify="left")
    for column in ("defect", "images", "ids", "rule"):
        table.add_column(column, no_wrap=True)
    for (kind, rule), members in rows.items():
        table.add_row(kind, str(len(members)), str(sum(len(defect.ids) for defect in members)), rule)
    console.console.print(table)
    for (kind, _), members in rows.items():
        for line in _reasons(members):
            console.console.print(f"{kind}: {line}", markup=False, highlight=False, soft_wrap=True)


def _reasons(defects: Sequence[Defect]) -> list[str]:
    """Return lines `a.png, b.png and 7 more: reason` for the first reasons of one kind of defect."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for defect in defects:
        is_path = " " not in defect.detail and defect.detail.endswith(defect.file_name.rsplit("/", 1)[-1])
        by_reason["" if is_path else defect.detail].append(_label(defect))
    lines = [f"{_first(names, MAX_NAMES)}{': ' if reason else ''}{reason[:300]}" for reason, names in by_reason.items()]
    more = [f"and {len(lines) - MAX_REASONS} other reasons"] if len(lines) > MAX_REASONS + 1 else []
    return lines if not more else [*lines[:MAX_REASONS], *more]


def _label(defect: Defect) -> str:
    """Return the file name; for an annotation file with the ids of its records."""
    ids = _first([str(record_id) for record_id in defect.ids], MAX_NAMES)
    is_json = defect.file_name.lower().endswith(".json")
    return f"{defect.file_name} (ids {ids})" if ids and is_json else defect.file_name


def _first(names: Sequence[str], limit: int) -> str:
    unique = list(dict.fromkeys(names))
    more = len(unique) - limit
    return ", ".join(unique[:limit]) + (f" and {more} more" if more > 0 else "")


def summary(defects: Sequence[Defect]) -> str:
    """Return one line: `3 defects (leak 2: NAME, ...; missing_file 1: NAME)`."""
    by_kind: dict[str, list[str]] = defaultdict(list)
    for defect in defects:
        by_kind[defect.defect].append(defect.file_name)
    parts = [f"{kind} {len(names)}: {names[0]}{', ...' if len(names) > 1 else ''}" for kind, names in by_kind.items()]
    return f"{len(defects)} defect{'s' * (len(defects) != 1)} ({'; '.join(parts)})"
