"""Result files and tables of `predict`: a run killed at any time and resumed writes the same tables."""

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
from raylivecell.inference import results
from raylivecell.inference.results import ImageResult, ImageRow

FILES = ['a, "1".tif', "b.tif", "deep/c.png", "new\nline.tif", "z.tif"]
TABLES = ("cells", "coco")


class Killed(Exception):
    """Simulates the end of the process by a kill."""


def image_result(file: str, version: str) -> ImageResult:
    """Result of an image; its number of cells is its index in `FILES` (0 for the first). z.tif cannot be read."""
    if file == "z.tif":
        return ImageResult(ImageRow(file, error="truncated", version=version))
    count = FILES.index(file)
    lines = results._csv([[file, label, version, *"0" * 10] for label in range(1, count + 1)])
    detections = [{"image_id": 0, "category_id": 1, "segmentation": {"counts": "a, b"}, "score": 0.5}] * count
    row = ImageRow(file, version=version, height=3, cells=count, confluence=0.25)
    return ImageResult(row, lines, [results.record(detection) for detection in detections])


def run(out: str, versions: Mapping[str, str]) -> list[str]:
    """Call the functions in the order of `predict`; return the files that are segmented."""
    pending = []
    if not results.is_complete(out, versions):
        pending = results.pending(out, versions)
        for file in pending:
            results.write(out, versions[file], image_result(file, versions[file]))
        results.merge(out, versions, TABLES)
    results.clear(out)
    return pending


def tree(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def versions_of(files: list[str], version: str = "1") -> dict[str, str]:
    return {file: results.version(file, file, 3, version) for file in files}


def test_tables_contain_every_image_and_cell_in_order(tmp_path: Path) -> None:
    versions = versions_of(FILES)
    assert run(str(tmp_path), versions) == FILES
    assert set(tree(tmp_path)) == {"images.csv", "cells.csv", "coco.json"}
    with open(tmp_path / "images.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["file"], row["image_id"], row["cells"]) for row in rows] == [
        (file, str(i + 1), str(i) if i < 4 else "") for i, file in enumerate(FILES)
    ]
    assert [row["error"] for row in rows] == ["", "", "", "", "truncated"]
    with open(tmp_path / "cells.csv", newline="") as stream:
        cells = list(csv.DictReader(stream))
    assert tuple(cells[0]) == measure.COLUMNS
    assert [cell["file"] for cell in cells] == [FILES[1]] + [FILES[2]] * 2 + [FILES[3]] * 3
    records = json.loads((tmp_path / "coco.json").read_text())
    assert [record["image_id"] for record in records] == [2, 3, 3, 4, 4, 4]
    assert records[0] == {"image_id": 2, "category_id": 1, "segmentation": {"counts": "a, b"}, "score": 0.5}


def test_tables_without_cells_and_only_the_image_table(tmp_path: Path) -> None:
    run(str(tmp_path / "none"), versions_of([FILES[0]]))
    assert json.loads((tmp_path / "none" / "coco.json").read_text()) == []
    assert (tmp_path / "none" / "cells.csv").read_text().count("\n") == 1
    versions = versions_of(FILES)
    for file in results.pending(str(tmp_path / "images_only"), versions):
        results.write(str(tmp_path / "images_only"), versions[file], image_result(file, versions[file]))
    results.merge(str(tmp_path / "images_only"), versions, ())
    results.clear(str(tmp_path / "images_only"))
    assert set(tree(tmp_path / "images_only")) == {"images.csv"}


def test_only_new_or_changed_images_are_segmented(tmp_path: Path) -> None:
    out = str(tmp_path)
    assert run(out, versions_of(FILES[1:3])) == FILES[1:3]
    before = (tmp_path / "images.csv").stat().st_mtime_ns
    assert run(out, versions_of(FILES[1:3])) == []
    assert (tmp_path / "images.csv").stat().st_mtime_ns == before  # the tables are not rewritten
    assert run(out, versions_of(FILES)) == [FILES[0], *FILES[3:]]
    changed = versions_of(FILES) | versions_of(FILES[2:3], "2")
    assert run(out, changed) == FILES[2:3]
    assert run(out, {file: changed[file] for file in FILES[2:]}) == []
    fresh = tmp_path / "fresh"
    run(str(fresh), {file: changed[file] for file in FILES[2:]})
    assert tree(fresh) == {name: data for name, data in tree(tmp_path).items() if not name.startswith("fresh")}


def test_an_image_that_could_not_be_opened_is_tried_again(tmp_path: Path) -> None:
    out, versions = str(tmp_path), versions_of(FILES[:2])
    results.pending(out, versions)
    results.write(out, versions[FILES[0]], ImageResult(ImageRow(FILES[0], error="no such host")))
    results.write(out, versions[FILES[1]], image_result(FILES[1], versions[FILES[1]]))
    results.merge(out, versions, TABLES)
    results.clear(out)
    assert [row.error for row in results.rows(out)] == ["no such host", None]
    assert run(out, versions) == [FILES[0]]
    assert [row.error for row in results.rows(out)] == [None, None]


@pytest.fixture(scope="module")
def parent_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


class KillSwitch:
    """Raises `Killed` at the n-th file change."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.changes_left: int | None = None
        for name in ("write_bytes", "move", "delete"):
            patch.setattr(storage, name, self.counted(getattr(storage, name)))
        patch.setattr(storage.os, "replace", self.counted(storage.os.replace))

    def counted(self, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            if self.changes_left is not None:
                self.changes_left -= 1
                if self.changes_left < 0:
                    raise Killed
            return function(*arguments)

        return call


@settings(max_examples=30)
@given(st.lists(st.tuples(st.sets(st.sampled_from(FILES), min_size=1), st.integers(0, 25)), min_size=1, max_size=5))
def test_runs_killed_at_any_file_change_end_with_the_same_tables(
    parent_folder: Path, runs: list[tuple[set[str], int]]
) -> None:
    """Runs over subsets of the images, each killed after N file changes, then one over all images."""
    out = parent_folder / f"{len(list(parent_folder.iterdir()))}"
    with pytest.MonkeyPatch.context() as patch:
        kill_switch = KillSwitch(patch)
        for files, changes in runs:
            kill_switch.changes_left = changes
            try:
                run(str(out), versions_of(sorted(files)))
            except Killed:
                continue
        kill_switch.changes_left = None
        run(str(out), versions_of(FILES))
        assert results.is_complete(str(out), versions_of(FILES))
        run(str(out / "fresh"), versions_of(FILES))
    fresh = tree(out / "fresh")
    assert {name: data for name, data in tree(out).items() if not name.startswith("fresh")} == fresh
