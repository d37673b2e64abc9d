"""Annotation files in COCO's format, read in one pass: `annotations` and `images` in any order, as lists or dicts.

1. `json_stream.iter_records` splits the text into records
2. `read_annotations` keeps image records in memory and spills outlines to a temporary file, 4 bytes per coordinate
3. `Annotations.payload` returns the encoded cells of one image, `decode_cells` converts them to arrays
"""

import array
import json
import math
import re
import struct
import tempfile
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raylivecell.annotations.json_stream import (
    BrokenJsonError,
    JsonText,
    NotCocoError,
    Reader,
    describe_object,
    iter_records,
)
from raylivecell.annotations.rle import run_lengths

_INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,17})(\.0)?")


class BadRecordError(ValueError):
    """A record with a missing or invalid field; the message names it."""


@dataclass(frozen=True)
class ImageEntry:
    """One record of a COCO file's `images`."""

    id: int | str
    file_name: str
    width: int | None
    height: int | None


@dataclass
class Annotations:
    """Contents of one COCO file: its images in memory, its cells in a temporary file."""

    name: str
    images: list[ImageEntry] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    licences: list[dict[str, Any]] = field(default_factory=list)
    categories: dict[int | str, str] = field(default_factory=dict)
    bad: list[tuple[str, int | str | None, str]] = field(default_factory=list)
    """(section, id or None, reason) of each unusable record."""
    broken: BrokenJsonError | None = None
    """Error at which reading stopped; None if the file is complete."""
    last_image: int | str | None = None
    """Image id of the last complete annotation; if `broken`, this image lacks annotations."""
    sha256: str = ""
    size: int = 0
    """Bytes of the file."""

    def __post_init__(self) -> None:
        self._spill = tempfile.TemporaryFile(prefix="raylivecell-")  # noqa: SIM115  # lives as long as this object
        # Ids are numbered in order of appearance; cells refer to images and categories by these numbers.
        self._image_numbers: dict[int | str, int] = {}
        self._category_numbers: dict[int | str, int] = {}
        self._cell_image, self._cell_category = array.array("l"), array.array("l")
        self._cell_crowd = array.array("B")
        self._cell_starts = array.array("q", [0])  # offsets in the temporary file
        self._selected: NDArray[np.bool_] | None = None
        self._regions: NDArray[np.bool_] | None = None
        self._by_image: NDArray[np.int64] | None = None

    def add_cell(self, image_id: int | str, category_id: int | str, crowd: bool, record: bytes) -> None:
        """Spill one encoded cell of image `image_id`; image and category may follow later in the file."""
        self._cell_image.append(self._image_numbers.setdefault(image_id, len(self._image_numbers)))
        self._cell_category.append(self._category_numbers.setdefault(category_id, len(self._category_numbers)))
        self._cell_crowd.append(crowd)
        self._cell_starts.append(self._cell_starts[-1] + self._spill.write(record))

    def select(self, category_ids: Collection[int | str], region_ids: Collection[int | str] = ()) -> None:
        """Restrict the methods below to annotations of these categories.

        `payload` also returns those of the categories `region_ids`, as ignore regions.
        """
        self._selected = np.array([category in category_ids for category in self._category_numbers], bool)
        self._regions = np.array([category in region_ids for category in self._category_numbers], bool)
        self._by_image = None

    def counts(self) -> dict[int | str, int]:
        """Count cells by image id, including ids that are missing from `images`."""
        images = np.asarray(self._cell_image, np.int64)[self._selected_cells()]
        counts = np.bincount(images, minlength=len(self._image_numbers))
        return {image_id: int(counts[number]) for image_id, number in self._image_numbers.items()}

    def crowds(self) -> int:
        """Count the cells with iscrowd set."""
        return int(np.asarray(self._cell_crowd)[self._selected_cells()].sum())

    def category_counts(self) -> dict[int | str, tuple[int, int]]:
        """Count (images, annotations) by category id, selected or not, including ids missing from `categories`."""
        images, categories = (np.asarray(numbers, np.int64) for numbers in (self._cell_image, self._cell_category))
        category_of_pair = np.unique(np.stack([categories, images]), axis=1)[0]
        length = len(self._category_numbers)
        image_counts, cell_counts = (np.bincount(x, minlength=length).tolist() for x in (category_of_pair, categories))
        counts = {
            category: (image_counts[number], cell_counts[number]) for category, number in self._category_numbers.items()
        }
        return dict.fromkeys(self.categories, (0, 0)) | counts

    def payload(self, image_id: int | str) -> bytes:
        """Return the encoded cells and ignore regions of one image in file order, the input of `decode_cells`."""
        records = []
        for cell in self._cells_of(image_id).tolist():
            self._spill.seek(self._cell_starts[cell])
            record = self._spill.read(self._cell_starts[cell + 1] - self._cell_starts[cell])
            records.append(_as_region(record) if self._is_region(cell) else record)
        return b"".join(records)

    def category(self, image_id: int | str) -> str:
        """Return the most frequent category name of an image's cells (ties: the first in the file); "" if none."""
        categories = np.asarray(self._cell_category, np.int64)[self._cells_of(image_id)]
        if self._regions is not None:
            categories = categories[~self._regions[categories]]
        if not len(categories):
            return ""
        numbers, counts = np.unique(categories, return_counts=True)
        return self.categories.get(list(self._category_numbers)[numbers[np.argmax(counts)]], "")

    def _cells_of(self, image_id: int | str) -> NDArray[np.int64]:
        """Indices of an image's cells and ignore regions, ascending (file order)."""
        if self._by_image is None:
            selected = self._selected_cells(with_regions=True)
            images = np.asarray(self._cell_image, np.int64)
            self._by_image = selected[np.argsort(images[selected], kind="stable")]
            self._image_starts = np.searchsorted(images[self._by_image], np.arange(len(self._image_numbers) + 1))
        number = self._image_numbers.get(image_id)
        if number is None:
            return self._by_image[:0]
        return self._by_image[self._image_starts[number] : self._image_starts[number + 1]]

    def _selected_cells(self, with_regions: bool = False) -> NDArray[np.int64]:
        """Indices of the cells in selected categories, and of ignore regions if `with_regions`."""
        categories = np.asarray(self._cell_category, np.int64)
        if self._selected is None or self._regions is None:
            return np.arange(len(categories))
        return np.flatnonzero((self._selected | self._regions if with_regions else self._selected)[categories])

    def _is_region(self, cell: int) -> bool:
        return self._regions is not None and bool(self._regions[self._cell_category[cell]])


def read_annotations(stream: Reader, name: str) -> Annotations:
    """Read the COCO file `name` from `stream` in one pass.

    Unusable records are listed in `bad`; `broken` is set for truncated or invalid JSON and for other formats.
    """
    text = JsonText(stream, name)
    annotations = Annotations(name)
    try:
        for section, key, record in iter_records(text):
            _add_record(annotations, section, key, record)
        if "images" not in text.sections:
            raise NotCocoError(name, describe_object(text.sections))
    except BrokenJsonError as error:
        annotations.broken = error
        while text.refill():  # the checksum covers the complete file
            text.at = len(text.buffer)
    annotations.sha256, annotations.size = text.sha256.hexdigest(), text.size
    return annotations


def _add_record(annotations: Annotations, section: str, key: str | None, record: Any) -> None:
    try:
        if section == "annotations":
            annotations.last_image = _add_cell(annotations, key, record)
        elif section == "images":
            annotations.images.append(_parse_image(key, record))
        elif section == "info" and key is not None:
            annotations.info[key] = record
        elif section == "licenses" and isinstance(record, dict):
            annotations.licences.append(record)
        elif section == "categories" and isinstance(record, dict):
            _add_category(annotations, record)
    except BadRecordError as error:
        record_id = record.get("id", key) if isinstance(record, dict) else key
        annotations.bad.append((section, record_id if isinstance(record_id, int | str) else None, str(error)))


def _add_category(annotations: Annotations, record: dict[str, Any]) -> None:
    category_id, name = _parse_id(record.get("id"), "id"), str(record.get("name") or "")
    previous = annotations.categories.setdefault(category_id, name)
    if previous != name:
        raise BadRecordError(f"category {category_id} is both {_shorten(previous)} and {_shorten(name)}")


def _parse_id(value: Any, field_name: str) -> int | str:
    """Normalise an id: 7, 7.0, "7" and "7.0" are the same id, since converters mix them."""
    if type(value) is int:  # most ids
        return value
    if isinstance(value, str):
        return int(value.removesuffix(".0")) if _INTEGER.fullmatch(value) else value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    raise BadRecordError(f"{field_name} is {_shorten(value)}, not an integer or text")


def _parse_number(value: Any) -> float | None:
    """Convert a number or its text to a finite float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _parse_crowd(value: Any) -> bool:
    """Parse `iscrowd`: 0 or 1 as a number, text or boolean; absent means 0."""
    if value is None or value == 0:
        return False
    number = {"": 0.0, "none": 0.0, "null": 0.0, "false": 0.0, "true": 1.0}.get(
        str(value).strip().lower(), _parse_number(value)
    )
    if number not in (0, 1):
        raise BadRecordError(f"iscrowd is {_shorten(value)}, neither 0 nor 1")
    return bool(number)


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _parse_image(key: str | None, record: Any) -> ImageEntry:
    if not isinstance(record, dict):
        raise BadRecordError(f"the record is {_shorten(record)}, not an object")
    name = record.get("file_name")
    if not isinstance(name, str) or not name:
        raise BadRecordError(f"file_name is {_shorten(name)}, not text")
    width, height = (_parse_side(record.get(side)) for side in ("width", "height"))
    return ImageEntry(_parse_id(record.get("id", key), "id"), name, width, height)


def _parse_side(value: Any) -> int | None:
    """Parse a width or height in pixels, also as text; None if absent or 0."""
    number = 0.0 if value in (None, "") else _parse_number(value)
    if number is None or not 0 <= number < 2**31:
        raise BadRecordError(f"width or height is {_shorten(value)}, not a positive number")
    return int(number) or None


def _add_cell(annotations: Annotations, key: str | None, record: Any) -> int | str:
    """Parse and add one cell; return its image id."""
    if not isinstance(record, dict):
        raise BadRecordError(f"the record is {_shorten(record)}, not an object")
    image_id = _parse_id(record.get("image_id"), "image_id")
    cell_id = _parse_id(record.get("id", key), "id")
    category_id = "" if record.get("category_id") is None else _parse_id(record["category_id"], "category_id")
    crowd = _parse_crowd(record.get("iscrowd"))
    parts = _parse_segmentation(record.get("segmentation"))
    annotations.add_cell(image_id, category_id, crowd, encode_cell(cell_id, crowd, parts))
    return image_id


_POLYGON, _COUNTS, _TEXT = 0, 1, 2
_HEADER = struct.Struct("<IBI")  # length of the id as JSON in bytes; flags; number of parts
_CROWD, _REGION = 1, 2
_PART = struct.Struct("<BIII")  # kind, height, width, length in bytes


def _parse_segmentation(segmentation: Any) -> list[tuple[int, int, int, bytes]]:
    """Parse polygons, an RLE, or a list of both into (kind, height, width, bytes) of each part."""
    if isinstance(segmentation, dict):
        segmentation = [segmentation]
    if segmentation is None:
        raise BadRecordError("no segmentation; a bounding box alone is not a cell outline")
    if not isinstance(segmentation, list):
        raise BadRecordError(f"segmentation is {_shorten(segmentation)}, neither polygons nor RLE")
    if segmentation and all(_parse_number(value) is not None for value in segmentation):
        segmentation = [segmentation]  # one polygon without an enclosing list
    return [_parse_rle(part) if isinstance(part, dict) else _parse_polygon(part) for part in segmentation]


def _parse_polygon(part: Any) -> tuple[int, int, int, bytes]:
    """Parse x1, y1, x2, y2, ... or [x1, y1], [x2, y2], ...; numbers may be text."""
    if not isinstance(part, list):
        raise BadRecordError(f"a polygon is {_shorten(part)}, not a list of numbers")
    if part and all(isinstance(point, list) and len(point) == 2 for point in part):
        part = [value for point in part for value in point]
    if len(part) % 2:
        raise BadRecordError(f"a polygon has {len(part)} coordinates, an odd number")
    try:
        return _POLYGON, 0, 0, array.array("f", part).tobytes()
    except (TypeError, OverflowError) as error:
        numbers = [_parse_number(value) for value in part]
        if None in numbers:
            raise BadRecordError("a polygon contains a value that is not a number") from error
    try:
        return _POLYGON, 0, 0, array.array("f", map(float, part)).tobytes()
    except OverflowError as error:
        raise BadRecordError("a polygon contains a number that is too large") from error


def _parse_rle(part: dict[str, Any]) -> tuple[int, int, int, bytes]:
    counts = part.get("counts")
    height, width = _parse_size(part.get("size"))
    if isinstance(counts, str) and counts.isascii():
        if counts[:2] in ("b'", 'b"') and counts[-1] == counts[1]:  # repr() of Python bytes; RLE text has no quotes
            counts = counts[2:-1].replace("\\\\", "\\")
        return _TEXT, height, width, counts.encode()
    try:
        return _COUNTS, height, width, array.array("I", counts).tobytes()  # type: ignore[arg-type]  # caught below
    except (TypeError, OverflowError) as error:
        numbers = [_parse_number(value) for value in (counts if isinstance(counts, list) else [None])]
        runs = [int(number) for number in numbers if number is not None and number.is_integer() and 0 <= number < 2**32]
        if len(runs) < len(numbers):
            raise BadRecordError(f"the counts of an RLE are {_shorten(counts)}, neither text nor integers") from error
    return _COUNTS, height, width, array.array("I", runs).tobytes()


def _parse_size(size: Any) -> tuple[int, int]:
    """Parse the (height, width) of an RLE."""
    numbers = [_parse_number(value) for value in (size if isinstance(size, list) else [])]
    sides = [int(number) for number in numbers if number is not None and number.is_integer() and 0 < number < 2**31]
    if len(numbers) != 2 or len(sides) != 2:
        raise BadRecordError(f"the size of an RLE is {_shorten(size)}, not [height, width]")
    return sides[0], sides[1]


def encode_cell(cell_id: int | str, crowd: bool, parts: list[tuple[int, int, int, bytes]]) -> bytes:
    """Encode one cell for `decode_cells`."""
    id_json = json.dumps(cell_id).encode()
    body = b"".join(_PART.pack(kind, h, w, len(data)) + data for kind, h, w, data in parts)
    return _HEADER.pack(len(id_json), crowd, len(parts)) + id_json + body


def _as_region(record: bytes) -> bytes:
    """Mark an encoded cell as an ignore region."""
    id_length, flags, part_count = _HEADER.unpack_from(record)
    return _HEADER.pack(id_length, flags | _REGION, part_count) + record[_HEADER.size :]


@dataclass(frozen=True)
class CellRecord:
    """One annotation, not yet checked against its image."""

    id: int | str
    crowd: bool
    polygons: list[NDArray[np.float32]]
    """Each (V, 2), x and y in pixels; V may be below 3, and values may be infinite."""
    runs: list[tuple[tuple[int, int], NDArray[np.int64]]]
    """Each ((height, width), run lengths), column-major, background first; they need not fill the image."""
    region: str = ""
    """Of an ignore region the category, class, name or label that selects it; "" for a cell."""


def decode_cells(payload: bytes) -> list[CellRecord]:
    """Decode the result of `Annotations.payload`; `region` is "category" for all ignore regions."""
    cells, at = [], 0
    while at < len(payload):
        id_length, flags, part_count = _HEADER.unpack_from(payload, at)
        at += _HEADER.size
        region = "category" if flags & _REGION else ""
        cell = CellRecord(json.loads(payload[at : at + id_length]), bool(flags & _CROWD), [], [], region)
        at += id_length
        for _ in range(part_count):
            kind, height, width, length = _PART.unpack_from(payload, at)
            at += _PART.size
            data = payload[at : at + length]
            at += length
            if kind == _POLYGON:
                cell.polygons.append(np.frombuffer(data, np.float32).reshape(-1, 2))
            elif kind == _COUNTS:
                cell.runs.append(((height, width), np.frombuffer(data, np.uint32).astype(np.int64)))
            else:
                cell.runs.append(((height, width), run_lengths(data)))
        cells.append(cell)
    return cells
