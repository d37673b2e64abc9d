"""Weighted binary cross-entropy plus Dice, each a mean over images, so that no split of a batch changes their sum.

Where the recipe asks for more than the foreground, the loss of the other outputs is added: of boundaries BCE plus Dice,
of distances the squared error inside cells alone, for outside of them nothing reads them.

BCE's weight of a pixel is w = w_class + w0 exp(-(d1 + d2)^2 / (2 sigma^2)) (Ronneberger et al. 2015, eq. 2): the
exponential is drawn once by `prepare`, w0 is applied here and can be searched without drawing again.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raylivecell.recipe import LossConfig

# Squared errors of distances are some 0.02, a tenth of the losses beside them.
DISTANCE_SCALE = 10.0


class Loss(NamedTuple):
    """Scalar tensors; `total` is what is minimised."""

    total: Tensor
    bce: Tensor
    dice: Tensor
    fields: Tensor
    """Of boundaries or distances; 0 where the recipe has none."""


@functools.cache
def dice_loss() -> nn.Module:
    """MONAI's Dice loss, as the paper uses it: logits and targets (B, C, H, W) -> scalar.

    1 - 2 sum(p g) / (sum p^2 + sum g^2) of each image and channel, then their mean (V-Net's form, arXiv:1606.04797).
    MONAI takes 3 to 5 s to import: only training does, and not what merely loads this module.
    """
    from monai.losses import DiceLoss

    return DiceLoss(sigmoid=True, squared_pred=True)


def segmentation_loss(logits: Tensor, targets: Tensor, config: LossConfig) -> Loss:
    """The loss of a batch.

    Args:
        logits: float (B, C, H, W), channels as `recipe.CHANNELS`.
        targets: uint8 (B, 1 + C, H, W): foreground, 1 in a cell; 255 times the exponential above; 255 times the fields.
        config: shares and weights.
    """
    logits = logits.float()
    target = targets[:, :1].float()
    # Of numbers, not of tensors: to make one on a GPU is to wait for all that it was told before.
    weight = config.background_weight + (config.cell_weight - config.background_weight) * target
    if config.border_weight:
        weight = weight + targets[:, 1:2].float() * (config.border_weight / 255.0)
    bce = F.binary_cross_entropy_with_logits(logits[:, :1], target, weight=weight)
    dice = dice_loss()(logits[:, :1], target)
    fields = _field_loss(logits[:, 1:], targets[:, 2:].float() / 255.0, target)
    total = config.bce_weight * bce + (1 - config.bce_weight) * dice + config.aux_weight * fields
    return Loss(total, bce, dice, fields)


def _field_loss(logits: Tensor, fields: Tensor, foreground: Tensor) -> Tensor:
    """Of logits and fields (B, C - 1, H, W): none, a boundary, or two distances."""
    channels = logits.shape[1]
    if channels == 0:
        return logits.new_zeros(())
    if channels == 1:
        return F.binary_cross_entropy_with_logits(logits, fields) + dice_loss()(logits, fields)
    inside = foreground.sum(dim=(2, 3)).clamp(min=1)
    error = (torch.sigmoid(logits) - fields).square() * foreground
    return DISTANCE_SCALE * (error.sum(dim=(2, 3)) / inside).mean()
