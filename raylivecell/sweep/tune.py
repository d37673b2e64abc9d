"""Ray Tune's run of some trials: room for them, the scheduler that stops weak ones, and what is shown meanwhile."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import optuna
from optuna.trial import TrialState
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from raylivecell.core import storage
from raylivecell.core.errors import UserError
from raylivecell.core.process_settings import environment, log_levels
from raylivecell.runs import folder
from raylivecell.runs import progress as run_state
from raylivecell.runtime import placement
from raylivecell.runtime.placement import Machine
from raylivecell.sweep.board import TrialTable
from raylivecell.sweep.space import SearchConfig
from raylivecell.sweep.study import end_of
from raylivecell.sweep.trial import OneWorker, SweepContext, several_workers

# What a trial's training may take of the CPUs: a CPU that augments feeds some four that train (520x704: 3 ms an image).
TRAIN_SHARE = 0.8


@dataclass(frozen=True)
class TrialResources:
    """How a cluster is shared out among trials."""

    max_concurrent: int
    cpus: float
    """Of each worker."""
    gpus: float
    """Of each worker."""
    threads: int
    """torch's in each worker."""


def capacity(config: SearchConfig, machines: Sequence[Machine], max_concurrent: int | None = None) -> TrialResources:
    """Trials that run at once on these machines: as many as there are GPUs for, else CPUs, with some left for Ray Data.

    Raises:
        UserError: not even one trial has room, or not `max_concurrent`.
    """
    workers, gpus_each = config.workers_per_trial, config.gpus_per_worker
    cpus, gpus = sum(machine.cpus for machine in machines), sum(machine.gpus for machine in machines)
    if gpus and workers > 1 and gpus_each < 1:
        raise UserError(
            f"--sweep.gpus-per-worker {gpus_each:g} with {workers} workers a trial: they cannot share a GPU (NCCL); "
            "use --sweep.gpus-per-worker 1 or --sweep.workers-per-trial 1"
        )
    by_gpu = placement.gpu_slots(machines, gpus_each) // workers
    if gpus and not by_gpu:
        hint = "lower --sweep.workers-per-trial or --sweep.gpus-per-worker, or set CUDA_VISIBLE_DEVICES= to use CPUs"
        raise UserError(f"a trial of {workers} workers needs more than the cluster's {gpus:g} GPUs; {hint}")
    room = placement.most_workers(machines, gpus_each) // workers
    if not room:
        hint = "lower --sweep.workers-per-trial" if workers > 1 else "give Ray 2 CPUs"
        raise UserError(f"a trial of {workers} workers leaves no CPU for Ray Data on {cpus:g} CPUs; {hint}")
    most = max_concurrent or min(by_gpu or max(1, int(TRAIN_SHARE * cpus) // workers), room)
    if by_gpu and most > by_gpu:
        raise UserError(f"--max-concurrent {most} needs more than the cluster's {gpus:g} GPUs; use {min(by_gpu, room)}")
    if most > room:
        raise UserError(f"--max-concurrent {most} would leave no CPU for Ray Data on {cpus:g} CPUs; use {room}")
    share = placement.worker_cpus(most * workers, machines, gpus_each)
    threads = max(1, int(cpus) // (most * workers))
    return TrialResources(most, share, gpus_each if by_gpu else 0.0, threads)


def run(
    shared: SweepContext, room: TrialResources, retries: int, callbacks: list[tune.Callback], **options: Any
) -> None:
    """Run trials, until there are no more; what became of each is in its folder, and in the study."""
    # Tune would log every trial's traceback here; the reason is in the study, the traceback in Ray's own logs.
    settings = environment(
        TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1",
        RAY_AIR_NEW_OUTPUT="0",  # the new one prints tables at verbose=0 too
        TUNE_DISABLE_STRICT_METRIC_CHECKING="1",  # milliseconds an image come with the last row
    )
    alone = shared.workers == 1
    trainable: Any = tune.with_parameters(OneWorker if alone else several_workers, shared=shared)
    # A trial of several workers waits for them: Ray Train reserves theirs.
    resources = {"cpu": shared.cpus, "gpu": shared.gpus} if alone else {"cpu": 0.01}
    config = options.pop("param_space", None)
    tuner = tune.Tuner(
        tune.with_resources(trainable, resources),
        param_space=config,
        tune_config=tune.TuneConfig(
            max_concurrent_trials=room.max_concurrent,
            reuse_actors=alone,
            trial_name_creator=str,
            trial_dirname_creator=lambda trial: trial.trial_id,
            **options,
        ),
        run_config=tune.RunConfig(
            **folder.ray_storage(storage.join(shared.out, "tune")),
            failure_config=tune.FailureConfig(max_failures=retries),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # trials keep their own
            callbacks=callbacks,
            verbose=0,
        ),
    )
    with settings, log_levels({"ray.tune": logging.CRITICAL}):
        tuner.fit()


def scheduler(study: optuna.Study, config: SearchConfig) -> TrialScheduler:
    """ASHA that knows the trials of the study, or none."""
    if not config.stops_early:
        return FIFOScheduler()
    asha = ASHAScheduler(
        time_attr="progress",
        metric="score",
        mode="max",
        max_t=100,
        grace_period=100 * config.grace,  # type: ignore[arg-type]  # any number will do
        reduction_factor=config.reduction,
    )
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)):
        past: Any = SimpleNamespace(trial_id=f"past-{trial.number}")
        asha.on_trial_add(None, past)  # type: ignore[arg-type]  # it looks at the trial alone
        for step, score in trial.intermediate_values.items():
            progress = 100 * step / trial.user_attrs["steps"]
            asha.on_trial_result(None, past, {"progress": progress, "score": score})  # type: ignore[arg-type]
    return asha


def mlflow_callbacks(uri: str | None, name: str) -> list[tune.Callback]:
    """What logs each trial to the MLflow at `uri`, in the experiment `name`; nothing without a `uri`."""
    if uri is None:
        return []
    try:
        import mlflow  # noqa: F401
    except ImportError as error:
        raise UserError("--mlflow needs the package mlflow; pip install 'raylivecell[mlflow]'") from error
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    return [MLflowLoggerCallback(tracking_uri=uri, experiment_name=name)]


class TrialProgress(tune.Callback):
    """Shows the trials as they go, and clears up after each."""

    def __init__(self, board: TrialTable, out: str, changed: Callable[[], None] = lambda: None) -> None:
        self.board, self.out, self.changed = board, out, changed

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its callbacks, and nobody reads that."""
        return {}

    def _name(self, trial: Any) -> str:
        return str(trial.config["job"]["folder"]).split("/")[-1]

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Show it."""
        self.board.start(self._name(trial), trial.config["job"]["values"])
        self.changed()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Show how far it is."""
        if "failed" not in result:
            self.board.report(self._name(trial), result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Show its end."""
        self._end(trial, trial.last_result)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Show that it crashed."""
        self._end(trial, None)

    def _end(self, trial: Any, result: dict[str, Any] | None) -> None:
        run_state.delete_all_but_best(storage.join(self.out, trial.config["job"]["folder"]))
        self.board.end(self._name(trial), end_of(result).name.lower(), (result or {}).get("failed"))
        self.changed()
