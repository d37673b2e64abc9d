"""What the page asks for beyond `/segment`: files of corrected cells, scores against other labels, growth curves.

A request is JSON; so is its answer, with files as base64. No Ray.
"""

import base64
import binascii
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from raylivecell.cells import measure
from raylivecell.core.errors import UserError
from raylivecell.core.settings import StrictModel
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
from raylivecell.serving.answers import runs

Task = Literal["export", "score", "growth"]
FILES = ("labels", "overlays", "geojson", "rois")
"""Files of an image in the zip of the page: outputs of `predict`."""
Model = TypeVar("Model", bound=StrictModel)


class LabelRuns(StrictModel):
    """A label image (H, W) as runs."""

    width: int = Field(ge=1)
    height: int = Field(ge=1)
    label_runs: list[int]
    """Label, length, label, length ... in image order; 0 is background."""

    def labels(self) -> NDArray[np.int32]:
        """The labels, numbered from 1 in their order, int32 (H, W); UserError if the runs do not fill the image."""
        values = np.array(self.label_runs, np.int64).reshape(-1, 2) if len(self.label_runs) % 2 == 0 else None
        size = self.width * self.height
        if size > MAX_PIXELS or values is None or (values < 0).any() or int(values[:, 1].sum()) != size:
            raise UserError(f"label_runs: pairs of label and length of {size} pixels, {MAX_PIXELS} at most, are needed")
        stored, numbers = np.unique(np.append(0, values[:, 0]), return_inverse=True)
        if len(stored) > 1 and stored[-1] >= 2**31:
            raise UserError(f"label_runs: {stored[-1]} is above 2^31 - 1")
        return np.repeat(numbers[1:], values[:, 1]).reshape(self.height, self.width).astype(np.int32)


class Export(LabelRuns):
    """An image with its cells, as the page has them."""

    file: str = Field(max_length=1000)
    """Path of the image; the first column of cells.csv."""
    image_png: str
    """What the network saw, PNG in base64."""
    scores: list[float]
    """Score of each label in ascending order; 1 for cells drawn by hand."""


class Reference(LabelRuns):
    """Cells, and a label image to compare them with."""

    reference: str
    """TIFF, PNG or NPY in base64."""


class GrowthRow(StrictModel):
    """Result of an image, for growth curves."""

    file: str = Field(max_length=1000)
    cells: int = Field(ge=0)
    confluence: float = Field(ge=0, le=1)
    areas: list[int]
    """Pixels of each cell."""
    width: int
    height: int
    has_warning: bool


class Growth(StrictModel):
    """Results of images whose names have a well and a time."""

    images: list[GrowthRow]
    frame_hours: float | None = Field(None, gt=0)
    """Hours between the frames of a time stack."""


def answer(task: Task, body: bytes) -> bytes:
    """The answer to a request of the page, JSON.

    Args:
        task: which request.
        body: its JSON: `Export`, `Reference` or `Growth`.

    Raises:
        UserError: the body is not such a document, or an image in it cannot be read.
    """
    tasks: Mapping[Task, Callable[[], Mapping[str, Any]]] = {
        "export": lambda: _export(_parsed(Export, body)),
        "score": lambda: _score(_parsed(Reference, body)),
        "growth": lambda: _growth(_parsed(Growth, body)),
    }
    return json.dumps(tasks[task]()).encode()


def _parsed(model: type[Model], body: bytes) -> Model:
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{'.'.join(map(str, first['loc'])) or 'body'}: {first['msg']}") from error


def _export(image: Export) -> dict[str, Any]:
    """Files of `FILES` in base64, and the rows of cells.csv: those that `predict` writes for the same cells."""
    labels = image.labels()
    try:
        levels = formats.ImageFile(_bytes(image.image_png, "image_png")).decode(max_pixels=MAX_PIXELS).pixels
    except UnreadableImageError as error:
        raise UserError(f"image_png: {error}") from error
    scores = np.array(image.scores, np.float64)
    if levels.dtype != np.uint8 or levels.shape != labels.shape or len(scores) != labels.max(initial=0):
        raise UserError(
            f"image_png is {levels.dtype} {levels.shape}, labels are {labels.shape}, scores {len(scores)} of "
            f"{labels.max(initial=0)}: the image, its labels and a score for each are needed"
        )
    cells = Cells(labels, scores, labels != 0)
    return {
        "files": {
            f"{kind}/{{}}{PICTURES[kind][0]}": base64.b64encode(PICTURES[kind][1](levels, cells)).decode()
            for kind in FILES
        },
        "cells": measure.lines(image.file, measure.measure(labels, levels), scores),
        "columns": ",".join(measure.COLUMNS) + "\n",
    }


def _score(request: Reference) -> dict[str, Any]:
    """Scores of the cells, and the reference as runs to draw it."""
    labels = request.labels()
    truth = label_files.decode(_bytes(request.reference, "reference"), labels.shape, "the reference")
    return {
        "scores": score(labels, truth.labels),
        "label_runs": runs(truth.labels).tolist(),
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
        area = float(statistics.median(row.areas)) if row.areas else None
        size = (row.height, row.width)
        collector.add(position, ImageCount(row.cells, row.confluence, area, size, row.has_warning))
    curves = collector.curves()
    if all(len(curve.points) < 2 for curve in curves.wells):
        return {"charts": [], "notes": []}
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


def _chart(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A chart with names instead of positions."""
    return {**fields, "box": fields["box"]._asdict(), "points": _dicts(fields["points"])}


def _dicts(rows: Sequence[Any]) -> list[dict[str, Any]]:
    return [row._asdict() for row in rows]


def _bytes(text: str, name: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise UserError(f"{name}: not base64") from error
