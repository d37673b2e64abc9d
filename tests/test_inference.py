"""Whole images in, masks and scores out: nothing lost, nothing twice, nothing overwritten."""

import csv
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from raylivecell import actors, checkpoint, inference, metrics, segment, shards, storage
from raylivecell.errors import UserError
from raylivecell.loop import State
from raylivecell.model import ModelConfig, build_model
from raylivecell.recipe import Recipe

SIZES = [(48, 64), (48, 64), (33, 57), (64, 48), (48, 64)]


def cells(shape: tuple[int, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """An image of bright disks on 128, and where they are."""
    rng = np.random.default_rng(seed)
    truth = np.zeros(shape, np.uint8)
    for _ in range(3):
        centre = (int(rng.integers(shape[1])), int(rng.integers(shape[0])))
        cv2.circle(truth, centre, int(rng.integers(4, 10)), 1, -1)
    return np.clip(128 + 50 * truth + rng.normal(0, 8, shape), 0, 255).astype(np.uint8), truth


def sample(index: int) -> dict:
    image, truth = cells(SIZES[index % len(SIZES)], index)
    pixels = {"image": image, "labels": truth.astype(np.uint16), "foreground": truth, "border": truth * 0}
    kind = ["A172", "BV2"][index % 2]
    about = {
        "file_name": f"{kind}_{index}.tif",
        "cell_type": kind,
        "cells": 3,
        "source": "s",
        "sha256": "0",
        "annotation": "",
    }
    return {**pixels, **about, "height": image.shape[0], "width": image.shape[1]}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("data"))
    parts = [{"file": f"test/part-{i}.parquet", "rows": n} for i, n in enumerate((7, 13))]
    rows = [sample(i) for i in range(20)]
    shards.write_shard(f"{folder}/test/part-0.parquet", rows[:7])
    shards.write_shard(f"{folder}/test/part-1.parquet", rows[7:])
    splits = {"test": {"images": 20, "shards": parts}, "val": {"images": 0, "shards": []}}
    description = {"format_version": shards.FORMAT_VERSION, "name": "tiny", "licence": "none", "splits": splits}
    storage.write_json(f"{folder}/dataset.json", description)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of a network with random weights."""
    torch.manual_seed(3)
    recipe = Recipe(model=ModelConfig(features=(4, 8)))
    folder = str(tmp_path_factory.mktemp("checkpoint"))
    checkpoint.save(folder, build_model(recipe.model), {}, State(), recipe)
    return folder


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (17, 2), (33, 57)])
def test_any_size_goes_through(saved: str, shape: tuple[int, int]) -> None:
    network, _ = segment.load(saved, torch.device("cpu"))
    for flips in (False, True):
        found = segment.probability(network, np.full(shape, 130, np.uint8), flips)
        assert found.shape == shape
        assert found.dtype == np.float32
        assert ((found >= 0) & (found <= 1)).all()


@pytest.mark.parametrize("shape", [(150, 140), (40, 400), (65, 64)])
def test_windows_cover_the_image(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that looks at one pixel alone gives the same in windows as in whole."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 8, 1), nn.ReLU(), nn.Conv2d(8, 1, 1)).eval()
    images = torch.from_numpy(np.stack([cells(shape, 0)[0]]))
    whole = segment.logits(network, images)
    monkeypatch.setattr(segment, "WHOLE_PIXELS", 64 * 64)
    monkeypatch.setattr(segment, "WINDOW", 64)
    torch.testing.assert_close(segment.logits(network, images), whole, atol=1e-5, rtol=1e-4)


def test_flips_make_the_answer_follow_the_image(saved: str) -> None:
    network, _ = segment.load(saved, torch.device("cpu"))
    images = torch.from_numpy(np.stack([cells((48, 64), seed)[0] for seed in range(2)]))
    plain, averaged = segment.logits(network, images), segment.logits(network, images, flips=True)
    assert not torch.allclose(plain, averaged)
    for axes in segment.FLIPS:
        turned = segment.logits(network, images.flip(axes), flips=True).flip(tuple(a + 1 for a in axes))
        torch.testing.assert_close(turned, averaged, atol=1e-5, rtol=1e-4)


@given(st.integers(1, 3000), st.integers(1, 300), st.integers(0, 16))
def test_pool_fits_the_cluster(items: int, cpus: int, gpus: int) -> None:
    count, each, gpus_each = actors.pool(items, {"CPU": cpus, "GPU": gpus})
    assert count >= 1
    assert (count - 1) * actors.BLOCK < items  # no actor without a block
    if gpus:
        assert gpus_each == 1
        assert count <= gpus
    else:
        assert count * each <= max(1, cpus - 1)


@given(st.lists(st.text("abAB./", min_size=1, max_size=6), max_size=8, unique=True))
def test_no_two_images_share_an_output(stems: list[str]) -> None:
    files = sorted({s.strip("/.") + suffix for s in stems if s.strip("/.") for suffix in (".tif", ".png")})
    names = inference.output_names(files)
    assert len(set(names)) == len(files)
    assert all(name.endswith(".png") for name in names)
    assert [name.rpartition("/")[0] for name in names] == [file.rpartition("/")[0] for file in files]


def test_output_names_keep_suffixes_only_where_they_must() -> None:
    assert inference.output_names(["a.tif", "x/a.tif"]) == ["a.png", "x/a.png"]
    assert inference.output_names(["a.tif", "a.png", "b.tif"]) == ["a.tif.png", "a.png.png", "b.tif.png"]
    assert inference.output_names(["a.tif", "A.tif"]) == ["a.tif.png", "A.tif.png"]


def test_deep_images_are_brought_to_the_background_of_livecell() -> None:
    image = np.random.default_rng(0).integers(100, 157, (31, 33)).astype(np.uint8)
    image[15, 16] = np.median(image)
    same, gain = inference.to_uint8(image, None)
    assert same is image
    assert gain == 1
    image = np.where(image == np.median(image), 128, image).astype(np.uint8)
    image[:16] = 128
    for factor in (257, 256, 16, 3):  # 16-bit copies of an 8-bit image give it back
        back, _ = inference.to_uint8(image.astype(np.uint16) * factor, None)
        np.testing.assert_array_equal(back, image)
    shifted, gain = inference.to_uint8(image.astype(np.uint16) * 16, 12)
    np.testing.assert_array_equal(shifted, image)
    assert gain == 1 / 16
    black, _ = inference.to_uint8(np.eye(40, dtype=np.uint16) * 4000, None)
    assert black.max() == 255
    assert inference.to_uint8(np.zeros((2, 2), np.uint16), None)[0].max() == 0


def test_mistakes_are_told_before_anything_starts(saved: str, data: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    with pytest.raises(UserError, match="no images in its split val"):
        inference.evaluate(saved, data, "val", out)
    with pytest.raises(UserError, match="no dataset"):
        inference.evaluate(saved, str(tmp_path), "test", out)
    with pytest.raises(UserError, match="no checkpoint"):
        inference.evaluate(str(tmp_path), data, "test", out)
    with pytest.raises(UserError, match="no images at"):
        inference.predict(saved, str(tmp_path), out)
    with pytest.raises(UserError, match="no folder at"):
        inference.predict(saved, str(tmp_path / "nowhere"), out)
    with pytest.raises(UserError, match="threshold"):
        inference.predict(saved, str(tmp_path), out, threshold=50)
    assert not Path(out).exists()


@pytest.mark.ray
@pytest.mark.parametrize("tta", [False, True])
def test_evaluate_counts_every_image_once(ray_cluster: None, saved: str, data: str, tmp_path: Path, tta: bool) -> None:
    result = inference.evaluate(saved, data, "test", str(tmp_path), tta=tta)
    network, _ = segment.load(saved, torch.device("cpu"))
    expected = []
    for index in range(20):
        row = sample(index)
        found = segment.logits(network, torch.from_numpy(row["image"])[None], tta)[0, 0].numpy() > 0
        expected.append(metrics.mask_counts(found, row["foreground"]))
    got = [{name: row[name] for name in metrics.COUNTS} for row in result["per_image"]]
    assert [row["file_name"] for row in result["per_image"]] == [sample(i)["file_name"] for i in range(20)]
    # A pixel whose logit is 0 to the last bit may fall either way with another number of threads.
    assert max(abs(a[name] - b[name]) for a, b in zip(got, expected) for name in metrics.COUNTS) <= 2
    assert sum(sum(row.values()) for row in got) == sum(h * w for h, w in SIZES) * 4
    assert result["images"] == 20
    assert {kind: score["images"] for kind, score in result["per_cell_type"].items()} == {"A172": 10, "BV2": 10}
    assert json.loads((tmp_path / "metrics.json").read_text()) == json.loads(json.dumps(result))
    assert len(result["checkpoint"]["sha256"]) == len(result["data"]["sha256"]) == 64
    assert sorted(p.name for p in (tmp_path / "overlays").iterdir()) == ["best.png", "median.png", "worst.png"]
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.json", "recipe.yaml", "overlays"}


def write_images(folder: Path) -> dict[str, np.ndarray]:
    """Images of every kind, by relative path; the 8-bit gray each stands for."""
    (folder / "deep" / "er").mkdir(parents=True)
    gray = {name: cells((48, 64), i)[0] for i, name in enumerate("abcd")}
    tifffile.imwrite(folder / "a.tif", gray["a"])
    cv2.imwrite(str(folder / "a.png"), gray["b"])
    tifffile.imwrite(folder / "deep" / "a.tiff", gray["c"].astype(np.uint16) * 257)
    cv2.imwrite(str(folder / "deep" / "er" / "colour.PNG"), np.dstack([gray["d"]] * 3))
    cv2.imwrite(str(folder / "dot.png"), np.array([[200]], np.uint8))
    large = cells((1500, 1450), 9)[0]
    cv2.imwrite(str(folder / "large.png"), large)
    (folder / "cut.tif").write_bytes((folder / "a.tif").read_bytes()[:300])
    (folder / "notes.txt").write_text("no image")
    (folder / "._a.tif").write_bytes(b"macOS")
    files = ["a.tif", "a.png", "deep/a.tiff", "deep/er/colour.PNG", "dot.png", "large.png"]
    return dict(zip(files, [*gray.values(), np.array([[200]], np.uint8), large]))


@pytest.mark.ray
def test_predict_takes_a_folder_of_anything(ray_cluster: None, saved: str, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    expected = write_images(folder)
    out = folder / "result"  # inside the images' folder: results must not become inputs
    for _ in range(2):
        summary = inference.predict(saved, str(folder), str(out))
        assert (summary["images"], summary["segmented"]) == (7, 6)
    assert [failure["file"] for failure in summary["failed"]] == ["cut.tif"]
    with open(out / "cells.csv") as stream:
        rows = {row["file"]: row for row in csv.DictReader(stream)}
    assert rows.keys() == expected.keys() | {"cut.tif"}
    assert rows["cut.tif"]["error"]
    assert rows["cut.tif"]["area_share"] == rows["cut.tif"]["mask"] == ""
    network, _ = segment.load(saved, torch.device("cpu"))
    masks = []
    for file, image in expected.items():
        row = rows[file]
        mask = cv2.imread(str(out / row["mask"]), cv2.IMREAD_UNCHANGED)
        masks.append(row["mask"])
        assert mask.shape == image.shape == (int(row["height"]), int(row["width"]))
        assert set(np.unique(mask)) <= {0, 255}
        assert int(row["foreground_pixels"]) == (mask == 255).sum()
        assert float(row["area_share"]) == pytest.approx((mask == 255).mean())
        assert cv2.imread(str(out / row["overlay"])).shape == (*image.shape, 3)
        gray = inference.to_uint8(image.astype(np.uint16) * 257, None)[0] if file == "deep/a.tiff" else image
        direct = segment.probability(network, gray) > 0.5
        assert (direct != (mask == 255)).mean() < 1e-3
    written = [p.relative_to(out).as_posix() for p in (out / "masks").rglob("*") if p.is_file()]
    assert sorted(written) == sorted(masks)
    assert (out / "recipe.yaml").is_file()


@pytest.mark.ray
def test_predict_of_one_file_and_of_none_readable(ray_cluster: None, saved: str, tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "one.png"), cells((40, 40), 0)[0])
    summary = inference.predict(saved, str(tmp_path / "one.png"), str(tmp_path / "out"), tta=True, threshold=0.3)
    assert summary["images"] == summary["segmented"] == 1
    assert (tmp_path / "out" / "masks" / "one.png").is_file()
    (tmp_path / "bad.png").write_bytes(b"no")
    with pytest.raises(UserError, match="none of the 1 images"):
        inference.predict(saved, str(tmp_path / "bad.png"), str(tmp_path / "out2"))
    assert "bad.png" in (tmp_path / "out2" / "cells.csv").read_text()
