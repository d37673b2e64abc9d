"""Distillation: which teachers are accepted, their copy in the run's folder, the licences of the data behind them."""

import json
from pathlib import Path

import pytest
import torch
from test_start_from import DATA, recipe_of, save

from raylivecell.cli import arguments, check
from raylivecell.core.errors import UserError
from raylivecell.images.intensity import LIVECELL, Intensity
from raylivecell.images.scale import Scale
from raylivecell.inference import model_card
from raylivecell.network.unet import build_model
from raylivecell.recipe import DistillationConfig, ModelConfig, Recipe
from raylivecell.runs import checkpoint, distillation, parents, progress, start_from, teachers
from raylivecell.training import preflight

CPU = torch.device("cpu")


def store(run: Path, opened: distillation.Opened) -> None:
    teachers.store(str(run), opened.files, opened.teacher)


def test_a_worker_loads_the_teacher_from_the_run_after_the_original_is_gone(tmp_path: Path) -> None:
    """A wider network of another norm, in evaluation mode: its running statistics are used and not changed."""
    model = save(tmp_path / "wide", recipe_of((8, 16), norm="batch"))
    opened = distillation.open_teacher(str(tmp_path / "wide"), recipe_of(), LIVECELL, Scale())
    store(tmp_path / "run", opened)
    (tmp_path / "wide").rename(tmp_path / "gone")
    network = distillation.load(str(tmp_path / "run"), CPU)
    image = 255 * torch.rand(2, 1, 32, 32)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    torch.testing.assert_close(network(image), model.eval()(image))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(weight.requires_grad for weight in network.parameters())
    assert teachers.of_run(str(tmp_path / "run")) == opened.teacher
    assert opened.teacher.network == "unet, features 8-16, norm batch, 1 outputs"
    file = tmp_path / "run" / "teacher" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="is not the teacher that the run started with"):
        distillation.load(str(tmp_path / "run"), CPU)
    teachers.store(str(tmp_path / "run"), {}, None)
    assert teachers.of_run(str(tmp_path / "run")) is None, "the copy of a start that was killed is deleted"


@pytest.mark.parametrize(
    ("recipe", "rule", "scale", "message"),
    [
        (recipe_of(targets="distance"), LIVECELL, Scale(), "its targets are foreground, those of the recipe distance"),
        (recipe_of().model_copy(update={"crop": (32, 7)}), LIVECELL, Scale(), "at least 8 x 8 pixels; set a larger"),
        (recipe_of(), Intensity(background=90), Scale(), "other grey levels .* prepare --intensity-from"),
        (recipe_of(), Intensity(rule="percentile"), Scale(), "prepare --intensity-from"),
        (recipe_of(), LIVECELL, Scale(pixel_scale=0.5), "at pixel scale 0.5; .* prepare --pixel-scale 1"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(
    tmp_path: Path, recipe: Recipe, rule: Intensity, scale: Scale, message: str
) -> None:
    save(tmp_path, recipe_of((4, 8, 16)))
    with pytest.raises(UserError, match=message) as error:
        distillation.open_teacher(str(tmp_path), recipe, rule, scale)
    assert "\n" not in str(error.value)
    finding = check.teacher(str(tmp_path), recipe, rule, scale)
    assert (finding.level, finding.message) == ("fail", str(error.value)[:300])
    assert check.teacher(str(tmp_path), recipe_of(), LIVECELL, Scale(diameter=20.0)).level == "pass"


def test_licences_of_all_data_behind_a_teacher_are_recorded(tmp_path: Path) -> None:
    """Grandteacher -> teacher -> student -> a network that is fine-tuned from the student."""

    def trained(folder: Path, name: str, teacher: teachers.Teacher | None, chain: tuple[parents.Parent, ...]) -> None:
        save(folder, recipe_of(), chain)
        teachers.write(str(folder), teacher)
        (folder / "data.json").write_text(json.dumps({**DATA, "name": name, "licence": f"licence of {name}"}))

    trained(tmp_path / "first", "A", None, ())
    first = distillation.open_teacher(str(tmp_path / "first"), recipe_of()).teacher
    trained(tmp_path / "second", "B", first, ())
    second = distillation.open_teacher(str(tmp_path / "second"), recipe_of()).teacher
    assert [data.name for data in second.datasets] == ["B", "A"]
    trained(tmp_path / "student", "C", second, ())
    checkpoint.copy(str(tmp_path / "student"), str(tmp_path / "copy"))
    licence = checkpoint.load_data(str(tmp_path / "copy"))["licence"]
    assert licence == "licence of C; learned from a network trained on B (licence of B); A (licence of A)"
    card = model_card.describe(str(tmp_path), str(tmp_path / "copy"), (), None)
    assert [data.name for data in card.datasets] == ["C", "B", "A"]
    assert card.facts()["teacher"]["sha256"] == second.sha256
    chain = start_from.open_parent(str(tmp_path / "copy"), recipe_of()).chain
    trained(tmp_path / "tuned", "D", None, chain)
    assert [data.name for data in parents.datasets(chain)] == ["C", "B", "A"]
    assert "C (licence of C); B (licence of B); A" in checkpoint.load_data(str(tmp_path / "tuned"))["licence"]
    assert [data.name for data in distillation.open_teacher(str(tmp_path / "tuned"), recipe_of()).teacher.datasets] == [
        "D",
        "C",
        "B",
        "A",
    ]


def test_a_teacher_with_invalid_files_is_refused(tmp_path: Path) -> None:
    save(tmp_path, recipe_of())
    store(tmp_path / "run", distillation.open_teacher(str(tmp_path), recipe_of()))
    file = tmp_path / "run" / "teacher" / "teacher.json"
    valid = json.loads(file.read_text())["teacher"]
    for values in ({**valid, "sha256": 3}, {**valid, "datasets": []}, {**valid, "more": 1}, "x"):
        file.write_text(json.dumps({"teacher": values}))
        with pytest.raises(UserError, match=r"teacher\.json: "):
            teachers.of_run(str(tmp_path / "run"))
    (tmp_path / "recipe.yaml").write_text("model: {features: [1099511627776, 1099511627776]}")
    with pytest.raises(UserError, match="does not contain this recipe's weights"):
        distillation.open_teacher(str(tmp_path), recipe_of())


def test_a_teacher_and_its_weight_need_each_other(tiny_dataset: str, tmp_path: Path) -> None:
    weighted = Recipe(distillation=DistillationConfig(weight=0.5))
    preflight.teacher(tiny_dataset, weighted, True)
    preflight.teacher(tiny_dataset, Recipe(), False)
    with pytest.raises(UserError, match=r"weight is 0\.5, but there is no teacher; give `train --teacher CHECKPOINT`"):
        preflight.teacher(tiny_dataset, weighted, False)
    with pytest.raises(UserError, match="weight is 0, so the teacher would be ignored"):
        preflight.teacher(tiny_dataset, Recipe(), True)
    assert arguments.base_recipe(["--teacher", "runs/large"]).distillation.weight > 0, "the default recipe is distill"
    assert arguments.base_recipe(["--teacher", "runs/large", "--recipe", "small"]).distillation.weight == 0


def test_a_resumed_run_may_state_its_teacher_again(tmp_path: Path) -> None:
    save(tmp_path / "large", recipe_of())
    teacher = distillation.open_teacher(str(tmp_path / "large"), recipe_of()).teacher
    for given in (None, str(tmp_path / "large")):
        teachers.check_same("run", teacher, given)
    for stored, origin in ((teacher, str(tmp_path / "large")), (None, "no teacher")):
        with pytest.raises(UserError, match=f"learns from {origin}, not from elsewhere; leave out --teacher"):
            teachers.check_same("run", stored, "elsewhere")


def test_any_network_of_the_project_can_be_a_teacher(tmp_path: Path) -> None:
    recipe = Recipe(model=ModelConfig(name="BasicUNet", options={"features": [4, 4, 8, 8, 8, 4]}))
    torch.manual_seed(0)
    checkpoint.save(str(tmp_path), build_model(recipe.model, 1), {}, progress.Progress(), recipe)
    store(tmp_path / "run", distillation.open_teacher(str(tmp_path), recipe_of()))
    assert distillation.load(str(tmp_path / "run"), CPU)(torch.zeros(1, 1, 20, 36)).shape == (1, 1, 20, 36)
