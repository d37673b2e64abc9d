"""Score the pixels and cells of a split's uncropped images, by Ray Data batch inference.

1. With `calibrated`, the watershed thresholds are first tuned on validation images and saved in the checkpoint.
2. A pool of actors, each with the network loaded once, scores the split's images in blocks.
3. The driver checks that each image has exactly one result, summarises, and writes metrics.json and report.html.

Instead of a network, a COCO results file (`compare`) or label images (`compare_labels`) of any tool can be scored by
the same rules.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from raylivecell.inference import actors, calibrate, label_files, segmenter
from raylivecell.network import forward
from raylivecell.reports import evaluation
from raylivecell.runs import checkpoint, progress
from raylivecell.runtime import session
from raylivecell.scoring import coco_results, scores
from raylivecell.scoring.scores import GroundTruth, Prediction

CALIBRATION_IMAGES = 32
"""Maximum, spread evenly over the validation images. Their maps are kept in memory: 4.4 MB each."""
SAMPLE = ("file_name", "cell_type", "image", "padding", "labels", "outlines", "ignore", "source")
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
    """Score a checkpoint on a split's uncropped images; writes metrics.json, report.html and recipe.yaml into `out`.

    Args:
        checkpoint_uri: folder of a checkpoint, or of a run, for its best.
        data: URI of a prepared dataset.
        split: train, val or test.
        out: URI of a folder.
        tta: average the maps of eight versions of the image (`averaging.VERSIONS`).
        seed: seed of the bootstrap intervals.
        calibrated: first tune the thresholds on the validation images and save them in the checkpoint.

    Returns:
        The content of metrics.json: the fields of `scores.summarise`, model and data, and `per_image` rows.

    Raises:
        UserError: no checkpoint, no dataset, no image in the split, or images of another scale than the checkpoint's.
    """
    folder, data = progress.find(storage.absolute(checkpoint_uri)), storage.absolute(data)
    rows = _list_rows(data, split)
    rule = _conversion(data, folder)
    _check_scale(data, folder)
    recipe = recipes.load(storage.join(folder, progress.RECIPE))
    _check_no_run(out)
    # Written first: fails early if `out` is not writable.
    storage.write_bytes(storage.join(out, "recipe.yaml"), recipes.dump(recipe).encode())
    if calibrated:
        _calibrate(folder, data, tta, rule)
    session.connect()
    arguments = {"folder": folder, "rows": tuple(rows), "tta": tta, "rule": rule}
    scored = actors.run(_NetworkScorer, arguments, list(range(len(rows))), "evaluate")
    about = {
        "tta": tta,
        "checkpoint": {"uri": folder, "sha256": _sha256(storage.join(folder, progress.MODEL))},
        "targets": recipe.targets,
        "thresholds": checkpoint.load_instances(folder, recipe.targets).model_dump(),
    }
    model = segmenter.load(folder, tta)
    show_warnings({row["file_name"]: row["warnings"] for row in scored}, f"{out}/metrics.json")

    def predict(item: int) -> Prediction:
        return _predict(model, _frame(shards.read_row(rows[item], PIXELS), rule))[0]

    return _write_results(out, data, split, seed, rows, scored, about, predict)


def compare(predictions_uri: str, data: str, split: str, out: str, seed: int = 0) -> dict[str, Any]:
    """Score a COCO results file of any tool as `evaluate` scores a checkpoint.

    Args:
        predictions_uri: JSON: a list of {"image_id" or "file_name", "segmentation", "score"}, in which records identify
            images as `coco_results.read` describes. An image without a record has no cells.
        data: URI of a prepared dataset.
        split: train, val or test.
        out: URI of a folder.
        seed: seed of the bootstrap intervals.

    Raises:
        UserError: no such file; no usable record; an ambiguous image name; a dataset of scaled images.
    """
    data, predictions_uri = storage.absolute(data), storage.absolute(predictions_uri)
    rows = _list_rows(data, split)
    _check_unscaled(data)
    _check_no_run(out)
    images = [_image(row) for row in rows]
    results = coco_results.read(predictions_uri, images, lambda: _sources_of_other_splits(split, data))
    for line in results.lines():
        console.print(line, soft_wrap=True, markup=False)
    session.connect()
    arguments = {"rows": tuple(rows), "predictions": tuple(results.cells)}
    scored = actors.run(_FileScorer, arguments, list(range(len(rows))), "evaluate")
    about = {"predictions": {"uri": predictions_uri, "sha256": _sha256(predictions_uri), **results.summary()}}

    def predict(item: int) -> Prediction:
        return painted(*results.cells[item], images[item].size)

    return _write_results(out, data, split, seed, rows, scored, about, predict)


def compare_labels(labels_uri: str, data: str, split: str, out: str, seed: int = 0) -> dict[str, Any]:
    """Score label images of any tool as `evaluate` scores a checkpoint.

    Label images have no scores: each cell counts with score 1, so AP, which ranks cells, is not comparable with that of
    a network.

    Args:
        labels_uri: folder with a TIFF, PNG or NPY file of integers for each image, named as `label_files.find` says.
        data: URI of a prepared dataset.
        split: train, val or test.
        out: URI of a folder.
        seed: seed of the bootstrap intervals.

    Raises:
        UserError: a label image is missing, damaged, ambiguous or of another size than its image.
    """
    data, labels_uri = storage.absolute(data), storage.absolute(labels_uri)
    rows = _list_rows(data, split)
    _check_unscaled(data)
    _check_no_run(out)
    images = [_image(row) for row in rows]
    uris = [storage.join(labels_uri, path) for path in label_files.find(labels_uri, images)]
    session.connect()
    arguments = {"rows": tuple(rows), "uris": tuple(uris)}
    scored = actors.run(_LabelScorer, arguments, list(range(len(rows))), "evaluate")
    show_warnings({row["file_name"]: row["warnings"] for row in scored}, f"{out}/metrics.json")
    checksum = hashlib.sha256("".join(row.pop("sha256") for row in scored).encode()).hexdigest()
    about = {"labels": {"uri": labels_uri, "sha256": checksum, "files": len(uris)}}

    def predict(item: int) -> Prediction:
        return _labelled(label_files.read(uris[item], images[item].size).labels)

    return _write_results(out, data, split, seed, rows, scored, about, predict)


def _list_rows(data: str, split: str) -> shards.Rows:
    if not shards.labelled(data):
        raise UserError(
            f"dataset at {data} has no annotations to compare with; use `raylivecell predict` on its images"
        )
    rows = shards.list_rows(data, split)
    if not rows:
        raise UserError(f"dataset at {data} has no images in its split {split}; choose another --split")
    return rows


def _conversion(data: str, folder: str) -> Intensity | None:
    """Rule that converts the dataset's images to the checkpoint's scale, None if equal; UserError if impossible."""
    try:
        return shards.conversion(data, checkpoint.load_intensity(folder))
    except ValueError as error:
        raise UserError(
            f"dataset at {data} does not fit the checkpoint {folder}: {error}; "
            f"prepare it for this network with `raylivecell prepare --intensity-from {folder}`"
        ) from error


def _check_scale(data: str, folder: str) -> None:
    """UserError unless the prepared images have the pixel scale of the checkpoint, or cells of the same size."""
    prepared, trained = shards.scale(data), checkpoint.load_scale(folder)
    if prepared.fits(trained):
        return
    raise UserError(
        f"dataset at {data} has pixel scale {prepared.pixel_scale:g}, the checkpoint {folder} was trained at "
        f"{trained.pixel_scale:g}, and their cells differ in size; prepare it for this network with "
        f"`raylivecell prepare {trained.prepare_flag(folder)}`"
    )


def _check_unscaled(data: str) -> None:
    """UserError if the prepared images are scaled: results of other tools have the pixels of the original images."""
    if (pixel_scale := shards.scale(data).pixel_scale) != 1:
        raise UserError(
            f"dataset at {data} has pixel scale {pixel_scale:g}, the results have the pixels of the original images; "
            "prepare it again without --pixel-scale and --diameter-from, to score them"
        )


def _check_no_run(out: str) -> None:
    if "metrics.jsonl" in storage.list_names(out):
        raise UserError(f"{out} contains a run, whose report would be overwritten; choose another --out")


def _calibrate(folder: str, data: str, tta: bool, rule: Intensity | None) -> None:
    """Tune the thresholds on validation images and save them in the checkpoint `folder`."""
    rows = _list_rows(data, "val")
    sample_rows = [rows[i] for i in np.linspace(0, len(rows) - 1, min(len(rows), CALIBRATION_IMAGES)).astype(int)]
    network, recipe = checkpoint.load_network(folder, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    cases = []
    for row in track(sample_rows, "maps", len(sample_rows)):
        sample = shards.read_row(row, [*PIXELS, "labels", "ignore"])
        maps = forward.maps_of_frame(network, _frame(sample, rule), tta)
        cases.append((maps, sample["labels"], sample["ignore"]))
    default_msa = calibrate.mean_msa(cases, recipe.targets, watershed.default(recipe.targets))
    config, msa = calibrate.calibrate(cases, recipe.targets)
    calibration = {
        "images": len(cases),
        "val_msa": msa,
        "val_msa_of_defaults": default_msa,
        "tta": tta,
        "data": shards.provenance(data),
    }
    checkpoint.save_instances(folder, config, calibration)
    thresholds = ", ".join(f"{name} {value:g}" for name, value in config.model_dump().items())
    console.print(
        f"thresholds on {len(cases)} validation images: {thresholds}; mSA {msa:.4f} (defaults {default_msa:.4f})"
    )


class _NetworkScorer:
    """Actor with a network: scores samples by their index, one row each."""

    def __init__(self, folder: str, rows: tuple[shards.Row, ...], tta: bool, rule: Intensity | None) -> None:
        actors.use_threads()
        self.model, self.rows, self.rule = segmenter.load(folder, tta), rows, rule

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        return actors.columns([self._score(int(item)) for item in batch["item"]])

    def _score(self, item: int) -> actors.Row:
        sample = shards.read_row(self.rows[item], SAMPLE)
        prediction, warnings = _predict(self.model, _frame(sample, self.rule))
        return {**_score_row(item, sample, prediction), "warnings": warnings}


def _frame(sample: Mapping[str, Any], rule: Intensity | None) -> Frame:
    """A prepared image on the network's scale."""
    image, padding = sample["image"], sample["padding"]
    return intensity.to_uint8(image, rule, padding) if rule else Frame(image, padding)


def _predict(model: segmenter.Segmenter, frame: Frame) -> tuple[Prediction, list[str]]:
    """The predicted cells of an image, and its warnings."""
    cells = model.segment_frame(frame)
    return Prediction(cells.foreground, cells.labels, encode(cells.labels), cells.scores), list(cells.warnings)


def _image(row: shards.Row) -> coco_results.Image:
    """Path, file name and image id by which a results file may identify the image of a row."""
    sample = shards.read_row(row, ["source", "file_name", "annotation"])
    image_id = sample["annotation"].rpartition("#")[2]
    return coco_results.Image(sample["source"], sample["file_name"], image_id, (sample["height"], sample["width"]))


def _sources_of_other_splits(split: str, data: str) -> Iterator[str]:
    """Paths of the images of the dataset's other splits."""
    for other in shards.SPLITS:
        if other != split:
            for row in shards.list_rows(data, other):
                yield shards.read_row(row, ["source"])["source"]


class _FileScorer:
    """Actor with the cells of a COCO results file: scores samples by their index, one row each."""

    def __init__(self, rows: tuple[shards.Row, ...], predictions: tuple[tuple[Sequence[Any], np.ndarray], ...]) -> None:
        self.rows, self.predictions = rows, predictions

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        return actors.columns([self._score(int(item)) for item in batch["item"]])

    def _score(self, item: int) -> actors.Row:
        sample = shards.read_row(self.rows[item], SAMPLE)
        return _score_row(item, sample, painted(*self.predictions[item], sample["labels"].shape))


class _LabelScorer:
    """Actor for label images: scores samples by their index, one row each."""

    def __init__(self, rows: tuple[shards.Row, ...], uris: tuple[str, ...]) -> None:
        self.rows, self.uris = rows, uris

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        return actors.columns([self._score(int(item)) for item in batch["item"]])

    def _score(self, item: int) -> actors.Row:
        sample = shards.read_row(self.rows[item], SAMPLE)
        file = label_files.read(self.uris[item], sample["labels"].shape)
        row = _score_row(item, sample, _labelled(file.labels))
        return {**row, "sha256": file.sha256, "warnings": list(file.warnings)}


def _labelled(labels: np.ndarray) -> Prediction:
    """The cells of a label image (H, W) of 0 to N, each with score 1."""
    rles = encode(labels)
    return Prediction(labels != 0, labels, rles, np.ones(len(rles)))


def painted(rles: Sequence[Rle], confidences: np.ndarray, size: tuple[int, int]) -> Prediction:
    """Draw cells that may overlap as disjoint labels: a shared pixel belongs to the cell with the higher score."""
    labels = np.zeros(size, np.int32)
    for index in np.argsort(confidences, kind="stable").tolist():
        labels[decode(rles[index]) != 0] = index + 1
    return Prediction(labels != 0, labels, rles, confidences)


def _score_row(item: int, sample: dict[str, Any], prediction: Prediction) -> actors.Row:
    size = list(sample["labels"].shape)
    rles, ignored = [{"size": size, "counts": counts} for counts in sample["outlines"]], sample["ignore"]
    row, matches = scores.of_image(prediction, GroundTruth(sample["labels"], rles, ignored))
    about = {name: sample[name] for name in ("file_name", "source", "cell_type", "height", "width")}
    return {"item": item, **about, "ignored": 0 if ignored is None else int(ignored.sum()), **row, "matches": matches}


def _write_results(
    out: str,
    data: str,
    split: str,
    seed: int,
    rows: Sequence[shards.Row],
    scored: Sequence[actors.Row],
    about: Mapping[str, Any],
    predict: Callable[[int], Prediction],
) -> dict[str, Any]:
    """Write report.html, overlays/ and metrics.json, print the table; returns the content of metrics.json.

    `scored` has one row for each of `rows`; `predict` maps the index of a row to the prediction for its image.
    """
    matches = [row["matches"] for row in scored]
    per_image = [{name: value for name, value in row.items() if name != "matches"} for row in scored]
    result = {
        **scores.summarise(per_image, matches, seed),
        "ignored": evaluation.ignored(per_image),
        "split": split,
        **about,
        "data": shards.provenance(data),
        "raylivecell": __version__,
        "date": date.today().isoformat(),
        "per_image": per_image,
    }
    items = evaluation.chosen(per_image)
    predictions = {item: predict(item) for item in track(items, "pictures", len(items))}
    evaluation.write(out, result, rows, predictions)
    storage.write_json(storage.join(out, "metrics.json"), result)
    console.print(score_table(result))
    console.print(f"mSA by torch-em's rule, as published figures: {_format_score(result, 'msa_torch_em')}")
    if text := evaluation.ignored_text(result):
        console.print(text)
    console.print(f"written: {out}/metrics.json, report.html", soft_wrap=True, markup=False)
    return result


def score_table(result: Mapping[str, Any]) -> Table:
    """Table of scores by cell type and over all images, with 95 % intervals, in 80 columns."""
    table = Table(
        title=f"{result['images']} images of {result['split']}, with 95 % intervals", box=SIMPLE_HEAD, padding=(0, 1)
    )
    for name in ("", "images", "mean Dice", "mSA", "AP50", "AP"):
        table.add_column(name, justify="right" if name else "left")
    cell_types = result["per_cell_type"]
    for name, values in [*cell_types.items(), ("all", result)]:
        texts = [_format_score(values, statistic) for statistic in ("mean_image_dice", "msa", "ap50", "ap")]
        table.add_row(name, str(values["images"]), *texts, end_section=name == list(cell_types)[-1])
    return table


def _format_score(values: Mapping[str, Any], statistic: str) -> str:
    if values[statistic] is None:
        return "-"
    interval = values["intervals"][statistic]
    limits = f" ({interval[0]:.3f}-{interval[1]:.3f})".replace("0.", ".") if interval else ""
    return f"{values[statistic]:.3f}{limits}"


def _sha256(uri: str) -> str:
    return hashlib.sha256(storage.read_bytes(uri)).hexdigest()
