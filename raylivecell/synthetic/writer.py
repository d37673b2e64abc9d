"""Synthetic LIVECell: phase-contrast-like images of eight cell lines, in LIVECell's layout and JSON.

    OUT/images/livecell_train_val_images/*.tif      520 x 704, 8 bit, LZW with predictor
    OUT/images/livecell_test_images/*.tif
    OUT/annotations/LIVECell/livecell_coco_{train,val,test}.json
    OUT/synthetic.json                              the arguments; `complete` becomes true at the end
    OUT/planted.json                                with --defects: the defects that `prepare` must detect

Image i depends only on (seed, i): its cell line, split, name, ids, pixels and polygons depend neither on the number of
images nor on the process that draws it. Cell lines alternate; the images of each are distributed 11 : 2 : 5 over train,
val and test.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from raylivecell.core import storage
from raylivecell.core.errors import UserError
from raylivecell.core.process_settings import opencv_threads
from raylivecell.synthetic import planted_defects
from raylivecell.synthetic.cell_shapes import KINDS, Bytes, Mask, draw_frame_masks, polygon
from raylivecell.synthetic.layout import SPLITS, Frame, encode_tiff, image_entry, json_path
from raylivecell.synthetic.optics import render

DRAWING = 1
"""Version of the drawing code: increase it when the pixels for a seed change."""
INFO = {
    "year": "2026",
    "version": str(DRAWING),
    "description": "raylivecell synthetic cells in LIVECell's layout",
    "contributor": "raylivecell",
    "url": "",
    "date_created": "2026/01/01",
}
LICENCES = [{"id": 1, "name": "CC0 1.0 Universal", "url": "https://creativecommons.org/publicdomain/zero/1.0/"}]
CATEGORIES = [{"supercategory": "cell", "id": 1, "name": "cell"}]

Mapper = Callable[[Callable[["Frame"], list[dict[str, Any]]], Sequence["Frame"]], Iterable[list[dict[str, Any]]]]


def draw_frame(seed: int, index: int) -> tuple[Bytes, list[Mask]]:
    """Draw the pixels (520, 704) uint8 of image `index` and the masks of its cells."""
    rng = np.random.default_rng((seed, 1, index))
    kind = KINDS[Frame("", seed, index).kind]
    with opencv_threads(1):
        masks = draw_frame_masks(kind, rng)
        return render(kind, masks, rng), masks


def draw_labels(seed: int, index: int) -> tuple[Bytes, NDArray[np.uint16]]:
    """Draw the pixels of image `index` and its label image, uint16 (520, 704); later cells are on top."""
    image, masks = draw_frame(seed, index)
    labels = np.zeros(image.shape, np.uint16)
    for number, mask in enumerate(masks, 1):
        labels[mask.window][mask.pixels > 0] = number
    return image, labels


def write_frame(frame: Frame) -> list[dict[str, Any]]:
    """Draw one image, write its TIFF and return its annotations."""
    image, masks = draw_frame(frame.seed, frame.index)
    storage.write_bytes(frame.path, encode_tiff(image))
    return [_annotation(frame.image_id, number, polygon(mask)) for number, mask in enumerate(masks, 1)]


def _annotation(image_id: int, number: int, points: list[float]) -> dict[str, Any]:
    x, y = np.array(points[::2]), np.array(points[1::2])
    area = 0.5 * abs(float(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))))
    low, size = (float(x.min()), float(y.min())), (float(np.ptp(x)), float(np.ptp(y)))
    return {
        "id": image_id + number,
        "image_id": image_id,
        "category_id": 1,
        "segmentation": [points],
        "area": round(area, 4),
        "bbox": [*low, round(size[0], 2), round(size[1], 2)],
        "iscrowd": 0,
    }


def write_dataset(
    out: Path | str, images: int, seed: int, defects: bool = False, mapper: Mapper = map
) -> dict[str, Any]:
    """Write `images` synthetic images to the local folder `out`; the same `seed` gives the same bytes.

    Args:
        out: a folder that is absent, empty, or contains this dataset, complete (then nothing is done) or partial.
        images: number of images; image i is the same in a larger dataset.
        seed: at least 0.
        defects: also plant all defects that `prepare` must detect; needs 24 images; listed in OUT/planted.json.
        mapper: ordered `map(function, frames)`: the builtin, or `session.ordered_map` to draw on Ray.

    Returns:
        The content of OUT/synthetic.json: seed, images, defects, and per split the number of images and cells.
    """
    if images < 1 or seed < 0:
        raise UserError(f"cannot draw {images} images with seed {seed}: give 1 or more images and a seed of at least 0")
    if defects and images < planted_defects.MIN_IMAGES:
        raise UserError(f"{images} images are too few for all defects: give {planted_defects.MIN_IMAGES} or more")
    root = storage.absolute(out)
    arguments = {"drawing": DRAWING, "seed": seed, "images": images, "defects": defects}
    summary = _begin(root, arguments)
    if summary is not None:
        return summary
    frames = [Frame(root, seed, index) for index in range(images)]
    planted = planted_defects.plan(frames) if defects else {}
    splits = _write_annotations(root, frames, planted, mapper(write_frame, frames))
    if defects:
        storage.write_json(storage.join(root, "planted.json"), planted_defects.report(planted))
    result = {**arguments, "complete": True, "splits": splits}
    storage.write_json(storage.join(root, "synthetic.json"), result)
    return result


def _begin(root: str, arguments: dict[str, Any]) -> dict[str, Any] | None:
    """Return the summary of a dataset that is already complete; otherwise mark `root` as being written."""
    marker = storage.join(root, "synthetic.json")
    if storage.exists(marker):
        existing = storage.read_json(marker)
        if {key: existing.get(key) for key in arguments} != arguments:
            raise UserError(f"{root} contains another synthetic dataset: choose another --out or delete it")
        if existing.get("complete"):
            return dict(existing)
    elif storage.list_names(root):
        raise UserError(f"{root} is not empty and not a synthetic dataset: choose another --out")
    storage.write_json(marker, {**arguments, "complete": False})
    return None


def _write_annotations(
    root: str,
    frames: list[Frame],
    planted: dict[int, planted_defects.Planted],
    annotations_of_frames: Iterable[list[dict[str, Any]]],
) -> dict[str, dict[str, int]]:
    """Stream the annotations into the three JSON files, which are renamed after all are complete."""
    listings = [planted[frame.index].listings if frame.index in planted else _listing(frame) for frame in frames]
    splits = {split: {"images": 0, "cells": 0} for split in SPLITS}
    with ExitStack() as stack:
        writers = {}
        for split in SPLITS:
            entries = [entry for listing in listings for entry_split, entry in listing if entry_split == split]
            splits[split]["images"] = len(entries)
            writers[split] = stack.enter_context(_JsonWriter(json_path(root, split), entries))
        for frame, listing, annotations in zip(frames, listings, annotations_of_frames, strict=True):
            if frame.index in planted:
                annotations = planted[frame.index].apply(annotations)
            for copy, (split, entry) in enumerate(listing):
                writers[split].add(_copied(annotations, entry["id"]) if copy else annotations)
                splits[split]["cells"] += len(annotations)
        for writer in writers.values():
            writer.commit()
    return splits


def _listing(frame: Frame) -> list[tuple[str, dict[str, Any]]]:
    return [(frame.split, image_entry(frame.image_id, frame.file_name))]


def _copied(annotations: list[dict[str, Any]], image_id: int) -> Iterator[dict[str, Any]]:
    for number, annotation in enumerate(annotations, 1):
        yield {**annotation, "id": image_id + number, "image_id": image_id}


class _JsonWriter:
    """A COCO file, streamed under a temporary name; `commit` renames it; exit without `commit` deletes it."""

    def __init__(self, path: str, images: list[dict[str, Any]]):
        self.path, self.partial = Path(path), Path(path).with_name(f".{Path(path).name}.partial")
        self.partial.parent.mkdir(parents=True, exist_ok=True)
        self.stream: IO[str] = open(self.partial, "w", encoding="ascii")  # noqa: SIM115 (closed by __exit__)
        header = {"info": INFO, "licenses": LICENCES, "categories": CATEGORIES, "images": images}
        self.stream.write(json.dumps(header)[:-1] + ', "annotations": [')
        self.separator = ""

    def __enter__(self) -> "_JsonWriter":
        return self

    def add(self, annotations: Iterable[dict[str, Any]]) -> None:
        """Append records to `annotations`."""
        for annotation in annotations:
            self.stream.write(self.separator + json.dumps(annotation))
            self.separator = ", "

    def commit(self) -> None:
        """Complete the file, flush it to disk and rename it."""
        self.stream.write("]}\n")
        self.stream.flush()
        os.fsync(self.stream.fileno())
        os.replace(self.partial, self.path)

    def __exit__(self, *error: object) -> None:
        self.stream.close()
        self.partial.unlink(missing_ok=True)
