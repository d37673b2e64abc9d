"""Every defect that real copies of LIVECell hold, planted in a synthetic dataset where `prepare` must find it.

One frame a defect, in the order of `DEFECTS`; frames further on stay sound. Two shapes of record that are no
defect, several polygons in one and run-length encoding, are planted too. OUT/planted.json names all.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from raylivecell.synthetic.cell_shapes import HEIGHT, KINDS, WIDTH
from raylivecell.synthetic.layout import Frame, encode_tiff, file_name, image_entry, image_path

DEFECTS = (
    "leak",
    "duplicate_entry",
    "identical_pixels",
    "no_annotations",
    "few_annotations",
    "doubled_contour",
    "missing_file",
    "unlisted_file",
    "unreadable_image",
    "colour_image",
    "sixteen_bit_image",
    "wrong_size",
    "out_of_bounds",
    "degenerate_polygon",
    "leak",
)
SHAPES = ("several_polygons", "rle")
LEAST_IMAGES = 24
FEW = 3
"""Cells left of hundreds in a nearly unannotated image (LIVECell issue 21: 1 to 10)."""

Annotations = list[dict[str, Any]]


@dataclass
class Planted:
    """A frame with a defect (or a shape): where the JSON lists it and what was done to its records and its file."""

    name: str
    frame: "Frame"
    listings: list[tuple[str, dict[str, Any]]]
    annotation_ids: list[int] = field(default_factory=list)

    def apply(self, annotations: Annotations) -> Annotations:
        """Damages the frame's file, which is written by now, and returns its records, damaged."""
        if self.name in _FILES:
            _FILES[self.name](Path(self.frame.path))
        for split, entry in self.listings:
            copy = Path(_path(self.frame, split, entry["file_name"]))
            if not copy.exists() and self.name != "missing_file":
                shutil.copyfile(self.frame.path, copy)
        if self.name not in _RECORDS:
            return annotations
        changed, self.annotation_ids = _RECORDS[self.name](annotations)
        return changed


def plan(frames: list["Frame"]) -> dict[int, Planted]:
    """The frames to damage, by index: one for each of `DEFECTS`, then of `SHAPES`."""
    return {
        frame.index: Planted(name, frame, _listings(name, frame, len(frames)))
        for name, frame in zip(DEFECTS + SHAPES, frames)
    }


def report(planted: dict[int, Planted]) -> dict[str, list[dict[str, Any]]]:
    """What OUT/planted.json holds: `defects` and `shapes`, each with file name, split, image and annotation ids."""
    found: dict[str, list[dict[str, Any]]] = {"defects": [], "shapes": []}
    for item in planted.values():
        group, key = ("shapes", "shape") if item.name in SHAPES else ("defects", "defect")
        found[group].append(
            {
                key: item.name,
                "file_name": item.frame.file_name,
                "split": item.frame.split,
                "listed": [
                    {"split": split, "image_id": entry["id"], "file_name": entry["file_name"]}
                    for split, entry in item.listings
                ],
                "annotation_ids": item.annotation_ids,
            }
        )
    return found


def _path(frame: "Frame", split: str, name: str) -> str:
    return image_path(frame.out, split, name)


def _listings(name: str, frame: "Frame", images: int) -> list[tuple[str, dict[str, Any]]]:
    """(split, image entry) pairs under which the JSON files list the frame; the first is its own."""
    own = frame.split, image_entry(frame.image_id, frame.file_name)
    copy = frame.image_id + 1000
    if name == "unlisted_file":
        return []
    if name == "leak":
        other = "val" if frame.split == "train" else "train"
        return [own, (other, image_entry(copy, frame.file_name))]
    if name == "duplicate_entry":
        return [own, (frame.split, image_entry(copy, frame.file_name))]
    if name == "identical_pixels":
        # A name that no frame of this dataset has.
        renamed = file_name(frame.seed, frame.kind, frame.index // len(KINDS) + images)
        return [own, (frame.split, image_entry(copy, renamed))]
    return [own]


def _truncate(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 3])


def _read(path: Path) -> np.ndarray:
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert image is not None, path
    return image


def _write(path: Path, image: np.ndarray) -> None:
    path.write_bytes(encode_tiff(image))


def _colour(path: Path) -> None:
    grey = _read(path)
    _write(path, np.stack([np.clip(grey.astype(int) + shift, 0, 255) for shift in (-6, 0, 9)], axis=2).astype(np.uint8))


def _sixteen(path: Path) -> None:
    _write(path, _read(path).astype(np.uint16) * 257)


def _crop(path: Path) -> None:
    _write(path, np.ascontiguousarray(_read(path)[: HEIGHT - 8, : WIDTH - 24]))


_FILES: dict[str, Callable[[Path], None]] = {
    "missing_file": Path.unlink,
    "unreadable_image": _truncate,
    "colour_image": _colour,
    "sixteen_bit_image": _sixteen,
    "wrong_size": _crop,
}


def _none(annotations: Annotations) -> tuple[Annotations, list[int]]:
    return [], []


def _few(annotations: Annotations) -> tuple[Annotations, list[int]]:
    return annotations[:FEW], _ids(annotations[:FEW])


def _doubled(annotations: Annotations) -> tuple[Annotations, list[int]]:
    """Three cells drawn twice, the second time a third of a pixel aside, as two annotators would."""
    again = [_shifted(annotation, 0.33, -0.33) for annotation in _largest(annotations, 3)]
    return _numbered(annotations, again)


def _outside(annotations: Annotations) -> tuple[Annotations, list[int]]:
    """One cell moved half over the right edge, one entirely out."""
    first, second = _largest(annotations, 2)
    moved = {
        first["id"]: _shifted(first, WIDTH - first["bbox"][0] - first["bbox"][2] / 2, 0),
        second["id"]: _shifted(second, 0, HEIGHT + 20 - second["bbox"][1]),
    }
    return [moved.get(annotation["id"], annotation) for annotation in annotations], list(moved)


def _degenerate(annotations: Annotations) -> tuple[Annotations, list[int]]:
    """Two points, three points in a line, and no polygon at all."""
    shapes: list[list[list[float]]] = [[[10.0, 10.0, 14.0, 14.0]], [[20.0, 20.0, 24.0, 24.0, 28.0, 28.0]], []]
    added = [{**annotations[0], "segmentation": shape, "area": 0.0, "bbox": [10.0, 10.0, 0.0, 0.0]} for shape in shapes]
    return _numbered(annotations, added)


def _several(annotations: Annotations) -> tuple[Annotations, list[int]]:
    """The two largest cells in one record."""
    first, second = _largest(annotations, 2)
    merged = {**first, "segmentation": first["segmentation"] + second["segmentation"]}
    merged["area"] = first["area"] + second["area"]
    low = np.minimum(first["bbox"][:2], second["bbox"][:2])
    high = np.maximum(np.add(first["bbox"][:2], first["bbox"][2:]), np.add(second["bbox"][:2], second["bbox"][2:]))
    merged["bbox"] = [round(float(value), 2) for value in (*low, *(high - low))]
    kept = [annotation for annotation in annotations if annotation["id"] not in (first["id"], second["id"])]
    return [*kept, merged], [first["id"]]


def _rle(annotations: Annotations) -> tuple[Annotations, list[int]]:
    """Two cells as run lengths: one compressed (a string), one as COCO's plain list of counts."""
    first, second = _largest(annotations, 2)
    packed = coco_mask.merge(coco_mask.frPyObjects(first["segmentation"], HEIGHT, WIDTH))
    drawn = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(second["segmentation"], HEIGHT, WIDTH)))
    flat = drawn.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges.tolist(), flat.size]).tolist()
    # Runs start with zeros; an empty run says that the first pixel is set.
    plain = [0, *counts] if flat[0] else counts
    changed = {
        first["id"]: {"size": [HEIGHT, WIDTH], "counts": packed["counts"].decode("ascii")},
        second["id"]: {"size": [HEIGHT, WIDTH], "counts": plain},
    }
    records = [{**a, "segmentation": changed.get(a["id"], a["segmentation"])} for a in annotations]
    return records, list(changed)


_RECORDS = {
    "no_annotations": _none,
    "few_annotations": _few,
    "doubled_contour": _doubled,
    "out_of_bounds": _outside,
    "degenerate_polygon": _degenerate,
    "several_polygons": _several,
    "rle": _rle,
}


def _ids(annotations: Annotations) -> list[int]:
    return [annotation["id"] for annotation in annotations]


def _largest(annotations: Annotations, count: int) -> Annotations:
    return sorted(annotations, key=lambda annotation: (-annotation["area"], annotation["id"]))[:count]


def _shifted(annotation: dict[str, Any], right: float, down: float) -> dict[str, Any]:
    moved = [[round(v + (down if i % 2 else right), 2) for i, v in enumerate(p)] for p in annotation["segmentation"]]
    x, y, *size = annotation["bbox"]
    return {**annotation, "segmentation": moved, "bbox": [round(x + right, 2), round(y + down, 2), *size]}


def _numbered(annotations: Annotations, added: Annotations) -> tuple[Annotations, list[int]]:
    """`added` behind `annotations`, with the ids that follow."""
    last = max(_ids(annotations))
    fresh = [{**annotation, "id": last + number} for number, annotation in enumerate(added, 1)]
    return annotations + fresh, _ids(fresh)
