"""Partly annotated images in `evaluate`, calibration and validation: the ignore region changes no score."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_evaluate import sample

from raylivecell.annotations import rle
from raylivecell.cells import watershed
from raylivecell.core import storage
from raylivecell.data import shards
from raylivecell.images import intensity
from raylivecell.inference import calibrate, evaluate
from raylivecell.ingest import blocks
from raylivecell.recipe import Targets
from raylivecell.reports import pictures
from raylivecell.runs import checkpoint
from raylivecell.scoring import average_precision, pixel_scores, scores
from raylivecell.training.ranks import RankContext
from raylivecell.training.validation import Validation

COUNT = 4
SCORES = (
    "dice",
    "iou",
    "mean_image_dice",
    "msa",
    "pq",
    "ap",
    "ap50",
    "afnr",
    "cells",
    "count_error",
    "confluence_error",
)


def region(index: int) -> np.ndarray:
    """Ignore region of a sample, bool (H, W): its lower right part, without cells; none for every other sample."""
    labels = sample(index)["labels"]
    rows, columns = np.ogrid[: labels.shape[0], : labels.shape[1]]
    return (rows + columns > 60) & (labels == 0) & (index % 2 == 0)


def dataset(folder: Path, partly: bool) -> str:
    """Write a dataset of COUNT test and validation images, with ignore regions if `partly`."""
    rows = []
    for index in range(COUNT):
        mask = region(index)
        counts = rle.encode(mask.astype(np.uint8))[0]["counts"] if mask.any() else b""
        rows.append({**sample(index), "padding": b"", "ignore": counts})
    splits: dict[str, Any] = {"train": {"images": 0, "sizes": [], "shards": []}}
    for split in ("val", "test"):
        shards.write_shard(f"{folder}/{split}/part-0.parquet", rows, ignore=partly)
        sizes = [list(row["labels"].shape) for row in rows]
        splits[split] = {
            "images": COUNT,
            "sizes": sizes,
            "shards": [{"file": f"{split}/part-0.parquet", "rows": COUNT}],
        }
    about = {"format_version": shards.FORMAT_VERSION, "name": "disks", "licence": "none", "splits": splits}
    storage.write_json(f"{folder}/dataset.json", about | {"intensity": intensity.LIVECELL.model_dump()})
    return str(folder)


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> str:
    return dataset(tmp_path_factory.mktemp("complete"), partly=False)


@pytest.fixture(scope="module")
def partly(tmp_path_factory: pytest.TempPathFactory) -> str:
    return dataset(tmp_path_factory.mktemp("partly"), partly=True)


def predicted(index: int, with_extra: bool) -> np.ndarray:
    """Label image: the true cells, moved by a pixel; `with_extra` also cells that fill the ignore region."""
    labels = np.roll(sample(index)["labels"], 1, axis=1).astype(np.int32)
    extra = region(index) & (labels == 0) & with_extra
    stripes = 100 + np.arange(labels.shape[0])[:, None] // 7
    return np.where(extra, stripes, labels)


def test_cells_in_the_ignore_region_change_no_score(
    one_process: None, complete: str, partly: str, tmp_path: Path
) -> None:
    results = {}
    for extra in (False, True):
        records, folder = [], tmp_path / f"labels{extra}"
        folder.mkdir()
        for index in range(COUNT):
            labels = predicted(index, extra)
            rles = rle.encode(labels)
            records += average_precision.results(1000 + index, rles, 0.9 - 0.01 * np.arange(len(rles)))
            np.save(folder / f"{Path(sample(index)['file_name']).stem}.npy", labels)
        file = tmp_path / f"cells{extra}.json"
        file.write_text(json.dumps(records))
        for name, data in (("complete", complete), ("partly", partly)):
            results["file", name, extra] = evaluate.compare(str(file), data, "test", str(tmp_path / f"f{name}{extra}"))
            out = str(tmp_path / f"l{name}{extra}")
            results["labels", name, extra] = evaluate.compare_labels(str(folder), data, "test", out)
    for kind in ("file", "labels"):
        plain, same = results[kind, "partly", False], results[kind, "partly", True]
        names = [name for name in SCORES if kind == "file" or not name.startswith(("ap", "afnr"))]
        assert {name: same[name] for name in names} == {name: plain[name] for name in names}
        worse = results[kind, "complete", True]
        assert all(worse[name] < plain[name] for name in ("dice", "msa", "pq", "ap"))
        pixels = sum(int(region(index).sum()) for index in range(COUNT))
        assert same["ignored"] == {"images": COUNT // 2, "pixels": pixels}
        assert worse["ignored"] == {"images": 0, "pixels": 0}
        rows = same["per_image"]
        assert [row["ignored"] for row in rows] == [int(region(index).sum()) for index in range(COUNT)]
        for row in rows:
            assert sum(row[name] for name in pixel_scores.COUNTS) == row["height"] * row["width"] - row["ignored"]
    sentence = f"{pixels:,} pixels without annotation in {COUNT // 2} images are left out"
    assert sentence in (tmp_path / "fpartlyTrue" / "report.html").read_text()
    assert "without annotation" not in (tmp_path / "fcompleteTrue" / "report.html").read_text()


def test_scores_of_label_images_leave_ignored_pixels_out() -> None:
    truth, ignored = sample(0)["labels"], region(0)
    everywhere = np.ones_like(ignored)
    assert scores.score(predicted(0, True), truth, ignored) == scores.score(predicted(0, False), truth, ignored)
    perfect = scores.score(np.where(truth, truth, 99), truth, everywhere)  # annotated cells stay annotated
    assert (perfect["dice"], perfect["msa"], perfect["confluence_error"]) == (1, 1, 0)
    with pytest.raises(ValueError, match="ignored is float64"):
        scores.score(truth, truth, ignored.astype(float))


def perfect_maps(labels: np.ndarray) -> np.ndarray:
    """Maps of a network of the kind `boundary` that predicts exactly these cells."""
    from raylivecell.targets.boundary import boundary

    inside = labels > 0
    return np.stack([inside, boundary(labels.astype(np.uint16))]).astype(np.float32)


def test_calibration_and_validation_leave_the_ignore_region_out(
    one_process: None, partly: str, random_checkpoint: str, tmp_path: Path
) -> None:
    targets: Targets = "boundary"
    config = watershed.default(targets)
    truths, masks = [sample(index)["labels"] for index in range(COUNT)], [region(index) for index in range(COUNT)]
    clean = [(perfect_maps(truth), truth, mask) for truth, mask in zip(truths, masks)]
    full = [(perfect_maps(predicted(index, True)), truths[index], masks[index]) for index in range(COUNT)]
    moved = [(perfect_maps(predicted(index, False)), truths[index], None) for index in range(COUNT)]
    assert calibrate.mean_msa(full, targets, config) > 0.8 * calibrate.mean_msa(moved, targets, config)
    unmasked = [(maps, truth, None) for maps, truth, _ in full]
    assert calibrate.mean_msa(unmasked, targets, config) < calibrate.mean_msa(full, targets, config)
    without = [(maps, truth, None) for maps, truth, _ in clean]
    assert calibrate.mean_msa(clean, targets, config) == calibrate.mean_msa(without, targets, config)

    result = evaluate.evaluate(random_checkpoint, partly, "test", str(tmp_path / "scores"))
    network, recipe = checkpoint.load_network(random_checkpoint, torch.device("cpu"))
    rows = shards.list_rows(partly, "val")
    samples = SimpleNamespace(val=rows, val_sample=lambda index: blocks.read_validation_sample(rows[index], cells=True))
    context = RankContext(0, 1, torch.device("cpu"), 1)
    validation = Validation(samples, context, recipe.targets).scores(network)  # type: ignore[arg-type]
    # A pixel whose logit is nearly 0 may change class with the batch.
    assert validation["val_dice"] == pytest.approx(result["dice"], abs=2e-3)
    assert validation["val_iou"] == pytest.approx(result["iou"], abs=2e-3)
    title, png = pictures.picture(network, rows[0])
    assert float(title.split()[2]) == pytest.approx(result["per_image"][0]["dice"], abs=2e-3)
    assert png.startswith(b"\x89PNG")
