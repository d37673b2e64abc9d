"""Whole images of a split in, scores of their pixels and their cells out, by Ray Data batch inference.

1. With `calibrate`, the thresholds that make cells are first chosen on validation images and kept in the checkpoint.
2. A pool of actors, each with the network loaded once, scores block after block of the split's images.
3. The driver checks that each image came back exactly once, adds up, and writes metrics.json and report.html.

Instead of a network, a COCO results file can be scored: any other tool's cells, by the same rules.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from raylivecell import recipe as recipes
from raylivecell.annotations.rle import Rle, decode, encode
from raylivecell.cells import watershed
from raylivecell.core import storage
from raylivecell.core.console import console, show_warnings, track
from raylivecell.core.errors import UserError
from raylivecell.core.version import __version__
from raylivecell.data import shards
from raylivecell.images import intensity
from raylivecell.images.intensity import Frame, Intensity
from raylivecell.inference import actors, calibrate, segmenter
from raylivecell.network import forward
from raylivecell.reports import evaluation
from raylivecell.runs import checkpoint, progress
from raylivecell.runtime import session
from raylivecell.scoring import coco_results, scores
from raylivecell.scoring.scores import GroundTruth, Prediction

CALIBRATION_IMAGES = 32
"""At most; spread evenly over the validation images. Their maps are held in memory: 4.4 MB each."""
SAMPLE = ("file_name", "cell_type", "image", "padding", "labels", "outlines", "source")
PIXELS = ("image", "padding")


def evaluate(
    checkpoint_uri: str,
    data: str,
    split: str,
    out: str,
    tta: bool = False,
    seed: int = 0,
    calibrated: bool = False,
) -> dict[str, Any]:
    """Score a checkpoint on whole images of a split; writes metrics.json, report.html and recipe.yaml into `out`.

    Args:
        checkpoint_uri: a checkpoint's folder, or a run's (then its best).
        data: URI of a prepared dataset.
        split: train, val or test.
        out: URI of a folder.
        tta: average the maps of the four flips.
        seed: of the bootstrap intervals.
        calibrated: first choose the thresholds on the validation images and keep them in the checkpoint.

    Returns:
        What metrics.json holds: `scores.summarise`'s fields, what was scored with what, and `per_image` rows.

    Raises:
        UserError: no checkpoint, no dataset, or no image in the split.
    """
    folder, data = progress.find(storage.absolute(checkpoint_uri)), storage.absolute(data)
    rows = _rows_of(data, split)
    rule = _rule_between(data, folder)
    recipe = recipes.load(storage.join(folder, progress.RECIPE))
    _check_no_run(out)
    storage.write_bytes(storage.join(out, "recipe.yaml"), recipes.dump(recipe).encode())  # before the work: may we?
    if calibrated:
        _calibrate(folder, data, tta, rule)
    session.connect()
    scored = actors.run(
        _Scorer, {"folder": folder, "rows": tuple(rows), "tta": tta, "rule": rule}, list(range(len(rows))), "evaluate"
    )
    config = checkpoint.load_instances(folder, recipe.targets)
    about = {
        "tta": tta,
        "checkpoint": {"uri": folder, "sha256": _sha256(storage.join(folder, progress.MODEL))},
        "targets": recipe.targets,
        "thresholds": config.model_dump(),
    }
    result = _result(scored, data, split, seed, about)
    model = segmenter.load(folder, tta)
    drawn = evaluation.chosen(result["per_image"])
    samples = ((item, shards.read_row(rows[item], PIXELS)) for item in track(drawn, "pictures", len(drawn)))
    found = {item: _found(model, _frame(sample, rule))[0] for item, sample in samples}
    show_warnings({row["file_name"]: row["warnings"] for row in scored}, f"{out}/metrics.json")
    _hand_over(out, result, rows, found)
    return result


def _rule_between(data: str, folder: str) -> Intensity | None:
    """What brings the dataset's images to the scale of the checkpoint; None: nothing. UserError where nothing can."""
    try:
        return intensity.conversion(shards.intensity(data), checkpoint.load_intensity(folder))
    except ValueError as error:
        raise UserError(
            f"dataset at {data} does not fit the checkpoint {folder}: {error}; "
            f"prepare it for this network: `raylivecell prepare --intensity-from {folder}`"
        ) from error


def _frame(sample: Mapping[str, Any], rule: Intensity | None) -> Frame:
    """A prepared image on the network's scale."""
    image, padding = sample["image"], sample["padding"]
    return intensity.to_uint8(image, rule, padding) if rule else Frame(image, padding)


def _check_no_run(out: str) -> None:
    if "metrics.jsonl" in storage.list_names(out):
        raise UserError(f"{out} holds a run, whose report this would replace; choose another --out")


def compare(predictions_uri: str, data: str, split: str, out: str, seed: int = 0) -> dict[str, Any]:
    """Score anybody's COCO results file as `evaluate` scores a checkpoint.

    Args:
        predictions_uri: JSON: a list of {"image_id" or "file_name", "segmentation", "score"}; how they name an image:
            `coco_results.read`. An image that the file does not name has no cell.
        data: URI of a prepared dataset.
        split: train, val or test.
        out: URI of a folder.
        seed: of the bootstrap intervals.

    Raises:
        UserError: no such file; no record that can be used; a name that may mean several images.
    """
    data, predictions_uri = storage.absolute(data), storage.absolute(predictions_uri)
    rows = _rows_of(data, split)
    _check_no_run(out)
    images = [_image(row) for row in rows]
    results = coco_results.read(predictions_uri, images, lambda: _sources_but_of(split, data))
    for line in results.lines():
        console.print(line, soft_wrap=True, markup=False)
    session.connect()
    arguments = {"rows": tuple(rows), "predictions": tuple(results.cells)}
    scored = actors.run(_Comparer, arguments, list(range(len(rows))), "evaluate")
    about = {"predictions": {"uri": predictions_uri, "sha256": _sha256(predictions_uri), **results.summary()}}
    result = _result(scored, data, split, seed, about)
    drawn = evaluation.chosen(result["per_image"])
    found = {item: painted(*results.cells[item], images[item].size) for item in drawn}
    _hand_over(out, result, rows, found)
    return result


def painted(rles: Sequence[Rle], ranks: np.ndarray, size: tuple[int, int]) -> Prediction:
    """Cells that may overlap as what is scored: of two that claim a pixel, the one of the higher score has it."""
    labels = np.zeros(size, np.int32)
    for number in np.argsort(ranks, kind="stable").tolist():
        labels[decode(rles[number]) != 0] = number + 1
    return Prediction(labels != 0, labels, rles, ranks)


def score_table(result: Mapping[str, Any]) -> Table:
    """Scores by cell type and in all, with their 95 % intervals, to print in 80 columns."""
    table = Table(
        title=f"{result['images']} images of {result['split']}, with 95 % intervals", box=SIMPLE_HEAD, padding=(0, 1)
    )
    for name in ("", "images", "mean Dice", "mSA", "AP50", "AP"):
        table.add_column(name, justify="right" if name else "left")
    kinds = result["per_cell_type"]
    for name, values in [*kinds.items(), ("all", result)]:
        cells = [_score(values, statistic) for statistic in ("mean_image_dice", "msa", "ap50", "ap")]
        table.add_row(name, str(values["images"]), *cells, end_section=name == list(kinds)[-1])
    return table


class _Scorer:
    """Sample ids -> a row each; an actor with a network."""

    def __init__(self, folder: str, rows: tuple[shards.Row, ...], tta: bool, rule: Intensity | None) -> None:
        actors.use_threads()
        self.model, self.rows, self.rule = segmenter.load(folder, tta), rows, rule

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        return actors.columns([self._score(int(item)) for item in batch["item"]])

    def _score(self, item: int) -> actors.Row:
        sample = shards.read_row(self.rows[item], SAMPLE)
        found, warnings = _found(self.model, _frame(sample, self.rule))
        return {**_scored(item, sample, found), "warnings": warnings}


class _Comparer:
    """Sample ids -> a row each; an actor with somebody's cells."""

    def __init__(self, rows: tuple[shards.Row, ...], predictions: tuple[tuple[Sequence[Any], np.ndarray], ...]) -> None:
        self.rows, self.predictions = rows, predictions

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        return actors.columns([self._score(int(item)) for item in batch["item"]])

    def _score(self, item: int) -> actors.Row:
        sample = shards.read_row(self.rows[item], SAMPLE)
        return _scored(item, sample, painted(*self.predictions[item], sample["labels"].shape))


def _found(model: segmenter.Segmenter, frame: Frame) -> tuple[Prediction, list[str]]:
    """The cells of an image, and its warnings."""
    cells = model.segment_frame(frame)
    return Prediction(cells.foreground, cells.labels, encode(cells.labels), cells.scores), list(cells.warnings)


def _scored(item: int, sample: dict[str, Any], found: Prediction) -> actors.Row:
    size = list(sample["labels"].shape)
    truth = GroundTruth(sample["labels"], [{"size": size, "counts": counts} for counts in sample["outlines"]])
    row, matches = scores.of_image(found, truth)
    about = {name: sample[name] for name in ("file_name", "source", "cell_type", "height", "width")}
    return {"item": item, **about, **row, "matches": matches}


def _calibrate(folder: str, data: str, tta: bool, rule: Intensity | None) -> None:
    """Choose the thresholds on validation images and keep them in the checkpoint `folder`."""
    rows = _rows_of(data, "val")
    chosen = [rows[i] for i in np.linspace(0, len(rows) - 1, min(len(rows), CALIBRATION_IMAGES)).astype(int)]
    network, recipe = checkpoint.load_network(folder, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    cases = []
    for row in track(chosen, "maps", len(chosen)):
        sample = shards.read_row(row, [*PIXELS, "labels"])
        cases.append((forward.maps_of_frame(network, _frame(sample, rule), tta), sample["labels"]))
    before = calibrate.mean_msa(cases, recipe.targets, watershed.default(recipe.targets))
    config, msa = calibrate.calibrate(cases, recipe.targets)
    told = {
        "images": len(cases),
        "val_msa": msa,
        "val_msa_of_defaults": before,
        "tta": tta,
        "data": shards.provenance(data),
    }
    checkpoint.save_instances(folder, config, told)
    named = ", ".join(f"{name} {value:g}" for name, value in config.model_dump().items())
    console.print(f"thresholds on {len(cases)} validation images: {named}; mSA {msa:.4f} (defaults {before:.4f})")


def _rows_of(data: str, split: str) -> shards.Rows:
    rows = shards.list_rows(data, split)
    if not rows:
        raise UserError(f"dataset at {data} has no images in its split {split}; choose another --split")
    return rows


def _image(row: shards.Row) -> coco_results.Image:
    """What a results file may call the image of a row."""
    sample = shards.read_row(row, ["source", "file_name", "annotation"])
    identity = sample["annotation"].rpartition("#")[2]
    return coco_results.Image(sample["source"], sample["file_name"], identity, (sample["height"], sample["width"]))


def _sources_but_of(split: str, data: str) -> Iterator[str]:
    """Paths of the images of the dataset's other splits."""
    for other in (one for one in shards.SPLITS if one != split):
        for row in shards.list_rows(data, other):
            yield shards.read_row(row, ["source"])["source"]


def _result(scored: Sequence[actors.Row], data: str, split: str, seed: int, about: Mapping[str, Any]) -> dict[str, Any]:
    matches = [row["matches"] for row in scored]
    per_image = [{name: value for name, value in row.items() if name != "matches"} for row in scored]
    return {
        **scores.summarise(per_image, matches, seed),
        "split": split,
        **about,
        "data": shards.provenance(data),
        "raylivecell": __version__,
        "date": date.today().isoformat(),
        "per_image": per_image,
    }


def _hand_over(out: str, result: dict[str, Any], rows: Sequence[shards.Row], found: Mapping[int, Prediction]) -> None:
    """report.html, overlays/, metrics.json and the table on the terminal."""
    evaluation.write(out, result, rows, found)
    storage.write_json(storage.join(out, "metrics.json"), result)
    console.print(score_table(result))
    console.print(f"written: {out}/metrics.json, report.html", soft_wrap=True, markup=False)


def _sha256(uri: str) -> str:
    return hashlib.sha256(storage.read_bytes(uri)).hexdigest()


def _score(values: Mapping[str, Any], statistic: str) -> str:
    if values[statistic] is None:
        return "-"
    interval = values["intervals"][statistic]
    spread = f" ({interval[0]:.3f}-{interval[1]:.3f})".replace("0.", ".") if interval else ""
    return f"{values[statistic]:.3f}{spread}"
