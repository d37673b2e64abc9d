"""The end of a sweep, without Ray: best.yaml is the recipe of a finished run, or an error states why it is missing."""

import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import FrozenTrial, TrialState, create_trial

from raylivecell import recipe as recipes
from raylivecell.core.errors import UserError
from raylivecell.network.unet import build_model
from raylivecell.recipe import LoopConfig, ModelConfig, PhaseConfig, Recipe
from raylivecell.runs import checkpoint, progress
from raylivecell.runtime.placement import Machine
from raylivecell.sweep import final_seeds, space, study, sweep
from raylivecell.sweep.space import ELASTIC, Condition, Dimension, SweepConfig
from raylivecell.sweep.trial import OneWorker, SweepContext
from raylivecell.training import loop

STEPS = 10
RECIPE = Recipe(
    crop=(32, 32),
    phases=(PhaseConfig(steps=STEPS),),
    model=ModelConfig(features=(2, 4)),
    loop=LoopConfig(report_steps=5),
)
IN_GROUP = {"model.norm": Condition(in_=("group",))}
CONDITIONAL = SweepConfig(
    space={
        "model.norm": Dimension(choices=("batch", "group")),
        ELASTIC: Dimension(low=0, high=1, step=0.5, when=IN_GROUP),
        "augment.elastic.alpha_x": Dimension(low=50, high=1500, when={ELASTIC: Condition(above=0)}),
    },
    shares=(),
)


def write_run(folder: Path, recipe: Recipe, scores: list[float], steps: int = STEPS) -> None:
    """Write a run that reached `steps`, with a report for each of `scores` and its best checkpoint."""
    rows = [
        {"step": (index + 1) * steps // len(scores), "val_mean_image_dice": score} for index, score in enumerate(scores)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    best = max(range(len(rows)), key=lambda index: scores[index])
    state = progress.Progress(rows[best]["step"], rows[: best + 1])
    checkpoint.save(str(folder / progress.name(state.step)), build_model(recipe.model), {}, state, recipe)


def write_final_run(out: Path, name: str, seed: int, scores: list[float] | None, steps: int = STEPS) -> None:
    """Write a run with a final seed; if `scores` is None it crashed before its first report."""
    folder, recipe = out / "final" / f"{name}-seed{seed}", RECIPE.model_copy(update={"seed": seed})
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(recipes.dump(recipe))
    if scores is not None:
        write_run(folder, recipe, scores, steps)


def trial(config: SweepConfig, params: dict[str, Any], values: list[float], **more: Any) -> FrozenTrial:
    fixed = optuna.trial.FixedTrial(params)
    space.suggest(fixed, RECIPE, config)
    return create_trial(params=params, distributions=fixed.distributions, values=values, **more)


def study_of(config: SweepConfig, *trials: FrozenTrial) -> optuna.Study:
    directions = [{"max": "maximize", "min": "minimize"}[space.OBJECTIVES[name].mode] for name in config.objectives]
    optuna_study = optuna.create_study(directions=directions)
    optuna_study.add_trials(trials)
    return optuna_study


def test_a_trial_without_the_deformation_field_has_the_starting_value(tmp_path: Path) -> None:
    """Batch-norm trials lack the conditional `augment.elastic.p`, so the starting recipe's value applies to them."""
    start = RECIPE.augment.elastic.p
    assert start > 0
    params = {"model.norm": "batch", "augment.elastic.alpha_x": RECIPE.augment.elastic.alpha_x}
    searched = study_of(CONDITIONAL, trial(CONDITIONAL, params, [0.9]))
    candidates = final_seeds.candidates(RECIPE, CONDITIONAL, searched, searched.trials[0])
    assert list(candidates) == ["start", "trial-0-augment.elastic.p-off"], "trial 0 is the starting recipe itself"
    assert space.apply(RECIPE, candidates["trial-0-augment.elastic.p-off"]).augment.elastic.p == 0


@pytest.mark.parametrize(("objectives", "expected"), [(("dice",), 2), (("ms_per_image",), 1)])
def test_a_trial_without_deformation_is_compared_with_the_best_that_deforms(
    objectives: tuple[Any, ...], expected: int
) -> None:
    config = CONDITIONAL.model_copy(update={"objectives": objectives})
    deforming = [
        trial(config, {"model.norm": "group", ELASTIC: 0.5, "augment.elastic.alpha_x": alpha}, [score])
        for alpha, score in ((100.0, 0.5), (200.0, 0.8))
    ]
    searched = study_of(config, trial(config, {"model.norm": "group", ELASTIC: 0.0}, [0.9]), *deforming)
    candidates = final_seeds.candidates(RECIPE, config, searched, searched.trials[0])
    name = f"trial-0-augment.elastic.p-of-{expected}"
    assert list(candidates) == ["start", "trial-0", name]
    changed = space.apply(RECIPE, candidates[name]).augment.elastic
    assert (changed.p, changed.alpha_x) == (0.5, 100.0 * expected)


def test_each_searched_field_of_compare_off_adds_a_candidate() -> None:
    """The off value is also written into tied fields; a field that is not searched is skipped."""
    config = SweepConfig(
        space={
            "loss.border_weight": Dimension(low=0, high=9, tied_to=("loss.aux_weight",)),
            "optimizer.clip_norm": Dimension(choices=(None, 1.0)),
        },
        shares=(),
        compare_off={"loss.border_weight": 0.0, "optimizer.clip_norm": None, ELASTIC: 0.0},
    )
    trials = [
        trial(config, {"loss.border_weight": 4.0, "optimizer.clip_norm": None}, [0.9]),
        trial(config, {"loss.border_weight": 0.0, "optimizer.clip_norm": 1.0}, [0.8]),
    ]
    searched = study_of(config, *trials)
    candidates = final_seeds.candidates(RECIPE, config, searched, searched.trials[0])
    assert {name: list(values.values()) for name, values in candidates.items()} == {
        "start": [],
        "trial-0": [4.0, 4.0, None],
        "trial-0-loss.border_weight-off": [0.0, 0.0, None],
        "trial-0-optimizer.clip_norm-of-1": [4.0, 4.0, 1.0],
    }


def test_candidates_are_compared_over_the_seeds_that_all_finished(tmp_path: Path) -> None:
    for name, by_seed in {
        "start": [[0.5], [0.6], [0.1]],
        "trial-3": [None, [0.7, 0.65], [0.9]],  # crashed before a report with seed 1
        "trial-3-augment.elastic.p-off": [[0.9], [0.8], [0.85]],
    }.items():
        for seed, scores in enumerate(by_seed, 1):
            interrupted = (name, seed) == ("trial-3-augment.elastic.p-off", 3)
            write_final_run(tmp_path, name, seed, scores, STEPS // 2 if interrupted else STEPS)
    names = ["start", "trial-3", "trial-3-augment.elastic.p-off"]
    scores = final_seeds.scores(str(tmp_path), names, samples=8)
    assert scores == {"start": {2: 0.6}, "trial-3": {2: 0.7}, "trial-3-augment.elastic.p-off": {2: 0.8}}
    folder, why = final_seeds.winner(str(tmp_path), scores, "validation Dice")
    assert folder == str(tmp_path / "final" / "trial-3-augment.elastic.p-off-seed2"), "the seed, not an index"
    assert progress.find(folder)
    assert "with fresh seeds 2" in why
    assert final_seeds.scores(str(tmp_path), [*names, "trial-4"], samples=8) == {}, "a candidate that was never started"


def test_a_candidate_that_never_finished_cannot_win(tmp_path: Path) -> None:
    for seed, score in enumerate((0.4, 0.5), 1):
        write_final_run(tmp_path, "start", seed, [score])
        write_final_run(tmp_path, "trial-1", seed, [0.9], steps=5)
    scores = final_seeds.scores(str(tmp_path), ["start", "trial-1"], samples=8)
    assert scores == {"start": {1: 0.4, 2: 0.5}}
    assert final_seeds.winner(str(tmp_path), scores, "validation Dice")[0].endswith("start-seed2")
    assert final_seeds.scores(str(tmp_path / "none"), ["start"], samples=8) == {}


End = Callable[[Path, Recipe, int], dict[str, Any] | None]


def good(score: float) -> End:
    def end(folder: Path, recipe: Recipe, number: int) -> dict[str, Any]:
        write_run(folder, recipe, [score / 2, score])
        return {"step": STEPS, "steps": STEPS, "score": score, "ms_per_image": 5.0}

    return end


def stopped(folder: Path, recipe: Recipe, number: int) -> dict[str, Any]:
    write_run(folder, recipe, [0.99], steps=5)
    return {"step": 5, "steps": STEPS, "score": 0.99}


def diverged(folder: Path, recipe: Recipe, number: int) -> dict[str, Any]:
    return {"failed": "loss not finite at step 3", "score": -1.0, "step": 0, "steps": 1}


def crashed(folder: Path, recipe: Recipe, number: int) -> None:
    return None


class FakeTune:
    """Replaces `tune.run`: each trial ends in this process as configured."""

    def __init__(self, trials: list[End], final_runs: dict[str, End]) -> None:
        self.trials, self.final_runs = trials, final_runs

    def __call__(self, shared: Any, resources: Any, retries: int, callbacks: Any, **options: Any) -> None:
        if "param_space" in options:
            for job in options["param_space"]["job"]["grid_search"]:
                end = self.final_runs.get(job["folder"].removeprefix("final/"), good(0.5))
                end(Path(shared.out, job["folder"]), space.apply(shared.recipe, job["values"]), 0)
            return
        for number in range(options["num_samples"]):
            job = options["search_alg"].suggest(str(number))["job"]
            recipe = space.apply(shared.recipe, job["values"])
            result = self.trials[number](Path(shared.out, job["folder"]), recipe, number)
            options["search_alg"].on_trial_complete(str(number), result, error=result is None)


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Function that patches the sweep so that its trials end as configured."""

    def patch(trials: list[End], final_runs: dict[str, End] | None = None) -> None:
        monkeypatch.setattr(sweep.session, "connect", lambda dashboard: None)
        monkeypatch.setattr(sweep.session, "machines", lambda: [Machine(4)])
        monkeypatch.setattr(sweep.tune, "run", FakeTune(trials, final_runs or {}))
        monkeypatch.setattr(sweep.prometheus, "show_sweep", lambda *_: None)
        monkeypatch.setattr(sweep.report, "write", lambda *_: None)
        samples = SimpleNamespace(train=range(12))

        def shared(data: str, out: str, recipe: Recipe, config: SweepConfig, resources: Any) -> Any:
            return SimpleNamespace(recipe=recipe, out=out, samples=samples)

        monkeypatch.setattr(sweep, "_context", shared)

    return patch


SEARCH = SweepConfig(space={"optimizer.lr": Dimension(low=1e-4, high=3e-2, log=True)}, shares=(), sampler="random")


@pytest.mark.parametrize(
    ("trials", "final_runs", "seeds", "objectives", "expected"),
    [
        ([good(0.6)], {}, 0, ("dice",), "trial 0 of 1; validation Dice 0.6"),
        ([good(0.6)], {}, 2, ("dice",), "start; mean validation Dice with fresh seeds 1, 2"),
        ([diverged, good(0.6), crashed], {}, 0, ("dice",), "trial 1 of 3"),
        ([good(0.6), stopped], {}, 0, ("dice",), "trial 0 of 2"),
        (
            [good(0.6), good(0.7)],
            {"trial-1-seed1": good(0.8)},
            2,
            ("dice",),
            "trial-1; mean validation Dice",
        ),
        (
            [good(0.6), good(0.7)],
            {"trial-1-seed1": crashed},
            2,
            ("dice",),
            "start; mean validation Dice with fresh seeds 2",
        ),
        (
            [good(0.6), good(0.7)],
            {"trial-1-seed1": crashed, "trial-1-seed2": crashed},
            2,
            ("dice",),
            "start; mean",
        ),
        (
            [good(0.6), good(0.7)],
            {f"{name}-seed1": crashed for name in ("start", "trial-1")},
            1,
            ("dice",),
            "trial 1 of 2; validation Dice 0.7",
        ),
        ([good(0.6), good(0.7)], {"start-seed1": good(0.9)}, 1, ("dice", "ms_per_image"), "trial 1 of 2"),
        (
            [good(0.7), good(0.6)],
            {"trial-1-seed1": good(0.9)},
            1,
            ("ms_per_image",),
            "trial 0 of 2; ms an image 5",
        ),
    ],
)
def test_best_yaml_is_the_recipe_of_a_finished_run(
    tiny_dataset: str,
    tmp_path: Path,
    without_ray: Callable[..., None],
    trials: list[End],
    final_runs: dict[str, End],
    seeds: int,
    objectives: tuple[Any, ...],
    expected: str,
) -> None:
    without_ray(trials, final_runs)
    config = SEARCH.model_copy(update={"objectives": objectives})
    sweep.sweep(tiny_dataset, str(tmp_path / "out"), RECIPE, config, len(trials), seeds=seeds)
    text = (tmp_path / "out" / "best.yaml").read_text()
    assert text.startswith(f"# {expected}")
    _, recipe = checkpoint.load_model(str(tmp_path / "out"))
    assert recipe == recipes.load(tmp_path / "out" / "best.yaml")
    rows = list(csv.DictReader((tmp_path / "out" / "trials.csv").open()))
    assert len(rows) == len(trials)


def test_a_sweep_without_a_finished_trial_reports_the_reasons_and_can_be_resumed(
    tiny_dataset: str, tmp_path: Path, without_ray: Callable[..., None]
) -> None:
    out = tmp_path / "out"
    without_ray([diverged, crashed])
    line = r"no best\.yaml: none of 2 trials trained to the end \(crashed; loss not finite at step 3\); .*more --trials"
    with pytest.raises(UserError, match=line):
        sweep.sweep(tiny_dataset, str(out), RECIPE, SEARCH, 2)
    assert [row["failed"] for row in csv.DictReader((out / "trials.csv").open())] == [
        "loss not finite at step 3",
        "crashed",
    ]
    without_ray([good(0.6)])
    sweep.sweep(tiny_dataset, str(out), RECIPE, SEARCH, 3, resume=True, seeds=1)
    assert (out / "best.yaml").exists()


def test_a_resumed_sweep_ignores_final_runs_of_an_earlier_best(
    tiny_dataset: str, tmp_path: Path, without_ray: Callable[..., None]
) -> None:
    out = tmp_path / "out"
    without_ray([good(0.6), good(0.7)])
    sweep.sweep(tiny_dataset, str(out), RECIPE, SEARCH, 2, seeds=1)
    assert "fresh seeds" in (out / "best.yaml").read_text().splitlines()[0]
    without_ray([good(0.8)])
    sweep.sweep(tiny_dataset, str(out), RECIPE, SEARCH, 3, resume=True)
    assert (out / "best.yaml").read_text().startswith("# trial 2 of 3; validation Dice 0.8")


@pytest.mark.parametrize(
    ("changes", "config", "line"),
    [
        (
            {},
            {"space": {"model.norm": Dimension(choices=("batch", "sync_batch"))}},
            "with model.norm 'sync_batch', model",
        ),
        (
            {"batch_size": 4},
            {"space": {"batch_size": Dimension(low=2, high=8)}, "workers_per_trial": 2},
            "batch_size 3, a",
        ),
        (
            {},
            {"space": {"augment.device": Dimension(choices=("cpu", "cuda"))}},
            "augment.device 'cuda', augment.device is",
        ),
        ({}, {"objectives": ("dice", "dice")}, "lists one twice"),
    ],
)
def test_values_that_no_trial_can_train_are_an_error_before_the_first_trial(
    tiny_dataset: str,
    tmp_path: Path,
    without_ray: Callable[..., None],
    changes: dict[str, Any],
    config: dict[str, Any],
    line: str,
) -> None:
    without_ray([])
    recipe = RECIPE.model_copy(update=changes)
    with pytest.raises(UserError, match=re.escape(line)):
        sweep.sweep(tiny_dataset, str(tmp_path / "out"), recipe, SEARCH.model_copy(update=config), 2)
    assert not (tmp_path / "out").exists()


def test_finished_trials_include_failed_ones(tmp_path: Path) -> None:
    optuna_study = optuna.create_study()
    optuna_study.ask()
    optuna_study.tell(optuna_study.ask(), state=TrialState.FAIL)
    assert [trial.number for trial in study.finished(optuna_study)] == [1]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (loop.NonFiniteLoss(7, [1]), "loss not finite at step 7"),
        (UserError("checkpoint_000005/training.pt is not a valid training state"), "is not a valid training state"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), "out of GPU memory: CUDA out of memory."),
    ],
)
def test_an_error_that_a_retry_would_repeat_ends_a_trial_with_its_reason(error: Exception, reason: str) -> None:
    def reports() -> Iterator[loop.TrainState]:
        raise error
        yield

    worker = object.__new__(OneWorker)
    worker.failed, worker.reports = None, reports()
    result = worker.step()
    assert reason in result["failed"]
    assert result["done"]


def test_a_trials_batch_size_must_be_divisible_by_its_workers(tmp_path: Path) -> None:
    shared = SweepContext(RECIPE, str(tmp_path), SimpleNamespace(train=range(8)), 0, 1, 2, 1.0, 0.0, False)  # type: ignore[arg-type]
    job = {"folder": "trials/0000", "values": {"batch_size": 4}}
    assert shared.job({"job": job}).recipe.batch_size == 4
    job["values"] = {"batch_size": 3}
    with pytest.raises(UserError, match=r"a batch of 3 .* 2 workers; .*change --sweep\.workers-per-trial"):
        shared.job({"job": job})
