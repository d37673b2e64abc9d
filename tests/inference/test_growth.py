"""Growth files of `predict`: a known doubling time is recovered, and stale files never remain."""

import csv
import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile

from raylivecell.cells import measure
from raylivecell.core.errors import UserError
from raylivecell.growth.names import NamePattern
from raylivecell.inference import growth, predict, results
from raylivecell.inference.results import ImageRow
from raylivecell.synthetic import cell_shapes

KIND = next(kind for kind in cell_shapes.KINDS if kind.name == "MCF7")
SHAPE = (cell_shapes.HEIGHT, cell_shapes.WIDTH)
DOUBLING = 20.0


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


def write_tables(out: Path, images: dict[str, np.ndarray | None], failed: tuple[str, ...] = ()) -> None:
    """Write images.csv and cells.csv of label images, as `predict` does."""
    out.mkdir(exist_ok=True)
    rows, cells = [], results._csv([measure.COLUMNS])
    for number, (file, labels) in enumerate(sorted(images.items()), 1):
        if labels is None:
            rows.append(ImageRow(file, number, error="truncated", version="1"))
            continue
        measured = measure.measure(labels, labels.astype(np.uint8))
        cells += measure.lines(file, measured, np.ones(len(measured.label)))
        confluence = round(float((labels != 0).mean()), 6)
        height, width = labels.shape
        row = ImageRow(file, number, height, width, len(measured.label), confluence, gain=1.0, warning="", version="1")
        rows.append(row)
    (out / "images.csv").write_text(results._csv([ImageRow._fields, *rows]))
    (out / "cells.csv").write_text(cells)


@pytest.fixture(scope="module")
def series() -> dict[str, np.ndarray]:
    """Label images of four wells in which synthetic cells divide every 20 h, every division at random."""
    rng = np.random.default_rng(7)
    images = {}
    for well in ("B2", "C2", "D2", "E2"):
        cells = 60
        for hours in range(0, 49, 8):
            if hours:
                cells += int(rng.negative_binomial(cells, 2 ** (-8 / DOUBLING)))
            masks = cell_shapes.draw_masks(KIND, cell_shapes.place(KIND, cells, rng), rng)
            labels = np.zeros(SHAPE, np.int32)
            for number, mask in enumerate(masks, 1):
                labels[mask.window][mask.pixels > 0] = number
            images[f"MCF7_Phase_{well}_1_{hours // 24:02d}d{hours % 24:02d}h00m_1.tif"] = labels
    return images


def test_the_interval_contains_the_known_doubling_time(series: dict[str, np.ndarray], tmp_path: Path) -> None:
    write_tables(tmp_path, series)
    growth.write(str(tmp_path), NamePattern())
    fits = {(row["wells"], row["measure"]): row for row in read(tmp_path / "growth_fits.csv")}
    assert len(fits) == 10
    assert next(iter(fits)) == ("B2 C2 D2 E2", "cells")
    covered = 0
    for (_, name), row in fits.items():
        assert (row["trusted"], row["reasons"]) == ("yes", ""), row
        low, high = float(row["doubling_hours_low"]), float(row["doubling_hours_high"])
        assert low < float(row["doubling_hours"]) < high
        covered += name == "cells" and low <= DOUBLING <= high
    assert covered >= 4  # of five 95 % intervals
    replicates = fits["B2 C2 D2 E2", "cells"]
    assert float(replicates["doubling_hours_low"]) < DOUBLING < float(replicates["doubling_hours_high"])
    points = read(tmp_path / "growth.csv")
    assert len(points) == len(series) == 28
    labels = series["MCF7_Phase_C2_1_01d00h00m_1.tif"]
    (point,) = (row for row in points if (row["well"], row["hours"]) == ("C2", "24"))
    areas = np.bincount(labels.ravel())[1:]
    expected = {"cells": len(areas[areas > 0]), "confluence": (labels != 0).mean(), "median_area_px": np.median(areas)}
    assert {name: float(point[name]) for name in expected} == pytest.approx(expected, rel=1e-5)
    assert (point["plate"], point["condition"], point["images"], point["cells_sd"]) == ("", "MCF7", "1", "")


def test_files_depend_only_on_the_tables(series: dict[str, np.ndarray], tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_tables(out, series)
    growth.write(str(out), NamePattern())
    before = {name: ((out / name).read_bytes(), (out / name).stat().st_mtime_ns) for name in growth.FILES}
    growth.write(str(out), NamePattern())
    assert {name: ((out / name).read_bytes(), (out / name).stat().st_mtime_ns) for name in growth.FILES} == before
    (out / "cells.csv").unlink()  # predict --write labels
    growth.write(str(out), NamePattern())
    assert {row["median_area_px"] for row in read(out / "growth.csv")} == {""}
    for line in ("x,1,5", "MCF7_Phase_B2_1_00d00h00m_1.tif,1", "MCF7_Phase_B2_1_00d00h00m_1.tif,1,many"):
        (out / "cells.csv").write_text(f"file,label,area_px\n{line}\n")
        with pytest.raises(UserError, match=r"cells\.csv is not what raylivecell writes.*--overwrite"):
            growth.write(str(out), NamePattern())


def test_names_without_times_leave_no_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = np.pad(np.ones((4, 4), np.int32), 2)
    out = str(tmp_path)
    write_tables(
        tmp_path, {f"A_Phase_A1_1_00d{h:02d}h00m_1.tif": labels for h in range(2)} | {"x.tif": labels, "y.tif": None}
    )
    growth.write(out, NamePattern())
    lines = capsys.readouterr().err
    assert "growth curves: 2 of 4 images left out: no well and time in the name, first x.tif" in lines
    assert "growth curves of 1 well: " in lines
    assert all((tmp_path / name).exists() for name in growth.FILES)
    write_tables(tmp_path, {"A_Phase_A1_1_00d00h00m_1.tif": labels, "A_Phase_A2_1_00d04h00m_1.tif": labels})
    growth.write(out, NamePattern())
    assert "no growth curves: no well has images of two times; wells: 2" in capsys.readouterr().err
    assert not any((tmp_path / name).exists() for name in growth.FILES)
    write_tables(tmp_path, {"x.tif": labels, "a/y.tif": labels})
    growth.write(out, NamePattern())
    assert capsys.readouterr().err == ""
    assert not any((tmp_path / name).exists() for name in growth.FILES)


def write_frames(folder: Path, hours: range) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for hour in hours:
        image = np.random.default_rng(hour).normal(128, 12, (40, 56)).clip(0, 255).astype(np.uint8)
        cv2.imwrite(str(folder / f"A1_{hour}.png"), image)


def test_predict_keeps_the_growth_files_up_to_date(one_process: None, random_checkpoint: str, tmp_path: Path) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    options: dict[str, Any] = {"write": ("cells",), "name_pattern": r"(?P<well>[A-H]\d+)_(?P<hours>\d+)$"}
    write_frames(images, range(3))
    for wrong, message in (
        ({"name_pattern": r"(?P<well>A\d)_"}, "lacks time"),
        ({"name_pattern": "("}, "not a regular expression"),
        ({"name_pattern": r"(?P<well>Z\d)_(?P<hours>\d+)"}, r"match none of the 3 images, such as A1_0\.png"),
        ({"name_pattern": None, "frame_hours": 1.0}, "match none of the 3 images"),
        ({"name_pattern": None, "frame_hours": -1.0}, "--frame-hours -1"),
    ):
        with pytest.raises(UserError, match=message):
            predict.predict(random_checkpoint, str(images), str(out), **(options | wrong))
        assert not out.exists()  # before anything is segmented
    predict.predict(random_checkpoint, str(images), str(out), **options)
    assert [row["hours"] for row in read(out / "growth.csv")] == ["0", "1", "2"]
    segmented = (out / "images.csv").stat().st_mtime_ns
    slower = r"(?P<well>A\d)_(?P<frame>\d+)"
    predict.predict(
        random_checkpoint, str(images), str(out), **(options | {"name_pattern": slower, "frame_hours": 2.5})
    )
    assert [row["hours"] for row in read(out / "growth.csv")] == ["0", "2.5", "5"]
    assert (out / "images.csv").stat().st_mtime_ns == segmented  # another pattern does not segment again
    write_frames(images, range(3, 5))
    predict.predict(random_checkpoint, str(images), str(out), **options)
    assert [row["hours"] for row in read(out / "growth.csv")] == ["0", "1", "2", "3", "4"]
    fresh = tmp_path / "fresh"
    predict.predict(random_checkpoint, str(images), str(fresh), **options)
    assert all((out / name).read_bytes() == (fresh / name).read_bytes() for name in growth.FILES)
    predict.predict(
        random_checkpoint, str(images), str(out), write=("cells",)
    )  # the default pattern does not match these names
    assert not {*growth.FILES} & {*os.listdir(out)}
    predict.predict(random_checkpoint, str(images), str(fresh), write=("labels",), overwrite=True)
    assert not {*growth.FILES} & {*os.listdir(fresh)}


def test_frames_of_a_file_without_a_channel_are_unknown(random_checkpoint: str, tmp_path: Path) -> None:
    """The reason is the channel, not the pattern; nothing is written."""
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    stack = np.zeros((3, 2, 40, 56), np.uint8)
    tifffile.imwrite(images / "A172_B7_1.tif", stack, imagej=True, metadata={"axes": "TCYX"})
    with pytest.raises(
        UserError, match=r"^none of the 1 images can be read: A172_B7_1\.tif.*choose one with --channel"
    ):
        predict.predict(random_checkpoint, str(images), str(out), frame_hours=2.0)
    write_frames(images, range(1))
    with pytest.raises(UserError, match=r"none of the 1 images, such as A1_0\.png; .*; 1 file cannot be .*--channel"):
        predict.predict(random_checkpoint, str(images), str(out), frame_hours=2.0)
    assert not out.exists()


def test_a_killed_run_leaves_no_curves_of_the_run_before(
    one_process: None, random_checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    options: dict[str, Any] = {"write": ("cells",), "name_pattern": r"(?P<well>[A-H]\d+)_(?P<hours>\d+)$"}
    write_frames(images, range(3))
    predict.predict(random_checkpoint, str(images), str(out), **options)
    write_frames(images, range(3, 5))
    with monkeypatch.context() as patch:
        patch.setattr(results, "merge", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            predict.predict(random_checkpoint, str(images), str(out), **options)
    assert not {*growth.FILES} & {*os.listdir(out)}
    predict.predict(random_checkpoint, str(images), str(out), **options)
    assert len(read(out / "growth.csv")) == 5
