"""A run's progress, and which of its checkpoints are complete, the latest and the best. Imports no torch."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from raylivecell.core import addresses, storage
from raylivecell.core.errors import UserError

FOLDER = "checkpoint_"
MODEL, STATE, RECIPE = "model.safetensors", "state.json", "recipe.yaml"


@dataclass
class Progress:
    """Steps done and the history of metrics."""

    step: int = 0
    """Optimiser steps done; step * batch size is the position in the run's sample order."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """One row of metrics for each report, oldest first."""

    def score(self) -> float:
        """`validation_score` of the report at this step; -1 between two reports."""
        return validation_score(self.history[-1]) if self.reported() else -1.0

    def reported(self) -> bool:
        """Whether the last row of the history belongs to this step."""
        return bool(self.history) and self.history[-1]["step"] == self.step


def validation_score(row: dict[str, Any]) -> float:
    """Validation score that ranks checkpoints: mSA for instance recipes, else mean per-image Dice."""
    return float(row.get("val_msa", row.get("val_mean_image_dice", -1.0)))


def load_state(folder: str) -> Progress:
    """Progress saved with the checkpoint in `folder` (a URI); UserError if its file is missing or invalid."""
    uri = storage.join(folder, STATE)
    try:
        values = storage.read_json(uri)
    except FileNotFoundError as error:
        raise missing(folder, STATE) from error
    with storage.validating(uri, "use another checkpoint"):
        state = Progress(**values)
        state.score()
        if state.step < 0:
            raise ValueError(f"{state.step} steps")
    return state


def name(step: int) -> str:
    """Folder name of the checkpoint after `step` steps; names sort in the order of steps only below 1,000,000."""
    return f"{FOLDER}{step:06d}"


def find(uri: str) -> str:
    """`uri` itself if it is a checkpoint, else the best checkpoint of the run there; UserError if neither."""
    if MODEL in storage.list_names(uri):
        return uri
    states = _states(uri)
    if not states and RECIPE in storage.list_names(uri):
        raise UserError(f"no checkpoint at {uri} yet: wait for the first report of the run there, or give another run")
    if not states:
        raise UserError(f"no checkpoint at {uri}: give a run's folder (the --out of `train`) or a checkpoint_* in it")
    # The highest score, then the most steps.
    return max(states, key=lambda folder: (states[folder].score(), states[folder].step, folder))


def latest(run: str) -> str | None:
    """The complete checkpoint with the most steps in the folder `run`, if any."""
    states = _states(run)
    return max(states, key=lambda folder: (states[folder].step, folder), default=None)


def delete_all_but(run: str, steps: Collection[int]) -> None:
    """Delete all checkpoints in the folder `run` except those after `steps` steps."""
    _delete_except(run, {name(step) for step in steps})


def delete_all_but_best(run: str) -> None:
    """Delete all checkpoints in the folder `run` except the best."""
    if _complete(run):
        _delete_except(run, {addresses.name(find(run))})


def _delete_except(run: str, names: Collection[str]) -> None:
    for entry in storage.list_names(run):
        if entry.startswith(FOLDER) and entry not in names:
            storage.delete(storage.join(run, entry))


def missing(folder: str, file: str) -> UserError:
    """Error for a checkpoint that lacks one of its files."""
    return UserError(f"checkpoint {folder} is incomplete: {file} is missing; use another checkpoint")


def _states(run: str) -> dict[str, Progress]:
    """Progress of each complete checkpoint in the folder `run`, by its address.

    A run deletes old checkpoints while others read the folder: one that is no longer complete is left out.
    """
    states = {}
    for folder in _complete(run):
        try:
            states[folder] = load_state(folder)
        except UserError:
            if storage.exists(storage.join(folder, RECIPE)):
                raise
    return states


def _complete(run: str) -> list[str]:
    """Folders of the run's complete checkpoints: those with a recipe, which is written last."""
    folders = [storage.join(run, entry) for entry in storage.list_names(run) if entry.startswith(FOLDER)]
    return [folder for folder in folders if storage.exists(storage.join(folder, RECIPE))]
