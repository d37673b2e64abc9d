"""Several datasets as one: order, intensities, provenance, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
from conftest import write_tiny_dataset

from raylivecell.core import storage
from raylivecell.core.errors import UserError
from raylivecell.data import combined, shards
from raylivecell.images.intensity import LIVECELL, Intensity, choose, to_uint8
from raylivecell.images.scale import Scale
from raylivecell.recipe import PhaseConfig, Recipe
from raylivecell.runs import folder
from raylivecell.training import preflight


def write(target: Path, rule: Intensity = LIVECELL, images: int = 4, scale: Scale | None = None, **texts: str) -> str:
    data = write_tiny_dataset(target, images)
    values = storage.read_json(storage.join(data, "dataset.json"))
    values |= texts | {"intensity": rule.model_dump()} | ({"scale": scale.model_dump()} if scale else {})
    storage.write_json(storage.join(data, "dataset.json"), values)
    return data


def test_one_dataset_is_its_uri(tiny_dataset: str) -> None:
    assert combined.of(tiny_dataset) == combined.of([tiny_dataset], [2.0]) == tiny_dataset
    assert combined.provenance(tiny_dataset) == shards.provenance(tiny_dataset)
    assert [*combined.list_rows(tiny_dataset, "train")] == [*shards.list_rows(tiny_dataset, "train")]


def test_samples_follow_one_another_with_equal_pixels(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a", images=3), write(tmp_path / "b", images=5)
    data = combined.of([first, second], [1, 3])
    assert isinstance(data, combined.Datasets)
    for split in ("train", "val"):
        rows = combined.list_rows(data, split)
        expected = [*shards.list_rows(first, split), *shards.list_rows(second, split)]
        assert [*rows] == expected, "equal rules: no conversion"
    assert combined.sample_counts(data, "train") == ((3, 1.0), (5, 3.0))
    assert combined.image_sizes(data, "train") == {(48, 48)}


def test_images_are_converted_to_the_intensities_of_the_first(tmp_path: Path) -> None:
    """An 8-bit dataset with another background joins one of brighter training images."""
    bright = Intensity(background=200.0, backgrounds=(190.0, 210.0), medians=(190.0, 210.0), spread=120.0)
    first, second = write(tmp_path / "a", bright), write(tmp_path / "b")
    rows = combined.list_rows(combined.of([first, second]), "train")
    assert combined.intensity(combined.of([first, second])) == bright
    stored = [shards.read_row(row, ["image", "labels"]) for row in shards.list_rows(second, "train")]
    read = [shards.read_row(rows[4 + index], ["image", "labels"]) for index in range(4)]
    for old, new in zip(stored, read, strict=True):
        np.testing.assert_array_equal(new["image"], to_uint8(old["image"], bright).levels)
        np.testing.assert_array_equal(new["labels"], old["labels"])
        assert new["image"].mean() > 1.2 * old["image"].mean()
    assert "image" not in shards.read_row(rows[5], ["labels"])


def test_a_dataset_whose_stored_values_are_lost_is_refused(tmp_path: Path) -> None:
    deep = Intensity(depth=16, low=0, high=65536, background=32000, spread=20000)
    first, second = write(tmp_path / "a"), write(tmp_path / "b", deep)
    with pytest.raises(UserError, match=f"dataset at {second} cannot be combined .* --intensity-from {first}"):
        preflight.samples_fit(combined.of([first, second]), Recipe())
    same = write(tmp_path / "c", deep)
    assert combined.list_rows(combined.of([second, same]), "train")[5].rule is None


def test_an_image_that_is_unusable_by_the_first_rule_is_refused(tmp_path: Path) -> None:
    """It would be constant, with cells."""
    contrast = Intensity(background=240.0, backgrounds=(239.0, 241.0), medians=(239.0, 241.0), spreads=(999.0, 999.0))
    first, second = write(tmp_path / "a", contrast), write(tmp_path / "b")
    row = combined.list_rows(combined.of([first, second]), "train")[4]
    assert shards.read_row(row, ["labels"])["labels"].any()
    message = r"^image A172_Phase_train_0.tif of .*/b/.* does not fit .* contrast: .* --intensity-from FIRST`"
    with pytest.raises(UserError, match=message) as error:
        shards.read_row(row, ["image"])
    assert shards.AGAIN not in str(error.value)


def test_percentiles_of_scaled_images_are_refused(tmp_path: Path) -> None:
    """`predict` measures percentiles before it scales an image; averaged pixels have less noise, so others."""
    scaled, percentile = Scale(pixel_scale=0.25, diameter=22.568), choose([], "percentile")
    first, second = write(tmp_path / "a", percentile, scale=scaled), write(tmp_path / "b", scale=scaled)
    with pytest.raises(UserError, match=f"scaled before their percentiles .* --intensity-from {first}"):
        combined.list_rows(combined.of([first, second]), "train")
    same, unscaled = write(tmp_path / "c", percentile, scale=scaled), write(tmp_path / "d")
    data = combined.of([first, same, unscaled])
    assert [combined.list_rows(data, "train")[index].rule for index in (0, 4, 8)] == [None, None, percentile]


def test_datasets_of_other_pixel_scales_need_cells_of_the_same_size(tmp_path: Path) -> None:
    def scale(other: Scale, first: Scale) -> tuple[Scale, list[str]]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        data = combined.of([write(folder / "a", scale=first), write(folder / "b", scale=other)])
        return combined.scale(data), combined.scale_notes(data)

    half = Scale(pixel_scale=0.5, diameter=14.0, diameters=(12.0, 16.0))
    same = Scale(pixel_scale=0.25, diameter=15.0, diameters=(14.0, 18.0))
    joint, notes = scale(same, half)
    assert joint == half.model_copy(update={"diameters": (12.0, 18.0)})
    assert len(notes) == 1
    assert "/b need `raylivecell predict --diameter 60`: their pixel scale is 0.25, that of the network 0.5" in notes[0]
    assert half.factor(60) == pytest.approx(same.pixel_scale, rel=0.1)
    assert scale(Scale(pixel_scale=0.5), half) == (half, []), "of unknown cell size"
    assert scale(Scale(pixel_scale=0.5, diameter=60), half) == (half, []), "large cells, scaled alike"
    for other in (Scale(diameter=112.0), Scale()):
        with pytest.raises(UserError, match=r"/b has cells of .*/a has cells of 14.0 px .* --diameter-from .*/a`"):
            scale(other, half)
    with pytest.raises(UserError, match=r"cells of unknown size at pixel scale 0.5: .* prepare --pixel-scale 0.5`"):
        scale(Scale(diameter=3.0), Scale(pixel_scale=0.5))


def test_provenance_and_description_name_all_datasets(tmp_path: Path) -> None:
    first = write(tmp_path / "a", name="LIVECell", licence="CC BY-NC 4.0", citation="Edlund 2021")
    second = write(tmp_path / "b", name="mine", licence="CC0")
    data, other = combined.of([first, second], [1, 2]), combined.of([first, second], [2, 1])
    record = combined.provenance(data)
    assert record["name"] == "LIVECell + mine"
    assert record["licence"] == "LIVECell: CC BY-NC 4.0; mine: CC0"
    assert record["citation"] == "Edlund 2021 not stated"
    assert [values["sha256"] for values in record["datasets"]] == [
        shards.provenance(uri)["sha256"] for uri in data.uris
    ]
    assert combined.description(data)["splits"]["train"] == {"images": 8, "cells": 8}
    out = str(tmp_path / "run")
    folder.initialise(out, data, "seed: 0")
    assert folder.check_resumable(out, data, True)
    for changed in (other, first, combined.of([second, first], [1, 2])):
        with pytest.raises(UserError, match=r"started on another dataset, .* or with other --data-weights"):
            folder.check_resumable(out, changed, True)


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        ((), (), "--data needs a value"),
        (("a", "a"), (), "given twice; use --data-weights"),
        (("a", "b"), (1,), "1 weights for 2 datasets"),
        (("a",), (1, 2), "2 weights for 1 datasets"),
        (("a", "b"), (1, 0), "must be above 0"),
        (("a", "b"), (1, float("nan")), "must be above 0"),
    ],
)
def test_wrong_flags_are_refused(names: tuple[str, ...], weights: tuple[float, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        combined.of(names, weights)


def test_a_weight_too_small_for_one_sample_is_refused(tmp_path: Path) -> None:
    data = combined.of([write(tmp_path / "a"), write(tmp_path / "b")], [1, 0.001])
    with pytest.raises(UserError, match=r"the weight of .*/b gives it less than one of an epoch's samples"):
        preflight.samples_fit(data, Recipe(phases=(PhaseConfig(epochs=1),)))
