"""Recipes: YAML in and out, mistakes told by name, every shipped file read."""

from pathlib import Path

import pytest
from pydantic import BaseModel

from raylivecell import recipe as recipes
from raylivecell.core.errors import UserError
from raylivecell.network.unet import build_model, count_parameters

JOBS = Path(__file__).parents[1] / "jobs"
SHIPPED = sorted(JOBS.glob("*.yaml"))


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_every_shipped_recipe_is_read_and_comes_back(file: Path, tmp_path: Path) -> None:
    recipe = recipes.load(file)
    (tmp_path / "again.yaml").write_text(recipes.dump(recipe))
    assert recipes.load(tmp_path / "again.yaml") == recipe


def test_the_paper_and_the_small_recipe_are_what_they_say() -> None:
    paper, small = recipes.load(JOBS / "paper.yaml"), recipes.load(JOBS / "small.yaml")
    assert paper.model.features == (64, 128, 256, 512)
    assert (paper.crop, paper.batch_size, paper.optimizer.amsgrad) == ((333, 434), 2, True)
    assert [(phase.plain, phase.transformed) for phase in paper.phases] == [(True, 0), (True, 1)]
    assert paper.loss.background_weight > paper.loss.cell_weight
    assert count_parameters(build_model(small.model)) <= 500_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer: {learning_rate: 1}", "unknown field optimizer.learning_rate"),
        ("optimizer: {lrr: 1}", "did you mean optimizer.lr?"),
        ("optimiser: {lr: 1}", "did you mean optimizer?"),
        ("lr: 1", "did you mean optimizer.lr?"),
        ("batch_size: many", "batch_size: Input should be a valid integer"),
        ("optimizer: {lr: -1}", "optimizer.lr: Input should be greater than 0"),
        ("model: {features: [4, 8, 16]}\ncrop: [4, 400]", "3 levels need at least 8 x 8"),
        ("phases: [{epochs: 1, steps: 2}]", "phases.0: give a phase either epochs or steps"),
        ("- a\n- b", "a recipe is a mapping"),
        ("a: [", "not YAML"),
    ],
)
def test_a_mistake_is_named_with_its_mend(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        recipes.load(tmp_path / "r.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_recipe_is_said() -> None:
    with pytest.raises(UserError, match="no recipe at"):
        recipes.load("nowhere.yaml")


def undocumented(model: type[BaseModel]) -> list[str]:
    found = []
    for name, field in model.model_fields.items():
        nested = field.annotation
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            found += undocumented(nested)
        elif not field.description:
            found.append(f"{model.__name__}.{name}")
    return found


def test_every_field_is_documented() -> None:
    assert undocumented(recipes.Recipe) == []
