"""Fixtures for the tests of `prepare`; a test module uses them by `pytest_plugins`."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from prepare_source import Json, SourceFolder

from raylivecell.data import prepare as prepare_module
from raylivecell.data import shards
from raylivecell.runtime import session


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the Ray Data tasks in this process, in milliseconds."""

    def run_here(function: Callable[[Json], Json], rows: Sequence[Json]) -> Iterator[Json]:
        for row in rows:
            yield function(json.loads(json.dumps(row)))

    monkeypatch.setattr(prepare_module, "_on_ray", run_here)
    monkeypatch.setattr(session, "connect", lambda: None)


@pytest.fixture
def folder(tmp_path: Path) -> SourceFolder:
    """Two valid images in each split."""
    folder = SourceFolder(tmp_path / "source")
    for split in shards.SPLITS:
        for number in (1, 2):
            folder.image(split, f"A172_Phase_{split}_{number}.png")
    return folder
