"""Ray Train as a run is given to it: how many workers with what, where to, which of its own helpers."""

import os
from collections.abc import Sequence
from typing import Any, cast

import ray
import ray.train
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from raylivecell import runtime
from raylivecell.errors import UserError
from raylivecell.gloo import GlooConfig
from raylivecell.job import Job
from raylivecell.worker import RANK, work

# How often the controller looks at its workers; at Ray's 2 s a two-worker run starts and ends 8 s later.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")


class _Trainer(TorchTrainer):
    def _create_default_callbacks(self) -> list[Any]:
        """Without those that only cost a start (Ray 2.60): a process each, 1.5 s of a core."""
        unneeded: tuple[type, ...] = (DatasetsCallback,)  # workers read for themselves
        if runtime.started_here():
            unneeded += (PlacementGroupCleanerCallback,)  # for clusters that outlive a killed driver
        callbacks = super()._create_default_callbacks()  # type: ignore[misc]  # of Ray Train v2, not v1
        return [one for one in callbacks if not isinstance(one, unneeded)]


def trainer(
    job: Job,
    workers: int | tuple[int, int],
    cpus: float,
    gpus: float,
    retries: int,
    callbacks: Sequence[UserCallback] = (),
) -> TorchTrainer:
    """Ray Train over `workers`, each with so many CPUs and GPUs; the run's folder is the job's."""
    parent, name = job.out.rsplit("/", 1)
    return _Trainer(
        work,  # type: ignore[arg-type]  # Ray's type leaves the return value out
        train_loop_config={"job": ray.put(job)},  # not itself: the controller would load torch to read it
        torch_config=TorchConfig(backend="nccl", timeout_s=600) if gpus else cast(TorchConfig, GlooConfig()),
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


def fit(trainer: TorchTrainer) -> dict[str, Any] | None:
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
