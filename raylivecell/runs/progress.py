"""How far a run has come, and which of its checkpoints are complete, the latest and the best. Imports no torch."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from raylivecell.core import storage
from raylivecell.core.errors import UserError

FOLDER = "checkpoint_"
MODEL, STATE, RECIPE = "model.safetensors", "state.json", "recipe.yaml"


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    """Optimiser steps done; times the batch size, the samples done: the place in the run's order."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """One row of metrics for each report, oldest first."""

    def score(self) -> float:
        """`validation_score` of the report at this step, by which checkpoints are compared; -1 between two reports."""
        return validation_score(self.history[-1]) if self.reported() else -1.0

    def reported(self) -> bool:
        """Whether the last row of the history is of this step."""
        return bool(self.history) and self.history[-1]["step"] == self.step


def validation_score(row: dict[str, Any]) -> float:
    """The validation score of a row of the history: mSA where the network segments single cells, else mean Dice."""
    return float(row.get("val_msa", row.get("val_mean_image_dice", -1.0)))


def load_state(folder: str) -> Progress:
    """The state that the checkpoint in `folder` (a URI) was saved with; UserError where its file is missing or bad."""
    place = storage.join(folder, STATE)
    try:
        values = storage.read_json(place)
    except FileNotFoundError as error:
        raise missing(folder, STATE) from error
    with storage.validating(place, "use another checkpoint"):
        state = Progress(**values)
        state.score()
        if state.step < 0:
            raise ValueError(f"{state.step} steps")
    return state


def name(step: int) -> str:
    """The folder of the checkpoint after `step` steps; their names sort as their steps do only below 1,000,000."""
    return f"{FOLDER}{step:06d}"


def find(uri: str) -> str:
    """`uri` itself where it is a checkpoint, else the best checkpoint of the run there; UserError where neither is."""
    if MODEL in storage.list_names(uri):
        return uri
    complete = _complete(uri)
    if not complete:
        raise UserError(f"no checkpoint at {uri}: give a run's folder (the --out of `train`) or a checkpoint_* in it")
    return max(complete, key=_score_and_step)


def latest(run: str) -> str | None:
    """The complete checkpoint in the folder `run` with the most steps; none where there is none."""
    return max(_complete(run), key=lambda folder: (load_state(folder).step, folder), default=None)


def delete_all_but(run: str, steps: Collection[int]) -> None:
    """Delete all checkpoints in the folder `run` but those named for `steps`."""
    kept = {name(step) for step in steps}
    for found in storage.list_names(run):
        if found.startswith(FOLDER) and found not in kept:
            storage.delete(storage.join(run, found))


def delete_all_but_best(run: str) -> None:
    """Delete all checkpoints in the folder `run` but the best."""
    if not _complete(run):
        return
    best = find(run)
    for found in storage.list_names(run):
        if found.startswith(FOLDER) and storage.join(run, found) != best:
            storage.delete(storage.join(run, found))


def missing(folder: str, file: str) -> UserError:
    """The error for a checkpoint that lacks one of its files."""
    return UserError(f"checkpoint {folder} is not whole: {file} is missing; use another checkpoint")


def _score_and_step(folder: str) -> tuple[float, int, str]:
    """Sort key of the best checkpoint: of two with equal scores, the one trained longer."""
    state = load_state(folder)
    return state.score(), state.step, folder


def _complete(run: str) -> list[str]:
    """Folders of the run's complete checkpoints; the recipe is the last file of each to be written."""
    folders = [storage.join(run, found) for found in storage.list_names(run) if found.startswith(FOLDER)]
    return [folder for folder in folders if storage.exists(storage.join(folder, RECIPE))]
