"""`--pixel-scale`, `--diameter-from` and `--diameter`: from the image file to results in its pixels."""

import csv
import io
import json
import math
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
import torch
from prepare_source import rows_of

from raylivecell.cli import main
from raylivecell.core.errors import UserError
from raylivecell.data import shards
from raylivecell.data.config import PrepareConfig
from raylivecell.data.prepare import prepare
from raylivecell.images import scale as image_scale
from raylivecell.images.scale import Scale
from raylivecell.inference import evaluate, export, graph_files, image_file, segmenter
from raylivecell.network.unet import UNet, build_model
from raylivecell.recipe import ModelConfig, Recipe
from raylivecell.runs import checkpoint
from raylivecell.runs.progress import Progress

pytest_plugins = ["prepare_fixtures"]
SHAPE, DIAMETER = (150, 190), 28.0


def write_source(folder: Path, factor: float = 1.0) -> str:
    """Write a COCO source of discs, with a diameter of `DIAMETER * factor` pixels; width and height likewise."""
    height, width = (round(side * factor) for side in SHAPE)
    rows, columns = np.mgrid[:height, :width]
    for split in shards.SPLITS:
        annotations, images = [], []
        for number in range(2):
            rng, name = np.random.default_rng([number, *split.encode()]), f"{split}_{number}.png"
            truth = np.zeros((height, width))
            for cell in range(12):
                x, y = (25 + 45 * (cell % 4), 25 + 45 * (cell // 4))
                angle = np.linspace(0, 2 * np.pi, 60, endpoint=False)
                ring = factor * (DIAMETER / 2 * np.stack([np.cos(angle), np.sin(angle)], 1) + (x, y))
                distance = np.hypot(rows + 0.5 - factor * y, columns + 0.5 - factor * x)
                truth = np.maximum(truth, np.clip(factor * DIAMETER / 2 - distance + 0.5, 0, 1))
                annotation = {"id": 100 * number + cell, "image_id": number, "category_id": 1}
                annotations.append(annotation | {"segmentation": [ring.ravel().tolist()]})
            image = np.clip(128 + 70 * truth + rng.normal(0, 2, truth.shape), 1, 254).round().astype(np.uint8)
            path = folder / "images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            assert cv2.imwrite(str(path), image)
            images.append({"id": number, "file_name": name, "width": width, "height": height})
        content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cell"}]}
        (folder / f"{split}.json").write_text(json.dumps(content))
    return str(folder)


@pytest.fixture
def source(tmp_path: Path) -> str:
    return write_source(tmp_path / "source")


def save(folder: Path, scale: Scale) -> str:
    """A checkpoint whose foreground is every pixel brighter than 163."""
    recipe = Recipe(model=ModelConfig(features=(1,)), targets="foreground")
    model = build_model(recipe.model, recipe.outputs)
    assert isinstance(model, UNet)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
                module.weight.zero_()
        for block in (model.contracting[0], model.expanding[0]):
            for layer in (0, 3):
                block[layer].weight[0, 0, 1, 1] = 1
        model.head.weight.fill_(4)
        model.head.bias.fill_(-4 * math.asinh((163 - 128) / 5))
    checkpoint.save(str(folder), model, {}, Progress(), recipe, scale=scale)
    return str(folder)


def test_prepared_images_are_scaled_with_their_outlines(no_ray: None, source: str, tmp_path: Path) -> None:
    original = prepare(source, str(tmp_path / "original"))
    assert original["scale"]["pixel_scale"] == 1
    assert original["scale"]["diameter"] == pytest.approx(DIAMETER, rel=0.02)
    half = prepare(source, str(tmp_path / "half"), PrepareConfig(pixel_scale=0.5))
    assert half["scale"]["diameter"] == pytest.approx(DIAMETER / 2, rel=0.03)
    assert half["splits"]["train"]["sizes"] == [[75, 95]]
    assert half["splits"]["train"]["cells"] == original["splits"]["train"]["cells"] == 24
    for name, row in rows_of(tmp_path / "half", "train").items():
        stored = rows_of(tmp_path / "original", "train")[name]
        np.testing.assert_array_equal(row["image"], cv2.resize(stored["image"], (95, 75), interpolation=cv2.INTER_AREA))
        assert ((row["image"] > 163) != (row["labels"] > 0)).mean() < 0.03
    (first, *_) = shards.list_rows(str(tmp_path / "half"), "train")
    sizes = shards.read_row(first, ["original_height", "original_width"])
    assert (sizes["original_height"], sizes["original_width"]) == SHAPE
    assert prepare(source, str(tmp_path / "half"), PrepareConfig(pixel_scale=0.5)) == half, "nothing to do"
    with pytest.raises(UserError, match="with other settings"):
        prepare(source, str(tmp_path / "half"))


def test_the_cell_size_of_another_dataset_selects_the_factor(no_ray: None, source: str, tmp_path: Path) -> None:
    prepare(source, str(tmp_path / "original"))
    larger = write_source(tmp_path / "larger", 2.3)
    config = PrepareConfig(diameter_from=str(tmp_path / "original"))
    matched = prepare(larger, str(tmp_path / "matched"), config)
    assert matched["scale"]["pixel_scale"] == pytest.approx(1 / 2.3, rel=0.02)
    assert matched["scale"]["diameter"] == pytest.approx(DIAMETER, rel=0.03)
    trained = save(tmp_path / "checkpoint", shards.scale(str(tmp_path / "original")))
    prepare(larger, str(tmp_path / "as_stored"))
    prepare(source, str(tmp_path / "small"), PrepareConfig(pixel_scale=0.4))
    evaluate._check_scale(str(tmp_path / "original"), trained)
    evaluate._check_scale(str(tmp_path / "matched"), trained)
    evaluate._check_scale(str(tmp_path / "as_stored"), trained)  # unscaled, as `predict` would use it
    with pytest.raises(UserError, match=r"has pixel scale 0.4, .* prepare --diameter-from"):
        evaluate.evaluate(trained, str(tmp_path / "small"), "test", str(tmp_path / "scores"))
    (tmp_path / "cells.json").write_text("[]")
    with pytest.raises(UserError, match="results have the pixels of the original images"):
        evaluate.compare(str(tmp_path / "cells.json"), str(tmp_path / "small"), "test", str(tmp_path / "scores"))
    older = json.loads((tmp_path / "original/dataset.json").read_text())
    del older["scale"]
    (tmp_path / "original/dataset.json").write_text(json.dumps(older))
    assert shards.scale(str(tmp_path / "original")) == Scale()
    with pytest.raises(UserError, match="no cell size there"):
        prepare(larger, str(tmp_path / "again"), config)
    with pytest.raises(ValueError, match="leave out --pixel-scale"):
        PrepareConfig(pixel_scale=2, diameter_from="x")


def test_cells_that_vanish_are_reported(no_ray: None, source: str, tmp_path: Path) -> None:
    """A polygon and a mask."""
    path = Path(source) / "train.json"
    content = json.loads(path.read_text())
    content["annotations"].append(
        {"id": 999, "image_id": 0, "category_id": 1, "segmentation": [[47.1, 47.1, 47.6, 47.1, 47.6, 47.6]]}
    )
    pixels = SHAPE[0] * SHAPE[1]
    runs = {"size": SHAPE, "counts": [47 * SHAPE[0] + 47, 2, pixels - 47 * SHAPE[0] - 49]}
    content["annotations"].append({"id": 998, "image_id": 0, "category_id": 1, "segmentation": runs})
    path.write_text(json.dumps(content))
    dataset = prepare(source, str(tmp_path / "out"), PrepareConfig(pixel_scale=0.1))
    (defect,) = [defect for defect in dataset["defects"]["found"] if defect["defect"] == "hidden_cell"]
    assert (defect["ids"], defect["detail"]) == ([999, 998], "smaller than a pixel at a pixel scale of 0.1")


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text())))


@pytest.mark.parametrize("stored", [1.0, 2.2, 0.7])
def test_predict_returns_the_pixels_of_the_images(
    one_process: None, tmp_path: Path, stored: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images of another microscope: with their typical diameter, all cells are found at their size and place."""
    images = Path(write_source(tmp_path / "source", stored)) / "images"
    folder = save(tmp_path / "checkpoint", Scale(pixel_scale=0.5, diameter=DIAMETER / 2, diameters=(13, 15)))
    out = tmp_path / "out"
    arguments = ["predict", "--checkpoint", folder, "--images", str(images), "--out", str(out)]
    assert main.main([*arguments, "--diameter", str(DIAMETER * stored)]) == 0
    assert json.loads((out / "predict.json").read_text())["pixel_scale"] == pytest.approx(0.5 / stored)
    size = tuple(round(side * stored) for side in SHAPE)
    rows = table(out / "images.csv")
    assert len(rows) == 6
    for row in rows:
        assert (int(row["height"]), int(row["width"]), row["cells"], row["warning"]) == (*size, "12", "")
        assert tifffile.imread(out / row["labels"]).shape == size
        assert cv2.imread(str(out / row["masks"]), cv2.IMREAD_UNCHANGED).shape == size
        assert cv2.imread(str(out / row["overlays"])).shape == (*size, 3)
    for cell in table(out / "cells.csv"):
        assert float(cell["area_px"]) == pytest.approx(math.pi / 4 * (DIAMETER * stored) ** 2, rel=0.08)
        column, line = ((float(cell[name]) + 0.5) / stored - 25 for name in ("centroid_x", "centroid_y"))
        assert abs((column + 20) % 45 - 20) < 0.6, "on the grid of 45 pixels"
        assert abs((line + 20) % 45 - 20) < 0.6
    (first, *_) = json.loads((out / "coco.json").read_text())
    assert tuple(first["segmentation"]["size"]) == size
    assert main.main([*arguments, "--diameter", "33"]) == 2
    assert "results of other settings (pixel_scale)" in capsys.readouterr().err
    assert main.main([*arguments, "--diameter", "-3", "--overwrite"]) == 2
    assert "diameter -3.0: give the diameter of the cells in pixels" in capsys.readouterr().err


def test_predict_warns_about_cells_of_another_size(
    one_process: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = Path(write_source(tmp_path / "source", 2.2)) / "images"
    folder = save(tmp_path / "checkpoint", Scale(pixel_scale=0.5, diameter=DIAMETER / 2))
    out = tmp_path / "out"
    assert main.main(["predict", "--checkpoint", folder, "--images", str(images), "--out", str(out)]) == 0
    for row in table(out / "images.csv"):
        text = r"cell size far from the training images': median diameter 6[12]\.\d px, theirs 28\.0"
        assert re.fullmatch(text, row["warning"])
    text = " ".join(capsys.readouterr().err.split())
    assert "cells of another size than the training cells: 6 of 6 images" in text
    assert "--diameter PX" in text


def test_all_interfaces_scale_alike(no_ray: None, source: str, tmp_path: Path) -> None:
    """Evaluate on a scaled dataset, the Python API, `predict` and ONNX; older files have no scale."""
    dataset = prepare(source, str(tmp_path / "data"), PrepareConfig(pixel_scale=0.6))
    rule = shards.scale(str(tmp_path / "data"))
    assert rule == Scale.model_validate(dataset["scale"])
    folder = save(tmp_path / "checkpoint", rule)
    for suffix in (".onnx", ".pt2"):
        export.export(folder, str(tmp_path / f"model{suffix}"))
    model, onnx = segmenter.load(folder, device="cpu"), segmenter.load(str(tmp_path / "model.onnx"))
    assert model.scale == onnx.scale == rule == segmenter.scale_of(folder) == segmenter.scale_of(str(tmp_path / "data"))
    assert segmenter.scale_of(str(tmp_path / "model.onnx")) == rule
    about: dict[str, str] = {graph_files.FILE: ""}
    torch.export.load(str(tmp_path / "model.pt2"), extra_files=about)
    assert Scale.model_validate_json(json.loads(about[graph_files.FILE])["scale"]) == rule
    job = image_file.PredictJob(folder, f"{source}/images", str(tmp_path / "out"), ("labels",), False, None)
    for row in shards.list_rows(str(tmp_path / "data"), "test"):
        sample = shards.read_row(row, evaluate.SAMPLE)
        path = f"{source}/images/{sample['file_name']}"
        scored, _ = evaluate._predict(model, evaluate._frame(sample, None))
        assert scored.labels.shape == sample["labels"].shape == (90, 114)
        frame = model.frame(path)
        np.testing.assert_array_equal(image_scale.resize_frame(frame, 0.6).levels, sample["image"])
        labels = model.segment(path).labels
        assert labels.shape == SHAPE
        np.testing.assert_array_equal(labels, image_scale.labels_back(scored.labels, SHAPE))
        np.testing.assert_array_equal(onnx.segment(path).labels, labels)
        image_file.segment_file(job, model, sample["file_name"], sample["file_name"], "1")
        written = tifffile.imread(tmp_path / "out/labels" / f"{sample['file_name']}.tif")
        np.testing.assert_array_equal(written, labels)
        own = model.segment(path, diameter=DIAMETER).labels
        assert own.max() == 12
        assert (own != labels).mean() < 0.03, "the factor of the diameter is about that of the dataset"
    (Path(folder) / checkpoint.SCALE).unlink()
    older = segmenter.load(folder, device="cpu")
    assert older.scale == Scale()
    assert older.segment(path).labels.max() == 12
    with pytest.raises(UserError, match="by an older version"):
        older.segment(path, diameter=20)
