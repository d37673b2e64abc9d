"""Weighted binary cross-entropy (BCE) plus Dice, each a mean over images, so independent of how a batch is split.

The loss of the other output channels (boundaries or distances) is that of the target kind (targets/).

The BCE weight of a pixel is w = w_class + w0 exp(-(d1 + d2)^2 / (2 sigma^2)) (Ronneberger et al. 2015, eq. 2):
`prepare` draws the exponential once; w0 is applied here, so a sweep can search it without preparing the data again.
Ignored pixels change no loss: BCE is the mean over an image's other pixels (targets/masked.py).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from raylivecell.recipe import LossConfig
from raylivecell.targets import masked
from raylivecell.targets.dice import dice_loss
from raylivecell.targets.registry import Targets, target
from raylivecell.targets.sample_planes import BORDER, CELL, FOREGROUND, IGNORED, MAPS


class Loss(NamedTuple):
    """Scalar tensors; `total` is minimised."""

    total: Tensor
    bce: Tensor
    dice: Tensor
    aux: Tensor
    """Loss of boundaries or distances; 0 if the recipe has neither."""
    teacher: Tensor
    """Loss of the teacher's maps; 0 without a teacher."""


def segmentation_loss(logits: Tensor, planes: Tensor, config: LossConfig, targets: Targets) -> Loss:
    """Loss of a batch.

    Args:
        logits: float (B, C, H, W), channels as `Target.channels`.
        planes: uint8 (B, 2 + C, H, W) as in `targets.sample_planes`.
        config: weights.
        targets: target kind.
    """
    classes = planes[:, FOREGROUND, None]
    foreground, ignored = (classes == CELL).float(), classes == IGNORED
    logits, maps = masked.fill(logits.float(), planes[:, MAPS].float() / 255.0, ignored)
    return _loss(logits, foreground, maps, ignored, planes, config, targets)


def with_teacher(
    hard: Loss,
    logits: Tensor,
    teacher_logits: Tensor,
    planes: Tensor,
    weight: float,
    config: LossConfig,
    targets: Targets,
) -> Loss:
    """Loss of a batch with a teacher: (1 - weight) * `hard` + weight * the loss of the teacher's maps.

    The teacher's maps are targets like those drawn from labels, but have all values between 0 and 1: the distances are
    weighted by its foreground. They are defined everywhere, also at pixels without annotation.

    Args:
        hard: `segmentation_loss` of the batch.
        logits: as there.
        teacher_logits: the teacher's, without gradient; same shape.
        planes: as there; only the border weights are used.
        weight: 0 to 1.
        config: weights.
        targets: target kind.
    """
    maps = torch.sigmoid(teacher_logits.float())
    nothing_ignored = torch.zeros_like(maps[:, :1], dtype=torch.bool)
    soft = _loss(logits.float(), maps[:, :1], maps[:, 1:], nothing_ignored, planes, config, targets).total
    return hard._replace(total=(1 - weight) * hard.total + weight * soft, teacher=soft)


def _loss(
    logits: Tensor,
    foreground: Tensor,
    maps: Tensor,
    ignored: Tensor,
    planes: Tensor,
    config: LossConfig,
    targets: Targets,
) -> Loss:
    """Loss of logits (B, C, H, W) for a foreground (B, 1, H, W) and other maps (B, C - 1, H, W), all 0 to 1.

    Logits and maps are from `masked.fill` where pixels are `ignored`, bool (B, 1, H, W). Of `planes` only the border
    weights are used.
    """
    # Plain numbers instead of tensors: creating a tensor on a GPU waits for all work queued there.
    weight = config.background_weight + (config.cell_weight - config.background_weight) * foreground
    if config.border_weight:
        weight = weight + planes[:, BORDER, None].float() * (config.border_weight / 255.0)
    bce = masked.bce(logits[:, :1], foreground, ignored, weight)
    dice = dice_loss()(logits[:, :1], foreground)
    aux = target(targets).loss(logits[:, 1:], maps, foreground, ignored)
    total = config.bce_weight * bce + (1 - config.bce_weight) * dice + config.aux_weight * aux
    return Loss(total, bce, dice, aux, torch.zeros_like(total))
