"""Ray Train for a run: workers and their resources, the run's folder, the retries. Imports no torch."""

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

# How often Ray Train's controller looks at its workers, seconds; at Ray's 2 s a two-worker run takes 8 s longer.
HEALTH_CHECK_INTERVAL_S = "0.2"


def trainer(
    job: TrainJob,
    workers: int | tuple[int, int],
    cpus: float,
    gpus: float,
    retries: int,
    callbacks: Sequence[UserCallback] = (),
) -> Any:
    """The trainer of Ray Train for `job`, whose folder is the run's, with `cpus` and `gpus` for each of `workers`."""
    return ray_internals.data_parallel_trainer()(
        _work,
        train_loop_config={"job": job},
        backend_config=_nccl()
        if gpus
        else BackendConfig(),  # without GPUs the workers form their group: training/gloo.py
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


def _work(config: dict[str, TrainJob]) -> Any:
    """The training function: start the worker's stream, then import torch and train.

    The stream needs no torch: its tasks' processes start while this one imports it (5 s with MONAI).
    """
    job, context = config["job"], ray.train.get_context()
    last = _last_checkpoint(job)
    step = progress.load_state(last).step if last else 0
    stream = job.stream(step, context.get_world_rank(), context.get_world_size())
    from raylivecell.training.worker import work

    return work(job, last, stream)


def _last_checkpoint(job: TrainJob) -> str | None:
    """URI of the checkpoint to resume from; none: from the start.

    Of a resumed run of which Ray's list of checkpoints was lost (`run_folder`), the latest complete one in its folder.
    """
    last = ray.train.get_checkpoint()
    if last is not None:
        return storage.join(job.out, addresses.name(last.path))
    return progress.latest(job.out) if job.resumed else None


def _nccl() -> BackendConfig:
    from ray.train.torch import TorchConfig

    return TorchConfig(backend="nccl", timeout_s=600)


def fit(trainer: Any) -> dict[str, Any] | None:
    """Run to the end; what rank 0 returned. An error the user can fix, found in a worker, is raised as a UserError."""
    with as_user_errors(), environment(**_ray_train_settings()):
        return cast(Any, _without_signal_handler(trainer.fit)).return_value


def _ray_train_settings() -> dict[str, str]:
    """Environment variables that Ray Train reads when a run starts, and passes on to its own processes."""
    settings = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": HEALTH_CHECK_INTERVAL_S}
    if session.started_here():
        return settings | {session.PREEMPTION_WATCHER: "0"}
    if ray.get_runtime_context().get_actor_id() is None:  # a driver, not a trial of a sweep
        # Runs, their workers and errors at /api/train/v2/runs/v1 of the dashboard's address.
        settings |= {"RAY_TRAIN_ENABLE_STATE_TRACKING": "1"}
    return settings


def _without_signal_handler(function: Callable[[], Any]) -> Any:
    """Call `function` in a thread, from which Ray Train cannot replace the process's handler of Ctrl-C.

    Its own ends the process with exit code 0 or 1 and stays installed after the run. Ctrl-C raises KeyboardInterrupt
    here instead; the run ends with the driver.
    """
    if threading.current_thread() is not threading.main_thread():
        return function()
    result: Future[Any] = Future()

    def run() -> None:
        try:
            result.set_result(function())
        except BaseException as error:  # whatever it is, it is raised in the caller
            result.set_exception(error)

    threading.Thread(target=run, name="ray-train", daemon=True).start()
    return result.result()
