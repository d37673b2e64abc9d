"""Requests of the page: damaged and hostile ones get one line, and none can take much memory."""

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
import tifffile

from raylivecell.core.errors import UserError
from raylivecell.reports.overlay import png
from raylivecell.serving import page_data
from raylivecell.serving.page_data import Task


def encoded(values: Any, kind: str = "<i4") -> str:
    return base64.b64encode(np.array(values, kind).tobytes()).decode()


def request(**changes: Any) -> dict[str, Any]:
    """An export of a 3 x 2 image with the cells 5 and 9."""
    pixels = base64.b64encode(png(np.arange(6, dtype=np.uint8).reshape(2, 3))).decode()
    fields = {"file": "a.png", "width": 3, "height": 2, "label_runs": encoded([5, 2, 0, 1, 9, 3])}
    return {**fields, "image_png": pixels, "scores": encoded([0.5, 1], "<f8"), **changes}


def answer(task: Task, body: Any) -> dict[str, Any]:
    return json.loads(page_data.answer(task, body if isinstance(body, bytes) else json.dumps(body).encode()))


def test_an_export_numbers_the_labels_and_measures_them() -> None:
    result = answer("export", request())
    labels = tifffile.imread(io.BytesIO(base64.b64decode(result["files"]["labels/{}.tif"])))
    np.testing.assert_array_equal(labels, [[1, 1, 0], [2, 2, 2]])
    assert [line.split(",")[:3] for line in result["cells"].splitlines()] == [["a.png", "1", "2"], ["a.png", "2", "3"]]
    assert set(result["files"]) == {"labels/{}.tif", "overlays/{}.png", "geojson/{}.geojson", "rois/{}.zip"}


@pytest.mark.parametrize(
    "changes",
    [
        {"label_runs": encoded([1, 2**31 - 1] * 4 + [1, 10])},  # the sum of lengths must not overflow
        {"label_runs": encoded([5, 2, 0, -1, 9, 5])},
        {"label_runs": encoded([5, 2, 0, 0, 9, 4])},
        {"label_runs": encoded([-5, 6])},
        {"label_runs": encoded([5, 5])},
        {"label_runs": encoded([5])},
        {"label_runs": "AAA="},
        {"label_runs": "\u00e9"},
        {"label_runs": [5, 6]},
        {"width": 2**40},
        {"width": 2**26, "height": 2**26},
        {"width": 0},
        {"scores": encoded([0.5], "<f8")},
        {"scores": encoded([0.5, float("nan")], "<f8")},
        {"scores": encoded([0.5, float("inf")], "<f8")},
        {"image_png": base64.b64encode(b"no image").decode()},
        {"image_png": base64.b64encode(png(np.zeros((3, 3), np.uint8))).decode()},
        {"unknown": 1},
    ],
)
def test_a_wrong_export_is_refused_in_one_line(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError) as refused:
        answer("export", request(**changes))
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 300


def test_sizes_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_data, "MAX_CELLS", 1)
    with pytest.raises(UserError, match="2 cells; files of 1 at most"):
        answer("export", request())
    monkeypatch.setattr(page_data, "MAX_RUNS", 8)
    noise = base64.b64encode(png((np.arange(6, dtype=np.uint8) % 2 + 1).reshape(2, 3))).decode()
    with pytest.raises(UserError, match="not a label image of cells"):
        answer("score", {key: request()[key] for key in ("width", "height", "label_runs")} | {"reference": noise})
    growth = {
        "file": "a",
        "cells": 10**400,
        "confluence": 0.5,
        "area": None,
        "width": 1,
        "height": 1,
        "has_warning": False,
    }
    for body in (b"{", b"[]", b'{"images": [1, 2, 3]}', json.dumps({"images": [growth]}).encode()):
        with pytest.raises(UserError):
            answer("growth", body)


def test_dropped_files_are_paired_as_prepare_pairs_them() -> None:
    paths = ["x/images/a.tif", "x/ground_truth/a.png", "b.tif", "b_masks.png", "c.tif", "masks/d.png", "notes.txt"]
    result = answer("pairs", {"paths": paths})
    assert sorted(result["images"]) == ["b.tif", "c.tif", "x/images/a.tif"]
    assert result["labels"] == {"x/images/a.tif": "x/ground_truth/a.png", "b.tif": "b_masks.png"}
    assert result["unpaired"] == ["masks/d.png"]
