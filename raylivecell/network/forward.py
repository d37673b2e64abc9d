"""Networks on images of any size: the only module that turns pixels into logits and logits into probabilities. No Ray.

1. Small images are processed in one forward pass, larger ones in overlapping windows that are blended.
2. Test-time augmentation averages the probabilities of eight versions of the image (network/averaging.py).
3. A pixel belongs to a cell if its logit is above 0, that is, its probability above 0.5.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raylivecell.images import grey_levels
from raylivecell.images.intensity import Frame, Intensity
from raylivecell.network import windows
from raylivecell.network.averaging import averaged
from raylivecell.network.unet import build_model
from raylivecell.recipe import Recipe


def build(recipe: Recipe, device: torch.device, rule: Intensity | None = None) -> nn.Module:
    """Build the network of `recipe` with random weights, on `device`, in its memory format; `rule` as `build_model`."""
    return to_device(build_model(recipe.model, recipe.outputs, rule), recipe, device)


@torch.inference_mode()
def logits(network: nn.Module, images: Tensor) -> Tensor:
    """Logits of images, float32 (B, C, H, W), on the network's device.

    Args:
        network: in evaluation mode.
        images: uint8 (B, H, W) of any size.
    """
    images = images.to(next(network.parameters()).device)
    if images[0].numel() <= windows.WHOLE_PIXELS:
        return network(images.unsqueeze(1).float()).float()
    return torch.stack([_in_windows(network, image) for image in images])


def maps(network: nn.Module, image: NDArray[np.uint8], tta: bool = False) -> NDArray[np.float32]:
    """Output maps of an image (H, W) of any size, float32 (C, H, W), 0 to 1, channels as `Target.channels`.

    Args:
        network: in evaluation mode.
        image: uint8 (H, W).
        tta: average those of eight versions of the image: `averaging.averaged`.
    """

    def one_pass(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        return torch.sigmoid(logits(network, torch.from_numpy(np.array(pixels))[None]))[0].cpu().numpy()

    return averaged(one_pass)(image) if tta else one_pass(image)


def maps_of_images(network: nn.Module, images: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.float32]]:
    """`maps` of each of `images`: on a GPU, those of equal size pass the network together.

    On a CPU a batch is no faster, and its maps differ by up to 0.001 from those of single images.
    """
    if next(network.parameters()).device.type == "cpu":
        return [maps(network, image) for image in images]
    result: dict[int, NDArray[np.float32]] = {}
    for shape in {image.shape for image in images}:
        members = [i for i, image in enumerate(images) if image.shape == shape]
        together = max(1, windows.WHOLE_PIXELS // images[members[0]].size)  # no more memory than for one large image
        for first in range(0, len(members), together):
            batch = members[first : first + together]
            pixels = torch.from_numpy(np.stack([images[i] for i in batch]))
            result |= zip(batch, torch.sigmoid(logits(network, pixels)).cpu().numpy())
    return [result[i] for i in range(len(images))]


def logits_of_picture(network: nn.Module, image: NDArray[np.uint8], padding: NDArray[np.bool_] | None) -> Tensor:
    """`logits` of one image, (C, H, W): minus infinity in its padding, which is hidden from the network.

    Args:
        network: in evaluation mode.
        image: uint8 (H, W).
        padding: bool (H, W), True in the padding; None: no padding.
    """
    if padding is None:
        return logits(network, torch.from_numpy(np.array(image))[None])[0]
    (rows, columns), content = grey_levels.without_padding(image, padding)
    content_logits = logits(network, torch.from_numpy(content)[None])[0]
    frame_logits = content_logits.new_full((len(content_logits), *image.shape), -torch.inf)
    frame_logits[:, rows, columns] = content_logits
    frame_logits[:, torch.from_numpy(padding).to(frame_logits.device)] = -torch.inf
    return frame_logits


def maps_of_frame(network: nn.Module, frame: Frame, tta: bool = False) -> NDArray[np.float32]:
    """`maps` of a frame, float32 (C, H, W): 0 in its padding, and everywhere if the frame is not usable."""
    if frame.padding is None:
        output = maps(network, frame.levels, tta)
    else:
        window, content = grey_levels.without_padding(frame.levels, frame.padding)
        output = windows.outside_padding(maps(network, content, tta), window, frame.padding)
    return output if frame.usable else np.zeros_like(output)


def to_device(model: nn.Module, recipe: Recipe, device: torch.device) -> nn.Module:
    """Move `model` to `device`, in the recipe's memory format."""
    model = model.to(device)
    return model.to(memory_format=torch.channels_last) if recipe.loop.channels_last else model  # type: ignore[call-overload]


def _in_windows(network: nn.Module, image: Tensor) -> Tensor:
    """Logits (C, H, W) of an image (H, W) that is too large for one forward pass."""

    def window_logits(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        window = torch.from_numpy(np.ascontiguousarray(pixels)).to(image.device)
        return network(window[None, None].float())[0].float().cpu().numpy()

    bands = [band for _, band in windows.bands(window_logits, image.cpu().numpy())]
    return torch.from_numpy(np.concatenate(bands, axis=1)).to(image.device)
