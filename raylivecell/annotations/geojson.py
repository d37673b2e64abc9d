"""QuPath's GeoJSON (RFC 7946 with pixels as coordinates), in both directions.

1. `read`    features -> one record per object, with the pixels inside its outline
2. `write`   label image and scores -> a FeatureCollection that QuPath 0.4 or later imports as detections

Sources: RFC 7946, and QuPath's QuPathTypeAdapters and ROITypeAdapters.
"""

import json
import math
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raylivecell.annotations.coco import CellRecord
from raylivecell.annotations.drawing import MAX_CELLS
from raylivecell.annotations.errors import AnnotationError
from raylivecell.annotations.pixel_outlines import Budget, Polygon, doubled_area, fill, trace
from raylivecell.annotations.rle import patch_runs
from raylivecell.core.errors import shortened
from raylivecell.images.planes import Place

MAX_BYTES = 2**27
"""Maximum size of a file: a cell needs some 700 bytes."""
MAX_DEPTH = 16
"""Maximum depth of objects in objects (`childObjects`)."""
GEOMETRIES = ("Polygon", "MultiPolygon", "GeometryCollection", "Point", "MultiPoint", "LineString", "MultiLineString")
CELL_TYPES = ("cell", "detection")
"""QuPath's object types for cells; annotations are cells if a file has no others."""
LEGACY_TYPES = {"PathAnnotationObject": "annotation", "PathDetectionObject": "detection", "PathCellObject": "cell"}
"""QuPath 0.2 stored the type of an object as its id."""
NAMESPACE = uuid.UUID("7b0f9a4e-6c1d-5e0b-9a53-2f4c8d1e7a60")
"""Of the ids of written cells (RFC 4122, version 5); a random constant."""
CLASS = {"name": "Cell", "color": [0, 158, 115]}
IGNORE = "Ignore*"
"""QuPath's class of regions to ignore. It makes no objects of classes whose name ends in `*`, such as `Region*`."""


def read(
    data: bytes, shape: tuple[int, int], place: Place | None = None, ignore: Sequence[str] = ()
) -> list[CellRecord]:
    """Read the objects of an image in the order of the file.

    Outlines become runs clipped to the image, by the rule of `pixel_outlines.fill`; a `nucleusGeometry` is ignored.
    Where outlines overlap, each record is complete, and `drawing.draw_labels` gives a shared pixel to the smaller cell.
    The id is the object's name, else its UUID, else its number. Points, lines and objects that are not cells (TMA
    cores, tiles, classes whose name ends in `*`) have the kind in the id and no outline, so that `prepare` lists them
    as empty.

    Args:
        data: FeatureCollection, list of features, Feature or geometry, as UTF-8. Coordinates are pixels of the complete
            image; (0, 0) is the upper left corner of the first pixel.
        shape: (H, W) of the image.
        place: of the image in its stack. Objects may state no plane, otherwise it must be this one in any channel.
        ignore: classes whose objects are ignore regions, in addition to IGNORE; upper and lower case are equal.

    Raises:
        AnnotationError: not GeoJSON, damaged or too large; objects of several planes, or of another than the image; or
            annotations together with cells or detections, because those annotations are usually regions.
    """
    features = list(_features(_parse(data)))
    names = {name.casefold(): name for name in (IGNORE, *ignore)}
    regions = [names.get(_class(feature).casefold(), "") for feature in features]
    types = [
        _object_type(feature) if region or not _class(feature).endswith("*") else f"class {_class(feature)}"
        for feature, region in zip(features, regions)
    ]
    counts = Counter(kind for kind, region in zip(types, regions) if not region)
    cells = sum(counts.get(kind, 0) for kind in CELL_TYPES)
    if cells and counts.get("annotation"):
        raise AnnotationError(
            f"{counts['annotation']} annotations together with {cells} cells or detections: are the annotations "
            "regions? Select the objects that are cells in QuPath and export the selected objects only"
        )
    if len(features) > MAX_CELLS:
        raise AnnotationError(f"{len(features)} objects, more than {MAX_CELLS}; cut the image into tiles")
    _check_planes(features, place)
    budget = Budget()
    return [
        _record(_id(feature, number), kind, region, feature["geometry"], shape, budget)
        for number, (feature, kind, region) in enumerate(zip(features, types, regions), 1)
    ]


def _parse(data: bytes) -> Any:
    if len(data) > MAX_BYTES:
        raise AnnotationError(f"{len(data)} bytes of GeoJSON, more than {MAX_BYTES}; cut the image into tiles")
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"not GeoJSON: {shortened(str(error))}; export it again from QuPath") from error


def _features(value: Any, depth: int = 0) -> Iterator[dict[str, Any]]:
    """Yield the features in any of the accepted forms; objects contained in other objects follow these."""
    if depth > MAX_DEPTH:
        raise AnnotationError(f"objects in objects, over {MAX_DEPTH} deep; export it without child objects")
    if isinstance(value, list):
        for item in value:
            yield from _features(item, depth + 1)
        return
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "FeatureCollection" and isinstance(value.get("features"), list):
        yield from _features(value["features"], depth + 1)
    elif kind == "Feature" and isinstance(value.get("geometry"), dict):
        properties = value.get("properties") or {}
        if not isinstance(properties, dict):
            raise AnnotationError("the properties of a feature are not an object; export it again from QuPath")
        yield {"geometry": value["geometry"], "properties": properties, "id": value.get("id")}
        children = properties.get("childObjects") or properties.get("children") or []
        yield from _features(children, depth + 1)
    elif kind in GEOMETRIES:
        yield {"geometry": value, "properties": {}, "id": None}
    else:
        shown = shortened(repr(value))[:80]
        raise AnnotationError(f"not GeoJSON: {shown} is neither a feature nor a geometry; export it again from QuPath")


def _object_type(feature: dict[str, Any]) -> str:
    properties = feature["properties"]
    kind = properties.get("objectType") or properties.get("object_type") or LEGACY_TYPES.get(str(feature["id"]), "")
    return str(kind)[:40]


def _class(feature: dict[str, Any]) -> str:
    """Name of an object's class; "" without one."""
    value = feature["properties"].get("classification")
    name = value.get("name") if isinstance(value, dict) else value
    return name[:100] if isinstance(name, str) else ""


def _id(feature: dict[str, Any], number: int) -> str:
    name = feature["properties"].get("name") or feature["id"]
    text = str(name) if isinstance(name, str | int) and str(name) not in LEGACY_TYPES else str(number)
    return "".join(character if character.isprintable() else "?" for character in text)[:100]


def _check_planes(features: Sequence[dict[str, Any]], place: Place | None) -> None:
    """Raise if the objects belong to several slices or frames of a stack, or to another than the image."""
    planes = set()
    for feature in features:
        plane = feature["geometry"].get("plane")
        if isinstance(plane, dict):
            planes.add((str(plane.get("z", 0)), str(plane.get("t", 0))))
    if len(planes) > 1:
        raise AnnotationError(f"the objects belong to {len(planes)} planes of a stack; export one file per plane")
    if place is None or not planes:
        return
    z, t = (text[:15] for text in planes.pop())
    if not (z.isdecimal() and t.isdecimal() and place.is_at(int(z), int(t))):
        raise AnnotationError(
            f"the objects belong to z {z}, t {t} of the stack, the image is plane {place.name}; choose the plane of "
            "the objects with --plane, or export the objects of this plane"
        )


def _record(
    cell_id: str, kind: str, region: str, geometry: dict[str, Any], shape: tuple[int, int], budget: Budget
) -> CellRecord:
    if not region and kind not in ("", "annotation", *CELL_TYPES):
        return CellRecord(f"{cell_id} ({kind}, not a cell)", False, [], [])
    polygons = _polygons(geometry)
    if not polygons:
        return CellRecord(f"{cell_id} ({geometry.get('type')!s:.20}, no area)", False, [], [], region)
    top, left, mask = fill(polygons, shape, budget)
    if not mask.any():
        return CellRecord(f"{cell_id} (no pixel in the image)", False, [], [], region)
    return CellRecord(cell_id, False, [], [(shape, patch_runs(mask, top, left, shape))], region)


def _polygons(geometry: Any) -> list[list[NDArray[np.float64]]]:
    """Rings of the polygons of a geometry; none for points and lines."""
    kind = geometry.get("type") if isinstance(geometry, dict) else None
    if kind not in GEOMETRIES:
        raise AnnotationError(f"unknown geometry {str(kind)[:40]!r}; export it again from QuPath")
    if kind == "GeometryCollection":
        parts = geometry.get("geometries")
        if not isinstance(parts, list) or any(isinstance(p, dict) and p.get("type") == kind for p in parts):
            raise AnnotationError("a nested or empty GeometryCollection; export the objects as polygons")
        return [polygon for part in parts for polygon in _polygons(part)]
    if kind not in ("Polygon", "MultiPolygon"):
        return []
    coordinates = geometry.get("coordinates")
    try:
        polygons = [coordinates] if kind == "Polygon" else coordinates
        return [[_ring(ring) for ring in polygon] for polygon in polygons]
    except (TypeError, ValueError, OverflowError, IndexError) as error:
        raise AnnotationError(f"damaged coordinates: {shortened(str(error))}; export it again from QuPath") from error


def _ring(points: Any) -> NDArray[np.float64]:
    """Convert [[x, y], ...]; a third coordinate is ignored."""
    if not isinstance(points, list) or any(not isinstance(point, list) for point in points):
        raise ValueError("a ring is not a list of points")
    if any(isinstance(value, str | bool) for point in points for value in point[:2]):
        raise ValueError("a coordinate is not a number")
    return np.array([(point[0], point[1]) for point in points], np.float64).reshape(-1, 2)


def write(labels: NDArray[np.integer[Any]], scores: NDArray[np.floating[Any]]) -> bytes:
    """Encode a label image as GeoJSON for QuPath; equal labels and scores give equal bytes.

    Corners are pixel corners: the outlines enclose exactly the pixels of the cells. Each cell is a detection of class
    "Cell", named by its label, with its score and area as measurements. The id is a hash of the outline.

    Args:
        labels: integers (H, W), 0 background; labels may have gaps.
        scores: 0 to 1, of the cells in ascending order of label.

    Raises:
        ValueError: not one finite score per cell.
    """
    outlines = trace(labels)
    if len(scores) != len(outlines) or not all(map(math.isfinite, scores.tolist())):
        raise ValueError(f"{len(scores)} scores for {len(outlines)} cells, or a score that is not finite")
    lines = []
    for outline, score in zip(outlines, scores.tolist()):
        geometry = json.dumps(_geometry(outline.polygons), separators=(",", ":"))
        area = sum(doubled_area(ring) for polygon in outline.polygons for ring in polygon) // 2
        properties = {
            "objectType": "detection",
            "name": str(outline.label),
            "classification": CLASS,
            "measurements": {"Score": round(score, 4), "Area px^2": area},
        }
        cell_id = uuid.uuid5(NAMESPACE, geometry)
        lines.append(
            f'{{"type":"Feature","id":"{cell_id}","geometry":{geometry},'
            f'"properties":{json.dumps(properties, separators=(",", ":"))}}}'
        )
    return ('{"type":"FeatureCollection","features":[\n' + ",\n".join(lines) + "\n]}\n").encode()


def _geometry(polygons: Sequence[Polygon]) -> dict[str, Any]:
    """Polygon or MultiPolygon with closed rings: exterior counterclockwise, holes clockwise (RFC 7946, 3.1.6)."""
    coordinates = [[[*ring.tolist(), ring[0].tolist()] for ring in polygon] for polygon in polygons]
    if len(coordinates) == 1:
        return {"type": "Polygon", "coordinates": coordinates[0]}
    return {"type": "MultiPolygon", "coordinates": coordinates}
