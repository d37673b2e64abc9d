"""Requests of the page beyond `/segment`: files of corrected cells, scores against other labels, growth curves, pairs.

A request is JSON, and so is its answer; files and arrays in them are base64. Arrays are not JSON lists, because a list
of numbers takes 26 times its text in memory. No Ray.
"""

import base64
import binascii
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from raylivecell.cells import measure
from raylivecell.core.errors import UserError
from raylivecell.core.settings import StrictModel
from raylivecell.data import pairing
from raylivecell.growth.curves import Collector, ImageCount
from raylivecell.growth.names import NamePattern
from raylivecell.images import formats
from raylivecell.images.formats import UnreadableImageError
from raylivecell.inference import growth as growth_files
from raylivecell.inference import label_files
from raylivecell.inference.image_file import MAX_PIXELS, PICTURES
from raylivecell.inference.segmenter import Cells
from raylivecell.reports import growth_page
from raylivecell.scoring.scores import score
from raylivecell.serving import answers

Task = Literal["export", "score", "growth", "pairs"]
TASKS: tuple[Task, ...] = get_args(Task)
MAX_BYTES = 2**28
"""Of a request: an image of `MAX_PIXELS` grey levels as PNG in base64, and its labels."""
MAX_CELLS = 100_000
"""In an export: tracing outlines of more takes minutes."""
MAX_RUNS = 2**23
"""In the answer of a score, 64 MiB: a label image of noise has a run per pixel."""
MAX_IMAGES = 100_000
NO_WELLS = "Growth curves need a well and a time in the name of a file, such as A172_Phase_B7_1_00d08h00m_2.tif"
FILES = ("labels", "overlays", "geojson", "rois")
"""Files of an image in the zip of the page: outputs of `predict`."""
Model = TypeVar("Model", bound=StrictModel)
Numbers = TypeVar("Numbers", bound=np.generic)


class LabelRuns(StrictModel):
    """A label image (H, W) as runs."""

    width: int = Field(ge=1, le=MAX_PIXELS)
    height: int = Field(ge=1, le=MAX_PIXELS)
    label_runs: str
    """Label, length, label, length ... in image order, little-endian int32 in base64; 0 is background."""

    def labels(self) -> NDArray[np.int32]:
        """The labels, numbered from 1 in their order, int32 (H, W); UserError if the runs do not fill the image."""
        size = self.width * self.height
        numbers = _array(self.label_runs, "label_runs", np.int32)
        if size > MAX_PIXELS or len(numbers) % 2:
            raise UserError(f"label_runs: pairs of label and length of {MAX_PIXELS} pixels at most are needed")
        values, lengths = numbers[::2], numbers[1::2].astype(np.int64)
        if (values < 0).any() or (lengths < 1).any() or int(lengths.sum()) != size:
            raise UserError(f"label_runs: labels of 0 or more, and lengths of 1 or more of {size} pixels, are needed")
        consecutive = np.unique(np.append(0, values), return_inverse=True)[1][1:]
        return np.repeat(consecutive.astype(np.int32), lengths).reshape(self.height, self.width)


class Export(LabelRuns):
    """An image with its cells, as the page has them."""

    file: str = Field(max_length=1000)
    """Path of the image; the first column of cells.csv."""
    image_png: str
    """What the network saw, PNG in base64."""
    scores: str
    """Score of each label in ascending order, little-endian float64 in base64; 1 for cells drawn by hand."""


class Reference(LabelRuns):
    """Cells, and a label image to compare them with."""

    reference: str
    """TIFF, PNG or NPY in base64."""


class GrowthRow(StrictModel):
    """Result of an image, for growth curves."""

    file: str = Field(max_length=1000)
    cells: int = Field(ge=0, le=MAX_PIXELS)
    confluence: float = Field(ge=0, le=1)
    area: float | None = Field(ge=0, le=MAX_PIXELS)
    """Median pixels of its cells."""
    width: int = Field(ge=1, le=MAX_PIXELS)
    height: int = Field(ge=1, le=MAX_PIXELS)
    has_warning: bool


class Growth(StrictModel):
    """Results of images whose names have a well and a time."""

    images: list[GrowthRow] = Field(max_length=MAX_IMAGES, fail_fast=True)
    frame_hours: float | None = Field(None, gt=0)
    """Hours between the frames of a time stack."""


class Paths(StrictModel):
    """Paths of dropped files."""

    paths: list[str] = Field(max_length=MAX_IMAGES, fail_fast=True)


def answer(task: Task, body: bytes) -> bytes:
    """The answer to a request of the page, JSON.

    Args:
        task: which request.
        body: its JSON: `Export`, `Reference`, `Growth` or `Paths`.

    Raises:
        UserError: the body is not such a document, or an image in it cannot be read.
    """
    tasks: Mapping[Task, Callable[[], Mapping[str, Any]]] = {
        "export": lambda: _export(_parsed(Export, body)),
        "score": lambda: _score(_parsed(Reference, body)),
        "growth": lambda: _growth(_parsed(Growth, body)),
        "pairs": lambda: _pairs(_parsed(Paths, body)),
    }
    return json.dumps(tasks[task]()).encode()


def _parsed(model: type[Model], body: bytes) -> Model:
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise UserError(f"{'.'.join(map(str, first['loc'])) or 'body'}: {first['msg']}") from error


def _export(image: Export) -> dict[str, Any]:
    """Files of `FILES` in base64, and the rows of cells.csv: those that `predict` writes for the same cells."""
    labels, scores = image.labels(), _array(image.scores, "scores", np.float64)
    count = int(labels.max(initial=0))
    if count > MAX_CELLS:
        raise UserError(f"{count} cells; files of {MAX_CELLS} at most are written here, use `raylivecell predict`")
    if len(scores) != count or not ((scores >= 0) & (scores <= 1)).all():
        raise UserError(f"scores: {count} numbers from 0 to 1 are needed, one for each label")
    try:
        levels = formats.ImageFile(_bytes(image.image_png, "image_png")).decode(max_pixels=MAX_PIXELS).pixels
    except UnreadableImageError as error:
        raise UserError(f"image_png: {error}") from error
    if levels.dtype != np.uint8 or levels.shape != labels.shape:
        raise UserError(f"image_png is {levels.dtype} {levels.shape}, its labels are {labels.shape}")
    cells = Cells(labels, scores, labels != 0)
    return {
        "files": {
            f"{kind}/{{}}{PICTURES[kind][0]}": base64.b64encode(PICTURES[kind][1](levels, cells)).decode()
            for kind in FILES
        },
        "cells": measure.lines(image.file, measure.measure(labels, levels), scores),
        "columns": answers.csv_line(measure.COLUMNS),
    }


def _score(request: Reference) -> dict[str, Any]:
    """Scores of the cells, and the reference as runs to draw it."""
    labels = request.labels()
    truth = label_files.decode(_bytes(request.reference, "reference"), labels.shape, "the reference")
    runs = answers.runs(truth.labels)
    if len(runs) > MAX_RUNS:
        raise UserError("the reference changes its label at almost every pixel: it is not a label image of cells")
    return {
        "scores": score(labels, truth.labels),
        "label_runs": answers.int32_base64(runs),
        "warnings": list(truth.warnings),
    }


def _growth(request: Growth) -> dict[str, Any]:
    """Charts of replicates and wells, and the report as a page; `charts` is empty without a well of two times."""
    names, collector, unmatched = NamePattern(frame_hours=request.frame_hours), Collector(), []
    for row in request.images:
        position = names.parse(row.file)
        if position is None:
            unmatched.append(row.file)
            continue
        size = (row.height, row.width)
        collector.add(position, ImageCount(row.cells, row.confluence, row.area, size, row.has_warning))
    curves = collector.curves()
    if all(len(curve.points) < 2 for curve in curves.wells):
        return {"charts": [], "notes": [] if len(curves.wells) else [NO_WELLS]}
    notes = growth_files.notes(collector, unmatched)
    return {
        "charts": [
            {
                "title": card.title,
                "doubling": card.doubling,
                "reasons": list(card.reasons),
                "charts": [{"title": title, **_chart(chart._asdict())} for title, chart in card.charts],
            }
            for card in growth_page.cards(curves)
            if len(card.charts[0][1].points) > 1
        ],
        "notes": notes,
        "page": growth_page.render(curves, notes).decode(),
    }


def _pairs(request: Paths) -> dict[str, Any]:
    """Images, and which label image belongs to which, as `prepare` pairs them."""
    pairs = pairing.find_pairs(request.paths, "labels")
    unpaired = [
        *pairs.annotations,
        *(path for pair in pairs.pairs if len(pair.annotations) > 1 for path in pair.annotations),
        *(path for _, paths in pairs.ambiguous for path in paths),
    ]
    # A JPEG named like labels cannot contain any: it is an image.
    lossy = [path for path in unpaired if path.lower().endswith(pairing.OTHER_SUFFIXES)]
    return {
        "images": [
            *(pair.image for pair in pairs.pairs),
            *pairs.images,
            *(image for images, _ in pairs.ambiguous for image in images),
            *lossy,
        ],
        "labels": {pair.image: pair.annotations[0] for pair in pairs.pairs if len(pair.annotations) == 1},
        "unpaired": [path for path in unpaired if path not in lossy],
    }


def _chart(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A chart with names instead of positions."""
    return {**fields, "box": fields["box"]._asdict(), "points": _dicts(fields["points"])}


def _dicts(rows: Sequence[Any]) -> list[dict[str, Any]]:
    return [row._asdict() for row in rows]


def _array(text: str, name: str, kind: type[Numbers]) -> NDArray[Numbers]:
    data, item = _bytes(text, name), np.dtype(kind).newbyteorder("<")
    if len(data) % item.itemsize:
        raise UserError(f"{name}: not a whole number of {np.dtype(kind)}")
    return np.frombuffer(data, item).astype(kind)


def _bytes(text: str, name: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"{name}: not base64") from error
