"""What `predict` keeps of each image: whenever it is stopped, it ends with the tables of an undisturbed run."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raylivecell.cells import measure
from raylivecell.core import storage
from raylivecell.inference import results as parts

FILES = ['a, "1".tif', "b.tif", "deep/c.png", "new\nline.tif", "z.tif"]
ALL = ("cells", "coco")


class Stopped(Exception):
    """The power is cut."""


def part(file: str, version: str) -> parts.ImageResult:
    """Of an image with as many cells as its place in `FILES`, so the first has none; z.tif cannot be read."""
    if file == "z.tif":
        return parts.ImageResult({"file": file, "version": version, "error": "cut off"}, "", [])
    count = FILES.index(file)
    lines = parts._csv([[file, label, version, *"0" * 10] for label in range(1, count + 1)])
    results = [{"image_id": 0, "category_id": 1, "segmentation": {"counts": "a, b"}, "score": 0.5}] * count
    row = {"file": file, "version": version, "height": 3, "cells": count, "confluence": 0.25}
    return parts.ImageResult(row, lines, [parts.record(result) for result in results])


def run(out: str, versions: Mapping[str, str]) -> list[str]:
    """What `predict` does; the files that it segments."""
    waiting = []
    if not parts.is_complete(out, versions):
        waiting = parts.begin(out, versions)
        for file in waiting:
            parts.write(out, versions[file], part(file, versions[file]))
        parts.merge(out, versions, ALL)
    parts.clear(out)
    return waiting


def tree(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def versions_of(files: list[str], version: str = "1") -> dict[str, str]:
    return {file: parts.version(file, file, 3, version) for file in files}


def test_the_tables(tmp_path: Path) -> None:
    versions = versions_of(FILES)
    assert run(str(tmp_path), versions) == FILES
    assert set(tree(tmp_path)) == {"images.csv", "cells.csv", "coco.json"}
    with open(tmp_path / "images.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["file"], row["image_id"], row["cells"]) for row in rows] == [
        (file, str(i + 1), str(i) if i < 4 else "") for i, file in enumerate(FILES)
    ]
    assert [row["error"] for row in rows] == ["", "", "", "", "cut off"]
    with open(tmp_path / "cells.csv", newline="") as stream:
        cells = list(csv.DictReader(stream))
    assert tuple(cells[0]) == measure.COLUMNS
    assert [cell["file"] for cell in cells] == [FILES[1]] + [FILES[2]] * 2 + [FILES[3]] * 3
    records = json.loads((tmp_path / "coco.json").read_text())
    assert [record["image_id"] for record in records] == [2, 3, 3, 4, 4, 4]
    assert records[0] == {"image_id": 2, "category_id": 1, "segmentation": {"counts": "a, b"}, "score": 0.5}


def test_without_cells_and_without_tables(tmp_path: Path) -> None:
    run(str(tmp_path / "none"), versions_of([FILES[0]]))
    assert json.loads((tmp_path / "none" / "coco.json").read_text()) == []
    assert (tmp_path / "none" / "cells.csv").read_text().count("\n") == 1
    versions = versions_of(FILES)
    for file in parts.begin(str(tmp_path / "few"), versions):
        parts.write(str(tmp_path / "few"), versions[file], part(file, versions[file]))
    parts.merge(str(tmp_path / "few"), versions, ())
    parts.clear(str(tmp_path / "few"))
    assert set(tree(tmp_path / "few")) == {"images.csv"}


def test_only_what_is_new_is_done(tmp_path: Path) -> None:
    out = str(tmp_path)
    assert run(out, versions_of(FILES[1:3])) == FILES[1:3]
    before = (tmp_path / "images.csv").stat().st_mtime_ns
    assert run(out, versions_of(FILES[1:3])) == []
    assert (tmp_path / "images.csv").stat().st_mtime_ns == before  # not even the tables
    assert run(out, versions_of(FILES)) == [FILES[0], *FILES[3:]]
    changed = versions_of(FILES) | versions_of(FILES[2:3], "2")
    assert run(out, changed) == FILES[2:3]
    assert run(out, {file: changed[file] for file in FILES[2:]}) == []
    fresh = tmp_path / "fresh"
    run(str(fresh), {file: changed[file] for file in FILES[2:]})
    assert tree(fresh) == {name: data for name, data in tree(tmp_path).items() if not name.startswith("fresh")}


def test_an_image_that_could_not_be_had_is_tried_again(tmp_path: Path) -> None:
    out, versions = str(tmp_path), versions_of(FILES[:2])
    parts.begin(out, versions)
    parts.write(out, versions[FILES[0]], parts.ImageResult({"file": FILES[0], "error": "no such host"}, "", []))
    parts.write(out, versions[FILES[1]], part(FILES[1], versions[FILES[1]]))
    parts.merge(out, versions, ALL)
    parts.clear(out)
    assert [row["error"] for row in parts.rows(out)] == ["no such host", ""]
    assert run(out, versions) == [FILES[0]]
    assert [row["error"] for row in parts.rows(out)] == ["", ""]


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ground")


class Cut:
    """Stops the process, as it were, at the n-th change of a file."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.left: int | None = None
        for name in ("write_bytes", "move", "delete"):
            patch.setattr(storage, name, self.counted(getattr(storage, name)))
        patch.setattr(storage.os, "replace", self.counted(storage.os.replace))

    def counted(self, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            if self.left is not None:
                self.left -= 1
                if self.left < 0:
                    raise Stopped
            return function(*arguments)

        return call


@settings(max_examples=30)
@given(st.lists(st.tuples(st.sets(st.sampled_from(FILES), min_size=1), st.integers(0, 25)), min_size=1, max_size=5))
def test_stopped_anywhere_it_ends_the_same(ground: Path, runs: list[tuple[set[str], int]]) -> None:
    """Runs over these images or those, each stopped after so many changes of files, then one over all."""
    out = ground / f"{len(list(ground.iterdir()))}"
    with pytest.MonkeyPatch.context() as patch:
        cut = Cut(patch)
        for files, changes in runs:
            cut.left = changes
            try:
                run(str(out), versions_of(sorted(files)))
            except Stopped:
                continue
        cut.left = None
        run(str(out), versions_of(FILES))
        assert parts.is_complete(str(out), versions_of(FILES))
        run(str(out / "fresh"), versions_of(FILES))
    fresh = tree(out / "fresh")
    assert {name: data for name, data in tree(out).items() if not name.startswith("fresh")} == fresh
