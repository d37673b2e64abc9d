"""Checks of a search space against the recipe that a sweep starts from, before anything is spent."""

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
        UserError: an unknown field, one searched twice, a condition on a field that is searched later, an objective
            that the recipe's targets do not have, a start outside its range, a range or an off value that no recipe
            takes.
    """
    _check_fields(recipe, config)
    for place, (path, dimension) in enumerate(config.space.items()):
        for other, condition in dimension.when.items():
            _check_condition(recipe, config, place, path, other, condition)
    _check_objectives(recipe, config)
    space.start(recipe, config)
    for _ in variants(recipe, config):
        pass
    for shares in config.shares:
        _check_min(recipe, shares)
    for path, off in config.compare_off.items():
        space.apply(recipe, dict.fromkeys(space.tied_fields(config, path), off), "sweep.compare_off")


def _check_fields(recipe: Recipe, config: SweepConfig) -> None:
    """UserError for a field that does not exist, that is searched twice, or that is part of another searched field."""
    seen: list[str] = []
    for path in space.searched_fields(config):
        space.get(recipe, path)
        if path in seen:
            raise UserError(f"sweep: {path} is searched twice; name it once")
        for other in seen:
            if _overlap(path, other):
                raise UserError(
                    f"sweep: {max(path, other, key=len)} is a part of {min(path, other, key=len)}; search one"
                )
        seen.append(path)
    if "targets" in seen:
        raise UserError("sweep.space: targets decides what trials are judged by; sweep each of its values apart")


def _check_condition(
    recipe: Recipe, config: SweepConfig, place: int, path: str, other: str, condition: Condition
) -> None:
    """UserError where the condition of the field `path`, number `place`, cannot be evaluated when it is asked for."""
    value = space.get(recipe, other)
    if condition.above is not None and value is not None and not space.is_number(value):
        raise UserError(f"sweep.space: {path} needs {other} above a number, and it is {value!r}; use in")
    for later, dimension in list(config.space.items())[place:]:
        if any(_overlap(field, other) for field in (later, *dimension.tied_to)):
            hint = "a field cannot hang on itself" if later == path else f"put {later} before it"
            raise UserError(f"sweep.space: {path} hangs on {other}; {hint}")


def _check_objectives(recipe: Recipe, config: SweepConfig) -> None:
    """UserError for an objective named twice, or one that the recipe's targets do not have."""
    if len(set(config.objectives)) < len(config.objectives):
        raise UserError(f"sweep.objectives: {', '.join(config.objectives)} names one twice; name it once")
    judged = space.SCORES[recipe.targets].lower()
    other = "msa" if judged == "dice" else "dice"
    if other in config.objectives:
        raise UserError(f"sweep.objectives: a recipe of targets {recipe.targets} is judged by {judged}, not by {other}")


def variants(recipe: Recipe, config: SweepConfig) -> Iterator[tuple[str, Recipe]]:
    """The recipe with one searched field changed: to each of its choices, to either end of its range.

    What refuses one of these would refuse trials. A value that does not fit the rest of the recipe is left out, because
    it may fit other trials.

    Yields:
        The field's path, and the changed recipe.

    Raises:
        UserError: a value that the field never takes, such as a negative learning rate.
    """
    for path, dimension in config.space.items():
        for value in _extremes(path, dimension, space.get(recipe, path)):
            try:
                yield path, space.apply(recipe, dict.fromkeys((path, *dimension.tied_to), value), "sweep.space")
            except UserError as error:
                if _is_refused(error, (path, *dimension.tied_to)):
                    raise


def _extremes(path: str, dimension: Dimension, start_value: Any) -> list[Any]:
    """The choices of a field, or the ends of its range; of the batch size every value, as workers must divide it."""
    if dimension.choices is not None:
        return list(dimension.choices)
    low, high = float(dimension.low or 0), float(dimension.high or 0)
    if not space.is_complete(dimension, start_value):
        return [low, high]
    if path == "batch_size" and not dimension.log:
        return list(range(int(low), int(high) + 1, int(dimension.step or 1)))
    return [int(low), int(high)]


def _check_min(recipe: Recipe, shares: Shares) -> None:
    """UserError where one of the fields may not have the least, or the largest, part."""
    for path in shares.fields:
        for part in (shares.min, shares.min + space.parts_of(shares, recipe)[1]):
            try:
                space.apply(recipe, {path: part}, "sweep.shares")
            except UserError as error:
                if _is_refused(error, (path,)):
                    raise UserError(f"{error}; raise min, or change sum") from error


def _is_refused(error: UserError, paths: Collection[str]) -> bool:
    """Whether one of the fields never takes the value, whatever the rest of the recipe is: no `value_error`, which
    validators raise that may compare fields."""
    if not isinstance(error.__cause__, ValidationError):
        return False
    first = error.__cause__.errors()[0]
    return first["type"] != "value_error" and any(_overlap(".".join(map(str, first["loc"])), path) for path in paths)


def _overlap(a: str, b: str) -> bool:
    """Whether two paths are the same field, or one is a part of the other."""
    return f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.")
