"""Results of `predict`: one file per image, and the tables merged from them in bounded memory.

    .parts/KEY.json    an image's row, cells and COCO records, written after its output images
    .parts/before/     tables of an earlier complete run, whose images are not segmented again
    images.csv         one row per image, written last: its presence means that all tables are complete
    cells.csv          one row per cell
    coco.json          a list of COCO results, one line per cell

A run killed at any time can be resumed: `pending` lists the remaining images, `merge` writes the same tables.
"""

import csv
import hashlib
import io
import json
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import groupby
from typing import IO, Any, Generic, NamedTuple, TypeVar

from raylivecell.cells import measure
from raylivecell.core import storage

FOLDER, PREVIOUS = ".parts", ".parts/before"
IMAGES, CELLS, COCO = "images.csv", "cells.csv", "coco.json"
FORMAT = 2
"""Format version of result files; results and tables of other versions are ignored."""
READ_AHEAD = 16
"""Result files read concurrently: each request to an object store takes about 20 ms."""
Item = TypeVar("Item")
Result = TypeVar("Result")


class ImageRow(NamedTuple):
    """A row of images.csv; None: empty. Of an unreadable image: `file`, `image_id`, `error`, maybe `version`."""

    file: str
    image_id: int | None = None
    height: int | None = None
    width: int | None = None
    cells: int | None = None
    confluence: float | None = None
    foreground_pixels: int | None = None
    gain: float | None = None
    labels: str | None = None
    masks: str | None = None
    overlays: str | None = None
    warning: str | None = None
    error: str | None = None
    version: str | None = None
    """`version` of the segmented file."""


REQUIRED = ("file", "image_id", "cells", "confluence", "error", "version")
_PARSERS: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("image_id", "height", "width", "cells", "foreground_pixels"), int),
    **dict.fromkeys(("confluence", "gain"), float),
}


class ImageResult(NamedTuple):
    """The rows of one image in the tables."""

    row: ImageRow
    """`merge` sets its image_id."""
    cells: str = ""
    """Lines of cells.csv."""
    records: Sequence[str] = ()
    """COCO results as JSON, each without image_id and opening brace."""


def version(file: str, name: str, size: int, changed: Any) -> str:
    """Hash of an image file's path, output name, size and modification time: 16 characters."""
    return hashlib.sha256(json.dumps([FORMAT, file, name, size, changed]).encode()).hexdigest()[:16]


def is_complete(out: str, versions: Mapping[str, str]) -> bool:
    """Whether the tables in `out` list exactly the images of `versions`, file -> version."""
    uri = storage.join(out, IMAGES)
    return storage.exists(uri) and {row.file: row.version for row in _read_rows(uri)} == dict(versions)


def pending(out: str, versions: Mapping[str, str]) -> list[str]:
    """Archive an earlier run's tables in `out`, and list the files of `versions` that have no result yet."""
    _archive_previous(out)
    finished: set[str | None] = {*_finished_versions(out)}
    previous = storage.join(out, PREVIOUS, IMAGES)
    if storage.exists(previous):
        finished |= {row.version for row in _read_rows(previous)}
    return [file for file, version in versions.items() if version not in finished]


def _archive_previous(out: str) -> None:
    """Move the tables of a complete run to `PREVIOUS`; if killed between two moves, the next call resumes.

    images.csv, which marks the tables as complete, is moved first: without it, the other tables in `out` are still to
    be archived or rewritten.
    """
    previous = storage.join(out, PREVIOUS)
    if storage.exists(storage.join(out, IMAGES)):
        storage.delete(previous)
        storage.move(storage.join(out, IMAGES), storage.join(previous, IMAGES))
    if not storage.exists(storage.join(previous, IMAGES)):
        return
    for name in (CELLS, COCO):
        source, target = storage.join(out, name), storage.join(previous, name)
        if storage.exists(source) and not storage.exists(target):
            storage.move(source, target)


def _finished_versions(out: str) -> set[str]:
    return {name.removesuffix(".json") for name in storage.list_names(storage.join(out, FOLDER))}


def write(out: str, version: str, result: ImageResult) -> None:
    """Write an image's result file."""
    row = {name: value for name, value in result.row._asdict().items() if value is not None}
    data = json.dumps([row, result.cells, result.records]).encode()
    storage.write_bytes(storage.join(out, FOLDER, f"{version}.json"), data)


def record(result: Mapping[str, Any]) -> str:
    """Encode a COCO result for `ImageResult.records`."""
    return json.dumps({name: value for name, value in result.items() if name != "image_id"})[1:]


def merge(out: str, versions: Mapping[str, str], tables: Collection[str]) -> None:
    """Write images.csv, and cells.csv and coco.json if in `tables`, in the order of `versions`: by file name."""
    with ExitStack() as stack:

        def open_table(name: str) -> IO[bytes]:
            return stack.enter_context(storage.writing(storage.join(out, name)))

        images = open_table(IMAGES)  # opened first, so closed last: complete after the other tables
        cells = open_table(CELLS) if "cells" in tables else None
        coco = open_table(COCO) if "coco" in tables else None
        images.write(_csv([ImageRow._fields]).encode())
        if cells:
            cells.write(_csv([measure.COLUMNS]).encode())
        separator = b"[\n"
        for number, result in enumerate(_read_results(out, versions), 1):
            images.write(_csv([result.row._replace(image_id=number)]).encode())
            if cells:
                cells.write(result.cells.encode())
            if coco:
                for tail in result.records:
                    coco.write(separator + f'{{"image_id": {number}, {tail}'.encode())
                    separator = b",\n"
        if coco:
            coco.write(b"\n]\n" if separator == b",\n" else b"[]\n")


def _read_results(out: str, versions: Mapping[str, str]) -> Iterator[ImageResult]:
    """The result of each image, in order: from its result file, else from the previous run's tables."""
    finished = _finished_versions(out)
    previous = _previous_results(storage.join(out, PREVIOUS))

    def read(file: str) -> ImageResult | None:
        if versions[file] not in finished:
            return None
        uri = storage.join(out, FOLDER, f"{versions[file]}.json")
        with storage.validating(uri, "delete it, to segment its image again"):
            row, cells, records = storage.read_json(uri)
            if row["file"] != file or not all(isinstance(text, str) for text in (cells, *records)):
                raise ValueError(f"not the result of {file}")
            return ImageResult(ImageRow(**row), cells, records)

    for file, new in zip(versions, _read_ahead(read, versions)):
        result = new or next((result for result in previous if result.row.file == file), None)
        if result is None:
            raise RuntimeError(f"the result of {file} is missing; start again with --overwrite")
        yield result


def _read_ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Map `function` over items in order, with `READ_AHEAD` threads."""
    with ThreadPoolExecutor(READ_AHEAD) as pool:
        futures: deque[Future[Result]] = deque()
        for item in items:
            futures.append(pool.submit(function, item))
            if len(futures) > READ_AHEAD:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()


def _previous_results(folder: str) -> Iterator[ImageResult]:
    """Results in the tables of `folder`, in order; none without tables."""
    if not storage.exists(storage.join(folder, IMAGES)):
        return
    cells = _GroupReader(csv.reader(_body_lines(folder, CELLS)), lambda cell: cell[0])
    records = _GroupReader(_body_lines(folder, COCO), lambda line: line.partition(",")[0].rpartition(" ")[2])
    for row in _read_rows(storage.join(folder, IMAGES)):
        tails = [line.partition(", ")[2].rstrip(",\n") for line in records.read(str(row.image_id))]
        yield ImageResult(row, _csv(cells.read(row.file)), tails)


class _GroupReader(Generic[Item]):
    """Reads groups of consecutive items with equal keys; must be called in the order of the keys."""

    def __init__(self, items: Iterable[Item], key: Callable[[Item], str]) -> None:
        self.groups = groupby(items, key)
        self.key, self.items = next(self.groups, ("", iter(())))

    def read(self, key: str) -> list[Item]:
        if self.key != key:
            return []
        items = list(self.items)
        self.key, self.items = next(self.groups, ("", iter(())))
        return items


def _body_lines(folder: str, name: str) -> Iterator[str]:
    """The lines of a table after its first; none without such a table."""
    uri = storage.join(folder, name)
    if storage.exists(uri):
        lines = iter(_open_text(uri))
        next(lines)
        yield from (line for line in lines if line != "]\n")


def rows(out: str) -> Iterator[ImageRow]:
    """Iterate over the rows of images.csv."""
    return _read_rows(storage.join(out, IMAGES))


def rows_with_areas(out: str) -> Iterator[tuple[ImageRow, list[float]]]:
    """Iterate over images.csv, with the areas (pixels) in cells.csv of each image's cells; none without cells.csv."""
    column, uri = measure.COLUMNS.index("area_px"), storage.join(out, CELLS)
    cells = _GroupReader(csv.reader(_body_lines(out, CELLS)), lambda cell: cell[0]) if storage.exists(uri) else None
    for row in rows(out):
        with storage.validating(uri, "start again with --overwrite"):
            areas = [float(cell[column]) for cell in cells.read(row.file)] if cells else []
            if cells and len(areas) != (row.cells or 0):
                raise ValueError(f"{len(areas)} cells of {row.file}, {row.cells or 0} in {IMAGES}")
        yield row, areas


def _read_rows(uri: str) -> Iterator[ImageRow]:
    with storage.validating(uri, "start again with --overwrite"):
        for fields in csv.DictReader(_open_text(uri)):
            if any(fields.get(name) is None for name in REQUIRED):
                raise ValueError(f"a row lacks one of {', '.join(REQUIRED)}")
            if not fields["file"] or not (fields["error"] or (fields["cells"] and fields["confluence"])):
                raise ValueError("a row has no file, or neither cells nor an error")
            yield ImageRow(
                **{name: _PARSERS.get(name, str)(fields[name]) for name in ImageRow._fields if fields.get(name)}
            )


def _open_text(uri: str) -> IO[str]:
    filesystem, path = storage.open_uri(uri)
    return io.TextIOWrapper(filesystem.open_input_stream(path), "utf-8", newline="")


def _csv(lines: Iterable[Iterable[Any]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(lines)
    return buffer.getvalue()


def clear(out: str) -> None:
    """Delete the result files, which the tables now contain, and the partial files of killed writers."""
    storage.remove_partial_files(out)
    storage.delete(storage.join(out, FOLDER))
