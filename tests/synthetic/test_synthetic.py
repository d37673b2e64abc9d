"""Synthetic LIVECell: images depend only on (seed, index), annotations are exact, thresholding fails, defects."""

import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from raylivecell.core.errors import UserError
from raylivecell.synthetic import layout, planted_defects, writer
from raylivecell.synthetic.cell_shapes import CELLS, HEIGHT, KINDS, WIDTH, Mask, polygon

SEED = 11


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def load(folder: Path) -> dict[str, Any]:
    return {s: json.loads(Path(writer.json_path(str(folder), s)).read_text()) for s in writer.SPLITS}


def depth_of(masks: list[Mask]) -> np.ndarray:
    """Number of cells that cover each pixel."""
    depth = np.zeros((HEIGHT, WIDTH), int)
    for mask in masks:
        depth[mask.window] += mask.pixels
    return depth


def rasterise(points: list[float]) -> np.ndarray:
    return np.asarray(coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([points], HEIGHT, WIDTH))), bool)


@pytest.fixture(scope="module")
def frames() -> dict[int, tuple[np.ndarray, list[Mask]]]:
    """One image of each cell line, with its masks."""
    return {index: writer.draw_frame(SEED, index) for index in range(len(KINDS))}


@pytest.fixture(scope="module")
def defective(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synthetic") / "defective"
    writer.write_dataset(out, planted_defects.MIN_IMAGES, SEED, defects=True)
    return out


def reversed_map(function: Any, items: Any) -> Any:
    """A mapper that executes in reverse order and pickles, as separate processes do."""
    results = [pickle.loads(pickle.dumps(function))(pickle.loads(pickle.dumps(item))) for item in reversed(items)]
    return reversed(results)


def test_same_seed_gives_same_bytes_for_any_number_of_frames_and_any_mapper(tmp_path: Path) -> None:
    few, more, other = tmp_path / "few", tmp_path / "more", tmp_path / "other"
    writer.write_dataset(few, 3, SEED)
    writer.write_dataset(more, 5, SEED, mapper=reversed_map)
    writer.write_dataset(other, 3, SEED + 1)
    images = {name: data for name, data in tree(few).items() if name.endswith(".tif")}
    assert len(images) == 3
    assert images.items() <= tree(more).items()
    assert not set(images.values()) & set(tree(other).values())
    first, second = load(few), load(more)
    for split in writer.SPLITS:
        assert all(entry in second[split]["images"] for entry in first[split]["images"])
        assert all(record in second[split]["annotations"] for record in first[split]["annotations"])


@pytest.mark.ray
def test_ray_draws_the_same_bytes(tmp_path: Path, ray_cluster: None) -> None:
    from raylivecell.runtime.session import ordered_map

    local, on_ray = tmp_path / "local", tmp_path / "ray"
    writer.write_dataset(local, 4, SEED)
    writer.write_dataset(on_ray, 4, SEED, mapper=ordered_map)
    assert tree(local) == tree(on_ray)


def test_livecells_layout(tmp_path: Path) -> None:
    import tifffile

    result = writer.write_dataset(tmp_path / "out", 3, SEED)
    data = load(tmp_path / "out")
    ids: list[int] = []
    for split, content in data.items():
        assert list(content) == ["info", "licenses", "categories", "images", "annotations"]
        assert result["splits"][split] == {"images": 1, "cells": len(content["annotations"])}
        (entry,) = content["images"]
        ids += [entry["id"], *(record["id"] for record in content["annotations"])]
        path = layout.image_path(str(tmp_path / "out"), split, entry["file_name"])
        page = tifffile.TiffFile(path).pages[0]
        assert (page.shape, page.dtype, page.compression.name, page.predictor) == ((520, 704), np.uint8, "LZW", 2)
        for record in content["annotations"]:
            points = np.array(record["segmentation"][0]).reshape(-1, 2)
            assert 5 <= len(points) <= 140
            assert points.min() >= 0
            assert (points.max(0) <= (WIDTH, HEIGHT)).all()
            np.testing.assert_allclose(record["bbox"], [*points.min(0), *np.ptp(points, axis=0)], atol=0.006)
            assert record["image_id"] == entry["id"]
    assert len(ids) == len(set(ids))


def test_names_ids_and_splits_of_a_full_size_dataset() -> None:
    all_frames = [writer.Frame("", SEED, index) for index in range(5239)]
    assert (
        len({frame.file_name for frame in all_frames})
        == len({frame.image_id for frame in all_frames})
        == len(all_frames)
    )
    counts = Counter(frame.split for frame in all_frames)
    assert [round(counts[split] / len(all_frames), 2) for split in writer.SPLITS] == [0.61, 0.11, 0.28]
    first = all_frames[:40]
    assert {frame.split for frame in first[:3]} == set(writer.SPLITS)
    kinds = {split: {frame.kind for frame in first if frame.split == split} for split in writer.SPLITS}
    assert [len(kinds[split]) for split in writer.SPLITS] == [8, 6, 8]


def test_statistics_of_every_cell_line(frames: dict[int, tuple[np.ndarray, list[Mask]]]) -> None:
    assert {writer.Frame("", SEED, index).kind for index in frames} == set(range(8))
    for image, masks in frames.values():
        depth = depth_of(masks)
        assert CELLS[0] <= len(masks) <= CELLS[1]
        assert 0.06 <= (depth > 0).mean() <= 0.95
        assert (depth > 1).sum() <= 0.03 * (depth > 0).sum()
        assert abs(np.median(image) - 128) <= 1
        # Foreground and background have the same mean; only the standard deviation differs.
        assert abs(image[depth > 0].mean() - image[depth == 0].mean()) < 4
        assert image[depth > 0].std() > 2.5 * image[depth == 0].std()


def test_polygons_reproduce_the_masks(frames: dict[int, tuple[np.ndarray, list[Mask]]]) -> None:
    for _, masks in frames.values():
        depth, redrawn = depth_of(masks), np.zeros((HEIGHT, WIDTH), int)
        for mask in masks:
            redrawn += rasterise(polygon(mask))
        both, either = ((depth > 0) & (redrawn > 0)).sum(), ((depth > 0) | (redrawn > 0)).sum()
        assert both / either > 0.98
        assert (redrawn > 1).sum() <= 0.03 * (redrawn > 0).sum()
        for mask in masks[:20]:
            original = np.zeros((HEIGHT, WIDTH), bool)
            original[mask.window] = mask.pixels > 0
            redrawn_cell = rasterise(polygon(mask))
            assert (original & redrawn_cell).sum() / (original | redrawn_cell).sum() > 0.88


def test_thresholding_fails(frames: dict[int, tuple[np.ndarray, list[Mask]]]) -> None:
    scores = []
    for image, masks in frames.values():
        foreground = depth_of(masks) > 0
        _, bright = cv2.threshold(image, 0, 1, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
        candidates = (bright > 0, bright == 0)
        scores.append(max(2 * (foreground & mask).sum() / (foreground.sum() + mask.sum()) for mask in candidates))
    assert np.mean(scores) < 0.6


@pytest.mark.parametrize("seed", [1, 2])
def test_counts_and_overlap_over_seeds(seed: int) -> None:
    for index in range(8):
        _, masks = writer.draw_frame(seed, index + 8 * seed)
        depth = depth_of(masks)
        assert CELLS[0] <= len(masks) <= CELLS[1]
        assert (depth > 1).sum() <= 0.025 * (depth > 0).sum()


def test_an_interrupted_dataset_is_completed_and_a_complete_one_kept(tmp_path: Path) -> None:
    out, uninterrupted = tmp_path / "out", tmp_path / "uninterrupted"

    def interrupted_map(function: Any, items: Any) -> Any:
        yield function(items[0])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        writer.write_dataset(out, 3, SEED, mapper=interrupted_map)
    assert not list(out.rglob("*.json*partial"))
    assert not list((out / "annotations").rglob("*.json"))
    writer.write_dataset(out, 3, SEED)
    writer.write_dataset(uninterrupted, 3, SEED)
    assert tree(out) == tree(uninterrupted)
    summary = writer.write_dataset(out, 3, SEED, mapper=interrupted_map)
    assert summary["complete"]


def test_a_folder_with_other_files_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match="choose another --out"):
        writer.write_dataset(tmp_path, 3, SEED)
    writer.write_dataset(tmp_path / "out", 1, SEED)
    with pytest.raises(UserError, match="another synthetic dataset"):
        writer.write_dataset(tmp_path / "out", 2, SEED)
    with pytest.raises(UserError, match="24 or more"):
        writer.write_dataset(tmp_path / "few", 3, SEED, defects=True)
    with pytest.raises(UserError, match="1 or more"):
        writer.write_dataset(tmp_path / "none", 0, SEED)


def test_every_defect_is_planted(defective: Path) -> None:
    planted = json.loads((defective / "planted.json").read_text())
    assert {item["defect"] for item in planted["defects"]} == set(planted_defects.DEFECTS)
    assert {item["shape"] for item in planted["shapes"]} == set(planted_defects.SHAPES)
    data = load(defective)
    records = {split: {r["id"]: r for r in content["annotations"]} for split, content in data.items()}
    assert sum(map(len, records.values())) == len({i for split in records.values() for i in split})
    for item in planted["defects"]:
        CHECKS[item["defect"]](defective, data, item)


def splits_of(data: dict[str, Any], item: dict[str, Any]) -> list[str]:
    """The split of each entry that lists the item's file."""
    return [s for s in writer.SPLITS for e in data[s]["images"] if e["file_name"] == item["file_name"]]


def records(data: dict[str, Any], item: dict[str, Any]) -> list[dict[str, Any]]:
    ids = {listed["image_id"] for listed in item["listed"]}
    return [r for s in writer.SPLITS for r in data[s]["annotations"] if r["image_id"] in ids]


def changed_segmentations(data: dict[str, Any], item: dict[str, Any]) -> list[list[list[float]]]:
    return [r["segmentation"] for r in records(data, item) if r["id"] in item["annotation_ids"]]


def file_of(out: Path, item: dict[str, Any]) -> Path:
    return Path(layout.image_path(str(out), item["split"], item["file_name"]))


def pixels(out: Path, item: dict[str, Any]) -> Any:
    return cv2.imread(str(file_of(out, item)), cv2.IMREAD_UNCHANGED)


def check_leak(out: Path, data: Any, item: Any) -> None:
    assert len(set(splits_of(data, item))) == 2
    for listed in item["listed"]:
        assert Path(layout.image_path(str(out), listed["split"], item["file_name"])).exists()


def check_duplicate(out: Path, data: Any, item: Any) -> None:
    assert splits_of(data, item) == [item["split"]] * 2
    assert len({listed["image_id"] for listed in item["listed"]}) == 2


def check_identical(out: Path, data: Any, item: Any) -> None:
    first, second = (layout.image_path(str(out), e["split"], e["file_name"]) for e in item["listed"])
    assert first != second
    assert Path(first).read_bytes() == Path(second).read_bytes()


def check_doubled(out: Path, data: Any, item: Any) -> None:
    unchanged = [rasterise(r["segmentation"][0]) for r in records(data, item) if r["id"] not in item["annotation_ids"]]
    for (points,) in changed_segmentations(data, item):
        copy = rasterise(points)
        assert max((copy & cell).sum() / (copy | cell).sum() for cell in unchanged) > 0.85


def check_unreadable(out: Path, data: Any, item: Any) -> None:
    assert file_of(out, item).stat().st_size > 1000
    assert pixels(out, item) is None


def check_outside(out: Path, data: Any, item: Any) -> None:
    points = [np.array(segmentation[0]).reshape(-1, 2) for segmentation in changed_segmentations(data, item)]
    assert len(points) == 2
    assert all((p.max(0) > (WIDTH + 1, HEIGHT + 1)).any() for p in points)


def check_degenerate(out: Path, data: Any, item: Any) -> None:
    assert sorted(sum(map(len, segmentation)) for segmentation in changed_segmentations(data, item)) == [0, 4, 6]


def check(is_planted: Any) -> Any:
    def run(out: Path, data: Any, item: Any) -> None:
        assert is_planted(out, data, item), item

    return run


CHECKS = {
    "leak": check_leak,
    "duplicate_entry": check_duplicate,
    "identical_pixels": check_identical,
    "no_annotations": check(lambda out, data, item: splits_of(data, item) and not records(data, item)),
    "few_annotations": check(lambda out, data, item: len(records(data, item)) == planted_defects.FEW),
    "doubled_contour": check_doubled,
    "missing_file": check(lambda out, data, item: splits_of(data, item) and not file_of(out, item).exists()),
    "unlisted_file": check(lambda out, data, item: not splits_of(data, item) and file_of(out, item).exists()),
    "unreadable_image": check_unreadable,
    "colour_image": check(lambda out, data, item: pixels(out, item).shape == (HEIGHT, WIDTH, 3)),
    "sixteen_bit_image": check(lambda out, data, item: pixels(out, item).dtype == np.uint16),
    "wrong_size": check(lambda out, data, item: pixels(out, item).shape == (HEIGHT - 8, WIDTH - 24)),
    "out_of_bounds": check_outside,
    "degenerate_polygon": check_degenerate,
}


def test_valid_record_forms(defective: Path) -> None:
    planted, data = json.loads((defective / "planted.json").read_text()), load(defective)
    shapes = {item["shape"]: changed_segmentations(data, item) for item in planted["shapes"]}
    assert [len(segmentation) for segmentation in shapes["several_polygons"]] == [2]
    compressed, plain = sorted(shapes["rle"], key=lambda segmentation: isinstance(segmentation["counts"], list))
    assert coco_mask.decode({**compressed, "counts": compressed["counts"].encode()}).sum() > 0
    assert sum(plain["counts"]) == HEIGHT * WIDTH
