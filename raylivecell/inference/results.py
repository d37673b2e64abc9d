"""What `predict` has found so far: a part an image, and the tables that are merged of them in bounded memory.

    .parts/KEY.json    an image's row, cells and COCO records, written once its pictures are
    .parts/before/     the tables of an earlier, whole run, whose images are not segmented again
    images.csv         a row an image, written last: where it is, the tables are whole
    cells.csv          a row a cell
    coco.json          a list of COCO results, a line a cell

Killed at any moment, what is there is enough to go on from: `begin` names the rest, `merge` makes the same tables.
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

FOLDER, BEFORE = ".parts", ".parts/before"
IMAGES, CELLS, COCO = "images.csv", "cells.csv", "coco.json"
COLUMNS = (
    "file",
    "image_id",
    "height",
    "width",
    "cells",
    "confluence",
    "foreground_pixels",
    "gain",
    "labels",
    "masks",
    "overlays",
    "warning",
    "error",
    "version",
)
"""Of images.csv. `version` tells whether a file is still the one that was segmented."""
NEEDED = ("file", "image_id", "cells", "confluence", "error", "version")
FORMAT = 2
"""Of what a part holds: the parts and tables of another one are not used."""
AHEAD = 16
"""Parts read at once: an object store answers in some 20 ms, whatever is asked."""
Item = TypeVar("Item")
Result = TypeVar("Result")


class ImageResult(NamedTuple):
    """What was found in one image."""

    row: Mapping[str, Any]
    """Of images.csv, without image_id; of an image that cannot be read `file`, `error` and perhaps `version`."""
    cells: str
    """Lines of cells.csv."""
    records: Sequence[str]
    """COCO results as JSON, each without its image_id and its opening brace."""


def version(file: str, name: str, size: int, changed: Any) -> str:
    """What tells an image file, as it now is, and the name of its outputs from any other: 16 characters."""
    return hashlib.sha256(json.dumps([FORMAT, file, name, size, changed]).encode()).hexdigest()[:16]


def write(out: str, key: str, part: ImageResult) -> None:
    """Keep an image's part."""
    storage.write_bytes(storage.join(out, FOLDER, f"{key}.json"), json.dumps(part).encode())


def record(result: Mapping[str, Any]) -> str:
    """A COCO result as a part keeps it."""
    return json.dumps({name: value for name, value in result.items() if name != "image_id"})[1:]


def is_complete(out: str, versions: Mapping[str, str]) -> bool:
    """Whether the tables in `out` are of these images, by name, in these versions, and of no others."""
    where = storage.join(out, IMAGES)
    return storage.exists(where) and {row["file"]: row["version"] for row in _table(where)} == dict(versions)


def begin(out: str, versions: Mapping[str, str]) -> list[str]:
    """Those of the images, by name, that have no part yet; an earlier run's tables in `out` are set aside as parts."""
    _set_aside(out)
    known = _keys(out)
    before = storage.join(out, BEFORE, IMAGES)
    if storage.exists(before):
        known |= {row["version"] for row in _table(before)}
    return [file for file, key in versions.items() if key not in known]


def merge(out: str, versions: Mapping[str, str], wanted: Collection[str]) -> None:
    """Write the tables of the images, in the order of `versions`, which is by name; of `cells` and `coco` if wanted."""
    with ExitStack() as stack:

        def table(name: str) -> IO[bytes]:
            return stack.enter_context(storage.writing(storage.join(out, name)))

        images = table(IMAGES)  # entered first, left last: written when the others are
        cells = table(CELLS) if "cells" in wanted else None
        coco = table(COCO) if "coco" in wanted else None
        images.write(_csv([COLUMNS]).encode())
        if cells:
            cells.write(_csv([measure.COLUMNS]).encode())
        mark = b"[\n"
        for number, part in enumerate(_parts(out, versions), 1):
            row = {**part.row, "image_id": number}
            images.write(_csv([[row.get(name, "") for name in COLUMNS]]).encode())
            if cells:
                cells.write(part.cells.encode())
            if coco:
                for tail in part.records:
                    coco.write(mark + f'{{"image_id": {number}, {tail}'.encode())
                    mark = b",\n"
        if coco:
            coco.write(b"\n]\n" if mark == b",\n" else b"[]\n")


def clear(out: str) -> None:
    """Delete the parts, for the tables hold everything, and what killed writers left."""
    storage.remove_partial_files(out)
    storage.delete(storage.join(out, FOLDER))


def rows(out: str) -> Iterator[dict[str, str]]:
    """images.csv, row by row."""
    return _table(storage.join(out, IMAGES))


def _set_aside(out: str) -> None:
    """Move the tables of a whole run to `BEFORE`; if killed between two moves, the next call makes the others.

    images.csv, which says that all are whole, goes first: without it, `out` holds no table that is not set aside or
    about to be written anew.
    """
    before = storage.join(out, BEFORE)
    if storage.exists(storage.join(out, IMAGES)):
        storage.delete(before)
        storage.move(storage.join(out, IMAGES), storage.join(before, IMAGES))
    if not storage.exists(storage.join(before, IMAGES)):
        return
    for name in (CELLS, COCO):
        here, there = storage.join(out, name), storage.join(before, name)
        if storage.exists(here) and not storage.exists(there):
            storage.move(here, there)


def _keys(out: str) -> set[str]:
    return {name.removesuffix(".json") for name in storage.list_names(storage.join(out, FOLDER))}


def _parts(out: str, versions: Mapping[str, str]) -> Iterator[ImageResult]:
    """The part of each image, in order: its own, or what the earlier run's tables tell."""
    own = _keys(out)
    before = _before(storage.join(out, BEFORE))

    def read(file: str) -> ImageResult | None:
        if versions[file] not in own:
            return None
        where = storage.join(out, FOLDER, f"{versions[file]}.json")
        with storage.validating(where, "delete it, and its image is segmented again"):
            found = ImageResult(*storage.read_json(where))
            if found.row["file"] != file or not all(isinstance(one, str) for one in (found.cells, *found.records)):
                raise ValueError(f"it is not of {file}")
        return found

    for file, part in zip(versions, _ahead(read, versions)):
        found = part or next((one for one in before if one.row["file"] == file), None)
        if found is None:
            raise RuntimeError(f"what was found in {file} is lost; start anew with --overwrite")
        yield found


def _before(folder: str) -> Iterator[ImageResult]:
    """Parts of the tables in `folder`, in their order; none where there are no tables."""
    if not storage.exists(storage.join(folder, IMAGES)):
        return
    cells = _Groups(csv.reader(_lines(folder, CELLS)), lambda cell: cell[0])
    records = _Groups(_lines(folder, COCO), lambda line: line.partition(",")[0].rpartition(" ")[2])
    for row in _table(storage.join(folder, IMAGES)):
        tails = [line.partition(", ")[2].rstrip(",\n") for line in records.take(row["image_id"])]
        yield ImageResult(row, _csv(cells.take(row["file"])), tails)


class _Groups(Generic[Item]):
    """Neighbouring items of one name, asked for in the order of names."""

    def __init__(self, items: Iterable[Item], name: Callable[[Item], str]) -> None:
        self.groups = groupby(items, name)
        self.name, self.items = next(self.groups, ("", iter(())))

    def take(self, name: str) -> list[Item]:
        if self.name != name:
            return []
        found = list(self.items)
        self.name, self.items = next(self.groups, ("", iter(())))
        return found


def _lines(folder: str, name: str) -> Iterator[str]:
    """The lines of a table after its head; none where it is not there."""
    where = storage.join(folder, name)
    if storage.exists(where):
        lines = iter(_text(where))
        next(lines)
        yield from (line for line in lines if line != "]\n")


def _table(uri: str) -> Iterator[dict[str, str]]:
    with storage.validating(uri, "start anew with --overwrite"):
        for row in csv.DictReader(_text(uri)):
            if any(row.get(name) is None for name in NEEDED):
                raise ValueError(f"a row lacks one of {', '.join(NEEDED)}")
            yield row


def _text(uri: str) -> IO[str]:
    filesystem, path = storage.open_uri(uri)
    return io.TextIOWrapper(filesystem.open_input_stream(path), "utf-8", newline="")


def _csv(lines: Iterable[Iterable[Any]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(lines)
    return buffer.getvalue()


def _ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`function` of each item, in order, `AHEAD` of them under way in threads."""
    with ThreadPoolExecutor(AHEAD) as pool:
        pending: deque[Future[Result]] = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
