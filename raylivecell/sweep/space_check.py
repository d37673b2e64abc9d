"""Check a search space against the starting recipe, before any trial runs."""

from collections.abc import Collection, Iterator
from typing import Any

from pydantic import ValidationError

from raylivecell.core.errors import UserError
from raylivecell.recipe import Recipe
from raylivecell.sweep import space
from raylivecell.sweep.space import Condition, Dimension, Shares, SweepConfig


def check(recipe: Recipe, config: SweepConfig) -> None:
    """Check a search against its starting recipe.

    Raises:
        UserError: an unknown field, a field searched twice, a condition on a field that is searched later, an objective
            that the recipe's targets do not have, a starting value outside its range, a range or an off value that no
            recipe accepts.
    """
    _check_fields(recipe, config)
    for index, (path, dimension) in enumerate(config.space.items()):
        for other, condition in dimension.when.items():
            _check_condition(recipe, config, index, path, other, condition)
    _check_objectives(recipe, config)
    space.start_parameters(recipe, config)
    for _ in variants(recipe, config):
        pass
    for shares in config.shares:
        _check_min(recipe, shares)
    for path, off in config.compare_off.items():
        space.apply(recipe, dict.fromkeys(space.tied_fields(config, path), off), "sweep.compare_off")


def _check_fields(recipe: Recipe, config: SweepConfig) -> None:
    """Raise UserError for a field that does not exist, is searched twice, or is part of another searched field."""
    paths: list[str] = []
    for path in space.searched_fields(config):
        space.get(recipe, path)
        if path in paths:
            raise UserError(f"sweep: {path} is searched twice; list it once")
        for other in paths:
            if _overlap(path, other):
                raise UserError(
                    f"sweep: {max(path, other, key=len)} is a part of {min(path, other, key=len)}; search one of them"
                )
        paths.append(path)
    if "targets" in paths:
        raise UserError("sweep.space: targets determines the objective; run one sweep for each of its values")


def _check_condition(
    recipe: Recipe, config: SweepConfig, index: int, path: str, other: str, condition: Condition
) -> None:
    """Raise UserError if a condition on `other` cannot be evaluated for the field `path`, at `index` in the space."""
    value = space.get(recipe, other)
    if condition.above is not None and value is not None and not space.is_number(value):
        raise UserError(f"sweep.space: {path} needs {other} above a number, but it is {value!r}; use `in`")
    for later, dimension in list(config.space.items())[index:]:
        if any(_overlap(field, other) for field in (later, *dimension.tied_to)):
            hint = "a field cannot depend on itself" if later == path else f"put {later} before it"
            raise UserError(f"sweep.space: {path} depends on {other}; {hint}")


def _check_objectives(recipe: Recipe, config: SweepConfig) -> None:
    """Raise UserError for an objective listed twice, or one that the recipe's targets do not have."""
    if len(set(config.objectives)) < len(config.objectives):
        raise UserError(f"sweep.objectives: {', '.join(config.objectives)} lists one twice; list it once")
    score = space.SCORES[recipe.targets].lower()
    other = "msa" if score == "dice" else "dice"
    if other in config.objectives:
        raise UserError(f"sweep.objectives: a recipe with targets {recipe.targets} has the score {score}, not {other}")


def variants(recipe: Recipe, config: SweepConfig) -> Iterator[tuple[str, Recipe]]:
    """Recipes with one searched field changed: to each of its choices, or to either end of its range.

    A check that fails for one of these would fail for trials. A value that only contradicts other fields of the recipe
    is skipped, because it may fit in other trials.

    Yields:
        The field's path, and the changed recipe.

    Raises:
        UserError: a value that the field never accepts, such as a negative learning rate.
    """
    for path, dimension in config.space.items():
        for value in _extremes(path, dimension, space.get(recipe, path)):
            try:
                yield path, space.apply(recipe, dict.fromkeys((path, *dimension.tied_to), value), "sweep.space")
            except UserError as error:
                if _is_refused(error, (path, *dimension.tied_to)):
                    raise


def _extremes(path: str, dimension: Dimension, start_value: Any) -> list[Any]:
    """The choices of a field, or the ends of its range; for the batch size, which workers must divide, every value."""
    if dimension.choices is not None:
        return list(dimension.choices)
    low, high = float(dimension.low or 0), float(dimension.high or 0)
    if not space.is_whole_range(dimension, start_value):
        return [low, high]
    if path == "batch_size" and not dimension.log:
        return list(range(int(low), int(high) + 1, int(dimension.step or 1)))
    return [int(low), int(high)]


def _check_min(recipe: Recipe, shares: Shares) -> None:
    """Raise UserError if a field does not accept its smallest or its largest share."""
    for path in shares.fields:
        for part in (shares.min, shares.min + space.parts_of(shares, recipe)[1]):
            try:
                space.apply(recipe, {path: part}, "sweep.shares")
            except UserError as error:
                if _is_refused(error, (path,)):
                    raise UserError(f"{error}; raise min, or change sum") from error


def _is_refused(error: UserError, paths: Collection[str]) -> bool:
    """Whether the value is invalid for its field in any recipe: not a `value_error`, which validators that compare
    fields may raise."""
    if not isinstance(error.__cause__, ValidationError):
        return False
    first = error.__cause__.errors()[0]
    return first["type"] != "value_error" and any(_overlap(".".join(map(str, first["loc"])), path) for path in paths)


def _overlap(a: str, b: str) -> bool:
    """Whether two paths are the same field, or one is a part of the other."""
    return f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.")
