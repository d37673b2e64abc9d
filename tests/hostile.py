"""Malicious file contents, and checks that a command refuses them in one line."""

import io
import pickle
from collections.abc import Sequence
from pathlib import Path

import pytest

from raylivecell.cli import main


class Hostile:
    """Object whose pickle creates the file `marker` when loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.marker,))


def pickled(marker: Path) -> bytes:
    return pickle.dumps(Hostile(marker))


def torch_saved(marker: Path) -> bytes:
    """The same object, as torch.save writes it."""
    import torch

    sink = io.BytesIO()
    torch.save({"model": Hostile(marker)}, sink)
    return sink.getvalue()


def refused(capsys: pytest.CaptureFixture[str], command: str, *more: str | Path) -> str:
    """Run `command` and check that it is refused; return its one-line message."""
    capsys.readouterr()
    return one_line(main.main([*command.split(), *map(str, more)]), capsys.readouterr().err)


def one_line(code: int, output: str) -> str:
    """Check an exit code of 2 and an output of one line; return that line."""
    assert code == 2
    lines: Sequence[str] = [line for line in output.splitlines() if line.strip()]
    assert len(lines) == 1, output
    assert lines[0].startswith("raylivecell: ")
    assert len(lines[0]) < 800
    return lines[0]
