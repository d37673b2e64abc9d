"""SECURITY.md refers to tests that exist."""

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
TEXT = (TESTS.parent / "SECURITY.md").read_text()
FILES = {path.name: path.read_text() for path in TESTS.rglob("test_*.py")}


def test_files_and_tests_in_security_md_exist() -> None:
    names = re.findall(r"`(?:tests/\w+/)?(test_\w+(?:\.py)?)`", TEXT)
    assert len(names) > 30
    functions = {name for text in FILES.values() for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE)}
    assert sorted(set(names) - functions - FILES.keys()) == []


def test_paths_in_security_md_exist() -> None:
    paths = re.findall(r"`(tests/\w+/[\w.]+)`", TEXT)
    assert paths
    assert [path for path in paths if not (TESTS.parent / path).is_file()] == []
