"""Trials that take milliseconds: `trial.OneWorker` with a formula instead of training."""

import math
from collections.abc import Iterator

import torch

from raylivecell.network import forward
from raylivecell.runs import checkpoint, progress
from raylivecell.sweep import trial
from raylivecell.training import loop
from raylivecell.training.job import TrainJob

BEST_LR = 3e-3


def quick_trial() -> type[trial.OneWorker]:
    """Class that replaces `tune.OneWorker`; local, so that Ray sends it by value: workers cannot import tests."""

    def row(job: TrainJob, step: int) -> dict[str, float]:
        """Report with a score that rises with the steps, is best at BEST_LR and varies slightly with the seed."""
        recipe, plan = job.recipe, job.schedule()
        score = 0.9 - 0.1 * abs(math.log10(recipe.optimizer.lr / BEST_LR)) - 0.2 * (1 - step / plan.steps)
        score += 1e-3 * math.sin(recipe.seed + recipe.loss.bce_weight)
        scores = dict.fromkeys(("val_dice", "val_iou", "val_mean_image_dice"), score)
        losses = dict.fromkeys(("loss", "bce", "dice_loss"), 1 - score)
        about = {"epoch": 1, "step": step, "samples": step * recipe.batch_size, "lr": recipe.optimizer.lr}
        return {**about, **losses, **scores, "images_per_s": 1.0, "data_wait_fraction": 0.0} | dict.fromkeys(
            ("seconds", "validation_seconds"), 0.1
        )

    def reports(job: TrainJob, place: object, last: str | None) -> Iterator[loop.TrainState]:
        """Replace `worker.reports`."""
        torch.set_num_threads(1)
        values, state = checkpoint.load_training(last) if last else (None, progress.Progress())
        plan, every = job.schedule(), job.recipe.loop.report_steps or 1
        training = loop.start(forward.build(job.recipe, torch.device("cpu")), job.recipe.optimizer, plan.steps)
        if values is not None:
            training.load(values, state)
        for step in range(state.step + every, plan.steps + 1, every):
            training.state.step = step
            training.state.history.append(row(job, step))
            yield training

    class QuickTrial(trial.OneWorker):
        def _begin(self, config: dict) -> None:
            trial.reports = reports  # type: ignore[assignment]  # of this process: an actor for such trials alone
            super()._begin(config)

    return QuickTrial
