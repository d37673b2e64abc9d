"""Which categories of COCO files are cells: all, or those that the user names; debris and scale bars are none."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from raylivecell.annotations.coco import Annotations
from raylivecell.core.errors import UserError

NO_NAME = "(none)"
"""For annotations without a category."""


def choose(files: Iterable[Annotations], wanted: Sequence[str]) -> list[dict[str, Any]]:
    """Leave annotations of categories that are not `wanted` out of `files`; what dataset.json lists of each category.

    Args:
        files: annotation files, read; ids may differ between them.
        wanted: names or ids of categories; without one all are cells.

    Returns:
        By name: `name`, `ids`, `images`, `annotations`, whether it is `chosen`, and whether it is `listed` in the
        section `categories`, where there is one. UserError for an unknown name.
    """
    listed = list(files)
    named = [{kind: name_of(read, kind) for kind in read.category_counts()} for read in listed]
    chosen = _resolve(named, wanted) if wanted else {name for names in named for name in names.values()}
    counted: dict[str, dict[str, Any]] = {}
    for read, names in zip(listed, named):
        if wanted:
            read.choose([kind for kind, name in names.items() if name in chosen])
        for kind, (images, annotations) in read.category_counts().items():
            name = names[kind]
            blank = {"name": name, "ids": [], "images": 0, "annotations": 0, "chosen": name in chosen}
            row = counted.setdefault(name, blank | {"listed": kind in read.categories or not read.categories})
            row["ids"] += [kind] if kind not in row["ids"] else []
            row["images"] += images
            row["annotations"] += annotations
    return [counted[name] for name in sorted(counted)]


def name_of(read: Annotations, kind: int | str) -> str:
    """The name of a category, its id where it has none."""
    return read.categories.get(kind) or (NO_NAME if kind == "" else str(kind))


def notice(categories: Sequence[Mapping[str, Any]], wanted: Sequence[str]) -> str:
    """A line for sets of several categories, of which none was chosen; "" for others."""
    used = [one for one in categories if one["annotations"]]
    if wanted or len([one for one in used if one["name"] != NO_NAME]) < 2:
        return ""
    notes = ["" if one["listed"] else " of an unlisted category" for one in used]
    counts = ", ".join(f"{one['name']} ({one['annotations']:,}{note})" for one, note in zip(used[:12], notes))
    more = f" and {len(used) - 12} more" if len(used) > 12 else ""
    return (
        f"warning: annotations of {len(used)} categories are all taken as cells: {counts}{more}; where one is none "
        "(debris, a scale bar), name the others with --categories"
    )


def _resolve(named: Sequence[Mapping[int | str, str]], wanted: Sequence[str]) -> set[str]:
    """Names of the categories that `wanted` means, by name, id, or name in another case."""
    names = sorted({name for one in named for name in one.values()})
    chosen: set[str] = set()
    for word in wanted:
        by_id = {name for one in named for kind, name in one.items() if str(kind) == word}
        by_case = {name for name in names if name.casefold() == word.strip().casefold()}
        meant = ({word} & set(names)) or by_id or by_case
        if len(meant) > 1:
            raise UserError(f"--categories {word} may mean {' or '.join(sorted(meant))}; give the name")
        if not meant:
            near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise UserError(f"no category {word!r}{hint}; the set has {', '.join(names) or 'none'}")
        chosen |= meant
    return chosen
