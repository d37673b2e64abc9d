"""One image file -> what it holds (`examine`); images and their annotations -> a finished shard (`write_part`).

Plain functions of JSON-able jobs, run by `prepare` as Ray Data tasks.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np

from raylivecell.annotations.coco import CellRecord, decode_cells
from raylivecell.annotations.drawing import border_map, draw_labels, hidden_cells, rasterise
from raylivecell.annotations.rle import encode, encode_patch
from raylivecell.core import storage
from raylivecell.core.errors import UserError
from raylivecell.data import shards
from raylivecell.data.cell_defects import check_cells
from raylivecell.data.defects import DefectRules, ImageInfo, rule_of, visible_pixels
from raylivecell.images import formats, grey_levels, intensity
from raylivecell.images.intensity import Intensity


def examine(uri: str) -> ImageInfo:
    """What the image file at `uri` holds."""
    data = storage.read_bytes(uri)
    try:
        picture = formats.decode(data)
    except formats.UnreadableImageError as error:
        return ImageInfo(error=str(error), sha256=hashlib.sha256(data).hexdigest())
    pixels = np.ascontiguousarray(picture.pixels)
    measures = grey_levels.measure(pixels, grey_levels.padding_mask(pixels))
    return ImageInfo(
        sha256=hashlib.sha256(data).hexdigest(),
        pixels_sha256=hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest(),
        height=pixels.shape[0],
        width=pixels.shape[1],
        colour=picture.colour,
        measures=tuple(measures),
        deep=picture.deep,
        visible=visible_pixels(intensity.apply(pixels, intensity.choose([measures]))),
    )


def write_part(job: dict[str, Any], rules: DefectRules) -> dict[str, Any]:
    """Draw and write one shard, then its account: the same bytes whenever and wherever it is run.

    Args:
        job: `source`, `out`, `file` (of the shard, under `out`), `cells` and `account` (URIs), `split`,
            `intensity` (the set's rule), `border_sigma`, and `images`: a dict an image.
        rules: what to do with defective cells.

    Returns:
        The account: the shard's file, rows, bytes and checksum, statistics per image and of the pixels, defects found.
    """
    cv2.setNumThreads(1)  # tasks share the machine's cores
    account: dict[str, Any] = {"file": job["file"], "images": [], "histogram": [0] * 256, "areas": {}, "found": []}
    payloads = storage.read_bytes(job["cells"])
    written = shards.write_shard(storage.join(job["out"], job["file"]), _rows(job, payloads, rules, account))
    account |= written
    storage.write_json(job["account"], account)
    return account


def _rows(
    job: dict[str, Any], payloads: bytes, rules: DefectRules, account: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """The rows of one shard; adds each image's statistics and defects to `account`."""
    histogram = np.zeros(256, np.int64)
    start = 0
    rule = Intensity.model_validate(job["intensity"])
    for image in job["images"]:
        records = decode_cells(payloads[start : start + image["cells_bytes"]])
        start += image["cells_bytes"]
        frame = intensity.to_uint8(_pixels(job, image), rule)
        row = draw_sample(frame.levels, image, records, rules, job["border_sigma"], account["found"])
        if row is None:
            continue
        row["padding"] = b"" if frame.padding is None else encode(frame.padding.astype(np.uint16))[0]["counts"]
        histogram += np.bincount(row["image"].ravel(), minlength=256)
        areas = Counter(account["areas"].get(image["cell_type"], {}))
        areas.update(str(area) for area in np.bincount(row["labels"].ravel())[1:].tolist() if area)
        account["areas"][image["cell_type"]] = dict(sorted(areas.items()))
        account["images"].append(
            {
                "cell_type": image["cell_type"],
                "cells": row["cells"],
                "foreground": int(row["foreground"].sum()),
                "pixels": frame.own_pixels,
                "size": list(row["foreground"].shape),
            }
        )
        yield row
    account["histogram"] = histogram.tolist()


def _pixels(job: dict[str, Any], image: dict[str, Any]) -> np.ndarray:
    """The image's stored pixels, uint8 or uint16 (H, W); UserError where the file is not the one that was examined."""
    uri = storage.join(job["source"], image["path"])
    data = storage.read_bytes(uri)
    if hashlib.sha256(data).hexdigest() != image["sha256"]:
        raise UserError(f"{uri} changed while it was being prepared; run `raylivecell prepare` again")
    return formats.decode(data).pixels


def draw_sample(
    pixels: np.ndarray,
    image: dict[str, Any],
    records: list[CellRecord],
    rules: DefectRules,
    border_sigma: float,
    found: list[dict[str, Any]],
) -> dict[str, Any] | None:
    """One row of the dataset; None where no cell can be used and images without cells are dropped.

    Args:
        pixels: uint8 (H, W).
        image: `file_name`, `split`, `cell_type`, `path`, `sha256`, `annotation`, `id`, `scale` (x, y).
        records: its annotations.
        rules: what to do with defective cells.
        border_sigma: width of the border map in pixels.
        found: the defects found are added to it.
    """
    shape = (pixels.shape[0], pixels.shape[1])
    scale = (image["scale"][0], image["scale"][1])
    cells, ids, defects = check_cells(records, shape, scale, rules, image["split"])
    patches = [rasterise(cell, shape) for cell in cells]
    labels = draw_labels(patches, shape)
    hidden = hidden_cells(labels, len(patches))
    if hidden:
        defects["hidden_cell"] = [(ids[index], "") for index in hidden]
        scored = rule_of(rules, "hidden_cell", image["split"]) != "drop"
        hidden = [index for index in hidden if not (scored and patches[index].mask.any())]
        labels = _renumbered(labels, hidden, len(patches))
        patches = [patch for index, patch in enumerate(patches) if index not in set(hidden)]
    for defect, members in defects.items():
        found.append(_found(defect, rules, image, [identity for identity, _ in members], _details(members)))
    count = len(patches)
    if records and not count:
        rule = rule_of(rules, "no_annotations", "train")  # in test too: its cells are no background
        none = _found("no_annotations", rules, image, [image["id"]], "no annotation left that can be drawn")
        found.append(none | {"rule": rule})
        if rule == "drop":
            return None
    return {
        "file_name": image["file_name"],
        "cell_type": image["cell_type"],
        "height": shape[0],
        "width": shape[1],
        "image": pixels,
        "labels": labels,
        "foreground": (labels > 0).astype(np.uint8),
        "border": border_map(labels, border_sigma),
        "cells": count,
        "outlines": [encode_patch(patch.mask, patch.top, patch.left, shape)["counts"] for patch in patches],
        "source": image["path"],
        "sha256": image["sha256"],
        "annotation": f"{image['annotation']}#{image['id']}",
    }


def _details(members: list[tuple[int | str, str]]) -> str:
    return "; ".join(dict.fromkeys(detail for _, detail in members if detail))


def _renumbered(labels: np.ndarray, hidden: list[int], count: int) -> np.ndarray:
    """`labels` numbered 1.. without the cells (from 0) in `hidden`, in the same order."""
    table = np.zeros(count + 1, np.uint16)
    shown = np.setdiff1d(np.arange(count), np.array(hidden, np.int64))
    table[shown + 1] = np.arange(1, len(shown) + 1)
    return table[labels]


def _found(defect: str, rules: DefectRules, image: dict[str, Any], ids: list[int | str], detail: str) -> dict[str, Any]:
    return {
        "defect": defect,
        "rule": rule_of(rules, defect, image["split"]),
        "file_name": image["file_name"],
        "split": image["split"],
        "ids": ids,
        "detail": detail,
    }
