"""`predict`: no image lost, duplicated or segmented again, and no output overwritten."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from conftest import job_env, run_python
from hosts import wait_until
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import fs as pafs
from pycocotools import mask as coco_mask

from raylivecell.annotations import geojson, imagej_rois, rle
from raylivecell.cli import main
from raylivecell.core.errors import UserError
from raylivecell.images.planes import Choice
from raylivecell.inference import image_file, predict, segmenter, stacks

TABLES = {"images.csv", "cells.csv", "coco.json", "predict.json", "recipe.yaml"}


def disks(shape: tuple[int, int], seed: int) -> np.ndarray:
    """An image of bright disks on a background of 128."""
    rng = np.random.default_rng(seed)
    truth = np.zeros(shape, np.uint8)
    for _ in range(3):
        centre = (int(rng.integers(shape[1])), int(rng.integers(shape[0])))
        cv2.circle(truth, centre, int(rng.integers(4, 10)), 1, -1)
    return np.clip(128 + 50 * truth + rng.normal(0, 8, shape), 0, 255).astype(np.uint8)


@given(st.lists(st.text("abAB./", min_size=1, max_size=6), max_size=8, unique=True))
def test_no_two_images_share_an_output_name(stems: list[str]) -> None:
    files = sorted({s.strip("/.") + suffix for s in stems if s.strip("/.") for suffix in (".tif", ".png")})
    names = predict.output_names(files)
    assert len({name.lower() for name in names}) == len({file.lower() for file in files})
    assert len(set(names)) == len(files)
    assert [name.rpartition("/")[0] for name in names] == [file.rpartition("/")[0] for file in files]


def test_output_names_keep_suffixes_only_if_ambiguous() -> None:
    assert predict.output_names(["a.tif", "x/a.tif"]) == ["a", "x/a"]
    assert predict.output_names(["a.tif", "a.png", "b.tif"]) == ["a.tif", "a.png", "b.tif"]
    assert predict.output_names(["a.tif", "A.tif"]) == ["a.tif", "A.tif"]
    assert predict.output_names(["a.png", "a.tif/x/b.png"]) == ["a.png", "a.tif/x/b.png"]
    assert predict.output_names(["\u00fc.tif", "u\u0308.png"]) == ["\u00fc.tif", "u\u0308.png"]


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (3, 4), (2, 90)])
@pytest.mark.parametrize("highest", [0, 7, 65_535, 65_536])
def test_label_tiffs_contain_every_cell_number(shape: tuple[int, int], highest: int) -> None:
    labels = np.arange(np.prod(shape), dtype=np.int32).reshape(shape) % (highest + 1)
    labels[-1, -1] = highest
    data = image_file.label_tiff(labels)
    assert data == image_file.label_tiff(labels)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        (page,) = file.pages
        assert (page.shape, page.photometric.name, page.samplesperpixel) == (shape, "MINISBLACK", 1)
        assert page.compression == tifffile.COMPRESSION.ADOBE_DEFLATE
        assert (page.dtype, file.is_imagej) == ((np.uint16, True) if highest < 65_536 else (np.uint32, False))
        np.testing.assert_array_equal(page.asarray(), labels)


def test_user_errors_are_reported_before_anything_is_written(random_checkpoint: str, tmp_path: Path) -> None:
    out, images = str(tmp_path / "out"), str(tmp_path / "images")
    write_frames(tmp_path / "images", range(1))
    with pytest.raises(UserError, match="no images at"):
        predict.predict(random_checkpoint, random_checkpoint, out)
    with pytest.raises(UserError, match="no folder at"):
        predict.predict(random_checkpoint, str(tmp_path / "nowhere"), out)
    with pytest.raises(UserError, match="no checkpoint"):
        predict.predict(images, images, out)
    for threshold in (0, 1, 50):
        with pytest.raises(UserError, match="--threshold"):
            predict.predict(random_checkpoint, images, out, threshold=threshold)
    with pytest.raises(UserError, match="is the folder of the images"):
        predict.predict(random_checkpoint, images, images)
    assert not Path(out).exists()
    (tmp_path / "out" / "labels").mkdir(parents=True)
    for overwrite in (False, True):
        with pytest.raises(UserError, match="contains labels but no `predict` predict"):
            predict.predict(random_checkpoint, images, out, overwrite=overwrite)
    assert [path.name for path in Path(out).rglob("*")] == ["labels"]


def test_the_command_needs_a_checkpoint(
    random_checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main.main(["predict", "--images", random_checkpoint, "--out", str(tmp_path)])
    assert end.value.code == 2
    assert "--checkpoint" in capsys.readouterr().err


def write_images(folder: Path) -> dict[str, np.ndarray]:
    """Write images of every format; return their 8-bit pixels by relative path."""
    (folder / "deep" / "er").mkdir(parents=True)
    gray = {name: disks((48, 64), i) for i, name in enumerate("abcd")}
    tifffile.imwrite(folder / "a.tif", gray["a"])
    cv2.imwrite(str(folder / "a.png"), gray["b"])
    tifffile.imwrite(folder / "deep" / "a.tiff", gray["c"].astype(np.uint16) * 257)
    cv2.imwrite(str(folder / "deep" / "er" / "colour.PNG"), np.dstack([gray["d"]] * 3))
    cv2.imwrite(str(folder / "dot.png"), np.array([[200]], np.uint8))
    large = disks((1500, 1450), 9)
    cv2.imwrite(str(folder / "large.png"), large)
    (folder / "cut.tif").write_bytes((folder / "a.tif").read_bytes()[:300])
    frames = [disks((20, 30), 5), disks((20, 30), 6)]
    tifffile.imwrite(folder / "stack.tif", np.stack(frames), imagej=True, metadata={"axes": "TYX"})
    channels = np.stack(frames).astype(np.float32) / 300
    tifffile.imwrite(folder / "two channels.tif", channels, imagej=True, metadata={"axes": "CYX"})
    (folder / "notes.txt").write_text("no image")
    (folder / "._a.tif").write_bytes(b"macOS")
    files = [
        "a.tif",
        "a.png",
        "deep/a.tiff",
        "deep/er/colour.PNG",
        "dot.png",
        "large.png",
        "stack.tif#t0",
        "stack.tif#t1",
    ]
    return dict(zip(files, [*gray.values(), np.array([[200]], np.uint8), large, *frames]))


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


def files_in(out: Path) -> dict[str, tuple[bytes, int]]:
    """Content and modification time of every file, by relative path."""
    paths = [path for path in out.rglob("*") if path.is_file()]
    return {path.relative_to(out).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def contents(out: Path) -> dict[str, bytes]:
    return {name: data for name, (data, _) in files_in(out).items()}


def check_image(
    out: Path, row: dict[str, str], cells: list[dict[str, str]], records: list[dict], expected: Any
) -> None:
    """Compare the outputs for an image with the network's cells."""
    shape = (int(row["height"]), int(row["width"]))
    labels = tifffile.imread(out / row["labels"])
    mask = cv2.imread(str(out / row["masks"]), cv2.IMREAD_UNCHANGED)
    assert labels.shape == mask.shape == shape == expected.labels.shape
    # A pixel exactly on the threshold may change class with another number of threads.
    assert ((labels != 0) != (expected.labels != 0)).mean() < 1e-3
    assert ((mask == 255) != expected.foreground).mean() < 1e-3
    assert set(np.unique(mask)) <= {0, 255}
    assert int(row["foreground_pixels"]) == (mask == 255).sum()
    assert float(row["confluence"]) == pytest.approx((labels != 0).mean(), abs=1e-6)
    assert cv2.imread(str(out / row["overlays"])).shape == (*shape, 3)
    assert int(row["cells"]) == labels.max() == len(cells) == len(records)
    assert [int(cell["label"]) for cell in cells] == list(range(1, len(cells) + 1))
    assert [int(cell["area_px"]) for cell in cells] == np.bincount(labels.ravel())[1:].tolist()
    for cell, record in list(zip(cells, records))[:20]:
        assert record["score"] == pytest.approx(float(cell["score"]), abs=1e-4)
        inside = coco_mask.decode({"size": list(shape), "counts": record["segmentation"]["counts"]})
        np.testing.assert_array_equal(inside != 0, labels == int(cell["label"]))


@pytest.mark.ray
def test_predict_segments_a_folder_of_mixed_files(ray_cluster: None, random_checkpoint: str, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    expected = write_images(folder)
    out = folder / "result"  # inside the folder of the images: outputs must not become inputs
    summary = predict.predict(random_checkpoint, str(folder), str(out))
    rows = {row["file"]: row for row in read_csv(out / "images.csv")}
    assert list(rows) == sorted(rows) == sorted(expected.keys() | {"cut.tif", "two channels.tif"})
    assert [int(row["image_id"]) for row in rows.values()] == list(range(1, 11))
    assert {file for file, row in rows.items() if row["error"]} == {"cut.tif", "two channels.tif"}
    assert "choose one with --channel 0 to 1" in rows["two channels.tif"]["error"]
    assert rows["stack.tif#t1"]["labels"] == "labels/stack.tif_t1.tif"
    assert rows["cut.tif"]["confluence"] == rows["cut.tif"]["masks"] == ""
    cells, records = read_csv(out / "cells.csv"), json.loads((out / "coco.json").read_text())
    network = segmenter.load(random_checkpoint)
    for file, image in expected.items():
        row = rows[file]
        image_cells = [cell for cell in cells if cell["file"] == file]
        image_records = [record for record in records if record["image_id"] == int(row["image_id"])]
        check_image(out, row, image_cells, image_records, network.segment(image))
    assert len(cells) == len(records) == summary["cells"] > 50
    image_outputs = {row[kind] for row in rows.values() for kind in ("labels", "masks", "overlays")} - {""}
    assert contents(out).keys() == image_outputs | TABLES
    assert len(image_outputs) == 24
    assert (summary["images"], summary["segmented"]) == (10, 8)
    assert summary["confluence"] == pytest.approx(np.mean([float(rows[file]["confluence"]) for file in expected]))
    assert [failure["file"] for failure in summary["failed"]] == ["cut.tif", "two channels.tif"]
    before = files_in(out)
    again = predict.predict(random_checkpoint, str(folder), str(out))
    assert again | {"seconds": 0} == summary | {"seconds": 0}
    assert files_in(out) == before
    with pytest.raises(UserError, match=r"results of other settings \(plane\)"):
        predict.predict(random_checkpoint, str(folder), str(out), choice=Choice("t1"))


def test_planes_and_channels_are_chosen_and_read_like_separate_files(random_checkpoint: str, tmp_path: Path) -> None:
    """In one process: the addresses from the driver, the pixels in an actor and in the Python API."""
    array = np.stack([[disks((20, 30), 2 * t + c) for c in range(2)] for t in range(3)])
    tifffile.imwrite(tmp_path / "a.tif", array, imagej=True, truncate=True, metadata={"axes": "TCYX"})
    tifffile.imwrite(tmp_path / "b.tif", array[0, 0])
    files = {name: pafs.FileInfo(name, size=1, mtime_ns=1) for name in ("a.tif", "b.tif")}
    chosen = stacks.expand(str(tmp_path), files, Choice(channel=1))
    assert list(chosen) == ["a.tif#t0_c1", "a.tif#t1_c1", "a.tif#t2_c1", "b.tif"]
    assert predict.output_names(list(chosen)) == ["a_t0_c1", "a_t1_c1", "a_t2_c1", "b"]
    assert predict.output_names(["a.tif#t0", "a_t0.png"]) == ["a.tif_t0", "a_t0.png"]
    for t in range(3):
        address = f"a.tif#t{t}_c1"
        pixels = stacks.read(str(tmp_path), address, Choice(channel=1), image_file.MAX_PIXELS).pixels
        np.testing.assert_array_equal(pixels, array[t, 1])
    network = segmenter.load(random_checkpoint)
    from_file = network.segment(tmp_path / "a.tif", plane=2, channel=1)
    np.testing.assert_array_equal(from_file.labels, network.segment(array[2, 1]).labels)
    assert list(stacks.expand(str(tmp_path), files, Choice("t1_c0"))) == ["a.tif#t1_c0", "b.tif"]
    job = image_file.PredictJob(
        random_checkpoint, str(tmp_path), str(tmp_path / "out"), (), False, None, Choice(channel=1)
    )
    for file, reason in (("b.tif", "no channel 1: the file has 1 channel"), ("a.tif", "choose one with --plane")):
        row = image_file.segment_file(job, network, file, "x", "v").row
        assert row.version == "v"
        assert reason in (row.error or "")
    row = image_file.segment_file(job, network, "gone.tif#t0", "x", "v").row
    assert row.error is not None
    assert row.version is None


def write_frames(folder: Path, numbers: range) -> None:
    folder.mkdir(exist_ok=True)
    for i in numbers:
        cv2.imwrite(str(folder / f"frame-{i:02d}.png"), disks((48, 64), i))


def test_other_settings_are_rejected_and_new_images_are_added(
    one_process: None, random_checkpoint: str, tmp_path: Path
) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    write_frames(images, range(3, 5))
    options: dict[str, Any] = {"write": ("cells", "labels"), "threshold": 0.4}
    predict.predict(random_checkpoint, str(images), str(out), **options)
    first = files_in(out)
    settings = json.loads((out / "predict.json").read_text())
    assert settings["thresholds"]["threshold"] == 0.4
    assert settings["write"] == ["labels", "cells"]
    assert len(settings["model"]["sha256"]) == 64
    assert {name.split("/")[0] for name in first} == {"labels", *TABLES} - {"coco.json"}
    for other in ({"threshold": 0.5}, {"tta": True}, {"write": ("cells",)}):
        with pytest.raises(UserError, match=r"other settings \(\w+\).*--overwrite"):
            predict.predict(random_checkpoint, str(images), str(out), **(options | other))
    assert files_in(out) == first
    write_frames(images, range(3))
    stamp = (images / "frame-03.png").stat()
    os.utime(images / "frame-03.png", ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 10**9))  # counts as changed
    assert predict.predict(random_checkpoint, str(images), str(out), **options)["images"] == 5
    now, name = files_in(out), "labels/frame-0{}.tif"
    assert now[name.format(4)] == first[name.format(4)]
    assert now[name.format(3)][1] > first[name.format(3)][1]
    assert now["cells.csv"][0].endswith(first["cells.csv"][0].partition(b"\n")[2])
    predict.predict(random_checkpoint, str(images), str(out), write=("masks",), overwrite=True)
    assert {name.split("/")[0] for name in contents(out)} == {"masks", *TABLES} - {"coco.json", "cells.csv"}


def test_outlines_for_imagej_and_qupath_are_exactly_the_cells(
    one_process: None, random_checkpoint: str, tmp_path: Path
) -> None:
    write_frames(tmp_path / "images", range(2))
    cv2.imwrite(str(tmp_path / "images" / "black.png"), np.zeros((40, 50), np.uint8))
    out = tmp_path / "out"
    predict.predict(random_checkpoint, str(tmp_path / "images"), str(out), write=("labels", "cells", "rois", "geojson"))
    rows, cells = read_csv(out / "images.csv"), read_csv(out / "cells.csv")
    assert {row["rois"] for row in rows} == {f"rois/{name}.zip" for name in ("black", "frame-00", "frame-01")}
    for row in rows:
        labels = tifffile.imread(out / row["labels"])
        image_cells = [cell for cell in cells if cell["file"] == row["file"]]
        for reader, kind in ((imagej_rois, "rois"), (geojson, "geojson")):
            again = np.zeros_like(labels)
            for record in reader.read((out / row[kind]).read_bytes(), labels.shape):
                again[rle.mask_of_runs(*record.runs[0])] = int(record.id)
            np.testing.assert_array_equal(again, labels)
        features = json.loads((out / row["geojson"]).read_text())["features"]
        measured = [feature["properties"]["measurements"] for feature in features]
        assert [str(values["Area px^2"]) for values in measured] == [cell["area_px"] for cell in image_cells]
        assert [values["Score"] for values in measured] == [float(cell["score"]) for cell in image_cells]
    assert len(cells) > 5
    before = contents(out)
    options: dict[str, Any] = {"write": ("labels", "cells", "rois", "geojson"), "overwrite": True}
    predict.predict(random_checkpoint, str(tmp_path / "images"), str(out), **options)
    assert contents(out) == before


COMMAND = "import sys; from raylivecell.cli import main as cli; sys.exit(cli.main(sys.argv[1:]))"


@pytest.mark.slow
@pytest.mark.ray
def test_a_killed_predict_resumes(ray_cluster: None, random_checkpoint: str, tmp_path: Path) -> None:
    images, out, fresh = tmp_path / "images", tmp_path / "out", tmp_path / "fresh"
    write_frames(images, range(80))  # more images than an actor receives before its driver is killed
    arguments = ["predict", "--checkpoint", random_checkpoint, "--images", str(images), "--out", str(out)]
    process = subprocess.Popen([sys.executable, "-c", COMMAND, *arguments], env=os.environ | job_env())
    wait_until(
        "a result", lambda: process.poll() is not None or bool(list((out / ".parts").glob("*.json"))), pause=0.01
    )
    assert process.poll() is None
    process.kill()
    process.wait()
    rows = [json.loads(path.read_bytes())[0] for path in (out / ".parts").glob("*.json")]
    done = {name: stamp for name, stamp in files_in(out).items() if name in {row["labels"] for row in rows}}
    assert 0 < len(done) == len(rows) < 80
    assert predict.predict(random_checkpoint, str(images), str(out))["segmented"] == 80
    assert done.items() <= files_in(out).items()  # untouched
    predict.predict(random_checkpoint, str(images), str(fresh))
    assert contents(out) == contents(fresh)


def test_a_single_file_and_a_folder_without_a_readable_image(
    one_process: None, random_checkpoint: str, tmp_path: Path
) -> None:
    cv2.imwrite(str(tmp_path / "one.png"), disks((40, 40), 0))
    summary = predict.predict(
        random_checkpoint, str(tmp_path / "one.png"), str(tmp_path / "out"), tta=True, threshold=0.3
    )
    assert summary["images"] == summary["segmented"] == 1
    assert (tmp_path / "out" / "masks" / "one.png").is_file()
    (tmp_path / "bad.png").write_bytes(b"no")
    for _ in range(2):
        with pytest.raises(UserError, match="none of the 1 images"):
            predict.predict(random_checkpoint, str(tmp_path / "bad.png"), str(tmp_path / "out2"))
    assert "bad.png" in (tmp_path / "out2" / "images.csv").read_text()


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
import cv2, numpy as np
from raylivecell.inference import predict
from raylivecell.inference import image_file
from raylivecell.cells.watershed import InstanceConfig
from raylivecell.inference.segmenter import Segmenter
out = sys.argv[1]
network = Segmenter(lambda image: image[None] / np.float32(255), "foreground", InstanceConfig(), "")
cv2.imwrite(out + "/a.png", np.add.outer(np.arange(30), np.full(40, 200)).astype(np.uint8))
job = image_file.PredictJob(out + "/m.onnx", out, out, image_file.OUTPUTS, False, None)
assert not job.with_torch
result = image_file.segment_file(job, network, "a.png", "a", "1")
assert result.row.cells == len(result.records) == 1, result
"""


def test_predicting_with_an_onnx_model_needs_no_torch(tmp_path: Path) -> None:
    process = run_python(WITHOUT_TORCH, str(tmp_path))
    assert process.returncode == 0, process.stderr
