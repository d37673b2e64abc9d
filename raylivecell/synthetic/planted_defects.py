"""Plant all defects known from real copies of LIVECell in a synthetic dataset, for `prepare` to detect.

One image per defect, in the order of `DEFECTS`; later images have none. Two valid forms of records, several polygons
and run-length encoding, are also planted. OUT/planted.json lists all.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from raylivecell.annotations import rle
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
MIN_IMAGES = 24
FEW = 3
"""Number of annotated cells, of hundreds, in a nearly unannotated image (LIVECell issue 21: 1 to 10)."""

Annotations = list[dict[str, Any]]


@dataclass
class Planted:
    """An image with a defect (or a record form): its JSON entries and the changes to its records and its file."""

    name: str
    frame: "Frame"
    listings: list[tuple[str, dict[str, Any]]]
    annotation_ids: list[int] = field(default_factory=list)

    def apply(self, annotations: Annotations) -> Annotations:
        """Damage the image file, which must exist, and return its damaged records."""
        if self.name in _FILE_CHANGES:
            _FILE_CHANGES[self.name](Path(self.frame.path))
        for split, entry in self.listings:
            copy = Path(_path(self.frame, split, entry["file_name"]))
            if not copy.exists() and self.name != "missing_file":
                shutil.copyfile(self.frame.path, copy)
        if self.name not in _RECORD_CHANGES:
            return annotations
        changed, self.annotation_ids = _RECORD_CHANGES[self.name](annotations)
        return changed


def plan(frames: list["Frame"]) -> dict[int, Planted]:
    """Choose the images to damage, by index: one per entry of `DEFECTS`, then of `SHAPES`."""
    return {
        frame.index: Planted(name, frame, _listings(name, frame, len(frames)))
        for name, frame in zip(DEFECTS + SHAPES, frames)
    }


def report(planted: dict[int, Planted]) -> dict[str, list[dict[str, Any]]]:
    """Return OUT/planted.json: `defects` and `shapes`, each with file name, split, image and annotation ids."""
    groups: dict[str, list[dict[str, Any]]] = {"defects": [], "shapes": []}
    for item in planted.values():
        group, key = ("shapes", "shape") if item.name in SHAPES else ("defects", "defect")
        groups[group].append(
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
    return groups


def _path(frame: "Frame", split: str, name: str) -> str:
    return image_path(frame.out, split, name)


def _listings(name: str, frame: "Frame", images: int) -> list[tuple[str, dict[str, Any]]]:
    """Return the (split, image entry) pairs of an image in the JSON files; the first is the original."""
    original = frame.split, image_entry(frame.image_id, frame.file_name)
    copy = frame.image_id + 1000
    if name == "unlisted_file":
        return []
    if name == "leak":
        other = "val" if frame.split == "train" else "train"
        return [original, (other, image_entry(copy, frame.file_name))]
    if name == "duplicate_entry":
        return [original, (frame.split, image_entry(copy, frame.file_name))]
    if name == "identical_pixels":
        # A name that no other image of this dataset has.
        renamed = file_name(frame.seed, frame.kind, frame.index // len(KINDS) + images)
        return [original, (frame.split, image_entry(copy, renamed))]
    return [original]


def _truncate(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 3])


def _read(path: Path) -> np.ndarray:
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert image is not None, path
    return image


def _write(path: Path, image: np.ndarray) -> None:
    path.write_bytes(encode_tiff(image))


def _to_colour(path: Path) -> None:
    grey = _read(path)
    _write(path, np.stack([np.clip(grey.astype(int) + shift, 0, 255) for shift in (-6, 0, 9)], axis=2).astype(np.uint8))


def _to_16_bit(path: Path) -> None:
    _write(path, _read(path).astype(np.uint16) * 257)


def _crop(path: Path) -> None:
    _write(path, np.ascontiguousarray(_read(path)[: HEIGHT - 8, : WIDTH - 24]))


_FILE_CHANGES: dict[str, Callable[[Path], None]] = {
    "missing_file": Path.unlink,
    "unreadable_image": _truncate,
    "colour_image": _to_colour,
    "sixteen_bit_image": _to_16_bit,
    "wrong_size": _crop,
}


def _remove_all(annotations: Annotations) -> tuple[Annotations, list[int]]:
    return [], []


def _keep_few(annotations: Annotations) -> tuple[Annotations, list[int]]:
    return annotations[:FEW], _ids(annotations[:FEW])


def _duplicate_three(annotations: Annotations) -> tuple[Annotations, list[int]]:
    """Annotate three cells twice, shifted by a third of a pixel, as by two annotators."""
    copies = [_shifted(annotation, 0.33, -0.33) for annotation in _largest(annotations, 3)]
    return _numbered(annotations, copies)


def _shift_outside(annotations: Annotations) -> tuple[Annotations, list[int]]:
    """Shift one cell half over the right edge, one completely outside."""
    first, second = _largest(annotations, 2)
    shifted = {
        first["id"]: _shifted(first, WIDTH - first["bbox"][0] - first["bbox"][2] / 2, 0),
        second["id"]: _shifted(second, 0, HEIGHT + 20 - second["bbox"][1]),
    }
    return [shifted.get(annotation["id"], annotation) for annotation in annotations], list(shifted)


def _add_degenerate(annotations: Annotations) -> tuple[Annotations, list[int]]:
    """Add outlines of two points, of three collinear points, and without a polygon."""
    shapes: list[list[list[float]]] = [[[10.0, 10.0, 14.0, 14.0]], [[20.0, 20.0, 24.0, 24.0, 28.0, 28.0]], []]
    added = [{**annotations[0], "segmentation": shape, "area": 0.0, "bbox": [10.0, 10.0, 0.0, 0.0]} for shape in shapes]
    return _numbered(annotations, added)


def _merge_two(annotations: Annotations) -> tuple[Annotations, list[int]]:
    """Merge the two largest cells into one record."""
    first, second = _largest(annotations, 2)
    merged = {**first, "segmentation": first["segmentation"] + second["segmentation"]}
    merged["area"] = first["area"] + second["area"]
    low = np.minimum(first["bbox"][:2], second["bbox"][:2])
    high = np.maximum(np.add(first["bbox"][:2], first["bbox"][2:]), np.add(second["bbox"][:2], second["bbox"][2:]))
    merged["bbox"] = [round(float(value), 2) for value in (*low, *(high - low))]
    others = [annotation for annotation in annotations if annotation["id"] not in (first["id"], second["id"])]
    return [*others, merged], [first["id"]]


def _encode_two(annotations: Annotations) -> tuple[Annotations, list[int]]:
    """Run-length encode two cells: one compressed (a string), one as COCO's uncompressed list of counts."""
    first, second = _largest(annotations, 2)
    compressed, other = (
        rle.encode_polygons([np.reshape(polygon, (-1, 2)) for polygon in cell["segmentation"]], (HEIGHT, WIDTH))[
            "counts"
        ]
        for cell in (first, second)
    )
    changed = {
        first["id"]: {"size": [HEIGHT, WIDTH], "counts": compressed.decode("ascii")},
        second["id"]: {"size": [HEIGHT, WIDTH], "counts": rle.run_lengths(other).tolist()},
    }
    records = [{**a, "segmentation": changed.get(a["id"], a["segmentation"])} for a in annotations]
    return records, list(changed)


_RECORD_CHANGES = {
    "no_annotations": _remove_all,
    "few_annotations": _keep_few,
    "doubled_contour": _duplicate_three,
    "out_of_bounds": _shift_outside,
    "degenerate_polygon": _add_degenerate,
    "several_polygons": _merge_two,
    "rle": _encode_two,
}


def _ids(annotations: Annotations) -> list[int]:
    return [annotation["id"] for annotation in annotations]


def _largest(annotations: Annotations, count: int) -> Annotations:
    return sorted(annotations, key=lambda annotation: (-annotation["area"], annotation["id"]))[:count]


def _shifted(annotation: dict[str, Any], right: float, down: float) -> dict[str, Any]:
    polygons = [[round(v + (down if i % 2 else right), 2) for i, v in enumerate(p)] for p in annotation["segmentation"]]
    x, y, *size = annotation["bbox"]
    return {**annotation, "segmentation": polygons, "bbox": [round(x + right, 2), round(y + down, 2), *size]}


def _numbered(annotations: Annotations, added: Annotations) -> tuple[Annotations, list[int]]:
    """Append `added` to `annotations` with the next ids."""
    last = max(_ids(annotations))
    numbered = [{**annotation, "id": last + number} for number, annotation in enumerate(added, 1)]
    return annotations + numbered, _ids(numbered)
