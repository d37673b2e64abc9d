"""Checkpoints are restored unchanged, and loading an untrusted one executes no code."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from raylivecell.core import storage
from raylivecell.core.errors import UserError
from raylivecell.network.unet import build_model
from raylivecell.recipe import ModelConfig, Recipe
from raylivecell.runs import checkpoint, progress
from raylivecell.training import loop

RECIPE = Recipe(model=ModelConfig(features=(4, 8)))


def save(folder: Path, score: float, steps: int = 3) -> loop.TrainState:
    training = loop.start(build_model(RECIPE.model), RECIPE.optimizer, 10)
    training.model(torch.rand(1, 1, 16, 16)).mean().backward()
    training.optimizer.step()
    state = progress.Progress(steps, [{"step": steps, "val_mean_image_dice": score}])
    checkpoint.save(str(folder), training.network(), training.state_dict(), state, RECIPE)
    return training


def test_a_checkpoint_is_restored_unchanged(tmp_path: Path) -> None:
    training = save(tmp_path, 0.5)
    model, recipe = checkpoint.load_model(str(tmp_path))
    values, state = checkpoint.load_training(str(tmp_path))
    assert recipe == RECIPE
    assert not model.training
    assert state == progress.Progress(3, [{"step": 3, "val_mean_image_dice": 0.5}])
    for a, b in zip(model.parameters(), training.model.parameters()):
        assert torch.equal(a, b)
    restored = loop.start(build_model(RECIPE.model), RECIPE.optimizer, 10)
    restored.load(values, state)
    for a, b in zip(
        restored.optimizer.state_dict()["state"].values(), training.optimizer.state_dict()["state"].values()
    ):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_find_returns_the_best_complete_checkpoint_of_a_run(tmp_path: Path) -> None:
    save(tmp_path / "checkpoint_1", 0.9)
    save(tmp_path / "checkpoint_2", 0.7)
    save(tmp_path / "checkpoint_3", 0.95)
    (tmp_path / "checkpoint_3" / "recipe.yaml").unlink()
    assert progress.find(str(tmp_path)).endswith("checkpoint_1")


def test_a_folder_without_a_checkpoint_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint at"):
        checkpoint.load_model(str(tmp_path))


def test_weights_of_another_network_are_rejected(tmp_path: Path) -> None:
    save(tmp_path, 0.5)
    text = (tmp_path / "recipe.yaml").read_text()
    (tmp_path / "recipe.yaml").write_text(text.replace("- 4\n  - 8", "- 4\n  - 16"))
    with pytest.raises(UserError, match="weights"):
        checkpoint.load_model(str(tmp_path))


class Hostile:
    """Object whose pickle creates a file when loaded."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return (Path.touch, (Path(self.marker),))


@pytest.mark.parametrize("name", [checkpoint.TRAINING, progress.MODEL])
def test_a_malicious_pickle_is_not_executed(tmp_path: Path, name: str) -> None:
    save(tmp_path, 0.5)
    marker = tmp_path / "executed"
    (tmp_path / name).write_bytes(pickle.dumps(Hostile(str(marker))))
    with pytest.raises(UserError, match=name):
        checkpoint.load_training(str(tmp_path)) if name == checkpoint.TRAINING else checkpoint.load_model(str(tmp_path))
    assert not marker.exists()


def test_writes_are_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "deep" / "file"
    storage.write_bytes(str(target), b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        storage.write_bytes(str(target), b"new")
    assert target.read_bytes() == b"old"
    assert [path.name for path in target.parent.iterdir()] == ["file"]


def test_the_latest_checkpoint_has_the_most_steps(tmp_path: Path) -> None:
    """Names sort by step only below a million; among equal scores the latest checkpoint is the best."""
    for steps in (999_999, 1_000_000, 200_000):
        save(tmp_path / progress.name(steps), 0.5, steps)
    assert progress.latest(str(tmp_path)) == str(tmp_path / "checkpoint_1000000")
    assert progress.find(str(tmp_path)) == str(tmp_path / "checkpoint_1000000")
    (tmp_path / "checkpoint_1000000" / "recipe.yaml").unlink()
    assert progress.latest(str(tmp_path)) == str(tmp_path / "checkpoint_999999"), (
        "an incomplete checkpoint does not count"
    )
    assert progress.latest(str(tmp_path / "none")) is None


def test_a_checkpoint_that_is_deleted_while_the_folder_is_read_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for steps in (1, 2):
        save(tmp_path / progress.name(steps), steps / 10, steps)
    read_json = storage.read_json

    def deleted_before(uri: str) -> Any:
        storage.delete(str(tmp_path / progress.name(2)))  # as Ray Train does with old ones
        return read_json(uri)

    monkeypatch.setattr(storage, "read_json", deleted_before)
    assert progress.latest(str(tmp_path)) == progress.find(str(tmp_path)) == str(tmp_path / progress.name(1))
    monkeypatch.undo()
    save(tmp_path / progress.name(3), 0.3)
    (tmp_path / progress.name(3) / "state.json").unlink()
    with pytest.raises(UserError, match=r"state.json is missing"):  # damaged, not deleted
        progress.latest(str(tmp_path))
