"""Whole images in, masks and scores out, by Ray Data batch inference.

1. The index of images (sample ids, or paths) is cut into small blocks.
2. A pool of actors, each with the network loaded once, takes block after block: on GPUs where there are some, else
   on the cluster's CPUs.
3. The driver collects a row an image, checks that each image came back exactly once, and writes the result.
"""

import csv
import hashlib
import io
import posixpath
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from pyarrow import fs as pafs
from rich.box import SIMPLE_HEAD
from rich.table import Table

from raylivecell import (
    __version__,
    actors,
    checkpoint,
    images,
    metrics,
    overlay,
    runtime,
    segment,
    shards,
    sources,
    storage,
)
from raylivecell import recipe as recipes
from raylivecell.errors import UserError
from raylivecell.progress import console

Row = actors.Row
BACKGROUND = 128
"""Gray level of LIVECell's background; deeper images are scaled to have it."""
UNREAD: Row = {"height": 0, "width": 0, "foreground_pixels": 0, "area_share": 0.0, "regions": 0, "gain": 0.0}
UNREAD |= {"mask": "", "overlay": ""}
"""What Ray Data needs in the columns of an image that was not read; cells.csv leaves them empty."""
CSV_COLUMNS = ("file", *UNREAD, "error")


def evaluate(checkpoint_uri: str, data: str, split: str, out: str, tta: bool = False, seed: int = 0) -> dict[str, Any]:
    """Score a checkpoint on whole images of a split; writes metrics.json, overlays/ and recipe.yaml into `out`.

    Args:
        checkpoint_uri: a checkpoint's folder, or a run's (then its best).
        data: URI of a prepared dataset.
        split: train, val or test.
        out: URI of a folder.
        tta: average the probabilities of the four flips.
        seed: of the bootstrap intervals.

    Returns:
        What metrics.json holds: `metrics.summarise`'s fields, what was scored with what, and `per_image` rows.

    Raises:
        UserError: no checkpoint, no dataset, or no image in the split.
    """
    folder, data = checkpoint.find(storage.absolute(checkpoint_uri)), storage.absolute(data)
    rows = shards.list_rows(data, split)
    if not rows:
        raise UserError(f"dataset at {data} has no images in its split {split}; choose another --split")
    network, recipe = segment.load(folder, torch.device("cpu"))
    storage.write_bytes(storage.join(out, "recipe.yaml"), recipes.dump(recipe).encode())  # before the work: may we?
    runtime.connect()
    scored = actors.run(
        _Scorer, {"folder": folder, "rows": tuple(rows), "tta": tta}, list(range(len(rows))), "evaluate"
    )
    order = sorted(scored, key=lambda row: row["dice"])
    result = {
        **metrics.summarise(scored, seed),
        "split": split,
        "tta": tta,
        "checkpoint": {"uri": folder, "sha256": _sha256(storage.join(folder, checkpoint.MODEL))},
        "data": _provenance(data),
        "raylivecell": __version__,
        "per_image": [{name: value for name, value in row.items() if name != "item"} for row in scored],
    }
    named = {"best": order[-1], "median": order[len(order) // 2], "worst": order[0]}
    shown = {row["item"]: name for name, row in reversed(named.items())}  # one image has one name: best before worst
    for item, name in shown.items():
        storage.write_bytes(storage.join(out, "overlays", f"{name}.png"), segment.picture(network, rows[item], tta)[1])
    storage.write_json(storage.join(out, "metrics.json"), result)
    console.print(score_table(result))
    return result


def score_table(result: dict[str, Any]) -> Table:
    """Scores by cell type and in all, with their 95 % intervals, to print in 80 columns."""
    table = Table(
        title=f"{result['images']} images of {result['split']}, with 95 % intervals", box=SIMPLE_HEAD, padding=(0, 1)
    )
    for name in ("", "images", "mean image Dice", "Dice", "IoU"):
        table.add_column(name, justify="right" if name else "left")
    kinds = result["per_cell_type"]
    for name, scores in [*kinds.items(), ("all", result)]:
        cells = [_score(scores, statistic) for statistic in ("mean_image_dice", "dice", "iou")]
        table.add_row(name, str(scores["images"]), *cells, end_section=name == list(kinds)[-1])
    return table


def predict(
    checkpoint_uri: str,
    images_uri: str,
    out: str,
    tta: bool = False,
    threshold: float = 0.5,
    bits: int | None = None,
) -> dict[str, Any]:
    """Segment images of any size; writes masks/, overlays/, cells.csv and recipe.yaml into `out`.

    8-bit images are taken as they are. 16-bit ones are scaled so that their median becomes 128, as LIVECell's
    background is, or by 2^(8 - bits) where `bits` is given; the factor stands in cells.csv as `gain`. Of colour
    images the luma is used. An image that cannot be read is named in cells.csv and does not stop the rest.

    Args:
        checkpoint_uri: a checkpoint's folder, or a run's (then its best).
        images_uri: a folder, searched through and through, or one image file: TIFF, PNG, JPEG or BMP.
        out: URI of a folder. Masks and overlays lie in it as the images do in theirs.
        tta: average the probabilities of the four flips.
        threshold: a pixel is cell where its probability is over it, between 0 and 1.
        bits: used bits of 16-bit images, for a network trained on such.

    Returns:
        {"images", "segmented", "failed": [{"file", "error"}], "area_share" (mean over images), "seconds", "out"}.

    Raises:
        UserError: no checkpoint, no image there, or none that can be read.
    """
    if not 0 < threshold < 1:
        raise UserError(f"--threshold {threshold}: give a probability between 0 and 1, such as 0.5")
    if bits is not None and not 8 <= bits <= 16:
        raise UserError(f"--bits {bits}: give the used bits of 16-bit images, 8 to 16")
    begin = time.monotonic()
    folder, out = checkpoint.find(storage.absolute(checkpoint_uri)), storage.absolute(out).rstrip("/")
    recipe = recipes.load(storage.join(folder, checkpoint.RECIPE))
    root, files = _image_files(storage.absolute(images_uri).rstrip("/"), out)
    names = dict(zip(files, output_names(files)))
    runtime.connect()
    job = Segmentation(root, out, names, tta, threshold, bits)
    storage.write_bytes(storage.join(out, "recipe.yaml"), recipes.dump(recipe).encode())  # before the work: may we?
    rows = actors.run(_Segmenter, {"folder": folder, "job": job}, files, "predict")
    storage.write_bytes(storage.join(out, "cells.csv"), _csv(rows))
    failed = [{"file": row["item"], "error": row["error"]} for row in rows if row["error"]]
    for failure in failed:
        console.print(f"not segmented: {failure['file']}: {failure['error']}", markup=False)
    if len(failed) == len(rows):
        raise UserError(
            f"none of the {len(rows)} images at {images_uri} can be read: {failed[0]['error']}; see {out}/cells.csv"
        )
    shares = [row["area_share"] for row in rows if not row["error"]]
    summary = {"images": len(rows), "segmented": len(shares), "failed": failed, "area_share": float(np.mean(shares))}
    console.print(f"{len(shares)} of {len(rows)} images segmented: {out}/cells.csv, masks/, overlays/", markup=False)
    return {**summary, "seconds": time.monotonic() - begin, "out": out}


def output_names(files: Sequence[str]) -> list[str]:
    """Where the mask and the overlay of each of `files` go, relative: the folders stay, the suffix becomes .png.

    Where two files would then share a name (a.tif and a.png, or A.tif and a.tif on a disk that ignores case), all keep
    their suffix before it, so that the names of one run follow one rule.
    """
    short = [posixpath.splitext(file)[0] + ".png" for file in files]
    clash = any(n > 1 for n in Counter(name.lower() for name in short).values())
    return [file + ".png" for file in files] if clash else short


def to_uint8(pixels: np.ndarray, bits: int | None) -> tuple[np.ndarray, float]:
    """A stored image as the network takes it, uint8 (H, W), and the factor it was scaled by; see `predict`."""
    if pixels.dtype == np.uint8:
        return pixels, 1.0
    if bits is not None:
        return images.to_uint8(pixels, bits), 2.0 ** (8 - bits)
    # Of an image that is mostly black the median says nothing: its used range becomes 0 to 255.
    median, top = float(np.median(pixels)), float(pixels.max())
    gain = BACKGROUND / median if median else 255 / max(top, 1.0)
    return np.clip(np.rint(pixels * gain), 0, 255).astype(np.uint8), gain


@dataclass(frozen=True)
class Segmentation:
    """What every actor of `predict` is told."""

    root: str
    out: str
    names: dict[str, str]
    """Output name of each file, both relative."""
    tta: bool
    threshold: float
    bits: int | None


class _Network:
    """A network in an actor."""

    def __init__(self, folder: str) -> None:
        actors.use_threads()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.network, _ = segment.load(folder, device)


class _Scorer(_Network):
    """Sample ids -> a row of counts each."""

    def __init__(self, folder: str, rows: tuple[shards.Row, ...], tta: bool) -> None:
        super().__init__(folder)
        self.rows, self.tta = rows, tta

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        return _columns([self._score(int(item)) for item in batch["item"]])

    def _score(self, item: int) -> Row:
        sample = shards.read_row(self.rows[item], ["file_name", "cell_type", "image", "foreground"])
        image, truth = (torch.from_numpy(sample[name].copy())[None] for name in ("image", "foreground"))
        logits = segment.logits(self.network, image, self.tta)
        counts = metrics.pixel_counts(logits, truth.to(logits.device))[0].tolist()
        about = {name: sample[name] for name in ("file_name", "cell_type", "height", "width")}
        scores = {"dice": metrics.dice(counts), "iou": metrics.iou(counts)}
        return {"item": item, **about, **dict(zip(metrics.COUNTS, counts)), **scores}


class _Segmenter(_Network):
    """Image files -> mask and overlay on disk, and a row of cells.csv each."""

    def __init__(self, folder: str, job: Segmentation) -> None:
        super().__init__(folder)
        self.job = job

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        return _columns([self._segment(str(item)) for item in batch["item"]])

    def _segment(self, file: str) -> Row:
        try:
            pixels = images.decode(storage.read_bytes(storage.join(self.job.root, file))).pixels
        except (images.UnreadableImageError, OSError) as error:
            return {"item": file, **UNREAD, "error": " ".join(str(error).split())}
        image, gain = to_uint8(pixels, self.job.bits)
        mask = segment.probability(self.network, image, self.job.tta) > self.job.threshold
        where = {"mask": f"masks/{self.job.names[file]}", "overlay": f"overlays/{self.job.names[file]}"}
        drawn = overlay.overlay(image, None, mask)
        storage.write_bytes(storage.join(self.job.out, where["mask"]), overlay.png(mask.astype(np.uint8) * 255))
        storage.write_bytes(storage.join(self.job.out, where["overlay"]), overlay.png(drawn))
        found = {"foreground_pixels": int(mask.sum()), "area_share": float(mask.mean()), "regions": _regions(mask)}
        return {
            "item": file,
            "height": mask.shape[0],
            "width": mask.shape[1],
            **found,
            "gain": gain,
            "error": "",
            **where,
        }


def _regions(mask: np.ndarray) -> int:
    """Connected parts of the mask (8-neighbours); cells that touch are one."""
    return int(cv2.connectedComponents(mask.astype(np.uint8))[0]) - 1


def _columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def _image_files(uri: str, out: str) -> tuple[str, list[str]]:
    """The folder of the images and their paths in it; what lies in `out` is a result, not an input."""
    filesystem, path = storage.open_uri(uri)
    if filesystem.get_file_info(path).type == pafs.FileType.File:
        root, _, name = uri.rpartition("/")
        return root or "/", [name]
    inside = out.removeprefix(uri + "/") + "/" if out.startswith(uri + "/") else None
    files = [file for file in sources.list_files(uri) if images.is_image_name(file)]
    files = [file for file in files if inside is None or not file.startswith(inside)]
    if not files:
        raise UserError(f"no images at {uri}; give a folder of TIFF, PNG, JPEG or BMP files, or one such file")
    return uri, files


def _csv(rows: Sequence[Row]) -> bytes:
    """cells.csv: a row an image; numbers of an image that was not segmented are empty."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, CSV_COLUMNS, lineterminator="\n", extrasaction="ignore", restval="")
    writer.writeheader()
    for row in rows:
        writer.writerow({"file": row["item"], "error": row["error"]} if row["error"] else {"file": row["item"], **row})
    return buffer.getvalue().encode()


def _provenance(data: str) -> dict[str, Any]:
    """What was scored: the dataset's address, name, licence, and the hash of its dataset.json, so of its shards."""
    description = shards.load_description(data)
    fingerprint = _sha256(storage.join(data, "dataset.json"))
    return {"uri": data, "sha256": fingerprint, "name": description.get("name"), "licence": description.get("licence")}


def _sha256(uri: str) -> str:
    return hashlib.sha256(storage.read_bytes(uri)).hexdigest()


def _score(scores: dict[str, Any], statistic: str) -> str:
    interval = scores["intervals"][statistic]
    spread = f" ({interval[0]:.3f}-{interval[1]:.3f})".replace("0.", ".") if interval else ""
    return f"{scores[statistic]:.3f}{spread}"
