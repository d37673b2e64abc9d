"""Which files of a folder travel with a job: those that neither .gitignore, .rayignore nor `excludes` name.

Ray decides by itself what it uploads, by the same rules; here the sizes are summed before anything is sent.
"""

import contextlib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

IGNORE_FILES = (".gitignore", ".rayignore")


class _Rule(NamedTuple):
    """A line of an ignore file."""

    regex: re.Pattern[str]
    """Matches paths relative to the folder of the file, with slashes."""
    folders_only: bool
    negated: bool


def sizes(folder: Path, excludes: Sequence[str]) -> dict[str, int]:
    """Bytes of each file under `folder` that would be uploaded, by its path in there, with slashes.

    Args:
        folder: local.
        excludes: patterns as in .gitignore, relative to `folder`.
    """
    found: dict[str, int] = {}
    visited: set[str] = set()  # a link to a folder above would be followed for ever
    waiting: list[tuple[str, list[tuple[str, list[_Rule]]]]] = [("", [("", rules(excludes))])]
    while waiting:
        parent, above = waiting.pop()
        if (real := os.path.realpath(folder / parent)) in visited:
            continue
        visited.add(real)
        # Each file's rules are judged by themselves: `!name` of one takes nothing back that another excludes.
        lists = [*above, *((parent, rules(lines)) for lines in _ignore_files(folder / parent))]
        with os.scandir(folder / parent) as entries:
            for entry in entries:
                path, is_folder = parent + entry.name, entry.is_dir()
                if any(_is_excluded(path.removeprefix(base), is_folder, listed) for base, listed in lists):
                    continue
                if is_folder:
                    waiting.append((f"{path}/", lists))
                elif entry.is_file():
                    found[path] = entry.stat().st_size
    return found


def rules(lines: Iterable[str]) -> list[_Rule]:
    """The rules in lines of an ignore file, as git reads them."""
    found = []
    for line in lines:
        text = re.sub(r"(?<!\\) +$", "", line.rstrip("\n"))
        if text and not text.startswith("#"):
            negated = text.startswith("!")
            pattern = text[negated:]
            with contextlib.suppress(re.error):  # such as [z-a], which matches nothing
                found.append(_Rule(re.compile(_regex(pattern.rstrip("/"))), pattern.endswith("/"), negated))
    return found


def _ignore_files(folder: Path) -> list[list[str]]:
    files = [folder / name for name in IGNORE_FILES]
    return [file.read_text(errors="surrogateescape").splitlines() for file in files if file.is_file()]


def _is_excluded(path: str, is_folder: bool, listed: Sequence[_Rule]) -> bool:
    """Whether the last rule that matches excludes the path; what is in an excluded folder is never asked for."""
    for rule in reversed(listed):
        if (is_folder or not rule.folders_only) and rule.regex.fullmatch(path):
            return not rule.negated
    return False


def _regex(pattern: str) -> str:
    """A pattern of .gitignore as a regular expression: with a slash in it, it starts at the file's folder."""
    anchored = "/" in pattern
    parts = pattern.lstrip("/").split("/")
    words = [_word(part) for part in parts]
    text = "" if anchored else "(?:.*/)?"
    for place, (part, word) in enumerate(zip(parts, words)):
        last = place == len(parts) - 1
        if part == "**":
            text += ".*" if last else "(?:.*/)?"
        else:
            text += word + ("" if last else "/")
    return text


def _word(part: str) -> str:
    """One part of a pattern: * and ? match within a name, [...] one of its characters, a backslash escapes."""
    text = ""
    for token in re.findall(r"\\.|\[!?\]?[^\]]*\]|.", part):
        if token == "*":
            text += "[^/]*"
        elif token == "?":
            text += "[^/]"
        elif len(token) > 2 and token.startswith("["):
            inside = token[1:-1].replace("\\", "\\\\")
            text += f"[^{inside[1:]}]" if inside[0] in "!^" else f"[{inside}]"
        else:
            text += re.escape(token[1:] if len(token) == 2 and token[0] == "\\" else token)
    return text
