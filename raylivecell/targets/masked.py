"""Losses without the ignored pixels, each the mean over images of the mean over an image's other pixels.

`fill` makes ignored pixels certain background, which adds exactly nothing to the sums of BCE and of the Dice loss, and
stops their gradient. `bce` divides by the number of the other pixels. Where no pixel is ignored, losses and gradients
are those of the plain losses to the bit.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

NO_CELL = -1e4
"""Logit whose sigmoid is 0 in float32."""


def fill(logits: "Tensor", maps: "Tensor", ignored: "Tensor") -> tuple["Tensor", "Tensor"]:
    """Return logits and maps, float (B, C, H, W), with NO_CELL and 0 at the pixels `ignored`, bool (B, 1, H, W)."""
    # clone() keeps the memory format, masked_fill() does not: another one changes the last bit of gradients.
    return logits.clone().masked_fill_(ignored, NO_CELL), maps.clone().masked_fill_(ignored, 0.0)


def bce(logits: "Tensor", maps: "Tensor", ignored: "Tensor", weight: "Tensor | None" = None) -> "Tensor":
    """Weighted binary cross-entropy; 0 if all pixels of an image are ignored.

    Args:
        logits: float (B, C, H, W), from `fill`.
        maps: float (B, C, H, W), 0 to 1, from `fill`.
        ignored: bool (B, 1, H, W).
        weight: float (B, 1, H, W); None: 1.
    """
    import torch.nn.functional as F

    counted = (~ignored).sum(dim=(1, 2, 3), keepdim=True).clamp(min=1)
    scale = ignored[0].numel() / counted  # 1 for an image without ignored pixels
    return F.binary_cross_entropy_with_logits(logits, maps, weight=scale if weight is None else weight * scale)
