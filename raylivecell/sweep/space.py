"""Search space of a sweep: recipe fields by path, with their ranges; the `sweep:` part of a recipe file.

    space:
      optimizer.lr: {low: 1.0e-4, high: 3.0e-2, log: true}
      model.norm: {choices: [batch, group]}
      augment.elastic.p: {low: 0.0, high: 1.0, step: 0.25}
      augment.elastic.alpha_x:
        {low: 50, high: 1000, log: true, tied_to: [augment.elastic.alpha_y], when: {augment.elastic.p: {above: 0}}}
    shares:
      - {fields: [loss.background_weight, loss.cell_weight], min: 0.1}

1. `suggest` draws the values of all fields from a trial (Optuna's, or an object with its suggest_* methods): first the
   shares, then the fields in order. A condition (`when`) is evaluated on the trial's values.
2. `start_parameters` returns the trial parameters of the starting recipe, which is the first trial.
3. `apply` writes values into a recipe.

sweep/space_check.py checks a space against the recipe.
"""

import json
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import yaml
from pydantic import ConfigDict, Field, model_validator

from raylivecell import recipe as recipes
from raylivecell.core import settings
from raylivecell.core.errors import UserError
from raylivecell.core.settings import StrictModel
from raylivecell.recipe import Recipe
from raylivecell.targets.registry import NAMES

if TYPE_CHECKING:
    from optuna.trial import BaseTrial

Values = dict[str, Any]
"""Values of searched fields, by path."""


class Condition(StrictModel):
    """A condition on another field's value."""

    model_config = ConfigDict(populate_by_name=True)
    above: float | None = None
    """Greater than this."""
    in_: tuple[Any, ...] | None = Field(None, alias="in")
    """One of these."""

    @model_validator(mode="after")
    def _above_or_in(self) -> "Condition":
        if (self.above is None) == (self.in_ is None):
            raise ValueError("give a condition either `above` or `in`")
        return self

    def holds(self, value: Any) -> bool:
        """Whether `value` meets the condition; null is never above a number."""
        if self.above is not None:
            return is_number(value) and value > self.above
        return any(is_equal(value, choice) for choice in self.in_ or ())


class Dimension(StrictModel):
    """Values of a searched field: a range or choices."""

    low: float | None = None
    high: float | None = None
    log: bool = False
    """Sample the logarithm uniformly."""
    step: float | None = Field(None, gt=0)
    """Only low, low + step, low + 2 step, ..."""
    choices: tuple[Any, ...] | None = Field(None, min_length=2)
    tied_to: tuple[str, ...] = ()
    """Fields that are set to the same value."""
    when: dict[str, Condition] = Field(default_factory=dict)
    """Conditions under which the field is searched; otherwise it keeps the starting recipe's value."""

    @model_validator(mode="after")
    def _range_or_choices(self) -> "Dimension":
        ranged = self.low is not None and self.high is not None
        if ranged == (self.choices is not None) or (self.low is None) != (self.high is None):
            raise ValueError("give a field either low and high, or choices")
        if ranged and not float(self.low or 0) < float(self.high or 0):
            raise ValueError(f"low {self.low:g} must be below high {self.high:g}")
        if self.log and (self.choices is not None or self.step is not None or float(self.low or 0) <= 0):
            raise ValueError("log needs a range above 0, without step")
        return self


class Shares(StrictModel):
    """Fields with a fixed sum, sampled uniformly over the simplex."""

    fields: tuple[str, ...] = Field(min_length=2)
    sum: float | None = Field(None, gt=0)
    """Sum of the fields; default: their sum in the starting recipe."""
    min: float = Field(0.0, ge=0)
    """Lower bound of each field."""


class Objective(NamedTuple):
    """An objective of a search: the column of a trial's result, and whether to maximise it."""

    column: str
    mode: Literal["max", "min"]
    unit: str


OBJECTIVES = {
    "dice": Objective("score", "max", "validation Dice"),
    "msa": Objective("score", "max", "validation mSA"),
    "ms_per_image": Objective("ms_per_image", "min", "ms an image"),
}
SCORES = {name: "Dice" if name == "foreground" else "mSA" for name in NAMES}
"""Validation score by the recipe's targets."""
DIGITS = 12
"""Decimals of a share: 0.5, not 0.4999999999999999."""
ELASTIC = "augment.elastic.p"
_DEFORMED = {ELASTIC: Condition(above=0)}
DEFAULT_SPACE = {
    "optimizer.lr": Dimension(low=1e-4, high=3e-2, log=True),
    "loss.bce_weight": Dimension(low=0, high=1),
    "loss.border_weight": Dimension(low=0, high=10, step=1),
    ELASTIC: Dimension(low=0, high=1, step=0.25),
    "augment.elastic.alpha_x": Dimension(
        low=50, high=1500, log=True, tied_to=("augment.elastic.alpha_y",), when=_DEFORMED
    ),
    "augment.elastic.sigma": Dimension(low=4, high=40, log=True, when=_DEFORMED),
}
DEFAULT_SHARES = (Shares(fields=("loss.background_weight", "loss.cell_weight"), min=0.1),)
DEFAULT_COMPARE_OFF: Values = {ELASTIC: 0.0}


class SearchConfig(StrictModel):
    """Settings of the search."""

    objectives: tuple[Literal["dice", "msa", "ms_per_image"], ...] = Field(("dice",), min_length=1)
    """Validation Dice (msa for instance recipes), milliseconds per image, or both for the Pareto front."""
    sampler: Literal["tpe", "gp", "qmc", "random"] = "tpe"
    """Optuna's sampler: tree-structured Parzen estimator, Gaussian process, quasi-random, random."""
    seed: int = Field(0, ge=0)
    """Seed of the sampler."""
    early_stopping: bool = True
    """Stop weak trials early (ASHA, arXiv:1810.05934), by validation Dice or mSA; not with several objectives."""
    grace: float = Field(0.15, gt=0, lt=1)
    """Fraction of the training before a trial can be stopped."""
    reduction: float = Field(3.0, gt=1)
    """At each rung the best 1/reduction of the trials continue; the next rung is at `reduction` times the steps."""
    workers_per_trial: int = Field(1, ge=1)
    """Training processes per trial: one runs inside the trial, several under Ray Train."""
    gpus_per_worker: float = Field(1.0, gt=0, le=1)
    """Fraction of a GPU for each worker, if the cluster has GPUs."""

    @property
    def stops_early(self) -> bool:
        """Whether ASHA is used: it ranks by the validation score, which must be the only objective."""
        return self.early_stopping and [OBJECTIVES[name].column for name in self.objectives] == ["score"]


class SweepConfig(SearchConfig):
    """Search space and settings: the `sweep:` part of a recipe file."""

    space: dict[str, Dimension] = DEFAULT_SPACE
    """Fields and their ranges."""
    shares: tuple[Shares, ...] = DEFAULT_SHARES
    """Fields that share a fixed sum."""
    compare_off: Values = DEFAULT_COMPARE_OFF
    """Fields and the values that switch them off. If such a field is searched, the report compares trials with it off
    and on, and `--final-seeds` also trains the best recipe with it switched."""


def load(uri: str) -> tuple[Recipe, SweepConfig]:
    """Starting recipe and search from the YAML file at `uri`; UserError with file, field and fix."""
    values = settings.read(uri)
    config = settings.validate(SweepConfig, values.pop(recipes.SWEEP, None) or {}, uri, recipes.SWEEP)
    return recipes.parse(values, uri), config


def searched_fields(config: SweepConfig) -> Iterator[str]:
    """Paths of all searched fields."""
    for path, dimension in config.space.items():
        yield from (path, *dimension.tied_to)
    for shares in config.shares:
        yield from shares.fields


def suggest(trial: "BaseTrial", recipe: Recipe, config: SweepConfig) -> Values:
    """Values of the searched fields by path, without fields whose conditions are not met."""
    values: Values = {}
    tree = recipe.model_dump(mode="json")
    for shares in config.shares:
        values |= _write(tree, _suggest_shares(trial, shares, recipe))
    for path, dimension in config.space.items():
        if _holds(dimension, tree):
            value = _suggest(trial, path, dimension, get(recipe, path))
            values |= _write(tree, dict.fromkeys((path, *dimension.tied_to), value))
    return values


def start_parameters(recipe: Recipe, config: SweepConfig) -> dict[str, Any]:
    """Trial parameters for which `suggest` returns `recipe`'s own values; UserError if one is out of range."""
    parameters: dict[str, Any] = {}
    tree = recipe.model_dump(mode="json")
    for shares in config.shares:
        parameters |= _start_parameters_of_shares(shares, recipe)
        # A share computed from its parameter may differ in the last bit; conditions must see the values of `suggest`.
        _write(tree, _break_stick(shares, recipe, [parameters[_share_name(path)] for path in shares.fields[:-1]]))
    for path, dimension in config.space.items():
        if _holds(dimension, tree):
            _check_same(recipe, path, dimension)
            parameters[path] = _start_parameter(recipe, path, dimension)
    return parameters


def apply(recipe: Recipe, values: Values, source: str = "trial") -> Recipe:
    """Copy of `recipe` with `values`; UserError that starts with `source` if they are invalid."""
    tree = recipe.model_dump(mode="json")
    _write(tree, values)
    return recipes.parse(tree, source)


def get(recipe: Recipe, path: str) -> Any:
    """Value at a path such as `optimizer.lr`, `optimizer.betas.1` or `phases.0.steps`; UserError for other paths."""
    return _read(recipe.model_dump(mode="json"), path)


def _read(tree: dict[str, Any], path: str) -> Any:
    node: Any = tree
    for part in path.split("."):
        try:
            node = node[_key(node, part)]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UserError(f"sweep: unknown field {path}{settings.nearest(path, Recipe)}") from error
    return node


def _write(tree: dict[str, Any], values: Values) -> Values:
    """Write `values` into a dumped recipe and return them."""
    for path, value in values.items():
        parent, _, last = path.rpartition(".")
        node = _read(tree, parent) if parent else tree
        _read(tree, path)
        node[_key(node, last)] = value
    return values


def _key(node: Any, part: str) -> Any:
    return int(part) if isinstance(node, list) else part


def _holds(dimension: Dimension, tree: dict[str, Any]) -> bool:
    """Whether a dumped recipe meets all conditions of a field; a missing field meets no condition."""
    for path, condition in dimension.when.items():
        try:
            value = _read(tree, path)
        except UserError:  # an element of a list that is too short in this trial
            return False
        if not condition.holds(value):
            return False
    return True


def is_number(value: Any) -> bool:
    """Whether `value` is an int or a float; a bool is not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _label(value: Any) -> Any:
    """A choice as Optuna stores it: lists and mappings as JSON."""
    return value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)


def is_equal(a: Any, b: Any) -> bool:
    """Whether two values of a field are equal, each as the recipe or as Optuna stores it."""
    return _label(a) == _label(b)


def tied_fields(config: SweepConfig, path: str) -> tuple[str, ...]:
    """A field and those tied to it."""
    return (path, *(config.space[path].tied_to if path in config.space else ()))


def strength_fields(config: SweepConfig, path: str) -> list[str]:
    """Fields that are searched only while the field `path` of `compare_off` is on."""
    conditions = {name: dimension.when.get(path) for name, dimension in config.space.items()}
    off = config.compare_off[path]
    return [name for name, condition in conditions.items() if condition is not None and not condition.holds(off)]


def is_whole_range(dimension: Dimension, start_value: Any) -> bool:
    """Whether a field is searched over integers: its value, low, high and step are integers."""
    bounds = (dimension.low, dimension.high, dimension.step or 1)
    return isinstance(start_value, int) and is_number(start_value) and all(float(n or 0).is_integer() for n in bounds)


def _suggest(trial: "BaseTrial", path: str, dimension: Dimension, start_value: Any) -> Any:
    if dimension.choices is not None:
        labels = {_label(choice): choice for choice in dimension.choices}
        return labels[trial.suggest_categorical(path, list(labels))]
    low, high = float(dimension.low or 0), float(dimension.high or 0)
    if is_whole_range(dimension, start_value):
        return trial.suggest_int(path, int(low), int(high), step=int(dimension.step or 1), log=dimension.log)
    return trial.suggest_float(path, low, high, step=dimension.step, log=dimension.log)


def _start_parameter(recipe: Recipe, path: str, dimension: Dimension) -> Any:
    """Starting recipe's value as Optuna stores it; UserError if it is not among the choices, or out of range."""
    value = get(recipe, path)
    if dimension.choices is not None:
        for choice in dimension.choices:
            if _is_same(recipe, path, choice):
                return _label(choice)
        raise UserError(f"sweep.space: the recipe starts with {path} {value}, not among its choices; add it")
    low, high = float(dimension.low or 0), float(dimension.high or 0)
    if not is_number(value):
        raise UserError(f"sweep.space: {path} is {value!r} in the recipe, not a number; give it choices")
    if isinstance(value, int) and not is_whole_range(dimension, value):
        raise UserError(f"sweep.space: {path} is an integer; give it integers for low, high and step")
    if not low <= value <= high:
        raise UserError(f"sweep.space: the recipe starts with {path} {value:g}, outside {low:g} to {high:g}; widen it")
    steps = (value - low) / dimension.step if dimension.step else 0.0
    if not math.isclose(steps, round(steps), abs_tol=1e-6):
        raise UserError(f"sweep.space: the recipe starts with {path} {value:g}, not {low:g} + n * {dimension.step:g}")
    return value


def _is_same(recipe: Recipe, path: str, choice: Any) -> bool:
    """Whether a choice equals the recipe's value after parsing: 64 is 64.0, [8, 16] is (8, 16)."""
    try:
        return apply(recipe, {path: choice}) == recipe
    except UserError:
        return False


def _check_same(recipe: Recipe, path: str, dimension: Dimension) -> None:
    for other in dimension.tied_to:
        if get(recipe, other) != get(recipe, path):
            raise UserError(
                f"sweep.space: {other} is tied to {path}, but the recipe starts with {get(recipe, other)} and "
                f"{get(recipe, path)}; make them equal, or search each separately"
            )


def parts_of(shares: Shares, recipe: Recipe) -> tuple[list[float], float]:
    """Starting recipe's values of the fields, and the sum to distribute after each field's `min`."""
    parts = [get(recipe, path) for path in shares.fields]
    for path, part in zip(shares.fields, parts):
        if not isinstance(part, float):
            raise UserError(f"sweep.shares: {path} is {part!r} in the recipe; only floats can share a sum")
    total = sum(parts) if shares.sum is None else shares.sum
    free = total - shares.min * len(parts)
    if free <= 0:
        raise UserError(f"sweep.shares: {len(parts)} fields of at least {shares.min:g} exceed {total:g}; lower min")
    return parts, free


def _share_name(path: str) -> str:
    return f"{path}.share"


def _suggest_shares(trial: "BaseTrial", shares: Shares, recipe: Recipe) -> Values:
    names = [_share_name(path) for path in shares.fields[:-1]]
    return _break_stick(shares, recipe, [trial.suggest_float(name, 0.0, 1.0, step=None, log=False) for name in names])


def _break_stick(shares: Shares, recipe: Recipe, cuts: Sequence[float]) -> Values:
    """Break a stick: of n remaining parts, the next is 1 - (1 - u)^(1 / (n - 1)) of the remainder, u from `cuts`.

    With u uniform the shares are uniform over the simplex (Devroye 1986, V.4: spacings of uniforms).
    """
    remainder = free = parts_of(shares, recipe)[1]
    values: Values = {}
    for index, (path, u) in enumerate(zip(shares.fields, cuts)):
        part = remainder * (1 - (1 - u) ** (1 / (len(shares.fields) - 1 - index)))
        values[path] = round(shares.min + part, DIGITS)
        remainder -= part
    values[shares.fields[-1]] = round(shares.min + max(0.0, min(remainder, free)), DIGITS)
    return values


def _start_parameters_of_shares(shares: Shares, recipe: Recipe) -> dict[str, float]:
    parts, remainder = parts_of(shares, recipe)
    total = remainder + shares.min * len(parts)
    if not math.isclose(sum(parts), total, rel_tol=1e-6) or min(parts) < shares.min:
        listed = ", ".join(f"{path} {part:g}" for path, part in zip(shares.fields, parts))
        raise UserError(f"sweep.shares: the recipe starts with {listed}, not shares of {total:g} over {shares.min:g}")
    parameters = {}
    for index, (path, part) in enumerate(zip(shares.fields[:-1], parts)):
        share = min(1.0, (part - shares.min) / remainder) if remainder > 0 else 0.0
        parameters[_share_name(path)] = 1 - (1 - share) ** (len(parts) - 1 - index)
        remainder -= part - shares.min
    return parameters


def dump(recipe: Recipe, config: SweepConfig) -> str:
    """Starting recipe and search as YAML for `load`."""
    search = {recipes.SWEEP: config.model_dump(mode="json", exclude_none=True, by_alias=True)}
    return recipes.dump(recipe) + yaml.safe_dump(search, sort_keys=False)
