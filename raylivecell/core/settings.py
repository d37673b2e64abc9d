"""Settings from YAML files: strict pydantic models, and errors that name the field and the nearest valid name."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from raylivecell.core import storage
from raylivecell.core.docstrings import unwrapped
from raylivecell.core.errors import UserError

Model = TypeVar("Model", bound=BaseModel)
RECIPE_HINT = "give a YAML file, or the name of a shipped recipe (see `raylivecell recipes`)"


class StrictModel(BaseModel):
    """Base of all `*Config` models; the docstring below a field is its description in `--help`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Unwrap the fields' descriptions."""
        super().__pydantic_init_subclass__(**kwargs)
        for field in cls.model_fields.values():
            field.description = field.description and unwrapped(field.description)


class _Plain(yaml.SafeLoader):
    """YAML loader that rejects aliases: nine lines of them can expand to gigabytes when the value is printed."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose the next node; YAMLError for an alias."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"alias *{self.peek_event().anchor} in line {self.line + 1}; write it out")
        return super().compose_node(parent, index)


def read(uri: str | Path) -> dict[str, Any]:
    """Read the mapping in the YAML file at `uri`, without validation; UserError if there is no file or no mapping."""
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
    """Validate `values` as a `model`; UserError with the field and the fix.

    Args:
        model: class of the settings.
        values: mapping of fields.
        source: file name for the message.
        part: dotted path of `values` in the file.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(key) for key in first["loc"])
        path = ".".join(key for key in (part, place) if key) or "recipe"
        if first["type"] == "extra_forbidden":
            raise UserError(f"{source}: unknown field {path}{_hint(model, first['loc'])}") from error
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


def _hint(model: type[BaseModel], location: Sequence[str | int]) -> str:
    """`nearest` for an unknown field at `location`; if that is in a list of models (`phases.0`), its fields."""
    indices = [number for number, key in enumerate(location) if isinstance(key, int)]
    if not indices:
        return nearest(".".join(str(key) for key in location), model)
    for key in location[: indices[-1]]:
        if isinstance(key, str):
            annotation = model.model_fields[key].annotation
            model = next((item for item in get_args(annotation) if isinstance(item, type)), annotation)  # type: ignore[assignment]
    return nearest(".".join(str(key) for key in location[indices[-1] + 1 :]), model)


def nearest(path: str, model: type[BaseModel]) -> str:
    """Hint `; did you mean X?` for an unknown `path`: X is a name in its section, otherwise a path or a field name."""
    paths = field_paths(model)
    section, _, last = f".{path}".rpartition(".")
    siblings = {field.rpartition(".")[2]: field for field in paths if f".{field}".rpartition(".")[0] == section}
    sections = {field.rpartition(".")[0] for field in paths} - {""}
    by_name = {field.rpartition(".")[2]: field for field in paths}
    by_path = {} if section and siblings else {field: field for field in (*paths, *sections)}
    for candidates, word in ((siblings, last), (by_path, path), (by_name, last)):
        matches = difflib.get_close_matches(word, candidates, n=1, cutoff=0.65)
        if matches:
            return f"; did you mean {candidates[matches[0]]}?"
    section_words = "of this section " if siblings and section else ""
    return f"; the fields {section_words}are {', '.join((siblings or by_name).values())}"
