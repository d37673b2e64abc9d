"""A network on whole images: the one place where pixels become logits and logits probabilities. No Ray here.

1. An image that fits goes through the network whole; a larger one in overlapping windows, blended.
2. With test-time augmentation, probabilities of the four flips are averaged.
3. Cell is where the logit is over 0, that is where the probability is over 0.5.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raylivecell.images import grey_levels
from raylivecell.images.intensity import Frame, Intensity
from raylivecell.network import windows
from raylivecell.network.unet import build_model
from raylivecell.recipe import Recipe

FLIPS: tuple[tuple[int, ...], ...] = ((), (1,), (2,), (1, 2))


def build(recipe: Recipe, device: torch.device, rule: Intensity | None = None) -> nn.Module:
    """A fresh network of `recipe` on `device`, in the recipe's memory format, for images on the scale of `rule`."""
    return to_device(build_model(recipe.model, recipe.outputs, rule), recipe, device)


@torch.inference_mode()
def logits(network: nn.Module, images: Tensor, flips: bool = False) -> Tensor:
    """Logits of whole images, float32 (B, C, H, W), on the network's device.

    Args:
        network: in evaluation mode.
        images: uint8 (B, H, W) of any size.
        flips: average the probabilities of the image and its three flips.
    """
    images = images.to(next(network.parameters()).device)
    if not flips:
        return _logits(network, images)
    total = torch.zeros((), device=images.device)
    for axes in FLIPS:
        back = tuple(axis + 1 for axis in axes)
        total = total + torch.sigmoid(_logits(network, images.flip(axes))).flip(back)
    return torch.logit(total / len(FLIPS))


def maps(network: nn.Module, image: NDArray[np.uint8], flips: bool = False) -> NDArray[np.float32]:
    """What `recipe.CHANNELS` names in each pixel of an image (H, W) of any size, float32 (C, H, W), 0 to 1."""
    pixels = torch.from_numpy(np.array(image))[None]
    return torch.sigmoid(logits(network, pixels, flips))[0].cpu().numpy()


def logits_of_picture(
    network: nn.Module, image: NDArray[np.uint8], padding: NDArray[np.bool_] | None, flips: bool = False
) -> Tensor:
    """`logits` of one frame (C, H, W) of which the network sees all but the padding; there they are minus infinity.

    Args:
        network: in evaluation mode.
        image: uint8 (H, W).
        padding: bool (H, W), where the frame is padding; None: nowhere.
        flips: as in `logits`.
    """
    if padding is None:
        return logits(network, torch.from_numpy(np.array(image))[None], flips)[0]
    (rows, columns), picture = grey_levels.without_padding(image, padding)
    found = logits(network, torch.from_numpy(picture)[None], flips)[0]
    whole = found.new_full((len(found), *image.shape), -torch.inf)
    whole[:, rows, columns] = found
    whole[:, torch.from_numpy(padding).to(whole.device)] = -torch.inf
    return whole


def maps_of_frame(network: nn.Module, frame: Frame, flips: bool = False) -> NDArray[np.float32]:
    """`maps` of a frame, float32 (C, H, W): 0 in its padding, and everywhere where it holds no picture."""
    found = torch.sigmoid(logits_of_picture(network, frame.levels, frame.padding, flips)).cpu().numpy()
    return found if frame.usable else np.zeros_like(found)


def to_device(model: nn.Module, recipe: Recipe, device: torch.device) -> nn.Module:
    """`model` on `device`, in the recipe's memory format."""
    model = model.to(device)
    return model.to(memory_format=torch.channels_last) if recipe.loop.channels_last else model  # type: ignore[call-overload]


def _logits(network: nn.Module, images: Tensor) -> Tensor:
    if images[0].numel() <= windows.WHOLE_PIXELS:
        return network(images.unsqueeze(1).float()).float()
    return torch.stack([_in_windows(network, image) for image in images])


def _in_windows(network: nn.Module, image: Tensor) -> Tensor:
    """Logits (C, H, W) of an image (H, W) that is too large for one piece."""

    def window(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        part = torch.from_numpy(np.ascontiguousarray(pixels)).to(image.device)
        return network(part[None, None].float())[0].float().cpu().numpy()

    parts = [part for _, part in windows.bands(window, image.cpu().numpy())]
    return torch.from_numpy(np.concatenate(parts, axis=1)).to(image.device)
