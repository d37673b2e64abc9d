"""`prepare`: every kind of defect and its rules."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prepare_source import (
    HEIGHT,
    SQUARES,
    WIDTH,
    Json,
    N,
    SourceFolder,
    counts,
    defects_of,
    files_of,
    masks_of,
    pixels,
    rows_of,
    square,
)
from pycocotools import mask as coco_mask

from raylivecell.annotations import coco
from raylivecell.cli.main import main
from raylivecell.core.errors import UserError
from raylivecell.data import defects, draw, shards, sources
from raylivecell.data import prepare as prepare_module
from raylivecell.data.cell_defects import covered
from raylivecell.data.config import DEFECT_KINDS, PrepareConfig
from raylivecell.data.prepare import prepare

pytest_plugins = ["prepare_fixtures"]


def test_visible_pixels_separate_complete_from_few_annotations_on_real_images(livecell_mini: Path) -> None:
    """LIVECell issue 21: images with only 1 to 10 of hundreds of cells annotated."""
    source = sources.read_source(str(livecell_mini), PrepareConfig())
    for entry in source.entries:
        visible = draw.examine(str(livecell_mini / str(entry.path))).visible
        cells = coco.decode_cells(source.encoded_cells(entry))
        assert covered(cells) > 1.5 * defects.FEW_COVERAGE * visible
        assert covered(cells[: len(cells) // 20]) < defects.FEW_COVERAGE * visible


def with_every_defect(folder: SourceFolder) -> dict[str, list[Any]]:
    """Plant each defect once; return defect -> [file name, ids]."""
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
def test_every_defect_is_reported_and_handled_by_its_rule(folder: SourceFolder, tmp_path: Path) -> None:
    planted = with_every_defect(folder)
    description = prepare(folder.write(), str(tmp_path / "out"))
    reported = {d["defect"]: [d["file_name"], d["ids"]] for d in description["defects"]["found"]}
    assert reported == planted
    assert description["defects"]["counts"] == dict.fromkeys(sorted(planted), 1)
    train, val, test = (rows_of(tmp_path / "out", split) for split in shards.SPLITS)
    assert len(train) == 2 + 3
    assert train["A172_Phase_train_1.png"]["cells"] == N
    np.testing.assert_array_equal(train["A172_Phase_colour_image.png"]["image"], pixels(60))
    np.testing.assert_array_equal(train["A172_Phase_sixteen_bit_image.png"]["image"], pixels(61))
    assert "A172_Phase_both.png" not in train
    # The squares, the cell clipped at the edge, and the cell on top of a larger one.
    labels = train["A172_Phase_cells.png"]["labels"]
    assert train["A172_Phase_cells.png"]["cells"] == N + 2
    assert np.bincount(labels.ravel())[1:].tolist() == [36, 36, 36, 32, 36, 36, 18, 4]
    assert set(val) == {"A172_Phase_val_1.png", "A172_Phase_val_2.png"}
    assert set(test) == {"A172_Phase_test_1.png", "A172_Phase_test_2.png", "A172_Phase_leak.png"}


@pytest.mark.usefixtures("no_ray")
def test_non_default_rules(folder: SourceFolder, tmp_path: Path) -> None:
    planted = with_every_defect(folder)
    config = PrepareConfig(
        on_defect={
            "duplicate_entry": "keep_first",
            "ambiguous_file": "take_first",
            "colour_image": "drop",
            "sixteen_bit_image": "drop",
            "wrong_size": "scale",
            "no_annotations": "keep",
            "few_annotations": "keep",
            "leak": "keep",
            "identical_pixels": "keep",
            "doubled_contour": "keep",
            "out_of_bounds": "drop",
            "crowd_region": "keep",
        }
    )
    description = prepare(folder.write(), str(tmp_path / "out"), config)
    assert set(description["defects"]["counts"]) == set(planted)
    train, val, _ = (rows_of(tmp_path / "out", split) for split in shards.SPLITS)
    names = {"train_1", "train_2", "none", "few", "again", "cells", "both"}
    assert set(train) == {f"A172_Phase_{name}.png" for name in names}
    assert not train["A172_Phase_none.png"]["foreground"].any()
    assert train["A172_Phase_both.png"]["source"].endswith("/x/A172_Phase_both.png")
    # The doubled contour is kept, but all its pixels belong to the other cell.
    assert defects_of(description, "hidden_cell")[0]["ids"] == planted["doubled_contour"][1]
    assert train["A172_Phase_cells.png"]["cells"] == N + 2
    assert set(val) == {f"A172_Phase_{name}.png" for name in ("val_1", "val_2", "val_1_copy", "size")}
    # 32 pixels wide in the JSON, 64 in the file: scaled by 2; the two cells that are then outside are dropped.
    assert val["A172_Phase_size.png"]["foreground"].sum() == 2 * 36 * (N - 2)


@pytest.mark.usefixtures("no_ray")
def test_strict_lists_defects_and_writes_nothing(
    folder: SourceFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
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
    """Convert a cell to CVAT's format for brush masks: an RLE of the entire image, iscrowd 1."""
    (rle,) = coco_mask.frPyObjects([cell["segmentation"][0]], HEIGHT, WIDTH)
    cell |= {"iscrowd": 1, "segmentation": {"size": [HEIGHT, WIDTH], "counts": rle["counts"].decode()}}


@pytest.mark.usefixtures("no_ray")
def test_many_crowds_need_an_explicit_rule(folder: SourceFolder, tmp_path: Path) -> None:
    cells = folder.splits["train"]["annotations"]
    as_brush(cells[0])
    description = prepare(folder.write(), str(tmp_path / "few"))
    assert counts(description)["train"] == (2, 2 * N - 1)
    assert defects_of(description, "crowd_region")[0]["rule"] == "ignore"
    for cell in cells[1:3]:
        as_brush(cell)
    with pytest.raises(UserError, match=f"3 of {2 * N} annotations .*--on-defect crowd_region=keep"):
        prepare(folder.write(), str(tmp_path / "most"))
    kept_crowds = prepare(folder.write(), str(tmp_path / "kept"), PrepareConfig(on_defect={"crowd_region": "keep"}))
    dropped = prepare(folder.write(), str(tmp_path / "dropped"), PrepareConfig(on_defect={"crowd_region": "drop"}))
    assert (counts(kept_crowds)["train"], counts(dropped)["train"]) == ((2, 2 * N), (2, 2 * N - 3))


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ({"image": {"file_name": "gone.png"}}, "missing_file 1: gone.png"),
        ({"image": {"width": 5}}, "wrong_size 2"),
        ({"cell": {"segmentation": None}}, "bad_record 1"),
        ({"cell": {"segmentation": [[1, 1, 2, 2]]}}, "degenerate_polygon 2"),
        ({"cell": {"iscrowd": 1}}, "crowd_region 2"),
    ],
)
def test_a_split_without_usable_images_is_an_error_with_the_reason(
    split: str, damage: Json, reason: str, folder: SourceFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = folder.splits[split]
    for image in data["images"]:
        image |= damage.get("image", {})
    for cell in data["annotations"]:
        cell |= damage.get("cell", {})
    with pytest.raises(UserError, match=f"no image of {split} can be used: .*{reason}.* the table above"):
        prepare(folder.write(), str(tmp_path / "out"), PrepareConfig(on_defect={"crowd_region": "drop"}))
    table = capsys.readouterr().err
    assert reason.split()[0] in table.split("Defects")[1]
    assert files_of(tmp_path / "out") == {}


@pytest.mark.usefixtures("no_ray")
def test_a_dataset_without_cells_is_an_error(folder: SourceFolder, tmp_path: Path) -> None:
    folder.splits["test"]["annotations"] = []
    assert counts(prepare(folder.write(), str(tmp_path / "out")))["test"] == (2, 0)
    folder.splits["train"]["annotations"] = folder.splits["val"]["annotations"] = []
    for config in (PrepareConfig(), PrepareConfig(on_defect={"no_annotations": "keep"})):
        with pytest.raises(UserError, match=r"no_annotations \d: A172.* see the table above"):
            prepare(folder.write(), str(tmp_path / "none"), config)
    for data in folder.splits.values():
        data["images"] = []
    with pytest.raises(UserError, match="list no images"):
        prepare(folder.write(), str(tmp_path / "none"))


@pytest.mark.usefixtures("no_ray")
def test_the_test_split_keeps_published_images(
    folder: SourceFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images and cells that rules drop from train are kept in test, and reported."""
    for split in ("train", "test"):
        place = "livecell_test_images" if split == "test" else "livecell_train_val_images"
        folder.image(split, f"A172_Phase_{split}_few.png", [square(5, 5, 3)])
        folder.image(split, f"A172_Phase_{split}_none.png", [])
        folder.image(split, f"A172_Phase_{split}_twice.png", [*SQUARES, [v + 0.2 for v in SQUARES[0]]])
        inner = [square(4, 4, 12), square(4, 4, 6), square(10, 4, 6), square(4, 10, 6), square(10, 10, 6)]
        folder.image(split, f"A172_Phase_{split}_hidden.png", [*inner, square(200, 200)])
        folder.file(f"A172_Phase_{split}_copy.png", pixels(folder.number - 1), place)
        folder.entry(split, f"A172_Phase_{split}_copy.png", inner)
    description = prepare(folder.write(), str(tmp_path / "out"))
    assert counts(description) == {"train": (4, 3 * N + 4), "val": (2, 2 * N), "test": (7, 3 * N + 1 + 1 + 5 + 5)}
    assert description["splits"]["test"]["listed"] == {"images": 7, "cells": 3 * N + 1 + 1 + 6 + 5}
    rules = {(d["defect"], d["split"]): d["rule"] for d in description["defects"]["found"]}
    names = ("few_annotations", "no_annotations", "identical_pixels", "doubled_contour")
    assert [rules[name, "test"] for name in names] == ["keep"] * 4
    assert [rules[name, "train"] for name in names] == ["drop", "drop", "keep_most_cells", "keep_first"]
    assert f"test: 7 of 7 images and {3 * N + 12} of {3 * N + 13} cells" in capsys.readouterr().err
    row = rows_of(tmp_path / "out", "test")["A172_Phase_test_hidden.png"]
    np.testing.assert_array_equal(masks_of(row).sum(axis=(1, 2)), [144, 36, 36, 36, 36])
    for label in np.unique(row["labels"])[1:]:
        assert masks_of(row)[label - 1][row["labels"] == label].all()


@pytest.mark.usefixtures("no_ray")
def test_rules_that_refuse_the_dataset(folder: SourceFolder, tmp_path: Path) -> None:
    folder.entry("train", "A172_Phase_gone.png")
    source = folder.write()
    assert prepare(source, str(tmp_path / "out"))["defects"]["counts"] == {"missing_file": 1}
    with pytest.raises(UserError, match="missing_file 1: A172_Phase_gone"):
        prepare(source, str(tmp_path / "other"), PrepareConfig(on_defect={"missing_file": "refuse"}))


@pytest.mark.usefixtures("no_ray")
def test_truncated_json(folder: SourceFolder, tmp_path: Path) -> None:
    source = folder.write()
    path = folder.root / "annotations/LIVECell/livecell_coco_train.json"
    text = path.read_bytes()
    place = text.rindex(b'{"id": 2003')
    path.write_bytes(text[: place + 20])
    with pytest.raises(UserError, match=f"livecell_coco_train.json ends too early, at byte {place}; fetch"):
        prepare(source, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    description = prepare(
        source, str(tmp_path / "out"), PrepareConfig(on_defect={"truncated_json": "keep_complete_records"})
    )
    assert defects_of(description, "truncated_json")[0]["ids"] == [2000]
    assert set(rows_of(tmp_path / "out", "train")) == {"A172_Phase_train_1.png"}


@pytest.mark.usefixtures("no_ray")
def test_planted_defects_of_synthetic_data(tmp_path: Path) -> None:
    from raylivecell.synthetic import writer

    source = tmp_path / "source"
    writer.write_dataset(source, 24, seed=5, defects=True)
    planted = json.loads((source / "planted.json").read_text())["defects"]
    description = prepare(str(source), str(tmp_path / "out"))
    names = set()
    for defect in planted:
        files = {defect["file_name"], *(entry["file_name"] for entry in defect["listed"])}
        names |= files
        (report,) = (d for d in defects_of(description, defect["defect"]) if d["file_name"] in files)
        images = {entry["image_id"] for entry in defect["listed"]}
        assert set(report["ids"]) in (images, set(defect["annotation_ids"]))
    assert {d["file_name"] for d in description["defects"]["found"]} <= names


@pytest.mark.parametrize(
    ("on_defect", "message"),
    [
        ({"missing_fil": "drop"}, r"unknown kind 'missing_fil'; did you mean missing_file=drop\|refuse\?"),
        ({"leak": "keeep"}, r"unknown rule leak=keeep; did you mean keep\? Rules: keep_test_first, keep"),
        ({"leak": ""}, "leak needs a rule: leak=RULE, one of keep_test_first, keep"),
        ({"hidden_cell": "drop"}, "unknown kind 'hidden_cell'"),
    ],
)
def test_an_unknown_kind_or_rule_is_refused_with_the_nearest_one(on_defect: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrepareConfig(on_defect=on_defect)


def test_on_defect_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    configs: list[PrepareConfig] = []
    monkeypatch.setattr(prepare_module, "prepare", lambda source, out, config, *_: configs.append(config))
    command = ["prepare", "--on-defect", "leak=keep", "missing_file=refuse", "--source", "in", "--out", "out"]
    assert main([*command, "--on-defect=wrong_size=scale"]) == 0
    assert configs[0].on_defect == {"leak": "keep", "missing_file": "refuse", "wrong_size": "scale"}
    assert main([*command, "--on-defect", "wrong_size=scal"]) == 2
    assert capsys.readouterr().err.startswith("raylivecell: --on-defect: unknown rule wrong_size=scal; did you mean")
    with pytest.raises(SystemExit):
        main(["prepare", "--help"])
    help_text = capsys.readouterr().out
    for name, kind in DEFECT_KINDS.items():
        assert (f"{name}={kind.rules[0]} (default)" in help_text) == (len(kind.rules) > 1)


@pytest.mark.parametrize(("rule", "few"), [("scale", []), ("keep", ["a.png"])])
def test_covered_pixels_are_those_of_the_file(rule: str, few: list[str]) -> None:
    """A label image of a quarter of the pixels: its 100 pixels are 400 of the file, 40 % of 1,000."""
    entries = [
        defects.Entry("train", name, coco.ImageEntry(name, name, 40, 40), name, cells, "cells")
        for name, cells in (("a.png", 1), ("b.png", 20), ("c.png", 20))
    ]
    infos = {name: defects.ImageInfo("", name, name, 80, 80, visible=1000) for name in ("a.png", "b.png", "c.png")}
    _, image_defects = defects.apply_rules(entries, infos, lambda _: 100.0, {"wrong_size": rule})
    assert [defect.file_name for defect in image_defects if defect.defect == "few_annotations"] == few
