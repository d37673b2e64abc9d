"""Files of a folder that are uploaded with a job: those not matched by .gitignore, .rayignore or `excludes`.

Ray selects them itself by the same rules; this module computes their sizes before the upload.
"""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from pathspec import GitIgnoreSpec

IGNORE_FILES = (".gitignore", ".rayignore")


def sizes(folder: Path, excludes: Sequence[str]) -> dict[str, int]:
    """Sizes in bytes of the files under `folder` to upload, by relative path with slashes.

    Args:
        folder: local folder.
        excludes: patterns as in .gitignore, relative to `folder`.
    """
    file_sizes: dict[str, int] = {}
    visited: set[str] = set()  # otherwise a link to a parent folder would be followed endlessly
    pending: list[tuple[str, list[tuple[str, GitIgnoreSpec]]]] = [("", [("", _rules(excludes))])]
    while pending:
        parent, parent_rules = pending.pop()
        if (real := os.path.realpath(folder / parent)) in visited:
            continue
        visited.add(real)
        # Each ignore file is applied separately: `!name` in one does not re-include a file that another excludes.
        rules = [*parent_rules, *((parent, _rules(lines)) for lines in _ignore_files(folder / parent))]
        with os.scandir(folder / parent) as entries:
            for entry in entries:
                path = parent + entry.name + ("/" if entry.is_dir() else "")
                if any(spec.match_file(path.removeprefix(base)) for base, spec in rules):
                    continue
                if entry.is_dir():
                    pending.append((path, rules))
                elif entry.is_file():
                    file_sizes[path] = entry.stat().st_size
    return file_sizes


def _rules(lines: Iterable[str]) -> GitIgnoreSpec:
    return GitIgnoreSpec.from_lines(line for line in lines if _is_pattern(line))


def _is_pattern(line: str) -> bool:
    """Whether git accepts a line of an ignore file; it ignores `!` and `[z-a]`."""
    try:
        GitIgnoreSpec.from_lines([line])
    except (ValueError, re.error):
        return False
    return True


def _ignore_files(folder: Path) -> list[list[str]]:
    files = [folder / name for name in IGNORE_FILES]
    return [file.read_text(errors="surrogateescape").splitlines() for file in files if file.is_file()]
