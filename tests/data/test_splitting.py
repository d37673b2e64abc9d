"""`prepare --split`: groups of images, their distribution over train, val and test, sources without splits."""

import itertools
import json
import shutil
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from conftest import SHARED
from hypothesis import given
from hypothesis import strategies as st
from prepare_source import N, SourceFolder, counts, defects_of, rows_of, square

from raylivecell.core.errors import UserError
from raylivecell.data import shards
from raylivecell.data.config import PrepareConfig
from raylivecell.data.group_names import GroupName, parse
from raylivecell.data.prepare import prepare
from raylivecell.data.splitting import Assignment, assign

pytest_plugins = ["prepare_fixtures"]

FRACTIONS = st.sampled_from([(0.8, 0.1, 0.1), (0.5, 0.25, 0.25), (0.7, 0.0, 0.3), (0.9, 0.1, 0.0), (1.0, 0.0, 0.0)])
GROUPS = st.lists(st.integers(1, 12), min_size=3, max_size=20)
"""Sizes of groups."""


def names_of(sizes: list[int]) -> list[str]:
    return [f"well{chr(97 + group)}/img_{frame}.png" for group, size in enumerate(sizes) for frame in range(size)]


def image_counts(assignment: Assignment) -> dict[str, int]:
    split = Counter(assignment.split.values())
    return {name: split[name] for name in shards.SPLITS}


@pytest.mark.parametrize(
    ("name", "group", "frame"),
    [
        ("livecell_train_val_images/A172_Phase_A7_1_01d08h00m_2.tif", "A172_Phase_A7", (1, 8, 0)),
        ("livecell_test_images/A172_Phase_A7_2_01d12h00m_2.tif", "A172_Phase_A7", (1, 12, 0)),
        ("H9_Phase_B3_1_00d04h00m_1.tif", "H9_Phase_B3", (0, 4, 0)),  # H9 is a cell line here
        ("VID12_A1_1_2020y11m30d_12h00m.tif", "VID12_A1", (2020, 11, 30, 12, 0)),
        ("plate1/B03_s2_w1.TIF", "plate1/B03", (2, 1)),
        ("plate2/B03_s2_w1.TIF", "plate2/B03", (2, 1)),
        ("2024-05-01/A1_1.tif", "A1", (1,)),  # the same well on another day
        ("gfp/x_ch2/A1_1.tif", "gfp/x/A1", (1,)),
        ("r02c03f01p01-ch1sk4fk1fl1.tiff", "r02c03", (1, 1, 1, 4, 1, 1)),
        ("set18.tif", "set", (18,)),
        ("img_003.png", "img", (3,)),
        ("img (3).png", "img", (3,)),
        ("t0001.tif", "*", (1,)),
        ("0001.tif", "*", (1,)),
        ("01/t000.tif", "01", (0,)),  # Cell Tracking Challenge
        ("Pos1_t003.tif", "Pos1", (3,)),
        ("Pos1_t003_crop2.tif", "Pos1", (3,)),
        ("img_channel001_position002_time000000007_z000.tif", "img_position002", (7,)),
        ("T1_img_003.tif", "img", (1,)),  # if T1 is a treatment, the group is larger than necessary
        ("24h_img_003.tif", "img", (3,)),
        ("C2-stack.tif", "stack", ()),
        ("exp1/stack2.ome.tif#t003", "exp1/stack2", (3,)),
        ("dish_png.rf.0a1b2c3d.jpg", "dish", ()),
        ("dish_png.rf.99999999.jpg", "dish", ()),
        ("00071198d059ba7f5914a526d124d28e6d010c92466da21d4a04cd5413362552.png", None, ()),
        ("controls/alpha.png", "controls/alpha", ()),
    ],
)
def test_group_and_frame_in_a_name(name: str, group: str | None, frame: tuple[int, ...]) -> None:
    assert parse(name)[:2] == GroupName(group or name.split(".")[0], frame)[:2]


@given(st.text(max_size=40), st.text("AB17_-.#/()dhmt ", max_size=40))
def test_any_name_has_a_group(text: str, similar: str) -> None:
    for name in (text, similar):
        assert parse(name).group


@given(GROUPS, FRACTIONS, st.randoms(use_true_random=False))
def test_groups_are_never_divided_and_fractions_are_approached(
    sizes: list[int], fractions: tuple[float, float, float], random: Random
) -> None:
    names = names_of(sizes)
    assignment = assign(names, fractions)
    assert assignment.split.keys() == assignment.groups.keys() == set(names)
    assert len(set(zip(assignment.groups.values(), assignment.split.values()))) == len(sizes)
    images = image_counts(assignment)
    for split, fraction in zip(shards.SPLITS, fractions):
        assert bool(images[split]) == (fraction > 0)
        assert images[split] - fraction * len(names) < max(sizes) if fraction else not images[split]
        assert fraction * len(names) - images[split] < 2 * max(sizes)
    shuffled = random.sample(names, len(names))
    assert assign(shuffled + shuffled[:3], fractions) == assignment
    per_split = [set(assignment.images_by_group(split)) for split in shards.SPLITS]
    assert sum(map(len, per_split)) == len(sizes)


@given(st.integers(8, 60))
def test_equal_groups_get_the_exact_fractions(count: int) -> None:
    assignment = assign([f"{group}/a.png" for group in range(5 * count)], (0.6, 0.2, 0.2))
    assert image_counts(assignment) == {"train": 3 * count, "val": count, "test": count}
    test = [int(name.split("/")[0]) for name, split in assignment.split.items() if split == "test"]
    assert max(test) - min(test) > count  # not one range of the alphabet


@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), FRACTIONS)
def test_frames_of_each_series_are_cut_into_ranges(lengths: list[int], fractions: tuple[float, float, float]) -> None:
    names = [
        f"s{chr(97 + i)}_t{t:03}_{crop}.tif" for i, length in enumerate(lengths) for t in range(length) for crop in "12"
    ]
    wanted = [split for split, fraction in zip(shards.SPLITS, fractions) if fraction > 0]
    if sum(lengths) < len(wanted):
        with pytest.raises(UserError, match="frame numbers"):
            assign(names, fractions, "frames")
        return
    assignment = assign(names, fractions, "frames")
    images = image_counts(assignment)
    for split, fraction in zip(shards.SPLITS, fractions):
        assert bool(images[split]) == (fraction > 0)
        assert abs(images[split] - fraction * len(names)) <= 4  # crops of one frame are not divided
    order = {split: place for place, split in enumerate(shards.SPLITS)}
    for first, second in itertools.pairwise(names):
        if first.split("_")[0] == second.split("_")[0]:
            assert order[assignment.split[first]] <= order[assignment.split[second]]
            assert first[:7] != second[:7] or assignment.split[first] == assignment.split[second]
    assert len(set(zip(assignment.groups.values(), assignment.split.values()))) == len(set(assignment.groups.values()))
    assert "neighbouring frames are similar" in assignment.warnings[0]


def test_names_of_usiigaci() -> None:
    """Every second frame of one series: refused without a choice, cut into ranges with `frames`."""
    folder = SHARED / "usiigaci-mini" / "images"
    if not folder.is_dir():
        pytest.skip(f"no images at {folder}: set RAYLIVECELL_SHARED to the folder that contains usiigaci-mini")
    names = [path.name for path in folder.iterdir()]
    with pytest.raises(UserError, match=r"form 1 group \(set\), fewer .*--group-by frames .*--split 1 0 0 for"):
        assign(names, (0.8, 0.1, 0.1))
    assert set(assign(names, (1, 0, 0)).split.values()) == {"train"}
    frames = assign(names, (0.8, 0.1, 0.1), "frames")
    assert sorted(frames.split, key=lambda name: frames.split[name] == "train")[:2] == ["set34.tif", "set36.tif"]
    assert frames.split["set36.tif"] == "test"
    assert frames.groups["set20.tif"] == "set, frames 18 to 32"


def test_group_by_a_regular_expression() -> None:
    names = [f"{kind}_{well}_{t}.png" for kind in ("a", "b") for well in ("x1", "x2") for t in range(5)]
    by_kind = assign(names, (0.5, 0.0, 0.5), "^[ab]")
    assert set(by_kind.groups.values()) == {"a", "b"}
    assert set(assign(names, (0.5, 0.0, 0.5), r"^(.)_(?:(x1)|x2)").groups.values()) == {"a_x1", "a_", "b_x1", "b_"}
    each = assign(names, (0.6, 0.2, 0.2), ".*")
    assert (len(set(each.groups.values())), each.warnings) == (20, ())
    with pytest.raises(UserError, match=r"no match in 10 of 20 names \(b_x1_0.png, .*, \.\.\.\)"):
        assign(names, (0.5, 0.0, 0.5), "a_(.*)")
    with pytest.raises(UserError, match="no match in 20 of 20"):
        assign(names, (0.5, 0.0, 0.5), "z?")
    with pytest.raises(UserError, match="not a regular expression"):
        assign(names, (0.5, 0.0, 0.5), "(a")
    with pytest.raises(UserError, match=r"form 2 groups \(a, b\), fewer than the 3 splits: .* --split 0.8 0 0.2"):
        assign(names, (0.8, 0.1, 0.1), "^.")


def test_warnings() -> None:
    (warning,) = assign([f"{letter * 3}.png" for letter in "abcdefghij"], (0.8, 0.1, 0.1)).warnings
    assert "in the names of 10 of 10 images (aaa.png, " in warning
    (warning,) = assign(["a/1.png", *(f"b/{t}.png" for t in range(9))], (0.5, 0.0, 0.5)).warnings
    assert "the groups are too large for --split 0.5 0 0.5: train, val and test get 0.9 0 0.1" in warning
    assert not assign(
        [f"X_{row}{column}_1_00d04h00m.tif" for row in "ABCDE" for column in "12"], (0.8, 0.1, 0.1)
    ).warnings


@pytest.mark.usefixtures("no_ray")
def test_coco_source_with_one_file(livecell_mini: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source"
    (source / "images").mkdir(parents=True)
    for path in livecell_mini.glob("images/*/*.tif"):
        shutil.copyfile(path, source / "images" / path.name)
    merged: dict[str, list] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "cell"}]}
    for path in livecell_mini.glob("annotations/LIVECell/*.json"):
        for part in ("images", "annotations"):
            merged[part] += json.loads(path.read_bytes())[part]
    (source / "instances_default.json").write_text(json.dumps(merged))
    with pytest.raises(UserError, match=r"divide its images with --split 0.8 0.1 0.1"):
        prepare(str(source), str(tmp_path / "out"))
    description = prepare(str(source), str(tmp_path / "out"), PrepareConfig(split=(0.7, 0.15, 0.15)))
    original = prepare(str(livecell_mini), str(tmp_path / "original"))
    images = {split: count for split, (count, _) in counts(description).items()}
    assert images == {"train": 10, "val": 2, "test": 2}
    assert {split: part["listed"]["images"] for split, part in description["splits"].items()} == images
    assert sum(cells for _, cells in counts(description).values()) == 3264
    assert description["source"]["split"] == [0.7, 0.15, 0.15]
    assert description["source"]["groups"] == {"train": 9, "val": 2, "test": 2}
    assert description["source"]["files"][0]["split"] == "all"
    assert description["defects"]["counts"] == original["defects"]["counts"]
    rows = [rows_of(tmp_path / "out", split) for split in shards.SPLITS]
    wells = [{name.rsplit("_", 3)[0] for name in split} for split in rows]
    assert sum(map(len, wells)) == len(set().union(*wells)) == 13
    for split in shards.SPLITS:
        for name, row in rows_of(tmp_path / "original", split).items():
            (ours,) = (part[name] for part in rows if name in part)
            assert (ours["labels"] == row["labels"]).all()
            assert ours["outlines"] == row["outlines"]
    assert "train: 10 images in 9 groups: A172_Phase_C7, " in capsys.readouterr().err
    assert prepare(str(source), str(tmp_path / "out"), PrepareConfig(split=(0.7, 0.15, 0.15))) == description
    for config in (PrepareConfig(split=(0.8, 0.1, 0.1)), PrepareConfig(split=(0.7, 0.15, 0.15), group_by=".*")):
        with pytest.raises(UserError, match="with other settings"):
            prepare(str(source), str(tmp_path / "out"), config)


@pytest.mark.usefixtures("no_ray")
def test_images_without_annotations_and_unusable_records(folder: SourceFolder, tmp_path: Path) -> None:
    """An image that nobody has annotated yet is never scored as background."""
    folder.splits.clear()
    for well in ("A1", "A2", "A3", "B1"):
        for time in ("00d00h00m", "00d04h00m"):
            folder.image("all", f"X_Phase_{well}_1_{time}_1.png")
    for number in range(20):
        folder.image("all", f"X_Phase_C{number % 9 + 1}_1_00d{number:02}h00m_1.png", outlines=[])
    folder.entry("all", "missing_D4_1.png")
    first = folder.splits["all"]["images"][0]["id"]  # two images with one id: neither can be used
    folder.splits["all"]["images"] += [{"id": 7}, {"id": first, "file_name": "other.png"}]
    folder.splits["all"]["annotations"].append(
        {"id": 5, "image_id": 999999, "category_id": 1, "segmentation": [square(1, 1)]}
    )
    source = folder.write()
    config = PrepareConfig(split=(0.5, 0.25, 0.25), annotations={"all": "annotations/LIVECell/livecell_coco_all.json"})
    description = prepare(source, str(tmp_path / "out"), config)
    assert counts(description) == {"train": (3, 3 * N), "val": (2, 2 * N), "test": (2, 2 * N)}
    listed = {split: part["listed"]["images"] for split, part in description["splits"].items()}
    assert listed == {"train": 31 - 4, "val": 2, "test": 2}
    assert {defect["rule"] for defect in defects_of(description, "no_annotations")} == {"drop"}
    assert {defect["split"] for defect in defects_of(description, "bad_record")} == {None}
    description = prepare(
        str(source), str(tmp_path / "kept"), config.model_copy(update={"on_defect": {"no_annotations": "keep"}})
    )
    assert sum(images for images, _ in counts(description).values()) == 27


def test_settings() -> None:
    for split, message in {
        (80.0, 10.0, 10.0): "80 10 10: give the fractions",
        (0.5, 0.2, 0.2): "with a sum of 1",
        (0.0, 0.5, 0.5): "train must be above 0",
        (1.5, -0.5, 0.0): "give the fractions",
        (float("nan"), 0.5, 0.5): "give the fractions",
    }.items():
        with pytest.raises(ValueError, match=message):
            PrepareConfig(split=split)
    assert PrepareConfig(split=(0.34, 0.33, 0.33)).split == (0.34, 0.33, 0.33)
    for config, message in (
        (PrepareConfig(group_by="x"), "--group-by is for images that are to be split"),
        (PrepareConfig(annotations={"all": "a.json"}), "--annotations all is for images"),
        (PrepareConfig(split=(1, 0, 0), annotations={"test": "a.json"}), "--split with --annotations test"),
    ):
        with pytest.raises(UserError, match=message):
            prepare("nowhere", "nowhere", config)
