"""Distillation on Ray: labelled and unlabelled images, two workers, a restart without the original teacher."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from raylivecell.core.errors import UserError
from raylivecell.data.config import PrepareConfig
from raylivecell.data.prepare import prepare
from raylivecell.network.unet import build_model
from raylivecell.recipe import (
    DistillationConfig,
    LoopConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    PhaseConfig,
    Recipe,
)
from raylivecell.runs import checkpoint, progress, teachers
from raylivecell.training.train import train

RECIPE = Recipe(
    batch_size=4,
    crop=(32, 40),
    targets="distance",
    phases=(PhaseConfig(steps=8, augmented_copies=1),),
    model=ModelConfig(features=(4, 8), norm="group"),
    loss=LossConfig(aux_weight=2),
    distillation=DistillationConfig(weight=0.5),
    optimizer=OptimizerConfig(lr=2e-3, ema_decay=0.5),
    loop=LoopConfig(report_steps=4, precision="float32"),
)


def write_unlabelled(source: Path, out: Path) -> str:
    """Prepare four images of noise without annotations."""
    source.mkdir()
    rng = np.random.default_rng(0)
    for number in range(4):
        assert cv2.imwrite(str(source / f"{number}.png"), rng.integers(100, 160, (50, 60)).astype(np.uint8))
    prepare(str(source), str(out), PrepareConfig(format="images", licence="CC0-1.0", name="noise"))
    return str(out)


def write_teacher(folder: Path) -> str:
    """A wider network with BatchNorm and random weights."""
    torch.manual_seed(3)
    recipe = RECIPE.model_copy(
        update={"model": ModelConfig(features=(6, 12, 16)), "distillation": DistillationConfig()}
    )
    data = {"name": "many cells", "licence": "CC BY 4.0", "citation": "Nobody 2026", "sha256": "ab" * 32, "uri": "x"}
    checkpoint.save(str(folder), build_model(recipe.model, 3), {}, progress.Progress(9), recipe, data)
    return str(folder)


@pytest.mark.slow
def test_a_distilled_run_restarts_without_its_teacher(tiny_dataset: str, ray_cluster: None, tmp_path: Path) -> None:
    """The second time on one worker, from the beginning: equal losses."""
    data = [tiny_dataset, write_unlabelled(tmp_path / "images", tmp_path / "unlabelled")]
    teacher, run = write_teacher(tmp_path / "teacher"), tmp_path / "run"
    with pytest.raises(UserError, match="unlabelled has no annotations, so that nothing can be learned"):
        train(data, str(run), RECIPE.model_copy(update={"distillation": DistillationConfig()}))
    assert not run.exists()
    train(data, str(run), RECIPE, workers=2, teacher=teacher)
    origin = teachers.read(progress.find(str(run)))
    assert origin is not None
    assert (origin.teacher, origin.step, origin.datasets[0].name) == (teacher, 9, "many cells")
    report = (run / "report.html").read_text()
    for text in (teacher, origin.sha256[:16], "unet, features 6-12-16", "CC BY 4.0"):
        assert text in report
    licence = checkpoint.load_data(progress.find(str(run)))["licence"]
    assert licence == "squares: none; noise: CC0-1.0; learned from a network trained on many cells (CC BY 4.0)"
    first = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in first] == [4, 8]
    shutil.rmtree(teacher)
    for path in run.glob("checkpoint_*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=f"learns from {teacher}, not from elsewhere"):
        train(data, str(run), RECIPE, resume=True, teacher="elsewhere")
    train(data, str(run), RECIPE, resume=True)
    second = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for old, new in zip(first, second, strict=True):
        for name in ("loss", "bce", "dice_loss", "aux_loss", "teacher_loss"):
            assert new[name] == pytest.approx(old[name], abs=1e-4), name
        assert old["loss"] == pytest.approx(
            0.5 * old["teacher_loss"] + 0.5 * (0.5 * old["bce"] + 0.5 * old["dice_loss"] + 2 * old["aux_loss"])
        )
    assert teachers.read(progress.find(str(run))) == origin
