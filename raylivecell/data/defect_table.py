"""Defects as a table on the console, with files and reasons, and as one line."""

from collections import defaultdict
from collections.abc import Sequence

from rich.table import Table

from raylivecell.core import console
from raylivecell.data import defects
from raylivecell.data.defects import Defect

REASONS, NAMES = 4, 3
"""Printed of each defect, and files of each reason; dataset.json has all."""


def show(found: Sequence[Defect], title: str) -> None:
    """Print the table of defects and below it which files have them and why; nothing where there is none."""
    rows: dict[tuple[str, str], list[Defect]] = defaultdict(list)
    for one in sorted(found, key=lambda one: defects.ALL.index(one.defect)):
        rows[one.defect, one.rule].append(one)
    if not rows:
        return
    table = Table(title=title, title_justify="left")
    for column in ("defect", "images", "ids", "what was done"):
        table.add_column(column, no_wrap=True)
    for (defect, rule), members in rows.items():
        table.add_row(defect, str(len(members)), str(sum(len(one.ids) for one in members)), rule)
    console.console.print(table)
    for (defect, _), members in rows.items():
        for line in _reasons(members):
            console.console.print(f"{defect}: {line}", markup=False, highlight=False, soft_wrap=True)


def _reasons(members: Sequence[Defect]) -> list[str]:
    """`a.png, b.png and 7 more: why`, for the first reasons of one defect."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for one in members:
        is_path = " " not in one.detail and one.detail.endswith(one.file_name.rsplit("/", 1)[-1])
        by_reason["" if is_path else one.detail].append(_named(one))
    lines = [
        f"{_first(names, NAMES)}{': ' if reason else ''}{reason[:300]}" for reason, names in list(by_reason.items())
    ]
    more = [f"and {len(lines) - REASONS} other reasons"] if len(lines) > REASONS + 1 else []
    return lines if not more else [*lines[:REASONS], *more]


def _named(one: Defect) -> str:
    """The file; of an annotation file its records too."""
    ids = _first([str(identity) for identity in one.ids], NAMES)
    return f"{one.file_name} (ids {ids})" if ids and one.file_name.lower().endswith(".json") else one.file_name


def summary(found: Sequence[Defect]) -> str:
    """`3 defects (leak 2: NAME, ...; missing_file 1: NAME)`."""
    by_defect: dict[str, list[str]] = defaultdict(list)
    for one in found:
        by_defect[one.defect].append(one.file_name)
    parts = [f"{name} {len(files)}: {files[0]}{', ...' if len(files) > 1 else ''}" for name, files in by_defect.items()]
    return f"{len(found)} defect{'s' * (len(found) != 1)} ({'; '.join(parts)})"


def _first(names: Sequence[str], most: int) -> str:
    listed = list(dict.fromkeys(names))
    more = len(listed) - most
    return ", ".join(listed[:most]) + (f" and {more} more" if more > 0 else "")
