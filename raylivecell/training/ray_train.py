"""Run a training job with Ray Train: workers and their resources, run folder, retries. Imports no torch."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, cast

import ray
import ray.train
from ray.train import BackendConfig, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, UserCallback

from raylivecell.core import addresses, storage
from raylivecell.core.process_settings import environment
from raylivecell.runs import folder, progress
from raylivecell.runtime import ray_internals, session
from raylivecell.runtime.ray_errors import as_user_errors
from raylivecell.training.job import SCORE_COLUMN, TrainJob

# Seconds between the controller's polls of its workers; with Ray's default of 2 s, a two-worker run takes 8 s longer.
HEALTH_CHECK_INTERVAL_S = "0.2"


def trainer(
    job: TrainJob,
    workers: int | tuple[int, int],
    cpus: float,
    gpus: float,
    retries: int,
    callbacks: Sequence[UserCallback] = (),
) -> Any:
    """Ray Train's trainer for `job` in its run folder, with `cpus` and `gpus` for each of `workers`."""
    backend = BackendConfig()  # without GPUs the workers form their process group themselves: training/gloo.py
    if gpus:
        from ray.train.torch import TorchConfig

        backend = TorchConfig(backend="nccl", timeout_s=600)
    return ray_internals.data_parallel_trainer()(
        _run_worker,
        train_loop_config={"job": job},
        backend_config=backend,
        scaling_config=ScalingConfig(
            num_workers=cast(Any, workers),
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": cpus, **({"GPU": gpus} if gpus else {})},
            # On CPUs a process uses all cores of its machine; GPUs communicate fastest within a machine.
            placement_strategy="PACK" if gpus else "SPREAD",
        ),
        run_config=RunConfig(
            **folder.ray_storage(job.out),
            failure_config=FailureConfig(max_failures=retries),
            checkpoint_config=CheckpointConfig(num_to_keep=1, checkpoint_score_attribute=SCORE_COLUMN),
            callbacks=cast(Any, list(callbacks)),
        ),
    )


def _run_worker(config: dict[str, TrainJob]) -> Any:
    """The training function: start the worker's stream, then import torch and train.

    The stream needs no torch: its data tasks start while this process imports torch (5 s with MONAI).
    """
    job, context = config["job"], ray.train.get_context()
    last = ray.train.get_checkpoint()
    if last is not None:
        resume_from: str | None = storage.join(job.out, addresses.name(last.path))
    else:  # a resumed run may have lost Ray's list of checkpoints (`folder.check_resumable`)
        resume_from = progress.latest(job.out) if job.resumed else None
    step = progress.load_state(resume_from).step if resume_from else 0
    stream = job.stream(step, context.get_world_rank(), context.get_world_size())
    from raylivecell.training.worker import run_worker

    return run_worker(job, resume_from, stream)


def fit(trainer: Any) -> dict[str, Any] | None:
    """Run `trainer` to the end and return rank 0's result; worker errors that the user can fix become UserErrors."""
    with as_user_errors(), environment(**_ray_train_settings()):
        return cast(Any, _without_signal_handler(trainer.fit)).return_value


def _ray_train_settings() -> dict[str, str]:
    """Environment variables that Ray Train reads when a run starts and copies to its own processes."""
    settings = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": HEALTH_CHECK_INTERVAL_S}
    if session.started_here():
        return settings | {session.PREEMPTION_WATCHER: "0"}
    if ray.get_runtime_context().get_actor_id() is None:  # a driver, not a trial of a sweep
        # The dashboard then serves runs, their workers and errors at /api/train/v2/runs/v1.
        settings |= {"RAY_TRAIN_ENABLE_STATE_TRACKING": "1"}
    return settings


def _without_signal_handler(function: Callable[[], Any]) -> Any:
    """Call `function` in a thread, where Ray Train cannot replace the process's Ctrl-C handler.

    Ray Train's handler exits the process with code 0 or 1 and stays installed after the run. Without it, Ctrl-C raises
    KeyboardInterrupt here, and the run ends with the driver.
    """
    if threading.current_thread() is not threading.main_thread():
        return function()
    result: Future[Any] = Future()

    def run() -> None:
        try:
            result.set_result(function())
        except BaseException as error:  # any error is raised in the caller
            result.set_exception(error)

    threading.Thread(target=run, name="ray-train", daemon=True).start()
    return result.result()
