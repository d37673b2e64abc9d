"""What a sweep searches: recipe fields by their paths, with their ranges; the `sweep:` part of a recipe file.

    space:
      optimizer.lr: {low: 1.0e-4, high: 3.0e-2, log: true}
      model.norm: {choices: [batch, group]}
      augment.elastic.p: {low: 0.0, high: 1.0, step: 0.25}
      augment.elastic.alpha_x:
        {low: 50, high: 1000, log: true, also: [augment.elastic.alpha_y], when: {augment.elastic.p: {above: 0}}}
    shares:
      - {fields: [loss.background_weight, loss.cell_weight], least: 0.1}

1. `suggest` asks a trial (Optuna's, or anything with its suggest_* methods) for the values of all fields: first the
   shares, then the fields in their order. A condition (`when`) is evaluated on the trial's own values.
2. `start` returns the trial parameters of the starting recipe, which is the first trial.
3. `apply` writes values into a recipe.

sweep/space_check.py refuses a space that does not fit the recipe.
"""

import json
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import yaml
from pydantic import Field, model_validator

from raylivecell import recipe as recipes
from raylivecell.core import settings
from raylivecell.core.errors import UserError
from raylivecell.core.settings import StrictModel
from raylivecell.recipe import Recipe
from raylivecell.targets.registry import NAMES

if TYPE_CHECKING:
    from optuna.trial import BaseTrial

Values = dict[str, Any]
"""Value of each searched field, by its path."""


class Condition(StrictModel):
    """What another field's value must be."""

    above: float | None = None
    """Greater than this."""
    among: tuple[Any, ...] | None = None
    """One of these."""

    @model_validator(mode="after")
    def _one(self) -> "Condition":
        if (self.above is None) == (self.among is None):
            raise ValueError("give a condition either above or among")
        return self

    def holds(self, value: Any) -> bool:
        """Whether `value` meets the condition; null is never above a number."""
        if self.above is not None:
            return is_number(value) and value > self.above
        return _label(value) in [_label(one) for one in self.among or ()]


class Dimension(StrictModel):
    """The values that a field may take: a range or choices."""

    low: float | None = None
    high: float | None = None
    log: bool = False
    """Spread evenly over the logarithm."""
    step: float | None = Field(None, gt=0)
    """Only low, low + step, low + 2 step, ..."""
    choices: tuple[Any, ...] | None = Field(None, min_length=2)
    also: tuple[str, ...] = ()
    """Fields that take the same value."""
    when: dict[str, Condition] = Field(default_factory=dict)
    """Searched only while these fields are so; else the field keeps its value of the starting recipe."""

    @model_validator(mode="after")
    def _range_or_choices(self) -> "Dimension":
        ranged = self.low is not None and self.high is not None
        if ranged == (self.choices is not None) or (self.low is None) != (self.high is None):
            raise ValueError("give a field either low and high, or choices")
        if ranged and not float(self.low or 0) < float(self.high or 0):
            raise ValueError(f"low {self.low:g} must be below high {self.high:g}")
        if self.log and (self.choices is not None or self.step is not None or float(self.low or 0) <= 0):
            raise ValueError("log needs a range from above 0, without step")
        return self


class Shares(StrictModel):
    """Fields whose sum is fixed: searched evenly over all ways to share it."""

    fields: tuple[str, ...] = Field(min_length=2)
    sum: float | None = Field(None, gt=0)
    """What they share; none: what they add up to in the starting recipe."""
    least: float = Field(0.0, ge=0)
    """The least that one of them may be."""


class Objective(NamedTuple):
    """What a trial is judged by."""

    column: str
    mode: Literal["max", "min"]
    unit: str


OBJECTIVES = {
    "dice": Objective("score", "max", "validation Dice"),
    "msa": Objective("score", "max", "validation mSA"),
    "ms_per_image": Objective("ms_per_image", "min", "ms an image"),
}
SCORES = {name: "Dice" if name == "foreground" else "mSA" for name in NAMES}
"""What trials are judged by, by the recipe's targets."""
DIGITS = 12
"""Decimals of a share: 0.5 comes back as 0.5, not as 0.4999999999999999."""
ELASTIC = "augment.elastic.p"
_DEFORMED = {ELASTIC: Condition(above=0)}
DEFAULT_SPACE = {
    "optimizer.lr": Dimension(low=1e-4, high=3e-2, log=True),
    "loss.bce_weight": Dimension(low=0, high=1),
    "loss.border_weight": Dimension(low=0, high=10, step=1),
    ELASTIC: Dimension(low=0, high=1, step=0.25),
    "augment.elastic.alpha_x": Dimension(
        low=50, high=1500, log=True, also=("augment.elastic.alpha_y",), when=_DEFORMED
    ),
    "augment.elastic.sigma": Dimension(low=4, high=40, log=True, when=_DEFORMED),
}
DEFAULT_SHARES = (Shares(fields=("loss.background_weight", "loss.cell_weight"), least=0.1),)


class SearchConfig(StrictModel):
    """How a sweep searches."""

    objectives: tuple[Literal["dice", "msa", "ms_per_image"], ...] = Field(("dice",), min_length=1)
    """What to search for: validation Dice (where cells are told apart: msa), milliseconds an image; with both, the best
    of either and between."""
    sampler: Literal["tpe", "gp", "qmc", "random"] = "tpe"
    """Optuna's: tree-structured Parzen estimator, Gaussian process, quasi-random, random."""
    seed: int = Field(0, ge=0)
    """Of the sampler."""
    early_stopping: bool = True
    """Stop weak trials early (ASHA, arXiv:1810.05934), by validation Dice or mSA; not with several objectives."""
    grace: float = Field(0.15, gt=0, lt=1)
    """Part of the training that every trial is given."""
    reduction: float = Field(3.0, gt=1)
    """At each rung the best 1/reduction go on; the next rung lies at so many times the steps."""
    workers_per_trial: int = Field(1, ge=1)
    """Training processes of a trial: one runs inside the trial, more are Ray Train's."""
    gpus_per_worker: float = Field(1.0, gt=0, le=1)
    """Part of a GPU for each worker, where the cluster has any."""

    @property
    def stops_early(self) -> bool:
        """Whether ASHA is on: it ranks by the validation score, so only where that is the one objective."""
        return self.early_stopping and [OBJECTIVES[one].column for one in self.objectives] == ["score"]


class SweepConfig(SearchConfig):
    """What a sweep searches, and how; the `sweep:` part of a recipe file."""

    space: dict[str, Dimension] = DEFAULT_SPACE
    """Fields and their ranges."""
    shares: tuple[Shares, ...] = DEFAULT_SHARES
    """Fields that share a fixed sum."""


def load(uri: str) -> tuple[Recipe, SweepConfig]:
    """The starting recipe and the search in the YAML file at `uri`; UserError naming file, field and mend."""
    values = settings.read(uri)
    config = settings.validate(SweepConfig, values.pop(recipes.SWEEP, None) or {}, uri, recipes.SWEEP)
    return recipes.parse(values, uri), config


def searched_fields(config: SweepConfig) -> Iterator[str]:
    """Paths of all searched fields."""
    for path, dimension in config.space.items():
        yield from (path, *dimension.also)
    for shares in config.shares:
        yield from shares.fields


def suggest(trial: "BaseTrial", recipe: Recipe, config: SweepConfig) -> Values:
    """A value for each searched field, by path; fields whose conditions do not hold are left out."""
    values: Values = {}
    tree = recipe.model_dump(mode="json")
    for shares in config.shares:
        values |= _write(tree, _ask_shares(trial, shares, recipe))
    for path, dimension in config.space.items():
        if _holds(dimension, tree):
            value = _ask(trial, path, dimension, get(recipe, path))
            values |= _write(tree, dict.fromkeys((path, *dimension.also), value))
    return values


def start(recipe: Recipe, config: SweepConfig) -> dict[str, Any]:
    """The trial parameters for which `suggest` returns `recipe`'s own values; UserError where one is out of range."""
    parameters: dict[str, Any] = {}
    tree = recipe.model_dump(mode="json")
    for shares in config.shares:
        parameters |= _start_of_shares(shares, recipe)
        # Broken up and put together again, a part may differ in its last bit; conditions must see what `suggest` sees.
        _write(tree, _broken(shares, recipe, [parameters[_share_name(path)] for path in shares.fields[:-1]]))
    for path, dimension in config.space.items():
        if _holds(dimension, tree):
            _check_same(recipe, path, dimension)
            parameters[path] = _start_of(recipe, path, dimension)
    return parameters


def apply(recipe: Recipe, values: Values, source: str = "trial") -> Recipe:
    """`recipe` with `values` in their places; UserError beginning with `source` where they are not a recipe."""
    tree = recipe.model_dump(mode="json")
    _write(tree, values)
    return recipes.parse(tree, source)


def get(recipe: Recipe, path: str) -> Any:
    """The value at a path such as `optimizer.lr`, `optimizer.betas.1` or `phases.0.steps`; UserError where none is."""
    return _read(recipe.model_dump(mode="json"), path)


def _read(tree: dict[str, Any], path: str) -> Any:
    place: Any = tree
    for part in path.split("."):
        try:
            place = place[_key(place, part)]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UserError(f"sweep: unknown field {path}{settings.nearest(path, Recipe)}") from error
    return place


def _write(tree: dict[str, Any], values: Values) -> Values:
    """Write `values` into a dumped recipe; `values`."""
    for path, value in values.items():
        parent, _, last = path.rpartition(".")
        place = _read(tree, parent) if parent else tree
        _read(tree, path)
        place[_key(place, last)] = value
    return values


def _key(place: Any, part: str) -> Any:
    return int(part) if isinstance(place, list) else part


def _holds(dimension: Dimension, tree: dict[str, Any]) -> bool:
    """Whether the conditions of a field hold in a dumped recipe; a field that is not in it meets none."""
    for path, condition in dimension.when.items():
        try:
            value = _read(tree, path)
        except UserError:  # an element of a list that is shorter in this trial
            return False
        if not condition.holds(value):
            return False
    return True


def is_number(value: Any) -> bool:
    """Whether `value` is an int or a float; a bool is not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _label(value: Any) -> Any:
    """A choice as Optuna stores it: lists and mappings as their text."""
    return value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)


def is_complete(dimension: Dimension, start_value: Any) -> bool:
    """Whether a field is searched over whole numbers: its value is one, and the range's ends and step are."""
    ends = (dimension.low, dimension.high, dimension.step or 1)
    return isinstance(start_value, int) and is_number(start_value) and all(float(end or 0).is_integer() for end in ends)


def _ask(trial: "BaseTrial", path: str, dimension: Dimension, start_value: Any) -> Any:
    if dimension.choices is not None:
        labels = {_label(choice): choice for choice in dimension.choices}
        return labels[trial.suggest_categorical(path, list(labels))]
    low, high = float(dimension.low or 0), float(dimension.high or 0)
    if is_complete(dimension, start_value):
        return trial.suggest_int(path, int(low), int(high), step=int(dimension.step or 1), log=dimension.log)
    return trial.suggest_float(path, low, high, step=dimension.step, log=dimension.log)


def _start_of(recipe: Recipe, path: str, dimension: Dimension) -> Any:
    """The starting recipe's value as Optuna stores it; UserError where it is not among the choices, or out of range."""
    value = get(recipe, path)
    if dimension.choices is not None:
        for choice in dimension.choices:
            if _is_same(recipe, path, choice):
                return _label(choice)
        raise UserError(f"sweep.space: the recipe starts with {path} {value}, not among its choices; add it")
    low, high = float(dimension.low or 0), float(dimension.high or 0)
    if not is_number(value):
        raise UserError(f"sweep.space: {path} is {value!r} in the recipe, not a number; give it choices")
    if isinstance(value, int) and not is_complete(dimension, value):
        raise UserError(f"sweep.space: {path} takes whole numbers; give it a whole low, high and step")
    if not low <= value <= high:
        raise UserError(f"sweep.space: the recipe starts with {path} {value:g}, outside {low:g} to {high:g}; widen it")
    steps = (value - low) / dimension.step if dimension.step else 0.0
    if not math.isclose(steps, round(steps), abs_tol=1e-6):
        raise UserError(f"sweep.space: the recipe starts with {path} {value:g}, between two steps of {dimension.step}")
    return value


def _is_same(recipe: Recipe, path: str, choice: Any) -> bool:
    """Whether a choice is the recipe's own value, as the recipe reads it: 64 is 64.0, [8, 16] is (8, 16)."""
    try:
        return apply(recipe, {path: choice}) == recipe
    except UserError:
        return False


def _check_same(recipe: Recipe, path: str, dimension: Dimension) -> None:
    for other in dimension.also:
        if get(recipe, other) != get(recipe, path):
            raise UserError(
                f"sweep.space: {other} shall be {path}, but the recipe starts with {get(recipe, other)} and "
                f"{get(recipe, path)}; make them equal, or search each on its own"
            )


def parts_of(shares: Shares, recipe: Recipe) -> tuple[list[float], float]:
    """The starting recipe's values of the fields, and what is left to share above `least` each."""
    parts = [get(recipe, path) for path in shares.fields]
    for path, part in zip(shares.fields, parts):
        if not isinstance(part, float):
            raise UserError(f"sweep.shares: {path} is {part!r} in the recipe; only fractions can share a sum")
    total = sum(parts) if shares.sum is None else shares.sum
    free = total - shares.least * len(parts)
    if free <= 0:
        raise UserError(f"sweep.shares: {len(parts)} fields of at least {shares.least:g} exceed {total:g}; lower least")
    return parts, free


def _share_name(path: str) -> str:
    return f"{path}.share"


def _ask_shares(trial: "BaseTrial", shares: Shares, recipe: Recipe) -> Values:
    names = [_share_name(path) for path in shares.fields[:-1]]
    return _broken(shares, recipe, [trial.suggest_float(name, 0.0, 1.0, step=None, log=False) for name in names])


def _broken(shares: Shares, recipe: Recipe, cuts: Sequence[float]) -> Values:
    """Break a stick: of n parts still to cut, the next is 1 - (1 - u)^(1 / (n - 1)) of what is left, u from `cuts`.

    With u uniform that spreads the shares evenly over the simplex (Devroye 1986, V.4: spacings of uniforms).
    """
    left = free = parts_of(shares, recipe)[1]
    values: Values = {}
    for place, (path, u) in enumerate(zip(shares.fields, cuts)):
        part = left * (1 - (1 - u) ** (1 / (len(shares.fields) - 1 - place)))
        values[path] = round(shares.least + part, DIGITS)
        left -= part
    values[shares.fields[-1]] = round(shares.least + max(0.0, min(left, free)), DIGITS)
    return values


def _start_of_shares(shares: Shares, recipe: Recipe) -> dict[str, float]:
    parts, left = parts_of(shares, recipe)
    total = left + shares.least * len(parts)
    if not math.isclose(sum(parts), total, rel_tol=1e-6) or min(parts) < shares.least:
        given = ", ".join(f"{path} {part:g}" for path, part in zip(shares.fields, parts))
        raise UserError(f"sweep.shares: the recipe starts with {given}, not shares of {total:g} over {shares.least:g}")
    parameters = {}
    for place, (path, part) in enumerate(zip(shares.fields[:-1], parts)):
        share = min(1.0, (part - shares.least) / left) if left > 0 else 0.0
        parameters[_share_name(path)] = 1 - (1 - share) ** (len(parts) - 1 - place)
        left -= part - shares.least
    return parameters


def dump(recipe: Recipe, config: SweepConfig) -> str:
    """Starting recipe and search as the YAML that `load` reads."""
    search = {recipes.SWEEP: config.model_dump(mode="json", exclude_none=True)}
    return recipes.dump(recipe) + yaml.safe_dump(search, sort_keys=False)
