"""The search space: suggestions are valid recipes, the first is the starting recipe, errors name field and fix."""

import functools
import math
import re
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import FixedTrial

from raylivecell import recipe as recipes
from raylivecell.core.errors import UserError
from raylivecell.recipe import Recipe
from raylivecell.sweep import space, space_check
from raylivecell.sweep.space import Condition, Dimension, Shares, SweepConfig

WEIGHTS = ("loss.background_weight", "loss.cell_weight", "loss.border_weight")


def suggestions(config: SweepConfig, recipe: Recipe, trials: int) -> list[space.Values]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [space.suggest(study.ask(), recipe, config) for _ in range(trials)]


@pytest.mark.parametrize("name", ["small", "paper", "demo", "cells", "cells-small", "sweep"])
def test_the_default_space_starts_with_every_shipped_recipe(name: str) -> None:
    recipe, config = space.load(recipes.find(name))
    config = config.model_copy(update={"objectives": (space.SCORES[recipe.targets].lower(),)})
    space_check.check(recipe, config)
    values = space.suggest(FixedTrial(space.start_parameters(recipe, config)), recipe, config)
    assert recipes.dump(space.apply(recipe, values)) == recipes.dump(recipe)


def test_every_suggestion_is_a_recipe_and_conditions_hold() -> None:
    recipe = Recipe()
    for values in suggestions(SweepConfig(), recipe, 200):
        space.apply(recipe, values)
        deformed = values["augment.elastic.p"] > 0
        assert ("augment.elastic.sigma" in values) == deformed == ("augment.elastic.alpha_y" in values)
        assert not deformed or values["augment.elastic.alpha_x"] == values["augment.elastic.alpha_y"]
        assert values["loss.background_weight"] + values["loss.cell_weight"] == pytest.approx(2)
    off = [values["augment.elastic.p"] == 0 for values in suggestions(SweepConfig(), recipe, 200)]
    assert 20 < sum(off) < 80


def test_shares_are_uniform_on_the_simplex() -> None:
    """Each of n shares has the mean 1/n and the variance (n - 1) / (n^2 (n + 1)) (flat Dirichlet distribution)."""
    config = SweepConfig(space={}, shares=(Shares(fields=WEIGHTS, sum=6),))
    draws = [[values[path] / 6 for path in WEIGHTS] for values in suggestions(config, Recipe(), 4000)]
    for column in zip(*draws):
        mean = sum(column) / len(column)
        assert mean == pytest.approx(1 / 3, abs=0.012)
        assert sum((x - mean) ** 2 for x in column) / len(column) == pytest.approx(2 / 36, abs=0.004)
    assert all(math.isclose(sum(draw), 1) and min(draw) >= 0 for draw in draws)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 2.0, 0.5), (0.5, 0.5, 2.0), (2.0, 0.5, 0.5)])
def test_shares_start_with_the_weights_of_the_recipe(weights: tuple[float, float, float]) -> None:
    recipe = space.apply(Recipe(), dict(zip(WEIGHTS, weights)))
    config = SweepConfig(space={}, shares=(Shares(fields=WEIGHTS, min=0.25),))
    values = space.suggest(FixedTrial(space.start_parameters(recipe, config)), recipe, config)
    assert [values[path] for path in WEIGHTS] == pytest.approx(weights)


def test_paths_into_lists_choices_of_lists_and_integers() -> None:
    config = SweepConfig(
        space={
            "model.features": Dimension(choices=([8, 16], [64, 128, 256, 512])),
            "optimizer.betas.0": Dimension(low=0.8, high=0.99),
            "phases.0.epochs": Dimension(low=1, high=20, log=True),
            "optimizer.clip_norm": Dimension(choices=(None, 1.0)),
        },
        shares=(),
    )
    space_check.check(Recipe(), config)
    for values in suggestions(config, Recipe(), 20):
        recipe = space.apply(Recipe(), values)
        assert recipe.model.features in ((8, 16), (64, 128, 256, 512))
        assert isinstance(values["phases.0.epochs"], int)
        assert recipe.optimizer.betas == (values["optimizer.betas.0"], 0.999)
    values = space.suggest(FixedTrial(space.start_parameters(Recipe(), config)), Recipe(), config)
    assert space.apply(Recipe(), values) == Recipe()


def test_a_dumped_search_loads_equal(tmp_path: Path) -> None:
    recipe, config = space.load(recipes.find("sweep"))
    (tmp_path / "recipe.yaml").write_text(space.dump(recipe, config))
    assert space.load(str(tmp_path / "recipe.yaml")) == (recipe, config)
    assert recipes.load(tmp_path / "recipe.yaml") == recipe, "train accepts the same file"
    when = {"model.norm": Condition(in_=("group",))}
    config = SweepConfig(
        space={"optimizer.clip_norm": Dimension(choices=(None, 1.0), when=when)},
        compare_off={"optimizer.clip_norm": None},
    )
    (tmp_path / "recipe.yaml").write_text(space.dump(recipe, config))
    assert space.load(str(tmp_path / "recipe.yaml")) == (recipe, config)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            {"space": {"optimizer.learning_rate": {"low": 1, "high": 2}}},
            "the fields of this section are optimizer.lr, ",
        ),
        ({"space": {"augment.elastic.alpha": {"low": 1, "high": 2}}}, "did you mean augment.elastic.alpha_"),
        ({"space": {"phases.7.steps": {"low": 1, "high": 2}}}, "unknown field phases.7.steps"),
        ({"spaces": {}}, "sweep.spaces; did you mean space?"),
        ({"space": {"optimizer.lr": {"low": 1.0}}}, "either low and high, or choices"),
        ({"space": {"optimizer.lr": {"low": 2.0, "high": 1.0}}}, "low 2 must be below high 1"),
        ({"space": {"optimizer.lr": {"low": 0.0, "high": 1.0, "log": True}}}, "log needs a range above 0"),
        ({"space": {"optimizer.lr": {"low": 0.1, "high": 1.0}}}, "starts with optimizer.lr 0.001, outside 0.1 to 1"),
        ({"space": {"loss.border_weight": {"low": 0.0, "high": 9.0, "step": 3.0}}}, "not 0 + n * 3"),
        ({"space": {"model.norm": {"choices": ["group", "sync_batch"]}}}, "batch, not among its choices"),
        ({"space": {"model.norm": {"low": 0, "high": 1}}}, "'batch' in the recipe, not a number"),
        ({"shares": [{"fields": ["loss.cell_weight", "loss.background_weight"], "sum": 3}]}, "not shares of 3"),
        ({"shares": [{"fields": ["loss.cell_weight", "loss.background_weight"], "min": 2}]}, "lower min"),
        ({"shares": [{"fields": ["optimizer.lr", "loss.cell_weight"]}]}, "optimizer.lr is searched twice"),
        (
            {
                "space": {
                    "augment.elastic.sigma": {"low": 2, "high": 20, "when": {"augment.elastic.p": {"above": 0}}},
                    "augment.elastic.p": {"low": 0, "high": 1},
                }
            },
            "put augment.elastic.p before it",
        ),
        ({"space": {"optimizer.lr": {"low": 1e-4, "high": 1, "when": {"model.norm": {}}}}}, "either `above` or `in`"),
        (
            {"space": {"optimizer.lr": {"low": 1e-4, "high": 1, "when": {"model.norm": {"above": 0}}}}},
            "needs model.norm above a number, but it is 'batch'; use `in`",
        ),
        (
            {"space": {"optimizer.lr": {"low": 1e-4, "high": 1, "when": {"optimizer.lr": {"above": 0}}}}},
            "depend on itself",
        ),
        (
            {
                "space": {
                    "optimizer.lr": {"low": 1e-4, "high": 1, "when": {"loss.aux_weight": {"above": 0}}},
                    "loss.border_weight": {"low": 0, "high": 1, "tied_to": ["loss.aux_weight"]},
                }
            },
            "put loss.border_weight before it",
        ),
        (
            {
                "space": {
                    "model.features": {"choices": [[8], [64, 128, 256, 512]]},
                    "model.features.0": {"choices": [8]},
                }
            },
            "at least 2",
        ),
        (
            {
                "space": {
                    "phases.0": {"choices": [{"epochs": 10}, {"epochs": 5}]},
                    "phases.0.epochs": {"low": 1, "high": 20},
                }
            },
            "phases.0.epochs is a part of phases.0",
        ),
        ({"space": {"loss.bce_weight": {"low": 0, "high": 2}}}, "sweep.space: loss.bce_weight: Input should be less"),
        (
            {"space": {"optimizer.schedule": {"choices": ["constant", "cosin"]}}},
            "sweep.space: optimizer.schedule: Input",
        ),
        ({"space": {"batch_size": {"low": 1, "high": 4.5}}}, "batch_size is an integer"),
        ({"shares": [{"fields": ["loss.cell_weight", "model.norm"]}]}, "model.norm is 'batch' in the recipe; only"),
        ({"compare_off": {"augment.elastic.prob": 0.0}}, "unknown field augment.elastic.prob"),
        ({"compare_off": {"augment.elastic.p": -1}}, "sweep.compare_off: augment.elastic.p: Input should be greater"),
        (
            {"shares": [{"fields": ["loss.cell_weight", "loss.background_weight"]}]},
            "greater than 0 (got 0.0); raise min",
        ),
    ],
)
def test_an_error_names_the_field_and_the_fix(part: dict, message: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"sweep": part}, sort_keys=False))
    with pytest.raises(UserError, match=re.escape(message)) as error:
        space_check.check(*space.load(str(file)))
    assert "\n" not in str(error.value)


# Field -> its possible values, and conditions on it that some of these values meet.
SPACES: dict[str, tuple[Dimension, tuple[Condition, ...]]] = {
    "model.norm": (Dimension(choices=("batch", "group")), (Condition(in_=("group",)),)),
    "optimizer.clip_norm": (Dimension(choices=(None, 1.0, 5.0)), (Condition(above=0), Condition(in_=(None,)))),
    "model.features": (Dimension(choices=([8, 16], [64, 128, 256, 512])), (Condition(in_=([8, 16], (4,))),)),
    "augment.elastic.p": (Dimension(low=0, high=1, step=0.5), (Condition(above=0), Condition(in_=(0.5, 1)))),
    "loss.border_weight": (Dimension(low=0, high=9, tied_to=("loss.aux_weight",)), (Condition(above=4),)),
    "phases.0.epochs": (Dimension(low=5, high=15), (Condition(above=9.5),)),
}
OTHER_CONDITIONS = {
    "model.features.1": (Condition(above=20),),
    "model.features.3": (Condition(above=20),),  # not in every trial
    "loss.aux_weight": (Condition(above=5),),  # tied to another field
    "loss.cell_weight": (Condition(above=1),),  # one of the shares of a sum
    "loss.background_weight": (Condition(above=1.0),),
    "optimizer.amsgrad": (Condition(in_=(True,)), Condition(in_=(False,))),  # not searched
}


@st.composite
def searches(draw: st.DrawFn) -> SweepConfig:
    """Fields in any order, with conditions on preceding fields, on shares and on fields that are not searched."""
    order = draw(st.permutations(sorted(SPACES)))[: draw(st.integers(0, len(SPACES)))]
    fields: dict[str, Dimension] = {}
    for path in order:
        ranges = {field: SPACES[field][1] for field in fields} | {
            field: conditions
            for field, conditions in OTHER_CONDITIONS.items()
            if not any(f"{field}.".startswith(f"{later}.") for later in set(order) - set(fields))
        }
        if "loss.border_weight" in set(order) - set(fields):
            ranges.pop("loss.aux_weight", None)
        condition_fields = draw(st.lists(st.sampled_from(sorted(ranges)), max_size=2, unique=True))
        when = {field: draw(st.sampled_from(ranges[field])) for field in condition_fields}
        fields[path] = SPACES[path][0].model_copy(update={"when": when})
    return SweepConfig(space=fields, shares=(Shares(fields=WEIGHTS[:2], min=0.1),))


@settings(max_examples=60)
@given(searches(), st.integers(0, 1000))
def test_conditions_are_those_of_the_trial(config: SweepConfig, seed: int) -> None:
    """Conditions on any field (also a share, a tied field, a part of a field) are evaluated on the trial's recipe."""
    recipe = Recipe()
    space_check.check(recipe, config)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    for values in [space.suggest(study.ask(), recipe, config) for _ in range(5)]:
        tried = space.apply(recipe, values).model_dump(mode="json")
        for path, dimension in config.space.items():
            met = True
            for field, condition in dimension.when.items():
                try:
                    met &= condition.holds(functools.reduce(_part, field.split("."), tried))
                except IndexError:
                    met = False
            assert (path in values) == met, (path, dimension.when, values)
    for trial in study.trials:
        assert space.suggest(FixedTrial(trial.params), recipe, config).keys() <= set(space.searched_fields(config))
    parameters = space.start_parameters(recipe, config)
    assert space.apply(recipe, space.suggest(FixedTrial(parameters), recipe, config)) == recipe


def _part(tree: Any, name: str) -> Any:
    return tree[int(name)] if isinstance(tree, list) else tree[name]


def test_a_condition_reads_the_starting_recipe_if_its_field_is_not_searched() -> None:
    config = SweepConfig(
        space={"model.features.0": Dimension(low=8, high=64, when={"model.norm": Condition(in_=("group",))})},
        shares=(),
    )
    assert suggestions(config, Recipe(), 1) == [{}]
    group = space.apply(Recipe(), {"model.norm": "group"})
    assert set(suggestions(config, group, 1)[0]) == {"model.features.0"}
