"""The whole recipe: each part's model from beside its code, composed here; YAML in and out.

A recipe file names only what differs from the defaults. An unknown or ill-typed field is refused with its path and
the nearest right name.
"""

import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from raylivecell import storage
from raylivecell.augment import AugmentConfig
from raylivecell.errors import UserError
from raylivecell.loop import LoopConfig
from raylivecell.losses import LossConfig
from raylivecell.model import ModelConfig
from raylivecell.optimizer import OptimizerConfig
from raylivecell.order import PhaseConfig
from raylivecell.recipe_base import StrictModel

# First the plain images, then plain and transformed ones together.
PAPER_PHASES = (PhaseConfig(epochs=10), PhaseConfig(epochs=10, transformed=1))


class Recipe(StrictModel):
    """Everything that decides what is trained, and nothing of where."""

    seed: int = Field(0, ge=0)
    """Of the weights, the order of the samples, and every random transformation."""
    batch_size: int = Field(2, ge=1)
    """Images in an optimiser step, over all workers together."""
    crop: tuple[int, int] | None = (333, 434)
    """Height and width of the random crops trained on, pixels; none: whole images, which then must be equally large."""
    phases: tuple[PhaseConfig, ...] = Field(PAPER_PHASES, min_length=1)
    """The parts of the training, one after the other."""
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    augment: AugmentConfig = AugmentConfig()
    loop: LoopConfig = LoopConfig()

    @model_validator(mode="after")
    def _crop_fits_network(self) -> "Recipe":
        least = 2 ** len(self.model.features)
        if self.crop is not None and min(self.crop) < least:
            raise ValueError(f"crop: {len(self.model.features)} levels need at least {least} x {least} pixels")
        return self


def load(uri: str | Path) -> Recipe:
    """The recipe in the YAML file at `uri`; UserError naming the file, the field and the mend where it is wrong."""
    try:
        text = storage.read_bytes(uri).decode()
    except FileNotFoundError as error:
        raise UserError(f"no recipe at {uri}; the recipes shipped are in jobs/*.yaml") from error
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{uri}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{uri}: a recipe is a mapping of fields, not a {type(values).__name__}")
    return parse(values, str(uri))


def parse(values: dict[str, Any], source: str) -> Recipe:
    """`values` as a Recipe; UserError beginning with `source` and the field's path where they are none."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = [str(part) for part in first["loc"]]
        path = ".".join(place) or "recipe"
        if first["type"] == "extra_forbidden":
            raise UserError(f"{source}: unknown field {path}{_nearest(place)}") from error
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{source}: {path}: {message} (got {first['input']!r})"[:500]) from error


def dump(recipe: Recipe) -> str:
    """The whole recipe as YAML, every field written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def field_paths(model: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    """Dotted paths of all fields, e.g. `optimizer.lr`."""
    paths = []
    for name, field in model.model_fields.items():
        nested = field.annotation
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            paths += field_paths(nested, f"{prefix}{name}.")
        else:
            paths.append(prefix + name)
    return paths


def _nearest(place: list[str]) -> str:
    """`; did you mean X?` for a path that does not exist: by the whole path, then by its last part alone."""
    paths = field_paths()
    sections = sorted({path.rsplit(".", 1)[0] for path in paths if "." in path})
    near = difflib.get_close_matches(".".join(place), [*paths, *sections], n=1)
    if not near:
        by_name = {path.rsplit(".", 1)[-1]: path for path in paths}
        near = [by_name[name] for name in difflib.get_close_matches(place[-1], by_name, n=1)]
    return f"; did you mean {near[0]}?" if near else f"; the fields are {', '.join(paths)}"
