"""Label images: one integer per pixel, 0 for background, every other value one cell. TIFF, PNG or NPY.

1. `decode`             stored values (H, W); colour, stacks, lossy files and pickles are refused
   `find_ignored`       the pixels of labels that mark ignore regions; `with_zeros` removes them
2. `to_integers`        floats with integer values become integers; other floats and negative labels are refused
3. `find_background`    a label that is the background, or an inverted mask; `find_outline`: the outline of all cells
   `without_background` the same image with 0 for that label
4. `cells_of_labels`    one cell per label, with its holes; labels in several pieces and binary masks follow rules
   `cells_of_mask`      the cell of a mask of its own
"""

import io
import lzma
import struct
import tokenize
import warnings
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image
from scipy import ndimage

from raylivecell.annotations.coco import CellRecord
from raylivecell.annotations.drawing import MAX_CELLS
from raylivecell.annotations.errors import AnnotationError
from raylivecell.annotations.rle import patch_runs
from raylivecell.core.errors import UnreadableImageError, shortened
from raylivecell.images import file_kinds, tiff
from raylivecell.images.formats import MAX_PIXELS

SUFFIXES = (".tif", ".tiff", ".png", ".npy")
PIECES_OF_A_CLASS = 5
"""Mean number of pieces per label from which the values are taken for classes, such as cell and border, not cells."""
_MAX_BOXES, _MAX_BOX_PIXELS = 100, 2**28
"""Maximum total area of the labels' bounding boxes, in images and in pixels: noise would take hours."""
_MAX_HEADER = 1000
_GREY_MODES = {"1", "L", "P", "I", "I;16", "I;16L", "I;16B", "I;16N"}


class LabelCells(NamedTuple):
    """Cells of a label image, and its defects."""

    cells: list[CellRecord]
    """Ids are the label values; of a label cut into pieces "LABEL.1", "LABEL.2", ..."""
    defects: dict[str, tuple[str, list[int | str]]]
    """(reason, labels) by kind: `binary_mask` or `label_in_pieces`."""


class _Region(NamedTuple):
    """The pixels of one label in its bounding box."""

    label: int | str
    top: int
    left: int
    mask: NDArray[np.uint8]
    """0/1 (h, w)."""
    pieces: NDArray[np.int32] | None
    """8-connected pieces, numbered from 1, (h, w); None if there is one piece."""
    piece_count: int


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> NDArray[Any]:
    """Decode a label image to its stored values (H, W), integers, booleans or floats; palettes to their indices.

    Args:
        data: content of a TIFF, PNG or NPY file, recognised by its first bytes.
        max_pixels: limit, checked before the pixels are decoded.

    Raises:
        AnnotationError: unsupported or damaged.
    """
    kind = file_kinds.kind_of(data)
    decoders = {"NumPy array": _decode_npy, "TIFF image": tiff.decode_labels, "PNG image": _decode_png}
    if kind not in decoders:
        lossy = ", which changes labels" if kind == "JPEG image" else ""
        raise AnnotationError(f"{kind or 'not a known format'}{lossy}; save the labels as TIFF, PNG or NPY")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about unusual metadata
            return decoders[kind](data, max_pixels)
    except (AnnotationError, UnreadableImageError) as error:
        raise AnnotationError(str(error)) from error
    except Image.DecompressionBombError as error:
        raise AnnotationError(f"more than {max_pixels} pixels; cut it into tiles") from error
    # Decoders raise any of these on damaged files.
    except (
        *(OSError, ValueError, SyntaxError, EOFError, KeyError, TypeError, IndexError, OverflowError),
        *(struct.error, zlib.error, lzma.LZMAError, tokenize.TokenError, RecursionError),
    ) as error:
        raise AnnotationError(
            f"damaged: incomplete or corrupt {kind} ({shortened(str(error))}); save it again"
        ) from error


def _decode_npy(data: bytes, max_pixels: int) -> NDArray[Any]:
    """Decode a NumPy array (H, W) of numbers; never unpickle."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise AnnotationError(f"NPY version {version[0]}.{version[1]}; save it with numpy.save")
    shape, _, dtype = readers[version](stream, max_header_size=_MAX_HEADER)
    if dtype.hasobject:
        raise AnnotationError(
            "a pickled Python object, which could run code; for Cellpose's _seg.npy save the masks as PNG or TIFF "
            "(File > Save Masks as PNG/tif, which writes _cp_masks)"
        )
    if dtype.kind not in "biuf":
        raise AnnotationError(f"an array of {dtype}, not of numbers; save integer labels")
    if len(shape) != 2:
        raise AnnotationError(f"an array of shape {shape}, not (H, W); save one file per image")
    if shape[0] * shape[1] > max_pixels:
        raise AnnotationError(f"{shape[1]} x {shape[0]} is more than {max_pixels} pixels; cut it into tiles")
    if len(data) - stream.tell() != shape[0] * shape[1] * dtype.itemsize:
        raise AnnotationError("damaged: the length of the file does not match its shape; save it again")
    values = np.load(io.BytesIO(data), allow_pickle=False)
    return values.astype(dtype.newbyteorder("="), copy=False)


def _decode_png(data: bytes, max_pixels: int) -> NDArray[Any]:
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise AnnotationError(f"{width} x {height} is more than {max_pixels} pixels; cut it into tiles")
        if (frames := getattr(image, "n_frames", 1)) != 1:
            raise AnnotationError(f"contains {frames} images; save one file per image")
        if image.mode not in _GREY_MODES:
            raise AnnotationError(
                f"a colour image ({image.mode}), whose colours are no labels; save the labels as 8 or 16 bit grey, "
                "or export COCO"
            )
        image.load()
        if reason := tiff.orientation_problem(int(image.getexif().get(ExifTags.Base.Orientation, 1))):
            raise AnnotationError(reason)
        return np.asarray(image)  # grey of 2 and 4 bits is scaled: different labels remain different


def find_ignored(values: NDArray[Any], ignore: Sequence[str]) -> tuple[NDArray[np.bool_], list[CellRecord]]:
    """Find the pixels of the labels `ignore`: bool (H, W), and an ignore region for each of these labels that occurs.

    Args:
        values: result of `decode` (H, W).
        ignore: integers as text, also negative ones.
    """
    shape, ignored = (values.shape[0], values.shape[1]), np.zeros(values.shape, np.bool_)
    regions = []
    for word in ignore:
        mask = values == int(word)
        if mask.any():
            regions.append(CellRecord(word, False, [], [(shape, patch_runs(mask.view(np.uint8), 0, 0, shape))], word))
            ignored |= mask
    return ignored, regions


def with_zeros(values: NDArray[Any], where: NDArray[np.bool_]) -> NDArray[Any]:
    """Return `values` with 0 at the pixels `where`, both (H, W)."""
    return np.where(where, np.zeros((), values.dtype), values) if where.any() else values


def to_integers(values: NDArray[Any]) -> NDArray[np.integer[Any]]:
    """Convert the result of `decode` to integers of the same value; booleans to 0 and 1.

    Raises:
        AnnotationError: a value that is negative, not finite or not an integer.
    """
    if values.dtype.kind == "f":
        values = values.astype(np.float64)  # 2**53 is no float16
        uneven = ~np.isfinite(values) | (values != np.rint(values)) | (np.abs(values) >= 2**53)
        if uneven.any():
            example = float(values[uneven][0])
            raise AnnotationError(f"labels such as {example:.6g} are not integers (a probability map?); save integers")
        values = values.astype(np.int64)
    integers: NDArray[np.integer[Any]] = values.astype(np.uint8) if values.dtype.kind == "b" else values
    if integers.dtype.kind == "i" and integers.size and integers.min() < 0:
        raise AnnotationError(f"the label {int(integers.min())} is negative; background is 0, cells are 1 and more")
    return integers


class Background(NamedTuple):
    """A label that is not a cell."""

    label: int
    reason: str


def find_background(labels: NDArray[np.integer[Any]]) -> Background | None:
    """Find a label of over half of the image that touches all four edges: the background, or an inverted mask.

    Args:
        labels: (H, W), not negative.
    """
    if not labels.size:
        return None
    middle = labels.size // 2
    label = int(np.partition(labels, middle, axis=None)[middle])  # the label of over half of the pixels, if any
    covered = np.count_nonzero(labels == label)
    edges = (labels[0], labels[-1], labels[:, 0], labels[:, -1])
    if not label or 2 * covered <= labels.size or not all((edge == label).any() for edge in edges):
        return None
    percent = 100 * covered / labels.size
    return Background(label, f"label {label} covers {percent:.0f} % of the image and touches all four edges")


def find_outline(labels: NDArray[np.integer[Any]]) -> Background | None:
    """Find a label that separates all others from 0 and touches each: 255 in Pascal VOC, or a class "border".

    A cell around one other cell is none: an outline is in several pieces, or there are several other labels.

    Args:
        labels: (H, W), not negative.
    """
    next_to_background = _labels_near(labels, 0) if labels.size else set()
    if len(next_to_background) != 1:
        return None
    (label,) = next_to_background
    mask = labels == label
    inner = _labels_near(labels, label) - {0}
    pieces = cv2.connectedComponents(mask.view(np.uint8), connectivity=8)[0] - 1
    if not inner or (len(inner) == 1 and pieces == 1):
        return None
    if not np.isin(labels[~mask & (labels > 0)], np.array([*inner], labels.dtype)).all():
        return None
    percent = 100 * np.count_nonzero(mask) / labels.size
    return Background(label, f"label {label} covers {percent:.2g} % of the image and separates all others from 0")


def _labels_near(labels: NDArray[np.integer[Any]], label: int) -> set[int]:
    """Return the other values next to the pixels of `label`, by sides or corners."""
    near = cv2.dilate((labels == label).view(np.uint8), np.ones((3, 3), np.uint8)).view(bool)
    return set(np.unique(labels[near & (labels != label)]).tolist())


def without_background(labels: NDArray[np.integer[Any]], label: int) -> NDArray[np.integer[Any]]:
    """Return `labels` (H, W) with 0 for `label`, and 1 for 0 if there is no other label (an inverted mask)."""
    others = np.where(labels == label, np.zeros((), labels.dtype), labels)
    return others if others.any() else (labels == 0).astype(np.uint8)


def cells_of_labels(labels: NDArray[np.integer[Any]], binary_mask: str, label_in_pieces: str) -> LabelCells:
    """Return one cell per label of an image, by ascending label; 0 is background. Holes stay holes.

    Args:
        labels: (H, W), not negative.
        binary_mask: rule for one value in several pieces, and for values with on average at least 5 pieces:
            `components` (each piece is a cell), otherwise each value is a cell.
        label_in_pieces: rule for a label in several pieces: `keep` (one cell), `largest` (that piece), `split` (each
            piece is a cell). Pieces are connected by sides or corners.

    Raises:
        AnnotationError: over 65,535 cells, or labels scattered over the image.
    """
    values, numbers = _renumber(labels)
    # Regions are computed twice, because those of all labels may need gigabytes.
    piece_counts = {region.label: region.piece_count for region in _regions(values, numbers)}
    total = sum(piece_counts.values())
    defects: dict[str, tuple[str, list[int | str]]] = {}
    divided = [label for label, count in piece_counts.items() if count > 1]
    rule = label_in_pieces
    if divided and (len(values) == 1 or total >= PIECES_OF_A_CLASS * len(values)):
        names = f"one value, {values[0]}," if len(values) == 1 else f"{len(values)} values"
        reason = f"{names} in {total} pieces: a mask of the cells or of classes, not one value per cell"
        defects["binary_mask"] = reason, divided
        rule = "split" if binary_mask == "components" else "keep"
    elif divided:
        most = max(piece_counts.values())
        reason = f"labels in {'up to ' * (most > 2)}{most} pieces"
        defects["label_in_pieces"] = reason, divided
    if rule == "split" and total > MAX_CELLS:
        raise AnnotationError(f"{total} pieces, more than {MAX_CELLS} cells; cut the image into tiles")
    shape = (labels.shape[0], labels.shape[1])
    return LabelCells([cell for region in _regions(values, numbers) for cell in _cells(region, shape, rule)], defects)


def _renumber(labels: NDArray[np.integer[Any]]) -> tuple[list[int | str], NDArray[np.int32]]:
    """Return the labels, ascending, and the image (H, W) with their numbers from 1."""
    small = labels.dtype.itemsize <= 2
    present = np.flatnonzero(np.bincount(labels.ravel())) if small else np.unique(labels)
    present = present[present > 0]
    if len(present) > MAX_CELLS:
        raise AnnotationError(f"{len(present)} labels, more than {MAX_CELLS}; cut the image into tiles")
    if small:
        table = np.zeros(int(labels.max(initial=0)) + 1, np.int32)
        table[present] = np.arange(1, len(present) + 1)
        return present.tolist(), table[labels]
    numbers = np.searchsorted(present, labels) + 1
    return present.tolist(), np.where(labels > 0, numbers, 0).astype(np.int32)


def _regions(values: Sequence[int | str], numbers: NDArray[np.int32]) -> Iterator[_Region]:
    boxes = [(number, *box) for number, box in enumerate(ndimage.find_objects(numbers), 1) if box is not None]
    area = sum((rows.stop - rows.start) * (columns.stop - columns.start) for _, rows, columns in boxes)
    if area > max(_MAX_BOXES * numbers.size, _MAX_BOX_PIXELS):
        raise AnnotationError(f"{len(boxes)} labels scattered over the image, not cells; check the file")
    for number, rows, columns in boxes:
        mask = (numbers[rows, columns] == number).view(np.uint8)
        count, pieces = cv2.connectedComponents(mask, connectivity=8)
        yield _Region(
            values[number - 1], rows.start, columns.start, mask, pieces if count > 2 else None, int(count) - 1
        )


def _cells(region: _Region, shape: tuple[int, int], rule: str) -> Iterator[CellRecord]:
    """Yield the cells of one label; `rule`: that of `label_in_pieces`."""
    if region.pieces is None or rule == "keep":
        yield _record(region.label, region.mask, region.top, region.left, shape)
    elif rule == "largest":
        sizes = np.bincount(region.pieces.ravel())
        largest = 1 + int(np.argmax(sizes[1:]))
        yield _record(region.label, (region.pieces == largest).view(np.uint8), region.top, region.left, shape)
    else:
        for number, box in enumerate(ndimage.find_objects(region.pieces), 1):
            piece = (region.pieces[box] == number).view(np.uint8)
            top, left = region.top + box[0].start, region.left + box[1].start
            yield _record(f"{region.label}.{number}", piece, top, left, shape)


def _record(cell_id: int | str, mask: NDArray[np.uint8], top: int, left: int, shape: tuple[int, int]) -> CellRecord:
    return CellRecord(cell_id, False, [], [(shape, patch_runs(mask, top, left, shape))])


def cells_of_mask(mask: NDArray[np.integer[Any]], cell_id: str, label_in_pieces: str) -> tuple[list[CellRecord], int]:
    """Return the cell of a mask (H, W) of 0 and one other value, and the number of its pieces.

    Args:
        mask: not negative; without a pixel, the cell is empty.
        cell_id: id of the cell.
        label_in_pieces: rule as in `cells_of_labels`.

    Raises:
        AnnotationError: several values.
    """
    shape = (mask.shape[0], mask.shape[1])
    values = np.unique(mask[mask > 0])
    if len(values) > 1:
        raise AnnotationError(f"{len(values)} values in the mask of one cell, expected 0 and one other; check it")
    if not len(values):
        return [CellRecord(cell_id, False, [], [(shape, np.array([mask.size], np.int64))])], 0
    (region,) = _regions([cell_id], (mask > 0).astype(np.int32))
    return list(_cells(region, shape, label_in_pieces)), region.piece_count
