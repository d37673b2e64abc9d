"""`prepare --format images`: images without annotations, whose pixels are all ignored, for training with a teacher."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
from conftest import write_tiny_dataset
from prepare_source import HEIGHT, WIDTH, counts, files_of, pixels

from raylivecell.core.errors import UserError
from raylivecell.data import combined, shards
from raylivecell.data.config import PrepareConfig
from raylivecell.data.prepare import prepare
from raylivecell.inference import evaluate
from raylivecell.ingest import blocks
from raylivecell.ingest.order import SampleSchedule
from raylivecell.recipe import AugmentConfig, DistillationConfig, PhaseConfig, Recipe
from raylivecell.targets.registry import Targets
from raylivecell.targets.sample_planes import FOREGROUND, IGNORED
from raylivecell.training import preflight

pytest_plugins = ["prepare_fixtures"]

IMAGES = PrepareConfig(format="images")
TAUGHT = Recipe(distillation=DistillationConfig(weight=0.5), phases=(PhaseConfig(epochs=1),))


def write_images(source: Path, *names: str) -> None:
    for seed, name in enumerate(names):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(source / name, pixels(seed, [[0, 0, 20, 20], [10, 30, 40, 40]]))


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("targets", ["foreground", "distance"])
def test_every_pixel_of_every_training_sample_is_ignored(tmp_path: Path, targets: Targets) -> None:
    """Files named like annotations are no images; a scaled dataset is ignored completely, too."""
    source, out = tmp_path / "source", tmp_path / "out"
    write_images(source, "a.tif", "well/b.tif", "train/images/c.tif", "masks/a.tif", "well/b_masks.tif")
    dataset = prepare(str(source), str(out), PrepareConfig(format="images", pixel_scale=0.7, licence="CC0-1.0"))
    assert counts(dataset) == {"train": (3, 0), "val": (0, 0), "test": (0, 0)}
    assert dataset["defects"]["found"] == []
    assert dataset["splits"]["train"]["ignored"]["images"] == 3
    assert dataset["scale"] == {"pixel_scale": 0.7, "diameter": None, "diameters": None}
    assert list(dataset["intensity"]["foreground"]) == [0.0, 1.0], "unknown"
    assert not shards.labelled(str(out))
    rows = shards.list_rows(str(out), "train")
    names = [shards.read_row(row, ["file_name"])["file_name"] for row in rows]
    assert names == ["a.tif", "train/c.tif", "well/b.tif"]
    schedule = SampleSchedule(0, 3, 3, (PhaseConfig(epochs=1, augmented_copies=1),))
    source_of = blocks.Source(rows, schedule, AugmentConfig(), (40, 50), (0, 0), targets=targets)
    for step in range(2):
        planes = blocks.load(schedule.rows(step), source_of)
        assert (planes[:, FOREGROUND] == IGNORED).all()
        assert not planes[:, FOREGROUND + 1 :].any()
        assert planes[:, 0].std() > 0
    files = files_of(out)
    prepare(str(source), str(out), PrepareConfig(format="images", pixel_scale=0.7, licence="CC0-1.0"))
    assert files_of(out) == files
    assert pytest.approx(shards.read_row(rows[0], [])["height"], abs=1) == 0.7 * HEIGHT
    assert pytest.approx(shards.read_row(rows[0], [])["width"], abs=1) == 0.7 * WIDTH


@pytest.mark.usefixtures("no_ray")
def test_images_for_other_splits_and_settings_for_annotations_are_refused(tmp_path: Path) -> None:
    source, out = tmp_path / "source", str(tmp_path / "out")
    write_images(source, "train_val/a.tif", "test/b.tif")
    with pytest.raises(UserError, match=r"test/b\.tif is in a folder named after another split; .* --images FOLDER"):
        prepare(str(source), out, IMAGES)
    config = IMAGES.model_copy(update={"images": "train_val"})
    assert counts(prepare(str(source), out, config))["train"] == (1, 0)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.json").write_text("{}")
    with pytest.raises(UserError, match=r"no image in .*empty"):
        prepare(str(tmp_path / "empty"), str(tmp_path / "none"), IMAGES)
    for setting in ({"split": (0.8, 0.1, 0.1)}, {"ignore": ("255",)}, {"diameter_from": "runs/a"}):
        with pytest.raises(ValueError, match="is for annotated images: leave it out with --format images"):
            PrepareConfig(format="images", **setting)  # type: ignore[arg-type]


@pytest.mark.usefixtures("no_ray")
def test_images_without_annotations_need_a_teacher_and_an_annotated_dataset_in_front(tmp_path: Path) -> None:
    labelled, unlabelled = write_tiny_dataset(tmp_path / "labelled"), str(tmp_path / "unlabelled")
    write_images(tmp_path / "source", "a.tif", "b.tif")
    prepare(str(tmp_path / "source"), unlabelled, IMAGES)
    both, reverse = combined.of([labelled, unlabelled]), combined.of([unlabelled, labelled])
    for data in (both, unlabelled):
        preflight.samples_fit(data, TAUGHT)
        preflight.teacher(data, TAUGHT, True)
        with pytest.raises(UserError, match=f"{unlabelled} has no annotations, so that nothing can be learned"):
            preflight.teacher(data, Recipe(), False)
    with pytest.raises(UserError, match="give --data of an annotated dataset first"):
        preflight.teacher(reverse, TAUGHT, True)
    assert combined.scale(both) == shards.scale(labelled), "of the cells that are known"
    more = str(tmp_path / "more")
    prepare(str(tmp_path / "source"), more, IMAGES)
    assert combined.scale(combined.of([unlabelled, more])) == shards.scale(unlabelled)
    scaled = str(tmp_path / "scaled")
    prepare(str(tmp_path / "source"), scaled, PrepareConfig(format="images", pixel_scale=0.5))
    with pytest.raises(UserError, match=r"cells of unknown size at pixel scale 0.5, .* prepare --pixel-scale 1`"):
        combined.scale(combined.of([labelled, scaled]))
    with pytest.raises(UserError, match="has no annotations to compare with"):
        evaluate._list_rows(unlabelled, "train")
    assert len(combined.list_rows(both, "val")) == 3
    image = blocks.read_sample(combined.list_rows(both, "train")[12])
    assert isinstance(image, np.ndarray)
    assert (image[FOREGROUND] == IGNORED).all()
