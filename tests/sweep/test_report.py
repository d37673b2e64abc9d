"""The sweep report without Ray: its sections for different studies."""

from pathlib import Path

import optuna
import pytest

from raylivecell.recipe import Recipe
from raylivecell.sweep import report, space
from raylivecell.sweep.space import SweepConfig

ROTATION = "augment.rotation.p"
RECIPE = Recipe()


def write_report(
    folder: Path, trials: int, config: SweepConfig, monkeypatch: pytest.MonkeyPatch, recipe: Recipe = RECIPE
) -> str:
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))
    for number in range(trials):
        trial = study.ask()
        space.suggest(trial, recipe, config)
        trial.set_user_attr("steps", 10)
        trial.report(0.5 + number / 100, 10)
        study.tell(trial, 0.5 + number / 100)
    monkeypatch.setattr(report.statistics, "RESAMPLES", 2)
    monkeypatch.setattr(report.checkpoint, "load_model", lambda _: (None, None))
    monkeypatch.setattr(report.pictures, "overlays", lambda *_: [("<1>.tif", b"png")])
    final_scores = {"start": [0.5, 0.6], "trial-1-augment.elastic.p-off": [0.7, 0.7]}
    report.write(str(folder), "data", recipe, config, study, study.best_trial, final_scores)
    return (folder / "report.html").read_text()


def test_each_searched_field_of_compare_off_has_a_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {**SweepConfig().space, ROTATION: space.Dimension(low=0, high=1, step=0.5)}
    config = SweepConfig(space=fields, compare_off={space.ELASTIC: 0.0, ROTATION: 0.0, "optimizer.clip_norm": None})
    page = write_report(tmp_path, 20, config, monkeypatch)
    assert "augment.elastic.p: off (0.0) or on" in page
    assert "augment.rotation.p: off (0.0) or on" in page
    assert "optimizer.clip_norm: off" not in page, "it is not searched"
    assert page.count("Off and on: trials, mean, 95 % interval</figcaption>") == 2
    assert page.count("Strength</figcaption>") == 1, "alpha_x and sigma are searched only while deformation is on"
    assert "<figcaption>Importance</figcaption>" in page
    assert "trial 1 augment.elastic.p off" in page
    assert "Best, trial 19: &lt;1&gt;.tif" in page


def test_few_trials_give_neither_importance_nor_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = write_report(
        tmp_path, 2, SweepConfig(space={"optimizer.lr": SweepConfig().space["optimizer.lr"]}), monkeypatch
    )
    assert ": off (" not in page
    assert f"Fewer than {report.statistics.LEAST_TRIALS} comparable trials" in page


@pytest.mark.parametrize(("recipe", "score"), [(RECIPE, "Dice"), (Recipe(targets="distance"), "mSA")])
def test_labels_are_the_score_of_the_recipes_targets(
    recipe: Recipe, score: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = write_report(tmp_path, 2, SweepConfig(), monkeypatch, recipe)
    assert f"<th>mean {score}</th>" in page.replace(' class="left"', "")
