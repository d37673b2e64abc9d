"""Run trials with Ray Tune: resources per trial, the ASHA scheduler, progress in the terminal."""

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

# Fraction of the CPUs for training: one CPU that augments feeds about four that train (520x704: 3 ms per image).
TRAIN_SHARE = 0.8


@dataclass(frozen=True)
class TrialResources:
    """How a cluster is divided among trials."""

    max_concurrent: int
    cpus: float
    """Per worker."""
    gpus: float
    """Per worker."""
    threads: int
    """torch threads in each worker."""


def capacity(config: SearchConfig, machines: Sequence[Machine], max_concurrent: int | None = None) -> TrialResources:
    """Divide the cluster among as many concurrent trials as its GPUs, else its CPUs allow; some CPUs are for Ray Data.

    Raises:
        UserError: too few resources for one trial, or for `max_concurrent`.
    """
    workers, gpus_each = config.workers_per_trial, config.gpus_per_worker
    cpus, gpus = sum(machine.cpus for machine in machines), sum(machine.gpus for machine in machines)
    if gpus and workers > 1 and gpus_each < 1:
        raise UserError(
            f"--sweep.gpus-per-worker {gpus_each:g}: the {workers} workers of a trial cannot share a GPU (NCCL); "
            "use --sweep.gpus-per-worker 1 or --sweep.workers-per-trial 1"
        )
    gpu_trials = placement.gpu_slots(machines, gpus_each) // workers
    if gpus and not gpu_trials:
        hint = "lower --sweep.workers-per-trial or --sweep.gpus-per-worker, or set CUDA_VISIBLE_DEVICES= to use CPUs"
        raise UserError(f"a trial of {workers} workers needs more than the cluster's {gpus:g} GPUs; {hint}")
    possible = placement.most_workers(machines, gpus_each) // workers
    if not possible:
        hint = "lower --sweep.workers-per-trial" if workers > 1 else "give Ray 2 CPUs"
        raise UserError(f"a trial of {workers} workers leaves no CPU for Ray Data on {cpus:g} CPUs; {hint}")
    concurrent = max_concurrent or min(gpu_trials or max(1, int(TRAIN_SHARE * cpus) // workers), possible)
    if gpu_trials and concurrent > gpu_trials:
        hint = f"use {min(gpu_trials, possible)}"
        raise UserError(f"--max-concurrent {concurrent} needs more than the cluster's {gpus:g} GPUs; {hint}")
    if concurrent > possible:
        raise UserError(
            f"--max-concurrent {concurrent} would leave no CPU for Ray Data on {cpus:g} CPUs; use {possible}"
        )
    cpus_each = placement.worker_cpus(concurrent * workers, machines, gpus_each)
    threads = max(1, int(cpus) // (concurrent * workers))
    return TrialResources(concurrent, cpus_each, gpus_each if gpu_trials else 0.0, threads)


def run(
    shared: SweepContext, resources: TrialResources, retries: int, callbacks: list[tune.Callback], **options: Any
) -> None:
    """Run all trials; their results are in their folders and in the study."""
    # Tune would log every trial's traceback here; the reason is in the study, the traceback in Ray's logs.
    settings = environment(
        TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1",
        RAY_AIR_NEW_OUTPUT="0",  # the new one prints tables at verbose=0 too
        TUNE_DISABLE_STRICT_METRIC_CHECKING="1",  # only the last row has ms_per_image
    )
    alone = shared.workers == 1
    trainable: Any = tune.with_parameters(OneWorker if alone else several_workers, shared=shared)
    # A trial of several workers only waits for them: Ray Train reserves their resources.
    per_trial = {"cpu": shared.cpus, "gpu": shared.gpus} if alone else {"cpu": 0.01}
    config = options.pop("param_space", None)
    tuner = tune.Tuner(
        tune.with_resources(trainable, per_trial),
        param_space=config,
        tune_config=tune.TuneConfig(
            max_concurrent_trials=resources.max_concurrent,
            reuse_actors=alone,
            trial_name_creator=str,
            trial_dirname_creator=lambda trial: trial.trial_id,
            **options,
        ),
        run_config=tune.RunConfig(
            **folder.ray_storage(storage.join(shared.out, "tune")),
            failure_config=tune.FailureConfig(max_failures=retries),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # trials write their checkpoints
            callbacks=callbacks,
            verbose=0,
        ),
    )
    with settings, log_levels({"ray.tune": logging.CRITICAL}):
        tuner.fit()


def scheduler(study: optuna.Study, config: SearchConfig) -> TrialScheduler:
    """ASHA with the results of the study's past trials, or no early stopping."""
    if not config.stops_early:
        return FIFOScheduler()
    asha = ASHAScheduler(
        time_attr="progress",
        metric="score",
        mode="max",
        max_t=100,
        grace_period=100 * config.grace,  # type: ignore[arg-type]  # may be any number
        reduction_factor=config.reduction,
    )
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)):
        past: Any = SimpleNamespace(trial_id=f"past-{trial.number}")
        asha.on_trial_add(None, past)  # type: ignore[arg-type]  # only the trial is read
        for step, score in trial.intermediate_values.items():
            progress = 100 * step / trial.user_attrs["steps"]
            asha.on_trial_result(None, past, {"progress": progress, "score": score})  # type: ignore[arg-type]
    return asha


def mlflow_callbacks(uri: str | None, name: str) -> list[tune.Callback]:
    """Callback that logs each trial to the MLflow server at `uri`, in the experiment `name`; [] without `uri`."""
    if uri is None:
        return []
    try:
        import mlflow  # noqa: F401
    except ImportError as error:
        raise UserError("--mlflow needs the package mlflow; pip install 'raylivecell[mlflow]'") from error
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    return [MLflowLoggerCallback(tracking_uri=uri, experiment_name=name)]


class TrialProgress(tune.Callback):
    """Show the trials' progress, and delete all but the best checkpoint of each finished trial."""

    def __init__(self, board: TrialTable, out: str, on_change: Callable[[], None] = lambda: None) -> None:
        self.board, self.out, self.on_change = board, out, on_change

    def __getstate__(self) -> dict[str, Any]:
        """Empty: Tune pickles its callbacks, and nothing reads the pickle."""
        return {}

    def _name(self, trial: Any) -> str:
        return str(trial.config["job"]["folder"]).split("/")[-1]

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Show the trial."""
        self.board.start(self._name(trial), trial.config["job"]["values"])
        self.on_change()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Show its progress."""
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
        self.on_change()
