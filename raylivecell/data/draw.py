"""Ray Data tasks: examine one image file (`examine`), draw one shard (`draw_shard`)."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import cv2
import numpy as np

from raylivecell.annotations.coco import CellRecord, decode_cells
from raylivecell.annotations.drawing import Cell, Patch, border_map, draw_labels, hidden_cells, rasterise
from raylivecell.annotations.rle import encode, encode_patch
from raylivecell.core import storage
from raylivecell.core.errors import UserError
from raylivecell.data import shards
from raylivecell.data.cell_defects import CheckedCells, check_cells, is_region
from raylivecell.data.config import Rules, rule_of
from raylivecell.data.defects import Defect, ImageInfo
from raylivecell.data.description import ImageStatistics, ShardAccount
from raylivecell.data.paired_source import read_cells
from raylivecell.data.plan import ImagePlan, ShardTask
from raylivecell.images import formats, grey_levels, intensity, planes, scale
from raylivecell.images.planes import EVERYTHING, Choice

VISIBLE_STD = 4.0
"""Local standard deviation, in grey levels, above which a pixel looks like a cell."""


def examine(uri: str, choice: Choice = EVERYTHING) -> ImageInfo:
    """Return the properties of the image file at `uri`, or of the chosen plane of a file with several."""
    data = storage.read_bytes(uri)
    try:
        file = formats.ImageFile(data)
        decoded = file.decode(choice)
    except formats.UnreadableImageError as error:
        return ImageInfo(error=str(error), sha256=hashlib.sha256(data).hexdigest())
    pixels = np.ascontiguousarray(decoded.pixels)
    measures = grey_levels.measure(pixels, grey_levels.padding_mask(pixels))
    return ImageInfo(
        sha256=hashlib.sha256(data).hexdigest(),
        pixels_sha256=hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest(),
        height=pixels.shape[0],
        width=pixels.shape[1],
        colour=decoded.colour,
        measures=tuple(measures),
        deep=decoded.deep,
        visible=visible_pixels(intensity.apply(pixels, intensity.choose([measures]))),
        place=planes.place_of(file.positions, file.select(choice)[0]),
    )


def visible_pixels(image: np.ndarray) -> int:
    """Count the pixels of a uint8 (H, W) image that look like cells: standard deviation in 9 x 9 over 4 grey levels.

    The threshold is 3 times the standard deviation of the background (10th percentile) if that is higher. On 14 real
    LIVECell images, with backgrounds of 0.8 to 1.2, annotated cells cover 0.43 to 1.3 times this number of pixels.
    """
    values = image.astype(np.float32)
    mean = cv2.blur(values, (9, 9))
    variance = cv2.blur(values * values, (9, 9)) - mean * mean
    background = float(np.percentile(variance[::4, ::4], 10))
    return int(np.count_nonzero(variance > max(VISIBLE_STD**2, 9 * background)))


def draw_shard(task: ShardTask) -> ShardAccount:
    """Draw and write one shard, then its account; the bytes are the same for every run and machine."""
    cv2.setNumThreads(1)  # tasks share the machine's cores
    account = ShardAccount(task.plan.split, task.plan.file)
    scaled = any(image.pixel_scale != 1 for image in task.plan.images)
    rows = _rows(task, storage.read_bytes(task.cells_uri), account)
    written = shards.write_shard(task.shard_uri, rows, scaled, task.has_regions)
    account.rows, account.bytes, account.sha256 = written["rows"], written["bytes"], written["sha256"]
    storage.write_json(task.account_uri, asdict(account))
    return account


def _rows(task: ShardTask, encoded_cells: bytes, account: ShardAccount) -> Iterator[shards.Sample]:
    """Yield the rows of one shard; add the statistics and defects of each image to `account`."""
    histogram = np.zeros(256, np.int64)
    start = 0
    for image, length in zip(task.plan.images, task.cell_bytes, strict=True):
        pixels, plane = _read_pixels(task.source, image, task.choice)
        if image.pair is None:
            records = decode_cells(encoded_cells[start : start + length])
        else:
            shape = (pixels.shape[0], pixels.shape[1])
            records = read_cells(task.source, image.pair, image.annotation_sha256, shape, task.rules, task.ignore)
        start += length
        stored = intensity.to_uint8(pixels, task.intensity)
        frame = scale.resize_frame(stored, image.pixel_scale)
        row = draw_sample(frame.levels, image, records, task.rules, task.border_sigma, account.defects, plane)
        if row is None:
            continue
        ignored = row["ignore"]
        row["padding"], row["ignore"] = _counts(frame.padding), _counts(ignored)
        if image.pixel_scale != 1:
            row["original_height"], row["original_width"] = stored.levels.shape
        histogram += np.bincount(row["image"].ravel(), minlength=256)
        areas = Counter(account.areas.get(image.cell_type, {}))
        cell_areas = [area for area in np.bincount(row["labels"].ravel())[1:].tolist() if area]
        areas.update(str(area) for area in cell_areas)
        account.areas[image.cell_type] = dict(sorted(areas.items()))
        foreground = row["foreground"]
        account.images.append(
            ImageStatistics(
                image.cell_type,
                row["cells"],
                int(foreground.sum()),
                frame.own_pixels,
                list(foreground.shape),
                float(np.median(scale.diameter_of(cell_areas))) if cell_areas else 0.0,
                _count(ignored, frame.padding),
            )
        )
        yield row
    account.histogram = histogram.tolist()


def _counts(mask: np.ndarray | None) -> bytes:
    """Encode a mask (H, W) as COCO's RLE counts; b"" for None or a mask without a pixel."""
    return encode(mask.astype(np.uint16))[0]["counts"] if mask is not None and mask.any() else b""


def _count(ignored: np.ndarray | None, padding: np.ndarray | None) -> int:
    """Count the ignored pixels that are not padding; both (H, W)."""
    if ignored is None:
        return 0
    return int(np.count_nonzero(ignored if padding is None else ignored & ~padding))


def _read_pixels(source: str, image: ImagePlan, choice: Choice) -> tuple[np.ndarray, str]:
    """Return stored pixels, uint8 or uint16 (H, W), and the plane's name; UserError if the file was changed."""
    uri = storage.join(source, image.path)
    data = storage.read_bytes(uri)
    if hashlib.sha256(data).hexdigest() != image.sha256:
        raise UserError(f"{uri} changed while it was being prepared; run `raylivecell prepare` again")
    file = formats.ImageFile(data)
    return file.decode(choice).pixels, file.names[file.select(choice)[0]]


def draw_sample(
    pixels: np.ndarray,
    image: ImagePlan,
    records: list[CellRecord],
    rules: Rules,
    border_sigma: float,
    defects: list[Defect],
    plane: str = "",
) -> shards.Sample | None:
    """Return one row of the dataset, with `ignore` as bool (H, W) or None; no `padding`.

    Returns None if no cell is usable and images without cells are dropped.

    Args:
        pixels: uint8 (H, W).
        image: its plan.
        records: its annotations.
        rules: rule by kind of defect.
        border_sigma: width of the border map in pixels.
        defects: receives the defects of the image.
        plane: name of the plane (`planes.names`); "" for the only one of its file.
    """
    shape = (pixels.shape[0], pixels.shape[1])
    checked = check_cells(records, shape, image.scale, rules, image.split)
    patches = [rasterise(cell, shape) for cell in checked.cells]
    labels = draw_labels(patches, shape)
    if hidden := hidden_cells(labels, len(patches)):
        labels, patches = _without_hidden(labels, patches, hidden, checked, image, rules)
    for kind, cells in checked.defects.items():
        detail = "; ".join(dict.fromkeys(text for _, text in cells if text))
        ids = [cell_id for cell_id, _ in cells]
        defects.append(Defect(kind, rule_of(rules, kind, image.split), image.file_name, image.split, ids, detail))
    listed = [record for record in records if not record.region]
    if listed and not patches:
        # Also in test, because the cells are not background, unless they are ignored.
        only_regions = all(is_region(record, rules) for record in listed)
        rule = rule_of(rules, "no_annotations", image.split if only_regions else "train")
        detail = "no annotation left that can be drawn"
        defects.append(Defect("no_annotations", rule, image.file_name, image.split, [image.id], detail))
        if rule == "drop":
            return None
    return {
        "file_name": image.file_name,
        "cell_type": image.cell_type,
        "height": shape[0],
        "width": shape[1],
        "image": pixels,
        "labels": labels,
        "foreground": (labels > 0).astype(np.uint8),
        "border": border_map(labels, border_sigma),
        "cells": len(patches),
        "outlines": [encode_patch(patch.mask, patch.top, patch.left, shape)["counts"] for patch in patches],
        "ignore": _ignored_pixels(checked.regions, labels),
        "source": planes.address(image.path, plane),
        "sha256": image.sha256,
        "annotation": f"{image.annotation}#{image.id}",
    }


def _without_hidden(
    labels: np.ndarray,
    patches: list[Patch],
    hidden: list[int],
    checked: CheckedCells,
    image: ImagePlan,
    rules: Rules,
) -> tuple[np.ndarray, list[Patch]]:
    """Add the cells `hidden` below others to `checked.defects`; return labels and patches without those to drop."""
    shrunk = f"smaller than a pixel at a pixel scale of {image.pixel_scale:.3g}" if image.pixel_scale < 1 else ""
    checked.defects["hidden_cell"] = [
        (checked.ids[index], "" if patches[index].mask.any() else shrunk) for index in hidden
    ]
    scored = rule_of(rules, "hidden_cell", image.split) != "drop"
    dropped = [index for index in hidden if not (scored and patches[index].mask.any())]
    remaining = [patch for index, patch in enumerate(patches) if index not in set(dropped)]
    return _without_labels(labels, dropped, len(patches)), remaining


def _ignored_pixels(regions: Sequence[Cell], labels: np.ndarray) -> np.ndarray | None:
    """Return the pixels of the regions that are in no cell of `labels` (H, W), bool (H, W); None without a region."""
    if not regions:
        return None
    shape = (labels.shape[0], labels.shape[1])
    ignored = np.zeros(shape, np.bool_)
    for top, left, mask in (rasterise(region, shape) for region in regions):
        ignored[top : top + mask.shape[0], left : left + mask.shape[1]] |= mask != 0
    return ignored & (labels == 0)


def _without_labels(labels: np.ndarray, removed: list[int], count: int) -> np.ndarray:
    """Return `labels` without the cells (indices from 0) in `removed`, renumbered from 1 in the same order."""
    table = np.zeros(count + 1, np.uint16)
    remaining = np.setdiff1d(np.arange(count), np.array(removed, np.int64))
    table[remaining + 1] = np.arange(1, len(remaining) + 1)
    return table[labels]
