"""Learn the maps of another network, the teacher.

1. `open_teacher`  reads a checkpoint and checks that its maps fit the recipe and the data (in the driver)
2. `load`          loads the copy in the run's folder (in each worker)

A teacher may be any network of this project: only its maps are used, not its weights.
"""

import hashlib
from typing import NamedTuple

import torch
from torch import nn

from raylivecell import recipe as recipes
from raylivecell.core import storage
from raylivecell.core.errors import UserError
from raylivecell.images.intensity import Intensity
from raylivecell.images.scale import Scale
from raylivecell.runs import checkpoint, parents, progress, teachers
from raylivecell.runs.parents import DataRecord
from raylivecell.runs.teachers import Teacher

COPIED = (progress.MODEL, progress.RECIPE, checkpoint.INTENSITY)
"""Files of a checkpoint that `load` needs."""


class Opened(NamedTuple):
    """A teacher that fits."""

    teacher: Teacher
    recipe: recipes.Recipe
    files: dict[str, bytes]
    """Content of its files by name, as `teachers.store` copies them."""


def open_teacher(uri: str, recipe: recipes.Recipe, rule: Intensity | None = None, scale: Scale | None = None) -> Opened:
    """Read the checkpoint or run at `uri` as the teacher of a network of `recipe`; writes nothing, executes no code.

    Args:
        uri: of a checkpoint or run.
        recipe: of the new network.
        rule: intensity rule of its dataset; None: not compared.
        scale: of its dataset; None: not compared.

    Raises:
        UserError: no checkpoint there or an invalid one; other targets, intensities or pixels than those of the new
            network; crops that are too small for it.
    """
    uri = storage.absolute(uri)
    folder = progress.find(uri)
    _, teacher_recipe = checkpoint.load_model(folder)
    _check_fits(uri, folder, teacher_recipe, recipe)
    if rule is not None and not rule.same_levels(checkpoint.load_intensity(folder)):
        raise UserError(
            f"--teacher {uri}: it was trained on other grey levels than the data has; prepare the data again with "
            f"`raylivecell prepare --intensity-from {uri}`"
        )
    trained = checkpoint.load_scale(folder)
    if scale is not None and not scale.fits(trained):
        raise UserError(
            f"--teacher {uri}: it was trained on {trained}, the data has {scale}; prepare the data again with "
            f"`raylivecell prepare {trained.prepare_flag(uri)}`"
        )
    own_data = DataRecord.of(checkpoint.own_data(folder))
    earlier = (*parents.datasets(parents.read(folder)), *checkpoint.teacher_data(folder))
    datasets = tuple(dict.fromkeys((own_data, *earlier)))
    if len(datasets) > parents.MAX_DATASETS:
        raise UserError(f"--teacher {uri}: {len(datasets)} datasets are behind it; use a network trained from scratch")
    files = {name: checkpoint.read_file(folder, name) for name in COPIED}
    teacher = Teacher(
        teacher=uri,
        checkpoint=folder,
        sha256=hashlib.sha256(files[progress.MODEL]).hexdigest(),
        step=progress.load_state(folder).step,
        network=teacher_recipe.network,
        datasets=datasets,
    )
    return Opened(teacher, teacher_recipe, files)


def _check_fits(uri: str, folder: str, teacher_recipe: recipes.Recipe, recipe: recipes.Recipe) -> None:
    """UserError if a teacher has other targets than `recipe`, or cannot process its crops."""
    if teacher_recipe.targets != recipe.targets:
        raise UserError(
            f"--teacher {uri}: its targets are {teacher_recipe.targets}, those of the recipe {recipe.targets}; set "
            f"--targets {teacher_recipe.targets}, or use another teacher"
        )
    if recipe.crop is not None and min(recipe.crop) < teacher_recipe.model.min_side:
        side = teacher_recipe.model.min_side
        raise UserError(f"--teacher {uri}: {folder} needs images of at least {side} x {side} pixels; set a larger crop")


def load(run: str, device: torch.device) -> nn.Module:
    """The teacher of the run in the folder `run`, in evaluation mode, without gradients, on `device`.

    Raises:
        UserError: it is missing, or not the recorded one.
    """
    folder = storage.join(run, teachers.FOLDER)
    teacher = teachers.read(folder)
    content = checkpoint.read_file(folder, progress.MODEL)
    if teacher is None or hashlib.sha256(content).hexdigest() != teacher.sha256:
        raise UserError(f"{folder}/{progress.MODEL} is not the teacher that the run started with; start a new run")
    network, _ = checkpoint.load_network(folder, device)
    return network.requires_grad_(False)
