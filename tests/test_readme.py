"""The README names what is there: commands, flags, recipes and files."""

import re
from pathlib import Path

import pytest

from raylivecell import cli

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
LINES = re.findall(r"^raylivecell (\w+) (.*)$", TEXT, flags=re.M)


@pytest.mark.parametrize(("command", "arguments"), LINES, ids=[command for command, _ in LINES])
def test_commands_and_their_flags_exist(command: str, arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    stages = arguments.split()[:1] if command == "submit" else []
    for name in [command, *stages]:
        with pytest.raises(SystemExit) as done:
            cli.main([name, "--help"])
        assert done.value.code == 0
    documented = capsys.readouterr().out
    for flag in re.findall(r"--[\w.-]+", arguments):
        assert flag in documented


def test_files_named_exist() -> None:
    for name in re.findall(r"jobs/\w+\.yaml", TEXT):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", TEXT):
        assert (ROOT / name).is_file(), name


def test_the_tree_names_every_room() -> None:
    tree = TEXT.split("## The files")[1].split("## Development")[0]
    patterns = re.findall(r"[\w*]+\.py", tree)
    for path in (ROOT / "raylivecell").glob("*.py"):
        assert path.name in ("__init__.py", "__main__.py") or any(path.match(p) for p in patterns), path.name
