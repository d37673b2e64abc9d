"""report.html of an evaluation: scores by cell type, and each type's best, median and worst image.

Each figure has three panels: outlines of the true cells, outlines of the predicted cells, and the errors in colour.
A predicted cell is correct if its IoU with a true cell is at least 0.5, the threshold of SA50 and AP50.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from raylivecell.core import storage
from raylivecell.data import shards
from raylivecell.reports import page
from raylivecell.reports.overlay import FALSE, FOUND, MISSED, edges, hatch, outlined, tint
from raylivecell.scoring import instance_scores
from raylivecell.scoring.scores import Prediction

Result = Mapping[str, Any]
COLUMNS = (
    ("mean_image_dice", "mean image Dice"),
    ("iou", "IoU"),
    ("msa", "mSA"),
    ("msa_torch_em", "mSA, torch-em's rule"),
    ("sa50", "SA50"),
    ("ap", "AP"),
    ("ap50", "AP50"),
    ("ap75", "AP75"),
    ("afnr", "AFNR"),
    ("pq", "PQ"),
    ("count_error", "count error"),
    ("confluence_error", "confluence error"),
)
MIN_IOU = 0.5
"""Lowest IoU of a correct cell."""
JPEG_QUALITY = 88


def chosen(per_image: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """Map item -> title of the images to show: best, median and worst of each cell type by mSA."""
    titles: dict[int, str] = {}
    for kind in sorted({row["cell_type"] for row in per_image}):
        rows = sorted((row for row in per_image if row["cell_type"] == kind), key=lambda row: row["msa"])
        ranked = {"best": rows[-1], "median": rows[len(rows) // 2], "worst": rows[0]} if rows[1:] else {"only": rows[0]}
        for name, row in ranked.items():  # each image once: best before median before worst
            scores = f"mSA {row['msa']:.3f}, Dice {row['dice']:.3f}, {row['cells']} found, {row['true_cells']} true"
            titles.setdefault(row["item"], f"{kind}, {name}: {row['file_name']}   {scores}")
    return titles


def ignored(per_image: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Number of ignored `pixels`, and of `images` that contain any."""
    counts = [row["ignored"] for row in per_image if row["ignored"]]
    return {"images": len(counts), "pixels": sum(counts)}


def ignored_text(result: Result) -> str:
    """Describe the ignored pixels in a sentence; "" if the images are completely annotated."""
    counts = result["ignored"]
    if not counts["images"]:
        return ""
    plural = "s" if counts["images"] > 1 else ""
    return f"{counts['pixels']:,} pixels without annotation in {counts['images']:,} image{plural} are left out."


def write(out: str, result: Result, rows: Sequence[shards.Row], predictions: Mapping[int, Prediction]) -> None:
    """Write report.html and overlays/ into the folder `out`.

    Args:
        out: URI of a folder.
        result: content of metrics.json.
        rows: rows of the split, in the order of items.
        predictions: item -> prediction, for the images in `chosen`.
    """
    pictures = []
    for item, title in chosen(result["per_image"]).items():
        sample = shards.read_row(rows[item], ["image", "labels", "ignore"])
        data = jpeg(panels(sample["image"], sample["labels"], predictions[item].labels, sample["ignore"]))
        storage.write_bytes(storage.join(out, "overlays", f"{_stem(title)}.jpg"), data)
        pictures.append((title, data))
    text = page.render(
        "evaluation",
        f"{result['images']} images of {result['split']}",
        "Segmentation of cells, compared with the ground truth",
        headline=[(label, _value(result[name])) for name, label in COLUMNS],
        scores=_table(result),
        true_cells=f"{result['true_cells']:,}",
        true_cells_torch_em=f"{result['true_cells_torch_em']:,}",
        ignored=ignored_text(result),
        pictures=page.images(pictures, "jpeg"),
        origin=_origin(result),
        licence=result["data"]["licence"],
    )
    storage.write_bytes(storage.join(out, "report.html"), text)


def _origin(result: Result) -> str:
    """Describe in one line the scored model, file or folder, the settings, the version and the date."""
    scored = result.get("checkpoint") or result.get("predictions") or result["labels"]
    settings = [f"{name} {value}" for name, value in result.get("thresholds", {}).items()]
    settings += ["averaged over flips, turns and scales"] if result.get("tta") else []
    parts = [f"Scored: {scored['uri']} (sha256 {scored['sha256'][:12]})", *settings]
    return f"{', '.join(parts)}; raylivecell {result['raylivecell']}, {result['date']}"


def panels(
    image: NDArray[np.uint8],
    truth: NDArray[Any],
    prediction: NDArray[Any],
    ignored: NDArray[np.bool_] | None = None,
) -> NDArray[np.uint8]:
    """True cells, predicted cells and errors side by side, RGB uint8 (H, 3 W + 16, 3); arguments (H, W).

    The ignore region is hatched on the first and the last.
    """
    gap = np.full((image.shape[0], 8, 3), 255, np.uint8)
    counted = instance_scores.without_ignored(prediction, ignored)
    true_cells, wrong = outlined(image, truth), errors(image, truth, counted)
    if ignored is not None:
        hatch(true_cells, ignored)
        hatch(wrong, ignored & (counted == 0))
    return np.hstack([true_cells, gap, outlined(image, prediction), gap, wrong])


def errors(image: NDArray[np.uint8], truth: NDArray[Any], prediction: NDArray[Any]) -> NDArray[np.uint8]:
    """The image with edges of correct cells, and with wrong and missed cells in colour, RGB uint8 (H, W, 3)."""
    correct, detected = _matched(prediction, truth)
    canvas = np.repeat(image[..., None], 3, axis=2)
    tint(canvas, (truth != 0) & ~detected, MISSED)
    tint(canvas, (prediction != 0) & ~correct, FALSE)
    canvas[edges(np.where(correct, prediction, 0))] = FOUND
    return canvas


def _matched(prediction: NDArray[Any], truth: NDArray[Any]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Masks of the correct predicted cells and of the detected true cells."""
    pairs = instance_scores.overlaps(prediction, truth)
    matched = pairs.iou >= MIN_IOU
    predicted, true = (np.unique(labels[labels != 0]) for labels in (prediction, truth))
    return np.isin(prediction, predicted[pairs.prediction[matched]]), np.isin(truth, true[pairs.truth[matched]])


def jpeg(image: NDArray[np.uint8]) -> bytes:
    """JPEG of an RGB image (H, W, 3), a tenth of the PNG's size."""
    encoded, data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    if not encoded:
        raise ValueError(f"no JPEG of an image of shape {image.shape}")
    return data.tobytes()


def _stem(title: str) -> str:
    """File stem of an image from its title, such as `A172-best`."""
    kind, _, rest = title.partition(", ")
    return f"{kind}-{rest.split(':', 1)[0]}".replace("/", "_")


def _table(result: Result) -> page.Table:
    head = ["cell type", "images", "true cells", *(label for _, label in COLUMNS)]
    parts = [*result["per_cell_type"].items(), ("all", result)]
    rows = [
        [name, str(part["images"]), f"{part['true_cells']:,}", *(_with_interval(part, key) for key, _ in COLUMNS)]
        for name, part in parts
    ]
    macro = ["mean of types", "", "", *(_value(result["macro"][key]) for key, _ in COLUMNS)]
    return page.Table(head, [*rows, macro])


def _with_interval(values: Result, name: str) -> str:
    interval = values["intervals"].get(name)
    limits = f" ({_value(interval[0])} to {_value(interval[1])})" if interval else ""
    return _value(values[name]) + limits


def _value(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
