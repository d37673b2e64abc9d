"""Streaming reader of COCO files, compared with `json.loads` and pycocotools."""

import io
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from raylivecell.annotations import categories, coco, json_stream, rle
from raylivecell.annotations.json_stream import BrokenJsonError
from raylivecell.core.errors import UserError


def record(cell_id: int, image: int, outline: Any, **fields: Any) -> dict[str, Any]:
    return {"id": cell_id, "image_id": image, "category_id": 1, "segmentation": outline, "iscrowd": 0, **fields}


def dataset() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    cells = [
        record(100 + i, 1 + i % 3, [rng.uniform(0, 50, 2 * n).round(2).tolist()]) for i, n in enumerate(range(3, 30))
    ]
    return {
        "info": {"description": 'caf\u00e9 \\" cells', "year": 2021},
        "licenses": [{"id": 1, "name": "free"}],
        "categories": [{"id": 1, "name": "cell"}],
        "images": [{"id": i, "file_name": f"A_{i}.tif", "width": 50, "height": 40} for i in (3, 1, 2)],
        "annotations": cells,
        "unknown": {"deep": [[1.5e3, {"x": None}], True]},
        "version": 12,
    }


def read(data: Any) -> coco.Annotations:
    text = data if isinstance(data, bytes) else json.dumps(data, ensure_ascii=False).encode()
    return coco.read_annotations(io.BytesIO(text), "cells.json")


def cells_of(annotations: coco.Annotations, image: int | str) -> list[coco.CellRecord]:
    return coco.decode_cells(annotations.payload(image))


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 4096])
@pytest.mark.parametrize("indent", [None, 1])
def test_records_equal_json_loads_for_any_chunk(
    monkeypatch: pytest.MonkeyPatch, chunk: int, indent: int | None
) -> None:
    monkeypatch.setattr(json_stream, "CHUNK", chunk)
    data = dataset()
    text = json_stream.JsonText(io.BytesIO(json.dumps(data, indent=indent, ensure_ascii=False).encode()), "x")
    rebuilt: dict[str, Any] = {}
    for section, key, value in json_stream.iter_records(text):
        if key is not None:
            rebuilt.setdefault(section, {})[key] = value
        elif isinstance(data[section], list):
            rebuilt.setdefault(section, []).append(value)
        else:
            rebuilt[section] = value
    assert rebuilt == data


def test_section_order_and_type_do_not_matter() -> None:
    data = dataset()
    as_dict = data | {"annotations": {str(cell["id"]): cell for cell in data["annotations"]}}
    shuffled = list(data.items())
    random.Random(1).shuffle(shuffled)
    reference = read(data)
    for variant in (read(as_dict), read(dict(shuffled)), read(dict(reversed(data.items())))):
        assert variant.images == reference.images
        assert variant.counts() == reference.counts() == {1: 9, 2: 9, 3: 9}
        for image in (1, 2, 3):
            assert variant.payload(image) == reference.payload(image)
    assert reference.info["description"] == data["info"]["description"]
    assert reference.licences == data["licenses"]


def test_cells_are_float32_in_file_order() -> None:
    data = dataset()
    annotations = read(data)
    for image in (1, 2, 3):
        expected = [cell for cell in data["annotations"] if cell["image_id"] == image]
        actual = cells_of(annotations, image)
        assert [cell.id for cell in actual] == [cell["id"] for cell in expected]
        for cell, annotation in zip(actual, expected):
            np.testing.assert_array_equal(cell.polygons[0].ravel(), np.float32(annotation["segmentation"][0]))
    assert annotations.payload(77) == b""


def test_truncation_is_reported_with_its_byte() -> None:
    text = json.dumps(dataset(), ensure_ascii=False).encode()
    assert read(text).broken is None
    for cut in range(0, len(text), 5):
        error = read(text[:cut]).broken
        assert error is not None
        assert error.position <= cut
        assert f"at byte {error.position}" in str(error)


def test_records_before_a_truncation_are_read() -> None:
    text = json.dumps(dataset()).encode()
    position = text.index(b'{"id": 120,')
    annotations = read(text[: position + 30])
    assert sum(annotations.counts().values()) == 20
    assert annotations.broken is not None
    assert annotations.broken.position == position
    assert annotations.last_image == 1 + 19 % 3


def test_invalid_json_is_reported_with_its_byte() -> None:
    text = json.dumps(dataset(), ensure_ascii=False).encode()
    position = text.index(b'"image_id"')
    error = read(text[:position] + b"<html>" + text[position:]).broken
    assert error is not None
    assert error.position == position
    for invalid in (
        b"[]",
        b"",
        b"x",
        b'{"images": [1 2]}',
        b'{"a": 1} {',
        b"{1: 2}",
        b"\xff\xfe",
        b'{"a":' + b"[" * 100_000,
    ):
        assert read(invalid).broken is not None
    assert isinstance(error, BrokenJsonError)


def test_byte_order_mark_is_accepted() -> None:
    assert read(b"\xef\xbb\xbf" + json.dumps(dataset()).encode()).broken is None


def test_bad_records_are_listed_and_the_others_read() -> None:
    data = dataset()
    square = [[1, 1, 5, 1, 5, 5]]
    data["annotations"] += [
        record(900, 1, [[1, 2, "x", 4, 5, 6]]),
        record(901, 1, [[1, 2, 3]]),
        record(902, 1, "poly"),
        record(903, 1, None),
        {"id": 904, "segmentation": square},
        record(905, [1], square),
        17,
        record(906, 1, {"size": [4], "counts": [1]}),
        record(907, 1, {"size": [4, 4], "counts": [-1, 17]}),
        record(908, 1, {"size": [4, 4], "counts": None}),
        record(909, 1, [5]),
    ]
    data["images"] += [
        {"id": 8},
        {"id": 9, "file_name": 3},
        {"id": 10, "file_name": "x", "width": "wide"},
        None,
        {"file_name": "y"},
    ]
    annotations = read(data)
    bad_cells = {record_id for section, record_id, _ in annotations.bad if section == "annotations"}
    assert bad_cells == {900, 901, 902, 903, 904, 905, 906, 907, 908, 909, None}
    assert [record_id for section, record_id, _ in annotations.bad if section == "images"] == [8, 9, 10, None, None]
    assert annotations.counts() == read(dataset()).counts()


def test_ids_may_be_text() -> None:
    data = dataset()
    data["images"] = [{"id": "a", "file_name": "A.tif"}]
    data["annotations"] = [record(1, 0, [[0, 0, 4, 0, 4, 4]]) | {"id": "c\u00e9ll", "image_id": "a"}]
    annotations = read(data)
    assert annotations.images == [coco.ImageEntry("a", "A.tif", None, None)]
    assert [cell.id for cell in cells_of(annotations, "a")] == ["c\u00e9ll"]


@pytest.mark.parametrize("seed", range(6))
def test_compressed_and_uncompressed_rle_equal_pycocotools(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((rng.integers(1, 60), rng.integers(1, 90))) < rng.choice([0.02, 0.5, 0.98])
    encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    runs = np.diff(np.flatnonzero(np.diff(np.r_[2, mask.T.ravel(), 2])))
    counts = ([0] if mask.T.ravel()[0] else []) + runs.tolist()
    size = list(mask.shape)
    data = dataset() | {
        "annotations": [
            record(1, 1, {"size": size, "counts": encoded["counts"].decode()}),
            record(2, 1, {"size": size, "counts": counts}, iscrowd=1),
            record(3, 1, [{"size": size, "counts": counts}, [0, 0, 4, 0, 4, 4]]),
        ]
    }
    first, second, third = cells_of(read(data), 1)
    for cell in (first, second, third):
        ((actual_size, actual_runs),) = cell.runs
        actual = rle.mask_of_runs(actual_size, actual_runs)
        assert actual is not None
        np.testing.assert_array_equal(actual, mask)
    assert (first.crowd, second.crowd) == (False, True)
    assert len(third.polygons) == 1


def test_category_of_an_image_is_the_most_frequent() -> None:
    data = dataset()
    data["annotations"] = [record(i, 1, [[0, 0, 4, 0, 4, 4]]) | {"category_id": 1 + (i > 2)} for i in range(9)]
    data["categories"] = [{"id": 1, "name": "round"}, {"id": 2, "name": "flat"}]
    reordered = {key: data[key] for key in ("annotations", "images", "categories")}
    for annotations in (read(data), read(reordered)):
        assert annotations.category(1) == "flat"
        assert annotations.category(2) == ""


MEMORY = """
import resource, sys
from raylivecell.annotations.coco import read_annotations
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with open(sys.argv[1], "rb") as stream:
    annotations = read_annotations(stream, "big")
cells = sum(annotations.counts().values())
payload = sum(len(annotations.payload(image.id)) for image in annotations.images[:50])
print(cells, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_is_a_fraction_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "big.json"
    outline = json.dumps([np.random.default_rng(0).uniform(0, 700, 80).round(2).tolist()])
    cells = 60_000
    with open(path, "w") as stream:
        stream.write('{"annotations": [')
        template = '{"id": %d, "image_id": %d, "category_id": 1, "segmentation": ' + outline + "}"
        stream.write(", ".join(template % (i, i % 200) for i in range(cells)))
        images = [{"id": i, "file_name": f"A_Phase_{i}.tif", "width": 704, "height": 520} for i in range(200)]
        stream.write(f'], "images": {json.dumps(images)}}}')
    process = subprocess.run([sys.executable, "-c", MEMORY, str(path)], capture_output=True, text=True, check=True)
    cell_count, growth_kib = map(int, process.stdout.split())
    assert cell_count == cells
    # 40 MB of JSON are 250 MB as Python objects. Measured: 22 MB, most of it buffers of 4 MB.
    assert path.stat().st_size > 35e6
    assert growth_kib < 45_000


def test_real_files(livecell_mini: Path) -> None:
    for path in (livecell_mini / "annotations" / "LIVECell").glob("*.json"):
        data = json.loads(path.read_bytes())
        with open(path, "rb") as stream:
            annotations = coco.read_annotations(stream, path.name)
        assert (annotations.bad, annotations.broken) == ([], None)
        assert annotations.size == path.stat().st_size
        for entry in data["images"]:
            expected = [cell for cell in data["annotations"] if cell["image_id"] == entry["id"]]
            actual = cells_of(annotations, entry["id"])
            assert [cell.id for cell in actual] == [cell["id"] for cell in expected]
            assert all(
                np.array_equal(a.polygons[0].ravel(), np.float32(b["segmentation"][0]))
                for a, b in zip(actual, expected)
            )


def test_values_of_other_converters_are_read() -> None:
    """Accepted: numbers as text or floats, points as pairs, a polygon outside a list, repr() of Python bytes."""
    square = [1, 1, 5, 1, 5, 5]
    cells_json: list[Any] = [
        {"id": "1", "image_id": "7", "category_id": "1", "iscrowd": "0", "segmentation": [square]},
        {
            "id": 2.0,
            "image_id": 7.0,
            "category_id": 1.0,
            "iscrowd": "False",
            "segmentation": [[str(v) for v in square]],
        },
        {"id": 3, "image_id": "7.0", "category_id": None, "segmentation": square},
        {"id": 4, "image_id": 7, "iscrowd": None, "segmentation": [[[1, 1], [5, 1], [5, 5]]]},
    ]
    rles: list[Any] = [{"size": ["2", 3.0], "counts": ["1", 2.0, 3]}, [{"size": [2, 3], "counts": "b'123'"}]]
    cells_json += [{"id": 10 + i, "image_id": 7, "segmentation": value, "iscrowd": "1"} for i, value in enumerate(rles)]
    sizes: list[Any] = [("50", 40.0), (0, None), ("", "0")]
    images = [{"id": str(7 + i), "file_name": "x", "width": w, "height": h} for i, (w, h) in enumerate(sizes)]
    annotations = read({"images": images, "annotations": cells_json, "categories": [{"id": "1", "name": "cell"}]})
    assert annotations.bad == []
    assert [(image.id, image.width, image.height) for image in annotations.images] == [
        (7, 50, 40),
        (8, None, None),
        (9, None, None),
    ]
    cells = cells_of(annotations, 7)
    assert [cell.id for cell in cells] == [1, 2, 3, 4, 10, 11]
    assert [cell.crowd for cell in cells] == [False] * 4 + [True] * 2
    for cell in cells[:4]:
        np.testing.assert_array_equal(cell.polygons[0].ravel(), square)
    assert [cell.runs[0][1].tolist() for cell in cells[4:]] == [[1, 2, 3], [1, 2, 3]]
    assert annotations.category_counts() == {1: (1, 2), "": (1, 4)}
    assert annotations.crowds() == 2


def test_invalid_values_are_reported() -> None:
    wrong = {"iscrowd": "maybe", "category_id": 1.5, "image_id": True}
    cells = [record(i, 1, [[1, 1, 5, 1, 5, 5]]) | {key: value} for i, (key, value) in enumerate(wrong.items())]
    images = [{"id": 1, "file_name": "x", "width": -3, "height": 4}]
    duplicate_categories = [{"id": 1, "name": "cell"}, {"id": 1.0, "name": "debris"}]
    annotations = read({"images": images, "annotations": cells, "categories": duplicate_categories})
    reasons = " ".join(reason for _, _, reason in annotations.bad)
    assert annotations.counts() == {}
    for text in ("'maybe'", "1.5", "True", "-3", "both 'cell' and 'debris'"):
        assert text in reasons


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("chunk", [1, 5, 4096])
def test_unicode_encodings(encoding: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "CHUNK", chunk)
    text = json.dumps(dataset(), ensure_ascii=False).encode(encoding)
    annotations = read(text)
    assert annotations.broken is None
    assert annotations.size == len(text)
    assert annotations.info["description"] == dataset()["info"]["description"]
    assert annotations.counts() == read(dataset()).counts()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps(dataset(), ensure_ascii=False).encode("latin-1"), "not UTF-8 text: byte 0xe9"),
        (b'[{"image_id": 1, "segmentation": [], "score": 1}]', "a list of COCO results"),
        (b'[{"data": {}, "annotations": []}]', "Label Studio"),
        (b'{"shapes": [], "imagePath": "a.png", "imageData": null}', "a LabelMe file"),
        (b'{"_via_img_metadata": {}, "_via_settings": {}}', "a VIA project"),
        (b'{"type": "FeatureCollection", "features": []}', "GeoJSON"),
        (b'{"annotations": [], "b": 1}', "an object of annotations, b"),
        (b"{}", "an empty object"),
    ],
)
def test_other_json_formats_are_named(text: bytes, message: str) -> None:
    error = read(text).broken
    assert message in str(error)
    assert "truncated" not in str(error)


def test_categories_are_selected_by_name_or_id() -> None:
    data = dataset()
    data["annotations"] = [
        record(i, 1, [[0, 0, 4, 0, 4, 4]]) | {"category_id": kind} for i, kind in enumerate([1, 2, 2, 3, 9])
    ]
    names = ["cell", "Debris", "scale_bar"]
    data["categories"] = [{"id": i, "name": name} for i, name in enumerate([*names, "1"], 1)]
    other = data | {"categories": [{"id": 2, "name": "cell"}]}

    def selected_cells(*selection: str) -> tuple[list[int | str], list[int | str]]:
        files = [read(data), read(other)]
        rows = categories.choose(files, selection)
        assert sum(row["annotations"] for row in rows) == 10
        chosen = {row["name"] for row in rows if row["chosen"]}
        assert chosen == {row["name"] for row in rows} or selection
        return tuple([cell.id for cell in cells_of(file, 1)] for file in files)  # type: ignore[return-value]

    assert selected_cells() == ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])
    assert selected_cells("cell") == ([0], [1, 2])
    assert selected_cells("debris", "SCALE_BAR") == ([1, 2, 3], [])
    assert selected_cells("9") == ([4], [4])
    for name, message in (
        ("celll", "did you mean cell"),
        ("nucleus", "the dataset has 1, 3, 9, Debris"),
        ("2", "Debris or cell"),
    ):
        with pytest.raises(UserError, match=message):
            selected_cells(name)
    line = categories.notice(categories.choose([read(data)], ()), ())
    assert "9 (1 of an unlisted category)" in line
    assert "Debris (2)" in line
    assert categories.notice(categories.choose([read(dataset())], ()), ()) == ""
