"""Intensity rule: robust to outlier pixels and images, exact for 8-bit data, the same in all commands."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given
from hypothesis import strategies as st

from raylivecell.core.console import show_warnings
from raylivecell.data import defects, draw, plan, shards
from raylivecell.data.defects import Entry
from raylivecell.images import intensity
from raylivecell.images.grey_levels import Measures, measure, padding_mask, without_padding
from raylivecell.images.intensity import Intensity, choose, to_uint8
from raylivecell.inference import evaluate, export, image_file, segmenter
from raylivecell.network.unet import build_model
from raylivecell.recipe import ModelConfig, Recipe
from raylivecell.runs import checkpoint
from raylivecell.runs.progress import Progress


def frame(seed: int, background: float = 128, cells: int = 9, shape: tuple[int, int] = (120, 160)) -> np.ndarray:
    """Simulate a phase-contrast image, uint8: noise on the background, grey cells with bright rims."""
    rng = np.random.default_rng(seed)
    image = np.full(shape, background, np.float32)
    for _ in range(cells):
        centre = (int(rng.integers(shape[1])), int(rng.integers(shape[0])))
        cv2.circle(image, centre, 11, background + 55, 3)
        cv2.circle(image, centre, 9, background - 25, -1)
    image = cv2.GaussianBlur(image, (0, 0), 1) + rng.normal(0, 1.5, shape)
    return np.clip(np.rint(image), 1, 254).astype(np.uint8)


def measures_of(image: np.ndarray) -> Measures:
    return measure(image, padding_mask(image))


FRAMES = [frame(seed) for seed in range(6)]
RULE = choose([measures_of(image) for image in FRAMES])
STORED: dict[str, Any] = {
    "257": lambda image: image.astype(np.uint16) * 257,
    "shifted": lambda image: image.astype(np.uint16) << 4,
    "offset": lambda image: image.astype(np.uint16) * 20 + 1000,
    "faint": lambda image: image.astype(np.uint16) * 3 + 30000,
}


def test_eight_bits_are_unchanged_and_livecell_keeps_its_zero() -> None:
    assert (RULE.depth, RULE.background_level, RULE.scale) == (8, 128, 5)
    for image in FRAMES:
        result = to_uint8(image, RULE)
        np.testing.assert_array_equal(result.levels, image)
        assert (result.gain, result.usable, result.padding, result.warnings) == (1, True, None, ())


def test_real_livecell_is_unchanged(livecell_mini: Path) -> None:
    images = [cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in sorted(livecell_mini.rglob("*.tif"))]
    rule = choose([measures_of(image) for image in images])
    assert (rule.background_level, rule.scale) == (128, 5)
    for image in images:
        result = to_uint8(image, rule)
        assert (result.gain, result.warnings) == (1, ())
        np.testing.assert_array_equal(result.levels, image)


@pytest.mark.parametrize("stored", ["257", "shifted"])
def test_eight_bit_data_stored_in_sixteen_bits_are_restored(stored: str) -> None:
    deep = [STORED[stored](image) for image in FRAMES]
    rule = choose([measures_of(image) for image in deep])
    assert (rule.depth, rule.background_level, rule.scale) == (16, 128, 5)
    for applied in (rule, RULE):  # rules of a 16-bit and of an 8-bit dataset
        for image, original in zip(deep, FRAMES):
            result = to_uint8(image, applied)
            assert result.warnings == ()
            np.testing.assert_array_equal(result.levels, original)


@pytest.mark.parametrize("stored", list(STORED))
def test_outlier_pixels_and_images_have_no_influence(stored: str) -> None:
    deep = [STORED[stored](image) for image in FRAMES]
    rule = choose([measures_of(image) for image in deep])
    levels = to_uint8(deep[0], rule).levels
    assert len(np.unique(levels)) > 60, "over 60 of 256 levels are used"
    hot = deep[0].copy()
    hot[5, 5] = 65535
    assert (to_uint8(hot, rule).levels != levels).sum() <= 1
    for outlier in (hot, np.zeros_like(hot), np.full_like(hot, 65535), deep[0] // 4):
        other = choose([measures_of(image) for image in [*deep, outlier]])
        assert (other.low, other.high) == (rule.low, rule.high)
        assert other.background == pytest.approx(rule.background, rel=0.001)
        assert (to_uint8(deep[1], other).levels == to_uint8(deep[1], rule).levels).all()


@given(
    st.lists(st.integers(0, 65535), min_size=2, max_size=200),
    st.sampled_from([256.0, 4096.0, 65536.0]),
    st.floats(0.1, 4),
)
def test_levels_increase_with_stored_values(values: list[int], high: float, gain: float) -> None:
    pixels = np.array([sorted(values)], np.uint16)
    levels = intensity.apply(pixels, Intensity(depth=16, low=high / 8, high=high), gain)
    assert levels.dtype == np.uint8
    assert (np.diff(levels.astype(int)) >= 0).all()


@given(st.floats(0.4, 0.85))
def test_darker_image_is_scaled_to_the_background_with_a_warning(factor: float) -> None:
    result = to_uint8(np.floor(FRAMES[0] * factor).astype(np.uint8), RULE)
    assert result.gain == pytest.approx(1 / factor, rel=0.03)
    assert result.warnings[0].startswith("scaled to the background of the training images: ")
    assert abs(float(np.median(result.levels)) - 128) <= 3


def test_confluent_layer_is_not_scaled() -> None:
    """The median is a grey level of cells; the remaining background shows that the exposure is normal."""
    image = frame(1, 128, cells=0)
    rng = np.random.default_rng(0)
    image[:, :150] = np.clip(rng.normal(85, 9, (120, 150)), 1, 254)
    assert abs(float(np.median(image)) - 128) > 30
    result = to_uint8(image, RULE)
    assert result.gain == 1
    np.testing.assert_array_equal(result.levels, image)


@pytest.mark.parametrize(
    "failed",
    [
        np.zeros((60, 80), np.uint8),
        np.full((60, 80), 128, np.uint8),
        np.full((60, 80), 255, np.uint8),
        np.where(np.arange(4800).reshape(60, 80) % 5, 255, 120).astype(np.uint8),
        np.random.default_rng(0).integers(0, 4, (60, 80)).astype(np.uint8),
        np.random.default_rng(0).integers(0, 4, (60, 80)).astype(np.uint16),
        np.zeros((60, 80), np.uint16),
        np.full((60, 80), 65535, np.uint16),
        np.zeros((1, 1), np.uint8),
    ],
)
def test_failed_exposure_has_no_cell(failed: np.ndarray) -> None:
    network = segmenter.Segmenter(lambda image: np.ones((1, *image.shape), np.float32), "foreground", CONFIG, "", RULE)
    cells = network.segment(failed)
    assert not cells.labels.any()
    assert not cells.foreground.any()
    assert len(cells.scores) == 0
    assert cells.warnings[0].startswith("unusable image: ")


CONFIG = segmenter.InstanceConfig()


def padded(image: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Return an image with padding, and its padding mask."""
    mask = np.ones_like(image)
    if kind == "stitched":
        return np.pad(image, ((0, 90), (0, 140))), np.pad(mask, ((0, 90), (0, 140))) == 0
    if kind == "white":
        return np.pad(image, ((20, 0), (0, 0)), constant_values=255), np.pad(mask, ((20, 0), (0, 0))) == 0
    matrix = cv2.getRotationMatrix2D((80, 60), 15, 0.9)
    rotated, inside = (cv2.warpAffine(plane, matrix, (160, 120), flags=cv2.INTER_NEAREST) for plane in (image, mask))
    return rotated, inside == 0


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("kind", ["stitched", "white", "rotated"])
def test_padding_has_no_cell(kind: str, deep: bool) -> None:
    image, padding = padded(FRAMES[0], kind)
    stored = image.astype(np.uint16) * 257 if deep else image
    network = segmenter.Segmenter(
        lambda levels: np.ones((1, *levels.shape), np.float32), "foreground", CONFIG, "", RULE
    )
    result = network.frame(stored)
    assert result.padding is not None
    np.testing.assert_array_equal(result.padding, padding)
    assert result.own_pixels == (~padding).sum()
    assert set(np.unique(result.levels[padding])) <= {127, 128, 129}
    np.testing.assert_array_equal(result.levels[~padding], image[~padding])
    (rows, columns), pixels = without_padding(result.levels, padding)
    np.testing.assert_array_equal(pixels[~padding[rows, columns]], image[~padding])
    assert padding[rows, columns].mean() < (0.4 if kind == "rotated" else 1e-9)
    assert abs(float(pixels.std()) - float(image[~padding].std())) < 4, "mirrored, not constant"
    cells = network.segment(stored)
    assert not cells.foreground[padding].any()
    assert not cells.labels[padding].any()
    assert cells.labels.max() == len(cells.scores) == 1


def test_bright_cells_on_exact_zeros_are_not_padding() -> None:
    image = np.zeros((120, 160), np.uint8)
    for seed in range(12):
        y, x = np.random.default_rng(seed).integers(10, 110, 2)
        cv2.circle(image, (int(x) + 20, int(y)), 6, 180, -1)
    image = np.maximum(image, cv2.GaussianBlur(image, (0, 0), 1))
    assert padding_mask(image) is None
    rule = choose([measures_of(image)])
    assert (rule.background_level, rule.by_background) == (0, False)
    np.testing.assert_array_equal(to_uint8(image // 2, rule).levels, image // 2)


def test_dataset_of_both_depths_uses_the_more_frequent_one() -> None:
    mixed = [*FRAMES[:4], *(STORED["257"](image) for image in FRAMES[4:])]
    rule = choose([measures_of(image) for image in mixed])
    assert rule.as_stored
    for image, original in zip(mixed, FRAMES):
        np.testing.assert_array_equal(to_uint8(image, rule).levels, original)


def test_prepare_reports_unusable_and_unusual_images() -> None:
    entry = Entry("train", "a.json", None, "", 1, "A172")  # type: ignore[arg-type]
    images = {"good": FRAMES[0], "dark": FRAMES[1] // 2, "black": FRAMES[2] * 0}
    entries, facts = [], {}
    for name, image in images.items():
        listed = type("Image", (), {"file_name": name, "id": 1})()
        entries.append(Entry(entry.split, entry.annotation, listed, name, 1, "A172"))
        facts[name] = defects.ImageInfo(measures=tuple(measures_of(image)))
    usable, unusual = defects.check_intensity(entries, facts, RULE, {})
    assert [entry.path for entry in usable] == ["good", "dark"]
    assert [(entry.defect, entry.file_name) for entry in unusual] == [
        ("odd_intensity", "dark"),
        ("no_picture", "black"),
    ]


@pytest.fixture(scope="module")
def save_network(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Function that saves a checkpoint of a random network with the intensity rule of a kind of dataset."""

    def save(kind: str, rule: Intensity) -> str:
        torch.manual_seed(3)
        recipe = Recipe(model=ModelConfig(features=(4, 8), norm="group"), targets="distance")
        folder = str(tmp_path_factory.mktemp(kind))
        checkpoint.save(folder, build_model(recipe.model, recipe.outputs, rule), {}, Progress(), recipe, None, rule)
        checkpoint.save_instances(folder, segmenter.InstanceConfig(prominence=0.01, min_area=4), {})
        return folder

    return save


def prepared(folder: Path, images: dict[str, np.ndarray], rule: Intensity) -> list[shards.Row]:
    """Rows of the images as `prepare` writes them."""
    plans = []
    for name, image in images.items():
        tifffile.imwrite(folder / name, image)
        sha256 = draw.examine(str(folder / name)).sha256
        plans.append(plan.ImagePlan(name, name, "test", "a.json", 1, "x", sha256, (1, 1), image.size))
    shard = plan.ShardPlan("test", "test/part-00000.parquet", tuple(plans))
    uri, rules = str(folder), {"no_annotations": "keep"}
    task = plan.ShardTask(shard, uri, uri, str(folder / "work"), rule, 5.0, rules, (0,) * len(plans))
    (folder / "work").mkdir()
    Path(task.cells_uri).write_bytes(b"")
    draw.draw_shard(plan.ShardTask.from_row(json.loads(json.dumps(task.to_row()))))
    return [shards.Row(str(folder / "test/part-00000.parquet"), number) for number in range(len(images))]


@pytest.mark.parametrize(
    ("kind", "rule_kind"),
    [
        ("stored", "robust"),
        ("shifted", "robust"),
        ("offset", "robust"),
        ("shifted", "as_is"),
        ("stored", "percentile"),
        ("offset", "percentile"),
    ],
)
def test_all_commands_give_the_same_cells(
    kind: str, rule_kind: intensity.Kind, save_network: Any, tmp_path: Path
) -> None:
    """Compare evaluate on a prepared dataset with predict on the same files, with arrays, and with ONNX."""
    store = STORED.get(kind, lambda image: image)
    rule = choose([measures_of(store(image)) for image in FRAMES], rule_kind)
    images = {
        "plain.tif": store(FRAMES[0]),
        "padded.tif": padded(store(FRAMES[1]), "stitched")[0],
        "dark.tif": (store(FRAMES[2]) * 0.7).astype(store(FRAMES[2]).dtype),
        "hot.tif": store(FRAMES[3]),
    }
    images["hot.tif"][5, 5] = np.iinfo(images["hot.tif"].dtype).max
    folder = save_network(kind, rule)
    export.export(folder, str(tmp_path / "model.onnx"))
    (tmp_path / "out").mkdir()
    rows = prepared(tmp_path, images, rule)
    model, onnx = segmenter.load(folder, device="cpu"), segmenter.load(str(tmp_path / "model.onnx"))
    assert model.intensity == onnx.intensity == rule
    job = image_file.PredictJob(folder, str(tmp_path), str(tmp_path / "out"), ("labels",), False, None)
    for row, (name, image) in zip(rows, images.items()):
        prediction, _ = evaluate._predict(model, evaluate._frame(shards.read_row(row, evaluate.SAMPLE), None))
        part = image_file.segment_file(job, model, name, name, "1")
        labels = tifffile.imread(tmp_path / "out/labels" / f"{name}.tif")
        assert part.row.cells == labels.max() == prediction.labels.max() > 0
        np.testing.assert_array_equal(labels, prediction.labels)
        np.testing.assert_array_equal(model.segment(image).labels, labels)
        np.testing.assert_array_equal(model.segment(tmp_path / name).labels, labels)
        assert (onnx.segment(image).labels != labels).mean() < 0.01
        warned = ("padded.tif",) if rule_kind == "percentile" else ("padded.tif", "dark.tif")
        assert bool(part.row.warning) == (name in warned)
        # Another dataset of the same kind.
        other = choose([measures_of(store(image)) for image in FRAMES[:2]], rule_kind)
        if conversion := intensity.conversion(other, rule):
            converted = evaluate._frame(shards.read_row(row, evaluate.SAMPLE), conversion)
            assert (converted.levels != to_uint8(image, rule).levels).mean() < 0.01


def test_datasets_with_another_mapping_are_refused(save_network: Any, tmp_path: Path) -> None:
    shifted, offset = (choose([measures_of(STORED[kind](image)) for image in FRAMES]) for kind in ("shifted", "offset"))
    assert intensity.conversion(shifted, shifted) is None
    assert intensity.conversion(RULE, shifted) == shifted, "8-bit images are stored unchanged"
    with pytest.raises(ValueError, match="by another map"):
        intensity.conversion(shifted, offset)
    folder = save_network("other", offset)
    assert segmenter.intensity_rule(folder) == offset
    (Path(folder) / checkpoint.INTENSITY).unlink()
    with pytest.raises(segmenter.UserError, match="written by an older raylivecell"):
        segmenter.load(folder)


@pytest.mark.parametrize("invalid", [{"low": 5, "high": 5}, {"background": float("nan")}, {"rule": "magic"}, {"x": 1}])
def test_invalid_rule_is_refused(invalid: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        Intensity.model_validate(invalid)


def test_one_line_per_kind_of_warning(capsys: pytest.CaptureFixture[str]) -> None:
    show_warnings({f"{i}.tif": ["padding: 3 %", "spread far: 9"][: 1 + (i > 997)] for i in range(1000)}, "images.csv")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "warning: padding: 1000 images, first 0.tif (3 %); all in images.csv",
        "warning: spread far: 2 images, first 998.tif (9); all in images.csv",
    ]
