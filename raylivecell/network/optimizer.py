"""Adam and the learning-rate schedules, as pure functions of the step."""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from raylivecell.recipe import OptimizerConfig


def schedule(config: OptimizerConfig, steps: int) -> Callable[[int], float]:
    """Learning-rate factor, in (0, 1], as a function of the step, for a run of `steps` steps."""

    def factor(step: int) -> float:
        warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
        t = min(step / max(steps, 1), 1.0)
        shape = {"constant": 1.0, "poly": (1 - t) ** 0.9, "cosine": (1 + math.cos(math.pi * t)) / 2}
        return warmup * shape[config.schedule]

    return factor


def build_optimizer(model: nn.Module, config: OptimizerConfig, steps: int) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """Build Adam for `model`, and its learning-rate schedule over `steps`."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    biases_and_norms = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": weights, "weight_decay": config.weight_decay},
        {"params": biases_and_norms, "weight_decay": 0.0},
    ]
    # Fused: 0.4 ms instead of 2.0 ms for 0.45 M parameters on one core, and a single launch on a GPU.
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, amsgrad=config.amsgrad, fused=True)
    return optimizer, LambdaLR(optimizer, schedule(config, steps))
