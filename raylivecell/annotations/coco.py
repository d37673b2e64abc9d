"""Annotation files in COCO's format, read in one pass: `annotations` and `images` in any order, as lists or dicts.

1. `json_stream.walk` cuts the text into records
2. `read_annotations` keeps what images say, and spills each cell's outline to a temporary file, 4 bytes a coordinate
3. `Annotations.payload` gives back one image's cells, `decode_cells` makes arrays of them
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

from raylivecell.annotations.json_stream import BrokenJsonError, JsonText, OtherJsonError, Reader, kind_of_other, walk
from raylivecell.annotations.rle import run_lengths

_WHOLE = re.compile(r"-?(0|[1-9][0-9]{0,17})(\.0)?")


class BadRecordError(ValueError):
    """A record with a missing or ill-typed field; the message says which."""


@dataclass(frozen=True)
class ImageEntry:
    """One record of a COCO file's `images`."""

    id: int | str
    file_name: str
    width: int | None
    height: int | None


@dataclass
class Annotations:
    """One COCO file, read: its images in memory, its cells in a temporary file."""

    name: str
    images: list[ImageEntry] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    licences: list[dict[str, Any]] = field(default_factory=list)
    categories: dict[int | str, str] = field(default_factory=dict)
    bad: list[tuple[str, int | str | None, str]] = field(default_factory=list)
    """(section, id or None, reason) of each record that could not be used."""
    broken: BrokenJsonError | None = None
    """Where the text ended early, if it did."""
    last_image: int | str | None = None
    """Image id of the last whole annotation: where `broken`, the image that surely lacks some."""
    sha256: str = ""
    size: int = 0
    """Bytes of the file."""

    def __post_init__(self) -> None:
        self._spill = tempfile.TemporaryFile(prefix="raylivecell-")  # noqa: SIM115  # lives as long as this object
        self._keys: dict[int | str, int] = {}
        self._kinds: dict[int | str, int] = {}
        self._owners, self._kind, self._crowd = array.array("l"), array.array("l"), array.array("B")
        self._chosen: NDArray[np.bool_] | None = None
        self._starts = array.array("q", [0])
        self._order: NDArray[np.int64] | None = None

    def add_cell(self, image_id: int | str, category_id: int | str, crowd: bool, record: bytes) -> None:
        """Spill one encoded cell of image `image_id`; neither id need be known yet."""
        self._owners.append(self._keys.setdefault(image_id, len(self._keys)))
        self._kind.append(self._kinds.setdefault(category_id, len(self._kinds)))
        self._crowd.append(crowd)
        self._starts.append(self._starts[-1] + self._spill.write(record))

    def choose(self, category_ids: Collection[int | str]) -> None:
        """Leave the annotations of all other categories out of what the methods below return."""
        self._chosen = np.array([kind in category_ids for kind in self._kinds], bool)
        self._order = None

    def counts(self) -> dict[int | str, int]:
        """Cells by image id, of ids that `images` does not hold too."""
        counted = np.bincount(np.asarray(self._owners, np.int64)[self._taken()], minlength=len(self._keys))
        return {image_id: int(counted[key]) for image_id, key in self._keys.items()}

    def crowds(self) -> int:
        """How many of the cells have iscrowd set."""
        return int(np.asarray(self._crowd)[self._taken()].sum())

    def category_counts(self) -> dict[int | str, tuple[int, int]]:
        """(images, annotations) by category id, chosen or not; ids that `categories` does not hold too."""
        owners, kinds = np.asarray(self._owners, np.int64), np.asarray(self._kind, np.int64)
        pairs = np.unique(np.stack([kinds, owners]), axis=1)[0]
        images, cells = (np.bincount(some, minlength=len(self._kinds)).tolist() for some in (pairs, kinds))
        counted = {kind: (images[key], cells[key]) for kind, key in self._kinds.items()}
        return dict.fromkeys(self.categories, (0, 0)) | counted

    def payload(self, image_id: int | str) -> bytes:
        """The encoded cells of one image, in the order of the file: input of `decode_cells`."""
        parts = []
        for cell in self._cells_of(image_id).tolist():
            self._spill.seek(self._starts[cell])
            parts.append(self._spill.read(self._starts[cell + 1] - self._starts[cell]))
        return b"".join(parts)

    def category(self, image_id: int | str) -> str:
        """The name of the category of most of an image's cells (of equals the first in the file); "" where none."""
        cells = self._cells_of(image_id)
        if not len(cells):
            return ""
        kinds, counts = np.unique(np.asarray(self._kind, np.int64)[cells], return_counts=True)
        return self.categories.get(list(self._kinds)[kinds[np.argmax(counts)]], "")

    def _cells_of(self, image_id: int | str) -> NDArray[np.int64]:
        """Numbers of an image's cells, ascending: the order of the file."""
        if self._order is None:
            taken = self._taken()
            owners = np.asarray(self._owners, np.int64)
            self._order = taken[np.argsort(owners[taken], kind="stable")]
            self._firsts = np.searchsorted(owners[self._order], np.arange(len(self._keys) + 1))
        key = self._keys.get(image_id)
        return self._order[:0] if key is None else self._order[self._firsts[key] : self._firsts[key + 1]]

    def _taken(self) -> NDArray[np.int64]:
        """Numbers of the cells whose category is chosen."""
        kinds = np.asarray(self._kind, np.int64)
        return np.arange(len(kinds)) if self._chosen is None else np.flatnonzero(self._chosen[kinds])


def read_annotations(stream: Reader, name: str) -> Annotations:
    """Read the COCO file `name` from `stream`, in one pass and in any order of its sections and records.

    A record that cannot be used is listed in `bad`; `broken` says where text breaks off or that it is no COCO file.
    """
    text = JsonText(stream, name)
    read = Annotations(name)
    try:
        for section, key, record in walk(text):
            _keep(read, section, key, record)
        if "images" not in text.sections:
            raise OtherJsonError(name, kind_of_other(text.sections))
    except BrokenJsonError as error:
        read.broken = error
        while text.refill():  # the checksum is of the whole file
            text.at = len(text.buffer)
    read.sha256, read.size = text.sha256.hexdigest(), text.size
    return read


def _keep(read: Annotations, section: str, key: str | None, record: Any) -> None:
    """Add one record of the file to `read`."""
    try:
        if section == "annotations":
            read.last_image = _keep_cell(read, key, record)
        elif section == "images":
            read.images.append(_image_entry(key, record))
        elif section == "info" and key is not None:
            read.info[key] = record
        elif section == "licenses" and isinstance(record, dict):
            read.licences.append(record)
        elif section == "categories" and isinstance(record, dict):
            _keep_category(read, record)
    except BadRecordError as error:
        named = record.get("id", key) if isinstance(record, dict) else key
        read.bad.append((section, named if isinstance(named, int | str) else None, str(error)))


def _keep_category(read: Annotations, record: dict[str, Any]) -> None:
    identity, name = _identity(record.get("id"), "id"), str(record.get("name") or "")
    if read.categories.setdefault(identity, name) != name:
        raise BadRecordError(f"category {identity} is both {_short(read.categories[identity])} and {_short(name)}")


def _identity(value: Any, what: str) -> int | str:
    """An id: 7, 7.0, "7" and "7.0" are one id, for converters write them side by side."""
    if type(value) is int:  # nearly all
        return value
    if isinstance(value, str):
        return int(value.removesuffix(".0")) if _WHOLE.fullmatch(value) else value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    raise BadRecordError(f"{what} is {_short(value)}, not an integer or text")


def _number(value: Any) -> float | None:
    """A finite number, also one in text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _flag(value: Any) -> bool:
    """`iscrowd`: 0 or 1, as a number, text, a boolean or nothing."""
    if value is None or value == 0:
        return False
    number = {"": 0.0, "none": 0.0, "null": 0.0, "false": 0.0, "true": 1.0}.get(
        str(value).strip().lower(), _number(value)
    )
    if number not in (0, 1):
        raise BadRecordError(f"iscrowd is {_short(value)}, neither 0 nor 1")
    return bool(number)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _image_entry(key: str | None, record: Any) -> ImageEntry:
    if not isinstance(record, dict):
        raise BadRecordError(f"the record is {_short(record)}, not an object")
    name = record.get("file_name")
    if not isinstance(name, str) or not name:
        raise BadRecordError(f"file_name is {_short(name)}, not text")
    width, height = (_extent(record.get(side)) for side in ("width", "height"))
    return ImageEntry(_identity(record.get("id", key), "id"), name, width, height)


def _extent(value: Any) -> int | None:
    """A width or height in pixels, also in text; None where it is not stated (0 stands for that too)."""
    number = 0.0 if value in (None, "") else _number(value)
    if number is None or not 0 <= number < 2**31:
        raise BadRecordError(f"width or height is {_short(value)}, not a positive number")
    return int(number) or None


def _keep_cell(read: Annotations, key: str | None, record: Any) -> int | str:
    if not isinstance(record, dict):
        raise BadRecordError(f"the record is {_short(record)}, not an object")
    image_id = _identity(record.get("image_id"), "image_id")
    cell_id = _identity(record.get("id", key), "id")
    category_id = "" if record.get("category_id") is None else _identity(record["category_id"], "category_id")
    crowd = _flag(record.get("iscrowd"))
    read.add_cell(image_id, category_id, crowd, encode_cell(cell_id, crowd, _parts(record.get("segmentation"))))
    return image_id


_POLYGON, _COUNTS, _TEXT = 0, 1, 2
_HEADER = struct.Struct("<IBI")  # bytes of the id as JSON; crowd; parts
_PART = struct.Struct("<BIII")  # kind, height, width, bytes


def _parts(segmentation: Any) -> list[tuple[int, int, int, bytes]]:
    """The outline(s) of one record as (kind, height, width, bytes): polygons, RLE, or a list of either."""
    if isinstance(segmentation, dict):
        segmentation = [segmentation]
    if segmentation is None:
        raise BadRecordError("no segmentation: a box alone draws no cell")
    if not isinstance(segmentation, list):
        raise BadRecordError(f"segmentation is {_short(segmentation)}, neither polygons nor RLE")
    if segmentation and all(_number(value) is not None for value in segmentation):
        segmentation = [segmentation]  # one polygon without the list around it
    return [_rle_part(part) if isinstance(part, dict) else _polygon_part(part) for part in segmentation]


def _polygon_part(part: Any) -> tuple[int, int, int, bytes]:
    """A polygon: x1, y1, x2, y2, ... or [x1, y1], [x2, y2], ...; numbers in text are taken as such."""
    if not isinstance(part, list):
        raise BadRecordError(f"a polygon is {_short(part)}, not a list of numbers")
    if part and all(isinstance(point, list) and len(point) == 2 for point in part):
        part = [value for point in part for value in point]
    if len(part) % 2:
        raise BadRecordError(f"a polygon has {len(part)} coordinates, an odd number")
    try:
        return _POLYGON, 0, 0, array.array("f", part).tobytes()
    except (TypeError, OverflowError) as error:
        numbers = [_number(value) for value in part]
        if None in numbers:
            raise BadRecordError("a polygon holds something that is not a number") from error
    try:
        return _POLYGON, 0, 0, array.array("f", map(float, part)).tobytes()
    except OverflowError as error:
        raise BadRecordError("a polygon holds a number that is too large") from error


def _rle_part(part: dict[str, Any]) -> tuple[int, int, int, bytes]:
    counts = part.get("counts")
    height, width = _frame(part.get("size"))
    if isinstance(counts, str) and counts.isascii():
        if counts[:2] in ("b'", 'b"') and counts[-1] == counts[1]:  # Python's bytes as text; no RLE has quotes
            counts = counts[2:-1].replace("\\\\", "\\")
        return _TEXT, height, width, counts.encode()
    try:
        return _COUNTS, height, width, array.array("I", counts).tobytes()  # type: ignore[arg-type]  # caught below
    except (TypeError, OverflowError) as error:
        numbers = [_number(value) for value in (counts if isinstance(counts, list) else [None])]
        runs = [int(number) for number in numbers if number is not None and number.is_integer() and 0 <= number < 2**32]
        if len(runs) < len(numbers):
            raise BadRecordError(
                f"the counts of an RLE are {_short(counts)}, neither text nor whole numbers"
            ) from error
    return _COUNTS, height, width, array.array("I", runs).tobytes()


def _frame(size: Any) -> tuple[int, int]:
    """(height, width) of an RLE."""
    numbers = [_number(value) for value in (size if isinstance(size, list) else [])]
    sides = [int(number) for number in numbers if number is not None and number.is_integer() and 0 < number < 2**31]
    if len(numbers) != 2 or len(sides) != 2:
        raise BadRecordError(f"the size of an RLE is {_short(size)}, not [height, width]")
    return sides[0], sides[1]


def encode_cell(cell_id: int | str, crowd: bool, parts: list[tuple[int, int, int, bytes]]) -> bytes:
    """One cell as the bytes that `decode_cells` reads."""
    name = json.dumps(cell_id).encode()
    body = b"".join(_PART.pack(kind, h, w, len(data)) + data for kind, h, w, data in parts)
    return _HEADER.pack(len(name), crowd, len(parts)) + name + body


@dataclass(frozen=True)
class CellRecord:
    """One annotation: what the JSON says, not yet checked against an image."""

    id: int | str
    crowd: bool
    polygons: list[NDArray[np.float32]]
    """Each (V, 2), x and y in pixels; V may be under 3 and values may be infinite."""
    runs: list[tuple[tuple[int, int], NDArray[np.int64]]]
    """Each ((height, width), run lengths, column-major, background first); not yet checked to fill the frame."""


def decode_cells(payload: bytes) -> list[CellRecord]:
    """The cells in the bytes that `Annotations.payload` gave."""
    cells, at = [], 0
    while at < len(payload):
        name, crowd, count = _HEADER.unpack_from(payload, at)
        at += _HEADER.size
        cell = CellRecord(json.loads(payload[at : at + name]), bool(crowd), [], [])
        at += name
        for _ in range(count):
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
