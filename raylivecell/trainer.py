"""Ray Train as a run is given to it: how many workers with what, where to, which of its own helpers. Loads no torch.

Its controller is a process of its own in a cluster. Where the command itself has started Ray, and both end together, it
runs in the command's process, which has loaded Ray Train already: workers start 1.2 s earlier.
"""

import asyncio
import os
from collections.abc import Sequence
from typing import Any, cast

import ray
import ray.train
from ray._private.ray_constants import env_bool
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.backend import BackendConfig
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller.controller import TrainController
from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from raylivecell import runtime
from raylivecell.errors import UserError
from raylivecell.gloo import GlooConfig
from raylivecell.job import RANK, Job

# How often the controller looks at its workers; at Ray's 2 s a two-worker run starts and ends 8 s later.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")


class _Workers(WorkerGroup):
    """Of a controller that is no actor (Ray 2.60)."""

    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: Any) -> Any:
        """No environment but the command's, which they have anyway: so they, and their data tasks, take over processes
        that have decoded samples, instead of new ones, which take 1 s each."""
        return custom_runtime_env

    def _init_train_context_on_workers(self, workers: Any, sync_actor: Any, train_context_args: dict[str, Any]) -> None:
        told = {
            "train_run_context": self._train_run_context,
            "synchronization_actor": sync_actor,
            "storage_context": self._storage_context,
            "worker_callbacks": self._worker_callbacks_to_propagate,
            "controller_actor": None,  # asked for past checkpoints alone
        }
        ray.get(
            [
                worker.actor.init_train_context.remote(
                    distributed_context=worker.distributed_context,
                    **told,
                    **{name: values[i] for name, values in train_context_args.items()},
                )
                for i, worker in enumerate(workers)
            ]
        )
        self._decorate_worker_log_file_paths(workers)


class _Controller(TrainController):
    worker_group_cls = _Workers


class _Trainer(DataParallelTrainer):
    def _initialize_and_run_controller(self, **told: Any) -> Any:
        """In this process, unless Ray outlives it, wants an actor to show, or this (a notebook's) has an event loop."""
        tracked = env_bool("RAY_TRAIN_ENABLE_STATE_TRACKING", False)
        if not runtime.started_here() or tracked or asyncio._get_running_loop():
            return super()._initialize_and_run_controller(**told)
        os.environ.setdefault("RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING", "0")  # it would write to the terminal
        controller = _Controller(**told)
        asyncio.run(controller.run())
        return controller.get_result()

    def _create_default_callbacks(self) -> list[Any]:
        """Without those that only cost a start (Ray 2.60): a process each, 1.5 s of a core."""
        unneeded: tuple[type, ...] = (DatasetsCallback,)  # workers read for themselves
        if runtime.started_here():
            unneeded += (PlacementGroupCleanerCallback,)  # for clusters that outlive a killed driver
        callbacks = super()._create_default_callbacks()
        return [one for one in callbacks if not isinstance(one, unneeded)]


def trainer(
    job: Job,
    workers: int | tuple[int, int],
    cpus: float,
    gpus: float,
    retries: int,
    callbacks: Sequence[UserCallback] = (),
) -> DataParallelTrainer:
    """Ray Train over `workers`, each with so many CPUs and GPUs; the run's folder is the job's."""
    parent, name = job.out.rsplit("/", 1)
    return _Trainer(
        _work,
        train_loop_config={"job": job},
        backend_config=_nccl() if gpus else GlooConfig(),
        scaling_config=ScalingConfig(
            num_workers=cast(Any, workers),
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": cpus, **({"GPU": gpus} if gpus else {})},
            # On CPUs a process uses all cores of its machine; GPUs speak fastest with those beside them.
            placement_strategy="PACK" if gpus else "SPREAD",
        ),
        run_config=RunConfig(
            name=name,
            storage_path=parent,
            failure_config=FailureConfig(max_failures=retries),
            checkpoint_config=CheckpointConfig(num_to_keep=1, checkpoint_score_attribute=RANK),
            callbacks=cast(Any, list(callbacks)),
        ),
    )


def _work(config: dict[str, Job]) -> Any:
    """The training function, which a worker loads, with torch; the driver does not."""
    from raylivecell.worker import work

    return work(config["job"])


def _nccl() -> BackendConfig:
    from ray.train.torch import TorchConfig

    return TorchConfig(backend="nccl", timeout_s=600)


def fit(trainer: DataParallelTrainer) -> dict[str, Any] | None:
    """Run to the end; what rank 0 returned. A user's mistake found in a worker is raised as itself."""
    try:
        return cast(Any, trainer.fit()).return_value
    except ray.train.WorkerGroupError as error:
        for failure in error.worker_failures.values():
            cause: BaseException | None = failure
            while cause is not None:
                if isinstance(cause, UserError):
                    raise cause from None
                cause = getattr(cause, "cause", None) or cause.__cause__
        raise
