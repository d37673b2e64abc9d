"""The streaming reader of COCO files against `json.loads` and pycocotools."""

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


def record(number: int, image: int, outline: Any, **more: Any) -> dict[str, Any]:
    return {"id": number, "image_id": image, "category_id": 1, "segmentation": outline, "iscrowd": 0, **more}


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
    return coco.read_annotations(io.BytesIO(text), "some.json")


def cells_of(annotations: coco.Annotations, image: int | str) -> list[coco.CellRecord]:
    return coco.decode_cells(annotations.payload(image))


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 4096])
@pytest.mark.parametrize("indent", [None, 1])
def test_equals_json_loads_whatever_the_chunk(monkeypatch: pytest.MonkeyPatch, chunk: int, indent: int | None) -> None:
    monkeypatch.setattr(json_stream, "CHUNK", chunk)
    data = dataset()
    text = json_stream.JsonText(io.BytesIO(json.dumps(data, indent=indent, ensure_ascii=False).encode()), "x")
    rebuilt: dict[str, Any] = {}
    for section, key, value in json_stream.walk(text):
        if key is not None:
            rebuilt.setdefault(section, {})[key] = value
        elif isinstance(data[section], list):
            rebuilt.setdefault(section, []).append(value)
        else:
            rebuilt[section] = value
    assert rebuilt == data


def test_order_of_sections_and_dict_or_list_make_no_difference() -> None:
    data = dataset()
    as_dict = data | {"annotations": {str(cell["id"]): cell for cell in data["annotations"]}}
    shuffled = list(data.items())
    random.Random(1).shuffle(shuffled)
    plain = read(data)
    for other in (read(as_dict), read(dict(shuffled)), read(dict(reversed(data.items())))):
        assert other.images == plain.images
        assert other.counts() == plain.counts() == {1: 9, 2: 9, 3: 9}
        for image in (1, 2, 3):
            assert other.payload(image) == plain.payload(image)
    assert plain.info["description"] == data["info"]["description"]
    assert plain.licences == data["licenses"]


def test_cells_come_back_as_float32_in_file_order() -> None:
    data = dataset()
    annotations = read(data)
    for image in (1, 2, 3):
        expected = [cell for cell in data["annotations"] if cell["image_id"] == image]
        got = cells_of(annotations, image)
        assert [cell.id for cell in got] == [cell["id"] for cell in expected]
        for one, other in zip(got, expected):
            np.testing.assert_array_equal(one.polygons[0].ravel(), np.float32(other["segmentation"][0]))
    assert annotations.payload(77) == b""


def test_every_truncation_is_told_with_its_byte() -> None:
    text = json.dumps(dataset(), ensure_ascii=False).encode()
    whole = read(text)
    assert whole.broken is None
    for cut in range(0, len(text), 5):
        found = read(text[:cut]).broken
        assert found is not None
        assert found.position <= cut
        assert f"at byte {found.position}" in str(found)


def test_records_before_a_break_are_kept() -> None:
    text = json.dumps(dataset()).encode()
    place = text.index(b'{"id": 120,')
    annotations = read(text[: place + 30])
    assert sum(annotations.counts().values()) == 20
    assert annotations.broken is not None
    assert annotations.broken.position == place
    assert annotations.last_image == 1 + 19 % 3


def test_text_that_is_no_json_is_told_where() -> None:
    text = json.dumps(dataset(), ensure_ascii=False).encode()
    place = text.index(b'"image_id"')
    broken = read(text[:place] + b"<html>" + text[place:]).broken
    assert broken is not None
    assert broken.position == place
    for bad in (
        b"[]",
        b"",
        b"x",
        b'{"images": [1 2]}',
        b'{"a": 1} {',
        b"{1: 2}",
        b"\xff\xfe",
        b'{"a":' + b"[" * 100_000,
    ):
        assert read(bad).broken is not None
    assert isinstance(broken, BrokenJsonError)


def test_a_byte_order_mark_is_no_defect() -> None:
    assert read(b"\xef\xbb\xbf" + json.dumps(dataset()).encode()).broken is None


def test_bad_records_are_named_and_the_rest_is_read() -> None:
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
    named = {identity for section, identity, _ in annotations.bad if section == "annotations"}
    assert named == {900, 901, 902, 903, 904, 905, 906, 907, 908, 909, None}
    assert [identity for section, identity, _ in annotations.bad if section == "images"] == [8, 9, 10, None, None]
    assert annotations.counts() == read(dataset()).counts()


def test_text_ids_are_taken() -> None:
    data = dataset()
    data["images"] = [{"id": "a", "file_name": "A.tif"}]
    data["annotations"] = [record(1, 0, [[0, 0, 4, 0, 4, 4]]) | {"id": "c\u00e9ll", "image_id": "a"}]
    annotations = read(data)
    assert annotations.images == [coco.ImageEntry("a", "A.tif", None, None)]
    assert [cell.id for cell in cells_of(annotations, "a")] == ["c\u00e9ll"]


@pytest.mark.parametrize("seed", range(6))
def test_compressed_and_plain_rle_equal_pycocotools(seed: int) -> None:
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
        ((got_size, got_runs),) = cell.runs
        got = rle.mask_of_runs(got_size, got_runs)
        assert got is not None
        np.testing.assert_array_equal(got, mask)
    assert (first.crowd, second.crowd) == (False, True)
    assert len(third.polygons) == 1


def test_category_is_that_of_most_cells() -> None:
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


def test_memory_is_a_small_part_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "big.json"
    outline = json.dumps([np.random.default_rng(0).uniform(0, 700, 80).round(2).tolist()])
    cells = 60_000
    with open(path, "w") as stream:
        stream.write('{"annotations": [')
        one = '{"id": %d, "image_id": %d, "category_id": 1, "segmentation": ' + outline + "}"
        stream.write(", ".join(one % (i, i % 200) for i in range(cells)))
        images = [{"id": i, "file_name": f"A_Phase_{i}.tif", "width": 704, "height": 520} for i in range(200)]
        stream.write(f'], "images": {json.dumps(images)}}}')
    done = subprocess.run([sys.executable, "-c", MEMORY, str(path)], capture_output=True, text=True, check=True)
    counted, grown_kib = map(int, done.stdout.split())
    assert counted == cells
    # 40 MB of JSON would be 250 MB of Python objects. Measured: 22 MB, most of it the 4 MB buffers.
    assert path.stat().st_size > 35e6
    assert grown_kib < 45_000


def test_real_files(livecell_mini: Path) -> None:
    for path in (livecell_mini / "annotations" / "LIVECell").glob("*.json"):
        data = json.loads(path.read_bytes())
        with open(path, "rb") as stream:
            annotations = coco.read_annotations(stream, path.name)
        assert (annotations.bad, annotations.broken) == ([], None)
        assert annotations.size == path.stat().st_size
        for entry in data["images"]:
            expected = [cell for cell in data["annotations"] if cell["image_id"] == entry["id"]]
            got = cells_of(annotations, entry["id"])
            assert [cell.id for cell in got] == [cell["id"] for cell in expected]
            assert all(
                np.array_equal(a.polygons[0].ravel(), np.float32(b["segmentation"][0])) for a, b in zip(got, expected)
            )


def test_values_as_converters_write_them() -> None:
    """Numbers as text or floats, points in pairs, a polygon without its list, Python's bytes: all are read."""
    square = [1, 1, 5, 1, 5, 5]
    odd: list[Any] = [
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
    odd += [{"id": 10 + i, "image_id": 7, "segmentation": rle, "iscrowd": "1"} for i, rle in enumerate(rles)]
    sizes: list[Any] = [("50", 40.0), (0, None), ("", "0")]
    pictures = [{"id": str(7 + i), "file_name": "x", "width": w, "height": h} for i, (w, h) in enumerate(sizes)]
    annotations = read({"images": pictures, "annotations": odd, "categories": [{"id": "1", "name": "cell"}]})
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


def test_values_that_cannot_be_meant_are_named() -> None:
    wrong = {"iscrowd": "maybe", "category_id": 1.5, "image_id": True}
    cells = [record(i, 1, [[1, 1, 5, 1, 5, 5]]) | {key: value} for i, (key, value) in enumerate(wrong.items())]
    pictures = [{"id": 1, "file_name": "x", "width": -3, "height": 4}]
    twice = [{"id": 1, "name": "cell"}, {"id": 1.0, "name": "debris"}]
    annotations = read({"images": pictures, "annotations": cells, "categories": twice})
    reasons = " ".join(reason for _, _, reason in annotations.bad)
    assert annotations.counts() == {}
    for text in ("'maybe'", "1.5", "True", "-3", "both 'cell' and 'debris'"):
        assert text in reasons


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("chunk", [1, 5, 4096])
def test_unicode_in_any_form(encoding: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "CHUNK", chunk)
    text = json.dumps(dataset(), ensure_ascii=False).encode(encoding)
    annotations = read(text)
    assert annotations.broken is None
    assert annotations.size == len(text)
    assert annotations.info["description"] == dataset()["info"]["description"]
    assert annotations.counts() == read(dataset()).counts()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (json.dumps(dataset(), ensure_ascii=False).encode("latin-1"), "not UTF-8 text: byte 0xe9"),
        (b'[{"image_id": 1, "segmentation": [], "score": 1}]', "a list of COCO results"),
        (b'[{"data": {}, "annotations": []}]', "Label Studio"),
        (b'{"shapes": [], "imagePath": "a.png", "imageData": null}', "a LabelMe file"),
        (b'{"_via_img_metadata": {}, "_via_settings": {}}', "a project of VIA"),
        (b'{"type": "FeatureCollection", "features": []}', "GeoJSON"),
        (b'{"annotations": [], "b": 1}', "an object of annotations, b"),
        (b"{}", "an empty object"),
    ],
)
def test_json_that_is_no_coco_file_is_named(text: bytes, told: str) -> None:
    broken = read(text).broken
    assert told in str(broken)
    assert "truncated" not in str(broken)


def test_categories_are_chosen_by_name_or_id() -> None:
    data = dataset()
    data["annotations"] = [
        record(i, 1, [[0, 0, 4, 0, 4, 4]]) | {"category_id": kind} for i, kind in enumerate([1, 2, 2, 3, 9])
    ]
    names = ["cell", "Debris", "scale_bar"]
    data["categories"] = [{"id": i, "name": name} for i, name in enumerate([*names, "1"], 1)]
    other = data | {"categories": [{"id": 2, "name": "cell"}]}

    def counted(*wanted: str) -> tuple[list[int | str], list[int | str]]:
        files = [read(data), read(other)]
        rows = categories.choose(files, wanted)
        assert sum(row["annotations"] for row in rows) == 10
        chosen = {row["name"] for row in rows if row["chosen"]}
        assert chosen == {row["name"] for row in rows} or wanted
        return tuple([cell.id for cell in cells_of(file, 1)] for file in files)  # type: ignore[return-value]

    assert counted() == ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])
    assert counted("cell") == ([0], [1, 2])
    assert counted("debris", "SCALE_BAR") == ([1, 2, 3], [])
    assert counted("9") == ([4], [4])
    for wanted, told in (
        ("celll", "did you mean cell"),
        ("nucleus", "the set has 1, 3, 9, Debris"),
        ("2", "Debris or cell"),
    ):
        with pytest.raises(UserError, match=told):
            counted(wanted)
    line = categories.notice(categories.choose([read(data)], ()), ())
    assert "9 (1 of an unlisted category)" in line
    assert "Debris (2)" in line
    assert categories.notice(categories.choose([read(dataset())], ()), ()) == ""
