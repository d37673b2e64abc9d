"""Cells of an image -> the body of an answer, in each format. The bytes are those that `predict` writes."""

import base64
import csv
import io
import itertools
import json
import zipfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from raylivecell.annotations import pixel_outlines, rle
from raylivecell.cells import measure
from raylivecell.images import planes
from raylivecell.images.intensity import Frame
from raylivecell.inference.image_file import PICTURES
from raylivecell.inference.segmenter import Cells
from raylivecell.reports import overlay
from raylivecell.scoring import average_precision
from raylivecell.serving.requests import Format, RequestError

# A format of an answer -> the output of `predict` with the same bytes.
_PICTURES = {"labels": "labels", "overlay": "overlays", "rois": "rois", "geojson": "geojson"}


class Segmented(NamedTuple):
    """An image with its cells."""

    file: str
    """Name of the file, with #PLANE if it has several."""
    frame: Frame
    cells: Cells


class View(NamedTuple):
    """What a page needs in addition."""

    planes: Sequence[str]
    """Names of all planes of the file; "" if it has one."""


class Answer(NamedTuple):
    """The encoded result of one image, or why there is none."""

    file: str
    status: int
    """200, or the HTTP status of the error."""
    body: bytes
    """In the format of the request; of an error, its line."""
    planes: Sequence[str] = ()
    """Of an error: all planes of the file, if they are known."""


def encode(image: Segmented, kind: Format, model: str, view: View | None) -> Answer:
    """Encode the cells of an image; `model` is the network's fingerprint, `view` adds what `Options.view` says."""
    if kind in _PICTURES:
        body = PICTURES[_PICTURES[kind]][1](image.frame.levels, image.cells)
    elif kind == "csv":
        body = measure.lines(image.file, _measured(image), image.cells.scores).encode()
    elif kind == "coco":
        detections = average_precision.results(0, rle.encode(image.cells.labels), image.cells.scores)
        body = json.dumps([{**detection, "file_name": image.file} for detection in detections]).encode()
    else:
        body = json.dumps(_description(image, model) | (_view(image, view) if view else {})).encode()
    return Answer(image.file, 200, body)


def combine(answers: Sequence[Answer], kind: Format, stack: bool) -> tuple[bytes, str]:
    """The body for all images of a request, and the suffix of a file with it.

    One file with one image: its answer itself. Several: JSON {"images": [...]}, one table (csv), one list (coco), or a
    zip with a file per image. Errors of single images are in the JSON, and in errors.csv of a zip; in a table or list
    they would be lost, so the first one is raised.

    Raises:
        RequestError: no image, or none of a table, has a result.
    """
    failed = [answer for answer in answers if answer.status != 200]
    if failed and (len(failed) == len(answers) or kind in ("csv", "coco")):
        first = failed[0]
        line = f"{first.file}: {first.body.decode()}" if len(answers) > 1 else first.body.decode()
        raise RequestError(first.status, line, first.planes)
    if kind == "json":
        if not stack:
            return answers[0].body, ".json"
        bodies = [answer.body if answer.status == 200 else _error(answer) for answer in answers]
        return b'{"images": [' + b", ".join(bodies) + b"]}", ".json"
    if kind == "csv":
        return csv_line(measure.COLUMNS).encode() + b"".join(answer.body for answer in answers), ".csv"
    if kind == "coco":
        return _coco(answers), ".json"
    if not stack:
        return answers[0].body, PICTURES[_PICTURES[kind]][0]
    return _zip(answers, PICTURES[_PICTURES[kind]][0]), ".zip"


def _measured(image: Segmented) -> measure.Measurements:
    return measure.measure(image.cells.labels, image.frame.levels)


def _description(image: Segmented, model: str) -> dict[str, Any]:
    """The JSON of an image."""
    frame, cells = image.frame, image.cells
    measured = _measured(image)
    outlines = {outline.label: outline.polygons for outline in pixel_outlines.trace(cells.labels)}
    height, width = cells.labels.shape
    return {
        "file": image.file,
        "width": width,
        "height": height,
        "count": len(cells.scores),
        "confluence": round(float((cells.labels != 0).sum()) / max(1, frame.own_pixels), 6),
        "gain": frame.gain,
        "warnings": list(cells.warnings),
        "model": model,
        "cells": [
            {
                "label": int(label),
                "outline": _outline(outlines[int(label)]),
                "area_px": int(measured.area_px[i]),
                "score": round(float(cells.scores[i]), 4),
                "centroid": [round(float(measured.centroid_x[i]), 2), round(float(measured.centroid_y[i]), 2)],
                "bbox": [
                    int(value[i])
                    for value in (measured.bbox_x, measured.bbox_y, measured.bbox_width, measured.bbox_height)
                ],
                "eccentricity": round(float(measured.eccentricity[i]), 4),
                "mean_intensity": round(float(measured.mean_intensity[i]), 2),
                "touches_border": bool(measured.touches_border[i]),
            }
            for i, label in enumerate(measured.label)
        ],
    }


def _outline(polygons: list[pixel_outlines.Polygon]) -> list[list[int]]:
    """Corners [x, y] of the exterior ring of a cell's largest part; 0, 0 is the upper left corner of the image."""
    rings = [polygon[0] for polygon in polygons]
    return max(rings, key=pixel_outlines.doubled_area).tolist()


def _view(image: Segmented, view: View) -> dict[str, Any]:
    """All planes of the file, the image as PNG, and the labels as runs in image order: label, length ..."""
    return {
        "planes": list(view.planes),
        "image_png": base64.b64encode(overlay.png(image.frame.levels)).decode(),
        "label_runs": int32_base64(runs(image.cells.labels)),
    }


def runs(labels: NDArray[np.int32]) -> NDArray[np.int64]:
    """Runs of equal labels in image order: label, length, label, length ..., int64."""
    flat = labels.ravel()
    starts = np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1]]))
    return np.stack([flat[starts], np.diff(np.append(starts, flat.size))], axis=1).ravel().astype(np.int64)


def int32_base64(numbers: NDArray[np.integer[Any]]) -> str:
    """Integers as little-endian int32 in base64."""
    return base64.b64encode(numbers.astype("<i4").tobytes()).decode()


def _coco(answers: Sequence[Answer]) -> bytes:
    """COCO results of all images; image_id counts the images from 1."""
    records = [
        {**record, "image_id": number} for number, answer in enumerate(answers, 1) for record in json.loads(answer.body)
    ]
    return json.dumps(records).encode()


def _error(answer: Answer) -> bytes:
    return json.dumps({"file": answer.file, "error": answer.body.decode(), "status": answer.status}).encode()


def _zip(answers: Sequence[Answer], suffix: str) -> bytes:
    """A zip with a file per image; of names that differ only in case or suffix the later ones get a number."""
    buffer, names = io.BytesIO(), set[str]()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for answer in answers:
            if answer.status == 200:
                archive.writestr(_unused(answer.file, names) + suffix, answer.body)
        failed = [(answer.file, answer.body.decode()) for answer in answers if answer.status != 200]
        if failed:
            archive.writestr("errors.csv", "".join(map(csv_line, [("file", "error"), *failed])))
    return buffer.getvalue()


def _unused(address: str, names: set[str]) -> str:
    """Name of an image in a zip, without suffix; it is added to `names`."""
    file, plane = planes.split_address(address)
    stem = file.rpartition(".")[0] or file
    base = name = f"{stem}_{plane}" if plane else stem
    for number in itertools.count(2):
        if name.casefold() not in names:
            break
        name = f"{base}_{number}"
    names.add(name.casefold())
    return name


def csv_line(fields: Sequence[Any]) -> str:
    """A line of a CSV table."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(fields)
    return buffer.getvalue()
