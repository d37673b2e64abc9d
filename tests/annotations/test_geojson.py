"""QuPath's GeoJSON: exact round trips, all accepted forms, RFC 7946, refused and damaged files."""

import contextlib
import json
import uuid

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_st

from raylivecell.annotations import geojson
from raylivecell.annotations.errors import AnnotationError
from raylivecell.annotations.rle import mask_of_runs

SQUARE = {"type": "Polygon", "coordinates": [[[1, 1], [4, 1], [4, 4], [1, 4], [1, 1]]]}


def feature(geometry=SQUARE, **properties):
    return {"type": "Feature", "id": "x", "geometry": geometry, "properties": properties}


def read(value, shape=(8, 8)):
    """Ids and numbers of pixels."""
    records = geojson.read(value if isinstance(value, bytes) else json.dumps(value).encode(), shape)
    return [(record.id, int(sum(runs[1::2].sum() for _, runs in record.runs))) for record in records]


@given(numpy_st.arrays(np.int32, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.integers(0, 3)))
@example(np.arange(1, 601, dtype=np.int32).reshape(20, 30))
@example(np.array([[70_000, 0, 2**31 - 1]], np.int32))
def test_labels_written_and_read_again_are_equal(labels):
    numbers, areas = np.unique(labels[labels > 0], return_counts=True)
    scores = np.linspace(0.1, 0.9, len(numbers))
    data = geojson.write(labels, scores)
    assert data == geojson.write(labels.copy(), scores)
    again = np.zeros_like(labels)
    for record in geojson.read(data, labels.shape):
        mask = mask_of_runs(*record.runs[0])
        assert not again[mask].any()
        again[mask] = int(record.id)
    assert np.array_equal(again, labels)
    features = json.loads(data)["features"]
    assert len({uuid.UUID(item["id"]) for item in features}) == len(features) == len(numbers)
    for item, number, area, score in zip(features, numbers.tolist(), areas.tolist(), scores.tolist(), strict=True):
        properties = item["properties"]
        assert properties["objectType"] == "detection"
        assert properties["name"] == str(number)
        assert properties["measurements"] == {"Score": round(score, 4), "Area px^2": area}
        geometry = item["geometry"]
        polygons = geometry["coordinates"] if geometry["type"] == "MultiPolygon" else [geometry["coordinates"]]
        assert (len(polygons) > 1) == (geometry["type"] == "MultiPolygon")
        for polygon in polygons:
            for index, ring in enumerate(polygon):
                x, y = np.array(ring).T
                assert ring[0] == ring[-1]
                assert len(ring) >= 5
                assert len({tuple(corner) for corner in ring}) == len(ring) - 1
                # RFC 7946, 3.1.6: exterior rings counterclockwise, holes clockwise.
                assert (np.sum(x[:-1] * y[1:] - x[1:] * y[:-1]) > 0) == (index == 0)


def test_all_forms_of_geojson_are_read():
    hole = {"type": "Polygon", "coordinates": [*SQUARE["coordinates"], [[2, 2], [2, 3], [3, 3], [3, 2], [2, 2]]]}
    far = [[[6, 6], [9, 6], [9, 9], [6, 9]]]  # leaves the image; not closed
    two = {"type": "MultiPolygon", "coordinates": [hole["coordinates"], far]}
    assert read(SQUARE) == [("1", 9)]
    assert read(feature(hole, name="first")) == [("first", 8)]
    assert read([feature(two), feature(name="b")]) == [("x", 12), ("b", 9)]
    collection = {"type": "FeatureCollection", "features": [feature(objectType="annotation"), feature()]}
    assert read(collection) == [("x", 9), ("x", 9)]
    assert read(b"\xef\xbb\xbf" + json.dumps(collection).encode()) == [("x", 9), ("x", 9)]
    assert read({"type": "FeatureCollection", "features": []}) == []
    cell = {**feature(objectType="cell"), "nucleusGeometry": far}
    assert read([cell]) == [("x", 9)]
    assert read([{**feature(), "id": "PathCellObject"}]) == [("1", 9)]
    children = [feature(objectType="detection", name="a"), feature(objectType="detection", name="b")]
    assert read(feature(objectType="tmaCore", name="core", childObjects=children)) == [
        ("core (tmaCore, not a cell)", 0),
        ("a", 9),
        ("b", 9),
    ]
    point = {"type": "Point", "coordinates": [1, 1]}
    parts = {"type": "GeometryCollection", "geometries": [SQUARE, point]}
    assert read([feature(point), feature(parts)]) == [("x (Point, no area)", 0), ("x", 9)]
    outside = {"type": "Polygon", "coordinates": [[[20, 20], [30, 20], [30, 30]]]}
    assert read([feature(outside)]) == [("x (no pixel in the image)", 0)]
    heights = {"type": "Polygon", "coordinates": [[[x, y, 5] for x, y in SQUARE["coordinates"][0]]]}
    assert read(heights) == [("1", 9)]


def test_what_cannot_be_read_exactly_is_refused(monkeypatch):
    planes = [feature({**SQUARE, "plane": {"c": -1, "z": z, "t": 0}}) for z in (0, 1)]
    deep = feature(objectType="cell")
    for _ in range(40):
        deep = feature(objectType="cell", childObjects=[deep])
    for value, reason in (
        (b"not json", "not GeoJSON"),
        (b"\xff\xfe", "not GeoJSON"),
        (b"[" * 100_000, "not GeoJSON"),
        ({"type": "Topology"}, "neither a feature nor a geometry"),
        ({"images": [], "annotations": []}, "neither a feature nor a geometry"),
        ([feature(objectType="annotation"), feature(objectType="detection")], "1 annotations together with 1 cells"),
        (planes, "2 planes of a stack"),
        (deep, "over 16 deep"),
        (feature({"type": "Circle"}), "unknown geometry 'Circle'"),
        (feature({"type": "Polygon", "coordinates": [[["1", 2], [3, 4]]]}), "not a number"),
        (feature({"type": "Polygon", "coordinates": [[[1], [3, 4]]]}), "damaged coordinates"),
        (feature({"type": "Polygon"}), "damaged coordinates"),
        (json.dumps(SQUARE).replace("4", "NaN").encode(), "not a number of pixels"),
        (json.dumps(SQUARE).replace("4", "1e300").encode(), "not a number of pixels"),
    ):
        with pytest.raises(AnnotationError, match=reason):
            read(value)
    with pytest.raises(ValueError, match="scores"):
        geojson.write(np.ones((2, 2), int), np.array([0.1, 0.2]))
    monkeypatch.setattr(geojson, "MAX_BYTES", 10)
    with pytest.raises(AnnotationError, match="cut the image into tiles"):
        read(SQUARE)


@given(st.recursive(st.none() | st.integers() | st.text(max_size=3), lambda x: st.lists(x, max_size=3), max_leaves=8))
def test_damaged_values_end_in_an_annotation_error(value):
    for place in ("features", "geometry", "properties", "coordinates", "objectType", "childObjects", "plane"):
        text = json.dumps(
            {"type": "FeatureCollection", "features": [feature({**SQUARE, "plane": {}}, objectType="cell")]}
        )
        collection = json.loads(text)
        item = collection["features"][0]
        targets = {"features": collection, "coordinates": item["geometry"], "plane": item["geometry"]}
        target = item["properties"] if place in ("objectType", "childObjects") else targets.get(place, item)
        target[place] = value
        with contextlib.suppress(AnnotationError):
            read(collection)
