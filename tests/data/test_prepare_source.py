"""`prepare`: layouts of sources, formats of outlines, names of files."""

import hashlib
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from prepare_source import (
    HEIGHT,
    WIDTH,
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

from raylivecell.annotations import drawing
from raylivecell.core.errors import UserError
from raylivecell.data import plan, shards
from raylivecell.data.config import PrepareConfig
from raylivecell.data.prepare import prepare

pytest_plugins = ["prepare_fixtures"]


@pytest.mark.ray
def test_real_livecell(livecell_mini: Path, ray_cluster: None, tmp_path: Path) -> None:
    description = prepare(str(livecell_mini), str(tmp_path / "out"))
    assert counts(description) == {"train": (9, 2068), "val": (2, 327), "test": (3, 869)}
    assert description["defects"]["counts"] == {"unlisted_file": 6}
    assert description["licence"] == "CC BY-NC 4.0"
    assert "Nature Methods" in description["citation"]
    assert set(description["cell_types"]) == {"MCF7", "BT474", "Huh7", "SkBr3", "SHSY5Y", "A172", "SKOV3"}
    assert description == shards.load_description(str(tmp_path / "out"))
    train = rows_of(tmp_path / "out", "train")
    values = np.concatenate([row["image"].ravel() for row in train.values()]).astype(float)
    assert description["grey_levels"]["mean"] == pytest.approx(values.mean(), abs=1e-3)
    assert description["grey_levels"]["std"] == pytest.approx(values.std(), abs=1e-3)
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
    assert description["cell_types"]["MCF7"]["cell_area_px"]["p50"] == np.percentile(areas, 50, method="inverted_cdf")
    before = files_of(tmp_path / "out")
    assert set(before) == {"dataset.json", *(f"{split}/part-00000.parquet" for split in shards.SPLITS)}
    assert prepare(str(livecell_mini), str(tmp_path / "out")) == description
    assert files_of(tmp_path / "out") == before


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
    nested = prepare(str(copy), str(tmp_path / "nested"))
    assert counts(flat) == counts(nested)
    for split in shards.SPLITS:
        ours, theirs = rows_of(tmp_path / "flat", split), rows_of(tmp_path / "nested", split)
        assert list(ours) == list(theirs)
        for name in ours:
            np.testing.assert_array_equal(ours[name]["foreground"], theirs[name]["foreground"])
            np.testing.assert_array_equal(masks_of(ours[name]).any(axis=0), ours[name]["foreground"] != 0)
            assert sorted(ours[name]["outlines"]) == sorted(theirs[name]["outlines"])
            assert theirs[name]["source"].split("/")[-2] == theirs[name]["cell_type"]


@pytest.mark.usefixtures("no_ray")
def test_single_cell_type_and_size_split_files(folder: SourceFolder, tmp_path: Path) -> None:
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
    selected = prepare(
        str(source),
        str(tmp_path / "selected"),
        PrepareConfig(
            annotations={
                "train": "annotations/LIVECell_dataset_size_split/0_train2percent.json",
                "test": "annotations/LIVECell_single_cells/*/test.json",
            }
        ),
    )
    assert counts(selected) == {"train": (1, N), "val": (0, 0), "test": (2, 2 * N)}
    # Each single-type file also contains annotations of images that it does not list.
    assert {defect["detail"] for defect in defects_of(selected, "orphan_annotation")} == {
        f"{N} annotations of images not listed"
    }
    shutil.rmtree(base)
    with pytest.raises(UserError, match="choose with --annotations train"):
        prepare(str(source), str(tmp_path / "several"))


@pytest.mark.usefixtures("no_ray")
def test_coco_dataset_with_images_of_any_size(tmp_path: Path) -> None:
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
    description = prepare(str(source), str(tmp_path / "out"))
    assert description["defects"]["found"] == []
    assert description["licence"] == "CC0"
    assert description["cell_types"]["neuron"]["images"] == {"train": 1, "val": 1, "test": 1}
    (row,) = rows_of(tmp_path / "out", "test").values()
    assert row["image"].shape == (300, 31)
    # Two polygons of one record are one cell.
    assert (row["cells"], int(row["foreground"].sum())) == (1, 72)


@pytest.mark.usefixtures("no_ray")
def test_only_chosen_categories_are_cells(
    folder: SourceFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for data in folder.splits.values():
        data["categories"] = [{"id": 1, "name": "cell"}, {"id": 2, "name": "scale bar"}]
        data["annotations"][0]["category_id"] = 2
    description = prepare(folder.write(), str(tmp_path / "all"))
    assert counts(description)["train"] == (2, 2 * N)
    assert f"2 categories are used as cells: cell ({6 * N - 3}), scale bar (3)" in capsys.readouterr().err
    description = prepare(folder.write(), str(tmp_path / "cells"), PrepareConfig(categories=("cell",)))
    assert counts(description)["train"] == (2, 2 * N - 1)
    assert "warning" not in capsys.readouterr().err
    chosen = [(c["name"], c["images"], c["annotations"], c["chosen"]) for c in description["categories"]]
    assert chosen == [("cell", 6, 6 * N - 3, True), ("scale bar", 3, 3, False)]
    assert description["source"]["categories"] == ["cell"]


@pytest.mark.usefixtures("no_ray")
def test_paths_of_another_computer_select_among_the_files(folder: SourceFolder, tmp_path: Path) -> None:
    """Results are named after the file, so that a name in the JSON cannot lead out of the folder."""
    names = ["..\\..\\upload\\A172_Phase_train_1.png", "https://host.org/b/A172_Phase_train_2.png?x=1"]
    for image, name in zip(folder.splits["train"]["images"], names):
        image["file_name"] = name
    prepare(folder.write(), str(tmp_path / "out"))
    rows = rows_of(tmp_path / "out", "train")
    assert set(rows) == {f"livecell_train_val_images/A172_Phase_train_{number}.png" for number in (1, 2)}


@pytest.mark.usefixtures("no_ray")
def test_cells_of_images_that_share_an_id_are_dropped(folder: SourceFolder, tmp_path: Path) -> None:
    first, second = folder.splits["train"]["images"]
    second["id"] = first["id"]
    folder.image("train", "A172_Phase_good.png")
    description = prepare(folder.write(), str(tmp_path / "out"))
    assert list(rows_of(tmp_path / "out", "train")) == ["A172_Phase_good.png"]
    assert "one id for 2 images" in defects_of(description, "bad_record")[0]["detail"]


@pytest.mark.usefixtures("no_ray")
def test_file_names_that_lead_out_of_the_folder_are_bad_records(folder: SourceFolder, tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "secret.png"), pixels(99))
    names = ["../../secret.png", str(tmp_path / "secret.png"), "..\\secret.png", "c:\\secret.png", "~/secret.png"]
    for name in names:
        folder.entry("train", name)
    description = prepare(folder.write(), str(tmp_path / "out"))
    assert [defect["file_name"] for defect in defects_of(description, "bad_record")] == names
    assert counts(description)["train"] == (2, 2 * N)


@pytest.mark.usefixtures("no_ray")
def test_user_errors_are_reported_in_one_line(folder: SourceFolder, tmp_path: Path) -> None:
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
def test_large_images_make_smaller_shards(
    folder: SourceFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        folder.image("train", f"A172_Phase_{number}.png")
    monkeypatch.setattr(plan, "SHARD_PIXELS", 2 * HEIGHT * WIDTH + 5)
    description = prepare(folder.write(), str(tmp_path / "out"))
    assert [shard["rows"] for shard in description["splits"]["train"]["shards"]] == [2, 2, 1]
