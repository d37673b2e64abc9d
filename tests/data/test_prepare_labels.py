"""`prepare` with label images and masks of single cells: pixels, defects, provenance."""

import io
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from conftest import SHARED
from PIL import Image
from prepare_source import HEIGHT, WIDTH, Json, counts, defects_of, files_of, masks_of, pixels, rows_of
from roifile import ImagejRoi

from raylivecell.annotations import geojson, imagej_rois
from raylivecell.core.errors import UserError
from raylivecell.data import shards
from raylivecell.data.config import PrepareConfig
from raylivecell.data.prepare import prepare

pytest_plugins = ["prepare_fixtures"]

CELLS = np.zeros((HEIGHT, WIDTH), np.int64)
"""A cell with a hole at a corner, a cell of one pixel, neighbours that touch, a large value."""
CELLS[:9, :9] = 3
CELLS[3:6, 3:6] = 0
CELLS[20, 30] = 9
CELLS[30:40, 10:20] = 200
CELLS[30:40, 20:33] = 70_000
CELLS[-5:, -7:] = 5


def write(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, values)
    elif path.suffix == ".tif":
        tifffile.imwrite(path, values)
    else:
        assert cv2.imwrite(str(path), values)


def write_images(folder: Path, *names: str) -> None:
    for seed, name in enumerate(names):
        write(folder / name, pixels(seed, [[0, 0, 20, 20], [10, 30, 40, 40]]))


def assert_same_cells(row: Json, labels: np.ndarray) -> None:
    """Assert that the labels of a row equal `labels` up to renumbering, and its outlines too."""
    values = np.unique(labels[labels > 0])
    expected = np.where(labels > 0, np.searchsorted(values, labels) + 1, 0)
    np.testing.assert_array_equal(row["labels"], expected)
    masks = np.array([labels == value for value in values], bool).reshape(-1, *labels.shape)
    np.testing.assert_array_equal(masks_of(row), masks)


def no_output(out: Path) -> bool:
    return not any(path.is_file() for path in out.rglob("*")) if out.exists() else True


@pytest.mark.usefixtures("no_ray")
def test_label_images_of_every_type_are_exact(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    names = [f"{split}/images/A172_Phase_{split}_{n}.tif" for split in ("train", "valid", "test") for n in (1, 2)]
    write_images(source, *names, "test/images/without.tif")
    small = np.where(CELLS == 70_000, 255, CELLS)
    masks = {
        "train/masks/A172_Phase_train_1.tif": CELLS.astype(np.int32),
        "train/masks/A172_Phase_train_2_mask.npy": CELLS,
        "valid/masks/A172_Phase_valid_1.png": small.astype(np.uint8),
        "valid/images/A172_Phase_valid_2_cp_masks.png": (small * 200).astype(np.uint16),
        "test/masks/A172_Phase_test_1.tif": CELLS.astype(np.float64),
        "test/masks/A172_Phase_test_2.tif": np.zeros_like(small, np.uint8),
        "test/masks/other.tif": small.astype(np.uint8),
    }
    for name, labels in masks.items():
        write(source / name, labels)
    description = prepare(str(source), str(out))
    assert counts(description) == {"train": (2, 10), "val": (2, 10), "test": (2, 5)}
    rows = {name: row for split in shards.SPLITS for name, row in rows_of(out, split).items()}
    for (_, labels), name in zip(masks.items(), names):
        row = rows[name.replace("images/", "")]
        assert_same_cells(row, labels)
        assert (row["source"], row["cell_type"]) == (name, "A172")
    names_by_kind = {
        kind: [defect["file_name"] for defect in defects_of(description, kind)]
        for kind in ("unpaired_file", "float_labels", "no_annotations")
    }
    assert names_by_kind == {
        "unpaired_file": ["test/images/without.tif", "test/masks/other.tif"],
        "float_labels": ["test/A172_Phase_test_1.tif"],
        "no_annotations": ["test/A172_Phase_test_2.tif"],
    }
    files = description["source"]["files"]
    assert [(file["split"], file["format"], file["files"], file["cells"]) for file in files] == [
        ("train", "labels", 2, 10),
        ("val", "labels", 2, 10),
        ("test", "labels", 2, 5),
    ]
    before = files_of(out)
    assert prepare(str(source), str(out)) == description
    again = prepare(str(source), str(tmp_path / "again"))
    assert files_of(tmp_path / "again") == before
    assert again == description
    # The fingerprint covers the annotation files, also if no pixel of a label changes.
    tifffile.imwrite(source / "train/masks/A172_Phase_train_1.tif", CELLS.astype(np.int32), compression="zlib")
    with pytest.raises(UserError, match="changed since the dataset"):
        prepare(str(source), str(out))
    assert files_of(out) == before


@pytest.mark.usefixtures("no_ray")
def test_one_mask_per_cell(tmp_path: Path) -> None:
    """The layout of the Data Science Bowl 2018."""
    for name in ("0ab", "1cd"):
        write_images(tmp_path / "source", f"stage1_train/{name}/images/{name}.png")
        for value in np.unique(CELLS)[1:]:
            path = tmp_path / "source" / "stage1_train" / name / "masks" / f"cell{value:05d}.png"
            write(path, np.where(value == CELLS, 255, 0).astype(np.uint8))
    write(tmp_path / "source/stage1_train/1cd/masks/cell00009.png", np.full((HEIGHT, WIDTH + 1), 255, np.uint8))
    config = PrepareConfig(cell_type="nuclei", name="Bowl", licence="CC0-1.0")
    description = prepare(str(tmp_path / "source"), str(tmp_path / "out"), config)
    (row,) = rows_of(tmp_path / "out", "train").values()
    assert_same_cells(row, CELLS)
    assert (row["cell_type"], row["file_name"]) == ("nuclei", "stage1_train/0ab/0ab.png")
    (defect,) = defects_of(description, "unreadable_annotation")
    assert "masks of different sizes, 64 x 48 and 65 x 48" in defect["detail"]
    assert description["source"]["cell_type"] == "nuclei"
    legal = [shards.provenance(str(tmp_path / "out"))[name] for name in ("name", "licence", "citation")]
    assert legal == ["Bowl", "CC0-1.0", "not stated"]
    assert prepare(str(tmp_path / "source"), str(tmp_path / "out"), config) == description
    with pytest.raises(UserError, match="other settings"):  # a licence is not replaced without a word
        prepare(str(tmp_path / "source"), str(tmp_path / "out"), config.model_copy(update={"licence": "CC-BY-4.0"}))


@pytest.mark.usefixtures("no_ray")
def test_defects_of_label_images_follow_rules(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_images(source, *(f"images/{name}.tif" for name in ("cells", "binary", "pieces", "large", "colour")))
    write(source / "masks/cells.png", np.where(CELLS == 70_000, 1, CELLS).astype(np.uint8))
    write(source / "masks/binary.png", np.where(CELLS > 0, 255, 0).astype(np.uint8))
    pieces = np.where(CELLS == 9, 3, CELLS).astype(np.int32)
    write(source / "masks/pieces.tif", pieces)
    large = np.kron(CELLS, np.ones((2, 2), int)).astype(np.int32)
    write(source / "masks/large.tif", large)
    write(source / "masks/colour.png", np.stack([CELLS.astype(np.uint8)] * 3, axis=2))
    with pytest.raises(UserError, match=r"1 defect \(binary_mask 1: binary\.tif\); fix them, or change the rule"):
        prepare(str(source), str(tmp_path / "out"))
    assert no_output(tmp_path / "out")

    def run(**rules: str) -> tuple[Json, dict[str, Json]]:
        out = tmp_path / "-".join(["out", *rules.values()])
        description = prepare(str(source), str(out), PrepareConfig(on_defect=rules))
        return description, rows_of(out, "train")

    description, rows = run(binary_mask="components", label_in_pieces="split", wrong_size="scale")
    assert set(rows) == {"cells.tif", "binary.tif", "pieces.tif", "large.tif"}
    assert rows["binary.tif"]["cells"] == 4  # two cells that touch are one component
    np.testing.assert_array_equal(rows["binary.tif"]["labels"] > 0, CELLS > 0)
    assert rows["pieces.tif"]["cells"] == 5
    assert_same_cells(rows["large.tif"], CELLS)
    assert defects_of(description, "label_in_pieces")[0]["ids"] == [3]
    assert "the file is 64 x 48, masks/large.tif has 128 x 96" in defects_of(description, "wrong_size")[0]["detail"]
    assert "a colour image (RGB)" in defects_of(description, "unreadable_annotation")[0]["detail"]
    description, rows = run(binary_mask="drop", label_in_pieces="largest")
    assert set(rows) == {"cells.tif", "pieces.tif"}
    assert_same_cells(rows["pieces.tif"], np.where(CELLS == 9, 0, CELLS))
    _, rows = run(binary_mask="one_cell")
    assert_same_cells(rows["pieces.tif"], pieces)
    assert_same_cells(rows["binary.tif"], (CELLS > 0).astype(int))
    with pytest.raises(UserError, match="wrong_size=keep cannot place its cells"):
        run(binary_mask="drop", wrong_size="keep")
    with pytest.raises(UserError, match="unreadable_annotation 1: colour"):
        run(binary_mask="drop", unreadable_annotation="refuse")


@pytest.mark.usefixtures("no_ray")
def test_messages_for_sources_without_usable_annotations(tmp_path: Path) -> None:
    source, out = tmp_path / "source", str(tmp_path / "out")
    write_images(source, "a.tif", "b.tif")
    masks = np.array({"masks": CELLS, "outlines": CELLS}, dtype=object)
    np.save(source / "a_seg.npy", masks, allow_pickle=True)
    with pytest.raises(UserError, match=r"a_seg\.npy: a pickled Python object.*File > Save Masks as PNG/tif"):
        prepare(str(source), out)
    (source / "a_seg.npy").unlink()
    (source / "masks").mkdir()
    write(source / "masks/c.png", CELLS.astype(np.uint8))
    with pytest.raises(
        UserError, match=r"no pair of image .*: 2 images and 1 annotation files \(a\.tif, b\.tif, masks/c"
    ):
        prepare(str(source), out)
    for config in (
        PrepareConfig(format="labels", categories=("cell",)),
        PrepareConfig(format="labels", annotations={"train": "a"}),
    ):
        with pytest.raises(UserError, match="is for COCO files"):
            prepare(str(source), out, config)
    # LabelMe: one JSON per image.
    shutil.rmtree(source / "masks")
    shape = {"label": "cell", "points": [[1, 1], [9, 1], [9, 9]], "shape_type": "polygon"}
    for name in ("a", "b"):
        (source / f"{name}.json").write_text(
            json.dumps({"version": "5.0", "shapes": [shape], "imagePath": f"{name}.tif"})
        )
    with pytest.raises(
        UserError, match="one JSON per image, as LabelMe and others write, is not supported: export COCO"
    ):
        prepare(str(source), out)
    (source / "images").mkdir()
    write_images(source, "images/c.tif", "images/c.png")
    write(source / "masks/c.png", CELLS.astype(np.uint8))
    with pytest.raises(
        UserError, match=r"1 defect \(ambiguous_file 1: images/c\.png, images/c\.tif, masks/c\.png\); leave one"
    ):
        prepare(str(source), out, PrepareConfig(format="labels"))
    assert no_output(tmp_path / "out")


@pytest.mark.usefixtures("no_ray")
def test_background_stored_as_a_label(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source"
    write_images(source, "images/a.tif", "images/b.tif")
    labels = np.where(CELLS == 70_000, 1, CELLS).astype(np.uint8)
    write(source / "masks/a.png", np.where(labels == 0, 255, labels).astype(np.uint8))
    write(source / "masks/b.png", labels)
    percent = round(100 * np.mean(labels == 0))
    with pytest.raises(
        UserError, match=rf"background_label 1: a\.tif.*masks/a\.png: label 255 covers {percent} % of the image"
    ):
        prepare(str(source), str(tmp_path / "out"))
    assert no_output(tmp_path / "out")
    config = PrepareConfig(on_defect={"background_label": "background"})
    description = prepare(str(source), str(tmp_path / "out"), config)
    for row in rows_of(tmp_path / "out", "train").values():
        assert_same_cells(row, labels)
    assert defects_of(description, "background_label")[0]["ids"] == [255]
    assert "no such label in 1 of 2 images (b.tif): all their labels are cells" in capsys.readouterr().err
    prepare(str(source), str(tmp_path / "drop"), PrepareConfig(on_defect={"background_label": "drop"}))
    assert set(rows_of(tmp_path / "drop", "train")) == {"b.tif"}


@pytest.mark.usefixtures("no_ray")
def test_a_label_image_that_changes_during_the_run_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from raylivecell.data import paired_source

    write_images(tmp_path / "source", "images/a.png")
    write(tmp_path / "source/masks/a.tif", CELLS.astype(np.int32))
    complete = paired_source.PairedSource.complete

    def change(*arguments: Any) -> None:
        complete(*arguments)
        write(tmp_path / "source/masks/a.tif", CELLS.astype(np.int32) + 1)

    monkeypatch.setattr(paired_source.PairedSource, "complete", change)
    with pytest.raises(UserError, match=r"masks/a\.tif changed while it was being prepared"):
        prepare(str(tmp_path / "source"), str(tmp_path / "out"))


@pytest.mark.ray
def test_real_label_images(ray_cluster: None, tmp_path: Path) -> None:
    """Labels in the shards equal the label images up to renumbering; images are 16-bit."""
    source = SHARED / "usiigaci-mini"
    if not source.is_dir():
        pytest.skip(f"no real label images at {source}: set RAYLIVECELL_SHARED")
    with pytest.raises(UserError, match=r"labels \(10 images\) and rois \(10 images\)"):
        prepare(str(source), str(tmp_path / "out"))
    description = prepare(str(source), str(tmp_path / "out"), PrepareConfig(format="labels", cell_type="3T3"))
    rows = rows_of(tmp_path / "out", "train")
    assert counts(description)["train"] == (10, 645)
    for name, row in rows.items():
        assert_same_cells(row, np.asarray(Image.open(source / "masks" / name.replace(".tif", ".png"))))
    assert set(description["defects"]["counts"]) == {"sixteen_bit_image", "label_in_pieces"}
    assert set(description["cell_types"]) == {"3T3"}


@pytest.mark.usefixtures("no_ray")
def test_split_by_group(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source"
    names = [f"A172_Phase_{well}_1_00d0{hour}h00m_1" for well in ("A1", "A2", "B1", "B2") for hour in (0, 4)]
    write_images(source, *(f"images/{name}.tif" for name in names), "test/images/A172_Phase_A1_1_00d08h00m_1.tif")
    for path in source.rglob("*.tif"):
        mask = path.parent.parent / "masks" / f"{path.stem}.png"
        write(mask, np.where(CELLS == 70_000, 1, CELLS).astype(np.uint8))
    all_in_train = prepare(str(source), str(tmp_path / "plain"))
    assert [images for images, _ in counts(all_in_train).values()] == [8, 0, 1]
    assert "8 images are in no folder named after a split: they are in train; move them" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"has splits \(test/images/A172_Phase_A1_1_00d08h00m_1\.tif\): leave out"):
        prepare(str(source), str(tmp_path / "none"), PrepareConfig(split=(0.5, 0.25, 0.25)))
    shutil.rmtree(source / "test")
    description = prepare(str(source), str(tmp_path / "out"), PrepareConfig(split=(0.5, 0.25, 0.25)))
    assert [images for images, _ in counts(description).values()] == [4, 2, 2]
    assert description["source"]["groups"] == {"train": 2, "val": 1, "test": 1}
    wells = {name.split("_")[2]: split for split in shards.SPLITS for name in rows_of(tmp_path / "out", split)}
    for split in shards.SPLITS:  # both frames of a well
        in_wells = sum(well_split == split for well_split in wells.values())
        assert counts(description)[split][0] == 2 * in_wells


def coco(names: list[str], segmentation: Any, **more: Any) -> str:
    """Return COCO JSON with one cell per image."""
    images = [{"id": n, "file_name": name, "width": WIDTH, "height": HEIGHT} for n, name in enumerate(names)]
    cell = {"category_id": 1, "segmentation": segmentation, **more}
    annotations = [{"id": n, "image_id": n, **cell} for n in range(len(names))]
    return json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cell"}]})


@pytest.mark.usefixtures("no_ray")
def test_exports_of_cvat_and_roboflow(tmp_path: Path) -> None:
    """CVAT's "COCO 1.0" has no splits and sets iscrowd for the brush; Roboflow's "COCO Segmentation" has folders."""
    cvat, names = tmp_path / "cvat", [f"frame_{number:06}.PNG" for number in range(4)]
    write_images(cvat / "images" / "default", *names)
    (cvat / "annotations").mkdir()
    brush = {"size": [HEIGHT, WIDTH], "counts": [5, 4, HEIGHT * WIDTH - 9]}
    (cvat / "annotations" / "instances_default.json").write_text(coco(names, brush, iscrowd=1))
    config = PrepareConfig(split=(0.5, 0.25, 0.25), group_by=".*", on_defect={"crowd_region": "keep"})
    with pytest.raises(UserError, match="divide its images with --split"):
        prepare(str(cvat), str(tmp_path / "out"))
    description = prepare(str(cvat), str(tmp_path / "out"), config)
    assert counts(description) == {"train": (2, 2), "val": (1, 1), "test": (1, 1)}
    roboflow = tmp_path / "roboflow"
    for seed, split in enumerate(("train", "valid", "test")):
        write(roboflow / split / f"{split}_png.rf.0a1b.jpg", pixels(seed))
        text = coco([f"{split}_png.rf.0a1b.jpg"], [[4, 4, 12, 4, 12, 14, 4, 14]])
        (roboflow / split / "_annotations.coco.json").write_text(text)
    assert counts(prepare(str(roboflow), str(tmp_path / "rf"))) == dict.fromkeys(shards.SPLITS, (1, 1))


@pytest.mark.usefixtures("no_ray")
def test_outlines_per_image(tmp_path: Path) -> None:
    """ROIs and GeoJSON written from labels give the same labels."""
    labels = np.where(CELLS == 70_000, 1, CELLS).astype(np.int32)
    source = tmp_path / "source"
    write_images(source, "images/a.tif", "images/b.tif", "images/c.tif")
    (source / "rois").mkdir()
    (source / "rois" / "a_RoiSet.zip").write_bytes(imagej_rois.write(labels))
    (source / "rois" / "b.zip").write_bytes(b"PK\x03\x04 and noise")
    (source / "annotations").mkdir()
    (source / "annotations" / "c.tif.geojson").write_bytes(geojson.write(labels, np.ones(5)))
    with pytest.raises(UserError, match=r"rois \(2 images\) and geojson \(1 images\)"):
        prepare(str(source), str(tmp_path / "out"))
    description = prepare(str(source), str(tmp_path / "rois"), PrepareConfig(format="rois"))
    (row,) = rows_of(tmp_path / "rois", "train").values()
    assert_same_cells(row, labels)
    assert [defect["file_name"] for defect in defects_of(description, "unreadable_annotation")] == ["b.tif"]
    prepare(str(source), str(tmp_path / "geojson"), PrepareConfig(format="geojson"))
    (row,) = rows_of(tmp_path / "geojson", "train").values()
    assert_same_cells(row, labels)
    assert (row["annotation"], row["file_name"]) == ("annotations/c.tif.geojson#c.tif", "c.tif")


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("outlines", ["rois", "geojson"])
def test_outlines_of_another_slice_are_refused(tmp_path: Path, outlines: str) -> None:
    frames = np.stack([pixels(seed, [[0, 0, 20, 20], [10, 30, 40, 40]]) for seed in range(3)])
    (tmp_path / "in").mkdir()
    tifffile.imwrite(tmp_path / "in" / "a.tif", frames, imagej=True, metadata={"axes": "TYX"})
    write(tmp_path / "in" / "single.tif", frames[0])
    labels = (CELLS == 9).astype(np.int32)
    if outlines == "rois":
        with zipfile.ZipFile(io.BytesIO(imagej_rois.write(labels))) as archive:
            roi = ImagejRoi.frombytes(archive.read(archive.namelist()[0]))
        roi.position = 3
        file, data = "{}.roi", roi.tobytes()
    else:
        collection = json.loads(geojson.write(labels, np.ones(1)))
        collection["features"][0]["geometry"]["plane"] = {"c": -1, "z": 0, "t": 2}
        file, data = "{}.geojson", json.dumps(collection).encode()
    (tmp_path / "in" / file.format("a")).write_bytes(data)
    with pytest.raises(UserError, match=r"belong to .* of the stack.*the image is plane t0.*--plane"):
        prepare(str(tmp_path / "in"), str(tmp_path / "t0"), PrepareConfig(plane="t0"))
    prepare(str(tmp_path / "in"), str(tmp_path / "t2"), PrepareConfig(plane="t2"))
    (row,) = rows_of(tmp_path / "t2", "train").values()
    assert (row["source"], row["file_name"]) == ("a.tif#t2", "a.tif")
    assert_same_cells(row, labels)
    (tmp_path / "in" / "a.tif").unlink()  # an exported frame: its outlines may still state the slice
    (tmp_path / "in" / file.format("a")).rename(tmp_path / "in" / file.format("single"))
    prepare(str(tmp_path / "in"), str(tmp_path / "single"))
    (row,) = rows_of(tmp_path / "single", "train").values()
    assert row["source"] == "single.tif"
    assert_same_cells(row, labels)
