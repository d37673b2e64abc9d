"""`prepare`: outlines of single cells, as polygons and run lengths."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prepare_source import HEIGHT, WIDTH, SourceFolder, defects_of, masks_of, pixels, rows_of, square
from pycocotools import mask as coco_mask

from raylivecell.annotations import coco, drawing
from raylivecell.data import defects, draw, plan
from raylivecell.data.cell_defects import check_cells
from raylivecell.data.prepare import prepare

pytest_plugins = ["prepare_fixtures"]


@pytest.mark.usefixtures("no_ray")
def test_rle_and_polygons_draw_the_same(folder: SourceFolder, tmp_path: Path) -> None:
    polygons = [square(3.3, 4.7, 9.9), square(11, 9), square(50, 40, 30)]
    encoded = [coco_mask.merge(coco_mask.frPyObjects([polygon], HEIGHT, WIDTH)) for polygon in polygons]
    compressed = [{"size": rle["size"], "counts": rle["counts"].decode()} for rle in encoded]
    plain = []
    for rle in encoded:
        flat = coco_mask.decode(rle).T.ravel()
        runs = np.diff(np.r_[0, np.flatnonzero(np.diff(flat)) + 1, len(flat)]).tolist()
        plain.append({"size": rle["size"], "counts": [0, *runs] if flat[0] else runs})
    for name, outlines in (("a", polygons), ("b", compressed), ("c", plain), ("d", [{"size": [5, 5], "counts": [25]}])):
        folder.file(f"{name}.png", pixels(ord(name)))
        folder.entry("train", f"{name}.png", outlines)
    description = prepare(folder.write(), str(tmp_path / "out"))
    rows = rows_of(tmp_path / "out", "train")
    for name in "bc":
        np.testing.assert_array_equal(rows["a.png"]["labels"], rows[f"{name}.png"]["labels"])
    assert "d.png" not in rows
    assert [defect["file_name"] for defect in defects_of(description, "degenerate_polygon")] == ["d.png"]
    assert defects_of(description, "no_annotations")[0]["detail"] == "no annotation left that can be drawn"


def record(number: int, corners: np.ndarray, as_rle: bool) -> tuple[coco.CellRecord, np.ndarray]:
    """Return a cell as polygon or run lengths, and its mask (H, W) by pycocotools."""
    (rle,) = coco_mask.frPyObjects([corners.ravel().tolist()], HEIGHT, WIDTH)
    polygons, runs = [corners.astype(np.float32)], [((HEIGHT, WIDTH), coco.run_lengths(rle["counts"]))]
    cell = coco.CellRecord(number, False, [] if as_rle else polygons, runs if as_rle else [])
    return cell, coco_mask.decode(rle).astype(bool)


CORNERS = st.lists(st.tuples(st.integers(-40, 300), st.integers(-40, 230)), min_size=3, max_size=6)


@given(st.lists(st.tuples(CORNERS, st.booleans()), min_size=1, max_size=8))
@settings(max_examples=100)
def test_outlines_are_complete_masks_as_drawn_by_pycocotools(cells: list[Any]) -> None:
    """In label order; overlapping cells both keep the shared pixels, although each pixel has only one label."""
    records, masks = zip(*(record(i, np.array(corners) / 4, as_rle) for i, (corners, as_rle) in enumerate(cells)))
    image = plan.ImagePlan("a.png", "a.png", "train", "train.json", 1, "A172", "", (1, 1), HEIGHT * WIDTH)
    rules, reported = {"doubled_contour": "keep", "no_annotations": "keep"}, list[defects.Defect]()
    row = draw.draw_sample(np.zeros((HEIGHT, WIDTH), np.uint8), image, list(records), rules, 5.0, reported)
    assert row is not None
    dropped = {i for d in reported if d.defect in ("degenerate_polygon", "hidden_cell") for i in d.ids}
    expected = [mask for i, mask in enumerate(masks) if i not in dropped]
    outlines = masks_of(row)
    np.testing.assert_array_equal(outlines, np.array(expected, bool).reshape(-1, HEIGHT, WIDTH))
    np.testing.assert_array_equal(outlines.any(axis=0), row["foreground"] != 0)
    for label, mask in enumerate(outlines, 1):
        assert mask[row["labels"] == label].all()


@pytest.mark.usefixtures("no_ray")
def test_overlapping_cells_both_keep_shared_pixels_in_the_shard(folder: SourceFolder, tmp_path: Path) -> None:
    outside = square(200, 200)  # without pixels it has neither a label nor an outline
    folder.image("train", "A172_Phase_two.png", [square(4, 4, 12), outside, square(10, 10, 9)])
    prepare(folder.write(), str(tmp_path / "out"))
    row = rows_of(tmp_path / "out", "train")["A172_Phase_two.png"]
    assert [type(counts) for counts in row["outlines"]] == [bytes, bytes]
    large, small = masks_of(row)
    assert (large.sum(), small.sum(), (large & small).sum()) == (144, 81, 36)
    assert np.bincount(row["labels"].ravel())[1:].tolist() == [108, 81]


def test_unusual_outlines_are_drawn_or_reported() -> None:
    shape = (40, 40)

    def checked(*polygons: list[float]) -> tuple[int, dict[str, str]]:
        arrays = [np.array(polygon, np.float32).reshape(-1, 2) for polygon in polygons]
        cells, _, _, cell_defects = check_cells([coco.CellRecord(1, False, arrays, [])], shape, (1.0, 1.0), {})
        pixels = sum(int(drawing.rasterise(cell, shape).mask.sum()) for cell in cells)
        return pixels, {defect: members[0][1] for defect, members in cell_defects.items()}

    bow_tie = checked([1, 1, 30, 1, 1, 30, 30, 30])  # its signed area is 0
    assert bow_tie[0] > 300
    assert bow_tie[1] == {}
    assert checked([0.1, 0.1, 0.9, 0.1, 0.9, 0.9]) == (
        0,
        {"degenerate_polygon": "all coordinates are in 0 to 1: fractions of the image's size?"},
    )
    assert checked(square(2, 2, 20), square(8, 8, 4))[1] == {
        "inner_outline": "a part is inside another part of its cell"
    }
    assert checked(square(2, 2, 4), square(20, 20, 4)) == (32, {})
    assert "degenerate_polygon" in checked([1, 1, 5, 5, 9, 9])[1]


@pytest.mark.parametrize(("x", "y"), [(2, 1), (1, 2), (2, 2)])
def test_run_lengths_are_scaled_with_their_image(x: int, y: int) -> None:
    """8 x 4 pixels in the JSON, 8 x by 4 y in the file: each mask pixel becomes x by y pixels."""
    shape = (4 * y, 8 * x)
    mask = np.random.default_rng(0).random((4, 8)) > 0.5
    values = mask.T.ravel()
    edges = np.flatnonzero(np.diff(values)) + 1
    runs = np.diff([0, *edges, values.size])
    record = coco.CellRecord(1, False, [], [((4, 8), np.array([0, *runs] if values[0] else runs))])
    cells, _, _, cell_defects = check_cells([record], shape, (x, y), {})
    assert cell_defects == {}
    scaled = np.zeros(shape, bool)
    patch = cells[0]
    assert isinstance(patch, drawing.Patch)
    scaled[patch.top : patch.top + patch.mask.shape[0], patch.left : patch.left + patch.mask.shape[1]] = patch.mask
    np.testing.assert_array_equal(scaled, np.repeat(np.repeat(mask, y, axis=0), x, axis=1))
    assert "degenerate_polygon" in check_cells([record], shape, (1.0, 1.0), {}).defects
