"""The training loop, without Ray, cluster or command line.

1. Get a batch; the wait counts towards `data_wait_fraction`.
2. Forward on the device (the network normalises), loss, backward, gradient clipping, optimiser step, learning-rate
   schedule, weight average.
3. At the end of an epoch (or every `report_steps`): validate, add a row to the history, yield to the caller.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from raylivecell.ingest.order import SAMPLE, SampleSchedule
from raylivecell.network.losses import Loss, segmentation_loss, with_teacher
from raylivecell.network.optimizer import build_optimizer
from raylivecell.network.transfer import DeviceTransfer
from raylivecell.recipe import LoopConfig, LossConfig, OptimizerConfig
from raylivecell.runs.progress import Progress
from raylivecell.targets.registry import Targets
from raylivecell.targets.sample_planes import IMAGE
from raylivecell.training import acceleration

# Steps between checks for a non-finite loss on a GPU: reading a loss waits for the GPU.
GPU_CHECK_STEPS = 20
# Columns of the history for the parts of `segmentation_loss`.
LOSSES = ("loss", "bce", "dice_loss", "aux_loss", "teacher_loss")
OPTIONAL_LOSSES = LOSSES[3:]
"""Those that are left out of the history while they are 0: without boundaries or distances, without a teacher."""


class Distillation(NamedTuple):
    """Learning the maps of a teacher."""

    teacher: nn.Module
    """A network in evaluation mode, on the device of the training."""
    weight: float
    """Weight of its maps in the loss, 0 to 1."""


class NonFiniteLoss(Exception):
    """The loss is NaN or infinite at `step`, whose batch has the samples `samples`."""

    def __init__(self, step: int, samples: list[int]) -> None:
        super().__init__(f"loss is not finite at step {step}, samples {samples}")
        self.step, self.samples = step, samples


@dataclass
class TrainState:
    """Mutable state of training: network, averaged network, optimiser, learning-rate schedule and progress."""

    model: nn.Module
    average: AveragedModel | None
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    clip_norm: float | None
    state: Progress

    def network(self) -> nn.Module:
        """The network to validate and save."""
        return self.average.module if self.average is not None else self.model

    def state_dict(self) -> dict[str, Any]:
        """All fields except `state`, and the RNG state, as tensors and primitives."""
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "rng": torch.get_rng_state(),
        }

    def load(self, values: dict[str, Any], state: Progress) -> None:
        """Restore a `state_dict` and the progress saved with it."""
        self.model.load_state_dict(values["model"])
        if self.average is not None:
            self.average.load_state_dict(values["average"])
        self.optimizer.load_state_dict(values["optimizer"])
        self.scheduler.load_state_dict(values["scheduler"])
        torch.set_rng_state(values["rng"])
        self.state = state


def start(model: nn.Module, config: OptimizerConfig, steps: int) -> TrainState:
    """Initial state for training `model` from its current weights for `steps`."""
    optimizer, scheduler = build_optimizer(model, config, steps)
    average = None
    if config.ema_decay:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay), use_buffers=True)
    return TrainState(model, average, optimizer, scheduler, config.clip_norm, Progress())


def run(
    training: TrainState,
    forward: nn.Module,
    batches: Iterator[dict[str, Tensor]],
    schedule: SampleSchedule,
    config: LoopConfig,
    loss_config: LossConfig,
    targets: Targets,
    validate: Callable[[nn.Module], dict[str, float]],
    on_step: Callable[[int, float], None] = lambda step, images_per_s: None,
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    checkpoint_requested: Callable[[int], bool] = lambda step: False,
    distillation: Distillation | None = None,
) -> Iterator[TrainState]:
    """Train from `training.state.step` to `schedule.steps`; yields `training` after each new row of its history.

    Also yields `training` between reports, without a new row, when `checkpoint_requested` returns True.

    Args:
        training: changed in place.
        forward: the network to call: `training.model`, or a wrapper of it (DDP, compiled).
        batches: this rank's share of each batch, starting at the current step: {"planes": uint8 (b, 2 + C, H, W) as in
            targets/sample_planes.py}; other keys are ignored.
        schedule: the sample order that `batches` follows.
        config: report interval, precision and memory format.
        loss_config: the loss and its weights.
        targets: the target kind of `batches`.
        validate: network -> metrics `val_*`, equal on every rank.
        on_step: called after each step with steps done and images/s (of all ranks) since the last report.
        sum_over_ranks: returns the sum of a tensor over all ranks.
        checkpoint_requested: called with steps done; must return the same on every rank.
        distillation: a teacher, whose maps are learned too; None: only annotations are learned.

    Raises:
        NonFiniteLoss: on every rank at the same step, with the samples of the global batch.
    """
    device = next(training.model.parameters()).device
    send = DeviceTransfer(device)
    precision = acceleration.precision_of(config.precision, device)
    stats = _StepStats(schedule, sum_over_ranks, device)
    forward.train()
    for step in range(training.state.step, schedule.steps):
        begin = time.perf_counter()
        planes = send(next(batches)["planes"])
        stats.waited += time.perf_counter() - begin
        loss = _loss(forward, planes, precision, config, loss_config, targets, distillation)
        stats.add(step, torch.stack(loss).detach())
        _update(training, loss.total)
        training.state.step = step + 1
        on_step(step + 1, stats.images_per_s(step + 1))
        if _report_due(schedule, step, config.report_steps):
            row = stats.row(step, float(training.scheduler.get_last_lr()[0]))
            begin = time.perf_counter()
            row |= validate(training.network())
            row["validation_seconds"] = time.perf_counter() - begin
            forward.train()
            training.state.history.append(row)
            yield training
            stats = _StepStats(schedule, sum_over_ranks, device)
        elif checkpoint_requested(step + 1):
            stats.check(step)
            yield training


def _loss(
    forward: nn.Module,
    planes: Tensor,
    precision: acceleration.Precision,
    config: LoopConfig,
    loss_config: LossConfig,
    targets: Targets,
    distillation: Distillation | None,
) -> Loss:
    """Loss of a batch of `planes` on the network's device."""
    images = planes[:, IMAGE, None].contiguous(memory_format=_memory_format(config))
    with acceleration.autocast(precision, planes.device):
        logits = forward(images)
        if distillation is not None:
            with torch.no_grad():  # results of inference_mode cannot be used in a loss that is differentiated
                teacher_logits = distillation.teacher(images)
    loss = segmentation_loss(logits, planes, loss_config, targets)
    if distillation is None:
        return loss
    return with_teacher(loss, logits, teacher_logits, planes, distillation.weight, loss_config, targets)


def _update(training: TrainState, loss: Tensor) -> None:
    """Step the optimiser, the learning-rate schedule and the average."""
    training.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if training.clip_norm is not None:
        nn.utils.clip_grad_norm_(training.model.parameters(), training.clip_norm)
    training.optimizer.step()
    training.scheduler.step()
    if training.average is not None:
        training.average.update_parameters(training.model)


def _report_due(schedule: SampleSchedule, step: int, every: int | None) -> bool:
    if every is None:
        return schedule.epoch_ends(step)
    return (step + 1) % every == 0 or step + 1 == schedule.steps


def _memory_format(config: LoopConfig) -> torch.memory_format:
    return torch.channels_last if config.channels_last else torch.contiguous_format


class _StepStats:
    """Sums since the last report, on the device; detects non-finite losses at the same step on all ranks."""

    def __init__(
        self, schedule: SampleSchedule, sum_over_ranks: Callable[[Tensor], Tensor], device: torch.device
    ) -> None:
        self.schedule, self.sum_over_ranks, self.device = schedule, sum_over_ranks, device
        self.losses = torch.zeros(len(LOSSES), device=device)
        self.first_step: int | None = None
        self.unchecked: list[Tensor] = []
        self.waited, self.started_at = 0.0, time.perf_counter()

    def add(self, step: int, losses: Tensor) -> None:
        if self.first_step is None:
            self.first_step = step
        self.losses += losses
        self.unchecked.append(losses[0])
        if self.device.type == "cpu" or len(self.unchecked) == GPU_CHECK_STEPS:
            self.check(step)

    def check(self, step: int) -> None:
        """Raise NonFiniteLoss on every rank if any rank's loss was not finite at an unchecked step."""
        if not self.unchecked:
            return
        non_finite = self.sum_over_ranks((~torch.isfinite(torch.stack(self.unchecked))).float()).nonzero()
        if len(non_finite):
            failed_step = step - len(self.unchecked) + 1 + int(non_finite[0, 0])
            raise NonFiniteLoss(failed_step, sorted({int(i) for i in self.schedule.rows(failed_step)[:, SAMPLE]}))
        self.unchecked = []

    def images_per_s(self, done: int) -> float:
        steps = done - (self.first_step if self.first_step is not None else done)
        return steps * self.schedule.batch_size / (time.perf_counter() - self.started_at)

    def row(self, step: int, lr: float) -> dict[str, Any]:
        """Row of the history: losses are means over steps and ranks."""
        self.check(step)
        assert self.first_step is not None
        seconds = time.perf_counter() - self.started_at
        ranks = self.sum_over_ranks(torch.ones(1, device=self.device))
        losses = (self.sum_over_ranks(self.losses) / ranks / (step + 1 - self.first_step)).tolist()
        return {
            "epoch": self.schedule.epochs_done(step),
            "step": step + 1,
            "samples": (step + 1) * self.schedule.batch_size,
            **{name: loss for name, loss in zip(LOSSES, losses) if loss or name not in OPTIONAL_LOSSES},
            "lr": lr,
            "images_per_s": self.images_per_s(step + 1),
            "data_wait_fraction": self.waited / seconds,
            "seconds": seconds,
        }
