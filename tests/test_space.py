"""The search space: what it suggests is a recipe, the start comes back as itself, mistakes are named."""

import math
import re
from pathlib import Path

import optuna
import pytest
import yaml
from optuna.trial import FixedTrial

from raylivecell import recipe as recipes
from raylivecell import space
from raylivecell.errors import UserError
from raylivecell.recipe import Recipe
from raylivecell.space import Condition, Dimension, Shares, SweepConfig

JOBS = Path(__file__).parents[1] / "jobs"
WEIGHTS = ("loss.background_weight", "loss.cell_weight", "loss.border_weight")


def asked(config: SweepConfig, recipe: Recipe, trials: int) -> list[space.Values]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [space.suggest(study.ask(), recipe, config) for _ in range(trials)]


@pytest.mark.parametrize("name", ["small", "paper", "demo", "sweep"])
def test_the_default_space_starts_with_every_shipped_recipe(name: str) -> None:
    recipe, config = space.load(str(JOBS / f"{name}.yaml"))
    space.check(recipe, config)
    values = space.suggest(FixedTrial(space.start(recipe, config)), recipe, config)
    assert recipes.dump(space.apply(recipe, values)) == recipes.dump(recipe)


def test_every_suggestion_is_a_recipe_and_conditions_hold() -> None:
    recipe = Recipe()
    for values in asked(SweepConfig(), recipe, 200):
        space.apply(recipe, values)
        deformed = values["augment.elastic.p"] > 0
        assert ("augment.elastic.sigma" in values) == deformed == ("augment.elastic.alpha_y" in values)
        assert not deformed or values["augment.elastic.alpha_x"] == values["augment.elastic.alpha_y"]
        assert values["loss.background_weight"] + values["loss.cell_weight"] == pytest.approx(2)
    off = [values["augment.elastic.p"] == 0 for values in asked(SweepConfig(), recipe, 200)]
    assert 20 < sum(off) < 80


def test_shares_are_spread_evenly_over_the_simplex() -> None:
    """The mean of each of n even shares is 1/n, its variance (n - 1) / (n^2 (n + 1)) (Dirichlet of ones)."""
    config = SweepConfig(space={}, shares=(Shares(fields=WEIGHTS, sum=6),))
    draws = [[values[path] / 6 for path in WEIGHTS] for values in asked(config, Recipe(), 4000)]
    for column in zip(*draws):
        mean = sum(column) / len(column)
        assert mean == pytest.approx(1 / 3, abs=0.012)
        assert sum((x - mean) ** 2 for x in column) / len(column) == pytest.approx(2 / 36, abs=0.004)
    assert all(math.isclose(sum(draw), 1) and min(draw) >= 0 for draw in draws)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 2.0, 0.5), (0.5, 0.5, 2.0), (2.0, 0.5, 0.5)])
def test_the_start_of_shares_comes_back(weights: tuple[float, float, float]) -> None:
    recipe = space.apply(Recipe(), dict(zip(WEIGHTS, weights)))
    config = SweepConfig(space={}, shares=(Shares(fields=WEIGHTS, least=0.25),))
    values = space.suggest(FixedTrial(space.start(recipe, config)), recipe, config)
    assert [values[path] for path in WEIGHTS] == pytest.approx(weights)


def test_paths_into_lists_choices_of_lists_and_whole_numbers() -> None:
    config = SweepConfig(
        space={
            "model.features": Dimension(choices=([8, 16], [64, 128, 256, 512])),
            "optimizer.betas.0": Dimension(low=0.8, high=0.99),
            "phases.0.epochs": Dimension(low=1, high=20, log=True),
            "optimizer.clip_norm": Dimension(choices=(None, 1.0)),
        },
        shares=(),
    )
    space.check(Recipe(), config)
    for values in asked(config, Recipe(), 20):
        recipe = space.apply(Recipe(), values)
        assert recipe.model.features in ((8, 16), (64, 128, 256, 512))
        assert isinstance(values["phases.0.epochs"], int)
        assert recipe.optimizer.betas == (values["optimizer.betas.0"], 0.999)
    values = space.suggest(FixedTrial(space.start(Recipe(), config)), Recipe(), config)
    assert space.apply(Recipe(), values) == Recipe()


def test_the_search_survives_its_file(tmp_path: Path) -> None:
    recipe, config = space.load(str(JOBS / "sweep.yaml"))
    (tmp_path / "recipe.yaml").write_text(space.dump(recipe, config))
    assert space.load(str(tmp_path / "recipe.yaml")) == (recipe, config)
    assert recipes.load(tmp_path / "recipe.yaml") == recipe, "train takes the file as it is"


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ({"space": {"optimizer.learning_rate": {"low": 1, "high": 2}}}, "the fields there are optimizer.lr, "),
        ({"space": {"augment.elastic.alpha": {"low": 1, "high": 2}}}, "did you mean augment.elastic.alpha_"),
        ({"space": {"phases.7.steps": {"low": 1, "high": 2}}}, "unknown field phases.7.steps"),
        ({"spaces": {}}, "sweep.spaces; did you mean space?"),
        ({"space": {"optimizer.lr": {"low": 1.0}}}, "either low and high, or choices"),
        ({"space": {"optimizer.lr": {"low": 2.0, "high": 1.0}}}, "low 2 must be below high 1"),
        ({"space": {"optimizer.lr": {"low": 0.0, "high": 1.0, "log": True}}}, "log needs a range from above 0"),
        ({"space": {"optimizer.lr": {"low": 0.1, "high": 1.0}}}, "starts with optimizer.lr 0.001, outside 0.1 to 1"),
        ({"space": {"loss.border_weight": {"low": 0.0, "high": 9.0, "step": 3.0}}}, "between two steps of 3"),
        ({"space": {"model.norm": {"choices": ["group", "sync_batch"]}}}, "batch, not among its choices"),
        ({"space": {"model.norm": {"low": 0, "high": 1}}}, "'batch' in the recipe, not a number"),
        ({"shares": [{"fields": ["loss.cell_weight", "loss.background_weight"], "sum": 3}]}, "not shares of 3"),
        ({"shares": [{"fields": ["loss.cell_weight", "loss.background_weight"], "least": 2}]}, "lower least"),
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
        ({"space": {"optimizer.lr": {"low": 1e-4, "high": 1, "when": {"model.norm": {}}}}}, "either above or among"),
    ],
)
def test_a_mistake_is_named_with_its_mend(part: dict, told: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"sweep": part}, sort_keys=False))
    with pytest.raises(UserError, match=re.escape(told)) as error:
        space.check(*space.load(str(file)))
    assert "\n" not in str(error.value)


def test_a_condition_reads_the_starting_recipe_where_its_field_is_not_searched() -> None:
    config = SweepConfig(
        space={"model.features.0": Dimension(low=8, high=64, when={"model.norm": Condition(among=("group",))})},
        shares=(),
    )
    assert asked(config, Recipe(), 1) == [{}]
    group = space.apply(Recipe(), {"model.norm": "group"})
    assert set(asked(config, group, 1)[0]) == {"model.features.0"}
