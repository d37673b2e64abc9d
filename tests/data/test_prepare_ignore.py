"""`prepare`: ignore regions of every format, from the annotation file to the loss."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prepare_source import HEIGHT, SQUARES, WIDTH, N, SourceFolder, counts, files_of, pixels, rows_of, square
from test_prepare_labels import write

from raylivecell.annotations import geojson, imagej_rois, rle
from raylivecell.core.errors import UserError
from raylivecell.data import shards
from raylivecell.data.config import PrepareConfig
from raylivecell.data.prepare import prepare
from raylivecell.ingest import blocks
from raylivecell.ingest.order import SampleSchedule
from raylivecell.network.losses import segmentation_loss
from raylivecell.recipe import AugmentConfig, LossConfig, PhaseConfig
from raylivecell.targets.registry import NAMES, Targets, target
from raylivecell.targets.sample_planes import FOREGROUND, IGNORED

pytest_plugins = ["prepare_fixtures"]

LABELS = np.zeros((HEIGHT, WIDTH), np.int32)
LABELS[4:14, 5:15], LABELS[20:30, 40:55], LABELS[30:40, 8:20] = 1, 2, 3
REGION = np.zeros((HEIGHT, WIDTH), bool)
REGION[25:44, 30:60] = True
"""Overlaps cell 2, whose pixels stay annotated."""
IGNORED_PIXELS = REGION & (LABELS == 0)


def region_of(folder: Path | str, split: str, number: int = 0) -> np.ndarray | None:
    return shards.read_row(shards.list_rows(str(folder), split)[number], ["ignore"])["ignore"]


def add_annotation(folder: SourceFolder, split: str, segmentation: Any, **more: Any) -> None:
    """Add an annotation to the first image of a split."""
    data = folder.splits[split]
    image_id = data["images"][0]["id"]
    about = {"id": 900_000 + len(data["annotations"]), "image_id": image_id, "category_id": 1}
    data["annotations"].append({**about, "segmentation": segmentation, **more})


def as_rle(mask: np.ndarray) -> dict[str, Any]:
    (encoded,) = rle.encode(mask.astype(np.uint8))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode()}


@pytest.mark.usefixtures("no_ray")
def test_crowds_and_chosen_categories_of_coco_files(
    folder: SourceFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = prepare(folder.write(), str(tmp_path / "plain"))
    assert "ignored" not in json.dumps(plain)
    assert region_of(tmp_path / "plain", "train") is None
    add_annotation(folder, "train", as_rle(REGION), iscrowd=1)
    add_annotation(folder, "test", [square(0, 0, 10)], category_id=2)
    for data in folder.splits.values():
        data["categories"] = [{"id": 1, "name": "cell"}, {"id": 2, "name": "Out of focus"}]
    description = prepare(folder.write(), str(tmp_path / "out"), PrepareConfig(ignore=("out of FOCUS",)))
    assert counts(description) == counts(plain)
    printed = capsys.readouterr().err
    for split, mask in (("train", REGION), ("test", np.pad(np.ones((10, 10), bool), ((0, 38), (0, 54))))):
        rows, before = rows_of(tmp_path / "out", split), rows_of(tmp_path / "plain", split)
        first = next(iter(rows))
        np.testing.assert_array_equal(region_of(tmp_path / "out", split), mask & (rows[first]["labels"] == 0))
        assert region_of(tmp_path / "out", split, 1) is None
        for name in rows:
            for column in ("image", "labels", "foreground", "border"):
                np.testing.assert_array_equal(rows[name][column], before[name][column])
        number = int((mask & (rows[first]["labels"] == 0)).sum())
        assert description["splits"][split]["ignored"] == {"images": 1, "pixels": number}
        assert f"{split}: {number} pixels of 1 images are ignored" in printed
    assert "ignored" not in description["splits"]["val"]
    assert description["source"]["ignore"] == ["out of FOCUS"]
    assert [(c["name"], c["chosen"], c.get("ignored")) for c in description["categories"]] == [
        ("Out of focus", False, True),
        ("cell", True, None),
    ]
    assert (description["defects"]["counts"], description["defects"]["found"][0]["rule"]) == (
        {"crowd_region": 1},
        "ignore",
    )
    again = files_of(tmp_path / "out")
    prepare(str(folder.root), str(tmp_path / "out"), PrepareConfig(ignore=("out of FOCUS",)))
    assert files_of(tmp_path / "out") == again
    dropped = prepare(str(folder.root), str(tmp_path / "dropped"), PrepareConfig(on_defect={"crowd_region": "drop"}))
    assert "ignored" not in json.dumps(dropped["splits"])


@pytest.mark.usefixtures("no_ray")
def test_images_with_only_an_ignore_region_follow_the_rule_for_images_without_cells(
    folder: SourceFolder, tmp_path: Path
) -> None:
    for split in ("train", "test"):
        folder.image(split, f"A172_Phase_{split}_crowd.png", [])
        image_id = folder.splits[split]["images"][-1]["id"]
        crowd = {"id": 7, "image_id": image_id, "category_id": 1, "segmentation": as_rle(REGION), "iscrowd": 1}
        folder.splits[split]["annotations"].append(crowd)
    description = prepare(folder.write(), str(tmp_path / "out"))
    assert {split: images for split, (images, _) in counts(description).items()} == {"train": 2, "val": 2, "test": 3}
    with_crowds = prepare(folder.write(), str(tmp_path / "kept"), PrepareConfig(on_defect={"no_annotations": "keep"}))
    assert counts(with_crowds)["train"] == (3, 2 * N)


def write_format(folder: Path, name: str) -> tuple[str, ...]:
    """Write two images with LABELS, the first with REGION, in a format; return the value of --ignore."""
    for stem, region in (("a", REGION), ("b", np.zeros_like(REGION))):
        write(folder / "images" / f"{stem}.tif", pixels(ord(stem), SQUARES))
        both = np.where(region & (LABELS == 0), 65_535, LABELS)  # in outlines the region overlaps the cell
        if name == "labels":
            write(folder / "masks" / f"{stem}.tif", both.astype(np.uint16))
        elif name == "negative":
            write(folder / "masks" / f"{stem}.npy", np.where(both == 65_535, -1, both))
        elif name == "rois":
            archive = io.BytesIO()
            with zipfile.ZipFile(archive, "w") as target_zip:
                for labels, prefix in ((LABELS, "cell"), (region * 1, "Debris-")):  # the region is the last ROI
                    source = zipfile.ZipFile(io.BytesIO(imagej_rois.write(labels)))
                    for number, entry in enumerate(source.namelist(), 1):
                        target_zip.writestr(f"{prefix}{number}.roi", source.read(entry))
            write_bytes(folder / "rois" / f"{stem}.zip", archive.getvalue())
        else:
            content = json.loads(geojson.write(LABELS, np.ones(3)))
            for feature in json.loads(geojson.write(region.astype(np.int32), np.ones(int(region.any()))))["features"]:
                about = {
                    "objectType": "annotation",
                    "classification": {"name": "Ignore*" if name == "qupath" else "Mess"},
                }
                content["features"].append(feature | {"properties": about})
            write_bytes(folder / "annotations" / f"{stem}.geojson", json.dumps(content).encode())
    return {"labels": ("65535",), "negative": ("-1",), "rois": ("debris",), "qupath": (), "geojson": ("mess",)}[name]


def write_bytes(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("name", ["labels", "negative", "rois", "geojson", "qupath"])
def test_the_same_region_in_every_format(name: str, tmp_path: Path) -> None:
    ignore = write_format(tmp_path / "source", name)
    description = prepare(str(tmp_path / "source"), str(tmp_path / "out"), PrepareConfig(ignore=ignore))
    assert counts(description)["train"] == (2, 6)
    np.testing.assert_array_equal(region_of(tmp_path / "out", "train"), IGNORED_PIXELS)
    assert region_of(tmp_path / "out", "train", 1) is None
    for row in rows_of(tmp_path / "out", "train").values():
        np.testing.assert_array_equal(row["labels"], LABELS)
    assert description["splits"]["train"]["ignored"] == {"images": 1, "pixels": int(IGNORED_PIXELS.sum())}
    assert description["defects"]["counts"] == {}
    share = (LABELS > 0).sum() * 2 / (2 * LABELS.size - IGNORED_PIXELS.sum())
    assert description["cell_types"]["unknown"]["foreground_share"] == pytest.approx(share, abs=1e-6)


@pytest.mark.usefixtures("no_ray")
def test_a_region_is_scaled_with_its_image(tmp_path: Path) -> None:
    config = PrepareConfig(ignore=write_format(tmp_path / "source", "labels"), pixel_scale=2)
    prepare(str(tmp_path / "source"), str(tmp_path / "out"), config)
    doubled = np.kron(IGNORED_PIXELS, np.ones((2, 2), bool))
    np.testing.assert_array_equal(region_of(tmp_path / "out", "train"), doubled)


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("name", ["labels", "rois", "geojson", "coco"])
def test_a_wrong_name_is_an_error_in_one_line(name: str, folder: SourceFolder, tmp_path: Path) -> None:
    if name == "coco":
        for data in folder.splits.values():
            data["categories"] = [{"id": 1, "name": "cell"}, {"id": 2, "name": "unused"}]
        source = folder.write()
        wrong = {
            ("cells",): "--ignore: no category 'cells' (did you mean cell?)",
            ("unused",): "--ignore unused: no image has an annotation of this category",
        }
        both = PrepareConfig(ignore=("cell",), categories=("cell",))
        with pytest.raises(UserError, match="category cell is in --categories and in --ignore"):
            prepare(source, str(tmp_path / "out"), both)
    else:
        source = str(tmp_path / "files")
        write_format(Path(source), name)
        wrong = {
            "labels": {("7",): "no image has the label 7", ("debris",): "give the label, such as --ignore 255"},
            "rois": {("debris", "dust"): "--ignore dust: no image has a ROI of the name dust"},
            "geojson": {("Ignore me",): "no image has an object of the class Ignore me"},
        }[name]
    for ignore, message in wrong.items():
        with pytest.raises(UserError) as error:
            prepare(source, str(tmp_path / "out"), PrepareConfig(ignore=ignore))
        assert message in str(error.value)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists() or files_of(tmp_path / "out") == {}


def test_other_classes_with_a_star_are_no_cells() -> None:
    content = json.loads(geojson.write(LABELS, np.ones(3)))
    for feature in content["features"][:2]:
        feature["properties"] |= {"objectType": "annotation", "classification": {"name": "Region*"}}
    first, second, third = geojson.read(json.dumps(content).encode(), LABELS.shape)
    assert (first.id, first.runs, first.region) == ("1 (class Region*, not a cell)", [], "")
    assert (second.runs, bool(third.runs), third.region) == ([], True, "")
    regions = geojson.read(json.dumps(content).encode(), LABELS.shape, ignore=("region*",))
    assert [record.region for record in regions] == ["region*", "region*", ""]


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("targets", NAMES)
def test_a_crowd_reaches_the_loss_of_augmented_crops(targets: Targets, folder: SourceFolder, tmp_path: Path) -> None:
    add_annotation(folder, "train", as_rle(REGION), iscrowd=1)
    prepare(folder.write(), str(tmp_path / "out"))
    rows = shards.list_rows(str(tmp_path / "out"), "train")
    schedule = SampleSchedule(0, len(rows), 2, (PhaseConfig(epochs=1, augmented_copies=2),))
    source = blocks.Source(rows, schedule, AugmentConfig(), (32, 40), (HEIGHT, WIDTH), targets=targets)
    planes = torch.from_numpy(
        blocks.load(np.concatenate([schedule.rows(i) for i in range(schedule.steps)]), source).copy()
    )
    ignored = planes[:, FOREGROUND] == IGNORED
    assert 2 <= int(ignored.any(2).any(1).sum()) <= 3, "the first image, original and two copies; a crop may miss it"
    assert set(planes[:, FOREGROUND].unique().tolist()) == {0, 1, 2}
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(0, 2, (len(planes), len(target(targets).channels), 32, 40)).astype(np.float32))
    other = torch.where(ignored[:, None], torch.from_numpy(rng.normal(0, 9, logits.shape)).float(), logits)
    loss, same = (segmentation_loss(values, planes, LossConfig(), targets) for values in (logits, other))
    assert torch.isfinite(loss.total)
    assert torch.equal(loss.total, same.total)
    assert not torch.equal(segmentation_loss(-other, planes, LossConfig(), targets).total, loss.total)
    validation = blocks.read_validation_sample(rows[0], cells=targets != "foreground")
    assert validation.ignored is not None
    np.testing.assert_array_equal(validation.ignored, REGION & (validation.truth == 0))
