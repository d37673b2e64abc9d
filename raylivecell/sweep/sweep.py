"""Search for a better recipe with Ray Tune and Optuna around the same training loop.

1. The driver opens the study (study.py), decodes the samples into the object store once, and divides the cluster
   among trials.
2. Tune runs the trials (sweep/trial.py) that the study suggests; ASHA stops weak ones.
3. `--final-seeds` trains the starting and the best recipe again with fresh seeds (sweep/final_seeds.py).
4. best.yaml, its checkpoint, trials.csv and report.html are written, from the study and the runs' folders only.

A sweep ends with the best.yaml of a finished run, or with an error that states the reason.
"""

from collections import Counter
from collections.abc import Callable, Iterable

import optuna
from optuna.trial import TrialState

from raylivecell.core import addresses, storage
from raylivecell.core.console import console
from raylivecell.core.errors import UserError
from raylivecell.data import shards
from raylivecell.ingest.dataset import open_samples, stream_budget_bytes
from raylivecell.ingest.order import SampleSchedule
from raylivecell.recipe import Recipe
from raylivecell.runs import checkpoint, progress
from raylivecell.runs import folder as run_folder
from raylivecell.runtime import prometheus, session
from raylivecell.sweep import final_seeds, report, space, space_check, statistics, tune
from raylivecell.sweep.board import TrialTable
from raylivecell.sweep.search import Search
from raylivecell.sweep.space import SweepConfig
from raylivecell.sweep.study import StudyFile, finished, folder_of, left_running, open_study
from raylivecell.sweep.trial import SweepContext
from raylivecell.training import preflight

BEST = progress.FOLDER + "best"


def sweep(
    data: str,
    out: str,
    recipe: Recipe,
    config: SweepConfig,
    trials: int,
    resume: bool = False,
    study_url: str | None = None,
    max_concurrent: int | None = None,
    retries: int = 1,
    seeds: int = 0,
    mlflow: str | None = None,
) -> optuna.Study:
    """Search `config`'s space around `recipe` on the dataset at `data`; return the study.

    Args:
        data: URI of a prepared dataset.
        out: URI of the sweep's folder: study.db, trials/, best.yaml, checkpoint_best/, trials.csv, report.html.
        recipe: the first trial.
        config: search space and search settings.
        trials: total number of trials, including those before a `resume`.
        resume: continue the sweep in `out`.
        study_url: Optuna storage to use instead of OUT/study.db.
        max_concurrent: maximum number of concurrent trials; default: limited by the cluster's resources.
        retries: restarts of a trial from its latest checkpoint after a crash.
        seeds: number of fresh seeds for training the candidates again (sweep/final_seeds.py).
        mlflow: tracking URI, to also log trials to MLflow.

    Raises:
        UserError: no such dataset, a space that does not fit the recipe, `out` in use, too few CPUs, no complete trial.
    """
    data, out = storage.absolute(data), storage.absolute(out)
    if trials < 1:
        raise UserError(f"--trials {trials}: give at least 1")
    _check(data, recipe, config)
    _check_unused(out, data, recipe, config, resume)
    resources = _trial_resources(recipe, config, max_concurrent)
    file = StudyFile(out, study_url)
    study = open_study(file.url, out, recipe, config, resume)
    run_folder.initialise(out, data, space.dump(recipe, config))
    shared = _context(data, out, recipe, config, resources)
    remaining = trials - len(finished(study))
    console.print(_summary_line(config, resources, remaining, trials), soft_wrap=True)
    if remaining > 0:
        _search(study, file, shared, config, resources, remaining, retries, mlflow)
    _tidy(out, study)
    file.publish()
    complete = len(finished(study)) >= trials
    storage.write_bytes(storage.join(out, "trials.csv"), statistics.trials_csv(study, recipe, config).encode())
    if complete or statistics.complete(study):
        _finish(data, shared, config, study, resources, retries, seeds if complete else 0)
    if not complete:
        raise UserError(f"interrupted after {len(finished(study))} of {trials} trials; resume with --resume always")
    return study


def _trial_resources(recipe: Recipe, config: SweepConfig, max_concurrent: int | None) -> tune.TrialResources:
    """Connect to the cluster and divide it among trials; UserError for a recipe that its hardware cannot run."""
    session.connect(dashboard=True)
    _check_variants(recipe, config, preflight.hardware)
    if config.workers_per_trial > 1 and config.stops_early:
        preflight.state_api()
    resources = tune.capacity(config, session.machines(), max_concurrent)
    preflight.gpus_work()
    return resources


def _check(data: str, recipe: Recipe, config: SweepConfig) -> None:
    """Raise UserError if all trials, or all trials with one of the searched values, would fail."""
    space_check.check(recipe, config)
    _check_variants(recipe, config, lambda variant: _check_batch(variant, config))
    shape = recipe.crop, recipe.augment.device
    preflight.samples_fit(data, recipe)
    _check_variants(recipe, config, lambda variant: preflight.teacher(data, variant, False))
    for _, variant in space_check.variants(recipe, config):
        if (variant.crop, variant.augment.device) != shape:
            preflight.samples_fit(data, variant)
    _check_networks(recipe, config)
    rows = len(shards.list_rows(data, "train"))
    if not shards.list_rows(data, "val"):
        raise UserError(f"dataset at {data} has no validation images to compare trials on; prepare some")
    steps = SampleSchedule(recipe.seed, rows, recipe.batch_size, recipe.phases).steps
    every = recipe.loop.report_steps
    if config.stops_early and every is not None and every >= steps:
        raise UserError(
            f"trials of {steps} steps with a report every {every} cannot be stopped early; lower loop.report_steps, "
            "or use --sweep.no-early-stopping"
        )


def _check_networks(recipe: Recipe, config: SweepConfig) -> None:
    """Raise UserError for a MONAI network that does not accept the options of the trials that would build it."""
    preflight.network(recipe)
    searched = list(space.searched_fields(config))
    if "model.name" in searched and any(path.startswith("model.options") for path in searched):
        return  # each trial combines a network with other options
    _check_variants(
        recipe, config, lambda variant: None if variant.model == recipe.model else preflight.network(variant)
    )


def _check_batch(recipe: Recipe, config: SweepConfig) -> None:
    preflight.batch_divides(recipe.batch_size, config.workers_per_trial, "--sweep.workers-per-trial")


def _check_variants(recipe: Recipe, config: SweepConfig, check: Callable[[Recipe], object]) -> None:
    """Run a check on the starting recipe and on each of its variants (`space_check.variants`)."""
    check(recipe)
    for path, variant in space_check.variants(recipe, config):
        try:
            check(variant)
        except UserError as error:
            raise UserError(f"sweep.space: with {path} {space.get(variant, path)!r}, {error}") from error


def _check_unused(out: str, data: str, recipe: Recipe, config: SweepConfig, resume: bool) -> None:
    """Raise UserError unless `out` is new, or contains a sweep with the same recipe and search to resume."""
    if run_folder.failure(out) is not None:
        raise UserError(f"{out} contains a failed training run; choose another --out, or delete it")
    if not run_folder.check_resumable(out, data, resume):
        return
    if space.load(storage.join(out, run_folder.RECIPE)) != (recipe, config):
        raise UserError(f"the sweep at {out} has another recipe or search; resume it with {out}/recipe.yaml")


def _summary_line(config: SweepConfig, resources: tune.TrialResources, remaining: int, trials: int) -> str:
    """Describe the sweep in one line."""
    done = f" ({trials - remaining} done before)" if remaining < trials else ""
    hardware = f"{resources.gpus:g} GPU and {resources.cpus:g} CPU" if resources.gpus else f"{resources.cpus:g} CPU"
    workers = f", {config.workers_per_trial} workers each" if config.workers_per_trial > 1 else ""
    early = "ASHA stops weak trials" if config.stops_early else "every trial trains to the end"
    return (
        f"{trials} trials{done}, {resources.max_concurrent} at once{workers}, {hardware} per worker; {config.sampler}; "
        f"{early}"
    )


def _context(data: str, out: str, recipe: Recipe, config: SweepConfig, resources: tune.TrialResources) -> SweepContext:
    store = stream_budget_bytes()
    return SweepContext(
        recipe,
        out,
        open_samples(data, recipe.targets != "foreground"),
        store // resources.max_concurrent,
        resources.threads,
        config.workers_per_trial,
        resources.cpus,
        resources.gpus,
        "ms_per_image" in config.objectives,
    )


def _search(
    study: optuna.Study,
    file: StudyFile,
    shared: SweepContext,
    config: SweepConfig,
    resources: tune.TrialResources,
    remaining: int,
    retries: int,
    mlflow: str | None,
) -> None:
    search = Search(study, shared.recipe, config, left_running(study, file.url))
    done = len(finished(study))

    def on_change() -> None:
        file.publish()
        states = Counter(trial.state for trial in study.get_trials(deepcopy=False))
        trials = {state.name.lower(): states[state] for state in TrialState}
        prometheus.show_sweep(addresses.name(shared.out), trials, _best_so_far(study, config))

    with TrialTable(done + remaining, done, _best_so_far(study, config), space.SCORES[shared.recipe.targets]) as board:
        tune.run(
            shared,
            resources,
            retries,
            [tune.TrialProgress(board, shared.out, on_change), *tune.mlflow_callbacks(mlflow, study.study_name)],
            search_alg=search,
            scheduler=tune.scheduler(study, config),
            num_samples=remaining,
        )
    on_change()


def _tidy(out: str, study: optuna.Study) -> None:
    """Delete all but the best checkpoint of each trial, including those that a process wrote after its trial ended."""
    for trial in finished(study):
        progress.delete_all_but_best(storage.join(out, folder_of(trial.number)))


def _best_so_far(study: optuna.Study, config: SweepConfig) -> float | None:
    scores = [trial.values[0] for trial in statistics.complete(study)]
    return max(scores, default=None) if config.objectives[0] != "ms_per_image" else None


def _best(study: optuna.Study, config: SweepConfig) -> optuna.trial.FrozenTrial:
    """The trial with the best first objective; with several objectives, of those on the Pareto front."""
    if not statistics.complete(study):
        reasons = {str(trial.user_attrs.get("failed", "stopped early")) for trial in finished(study)}
        raise UserError(
            f"no best.yaml: none of {len(finished(study))} trials trained to the end ({'; '.join(sorted(reasons))}); "
            "fix that and use another --out, or continue with --resume always and more --trials"
        )
    front = study.best_trials
    sign = 1 if space.OBJECTIVES[config.objectives[0]].mode == "max" else -1
    return max(front, key=lambda trial: (sign * trial.values[0], -trial.number))


def _warn_about_unfinished(names: Iterable[str], final_scores: final_seeds.Scores, seeds: int) -> None:
    """Print one line about candidates that did not finish with all of the requested `seeds`."""
    incomplete = [name for name in names if len(final_scores.get(name, {})) < seeds]
    if incomplete and final_scores:
        used = len(next(iter(final_scores.values())))
        unfinished = [name for name in names if name not in final_scores]
        suffix = f"; never finished: {', '.join(unfinished)}" if unfinished else ""
        console.print(
            f"runs with fresh seeds failed: compared over {used} of {seeds} seeds{suffix}",
            soft_wrap=True,
            markup=False,
        )
    elif incomplete:
        console.print(
            "runs with fresh seeds failed: candidates have no finished seed in common; best.yaml is that of the best "
            "trial, whose score is not confirmed",
            soft_wrap=True,
            markup=False,
        )


def _finish(
    data: str,
    shared: SweepContext,
    config: SweepConfig,
    study: optuna.Study,
    resources: tune.TrialResources,
    retries: int,
    seeds: int,
) -> None:
    """Train the candidates with `seeds` fresh seeds; write best.yaml, its checkpoint and report.html."""
    out, recipe, best = shared.out, shared.recipe, _best(study, config)
    names = final_seeds.candidates(recipe, config, study, best)
    if seeds:
        _write_best(out, config, study, best, {})  # kept if the runs with fresh seeds are interrupted
        final_seeds.run(shared, names, seeds, resources, retries)
    final_scores = final_seeds.scores(out, names, len(shared.samples.train))
    _warn_about_unfinished(names, final_scores, seeds)
    reason = _write_best(out, config, study, best, final_scores)
    listed = {name: list(by_seed.values()) for name, by_seed in final_scores.items()}
    report.write(out, data, recipe, config, study, best, listed)
    console.print(f"best: {reason}", soft_wrap=True, markup=False)
    console.print(f"written: {out}/report.html, best.yaml, {BEST}/, trials.csv, study.db", soft_wrap=True, markup=False)


def _write_best(
    out: str, config: SweepConfig, study: optuna.Study, best: optuna.trial.FrozenTrial, final_scores: final_seeds.Scores
) -> str:
    """Write best.yaml and its checkpoint, from the runs with fresh seeds if any finished; returns the reason."""
    objectives = [space.OBJECTIVES[name] for name in config.objectives]
    listed = ", ".join(f"{objective.unit} {value:.4g}" for objective, value in zip(objectives, best.values))
    folder, reason = storage.join(out, folder_of(best.number)), f"trial {best.number} of {len(study.trials)}; {listed}"
    if final_scores and [objective.column for objective in objectives] == ["score"]:
        folder, reason = final_seeds.winner(out, final_scores, objectives[0].unit)
    source = progress.find(folder)
    text = storage.read_bytes(storage.join(source, progress.RECIPE))
    storage.write_bytes(storage.join(out, "best.yaml"), f"# {reason}.\n".encode() + text)
    checkpoint.copy(source, storage.join(out, BEST))
    return reason
