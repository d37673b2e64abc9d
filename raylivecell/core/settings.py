"""Settings from YAML files: strict pydantic models, and errors that name the field and the nearest right name."""

import difflib
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from raylivecell.core import storage
from raylivecell.core.docstrings import unwrapped
from raylivecell.core.errors import UserError

Model = TypeVar("Model", bound=BaseModel)
RECIPE_HINT = "give a YAML file, or the name of a shipped recipe (see `raylivecell recipes`)"


class StrictModel(BaseModel):
    """Base of all `*Config` models; the string under a field is its documentation (shown in `--help`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Remove the line breaks of the source from the fields' descriptions."""
        super().__pydantic_init_subclass__(**kwargs)
        for field in cls.model_fields.values():
            field.description = field.description and unwrapped(field.description)


class _Plain(yaml.SafeLoader):
    """Without aliases: nine lines of them can make a value of gigabytes, as soon as anyone prints it."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node; YAMLError for an alias."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"alias *{self.peek_event().anchor} in line {self.line + 1}; write it out")
        return super().compose_node(parent, index)


def read(uri: str | Path) -> dict[str, Any]:
    """The mapping in the YAML file at `uri`, unchecked; UserError where there is none."""
    try:
        text = storage.read_bytes(uri).decode()
    except FileNotFoundError as error:
        raise UserError(f"no recipe at {uri}; {RECIPE_HINT}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{uri} is not a recipe file: {error}; {RECIPE_HINT}") from error
    try:
        values = _Plain(text).get_single_data() or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{uri}: not YAML: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(values, dict):
        raise UserError(f"{uri}: a recipe is a mapping of fields, not a {type(values).__name__}")
    return values


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


def field_paths(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted paths of all fields, e.g. `optimizer.lr`."""
    paths = []
    for name, field in model.model_fields.items():
        nested = field.annotation
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            paths += field_paths(nested, f"{prefix}{name}.")
        else:
            paths.append(prefix + name)
    return paths


def nearest(path: str, model: type[BaseModel]) -> str:
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
