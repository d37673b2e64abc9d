"""Check the text of files: `python tests/lint_text.py [FILE ...]`; without arguments, all files in git.

Each line of output is PATH:LINE: what is wrong; exit 1 if there is any. Standard library only, takes at most a second.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60
"""Limits of Python files, tests included."""
OWN = {str(ROOT), str(ROOT.parent), str(Path.home())} - {"/", "/tmp", "/home"}
# This checkout's folder, or a home folder; the home folder in Ray's images is /home/ray.
FOLDERS = [rf"(?<![\w.}}]){re.escape(path)}/" for path in sorted(OWN)]
MACHINE = re.compile("|".join([*FOLDERS, r"/home/(?!ray\b)\w+/", r"/Users/\w+/", r"[A-Z]:\\\\?Users"]))
CONFLICT = re.compile(r"^(<{7} |>{7} |\|{7} )")
REPLACEMENTS = {
    "anew": "again, from scratch",
    "mend(s|ed|ing)?": "fix",
    "strangers?": "untrusted, or newcomer",
    "rivals?": "baseline",
    "(told|tell|tells) apart": "separated, distinguished",
    "tells?|told": "prints, reports, shows, or the term of what is sent",
    "beside": "next to, in addition to, compared with",
    "(go|goes|gone|went) on": "continues, resumes",
    "so many": "N, this number of",
    "foretold": "predicted",
    "(hand|hands|handed) over": "pass, return",
    "(takes?|taken|took) up": "resume, start",
    "begun": "started",
    "lies|lie": "is stored, is at",
    "rooms?": "space, memory, capacity, module",
    "whoever": "a user who",
    "of ours|of theirs": "our, their",
}
"""Word -> what engineers of the field write instead."""
WORDS = {re.compile(rf"(?<![\w.-])({word})(?![\w-])", re.IGNORECASE): better for word, better in REPLACEMENTS.items()}
NAMES = {"told", "said", "asked", "named", "known", "found", "made", "kept", "drawn", "one", "some", "several", "odd"}
"""Names of variables and parameters that do not say what they contain."""


def line_faults(path: Path, text: str) -> Iterator[tuple[int, str]]:
    """Faults of single lines: (line, what is wrong)."""
    for number, line in enumerate(text.split("\n"), 1):
        if other := re.search(r"[^\x00-\x7f]", line):
            yield number, f"not ASCII: {other[0]!a}"
        if CONFLICT.match(line):
            yield number, "a merge conflict"
        if path == Path(__file__).resolve():
            continue
        if place := MACHINE.search(line):
            yield number, f"a path of one machine: {place[0]}"
        for word, better in WORDS.items():
            if use := word.search(line):
                yield number, f"'{use[0]}': write {better}"


def name_faults(text: str) -> Iterator[tuple[int, str]]:
    """Variables and parameters whose name is in NAMES: (line, what is wrong)."""
    for node in ast.walk(ast.parse(text)):
        name = node.arg if isinstance(node, ast.arg) else None
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
        if name in NAMES:
            yield getattr(node, "lineno", 0), f"variable '{name}': use a noun for its content"


def size_faults(text: str) -> Iterator[tuple[int, str]]:
    """Files and functions that are too long: (line, what is wrong)."""
    if (lines := len(text.splitlines())) > MAX_FILE_LINES:
        yield lines, f"{lines} lines, more than {MAX_FILE_LINES}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            documented = ast.get_docstring(node, clean=False) is not None
            start = first.end_lineno if documented else node.lineno - 1
            length = (node.end_lineno or 0) - (start or 0)
            if length > MAX_FUNCTION_LINES:
                yield node.lineno, f"{node.name} has {length} lines after its docstring, more than {MAX_FUNCTION_LINES}"


def faults(path: Path) -> Iterator[str]:
    """Everything wrong with one file; nothing for binary files."""
    data = path.read_bytes()
    if b"\0" in data or path.suffix in {".png", ".tif"}:
        return
    text = data.decode("utf-8", errors="surrogateescape")
    faults = [*line_faults(path, text)]
    if path.suffix == ".py":
        faults += [*name_faults(text), *size_faults(text)]
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    yield from (f"{shown}:{line}: {what}" for line, what in faults)


def project_files() -> list[Path]:
    """Files that are committed or not ignored; without git, all except those in hidden folders and outputs."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, check=True, capture_output=True).stdout.decode("utf-8", "surrogateescape")
        paths = [ROOT / name for name in listed.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        outputs = {"runs", "data", "demo", "bench", "__pycache__"}
        names = [path.relative_to(ROOT).parts for path in ROOT.rglob("*")]
        paths = [ROOT.joinpath(*parts) for parts in names if not (parts[0].startswith(".") or outputs & {*parts})]
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def main(names: list[str]) -> int:
    """Print all faults; 1 if there is any."""
    paths = [Path(name).resolve() for name in names] or project_files()
    lines = [fault for path in paths for fault in faults(path)]
    print("\n".join(lines) or f"{len(paths)} files: text in order")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
