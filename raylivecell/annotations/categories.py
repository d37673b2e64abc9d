"""Selection of the COCO categories that are cells: all by default; the user may exclude debris or scale bars.

Annotations of other categories are background, or ignore regions (`prepare --ignore`).
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from raylivecell.annotations.coco import Annotations
from raylivecell.core.errors import UserError

NO_NAME = "(none)"
"""Name for annotations without a category."""


def choose(files: Iterable[Annotations], selection: Sequence[str], ignore: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Restrict `files` to annotations of the categories in `selection`, and list all categories for dataset.json.

    Args:
        files: contents of annotation files; their category ids may differ.
        selection: names or ids of categories; empty: all but those to ignore.
        ignore: names or ids of the categories of ignore regions.

    Returns:
        One row per category, sorted by name: `name`, `ids`, counts of `images` and `annotations`, `chosen`, and
        `listed` (whether the section `categories` lists it; true if a file has no such section); `ignored` is true for
        those to ignore.

    Raises:
        UserError: unknown or ambiguous name, a category that is selected and ignored, or one to ignore without an
            annotation.
    """
    files = list(files)
    names_of_files = [
        {category: name_of(annotations, category) for category in annotations.category_counts()}
        for annotations in files
    ]
    all_names = {name for names in names_of_files for name in names.values()}
    ignored = _resolve(names_of_files, ignore, "--ignore")
    chosen = _resolve(names_of_files, selection, "--categories") if selection else all_names - ignored
    if both := chosen & ignored:
        raise UserError(f"category {min(both)} is in --categories and in --ignore; leave it out of one")
    rows: dict[str, dict[str, Any]] = {}
    for annotations, names in zip(files, names_of_files):
        if selection or ignored:
            selected, regions = ([key for key, name in names.items() if name in group] for group in (chosen, ignored))
            annotations.select(selected, regions)
        for category, (image_count, annotation_count) in annotations.category_counts().items():
            name = names[category]
            listed = category in annotations.categories or not annotations.categories
            empty = {"name": name, "ids": [], "images": 0, "annotations": 0, "chosen": name in chosen, "listed": listed}
            row = rows.setdefault(name, empty | ({"ignored": True} if name in ignored else {}))
            row["ids"] += [category] if category not in row["ids"] else []
            row["images"] += image_count
            row["annotations"] += annotation_count
    if unused := [name for name in sorted(ignored) if not rows[name]["annotations"]]:
        raise UserError(f"--ignore {unused[0]}: no image has an annotation of this category; leave it out")
    return [rows[name] for name in sorted(rows)]


def name_of(annotations: Annotations, category: int | str) -> str:
    """Return the name of a category id, or the id as text if it has no name."""
    return annotations.categories.get(category) or (NO_NAME if category == "" else str(category))


def notice(categories: Sequence[Mapping[str, Any]], selection: Sequence[str]) -> str:
    """Warn about a dataset with several categories if the user chose none; "" otherwise."""
    used = [category for category in categories if category["annotations"] and not category.get("ignored")]
    if selection or sum(category["name"] != NO_NAME for category in used) < 2:
        return ""
    notes = ["" if category["listed"] else " of an unlisted category" for category in used]
    counts = ", ".join(f"{item['name']} ({item['annotations']:,}{note})" for item, note in zip(used[:12], notes))
    more = f" and {len(used) - 12} more" if len(used) > 12 else ""
    return (
        f"warning: annotations of all {len(used)} categories are used as cells: {counts}{more}; if one of them is not "
        "a cell type (debris, a scale bar), list the others with --categories, or exclude its pixels with --ignore"
    )


def _resolve(names_of_files: Sequence[Mapping[int | str, str]], selection: Sequence[str], flag: str) -> set[str]:
    """Resolve the words of `selection` to category names: by exact name, then id, then name ignoring case."""
    names = sorted({name for file_names in names_of_files for name in file_names.values()})
    chosen: set[str] = set()
    for word in selection:
        by_id = {
            name for file_names in names_of_files for category, name in file_names.items() if str(category) == word
        }
        by_case = {name for name in names if name.casefold() == word.strip().casefold()}
        matches = ({word} & set(names)) or by_id or by_case
        if len(matches) > 1:
            raise UserError(f"{flag} {word} is ambiguous: {' or '.join(sorted(matches))}; use the name")
        if not matches:
            close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise UserError(f"{flag}: no category {word!r}{hint}; the dataset has {', '.join(names) or 'none'}")
        chosen |= matches
    return chosen
