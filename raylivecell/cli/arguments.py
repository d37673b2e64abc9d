"""Arguments of the command line: the call of a command with them, and flags that are read before or after parsing."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from raylivecell.core.docstrings import unwrapped
from raylivecell.core.errors import UserError

if TYPE_CHECKING:
    from raylivecell.recipe import Recipe

FINETUNE, DISTILL = "finetune", "distill"
"""The shipped recipes for --start-from and --teacher."""

Resume = Literal["never", "auto", "always"]
"""Whether to resume the run in --out; `auto`: if there is one."""

FLAGS = ConstructorRegistry()
"""Parsers of types that tyro does not support."""


@FLAGS.primitive_rule
def _mapping(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[dict[str, Any]] | None:
    """A mapping from text to JSON values (`model.options`) as one JSON argument; None for any other type."""
    if get_origin(info.type) is not dict or get_args(info.type)[0] is not str or get_args(info.type)[1] is str:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="JSON",
        instance_from_str=lambda arguments: _json_mapping(arguments[0]),
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [json.dumps(value)],
    )


def _json_mapping(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is not JSON ({error}); example: '{{\"init_filters\": 16}}'") from error
    if not isinstance(value, dict):
        raise ValueError(f"{text!r} is not a mapping; example: '{{\"init_filters\": 16}}'")
    return value


PREPARE_FLAGS = ConstructorRegistry()
"""As `FLAGS`, for `prepare`."""


@PREPARE_FLAGS.primitive_rule
def _rules(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[dict[str, str]] | None:
    """Construct a mapping of text to text (`on_defect`) from words KIND=RULE; None for any other type."""
    if get_origin(info.type) is not dict or get_args(info.type) != (str, str):
        return None
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="KIND=RULE [KIND=RULE ...]",
        instance_from_str=lambda words: dict(word.partition("=")[::2] for word in words),
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [f"{kind}={rule}" for kind, rule in value.items()],
    )


def join_repeated(flag: str, arguments: Sequence[str]) -> list[str]:
    """Return `arguments` with all values of `flag` after a single one at the end: the parser uses only the last."""
    values, remaining = _separate(flag, arguments)
    return [*remaining, flag, *values] if len(remaining) < len(arguments) else remaining


def values_of(flag: str, arguments: Sequence[str]) -> list[str]:
    """All values of a flag that may be repeated or have several values."""
    return _separate(flag, arguments)[0]


def _separate(flag: str, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The values of `flag`, and all other arguments."""
    values: list[str] = []
    remaining: list[str] = []
    in_flag = False
    for word in arguments:
        name, equals, value = word.partition("=")
        if name.replace("_", "-") == flag:
            in_flag = True
            values += [value] if equals else []
        elif in_flag and not word.startswith("-"):
            values.append(word)
        else:
            in_flag = False
            remaining.append(word)
    return values, remaining


def call(
    command: Callable[..., Any], name: str, arguments: Sequence[str], registry: ConstructorRegistry = FLAGS
) -> Any:
    """Parse `arguments` as the parameters of `command` and call it; its docstring is the help text."""
    command.__doc__ = unwrapped(command.__doc__ or "")
    return tyro.cli(command, prog=f"raylivecell {name}", args=arguments, registry=registry)


def recipe_file(arguments: Sequence[str]) -> str | None:
    """Path or URI of the recipe file: --recipe, otherwise the recipe of the run that --resume continues."""
    recipe, out = value_of("--recipe", arguments), value_of("--out", arguments)
    if recipe is not None:
        from raylivecell import recipe as recipes

        return recipes.find(recipe)
    if out is None or not _resumed(arguments, out):
        return None
    from raylivecell.core import storage
    from raylivecell.runs import folder

    return storage.join(out, folder.RECIPE)


def base_recipe(arguments: Sequence[str]) -> "Recipe":
    """The recipe whose values are the defaults of the flags of `train` and `check`.

    With --start-from, the network and the targets are the parent's unless the recipe file states them, and the default
    recipe is `finetune`; with --teacher it is `distill`. A resumed run has them in its own recipe: its parent may no
    longer exist.
    """
    from raylivecell import recipe as recipes
    from raylivecell.core import settings, storage
    from raylivecell.runs import parents, progress

    file, parent, out = recipe_file(arguments), value_of("--start-from", arguments), value_of("--out", arguments)
    run = out if out is not None and _resumed(arguments, out) else None
    if run is not None and parents.of_run(run):
        inherited = recipes.load(storage.join(run, progress.RECIPE))
    elif parent is not None:
        inherited = recipes.load(storage.join(progress.find(storage.absolute(parent)), progress.RECIPE))
    elif value_of("--recipe", arguments) == FINETUNE:
        raise UserError(f"recipe {FINETUNE} has no network: give --start-from CHECKPOINT, or use another recipe")
    else:
        file = file or (recipes.find(DISTILL) if value_of("--teacher", arguments) else None)
        return recipes.load(file) if file else recipes.Recipe()
    file = file or recipes.find(FINETUNE)
    values = inherited.model_dump(mode="json", include={"model", "targets"}) | settings.read(file)
    values.pop(recipes.SWEEP, None)
    return recipes.parse(values, file)


def _resumed(arguments: Sequence[str], out: str) -> bool:
    from raylivecell.runs import folder

    return value_of("--resume", arguments) in ("auto", "always") and folder.holds_run(out)


def resumes(mode: Resume, out: str) -> bool:
    """Whether to resume a run at `out`; with `always` and no run, the command itself raises a UserError."""
    from raylivecell.runs import folder

    return mode == "always" or (mode == "auto" and folder.holds_run(out))


def value_of(flag: str, arguments: Sequence[str]) -> str | None:
    """Value of `--flag VALUE` or `--flag=VALUE`, if given; UserError if it is given twice or without a value."""
    positions = [index for index, text in enumerate(arguments) if text.split("=", 1)[0].replace("_", "-") == flag]
    if not positions:
        return None
    if len(positions) > 1:
        raise UserError(f"{flag} is given twice; give it once")
    _, equals, value = arguments[positions[0]].partition("=")
    if equals:
        return value
    if positions[0] + 1 == len(arguments):
        raise UserError(f"{flag} needs a value")
    return arguments[positions[0] + 1]


def local(out: Path) -> Path:
    """Return `out` if it is a local path, else raise a UserError: other commands read it by local paths."""
    if ":/" in str(out):
        raise UserError(f"--out {out}: this command writes to a local folder; copy it to an object store afterwards")
    return out


def workers_in(text: str, flag: str = "--workers") -> int | tuple[int, int]:
    """Parse the value of a flag for processes: N, or MIN:MAX as (min, max)."""
    try:
        counts = [int(part) for part in text.split(":")]
    except ValueError:
        counts = []
    if not 1 <= len(counts) <= 2 or counts != sorted(counts) or counts[0] < 1:
        raise UserError(f"{flag} {text}: give a number (2), or MIN:MAX (1:4)")
    return counts[0] if len(counts) == 1 else (counts[0], counts[1])
