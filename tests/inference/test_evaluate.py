"""`evaluate`: every image is scored once; a network and a COCO file of its cells have equal scores."""

import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
import torch
from pycocotools import mask as coco_mask

from raylivecell.annotations import rle
from raylivecell.cells.watershed import InstanceConfig
from raylivecell.cli import commands
from raylivecell.core import storage
from raylivecell.core.errors import UserError
from raylivecell.data import shards
from raylivecell.images import intensity
from raylivecell.images.scale import Scale
from raylivecell.inference import evaluate, segmenter
from raylivecell.network.unet import build_model
from raylivecell.recipe import ModelConfig, Recipe
from raylivecell.runs import checkpoint
from raylivecell.runs.progress import Progress
from raylivecell.scoring import average_precision, label_rules, pixel_scores, scores

SIZES = [(48, 64), (48, 64), (33, 57), (64, 48)]
SPLITS = {"test": 10, "val": 3}


def sample(index: int) -> dict[str, Any]:
    """A dataset row: an image of bright disks, some of which overlap."""
    shape, rng = SIZES[index % len(SIZES)], np.random.default_rng(index)
    labels, outlines = np.zeros(shape, np.uint16), []
    for label in range(1, 7):
        cell = np.zeros(shape, np.uint8)
        centre = (int(rng.integers(4, shape[1] - 4)), int(rng.integers(4, shape[0] - 4)))
        cv2.circle(cell, centre, int(rng.integers(4, 8)), 1, -1)
        labels[cell > 0] = label
        outlines.append(coco_mask.encode(np.asfortranarray(cell))["counts"])
    visible = np.unique(labels[labels > 0])  # some cells are hidden by later ones
    outlines = [outlines[label - 1] for label in visible]
    labels = np.searchsorted(visible, labels).astype(np.uint16) + (labels > 0)
    image = np.clip(128 + 50 * (labels > 0) + rng.normal(0, 8, shape), 0, 255).astype(np.uint8)
    kind = ["A172", "BV2"][index % 2]
    about = {"file_name": f"{kind}_{index}.tif", "cell_type": kind, "source": "s", "sha256": "0"}
    pixels = {"image": image, "labels": labels.astype(np.uint16), "foreground": labels > 0, "border": image * 0}
    counts = {"height": shape[0], "width": shape[1], "cells": len(outlines)}
    return {**pixels, **about, **counts, "outlines": outlines, "annotation": f"test.json#{1000 + index}"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("data"))
    splits: dict[str, Any] = {"train": {"images": 0, "sizes": [], "shards": []}}
    for split, count in SPLITS.items():
        file = f"{split}/part-0.parquet"
        shards.write_shard(f"{folder}/{file}", [sample(i) for i in range(count)])
        splits[split] = {"images": count, "sizes": SIZES, "shards": [{"file": file, "rows": count}]}
    about = {"format_version": shards.FORMAT_VERSION, "name": "disks", "licence": "none"}
    about["intensity"] = intensity.LIVECELL.model_dump()
    storage.write_json(f"{folder}/dataset.json", {**about, "splits": splits})
    return folder


@pytest.fixture
def saved(tmp_path: Path) -> str:
    """A checkpoint of an instance network with random weights."""
    torch.manual_seed(3)
    recipe = Recipe(model=ModelConfig(features=(4, 8)), targets="distance")
    folder = str(tmp_path / "checkpoint")
    checkpoint.save(folder, build_model(recipe.model, recipe.outputs), {}, Progress(), recipe)
    checkpoint.save_instances(folder, InstanceConfig(prominence=0.01, min_area=4), {})
    return folder


@pytest.mark.parametrize("tta", [pytest.param(True, id="tta"), pytest.param(False, id="ray", marks=pytest.mark.ray)])
def test_a_network_and_a_coco_file_of_its_cells_have_equal_scores(
    request: pytest.FixtureRequest, saved: str, data: str, tmp_path: Path, tta: bool
) -> None:
    request.getfixturevalue("one_process" if tta else "ray_cluster")
    result = evaluate.evaluate(saved, data, "test", str(tmp_path / "scores"), tta=tta)
    model = segmenter.load(saved, tta)
    records = []
    for index in range(SPLITS["test"]):
        cells = model.segment(sample(index)["image"])
        counts = pixel_scores.mask_counts(cells.foreground, sample(index)["labels"])
        row = result["per_image"][index]
        assert row["file_name"] == sample(index)["file_name"]
        # A pixel whose logit is exactly 0 may change class with another number of threads.
        assert max(abs(row[name] - counts[name]) for name in pixel_scores.COUNTS) <= 2
        records += average_precision.results(1000 + index, rle.encode(cells.labels), cells.scores)
    assert sum(row["cells"] for row in result["per_image"]) == len(records) > 20
    file = tmp_path / "cells.json"
    file.write_text(json.dumps(records))
    other = evaluate.compare(str(file), data, "test", str(tmp_path / "compared"))
    for name in ("msa", "msa_torch_em", "sa50", "pq", "ap", "ap50", "afnr", "ar500", "count_error"):
        assert other[name] == pytest.approx(result[name], abs=5e-3), name
    assert {p.name for p in (tmp_path / "compared").iterdir()} == {"metrics.json", "report.html", "overlays"}


def test_evaluate_writes_scores_report_and_calibrated_thresholds(
    one_process: None, saved: str, data: str, tmp_path: Path
) -> None:
    out = tmp_path / "scores"
    before = checkpoint.load_instances(saved, "distance")
    result = evaluate.evaluate(saved, data, "test", str(out), calibrated=True)
    calibration = json.loads(Path(saved, checkpoint.INSTANCES).read_text())
    assert calibration["val_msa"] >= calibration["val_msa_of_defaults"]
    assert calibration["images"] == SPLITS["val"]
    assert checkpoint.load_instances(saved, "distance") != before
    assert result["thresholds"] == calibration["thresholds"]
    assert json.loads((out / "metrics.json").read_text()) == json.loads(json.dumps(result))
    assert len(result["checkpoint"]["sha256"]) == len(result["data"]["sha256"]) == 64
    assert {p.name for p in out.iterdir()} == {"metrics.json", "recipe.yaml", "report.html", "overlays"}
    page = (out / "report.html").read_text()
    assert "http" not in page.replace("http-equiv", ""), "the page loads nothing from the network"
    assert page.count("<figure") == len(list((out / "overlays").iterdir())) == 6
    assert {kind: score["images"] for kind, score in result["per_cell_type"].items()} == {"A172": 5, "BV2": 5}
    kinds = result["per_cell_type"].values()
    assert result["macro"]["msa"] == pytest.approx(np.mean([kind["msa"] for kind in kinds]))
    low, high = result["intervals"]["msa"]
    assert low <= result["msa"] <= high
    for part in (result, *kinds):
        low, high = part["intervals"]["msa_torch_em"]
        assert low <= part["msa_torch_em"] <= high
    assert result["macro"]["sa75_torch_em"] == pytest.approx(np.mean([kind["sa75_torch_em"] for kind in kinds]))
    assert result["true_cells_torch_em"] == sum(row["true_cells_torch_em"] for row in result["per_image"])
    assert f"({result['true_cells_torch_em']} true cells remain)" in page


def test_the_ground_truth_scores_perfectly_despite_overlapping_cells(
    one_process: None, data: str, tmp_path: Path
) -> None:
    records = []
    for index in range(SPLITS["test"]):
        row = sample(index)
        rles = [{"size": list(row["labels"].shape), "counts": counts} for counts in row["outlines"]]
        records += average_precision.results(row["file_name"], rles, np.ones(len(rles)))
    file = tmp_path / "truth.json"
    file.write_text(json.dumps(records[:-1]))
    result = evaluate.compare(str(file), data, "test", str(tmp_path / "out"))
    assert result["dice"] > 0.97
    assert result["ap50"] == pytest.approx(1 - 1 / 101, abs=0.011), "all cells but the one omitted"
    assert result["afnr"] == pytest.approx(1 / len(records))


def test_label_images_by_each_rule_score_perfectly_by_that_rule(one_process: None, data: str, tmp_path: Path) -> None:
    for rule, other in (("msa", "msa_torch_em"), ("msa_torch_em", "msa")):
        folder = tmp_path / rule
        folder.mkdir()
        for index in range(SPLITS["test"]):
            row = sample(index)
            labels = row["labels"]
            rles = [{"size": list(labels.shape), "counts": counts} for counts in row["outlines"]]
            if rule == "msa_torch_em":
                labels = label_rules.larger_on_top(rles, labels.shape)
            tifffile.imwrite(folder / row["file_name"], labels.astype(np.uint16))
        result = evaluate.compare_labels(str(folder), data, "test", str(tmp_path / f"{rule}-scores"))
        assert result[rule] == 1 > result[other], "the disks overlap"
        assert result["true_cells"] > result["true_cells_torch_em"] > 0, "some disks have fewer than 50 pixels"


def test_scores_of_label_images() -> None:
    truth = sample(0)["labels"]
    assert scores.score(truth, truth)["msa"] == scores.score(truth, truth)["dice"] == 1
    assert scores.score(truth * 0, truth)["msa"] == 0
    with pytest.raises(ValueError, match="differ in shape"):
        scores.score(truth, truth[1:])


def test_user_errors_are_reported_before_anything_is_written(saved: str, data: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    with pytest.raises(UserError, match="no images in its split train"):
        evaluate.evaluate(saved, data, "train", out)
    with pytest.raises(UserError, match="no dataset"):
        evaluate.evaluate(saved, str(tmp_path), "test", out)
    with pytest.raises(UserError, match="no checkpoint"):
        evaluate.evaluate(str(tmp_path), data, "test", out)
    file = tmp_path / "cells.json"
    file.write_text(json.dumps([{"image_id": 7, "segmentation": {"size": [4, 4], "counts": "0"}, "score": 1}]))
    with pytest.raises(UserError, match="image"):
        evaluate.compare(str(file), data, "test", out)
    assert not Path(out).exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    with pytest.raises(UserError, match="contains a run, whose report would be overwritten"):
        evaluate.evaluate(saved, data, "test", str(tmp_path / "run"))


def test_percentiles_of_scaled_images_are_refused(saved: str, data: str, tmp_path: Path) -> None:
    folder, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(data, folder)
    scale = Scale(pixel_scale=0.25, diameter=9.0)
    values = storage.read_json(str(folder / "dataset.json"))
    storage.write_json(str(folder / "dataset.json"), values | {"scale": scale.model_dump()})
    storage.write_json(f"{saved}/{checkpoint.SCALE}", scale.model_dump())
    storage.write_json(f"{saved}/{checkpoint.INTENSITY}", intensity.choose([], "percentile").model_dump())
    with pytest.raises(UserError, match=f"scaled before their percentiles .* prepare --intensity-from {saved}`"):
        evaluate.evaluate(saved, str(folder), "test", str(out))
    assert not out.exists()


def test_label_images_and_a_coco_file_of_the_same_cells_have_equal_scores(
    one_process: None, data: str, tmp_path: Path
) -> None:
    folder, records = tmp_path / "labels", []
    (folder / "deep").mkdir(parents=True)
    for index in range(SPLITS["test"]):
        labels = np.roll(sample(index)["labels"], 1, axis=0).astype(np.int32) * 3  # labels with gaps, not quite right
        stem = Path(sample(index)["file_name"]).stem
        if index % 3 == 0:
            tifffile.imwrite(folder / f"{stem}.tif", labels.astype(np.uint16))
        elif index % 3 == 1:
            cv2.imwrite(str(folder / f"{stem.lower()}_cp_masks.png"), labels)
            cv2.imwrite(str(folder / f"{stem}.png"), sample(index)["image"])  # Cellpose writes masks next to images
        else:
            np.save(folder / "deep" / f"{stem}_labels.npy", labels.astype(float))
        records += average_precision.results(1000 + index, rle.encode(labels), np.ones(len(np.unique(labels)) - 1))
    file = tmp_path / "cells.json"
    file.write_text(json.dumps(records))
    of_records = evaluate.compare(str(file), data, "test", str(tmp_path / "compared"))
    commands.evaluate(data, str(tmp_path / "out"), labels=str(folder))
    result = json.loads((tmp_path / "out" / "metrics.json").read_text())
    names = of_records.keys() - {"predictions", "per_image"}
    assert {name: result[name] for name in names} == json.loads(json.dumps({n: of_records[n] for n in names}))
    assert 0.3 < result["msa"] < 1
    assert result["labels"]["files"] == 10
    assert len(result["labels"]["sha256"]) == 64
    assert str(folder) in (tmp_path / "out" / "report.html").read_text()

    def reason(**options: Any) -> str:
        with pytest.raises(UserError) as error:
            commands.evaluate(data, str(tmp_path / "out2"), **({"labels": str(folder)} | options))
        assert not (tmp_path / "out2").exists()
        return str(error.value)

    assert "give one of them" in reason(predictions=str(file))
    assert "--labels needs no network" in reason(checkpoint="run")
    (folder / "A172_0.tif").rename(folder / "other.tif")
    assert "1 of 10 images have no label image" in reason()
    np.save(folder / "A172_0_masks.npy", np.zeros((5, 6), int))
    assert "is 6 x 5, its image 64 x 48" in reason()
    np.save(folder / "A172_0_masks.npy", np.full(sample(0)["labels"].shape, 0.5))
    assert "not integers" in reason()
    np.save(folder / "A172_0_seg.npy", np.array([{}]), allow_pickle=True)
    assert "several label images of s" in reason()
    (folder / "A172_0_masks.npy").unlink()
    assert "pickled Python object" in reason()
