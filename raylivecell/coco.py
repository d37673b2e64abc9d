"""Annotation files in COCO's format, read in one pass: `annotations` and `images` in any order, as lists or dicts.

1. `json_stream.walk` cuts the text into records
2. `read_annotations` keeps what images say, and spills each cell's outline to a temporary file, 4 bytes a coordinate
3. `Annotations.payload` gives back one image's cells, `decode_cells` makes arrays of them
"""

import array
import json
import struct
import tempfile
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raylivecell.json_stream import BrokenJsonError, JsonText, Reader, walk


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
        self._owners, self._kind = array.array("l"), array.array("l")
        self._starts = array.array("q", [0])
        self._order: NDArray[np.int64] | None = None

    def add_cell(self, image_id: int | str, category_id: int | str, record: bytes) -> None:
        """Spill one encoded cell of image `image_id`; neither id need be known yet."""
        self._owners.append(self._keys.setdefault(image_id, len(self._keys)))
        self._kind.append(self._kinds.setdefault(category_id, len(self._kinds)))
        self._starts.append(self._starts[-1] + self._spill.write(record))

    def counts(self) -> dict[int | str, int]:
        """Cells by image id, of ids that `images` does not hold too."""
        counted = np.bincount(np.asarray(self._owners, np.int64), minlength=len(self._keys))
        return {image_id: int(counted[key]) for image_id, key in self._keys.items()}

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
            owners = np.asarray(self._owners, np.int64)
            self._order = np.argsort(owners, kind="stable")
            self._firsts = np.searchsorted(owners[self._order], np.arange(len(self._keys) + 1))
        key = self._keys.get(image_id)
        return self._order[:0] if key is None else self._order[self._firsts[key] : self._firsts[key + 1]]


def read_annotations(stream: Reader, name: str) -> Annotations:
    """Read the COCO file `name` from `stream`, in one pass and in any order of its sections and records.

    A record that cannot be used is listed in `bad`; text that breaks off ends the reading and is told in `broken`.
    """
    text = JsonText(stream, name)
    read = Annotations(name)
    try:
        for section, key, record in walk(text):
            _keep(read, section, key, record)
    except BrokenJsonError as error:
        read.broken = error
        while text.refill():  # the checksum is of the whole file
            text.at = len(text.buffer)
    read.sha256, read.size = text.sha256.hexdigest(), text.before + len(text.buffer.encode())
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
            read.categories[_identity(record.get("id"), "id")] = str(record.get("name", ""))
    except BadRecordError as error:
        named = record.get("id", key) if isinstance(record, dict) else key
        read.bad.append((section, named if isinstance(named, int | str) else None, str(error)))


def _identity(value: Any, what: str) -> int | str:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise BadRecordError(f"{what} is {_short(value)}, not an integer or text")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _image_entry(key: str | None, record: Any) -> ImageEntry:
    if not isinstance(record, dict):
        raise BadRecordError(f"the record is {_short(record)}, not an object")
    name = record.get("file_name")
    if not isinstance(name, str) or not name:
        raise BadRecordError(f"file_name is {_short(name)}, not text")
    sizes = [record.get("width"), record.get("height")]
    for size in sizes:
        if size is not None and (isinstance(size, bool) or not isinstance(size, int | float) or not 0 < size < 2**31):
            raise BadRecordError(f"width or height is {_short(size)}, not a positive number")
    width, height = (None if size is None else int(size) for size in sizes)
    return ImageEntry(_identity(record.get("id", key), "id"), name, width, height)


def _keep_cell(read: Annotations, key: str | None, record: Any) -> int | str:
    if not isinstance(record, dict):
        raise BadRecordError(f"the record is {_short(record)}, not an object")
    image_id = _identity(record.get("image_id"), "image_id")
    cell_id = _identity(record.get("id", key), "id")
    category_id = record.get("category_id")
    cell = encode_cell(cell_id, bool(record.get("iscrowd")), _parts(record.get("segmentation")))
    read.add_cell(image_id, category_id if isinstance(category_id, int | str) else "", cell)
    return image_id


_POLYGON, _COUNTS, _TEXT = 0, 1, 2
_HEADER = struct.Struct("<IBI")  # bytes of the id as JSON; crowd; parts
_PART = struct.Struct("<BIII")  # kind, height, width, bytes


def _parts(segmentation: Any) -> list[tuple[int, int, int, bytes]]:
    """The outline(s) of one record as (kind, height, width, bytes): polygons, RLE, or a list of either."""
    if isinstance(segmentation, dict):
        segmentation = [segmentation]
    if not isinstance(segmentation, list):
        raise BadRecordError(f"segmentation is {_short(segmentation)}, neither polygons nor RLE")
    return [_rle_part(part) if isinstance(part, dict) else _polygon_part(part) for part in segmentation]


def _polygon_part(part: Any) -> tuple[int, int, int, bytes]:
    if not isinstance(part, list):
        raise BadRecordError(f"a polygon is {_short(part)}, not a list of numbers")
    if len(part) % 2:
        raise BadRecordError(f"a polygon has {len(part)} coordinates, an odd number")
    try:
        return _POLYGON, 0, 0, array.array("f", part).tobytes()
    except (TypeError, OverflowError) as error:
        raise BadRecordError("a polygon holds something that is not a number") from error


def _rle_part(part: dict[str, Any]) -> tuple[int, int, int, bytes]:
    size, counts = part.get("size"), part.get("counts")
    if not (isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) and 0 < n < 2**31 for n in size)):
        raise BadRecordError(f"the size of an RLE is {_short(size)}, not [height, width]")
    if isinstance(counts, str) and counts.isascii():
        return _TEXT, size[0], size[1], counts.encode()
    try:
        return _COUNTS, size[0], size[1], array.array("I", counts).tobytes()  # type: ignore[arg-type]  # caught below
    except (TypeError, OverflowError) as error:
        raise BadRecordError(f"the counts of an RLE are {_short(counts)}, neither text nor whole numbers") from error


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


def run_lengths(text: bytes) -> NDArray[np.int64]:
    """Run lengths of COCO's compressed RLE text; may be negative where the text is damaged.

    Format (cocoapi, maskApi.c, rleToString): 5 bits a character from 48 on, least first, bit 6 = more follow, sign
    in the last character's bit 5; from the fourth run on, each is a difference to the run two before.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        if shift > 60:  # no image is so large; the number would grow with the text, and each step's time with it
            return np.array([-1], np.int64)
        bits = character - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    return np.array([max(min(run, 2**40), -1) for run in runs], np.int64)


def mask_of_runs(size: tuple[int, int], runs: NDArray[np.int64]) -> NDArray[np.bool_] | None:
    """bool (H, W) of one RLE; None where the runs do not fill the frame exactly."""
    height, width = size
    if (runs < 0).any() or int(runs.sum()) != height * width:
        return None
    values = (np.arange(len(runs)) % 2).astype(bool)
    return np.repeat(values, runs).reshape(width, height).T
