"""Annotation files of one image: label images, masks of single cells, ImageJ ROIs, GeoJSON."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from raylivecell.annotations import label_images
from raylivecell.annotations.coco import CellRecord
from raylivecell.annotations.errors import AnnotationError
from raylivecell.images.planes import Place


def _read_rois(data: bytes, shape: tuple[int, int], place: Place | None, ignore: Sequence[str]) -> list[CellRecord]:
    from raylivecell.annotations import imagej_rois

    return imagej_rois.read(data, shape, place, ignore)


def _read_geojson(data: bytes, shape: tuple[int, int], place: Place | None, ignore: Sequence[str]) -> list[CellRecord]:
    from raylivecell.annotations import geojson

    return geojson.read(data, shape, place, ignore)


OUTLINE_READERS = {".zip": _read_rois, ".roi": _read_rois, ".geojson": _read_geojson}
"""Readers of outlines by suffix: (content, (H, W) of the image, its place in a stack, `ignore` of `read`) -> records.

Their modules are imported when needed.
"""


@dataclass(frozen=True)
class ImageAnnotation:
    """The cells and ignore regions of one image, and the defects of its annotation files."""

    cells: list[CellRecord]
    """Also ignore regions: `CellRecord.region`."""
    shape: tuple[int, int] | None
    """(H, W) of the label image; None for outlines."""
    defects: dict[str, tuple[str, list[int | str]]] = field(default_factory=dict)
    """(reason, ids of cells) by kind of defect."""


def read(
    files: Sequence[tuple[str, bytes]],
    cell_masks: bool,
    shape: tuple[int, int],
    rules: Mapping[str, str],
    place: Place | None = None,
    ignore: Sequence[str] = (),
) -> ImageAnnotation:
    """Read the annotation files of one image; without a file, all of it is one ignore region.

    Args:
        files: (name, content) of each file; several only for the masks of single cells.
        cell_masks: whether each file is the mask of one cell.
        shape: (H, W) of the image.
        rules: rule by kind of defect, as chosen in `prepare`.
        place: of the image in its stack; outlines that state another slice are refused.
        ignore: labels, names of ROIs or classes of objects that are ignore regions. Masks of single cells have none.

    Raises:
        AnnotationError: a damaged or unsupported file; the message does not contain its name.
    """
    if not files:
        everything = shape, np.array([0, shape[0] * shape[1]], np.int64)
        return ImageAnnotation([CellRecord("image", False, [], [everything], "image")], None)
    if cell_masks:
        return _read_cell_masks(files, rules)
    ((name, data),) = files
    suffix = name[name.rindex(".") :].lower()
    if suffix in OUTLINE_READERS:
        return ImageAnnotation(OUTLINE_READERS[suffix](data, shape, place, ignore), None)
    values = label_images.decode(data)
    ignored, regions = label_images.find_ignored(values, ignore)
    labels = label_images.to_integers(label_images.with_zeros(values, ignored))
    background = label_images.find_background(labels) or label_images.find_outline(labels)
    if background and rules["background_label"] == "background":
        # Of an inverted mask the pixels of 0 become the cells.
        labels = label_images.with_zeros(label_images.without_background(labels, background.label), ignored)
    cells, defects = label_images.cells_of_labels(labels, rules["binary_mask"], rules["label_in_pieces"])
    if background:
        reason = f"{name}: {background.reason}: background, an inverted mask or outlines, not a cell"
        # An image that is not used has no other defects: their rules could not help.
        unused = rules["background_label"] in ("refuse", "drop")
        defects = {"background_label": (reason, [background.label]), **({} if unused else defects)}
    if values.dtype.kind == "f":
        reason = f"{values.dtype.itemsize * 8}-bit floats, all of them integers"
        defects = {"float_labels": (reason, []), **defects}
    return ImageAnnotation([*cells, *regions], (labels.shape[0], labels.shape[1]), defects)


class _CellMasks(NamedTuple):
    """The masks of the cells of one image."""

    cells: list[CellRecord]
    shape: tuple[int, int]
    pieces: dict[int | str, int]
    """Number of pieces by cell."""
    inverted: dict[int | str, str]
    """Reason by cell."""


def _read_cell_masks(files: Sequence[tuple[str, bytes]], rules: Mapping[str, str]) -> ImageAnnotation:
    """Read masks of single cells, of equal size; ids are the names of the files without suffix."""
    masks = _decode_cell_masks(files, rules, rules["label_in_pieces"])
    defects: dict[str, tuple[str, list[int | str]]] = {}
    if masks.inverted:
        defects["background_label"] = next(iter(masks.inverted.values())), list(masks.inverted)
        if rules["background_label"] in ("refuse", "drop"):
            return ImageAnnotation(masks.cells, masks.shape, defects)
    divided = [cell_id for cell_id, count in masks.pieces.items() if count > 1]
    total = sum(masks.pieces.values())
    if total >= label_images.PIECES_OF_A_CLASS * len(files):
        number = f"{len(files)} mask{'s' * (len(files) > 1)}"
        defects["binary_mask"] = f"{number} in {total} pieces: masks of classes, not one mask per cell", divided
        masks = _decode_cell_masks(files, rules, "split" if rules["binary_mask"] == "components" else "keep")
    elif divided:
        defects["label_in_pieces"] = "the mask of a cell in several pieces", divided
    return ImageAnnotation(masks.cells, masks.shape, defects)


def _decode_cell_masks(
    files: Sequence[tuple[str, bytes]], rules: Mapping[str, str], label_in_pieces: str
) -> _CellMasks:
    cells: list[CellRecord] = []
    shapes = set()
    pieces: dict[int | str, int] = {}
    inverted: dict[int | str, str] = {}
    for path, data in files:
        name = path.rpartition("/")[2]
        cell_id = name.rpartition(".")[0]
        try:
            mask = label_images.to_integers(label_images.decode(data))
            if background := label_images.find_background(mask):
                inverted[cell_id] = f"{path}: {background.reason}: background or an inverted mask, not a cell"
                if rules["background_label"] == "background":
                    mask = label_images.without_background(mask, background.label)
            members, pieces[cell_id] = label_images.cells_of_mask(mask, cell_id, label_in_pieces)
        except AnnotationError as error:
            raise AnnotationError(f"{name}: {error}") from error
        cells += members
        shapes.add((mask.shape[0], mask.shape[1]))
    if len(shapes) > 1:
        sizes = " and ".join(f"{width} x {height}" for height, width in sorted(shapes)[:3])
        raise AnnotationError(f"masks of different sizes, {sizes}; each must have the size of its image")
    return _CellMasks(cells, shapes.pop(), pieces, inverted)
