"""What a stranger might write, and what is asked of a command that reads it."""

import io
import pickle
from collections.abc import Sequence
from pathlib import Path

import pytest

from raylivecell.cli import main


class Hostile:
    """A pickle that makes a file when it is opened."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.marker,))


def pickled(marker: Path) -> bytes:
    return pickle.dumps(Hostile(marker))


def torch_saved(marker: Path) -> bytes:
    """The same as torch would save it."""
    import torch

    sink = io.BytesIO()
    torch.save({"model": Hostile(marker)}, sink)
    return sink.getvalue()


def refused(capsys: pytest.CaptureFixture[str], command: str, *more: str | Path) -> str:
    """The one line in which the command line refuses `command`."""
    capsys.readouterr()
    return one_line(main.main([*command.split(), *map(str, more)]), capsys.readouterr().err)


def one_line(code: int, told: str) -> str:
    assert code == 2
    lines: Sequence[str] = [line for line in told.splitlines() if line.strip()]
    assert len(lines) == 1, told
    assert lines[0].startswith("raylivecell: ")
    assert len(lines[0]) < 800
    return lines[0]
