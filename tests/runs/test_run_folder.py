"""A failed run releases its folder without losing a file."""

import re
from pathlib import Path

import pytest

from raylivecell import recipe as recipes
from raylivecell.cli import check
from raylivecell.core.errors import UserError
from raylivecell.network.unet import build_model
from raylivecell.recipe import ModelConfig, Recipe
from raylivecell.runs import checkpoint, folder, progress
from raylivecell.runs.folder import Failure
from raylivecell.runs.progress import Progress
from raylivecell.training import train

RECIPE = Recipe(model=ModelConfig(features=(2, 4)))


def start_run(out: Path, data: str, steps: int) -> None:
    """Write the files of a run with a checkpoint after `steps` (0: none)."""
    folder.initialise(str(out), data, recipes.dump(RECIPE))
    (out / folder.SNAPSHOT).write_text("{}")
    (out / "notes.txt").write_text("the user's own")
    if steps:
        state = Progress(steps, [{"step": steps, "val_mean_image_dice": 0.5}])
        checkpoint.save(str(out / progress.name(steps)), build_model(RECIPE.model), {}, state, RECIPE)
        (out / "tensorboard").mkdir()
        (out / "tensorboard" / "events").write_text("x")


@pytest.mark.parametrize("steps", [0, 40])
def test_a_failed_run_can_be_started_again_or_resumed(tiny_dataset: str, tmp_path: Path, steps: int) -> None:
    out = tmp_path / "run"
    start_run(out, tiny_dataset, steps)
    with pytest.raises(UserError, match="already contains a run"):
        folder.check_resumable(str(out), tiny_dataset, resume=False)
    assert folder.reopen(str(out), resume=True) is None, "an interrupted run is resumed without a message"
    for number in (1, 2):
        error = train._record_failure(str(out), "loss not finite at step 41", "; lower optimizer.lr")
        assert "; lower optimizer.lr; the same command then starts a new run" in str(error)
        assert ("--resume always continues after step 40" in str(error)) == bool(steps)
        assert folder.failure(str(out)) == Failure("loss not finite at step 41", steps)
        assert check.run_name(str(out)).level == "warn"
        assert folder.check_resumable(str(out), tiny_dataset, resume=True)
        assert not folder.check_resumable(str(out), tiny_dataset, resume=False)
        before = {path.relative_to(out) for path in out.rglob("*") if path.is_file()}
        line = folder.reopen(str(out), resume=False)
        assert (
            line
            == f"the run at {out} failed (loss not finite at step 41); starting again, its files are kept in "
            + (f"failed-{number}")
        )
        unmoved = {Path("notes.txt"), *(path for path in before if path.parts[0].startswith("failed-"))}
        moved = {Path(f"failed-{number}") / path for path in before - unmoved}
        assert {path.relative_to(out) for path in out.rglob("*") if path.is_file()} == unmoved | moved
        assert not folder.holds_run(str(out)), "no file is left that could be mistaken for the new run's"
        start_run(out, tiny_dataset, steps)
    folder.mark_failed(str(out), Failure("disk full", steps))
    line = folder.reopen(str(out), resume=True)
    assert line is not None
    assert ("after step 40" if steps else "from the start: it has no checkpoint") in line
    assert folder.failure(str(out)) is None
    assert folder.check_resumable(str(out), tiny_dataset, resume=True)


def test_a_failed_run_is_not_resumed_with_another_recipe(tiny_dataset: str, tmp_path: Path) -> None:
    start_run(tmp_path, tiny_dataset, 0)
    other = RECIPE.model_copy(update={"seed": 5})
    for failed, hint in ((False, f"{tmp_path}/recipe.yaml"), (True, "or start again without --resume always")):
        if failed:
            folder.mark_failed(str(tmp_path), Failure("loss not finite at step 3", 0))
        with pytest.raises(UserError, match=re.escape(hint) + "$"):
            train._check_run_folder(str(tmp_path), tiny_dataset, other, resume=True)
