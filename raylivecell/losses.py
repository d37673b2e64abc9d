"""Weighted binary cross-entropy plus Dice, each a mean over images, so that no split of a batch changes their sum.

BCE's weight of a pixel is w = w_class + w0 exp(-(d1 + d2)^2 / (2 sigma^2)) (Ronneberger et al. 2015, eq. 2): the
exponential is drawn once by `prepare`, w0 is applied here and can be searched without drawing again.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from raylivecell.recipe_base import StrictModel


class LossConfig(StrictModel):
    """The loss: bce_share * BCE + (1 - bce_share) * Dice."""

    bce_share: float = Field(0.5, ge=0, le=1)
    """Share of the cross-entropy; the rest is Dice."""
    background_weight: float = Field(1.0, gt=0)
    """BCE weight of a background pixel."""
    cell_weight: float = Field(1.0, gt=0)
    """BCE weight of a pixel in a cell."""
    border_weight: float = Field(1.0, ge=0)
    """w0: extra BCE weight where two cells touch (10 in the original U-Net)."""


class Loss(NamedTuple):
    """Scalar tensors; `total` is what is minimised."""

    total: Tensor
    bce: Tensor
    dice: Tensor


@functools.cache
def _dice() -> Callable[[Tensor, Tensor], Tensor]:
    """1 - 2 sum(p g) / (sum p^2 + sum g^2) of each image, then their mean (V-Net's form, arXiv:1606.04797)."""
    from monai.losses import DiceLoss  # 1 to 3 s: only for a process that trains

    return DiceLoss(sigmoid=True, squared_pred=True)


def segmentation_loss(logits: Tensor, foreground: Tensor, border: Tensor, config: LossConfig) -> Loss:
    """The loss of a batch.

    Args:
        logits: float (B, 1, H, W).
        foreground: uint8 (B, H, W), 1 in a cell.
        border: uint8 (B, H, W), 255 times the exponential above.
        config: shares and weights.
    """
    logits = logits.float()
    target = foreground.unsqueeze(1).float()
    weight = torch.lerp(
        torch.tensor(config.background_weight, device=target.device),
        torch.tensor(config.cell_weight, device=target.device),
        target,
    )
    if config.border_weight:
        weight = weight + border.unsqueeze(1).float() * (config.border_weight / 255.0)
    bce = F.binary_cross_entropy_with_logits(logits, target, weight=weight)
    dice = _dice()(logits, target)
    return Loss(config.bce_share * bce + (1 - config.bce_share) * dice, bce, dice)
