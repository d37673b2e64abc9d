"""The whole recipe: each part's model from beside its code, composed here; YAML in and out.

A recipe file names only what differs from the defaults. An unknown or ill-typed field is refused with its path and
the nearest right name.
"""

import difflib
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from raylivecell.core import storage
from raylivecell.core.errors import UserError
from raylivecell.core.settings import StrictModel
from raylivecell.ingest.augment import AugmentConfig
from raylivecell.ingest.order import PhaseConfig
from raylivecell.ingest.target_maps import CHANNELS, Targets
from raylivecell.training_config import LoopConfig, LossConfig, ModelConfig, OptimizerConfig

Model = TypeVar("Model", bound=BaseModel)

SWEEP = "sweep"
"""The part of a recipe file that says how to search (sweep/space.py); no part of the recipe itself."""

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
    targets: Targets = "foreground"
    """What is learnt: cell or not (the paper); also the boundaries of cells; also distances to their centres and
    boundaries, by which cells that touch are told apart best."""
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
        if self.model.name == "unet" and self.crop is not None and min(self.crop) < least:
            raise ValueError(f"crop: {len(self.model.features)} levels need at least {least} x {least} pixels")
        return self

    @model_validator(mode="after")
    def _gpu_transforms_the_foreground_alone(self) -> "Recipe":
        if self.augment.device == "cuda" and self.targets != "foreground":
            raise ValueError("augment.device: fields of cells are drawn on CPUs; use cpu, or targets: foreground")
        return self

    @property
    def outputs(self) -> int:
        """Channels of the network's output."""
        return len(CHANNELS[self.targets])


class _Plain(yaml.SafeLoader):
    """Without aliases: nine lines of them can make a value of gigabytes, as soon as anyone prints it."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node; YAMLError for an alias."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"alias *{self.peek_event().anchor} in line {self.line + 1}; write it out")
        return super().compose_node(parent, index)


def load(uri: str | Path) -> Recipe:
    """The recipe in the YAML file at `uri`; UserError naming the file, the field and the mend where it is wrong."""
    values = read(uri)
    values.pop(SWEEP, None)
    return parse(values, str(uri))


def read(uri: str | Path) -> dict[str, Any]:
    """The mapping in the YAML file at `uri`, unchecked; UserError where there is none."""
    try:
        text = storage.read_bytes(uri).decode()
    except FileNotFoundError as error:
        raise UserError(f"no recipe at {uri}; the recipes shipped are in jobs/*.yaml") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{uri} is no recipe file: {error}; name a YAML file such as jobs/small.yaml") from error
    try:
        values = _Plain(text).get_single_data() or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{uri}: not YAML: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(values, dict):
        raise UserError(f"{uri}: a recipe is a mapping of fields, not a {type(values).__name__}")
    return values


def parse(values: dict[str, Any], source: str) -> Recipe:
    """`values` as a Recipe; UserError beginning with `source` and the field's path where they are none."""
    return validate(Recipe, values, source)


def validate(model: type[Model], values: Any, source: str, part: str = "") -> Model:
    """`values` as a `model`, which is `part` of the file `source`; UserError naming the field and the mend."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(key) for key in first["loc"])
        path = ".".join(key for key in (part, place) if key) or "recipe"
        if first["type"] == "extra_forbidden":
            raise UserError(f"{source}: unknown field {path}{nearest(place, model)}") from error
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


def nearest(path: str, model: type[BaseModel] = Recipe) -> str:
    """`; did you mean X?` for a path that does not exist: the nearest name beside it, or path, or name anywhere."""
    paths = field_paths(model)
    section, _, last = f".{path}".rpartition(".")
    beside = {known.rpartition(".")[2]: known for known in paths if f".{known}".rpartition(".")[0] == section}
    sections = {known.rpartition(".")[0] for known in paths} - {""}
    by_name = {known.rpartition(".")[2]: known for known in paths}
    anywhere = {} if section and beside else {known: known for known in (*paths, *sections)}
    for known, wanted in ((beside, last), (anywhere, path), (by_name, last)):
        near = difflib.get_close_matches(wanted, known, n=1, cutoff=0.65)
        if near:
            return f"; did you mean {known[near[0]]}?"
    return f"; the fields {'there' if beside and section else ''} are {', '.join((beside or by_name).values())}"
