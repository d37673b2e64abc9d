"""Results files of any tool: each record is matched with its image, or skipped and reported."""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from raylivecell.core.errors import UserError
from raylivecell.scoring import average_precision, coco_results
from raylivecell.scoring.coco_results import Image, Results

SIZE = (60, 60)
FULL_MASK = {"size": list(SIZE), "counts": [SIZE[0] * SIZE[1]]}
GOOD = {"image_id": 1, "segmentation": FULL_MASK, "score": 0.5}
ONE = [Image("a.tif", "a.tif", "1", SIZE)]


def images(*sources: str, ids: str = "", file_names: tuple[str, ...] = ()) -> list[Image]:
    """Images with these sources and the ids 1, 2, ... or the letters of `ids`."""
    numbers = ids or [str(number) for number in range(1, len(sources) + 1)]
    return [Image(*values, SIZE) for values in zip(sources, file_names or sources, numbers)]


def record(name: Any = None, image_id: Any = None, corner: int = 0) -> dict[str, Any]:
    """A record with a square cell whose left edge is at x = `corner`."""
    square = [corner, 0, corner + 9, 0, corner + 9, 9, corner, 9]
    keys = {"file_name": name, "image_id": image_id}
    return {"segmentation": [square], "score": 0.5} | {key: value for key, value in keys.items() if value is not None}


def read(records: Any, split: list[Image], others: tuple[str, ...] = ()) -> Results:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "cells.json")
        file.write_text(records if isinstance(records, str) else json.dumps(records))
        return coco_results.read(str(file), split, lambda: others)


def left_edges(results: Results) -> list[list[int]]:
    """Left edges of each image's cells."""
    return [[int(coco_mask.toBbox(mask)[0]) for mask in masks] for masks, _ in results.cells]


def test_masks_and_scores_are_read_as_they_were_written() -> None:
    rng = np.random.default_rng(3)
    rles = [coco_mask.encode(np.asfortranarray(rng.integers(0, 2, SIZE, np.uint8))) for _ in range(7)]
    scores = rng.random(7)
    polygon = [[2.0, 3.0, 20.0, 3.0, 20.0, 30.0, 2.0, 30.0]]
    plain = {"size": list(SIZE), "counts": [100, 20, SIZE[0] * SIZE[1] - 120]}
    records = average_precision.results(5, rles, scores)
    records += [{"image_id": "a.tif", "segmentation": cell, "score": 0.5} for cell in (polygon, plain)]
    cells = read(records, images("b.tif", "a.tif", ids="56")).cells
    assert cells[0][0] == rles
    np.testing.assert_allclose(cells[0][1], scores, atol=1e-6)
    masks = [coco_mask.decode(rle) for rle in cells[1][0]]
    assert masks[0][3:30, 2:20].all()
    assert masks[0].sum() == 27 * 18
    assert masks[1].T.ravel()[100:120].all()
    assert masks[1].sum() == 20


def test_polygons_are_drawn_as_by_pycocotools() -> None:
    corners = np.random.default_rng(4).uniform(-9, 70, (30, 5, 2))
    shapes = [
        [polygon.ravel().tolist(), square, [5.0, 5.0, 9.0, 9.0]]
        for polygon in corners
        for square in [[1, 1, 9, 1, 9, 9]]
    ]
    masks = [coco_mask.merge(coco_mask.frPyObjects(shape[:2], *SIZE)) for shape in shapes]
    records = [{"image_id": 1, "segmentation": shape, "score": 1} for shape in shapes]
    assert read(records, ONE).cells[0][0] == masks
    far = [{"image_id": 1, "segmentation": [[-1e12, 5, 1e12, 5, 1e12, 1e12]], "score": 1}]
    assert read(far, ONE).cells[0][0][0]["size"] == list(SIZE)


RUNS = st.one_of(
    st.text(st.characters(min_codepoint=40, max_codepoint=130), max_size=12),
    st.lists(st.one_of(st.integers(-(2**70), 2**70), st.integers(0, 3600), st.floats(), st.none()), max_size=5),
    st.builds(lambda run: [run, 3600 - run], st.integers(-5, 3600)),
    st.none(),
    st.integers(),
)
NUMBERS = st.one_of(st.floats(), st.floats(-100, 100), st.integers(-(2**70), 2**70), st.text(max_size=2))
SEGMENTATIONS = st.one_of(
    st.fixed_dictionaries({"size": st.sampled_from([[60, 60], [60.0, 60], [60], "60", None]), "counts": RUNS}),
    st.lists(st.one_of(st.lists(NUMBERS, max_size=8), st.lists(st.floats(-100, 100), min_size=6, max_size=6))),
    st.sampled_from([{}, None, 7, "cell", [[]], [{}], [[[1, 2, 3, 4, 5, 6]]]]),
)
IDS = st.one_of(st.none(), NUMBERS, st.booleans(), st.sampled_from([1, 1.0, "1", "a", "a.tif", "x/a.tif", "", "/"]))


@given(SEGMENTATIONS, NUMBERS, IDS, IDS)
@settings(max_examples=300)
def test_any_record_is_skipped_or_can_be_scored(segmentation: Any, score: Any, image_id: Any, name: Any) -> None:
    """On some of these records pycocotools itself does not terminate, or crashes the process."""
    unusual = {"image_id": image_id, "segmentation": segmentation, "score": score, "file_name": name}
    try:
        results = read([GOOD, unusual], ONE)
    except UserError as error:
        assert isinstance(name, str)
        assert "no record can be used" in str(error) or "several images" in str(error)  # noqa: PT017
        return
    (rles, scores) = results.cells[0]
    assert len(rles) + sum(len(which) for which in results.left_out.values()) == 2
    assert coco_mask.decode(rles[-1]).shape == SIZE
    assert average_precision.match(rles, scores, [coco_mask.encode(np.ones(SIZE, np.uint8, order="F"))]).truths[0] == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nothing", "is not JSON"),
        ('{"annotations": []}', "not a list of detections"),
        ([{"image_id": 1, "score": 1}], r"1 record \(record 0\): lacks one of image_id, segmentation, score"),
        ([{"segmentation": FULL_MASK, "score": 1}], "lacks image_id and file_name"),
        ([GOOD | {"score": "high"}], "score 'high' is not a finite number"),
        ([GOOD | {"score": float("nan")}], "not a finite number"),
        ([GOOD | {"score": None}], "score None is not a finite number"),
        ([GOOD | {"image_id": 1.5}], "image_id 1.5 is neither"),
        ([GOOD | {"image_id": 9}] * 3, r"3 records \(record 0 \(9\), .*: of images that the split does not contain"),
        ([GOOD | {"score": 10**400}], "not a finite number"),
        ([GOOD | {"segmentation": FULL_MASK | {"size": [9, 9]}}], r"its mask is \[9, 9\], the image \[60, 60\]"),
        ([GOOD | {"segmentation": FULL_MASK | {"counts": "0"}}], r"its RLE does not fill the image \[60, 60\]"),
        ([GOOD | {"segmentation": FULL_MASK | {"counts": [5, 3594]}}], "its RLE does not fill the image"),
        ([GOOD | {"segmentation": FULL_MASK | {"counts": [-5, 5, 3600]}}], "its RLE does not fill the image"),
        ([GOOD | {"segmentation": FULL_MASK | {"counts": [2**62] * 4 + [3600]}}], "its RLE does not fill the image"),
        ([GOOD | {"segmentation": FULL_MASK | {"counts": [0.5, 3599.5]}}], "neither polygons .* nor RLE"),
        ([GOOD | {"segmentation": "cell"}], "neither polygons .* nor RLE"),
        ([GOOD | {"segmentation": []}], "neither polygons .* nor RLE"),
        ([GOOD | {"segmentation": [[1, 2, float("inf"), 4, 5, 6]]}], "neither polygons .* nor RLE"),
    ],
)
def test_bad_records_are_reported_and_are_an_error_only_if_none_is_good(content: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(content, ONE)
    if isinstance(content, list):
        results = read([GOOD, *content], ONE)
        assert len(results.cells[0][0]) == 1
        (line,) = results.lines()
        assert "left out: " in line
        assert sum(results.summary()["left_out"].values()) == len(content)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no results at"):
        coco_results.read(str(tmp_path / "none.json"), [])


WELLS = images("w/well0/im.png", "w/well1/im.png", file_names=("well0/im.png", "well1/im.png"))


@pytest.mark.parametrize(
    ("name", "image_id"),
    [
        ("w/well1/im.png", 77),  # the path in the prepared folder
        ("well1/im.png", 77),  # relative to a folder in it, or as in the annotation file
        ("/data/in/w/well1/im.png", None),  # relative to a folder above
        (".\\w\\well1\\im.png", None),
        ("well1/im", None),
        ("well1/im.tif", None),  # converted to another format
        (None, "well1/im.png"),
        (None, 2),
        (None, 2.0),
        (None, "2"),
        (float("nan"), 2),
    ],
)
def test_a_record_refers_to_an_image_by_path_or_id(name: Any, image_id: Any) -> None:
    assert left_edges(read([record(name, image_id, 7)], WELLS)) == [[], [7]]
    assert read([record(name, image_id, 7)], WELLS).missing == ["w/well0/im.png"]


@pytest.mark.parametrize(
    ("records", "split", "message"),
    [
        ([record("im.png")], WELLS, r"'im.png' may mean any of 2 images \(w/well0/im.png, w/well1/im.png\)"),
        ([record("a.png", 3), record("a.png", 4)], images("x/a.png"), "of several images .image_id 3, 4"),
        ([record(None, 1)], images("A/1.png", "B/1.png", ids="11"), "1 may mean any of 2 images"),
        ([record(None, "2")], images("1.png", "2.png", ids="21"), "'2' may mean any of 2 images"),
    ],
    ids=["base name", "two ids of one name", "ids of two files", "an id that is a name"],
)
def test_ambiguous_records_are_refused(records: list[Any], split: list[Image], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(records, split)


def test_only_the_ambiguous_record_is_skipped_if_every_image_has_others() -> None:
    records = [record("well0/im.png", 1, 3), record("well1/im.png", 2, 5), record("im.png", 3, 9)]
    results = read(records, WELLS)
    assert left_edges(results) == [[3], [5]]
    assert list(results.left_out.values()) == [["record 2 ('im.png')"]]


def test_an_image_of_another_split_with_the_same_name_is_not_matched() -> None:
    """`predict` ran on the complete folder; the annotation files contain base names."""
    split = images("images/test/000.png", file_names=("000.png",))
    records = [record("train/000.png", 1, 3), record("test/000.png", 2, 5)]
    assert left_edges(read(records, split, ("images/train/000.png",))) == [[5]]
    with pytest.raises(UserError, match="does not contain"):
        read(records[:1], split, ("images/train/000.png",))


def test_a_unique_base_name_is_enough() -> None:
    split = images("images/livecell_test_images/A172_1.tif")
    assert left_edges(read([record("copies/A172_1.png", 9, 5)], split, ("images/B.tif",))) == [[5]]
    with pytest.raises(UserError, match="does not contain"):
        read([record("copies/A172_1.png", 9, 5)], split, ("images/x/A172_1.tif",))
    both = [*split, *images("images/livecell_test_images/B.tif", ids="5")]
    results = read([record("livecell_test_images/B.tif", 8, 3), record("train/A172_1.tif", 9, 5)], both)
    assert left_edges(results) == [[], [3]], "a path with folders of the dataset refers to these folders"


def test_records_of_an_image_may_refer_to_it_by_name_and_by_id() -> None:
    records = [record("a.png", 1, 3), record(None, 1, 5), record("a.png", None, 7)]
    assert left_edges(read(records, images("a.png", "b.png"))) == [[3, 5, 7], []]


def test_another_plane_of_a_file_is_another_image() -> None:
    split = images("in/a.tif#t1", "in/b.tif#t1", file_names=("a.tif", "b.tif"))
    for name in ("a.tif#t1", "in/a.tif#t1", "/x/in/a.tif#t1", "a#t1", "a.tif", "in/a.tif", "other/a.tif"):
        results = read([record(name, 9, 3)], split, others=("in/c.tif#t1",))
        assert left_edges(results) == [[3], []], name
    for name in ("a.tif#t0", "in/a.tif#t0", "other/a.tif#t0", "a#t0", "a.tif#t1_z0"):
        with pytest.raises(UserError, match=r"a(\.tif)?#t.*of images that the split does not contain"):
            read([record(name, 9, 3)], split)
    assert left_edges(read([record("b.tif#t0", 1, 3), record("b.tif#t1", 2, 5)], split)) == [[], [5]]
    with pytest.raises(UserError, match="does not contain"):  # the same name in another split
        read([record("other/a.tif", 9, 3)], split, others=("up/a.tif",))
    assert left_edges(read([record("c#t1.tif", 9, 3)], images("in/c#t1.tif"))) == [[3]]  # a name, not a plane


NAMES = st.lists(st.sampled_from(["a", "b", "a.b"]), min_size=1, max_size=3).map("/".join)


@given(st.sets(NAMES.map(lambda name: name + ".png"), min_size=1, max_size=6), st.sampled_from(["", "up/", "/x/y/"]))
def test_records_with_paths_match_their_images(sources: set[str], parent: str) -> None:
    """Paths relative to the prepared folder, to one above it or to one in it all match the right image."""
    split = images(*sorted(sources))
    records = [record(parent + image.source, 100 + place, place) for place, image in enumerate(split)]
    assert left_edges(read(records, split)) == [[place] for place in range(len(split))]
    deeper = [image._replace(source="in/" + image.source) for image in split]
    records = [record(image.source, 100 + place, place) for place, image in enumerate(split)]
    if any("/" in source for source in sources):
        assert left_edges(read(records, deeper)) == [[place] for place in range(len(split))]
