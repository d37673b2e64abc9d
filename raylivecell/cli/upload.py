"""Which files of a folder travel with a job: those that neither .gitignore, .rayignore nor `excludes` name.

Ray decides by itself what it uploads, by the same rules; here the sizes are summed before anything is sent.
"""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from pathspec import GitIgnoreSpec

IGNORE_FILES = (".gitignore", ".rayignore")


def sizes(folder: Path, excludes: Sequence[str]) -> dict[str, int]:
    """Bytes of each file under `folder` that would be uploaded, by its path in there, with slashes.

    Args:
        folder: local.
        excludes: patterns as in .gitignore, relative to `folder`.
    """
    found: dict[str, int] = {}
    visited: set[str] = set()  # a link to a folder above would be followed for ever
    waiting: list[tuple[str, list[tuple[str, GitIgnoreSpec]]]] = [("", [("", _rules(excludes))])]
    while waiting:
        parent, above = waiting.pop()
        if (real := os.path.realpath(folder / parent)) in visited:
            continue
        visited.add(real)
        # Each file's rules are judged by themselves: `!name` of one takes nothing back that another excludes.
        rules = [*above, *((parent, _rules(lines)) for lines in _ignore_files(folder / parent))]
        with os.scandir(folder / parent) as entries:
            for entry in entries:
                path = parent + entry.name + ("/" if entry.is_dir() else "")
                if any(spec.match_file(path.removeprefix(base)) for base, spec in rules):
                    continue
                if entry.is_dir():
                    waiting.append((path, rules))
                elif entry.is_file():
                    found[path] = entry.stat().st_size
    return found


def _rules(lines: Iterable[str]) -> GitIgnoreSpec:
    return GitIgnoreSpec.from_lines(line for line in lines if _is_pattern(line))


def _is_pattern(line: str) -> bool:
    """Whether a line of an ignore file is one that git can read: `!` or `[z-a]` match nothing there."""
    try:
        GitIgnoreSpec.from_lines([line])
    except (ValueError, re.error):
        return False
    return True


def _ignore_files(folder: Path) -> list[list[str]]:
    files = [folder / name for name in IGNORE_FILES]
    return [file.read_text(errors="surrogateescape").splitlines() for file in files if file.is_file()]
