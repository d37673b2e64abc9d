"""The Dice loss."""

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@functools.cache
def dice_loss() -> "nn.Module":
    """MONAI's Dice loss, as in the paper: logits and targets (B, C, H, W) -> scalar.

    1 - 2 sum(p g) / (sum p^2 + sum g^2) for each image and channel, then the mean (V-Net's form, arXiv:1606.04797).
    Importing MONAI takes 3 to 5 s, so only training imports it, not this module.
    """
    from monai.losses import DiceLoss

    return DiceLoss(sigmoid=True, squared_pred=True)
