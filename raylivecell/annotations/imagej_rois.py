"""ImageJ's ROI files, RoiSet.zip and .roi, in both directions.

1. `read`    ROIs -> one record per ROI, with the pixels that ImageJ's "Create Mask" shows for it
2. `write`   label image -> RoiSet.zip whose outlines follow the pixel edges

Sources of the rules: ImageJ's RoiDecoder, PolygonFiller, OvalRoi, ShapeRoi, EllipseRoi and RotatedRectRoi. The masks of
ImageJ 1.53t do not differ in a pixel: for 411 written files, Usiigaci's 645 ROIs and 300 random ones of all kinds.
"""

import io
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from roifile import ROI_OPTIONS, ROI_SUBTYPE, ROI_TYPE, ImagejRoi

from raylivecell.annotations.coco import CellRecord
from raylivecell.annotations.drawing import MAX_CELLS, Patch
from raylivecell.annotations.errors import AnnotationError
from raylivecell.annotations.pixel_outlines import Budget, CellOutline, fill, trace
from raylivecell.annotations.rle import label_runs, patch_runs
from raylivecell.core.errors import UserError, shortened
from raylivecell.images.planes import Place

MAX_BYTES = 2**28
"""Maximum decompressed size of a zip: 1 KB per ROI is typical."""
MAX_INTEGER = 2**15 - 1
"""Maximum coordinate that every reader takes from a 16-bit field; larger ones are written as floats too."""
MAX_EXACT = 2**24
"""Up to this value a 32-bit float holds every integer."""
VERSION = 227
"""Of the written ROIs: ImageJ 1.52."""
AREAS = (ROI_TYPE.POLYGON, ROI_TYPE.FREEHAND, ROI_TYPE.TRACED, ROI_TYPE.RECT, ROI_TYPE.OVAL)
NO_AREA = {
    ROI_TYPE.LINE: "line",
    ROI_TYPE.FREELINE: "freehand line",
    ROI_TYPE.POLYLINE: "polyline",
    ROI_TYPE.ANGLE: "angle",
    ROI_TYPE.POINT: "point",
    ROI_TYPE.NOROI: "empty selection",
}
FLATNESS, MAX_HALVINGS = 0.01, 10
"""Curves become chords this close, in pixels: ShapeRoi.FILL_FLATNESS and Java's FlatteningPathIterator."""
CHORD_WORK = 2**10
"""Work of one chord in a `Budget`, in pixels: about 1 us."""
PLACES_OF_SEGMENT = {0: 1, 1: 1, 2: 2, 3: 3, 4: 0}
"""Segment of a path (java.awt.geom.PathIterator) -> its number of points: move, line, quadratic, cubic, close."""
Point = tuple[float, float]
"""x and y in pixels."""
_DAMAGED = (ValueError, TypeError, IndexError, OverflowError, AssertionError, RuntimeError, struct.error)


def read(
    data: bytes, shape: tuple[int, int], place: Place | None = None, ignore: Sequence[str] = ()
) -> list[CellRecord]:
    """Read the ROIs of an image in the order of the file; where ROIs overlap, the later one covers the earlier ones.

    Polygons, freehand and traced outlines, rectangles, ovals, ellipses, rotated rectangles and composites become runs
    clipped to the image. The id is the ROI's name. A record without an outline, which `prepare` lists as empty, has the
    reason in its id: lines, points and texts have no area, or later ROIs cover all of it.

    Why later ROIs cover earlier ones: so do ImageJ's tools that draw label images, and the label images published with
    Usiigaci's 645 hand-drawn ROIs. Per cell, its label images and this function agree with an IoU of 0.941 or more
    (median 0.988); with the smaller cell on top it is 0.601. The remaining difference is half a pixel: those label
    images test the upper left corner of a pixel instead of its centre; shifted by that, the IoU is at least 0.997.

    Args:
        data: RoiSet.zip or a single .roi. Entries of a zip that do not end in .roi are ignored, as in Fiji.
        shape: (H, W) of the image.
        place: of the image in its stack. ROIs may state no slice, otherwise it must be this one in any channel.
        ignore: names of ROIs that are ignore regions, which cover no cell. Upper and lower case are equal, and the
            number that the ROI Manager adds to equal names is left out (`debris-1`).

    Raises:
        AnnotationError: damaged, too large, without ROIs, with ROIs of several slices of a stack or of another slice
            than the image, or with an outline that cannot be reproduced exactly (spline fit, rounded rectangle).
    """
    budget, ids, has_pixels, slices = Budget(), [], [], set()
    owners = np.zeros(shape, np.int32)  # number of the last ROI at each pixel
    regions: dict[int, tuple[str, NDArray[np.int64]]] = {}  # number -> name in `ignore`, run lengths
    names = {name.casefold(): name for name in ignore}
    for name, content in _contents(data):
        try:
            roi = ImagejRoi.frombytes(content)
            name = name or roi.name or "1"
            reason, (top, left, mask) = _pixels(name, roi, content, shape, budget)
        except _DAMAGED as error:
            problem = shortened(str(error))
            raise AnnotationError(f"ROI {name} is damaged ({problem}); save it again in ImageJ") from error
        slices.add((roi.position, roi.z_position, roi.t_position))
        ids.append(f"{name} ({reason})" if reason else name)
        has_pixels.append(bool(mask.any()))
        if region := names.get(name.casefold()) or names.get(re.sub(r"-\d+$", "", name).casefold()):
            regions[len(ids)] = region, patch_runs(mask, top, left, shape)
        else:
            owners[top : top + mask.shape[0], left : left + mask.shape[1]][mask != 0] = len(ids)
    if len(slices - {(0, 0, 0)}) > 1:
        raise AnnotationError(
            f"the ROIs belong to {len(slices - {(0, 0, 0)})} slices of a stack; save one file of ROIs per image"
        )
    if place is not None:
        for position, z, t in slices:
            _check_slice(place, position, z, t)
    outlines = {number: ("", runs) for number, runs in label_runs(owners).items()} | regions
    records = []
    for number, (roi_id, visible) in enumerate(zip(ids, has_pixels), 1):
        region, runs = outlines.get(number, ("", None))
        covered = f"{roi_id} (covered by later ROIs)" if visible and runs is None else roi_id
        records.append(CellRecord(covered, False, [], [] if runs is None else [(shape, runs)], region))
    return records


def _check_slice(place: Place, position: int, z: int, t: int) -> None:
    """Raise if a ROI states another slice than that of the image; 0 is none, -1 one per point."""
    is_at = place.is_at(z - 1 if z > 0 else None, t - 1 if t > 0 else None)
    if not is_at or (position > 0 and position not in place.slices):
        stated = {"slice": position, "z": z, "t": t}
        text = ", ".join(f"{name} {number}" for name, number in stated.items() if number > 0)
        raise AnnotationError(
            f"the ROIs belong to {text} of the stack (from 1), the image is plane {place.name} (from 0); "
            "choose the plane of the ROIs with --plane, or save ROIs of this slice"
        )


def _contents(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield the name of each ROI, empty for a single .roi, which contains its name, and its bytes."""
    if data[:4] == b"Iout":
        yield "", data
        return
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = [entry for entry in archive.infolist() if _is_roi(entry.filename)]
            size = sum(entry.file_size for entry in entries)
            if not entries and archive.infolist():  # an empty zip is a written image without cells
                raise AnnotationError("the zip contains no .roi file; save it with ImageJ's ROI Manager, More > Save")
            if len(entries) > MAX_CELLS or size > MAX_BYTES:
                raise AnnotationError(
                    f"the zip contains {len(entries)} ROIs of {size} bytes, more than {MAX_CELLS} or {MAX_BYTES}; "
                    "cut the image into tiles"
                )
            for entry in entries:
                # zipfile returns at most `file_size` bytes, so that the sum above is the limit.
                yield _name(entry.filename), archive.read(entry)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError, *_DAMAGED) as error:
        raise AnnotationError(
            f"neither a RoiSet.zip nor a .roi file: {shortened(str(error))}; save it again in ImageJ"
        ) from error


def _is_roi(path: str) -> bool:
    """Whether a zip entry is a ROI, and not a folder or one of macOS's additions."""
    return path.lower().endswith(".roi") and "__MACOSX" not in path


def _name(path: str) -> str:
    """Printable name of a ROI from the name of its zip entry."""
    name = path.replace("\\", "/").rsplit("/", 1)[-1][:-4]
    return "".join(character if character.isprintable() else "?" for character in name)[:100]


def _pixels(name: str, roi: ImagejRoi, content: bytes, shape: tuple[int, int], budget: Budget) -> tuple[str, Patch]:
    """The reason why a ROI has no outline, or "", and its pixels in the image."""
    empty = Patch(0, 0, np.zeros((0, 0), np.uint8))
    if roi.subtype in (ROI_SUBTYPE.TEXT, ROI_SUBTYPE.IMAGE):
        return f"{roi.subtype.name.lower()}, no outline", empty
    if roi.roitype in NO_AREA:
        return f"{NO_AREA[roi.roitype]}, no area", empty
    if roi.roitype not in AREAS:
        raise AnnotationError(f"ROI {name} has the unknown type {int(roi.roitype)}; redraw it in ImageJ")
    if roi.roitype == ROI_TYPE.OVAL and not roi.composite:
        return "", _oval(roi, shape, budget)
    patch = fill([_rings(name, roi, content, budget)], shape, budget)
    return "" if patch.mask.any() else "no pixel in the image", patch


def _rings(name: str, roi: ImagejRoi, content: bytes, budget: Budget) -> list[NDArray[np.float64]]:
    """Outlines of a ROI, filled together by the even-odd rule."""
    if roi.composite:
        if roi.multi_coordinates is None:
            raise ValueError("a composite of an unknown type")
        return _path_rings(roi.multi_coordinates.tolist(), budget)
    if roi.roitype == ROI_TYPE.RECT:
        if roi.rounded_rect_arc_size > 0:
            raise AnnotationError(f"ROI {name} is a rounded rectangle; redraw it as a polygon in ImageJ")
        left, top, width, height = _box(roi)
        corners = [(left, top), (left + width, top), (left + width, top + height), (left, top + height)]
        return [np.array(corners, np.float64)]
    if roi.subtype in (ROI_SUBTYPE.ELLIPSE, ROI_SUBTYPE.ROTATED_RECT):
        return [_rotated(roi, struct.unpack(">f", content[52:56])[0])]
    if roi.options & ROI_OPTIONS.SPLINE_FIT:
        raise AnnotationError(
            f"ROI {name} is a spline fit; run Edit > Selection > Interpolate in ImageJ, update it in the ROI Manager "
            "and save again"
        )
    if roi.subpixel_coordinates is not None:
        return [roi.subpixel_coordinates.astype(np.float64)]
    if roi.integer_coordinates is None:
        raise ValueError("no coordinates")
    # 16 bits: RoiDecoder takes -5000 to -1 as 0 and smaller values as unsigned.
    offsets = roi.integer_coordinates.astype(np.int64) % 2**16
    offsets[offsets >= 2**16 - 5000] = 0
    return [(offsets + np.array([roi.left, roi.top])).astype(np.float64)]


def _box(roi: ImagejRoi) -> tuple[int, int, int, int]:
    """Left, top, width and height of a rectangle or oval, as ImageJ's Roi rounds them."""
    if roi.subpixelrect:
        return int(roi.xd), int(roi.yd), max(math.ceil(roi.widthd), 1), max(math.ceil(roi.heightd), 1)
    return roi.left, roi.top, max(roi.right - roi.left, 1), max(roi.bottom - roi.top, 1)


def _oval(roi: ImagejRoi, shape: tuple[int, int], budget: Budget) -> Patch:
    """Pixels of an oval: centres inside or on the ellipse in its bounding box (OvalRoi.getMask)."""
    left, top, width, height = _box(roi)
    rows = np.arange(max(top, 0), min(top + height, shape[0]))
    columns = np.arange(max(left, 0), min(left + width, shape[1]))
    budget.spend(len(rows) * len(columns))
    a, b = width / 2, height / 2
    x, y = columns - left - (a - 0.5), rows - top - (b - 0.5)
    mask = (x * x / (a * a))[None] + (y * y / (b * b))[:, None] <= 1
    return Patch(max(top, 0), max(left, 0), mask.astype(np.uint8))


def _rotated(roi: ImagejRoi, parameter: float) -> NDArray[np.float64]:
    """Corners of an ellipse with aspect ratio `parameter`, or of a rotated rectangle of that width."""
    dx, dy = roi.x2 - roi.x1, roi.y2 - roi.y1
    length = math.hypot(dx, dy)
    if roi.subtype == ROI_SUBTYPE.ROTATED_RECT:
        x, y = (0.5 * parameter * dy / length, -0.5 * parameter * dx / length) if length else (0.0, 0.0)
        ends = [(roi.x1 + x, roi.y1 + y), (roi.x2 + x, roi.y2 + y), (roi.x2 - x, roi.y2 - y), (roi.x1 - x, roi.y1 - y)]
        return np.array(ends, np.float32).astype(np.float64)
    angles = np.arange(72) * (2 * math.pi / 72)  # EllipseRoi has 72 corners
    along, across = np.cos(angles) * length / 2, np.sin(angles) * length * min(max(parameter, 0.0), 1.0) / 2
    turn = math.atan2(dy, dx)
    x = (roi.x1 + roi.x2) / 2 + along * math.cos(turn) - across * math.sin(turn)
    y = (roi.y1 + roi.y2) / 2 + along * math.sin(turn) + across * math.cos(turn)
    return np.stack([x, y], axis=1).astype(np.float32).astype(np.float64)


def _path_rings(path: Sequence[float], budget: Budget) -> list[NDArray[np.float64]]:
    """Rings of a composite's path of segments, each a type and its points; curves become chords."""
    rings: list[list[Point]] = [[]]
    at = 0
    while at < len(path):
        kind = int(path[at])
        if kind not in PLACES_OF_SEGMENT:
            raise ValueError(f"a path with a segment of type {kind}")
        values = path[at + 1 : at + 1 + 2 * PLACES_OF_SEGMENT[kind]]
        points = list(zip(values[::2], values[1::2], strict=True))
        if len(points) < PLACES_OF_SEGMENT[kind] or (kind in (2, 3) and not rings[-1]):
            raise ValueError("an incomplete path")
        if kind in (0, 4):
            rings.append(points)
        elif kind == 1:
            rings[-1] += points
        else:
            rings[-1] += _chords([rings[-1][-1], *points], budget)
        at += 1 + len(values)
    return [np.array(ring, np.float64) for ring in rings if ring]


def _chords(
    curve: list[tuple[float, float]], budget: Budget, halvings: int = MAX_HALVINGS
) -> list[tuple[float, float]]:
    """End points of the chords of a Bezier curve given by its control points (de Casteljau), without its start."""
    start, end = curve[0], curve[-1]
    if not halvings or all(_segment_distance(point, start, end) < FLATNESS for point in curve[1:-1]):
        budget.spend(CHORD_WORK)
        return [end]
    first, second = [start], [end]
    while len(curve) > 1:
        curve = [((a[0] + b[0]) / 2, (a[1] + b[1]) / 2) for a, b in pairwise(curve)]
        first.append(curve[0])
        second.append(curve[-1])
    return _chords(first, budget, halvings - 1) + _chords(second[::-1], budget, halvings - 1)


def _segment_distance(point: Point, start: Point, end: Point) -> float:
    """Distance of a point from the segment from `start` to `end`."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    x, y = point[0] - start[0], point[1] - start[1]
    squared = dx * dx + dy * dy
    position = min(max((x * dx + y * dy) / squared, 0.0), 1.0) if squared else 0.0
    return math.hypot(x - position * dx, y - position * dy)


def write(labels: NDArray[np.integer[Any]]) -> bytes:
    """Encode a label image as RoiSet.zip for ImageJ's ROI Manager; equal labels give equal bytes.

    Corners are pixel corners, so that ImageJ's mask of each ROI is exactly the cell. A cell of one part without holes
    is a traced ROI like those of the wand, any other a composite. The names are the labels with leading zeros: unique,
    and in ascending order.

    Args:
        labels: integers (H, W), 0 background.

    Raises:
        UserError: a side over 16,777,216 pixels.
    """
    if max(labels.shape) > MAX_EXACT:
        raise UserError(f"an image of {labels.shape} is too large for ImageJ ROIs; cut it into tiles")
    buffer = io.BytesIO()
    digits = max(4, len(str(labels.max(initial=0))))
    with zipfile.ZipFile(buffer, "w") as archive:
        for outline in trace(labels):
            name = f"{outline.label:0{digits}d}"
            entry = zipfile.ZipInfo(f"{name}.roi")  # dated 1980, so that the bytes do not depend on the time
            entry.compress_type, entry.create_system, entry.external_attr = zipfile.ZIP_DEFLATED, 3, 0o644 << 16
            archive.writestr(entry, _encode(outline, name))
    return buffer.getvalue()


def _encode(outline: CellOutline, name: str) -> bytes:
    """Encode one cell as .roi."""
    rings = [ring for polygon in outline.polygons for ring in polygon]
    corners = np.concatenate(rings)
    (left, top), (right, bottom) = corners.min(axis=0).tolist(), corners.max(axis=0).tolist()
    roi = ImagejRoi(name=name, version=VERSION)
    roi.left, roi.top, roi.right, roi.bottom = (_as_int16(side) for side in (left, top, right, bottom))
    if len(rings) > 1:
        path = np.concatenate([_path(ring) for ring in rings])
        roi.roitype, roi.shape_roi_size, roi.multi_coordinates = ROI_TYPE.RECT, len(path), path
        return roi.tobytes()
    roi.roitype, roi.n_coordinates = ROI_TYPE.TRACED, len(corners)
    roi.integer_coordinates = ((corners - (left, top) + 2**15) % 2**16 - 2**15).astype(np.int32)
    if max(right, bottom) > MAX_INTEGER:
        # The 16-bit coordinates are ambiguous here. ImageJ's traced ROIs have integer coordinates only.
        roi.roitype, roi.options = ROI_TYPE.POLYGON, ROI_OPTIONS.SUB_PIXEL_RESOLUTION
        roi.subpixel_coordinates = corners.astype(np.float32)
    return roi.tobytes()


def _as_int16(value: int) -> int:
    """Wrap a coordinate to 16 bits with sign."""
    return (value + 2**15) % 2**16 - 2**15


def _path(ring: NDArray[np.int64]) -> NDArray[np.float32]:
    """Path of a ring: move to the first corner, lines to the others, close."""
    segments = np.column_stack([np.ones(len(ring)), ring]).astype(np.float32)
    segments[0, 0] = 0
    return np.append(segments.ravel(), np.float32(4))
