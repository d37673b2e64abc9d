"""Fixtures for the tests of `prepare`; a test module uses them by `pytest_plugins`."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from prepare_source import Folder, Json

from raylivecell.data import prepare as module
from raylivecell.data import shards
from raylivecell.runtime import session


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline's tasks run here and now: what they do is the same, and takes milliseconds."""

    def here(function: Callable[[Json], Json], jobs: Sequence[Json]) -> Iterator[Json]:
        for job in jobs:
            yield function(json.loads(json.dumps(job)))

    monkeypatch.setattr(module, "_on_ray", here)
    monkeypatch.setattr(session, "connect", lambda: None)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Two sound images in each split."""
    made = Folder(tmp_path / "source")
    for split in shards.SPLITS:
        for number in (1, 2):
            made.image(split, f"A172_Phase_{split}_{number}.png")
    return made
