"""Ray Tune and Optuna around the same training loop: a better recipe than the one it started from.

1. The driver opens the study (study.py), decodes the samples into the object store once, and divides the cluster.
2. Tune runs the trials (sweep/trial.py) that the study asks for; ASHA stops the weak ones.
3. Start and best are trained again with fresh seeds, on request (sweep/final_seeds.py).
4. best.yaml, its checkpoint, trials.csv and report.html are drawn from the study and the runs' folders alone.

A sweep ends with a best.yaml of a run that finished, or with an error that says why there is none.
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
    """Search `config`'s space around `recipe` on the dataset at `data`; the study.

    Args:
        data: URI of a prepared dataset.
        out: URI of the sweep's folder: study.db, trials/, best.yaml, checkpoint_best/, trials.csv, report.html.
        recipe: the first trial.
        config: what to search, and how.
        trials: how many in all, those before a `resume` counted in.
        resume: go on with the sweep in `out`.
        study_url: Optuna storage to use instead of OUT/study.db.
        at_once: trials at once; default: what the cluster has room for.
        retries: how often a trial goes on from its last checkpoint after a crash.
        seeds: fresh ones with which start and best are trained again, to their end (sweep/final_seeds.py).
        mlflow: tracking URI, where trials are logged to MLflow too.

    Raises:
        UserError: no such data, a space that does not fit the recipe, `out` in use, too few CPUs, no good trial.
    """
    data, out = storage.absolute(data), storage.absolute(out)
    if trials < 1:
        raise UserError(f"--trials {trials}: give at least 1")
    _check(data, recipe, config)
    _check_unused(out, data, recipe, config, resume)
    room = _room(recipe, config, max_concurrent)
    file = StudyFile(out, study_url)
    study = open_study(file.url, out, recipe, config, resume)
    run_folder.initialise(out, data, space.dump(recipe, config))
    shared = _shared(data, out, recipe, config, room)
    left = trials - len(finished(study))
    console.print(_plan_of(config, room, left, trials), soft_wrap=True)
    if left > 0:
        _search(study, file, shared, config, room, left, retries, mlflow)
    _tidy(out, study)
    file.publish()
    complete = len(finished(study)) >= trials
    storage.write_bytes(storage.join(out, "trials.csv"), statistics.trials_csv(study, recipe, config).encode())
    if complete or statistics.complete(study):
        _finish(data, shared, config, study, room, retries, seeds if complete else 0)
    if not complete:
        raise UserError(f"interrupted after {len(finished(study))} of {trials} trials; resume with --resume always")
    return study


def _room(recipe: Recipe, config: SweepConfig, max_concurrent: int | None) -> tune.TrialResources:
    """Join the cluster, and how it is shared among trials; UserError for what it cannot compute."""
    session.connect(dashboard=True)
    _check_variants(recipe, config, preflight.hardware)
    if config.workers_per_trial > 1 and config.stops_early:
        preflight.state_api()
    room = tune.capacity(config, session.machines(), max_concurrent)
    preflight.gpus_work()
    return room


def _check(data: str, recipe: Recipe, config: SweepConfig) -> None:
    """UserError for what would fail in every trial, or in each that takes one of the values to search."""
    space_check.check(recipe, config)
    _check_variants(recipe, config, lambda one: _check_batch(one, config))
    shape = recipe.crop, recipe.augment.device
    preflight.samples_fit(data, recipe)
    for _, variant in space_check.variants(recipe, config):
        if (variant.crop, variant.augment.device) != shape:
            preflight.samples_fit(data, variant)
    _check_networks(recipe, config)
    rows = len(shards.list_rows(data, "train"))
    if not shards.list_rows(data, "val"):
        raise UserError(f"dataset at {data} has no validation images, by which trials are compared; prepare some")
    steps = SampleSchedule(recipe.seed, rows, recipe.batch_size, recipe.phases).steps
    every = recipe.loop.report_steps
    if config.stops_early and every is not None and every >= steps:
        raise UserError(
            f"trials cannot be stopped early: {steps} steps with a report each {every}; lower loop.report_steps, "
            "or use --sweep.no-early-stopping"
        )


def _check_networks(recipe: Recipe, config: SweepConfig) -> None:
    """UserError for a network of MONAI that does not take the options of the trials that would build it."""
    preflight.network(recipe)
    searched = list(space.searched_fields(config))
    if "model.name" in searched and any(path.startswith("model.options") for path in searched):
        return  # each trial combines a network with options of its own
    _check_variants(recipe, config, lambda one: None if one.model == recipe.model else preflight.network(one))


def _check_batch(recipe: Recipe, config: SweepConfig) -> None:
    preflight.batch_divides(recipe.batch_size, config.workers_per_trial, "--sweep.workers-per-trial")


def _check_variants(recipe: Recipe, config: SweepConfig, check: Callable[[Recipe], object]) -> None:
    """Run a check on the starting recipe, and on it with each of the values to search that may differ for the check."""
    check(recipe)
    for path, variant in space_check.variants(recipe, config):
        try:
            check(variant)
        except UserError as error:
            raise UserError(f"sweep.space: with {path} {space.get(variant, path)!r}, {error}") from error


def _check_unused(out: str, data: str, recipe: Recipe, config: SweepConfig, resume: bool) -> None:
    """UserError unless `out` is new, or a sweep of the same recipe and search is meant to go on."""
    if run_folder.failure(out) is not None:
        raise UserError(f"{out} holds a training run that failed; choose another --out, or delete it")
    if not run_folder.check_resumable(out, data, resume):
        return
    if space.load(storage.join(out, run_folder.RECIPE)) != (recipe, config):
        raise UserError(f"the sweep at {out} has another recipe or search; resume it with its own {out}/recipe.yaml")


def _plan_of(config: SweepConfig, room: tune.TrialResources, left: int, trials: int) -> str:
    """What will be done, in one line."""
    done = f" ({trials - left} done before)" if left < trials else ""
    on = f"{room.gpus:g} GPU and {room.cpus:g} CPU" if room.gpus else f"{room.cpus:g} CPU"
    workers = f", {config.workers_per_trial} workers each" if config.workers_per_trial > 1 else ""
    early = "ASHA stops weak trials" if config.stops_early else "every trial trains to its end"
    return f"{trials} trials{done}, {room.max_concurrent} at once{workers}, {on} a worker; {config.sampler}; {early}"


def _shared(data: str, out: str, recipe: Recipe, config: SweepConfig, room: tune.TrialResources) -> SweepContext:
    store = stream_budget_bytes()
    return SweepContext(
        recipe,
        out,
        open_samples(data, recipe.targets != "foreground"),
        store // room.max_concurrent,
        room.threads,
        config.workers_per_trial,
        room.cpus,
        room.gpus,
        "ms_per_image" in config.objectives,
    )


def _search(
    study: optuna.Study,
    file: StudyFile,
    shared: SweepContext,
    config: SweepConfig,
    room: tune.TrialResources,
    left: int,
    retries: int,
    mlflow: str | None,
) -> None:
    search = Search(study, shared.recipe, config, left_running(study, file.url))
    done = len(finished(study))

    def changed() -> None:
        file.publish()
        states = Counter(trial.state for trial in study.get_trials(deepcopy=False))
        trials = {state.name.lower(): states[state] for state in TrialState}
        prometheus.show_sweep(addresses.name(shared.out), trials, _best_so_far(study, config))

    with TrialTable(done + left, done, _best_so_far(study, config), space.SCORES[shared.recipe.targets]) as board:
        tune.run(
            shared,
            room,
            retries,
            [tune.TrialProgress(board, shared.out, changed), *tune.mlflow_callbacks(mlflow, study.study_name)],
            search_alg=search,
            scheduler=tune.scheduler(study, config),
            num_samples=left,
        )
    changed()


def _tidy(out: str, study: optuna.Study) -> None:
    """A trial keeps its best checkpoint only: also one whose processes outlived its end by a moment."""
    for trial in finished(study):
        progress.delete_all_but_best(storage.join(out, folder_of(trial.number)))


def _best_so_far(study: optuna.Study, config: SweepConfig) -> float | None:
    scores = [trial.values[0] for trial in statistics.complete(study)]
    return max(scores, default=None) if config.objectives[0] != "ms_per_image" else None


def _best(study: optuna.Study, config: SweepConfig) -> optuna.trial.FrozenTrial:
    """The trial with the best of the first objective (of several objectives: among those that none beats in all)."""
    if not statistics.complete(study):
        reasons = {str(trial.user_attrs.get("failed", "stopped early")) for trial in finished(study)}
        raise UserError(
            f"no best.yaml: none of {len(finished(study))} trials trained to its end ({'; '.join(sorted(reasons))}); "
            "fix that and sweep with another --out, or continue with --resume always and more --trials"
        )
    best = study.best_trials
    sign = 1 if space.OBJECTIVES[config.objectives[0]].mode == "max" else -1
    return max(best, key=lambda trial: (sign * trial.values[0], -trial.number))


def _warn_of_unfinished(names: Iterable[str], confirmed: final_seeds.Scores, seeds: int) -> None:
    """Say in one line which candidates are not compared with all of the `seeds` that were asked for."""
    short = [name for name in names if len(confirmed.get(name, {})) < seeds]
    if short and confirmed:
        used = len(next(iter(confirmed.values())))
        left_out = [name for name in names if name not in confirmed]
        dropped = f"; never to its end: {', '.join(left_out)}" if left_out else ""
        console.print(
            f"confirming runs failed: compared over {used} of {seeds} seeds{dropped}", soft_wrap=True, markup=False
        )
    elif short:
        console.print(
            "confirming runs failed: no seed with which all candidates trained to their end; best.yaml is the best "
            "trial's, whose score was not confirmed",
            soft_wrap=True,
            markup=False,
        )


def _finish(
    data: str,
    shared: SweepContext,
    config: SweepConfig,
    study: optuna.Study,
    room: tune.TrialResources,
    retries: int,
    seeds: int,
) -> None:
    """Confirm the best trial with `seeds` fresh seeds; write best.yaml, its checkpoint and report.html."""
    out, recipe, best = shared.out, shared.recipe, _best(study, config)
    names = final_seeds.candidates(recipe, config, study, best)
    if seeds:
        _write_best(out, config, study, best, {})  # stays where the confirming runs are interrupted
        final_seeds.run(shared, names, seeds, room, retries)
    confirmed = final_seeds.scores(out, names, len(shared.samples.train))
    _warn_of_unfinished(names, confirmed, seeds)
    why = _write_best(out, config, study, best, confirmed)
    listed = {name: list(each.values()) for name, each in confirmed.items()}
    report.write(out, data, recipe, config, study, best, listed)
    console.print(f"best: {why}", soft_wrap=True, markup=False)
    console.print(f"written: {out}/report.html, best.yaml, {BEST}/, trials.csv, study.db", soft_wrap=True, markup=False)


def _write_best(
    out: str, config: SweepConfig, study: optuna.Study, best: optuna.trial.FrozenTrial, confirmed: final_seeds.Scores
) -> str:
    """Write best.yaml and its checkpoint, of the confirming runs where there are some; why it is the best."""
    named = ", ".join(f"{space.OBJECTIVES[one].unit} {value:.4g}" for one, value in zip(config.objectives, best.values))
    folder, why = storage.join(out, folder_of(best.number)), f"trial {best.number} of {len(study.trials)}; {named}"
    objectives = [space.OBJECTIVES[one] for one in config.objectives]
    if confirmed and [one.column for one in objectives] == ["score"]:
        folder, why = final_seeds.winner(out, confirmed, objectives[0].unit)
    source = progress.find(folder)
    text = storage.read_bytes(storage.join(source, progress.RECIPE))
    storage.write_bytes(storage.join(out, "best.yaml"), f"# {why}.\n".encode() + text)
    checkpoint.copy(source, storage.join(out, BEST))
    return why
