"""Recipes: YAML round trip, errors that name the field, every shipped file."""

from pathlib import Path

import pytest
from pydantic import BaseModel

from raylivecell import recipe as recipes
from raylivecell.cli import main
from raylivecell.core.errors import UserError
from raylivecell.network.unet import build_model, count_parameters

SHIPPED = recipes.shipped()


@pytest.mark.parametrize("file", SHIPPED.values(), ids=SHIPPED)
def test_every_shipped_recipe_survives_a_round_trip(file: Path, tmp_path: Path) -> None:
    recipe = recipes.load(file)
    (tmp_path / "again.yaml").write_text(recipes.dump(recipe))
    assert recipes.load(tmp_path / "again.yaml") == recipe


def test_settings_of_the_paper_and_the_small_recipe() -> None:
    paper, small = recipes.load(SHIPPED["paper"]), recipes.load(SHIPPED["small"])
    assert paper.model.features == (64, 128, 256, 512)
    assert (paper.crop, paper.batch_size, paper.optimizer.amsgrad) == ((333, 434), 2, True)
    assert [(phase.originals, phase.augmented_copies) for phase in paper.phases] == [(True, 0), (True, 1)]
    assert paper.loss.background_weight > paper.loss.cell_weight
    assert count_parameters(build_model(small.model)) <= 500_000


def test_shipped_recipes_are_found_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["recipes"]) == 0
    listed = capsys.readouterr().out
    for name, path in SHIPPED.items():
        assert recipes.find(name) == str(path)
        assert name in listed
        assert len(recipes.describe(path)) > 60, f"{name} does not describe its cost and scores"
        assert recipes.describe(path).split()[0] in listed
    assert main.main(["recipes", "small"]) == 0
    assert capsys.readouterr().out == SHIPPED["small"].read_text()
    for path in ("small.yaml", "./small", "s3://bucket/small.yaml", str(tmp_path)):
        assert recipes.find(path) == path, "a path is not a name"
    with pytest.raises(UserError, match=r"no shipped recipe 'smal'; did you mean small\? \(.* \./smal\.yaml\)"):
        recipes.find("smal")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer: {learning_rate: 1}", "unknown field optimizer.learning_rate"),
        ("optimizer: {lrr: 1}", "did you mean optimizer.lr?"),
        ("optimiser: {lr: 1}", "did you mean optimizer?"),
        ("lr: 1", "did you mean optimizer.lr?"),
        (
            "phases: [{steps: 1, plain: true}]",
            "phases.0.plain; the fields are epochs, steps, originals, augmented_copies",
        ),
        ("phases: [{stepps: 1}]", "phases.0.stepps; did you mean steps?"),
        ("batch_size: many", "batch_size: Input should be a valid integer"),
        ("optimizer: {lr: -1}", "optimizer.lr: Input should be greater than 0"),
        ("model: {features: [4, 8, 16]}\ncrop: [4, 400]", "3 levels need at least 8 x 8"),
        ("phases: [{epochs: 1, steps: 2}]", "phases.0: a phase needs either epochs or steps"),
        ("targets: distance\naugment: {device: cuda}", "use cpu, or targets: foreground"),
        ("augment: {device: cuda, noise: 3}", "use cpu, or set them to 0"),
        ("- a\n- b", "a recipe is a mapping"),
        ("a: [", "not YAML"),
    ],
)
def test_a_mistake_is_reported_with_its_fix(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        recipes.load(tmp_path / "r.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_recipe_is_reported() -> None:
    with pytest.raises(UserError, match="no recipe at"):
        recipes.load("nowhere.yaml")


def undocumented(model: type[BaseModel]) -> list[str]:
    fields = []
    for name, field in model.model_fields.items():
        nested = field.annotation
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            fields += undocumented(nested)
        elif not field.description:
            fields.append(f"{model.__name__}.{name}")
    return fields


def test_every_field_is_documented() -> None:
    assert undocumented(recipes.Recipe) == []
