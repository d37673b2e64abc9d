"""From annotated images to shards: real LIVECell, every defect, other layouts, kills, S3."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from conftest import S3, joined, run_apart
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from raylivecell.annotations import coco, drawing
from raylivecell.annotations.rle import run_lengths
from raylivecell.core.errors import UserError
from raylivecell.data import cell_defects as outlines
from raylivecell.data import defects, draw, plan, shards
from raylivecell.data import prepare as module
from raylivecell.data.plan import PrepareConfig
from raylivecell.data.prepare import prepare
from raylivecell.runtime import session

HEIGHT, WIDTH = 48, 64
Json = dict[str, Any]


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline's tasks run here and now: what they do is the same, and takes milliseconds."""

    def here(function: Callable[[Json], Json], jobs: Sequence[Json]) -> Iterator[Json]:
        for job in jobs:
            yield function(json.loads(json.dumps(job)))

    monkeypatch.setattr(module, "_on_ray", here)
    monkeypatch.setattr(session, "connect", lambda: None)


def square(x: float, y: float, side: float = 6) -> list[float]:
    return [x, y, x + side, y, x + side, y + side, x, y + side]


SQUARES = [square(4, 4), square(20, 4), square(40, 30), square(10, 30), square(25, 20), square(52, 6)]
N = len(SQUARES)


def pixels(seed: int, outlines: Sequence[list[float]] = SQUARES) -> np.ndarray:
    """uint8 (48, 64): gray 128 with noise, and a rough patch in each outline's box."""
    rng = np.random.default_rng(seed)
    image = rng.integers(127, 130, (HEIGHT, WIDTH)).astype(np.uint8)
    for outline in outlines:
        x, y = np.clip(np.array(outline).reshape(-1, 2).astype(int), 0, (WIDTH, HEIGHT)).T
        window = image[y.min() : y.max(), x.min() : x.max()]
        window[:] = rng.integers(60, 200, window.shape)
    return image


class Folder:
    """A source being made: images and one JSON a split, in LIVECell's layout."""

    def __init__(self, root: Path) -> None:
        self.root, self.splits, self.number = root, dict[str, Json](), 0

    def file(self, name: str, image: np.ndarray, folder: str = "livecell_train_val_images") -> None:
        path = self.root / "images" / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), image)

    def entry(self, split: str, name: str, outlines: Sequence[Any] = SQUARES, **more: Any) -> int:
        data = self.splits.setdefault(split, {"info": {"description": "tests"}, "images": [], "annotations": []})
        self.number += 1
        image_id = 1000 * self.number
        data["images"].append({"id": image_id, "file_name": name, "width": WIDTH, "height": HEIGHT} | more)
        for number, outline in enumerate(outlines, image_id + 1):
            drawn = outline if isinstance(outline, dict) else [outline]
            data["annotations"].append({"id": number, "image_id": image_id, "category_id": 1, "segmentation": drawn})
        return image_id

    def image(self, split: str, name: str, outlines: Sequence[Any] = SQUARES, **more: Any) -> int:
        folder = "livecell_test_images" if split == "test" else "livecell_train_val_images"
        self.file(name, pixels(self.number), folder)
        return self.entry(split, name, outlines, **more)

    def write(self) -> str:
        for split, data in self.splits.items():
            path = self.root / "annotations" / "LIVECell" / f"livecell_coco_{split}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(data))
        return str(self.root)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Two sound images in each split."""
    made = Folder(tmp_path / "source")
    for split in shards.SPLITS:
        for number in (1, 2):
            made.image(split, f"A172_Phase_{split}_{number}.png")
    return made


def files_of(out: Path) -> dict[str, str]:
    """Checksum of every file under `out`, hidden ones too."""
    files = (path for path in out.rglob("*") if path.is_file())
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rows_of(out: Path | str, split: str) -> dict[str, Json]:
    columns = shards.SCHEMA.names
    rows = [shards.read_row(row, columns) for row in shards.list_rows(str(out), split)]
    return {row["file_name"]: row for row in rows}


def masks_of(row: Json) -> np.ndarray:
    """bool (cells, H, W) of a row's outlines."""
    assert len(row["outlines"]) == row["cells"]
    size = [row["height"], row["width"]]
    masks = [coco_mask.decode({"size": size, "counts": counts}) for counts in row["outlines"]]
    return np.array(masks, bool).reshape(-1, *size)


def found_in(description: Json, defect: str) -> list[Json]:
    return [one for one in description["defects"]["found"] if one["defect"] == defect]


def counts(description: Json) -> dict[str, tuple[int, int]]:
    return {split: (told["images"], told["cells"]) for split, told in description["splits"].items()}


@pytest.mark.ray
def test_real_livecell(livecell_mini: Path, ray_cluster: None, tmp_path: Path) -> None:
    told = prepare(str(livecell_mini), str(tmp_path / "out"))
    assert counts(told) == {"train": (9, 2068), "val": (2, 327), "test": (3, 869)}
    assert told["defects"]["counts"] == {"unlisted_file": 6}
    assert told["licence"] == "CC BY-NC 4.0"
    assert "Nature Methods" in told["citation"]
    assert set(told["cell_types"]) == {"MCF7", "BT474", "Huh7", "SkBr3", "SHSY5Y", "A172", "SKOV3"}
    assert told == shards.load_description(str(tmp_path / "out"))
    train = rows_of(tmp_path / "out", "train")
    values = np.concatenate([row["image"].ravel() for row in train.values()]).astype(float)
    assert told["grey_levels"]["mean"] == pytest.approx(values.mean(), abs=1e-3)
    assert told["grey_levels"]["std"] == pytest.approx(values.std(), abs=1e-3)
    for row in train.values():
        assert len(np.unique(row["labels"])) == row["cells"] + 1
        np.testing.assert_array_equal(row["foreground"], row["labels"] > 0)
        np.testing.assert_array_equal(row["border"], drawing.border_map(row["labels"], 5.0))
        assert row["sha256"] == hashlib.sha256((livecell_mini / row["source"]).read_bytes()).hexdigest()
    areas = np.concatenate(
        [np.bincount(row["labels"].ravel())[1:] for row in train.values() if row["cell_type"] == "MCF7"]
    )
    row = rows_of(tmp_path / "out", "test")["MCF7_Phase_H4_1_03d08h00m_4.tif"]
    areas = np.concatenate([areas, np.bincount(row["labels"].ravel())[1:]])
    assert told["cell_types"]["MCF7"]["cell_area_px"]["p50"] == np.percentile(areas, 50, method="inverted_cdf")
    before = files_of(tmp_path / "out")
    assert set(before) == {"dataset.json", *(f"{split}/part-00000.parquet" for split in shards.SPLITS)}
    assert prepare(str(livecell_mini), str(tmp_path / "out")) == told
    assert files_of(tmp_path / "out") == before


def test_visible_cells_tell_whole_from_few_annotations_on_real_images(livecell_mini: Path) -> None:
    """LIVECell issue 21: images with 1 to 10 of hundreds of cells annotated."""
    source = plan.read_source(str(livecell_mini), PrepareConfig())
    for entry in source.entries:
        visible = draw.examine(str(livecell_mini / str(entry.path))).visible
        cells = coco.decode_cells(source.payload(entry))
        assert outlines.covered(cells) > 1.5 * defects.FEW_COVER * visible
        assert outlines.covered(cells[: len(cells) // 20]) < defects.FEW_COVER * visible


@pytest.mark.usefixtures("no_ray")
def test_nested_images_and_annotations_as_dict(livecell_mini: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for path in livecell_mini.glob("images/*/*.tif"):
        nested = copy / "images" / path.parent.name / path.name.split("_")[0] / path.name
        nested.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, nested)
    for path in livecell_mini.glob("annotations/LIVECell/*.json"):
        data = json.loads(path.read_bytes())
        data["annotations"] = {str(cell["id"]): cell for cell in reversed(data["annotations"])}
        (copy / path.name).write_text(json.dumps(data))
    flat = prepare(str(livecell_mini), str(tmp_path / "flat"))
    nested_told = prepare(str(copy), str(tmp_path / "nested"))
    assert counts(flat) == counts(nested_told)
    for split in shards.SPLITS:
        ours, theirs = rows_of(tmp_path / "flat", split), rows_of(tmp_path / "nested", split)
        assert list(ours) == list(theirs)
        for name in ours:
            np.testing.assert_array_equal(ours[name]["foreground"], theirs[name]["foreground"])
            np.testing.assert_array_equal(masks_of(ours[name]).any(axis=0), ours[name]["foreground"] != 0)
            assert sorted(ours[name]["outlines"]) == sorted(theirs[name]["outlines"])
            assert theirs[name]["source"].split("/")[-2] == theirs[name]["cell_type"]


@pytest.mark.usefixtures("no_ray")
def test_single_cell_type_and_size_split_files(folder: Folder, tmp_path: Path) -> None:
    source = Path(folder.write())
    kinds = source / "annotations" / "LIVECell_single_cells"
    for kind in ("a172", "bv2"):
        (kinds / kind).mkdir(parents=True)
    base = source / "annotations" / "LIVECell"
    for split in shards.SPLITS:
        data = json.loads((base / f"livecell_coco_{split}.json").read_text())
        for kind, image in zip(("a172", "bv2"), data["images"]):
            (kinds / kind / f"{split}.json").write_text(json.dumps(data | {"images": [image]}))
    sizes = source / "annotations" / "LIVECell_dataset_size_split"
    sizes.mkdir()
    shutil.copyfile(kinds / "bv2" / "train.json", sizes / "0_train2percent.json")
    assert counts(prepare(str(source), str(tmp_path / "all")))["train"] == (2, 2 * N)
    one = prepare(
        str(source),
        str(tmp_path / "one"),
        PrepareConfig(
            annotations={
                "train": "annotations/LIVECell_dataset_size_split/0_train2percent.json",
                "test": "annotations/LIVECell_single_cells/*/test.json",
            }
        ),
    )
    assert counts(one) == {"train": (1, N), "val": (0, 0), "test": (2, 2 * N)}
    # Each single-type file holds the annotations of images that it does not list.
    assert {found["detail"] for found in found_in(one, "orphan_annotation")} == {
        f"{N} annotations of images not listed"
    }
    shutil.rmtree(base)
    with pytest.raises(UserError, match="choose with --annotations train"):
        prepare(str(source), str(tmp_path / "several"))


@pytest.mark.usefixtures("no_ray")
def test_any_coco_set_of_any_size(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for number, (split, size) in enumerate({"train": (30, 200), "val": (17, 19), "test": (300, 31)}.items()):
        (source / split / "deep").mkdir(parents=True)
        image = np.random.default_rng(number).integers(0, 255, size, dtype=np.uint8)
        cv2.imwrite(str(source / split / "deep" / "001.png"), image)
        data = {
            "images": [{"id": 0, "file_name": "deep/001.png", "width": size[1], "height": size[0]}],
            "annotations": [
                {"id": 0, "image_id": 0, "category_id": 4, "segmentation": [square(2, 3), square(8, 9)], "iscrowd": 0}
            ],
            "categories": [{"id": 4, "name": "neuron"}, {"id": 5, "name": "glia"}],
            "licenses": [{"name": "CC0"}],
        }
        (source / f"instances_{split}.json").write_text(json.dumps(data))
    told = prepare(str(source), str(tmp_path / "out"))
    assert told["defects"]["found"] == []
    assert told["licence"] == "CC0"
    assert told["cell_types"]["neuron"]["images"] == {"train": 1, "val": 1, "test": 1}
    (row,) = rows_of(tmp_path / "out", "test").values()
    assert row["image"].shape == (300, 31)
    # Two polygons of one record are one cell.
    assert (row["cells"], int(row["foreground"].sum())) == (1, 72)


@pytest.mark.usefixtures("no_ray")
def test_rle_and_polygons_draw_the_same(folder: Folder, tmp_path: Path) -> None:
    polygons = [square(3.3, 4.7, 9.9), square(11, 9), square(50, 40, 30)]
    encoded = [coco_mask.merge(coco_mask.frPyObjects([polygon], HEIGHT, WIDTH)) for polygon in polygons]
    compressed = [{"size": rle["size"], "counts": rle["counts"].decode()} for rle in encoded]
    plain = []
    for rle in encoded:
        flat = coco_mask.decode(rle).T.ravel()
        runs = np.diff(np.r_[0, np.flatnonzero(np.diff(flat)) + 1, len(flat)]).tolist()
        plain.append({"size": rle["size"], "counts": [0, *runs] if flat[0] else runs})
    for name, drawn in (("a", polygons), ("b", compressed), ("c", plain), ("d", [{"size": [5, 5], "counts": [25]}])):
        folder.file(f"{name}.png", pixels(ord(name)))
        folder.entry("train", f"{name}.png", drawn)
    told = prepare(folder.write(), str(tmp_path / "out"))
    rows = rows_of(tmp_path / "out", "train")
    for name in "bc":
        np.testing.assert_array_equal(rows["a.png"]["labels"], rows[f"{name}.png"]["labels"])
    assert "d.png" not in rows
    assert [one["file_name"] for one in found_in(told, "degenerate_polygon")] == ["d.png"]
    assert found_in(told, "no_annotations")[0]["detail"] == "no annotation left that can be drawn"


def record(number: int, corners: np.ndarray, as_rle: bool) -> tuple[coco.CellRecord, np.ndarray]:
    """A cell as its polygon or as run lengths, and its mask (H, W) by pycocotools."""
    (rle,) = coco_mask.frPyObjects([corners.ravel().tolist()], HEIGHT, WIDTH)
    polygons, runs = [corners.astype(np.float32)], [((HEIGHT, WIDTH), run_lengths(rle["counts"]))]
    cell = coco.CellRecord(number, False, [] if as_rle else polygons, runs if as_rle else [])
    return cell, coco_mask.decode(rle).astype(bool)


CORNERS = st.lists(st.tuples(st.integers(-40, 300), st.integers(-40, 230)), min_size=3, max_size=6)


@given(st.lists(st.tuples(CORNERS, st.booleans()), min_size=1, max_size=8))
@settings(max_examples=100)
def test_outlines_are_whole_cells_as_pycocotools_draws_them_one_by_one(cells: list[Any]) -> None:
    """In the order of the labels; overlapping cells both keep what they share, of which the labels tell one."""
    records, masks = zip(*(record(i, np.array(corners) / 4, as_rle) for i, (corners, as_rle) in enumerate(cells)))
    image = {"file_name": "a.png", "split": "train", "cell_type": "A172", "path": "a.png", "sha256": ""}
    image |= {"annotation": "train.json", "id": 1, "scale": [1, 1]}
    rules, found = defects.DefectRules(doubled_contour="keep", no_annotations="keep"), list[Json]()
    row = draw.draw_sample(np.zeros((HEIGHT, WIDTH), np.uint8), image, list(records), rules, 5.0, found)
    assert row is not None
    gone = {i for one in found if one["defect"] in ("degenerate_polygon", "hidden_cell") for i in one["ids"]}
    stay = [mask for i, mask in enumerate(masks) if i not in gone]
    drawn = masks_of(row)
    np.testing.assert_array_equal(drawn, np.array(stay, bool).reshape(-1, HEIGHT, WIDTH))
    np.testing.assert_array_equal(drawn.any(axis=0), row["foreground"] != 0)
    for label, mask in enumerate(drawn, 1):
        assert mask[row["labels"] == label].all()


@pytest.mark.usefixtures("no_ray")
def test_overlapping_cells_both_keep_shared_pixels_in_the_shard(folder: Folder, tmp_path: Path) -> None:
    outside = square(200, 200)  # owns no pixel: neither a label nor an outline
    folder.image("train", "A172_Phase_two.png", [square(4, 4, 12), outside, square(10, 10, 9)])
    prepare(folder.write(), str(tmp_path / "out"))
    row = rows_of(tmp_path / "out", "train")["A172_Phase_two.png"]
    assert [type(counts) for counts in row["outlines"]] == [bytes, bytes]
    large, small = masks_of(row)
    assert (large.sum(), small.sum(), (large & small).sum()) == (144, 81, 36)
    assert np.bincount(row["labels"].ravel())[1:].tolist() == [108, 81]


def with_every_defect(folder: Folder) -> dict[str, list[Any]]:
    """Plants each defect once; returns defect -> [file name, ids]."""
    first = "A172_Phase_train_1.png"
    planted: dict[str, list[Any]] = {}
    ids = [folder.splits["train"]["images"][0]["id"], folder.entry("train", first, SQUARES[:3])]
    planted["duplicate_entry"] = [first, ids]
    planted["missing_file"] = ["A172_Phase_gone.png", [folder.entry("train", "A172_Phase_gone.png")]]
    folder.file("A172_Phase_unlisted.png", pixels(50))
    planted["unlisted_file"] = ["A172_Phase_unlisted.png", []]
    planted["unreadable_image"] = ["A172_Phase_cut.png", [folder.image("val", "A172_Phase_cut.png")]]
    cut = folder.root / "images" / "livecell_train_val_images" / "A172_Phase_cut.png"
    cut.write_bytes(cut.read_bytes()[:200])
    planted["wrong_size"] = ["A172_Phase_size.png", [folder.image("val", "A172_Phase_size.png", width=32)]]
    planted["no_annotations"] = ["A172_Phase_none.png", [folder.image("train", "A172_Phase_none.png", [])]]
    planted["few_annotations"] = [
        "A172_Phase_few.png",
        [folder.image("train", "A172_Phase_few.png", [square(5, 5, 3)])],
    ]
    for defect, image in {
        "colour_image": np.dstack([pixels(60)] * 3),
        "sixteen_bit_image": pixels(61).astype(np.uint16) * 257,
    }.items():
        folder.file(f"A172_Phase_{defect}.png", image)
        planted[defect] = [f"A172_Phase_{defect}.png", [folder.entry("train", f"A172_Phase_{defect}.png")]]
    folder.image("test", "A172_Phase_leak.png")
    shared = folder.splits["test"]["images"][-1]["id"]
    name = "A172_Phase_again.png"
    copy = (folder.root / "images/livecell_test_images/A172_Phase_leak.png").read_bytes()
    (folder.root / "images/livecell_train_val_images" / name).write_bytes(copy)
    planted["leak"] = [name, [shared, folder.entry("train", name)]]
    name = "A172_Phase_val_1_copy.png"
    original = folder.splits["val"]["images"][0]["id"]
    copy = (folder.root / "images/livecell_train_val_images/A172_Phase_val_1.png").read_bytes()
    (folder.root / "images/livecell_train_val_images" / name).write_bytes(copy)
    planted["identical_pixels"] = [name, [original, folder.entry("val", name)]]
    near = [value + 0.2 for value in SQUARES[0]]
    cells: list[Any] = [*SQUARES, near, square(61, 20), square(200, 200), [1, 1, 2, 2], [5, 5, 9, 9, 7, 7]]
    cells += [[1, float("nan"), 4, 2, 3, 9], square(11, 31, 2), square(40, 4)]
    number = folder.image("train", "A172_Phase_cells.png", cells)
    folder.splits["train"]["annotations"][-1]["iscrowd"] = 1
    name = "A172_Phase_cells.png"
    planted["doubled_contour"] = [name, [number + 7]]
    planted["out_of_bounds"] = [name, [number + 8, number + 9]]
    planted["degenerate_polygon"] = [name, [number + 10, number + 11, number + 12]]
    planted["hidden_cell"] = [name, [number + 9]]
    planted["crowd_region"] = [name, [number + 14]]
    json_name = "annotations/LIVECell/livecell_coco_train.json"
    folder.splits["train"]["annotations"].append({"id": 7, "image_id": 99, "segmentation": [SQUARES[0]]})
    folder.splits["train"]["annotations"].append({"id": 8, "image_id": 99, "segmentation": "drawn"})
    planted["orphan_annotation"] = [json_name, [99]]
    planted["bad_record"] = [json_name, [8]]
    for deeper in ("x", "y"):
        folder.file("A172_Phase_both.png", pixels(80 + ord(deeper)), f"livecell_train_val_images/{deeper}")
    planted["ambiguous_file"] = ["A172_Phase_both.png", [folder.entry("train", "A172_Phase_both.png")]]
    return planted


@pytest.mark.usefixtures("no_ray")
def test_every_defect_is_found_and_handled_by_its_rule(folder: Folder, tmp_path: Path) -> None:
    planted = with_every_defect(folder)
    told = prepare(folder.write(), str(tmp_path / "out"))
    got = {one["defect"]: [one["file_name"], one["ids"]] for one in told["defects"]["found"]}
    assert got == planted
    assert told["defects"]["counts"] == dict.fromkeys(sorted(planted), 1)
    train, val, test = (rows_of(tmp_path / "out", split) for split in shards.SPLITS)
    assert len(train) == 2 + 3
    assert train["A172_Phase_train_1.png"]["cells"] == N
    np.testing.assert_array_equal(train["A172_Phase_colour_image.png"]["image"], pixels(60))
    np.testing.assert_array_equal(train["A172_Phase_sixteen_bit_image.png"]["image"], pixels(61))
    assert "A172_Phase_both.png" not in train
    # The squares, the one cut at the edge, and the one that lies on a larger one.
    labels = train["A172_Phase_cells.png"]["labels"]
    assert train["A172_Phase_cells.png"]["cells"] == N + 2
    assert np.bincount(labels.ravel())[1:].tolist() == [36, 36, 36, 32, 36, 36, 18, 4]
    assert set(val) == {"A172_Phase_val_1.png", "A172_Phase_val_2.png"}
    assert set(test) == {"A172_Phase_test_1.png", "A172_Phase_test_2.png", "A172_Phase_leak.png"}


@pytest.mark.usefixtures("no_ray")
def test_the_other_rules(folder: Folder, tmp_path: Path) -> None:
    planted = with_every_defect(folder)
    config = PrepareConfig(
        duplicate_entry="keep_first",
        ambiguous_file="take_first",
        colour_image="drop",
        sixteen_bit_image="drop",
        wrong_size="scale",
        no_annotations="keep",
        few_annotations="keep",
        leak="keep",
        identical_pixels="keep",
        doubled_contour="keep",
        out_of_bounds="drop",
        crowd_region="keep",
    )
    told = prepare(folder.write(), str(tmp_path / "out"), config)
    assert set(told["defects"]["counts"]) == set(planted)
    train, val, _ = (rows_of(tmp_path / "out", split) for split in shards.SPLITS)
    names = {"train_1", "train_2", "none", "few", "again", "cells", "both"}
    assert set(train) == {f"A172_Phase_{name}.png" for name in names}
    assert not train["A172_Phase_none.png"]["foreground"].any()
    assert train["A172_Phase_both.png"]["source"].endswith("/x/A172_Phase_both.png")
    # The second contour of one cell is kept, and has no pixel of its own.
    assert found_in(told, "hidden_cell")[0]["ids"] == planted["doubled_contour"][1]
    assert train["A172_Phase_cells.png"]["cells"] == N + 2
    assert set(val) == {f"A172_Phase_{name}.png" for name in ("val_1", "val_2", "val_1_copy", "size")}
    # The JSON says 32 pixels wide, the file has 64: twice as wide, and the two that leave the file so are dropped.
    assert val["A172_Phase_size.png"]["foreground"].sum() == 2 * 36 * (N - 2)


@pytest.mark.usefixtures("no_ray")
def test_strict_lists_defects_and_leaves_nothing(
    folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.image("train", "A172_Phase_none.png", [])
    with pytest.raises(UserError, match="no_annotations 1: A172_Phase_none"):
        prepare(folder.write(), str(tmp_path / "out"), strict=True)
    assert "no_annotations" in capsys.readouterr().err
    folder.splits["train"]["images"].pop()
    (folder.root / "images/livecell_train_val_images/A172_Phase_none.png").unlink()
    folder.image("train", "A172_Phase_two.png", [*SQUARES, SQUARES[0]])
    with pytest.raises(UserError, match="doubled_contour 1: A172_Phase_two"):
        prepare(folder.write(), str(tmp_path / "out"), strict=True)
    assert files_of(tmp_path / "out") == {}


def as_brush(cell: Json) -> None:
    """CVAT's form of a cell drawn by brush: an RLE of the whole image, iscrowd 1."""
    (rle,) = coco_mask.frPyObjects([cell["segmentation"][0]], HEIGHT, WIDTH)
    cell |= {"iscrowd": 1, "segmentation": {"size": [HEIGHT, WIDTH], "counts": rle["counts"].decode()}}


@pytest.mark.usefixtures("no_ray")
def test_crowds_are_no_silent_guess(folder: Folder, tmp_path: Path) -> None:
    cells = folder.splits["train"]["annotations"]
    as_brush(cells[0])
    told = prepare(folder.write(), str(tmp_path / "few"))
    assert counts(told)["train"] == (2, 2 * N - 1)
    assert found_in(told, "crowd_region")[0]["rule"] == "drop"
    for cell in cells[1:3]:
        as_brush(cell)
    with pytest.raises(UserError, match=f"3 of {2 * N} annotations .*--crowd-region keep"):
        prepare(folder.write(), str(tmp_path / "most"))
    kept = prepare(folder.write(), str(tmp_path / "kept"), PrepareConfig(crowd_region="keep"))
    dropped = prepare(folder.write(), str(tmp_path / "dropped"), PrepareConfig(crowd_region="drop"))
    assert (counts(kept)["train"], counts(dropped)["train"]) == ((2, 2 * N), (2, 2 * N - 3))


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    ("broken", "told"),
    [
        ({"image": {"file_name": "gone.png"}}, "missing_file 1: gone.png"),
        ({"image": {"width": 5}}, "wrong_size 2"),
        ({"cell": {"segmentation": None}}, "bad_record 1"),
        ({"cell": {"segmentation": [[1, 1, 2, 2]]}}, "degenerate_polygon 2"),
        ({"cell": {"iscrowd": 1}}, "crowd_region 2"),
    ],
)
def test_a_split_that_ends_empty_is_an_error_with_the_reason(
    split: str, broken: Json, told: str, folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = folder.splits[split]
    for image in data["images"]:
        image |= broken.get("image", {})
    for cell in data["annotations"]:
        cell |= broken.get("cell", {})
    with pytest.raises(UserError, match=f"no image of {split} can be used: .*{told}.* the table above"):
        prepare(folder.write(), str(tmp_path / "out"), PrepareConfig(crowd_region="drop"))
    table = capsys.readouterr().err
    assert told.split()[0] in table.split("Defects")[1]
    assert files_of(tmp_path / "out") == {}


@pytest.mark.usefixtures("no_ray")
def test_a_set_without_a_cell_is_an_error(folder: Folder, tmp_path: Path) -> None:
    folder.splits["test"]["annotations"] = []
    assert counts(prepare(folder.write(), str(tmp_path / "out")))["test"] == (2, 0)
    folder.splits["train"]["annotations"] = folder.splits["val"]["annotations"] = []
    for config in (PrepareConfig(), PrepareConfig(no_annotations="keep")):
        with pytest.raises(UserError, match=r"no_annotations \d: A172.* see the table above"):
            prepare(folder.write(), str(tmp_path / "none"), config)
    for data in folder.splits.values():
        data["images"] = []
    with pytest.raises(UserError, match="list no image"):
        prepare(folder.write(), str(tmp_path / "none"))


@pytest.mark.usefixtures("no_ray")
def test_test_keeps_what_is_published(folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What rules drop from train for their own sake stays in test, and is named."""
    for split in ("train", "test"):
        place = "livecell_test_images" if split == "test" else "livecell_train_val_images"
        folder.image(split, f"A172_Phase_{split}_few.png", [square(5, 5, 3)])
        folder.image(split, f"A172_Phase_{split}_none.png", [])
        folder.image(split, f"A172_Phase_{split}_twice.png", [*SQUARES, [v + 0.2 for v in SQUARES[0]]])
        inner = [square(4, 4, 12), square(4, 4, 6), square(10, 4, 6), square(4, 10, 6), square(10, 10, 6)]
        folder.image(split, f"A172_Phase_{split}_hidden.png", [*inner, square(200, 200)])
        folder.file(f"A172_Phase_{split}_copy.png", pixels(folder.number - 1), place)
        folder.entry(split, f"A172_Phase_{split}_copy.png", inner)
    told = prepare(folder.write(), str(tmp_path / "out"))
    assert counts(told) == {"train": (4, 3 * N + 4), "val": (2, 2 * N), "test": (7, 3 * N + 1 + 1 + 5 + 5)}
    assert told["splits"]["test"]["listed"] == {"images": 7, "cells": 3 * N + 1 + 1 + 6 + 5}
    rules = {(one["defect"], one["split"]): one["rule"] for one in told["defects"]["found"]}
    names = ("few_annotations", "no_annotations", "identical_pixels", "doubled_contour")
    assert [rules[name, "test"] for name in names] == ["keep"] * 4
    assert [rules[name, "train"] for name in names] == ["drop", "drop", "keep_most_cells", "keep_first"]
    assert f"test: 7 of 7 images and {3 * N + 12} of {3 * N + 13} cells" in capsys.readouterr().err
    row = rows_of(tmp_path / "out", "test")["A172_Phase_test_hidden.png"]
    np.testing.assert_array_equal(masks_of(row).sum(axis=(1, 2)), [144, 36, 36, 36, 36])
    for label in np.unique(row["labels"])[1:]:
        assert masks_of(row)[label - 1][row["labels"] == label].all()


@pytest.mark.usefixtures("no_ray")
def test_chosen_categories_are_the_cells(folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for data in folder.splits.values():
        data["categories"] = [{"id": 1, "name": "cell"}, {"id": 2, "name": "scale bar"}]
        data["annotations"][0]["category_id"] = 2
    told = prepare(folder.write(), str(tmp_path / "all"))
    assert counts(told)["train"] == (2, 2 * N)
    assert f"all 2 categories are used as cells: cell ({6 * N - 3}), scale bar (3)" in capsys.readouterr().err
    told = prepare(folder.write(), str(tmp_path / "cells"), PrepareConfig(categories=("cell",)))
    assert counts(told)["train"] == (2, 2 * N - 1)
    assert "warning" not in capsys.readouterr().err
    chosen = [(one["name"], one["images"], one["annotations"], one["chosen"]) for one in told["categories"]]
    assert chosen == [("cell", 6, 6 * N - 3, True), ("scale bar", 3, 3, False)]
    assert told["source"]["categories"] == ["cell"]


@pytest.mark.usefixtures("no_ray")
def test_names_of_another_computer_choose_among_the_files(folder: Folder, tmp_path: Path) -> None:
    """And results are written by the file's name: a name in the JSON leads nowhere."""
    names = ["..\\..\\upload\\A172_Phase_train_1.png", "https://host.org/b/A172_Phase_train_2.png?x=1"]
    for image, name in zip(folder.splits["train"]["images"], names):
        image["file_name"] = name
    prepare(folder.write(), str(tmp_path / "out"))
    rows = rows_of(tmp_path / "out", "train")
    assert set(rows) == {f"livecell_train_val_images/A172_Phase_train_{number}.png" for number in (1, 2)}


@pytest.mark.usefixtures("no_ray")
def test_cells_of_images_with_one_id_are_drawn_on_none(folder: Folder, tmp_path: Path) -> None:
    first, second = folder.splits["train"]["images"]
    second["id"] = first["id"]
    folder.image("train", "A172_Phase_good.png")
    told = prepare(folder.write(), str(tmp_path / "out"))
    assert list(rows_of(tmp_path / "out", "train")) == ["A172_Phase_good.png"]
    assert "the id of 2 images" in found_in(told, "bad_record")[0]["detail"]


def test_outlines_that_are_odd_and_drawn_or_named() -> None:
    shape, rules = (40, 40), defects.DefectRules()

    def checked(*polygons: list[float]) -> tuple[int, dict[str, str]]:
        arrays = [np.array(polygon, np.float32).reshape(-1, 2) for polygon in polygons]
        cells, _, found = outlines.check_cells([coco.CellRecord(1, False, arrays, [])], shape, (1.0, 1.0), rules)
        drawn = sum(int(drawing.rasterise(cell, shape).mask.sum()) for cell in cells)
        return drawn, {defect: members[0][1] for defect, members in found.items()}

    bow_tie = checked([1, 1, 30, 1, 1, 30, 30, 30])  # its signed area is 0
    assert bow_tie[0] > 300
    assert bow_tie[1] == {}
    assert checked([0.1, 0.1, 0.9, 0.1, 0.9, 0.9]) == (
        0,
        {"degenerate_polygon": "all coordinates are in 0 to 1: fractions of the image's size?"},
    )
    assert checked(square(2, 2, 20), square(8, 8, 4))[1] == {"inner_outline": "a part lies in another part of its cell"}
    assert checked(square(2, 2, 4), square(20, 20, 4)) == (32, {})
    assert "degenerate_polygon" in checked([1, 1, 5, 5, 9, 9])[1]


@pytest.mark.usefixtures("no_ray")
def test_refuse_rules(folder: Folder, tmp_path: Path) -> None:
    folder.entry("train", "A172_Phase_gone.png")
    source = folder.write()
    assert prepare(source, str(tmp_path / "out"))["defects"]["counts"] == {"missing_file": 1}
    with pytest.raises(UserError, match="missing_file 1: A172_Phase_gone"):
        prepare(source, str(tmp_path / "other"), PrepareConfig(missing_file="refuse"))


@pytest.mark.usefixtures("no_ray")
def test_truncated_json(folder: Folder, tmp_path: Path) -> None:
    source = folder.write()
    path = folder.root / "annotations/LIVECell/livecell_coco_train.json"
    text = path.read_bytes()
    place = text.rindex(b'{"id": 2003')
    path.write_bytes(text[: place + 20])
    with pytest.raises(UserError, match=f"livecell_coco_train.json ends too early, at byte {place}; get"):
        prepare(source, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    told = prepare(source, str(tmp_path / "out"), PrepareConfig(truncated_json="keep_whole_records"))
    assert found_in(told, "truncated_json")[0]["ids"] == [2000]
    assert set(rows_of(tmp_path / "out", "train")) == {"A172_Phase_train_1.png"}


@pytest.mark.usefixtures("no_ray")
def test_file_names_do_not_lead_out_of_the_folder(folder: Folder, tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "secret.png"), pixels(99))
    names = ["../../secret.png", str(tmp_path / "secret.png"), "..\\secret.png", "c:\\secret.png", "~/secret.png"]
    for name in names:
        folder.entry("train", name)
    told = prepare(folder.write(), str(tmp_path / "out"))
    assert [one["file_name"] for one in found_in(told, "bad_record")] == names
    assert counts(told)["train"] == (2, 2 * N)


@pytest.mark.usefixtures("no_ray")
def test_another_dataset_is_not_overwritten(folder: Folder, tmp_path: Path) -> None:
    out = tmp_path / "out"
    source = folder.write()
    prepare(source, str(out))
    before = files_of(out)
    with pytest.raises(UserError, match="--overwrite"):
        prepare(source, str(out), PrepareConfig(leak="keep"))
    folder.image("train", "A172_Phase_more.png")
    folder.write()
    with pytest.raises(UserError, match="--overwrite"):
        prepare(source, str(out))
    with pytest.raises(UserError, match="--strict may stop half-way"):
        prepare(source, str(out), PrepareConfig(overwrite=True), strict=True)
    assert files_of(out) == before
    assert counts(prepare(source, str(out), PrepareConfig(overwrite=True, shard_images=1)))["train"] == (3, 3 * N)
    assert counts(prepare(source, str(out), PrepareConfig(overwrite=True)))["train"] == (3, 3 * N)
    assert set(files_of(out)) == set(before)


@pytest.mark.usefixtures("no_ray")
def test_a_lost_shard_is_drawn_again(folder: Folder, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(folder.write(), str(out))
    before = files_of(out)
    (out / "val" / "part-00000.parquet").unlink()
    prepare(folder.write(), str(out))
    assert files_of(out) == before


@pytest.mark.usefixtures("no_ray")
def test_mistakes_are_one_line(folder: Folder, tmp_path: Path) -> None:
    source = folder.write()
    for config, message in (
        (PrepareConfig(annotations={"train": "nothing.json"}), "no annotation file nothing.json"),
        (PrepareConfig(images="pictures"), "no image files"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(source, str(tmp_path / "out"), config)
    with pytest.raises(UserError, match="no folder at"):
        prepare(str(tmp_path / "nowhere"), str(tmp_path / "out"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no annotation JSON"):
        prepare(str(tmp_path / "empty"), str(tmp_path / "out"))


@pytest.mark.usefixtures("no_ray")
def test_large_images_make_smaller_shards(folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        folder.image("train", f"A172_Phase_{number}.png")
    monkeypatch.setattr(plan, "SHARD_PIXELS", 2 * HEIGHT * WIDTH + 5)
    told = prepare(folder.write(), str(tmp_path / "out"))
    assert [shard["rows"] for shard in told["splits"]["train"]["shards"]] == [2, 2, 1]


@pytest.mark.usefixtures("no_ray")
def test_what_cannot_be_written_is_one_line(folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match="Not a directory"):
        prepare(folder.write(), str(tmp_path / "file" / "out"))


@pytest.mark.ray
def test_a_mistake_found_in_a_task_is_a_user_error(ray_cluster: None) -> None:
    def changed(job: Json) -> Json:
        raise UserError(f"file {job['number']} changed; start again")

    with pytest.raises(UserError, match=r"^file 1 changed; start again$"):
        list(module._on_ray(changed, [{"number": 1}]))


@pytest.mark.usefixtures("no_ray")
def test_planted_defects_of_synthetic_data(tmp_path: Path) -> None:
    from raylivecell.synthetic import writer

    source = tmp_path / "source"
    writer.write_dataset(source, 24, seed=5, defects=True)
    planted = json.loads((source / "planted.json").read_text())["defects"]
    told = prepare(str(source), str(tmp_path / "out"))
    names = set()
    for one in planted:
        files = {one["file_name"], *(listed["file_name"] for listed in one["listed"])}
        names |= files
        (found,) = (found for found in found_in(told, one["defect"]) if found["file_name"] in files)
        images = {listed["image_id"] for listed in one["listed"]}
        assert set(found["ids"]) in (images, set(one["annotation_ids"]))
    assert {found["file_name"] for found in told["defects"]["found"]} <= names


KILLED_AT_EACH_WRITE = """
import json, os, signal, sys
from raylivecell.data import prepare as module
from raylivecell.runtime import session as runtime
from raylivecell.core import storage
from raylivecell.data.plan import PrepareConfig

source, out = sys.argv[1:]
runtime.connect = lambda: None
module._on_ray = lambda function, jobs: (function(json.loads(json.dumps(job))) for job in jobs)
real = {"replace": os.replace, "fsync": os.fsync, "delete": storage.delete}

def die_at(last):
    left = [last]
    def counted(name):
        def call(*arguments):
            left[0] -= 1
            if not left[0]: os.kill(os.getpid(), signal.SIGKILL)
            return real[name](*arguments)
        return call
    os.replace, os.fsync, storage.delete = counted("replace"), counted("fsync"), counted("delete")

for last in range(1, 1000):
    child = os.fork()
    if not child:
        die_at(last)
        try:
            module.prepare(source, out, PrepareConfig(shard_images=2))
        finally:
            os._exit(0)
    if os.waitpid(child, 0)[1] == 0: break
print(last)
"""


def test_killed_before_each_write_ends_with_the_same_bytes(folder: Folder, no_ray: None, tmp_path: Path) -> None:
    """Each run gets one write, rename or deletion further than the one before, and finds what that one left."""
    for number in range(6):
        folder.image("train", f"BV2_Phase_{number}.png")
    source, out = folder.write(), tmp_path / "out"
    prepare(source, str(tmp_path / "undisturbed"), PrepareConfig(shard_images=2))
    done = run_apart(KILLED_AT_EACH_WRITE, source, str(out))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 15
    assert files_of(out) == files_of(tmp_path / "undisturbed")


KILLED_WHILE_DRAWING = """
import os, signal, sys, threading, time
from pathlib import Path
from raylivecell.data.prepare import PrepareConfig, prepare

def watch():
    while len(list(Path(sys.argv[2]).glob(".prepare-*/*.json"))) < 2: time.sleep(0.002)
    os.kill(os.getpid(), signal.SIGKILL)

threading.Thread(target=watch, daemon=True).start()
prepare(sys.argv[1], sys.argv[2], PrepareConfig(shard_images=2))
"""


@pytest.mark.slow
@pytest.mark.ray
def test_killed_while_drawing_keeps_whole_shards(folder: Folder, ray_cluster: None, tmp_path: Path) -> None:
    for number in range(40):
        folder.image("train", f"BV2_Phase_{number}.png")
    source, out = folder.write(), tmp_path / "out"
    prepare(source, str(tmp_path / "undisturbed"), PrepareConfig(shard_images=2))
    done = run_apart(KILLED_WHILE_DRAWING, source, str(out), env=joined())
    assert done.returncode == -9, done.stderr
    assert not (out / "dataset.json").exists()
    accounts = [json.loads(path.read_text()) for path in out.glob(".prepare-*/*.json")]
    assert len(accounts) >= 2
    ages = {account["file"]: (out / account["file"]).stat().st_mtime_ns for account in accounts}
    (out / "train" / f".part-00000.parquet.{'ab' * 16}.partial").write_bytes(b"half")
    prepare(source, str(out), PrepareConfig(shard_images=2))
    assert files_of(out) == files_of(tmp_path / "undisturbed")
    assert {file: (out / file).stat().st_mtime_ns for file in ages} == ages


ON_S3 = """
import sys
from raylivecell.data.prepare import prepare
from raylivecell.data import shards
for _ in range(2):
    told = prepare(*sys.argv[1:])
print(shards.read_row(shards.list_rows(sys.argv[2], "test")[0], ["labels"])["labels"].max())
"""


@pytest.mark.slow
@pytest.mark.ray
def test_from_s3_to_s3(folder: Folder, ray_cluster: None, s3: S3, tmp_path: Path) -> None:
    source = folder.write()
    s3.upload(source, "source")
    done = run_apart(ON_S3, "s3://cells/source", "s3://cells/made/here", env=s3.env | joined(s3.env))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == str(N)
    written = ["dataset.json", *(f"{split}/part-00000.parquet" for split in sorted(shards.SPLITS))]
    assert s3.names("made/") == [f"made/here/{name}" for name in written]
    prepare(source, str(tmp_path / "local"))
    for name in written[1:]:
        assert s3.read(f"made/here/{name}") == (tmp_path / "local" / name).read_bytes()


def test_run_lengths_are_scaled_with_their_image() -> None:
    """The JSON says 8 x 4 pixels, the file has 16 x 12: each pixel of the mask becomes 2 x 3."""
    mask = np.random.default_rng(0).random((4, 8)) > 0.5
    values = mask.T.ravel()
    edges = np.flatnonzero(np.diff(values)) + 1
    runs = np.diff([0, *edges, values.size])
    record = coco.CellRecord(1, False, [], [((4, 8), np.array([0, *runs] if values[0] else runs))])
    cells, _, found = outlines.check_cells([record], (12, 16), (2.0, 3.0), defects.DefectRules())
    assert found == {}
    drawn = np.zeros((12, 16), bool)
    patch = cells[0]
    assert isinstance(patch, drawing.Patch)
    drawn[patch.top : patch.top + patch.mask.shape[0], patch.left : patch.left + patch.mask.shape[1]] = patch.mask
    np.testing.assert_array_equal(drawn, np.repeat(np.repeat(mask, 3, axis=0), 2, axis=1))
    found = outlines.check_cells([record], (12, 16), (1.0, 1.0), defects.DefectRules())[2]
    assert "degenerate_polygon" in found
