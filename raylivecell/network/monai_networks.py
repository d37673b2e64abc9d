"""MONAI's 2-D networks instead of our U-Net: any image size, one input channel, one logit map per output channel.

1. The options of a network are MONAI's arguments; DEFAULTS contains values for those without a default in MONAI.
2. Most of these networks require sizes divisible by their strides. `Padded` pads an image at its lower and right edge
   by repeating the last row and column, and crops the logits.
3. The required divisor is found by trial: on the `meta` device a forward pass computes shapes only.

Importing MONAI takes 3 to 5 s, so only functions that build such a network do it.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from raylivecell.core.errors import UserError
from raylivecell.network.tracing import exporting

RESERVED = ("spatial_dims", "in_channels", "out_channels")
"""Arguments set by the task, not by the recipe."""
_LEVELS: dict[str, Any] = {"channels": [16, 32, 64, 128, 256], "strides": [2, 2, 2, 2]}
DEFAULTS: dict[str, dict[str, Any]] = {
    "AttentionUnet": _LEVELS,
    "UNet": _LEVELS,
    "DynUNet": {
        "kernel_size": [3] * 5,
        "strides": [1, 2, 2, 2, 2],
        "upsample_kernel_size": [2] * 4,
        "filters": [16, 32, 64, 128, 256],
    },
}
"""Options without a default in MONAI: five levels, as in its tutorials."""
_MULTIPLES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# Trial sizes in multiples: the smallest that occurs, and odd ones, which add no factor of 2.
_TRIAL_SIZES = ((2, 2), (3, 5), (7, 3))


class Padded(nn.Module):
    """`network` for any image size: grey levels 0 to 255 (B, 1, H, W) -> logits (B, C, H, W).

    Args:
        normalise: `unet.Normalise`, the first layer.
        network: accepts sizes divisible by `multiple`.
        multiple: divisor of height and width, which are padded to at least twice that for instance normalisation.
    """

    def __init__(self, normalise: nn.Module, network: nn.Module, multiple: int) -> None:
        super().__init__()
        self.normalise, self.network, self.multiple = normalise, network, multiple

    def forward(self, image: Tensor) -> Tensor:
        """Return logits, without the sigmoid."""
        height, width = image.shape[-2:]
        padded = _pad(_pad(self.normalise(image), 2, self.multiple), 3, self.multiple)
        return _crop(_crop(self.network(padded), 2, height), 3, width)


def _pad(x: Tensor, axis: int, multiple: int) -> Tensor:
    """Repeat the last row (or column) of `x` up to the next multiple, at least 2 * multiple."""
    size = x.shape[axis]
    padded_size = torch.sym_max((size + multiple - 1) // multiple, 2) * multiple
    if not exporting() and padded_size == size:
        return x
    # Indexing instead of F.pad: torch.export then accepts a length that depends on the image size.
    return x.index_select(axis, torch.arange(padded_size, device=x.device).clamp(max=size - 1))


def _crop(x: Tensor, axis: int, size: int) -> Tensor:
    if exporting():  # torch.export would specialise a slice to whether it removes anything
        return x.index_select(axis, torch.arange(size, device=x.device))
    return x.narrow(axis, 0, size)


def build(name: str, options: Mapping[str, Any], outputs: int, normalise: nn.Module) -> nn.Module:
    """Build the network `name` of monai.networks.nets, with weights drawn from torch's random state.

    Args:
        name: a `recipe.Network` other than `unet`.
        options: arguments of its class, without RESERVED.
        outputs: number of output channels.
        normalise: `unet.Normalise`, the first layer.

    Raises:
        UserError: an unknown option, or options that the network cannot be used with.
    """
    with torch.device("meta"):
        multiple = _multiple(_make(name, options, outputs), name, outputs)
    return Padded(normalise, _make(name, options, outputs), multiple)


def describe(name: str, options: Mapping[str, Any], outputs: int) -> str:
    """Describe the network of `build` in one line, without allocating it; UserError as in `build`."""
    with torch.device("meta"):
        network = _make(name, options, outputs)
        multiple = _multiple(network, name, outputs)
    parameters = sum(weight.numel() for weight in network.parameters())
    return (
        f"network: {name} of MONAI, {parameters:,} parameters, images padded to multiples of {multiple}; "
        "model.features and model.norm apply to unet only and are not used"
    )


def _make(name: str, options: Mapping[str, Any], outputs: int) -> nn.Module:
    from monai.networks import nets

    network = getattr(nets, name)
    accepted = [parameter for parameter in inspect.signature(network).parameters if parameter not in RESERVED]
    if unknown := [option for option in options if option not in accepted]:
        raise UserError(f"model.options: {name} has no option {unknown[0]}; its options are {', '.join(accepted)}")
    try:
        return network(spatial_dims=2, in_channels=1, out_channels=outputs, **{**DEFAULTS.get(name, {}), **options})
    except Exception as error:  # MONAI does not validate arguments: KeyError, TypeError, RuntimeError
        raise UserError(f"model.options: {name} rejects {dict(options)}: {_line(error)}") from error


def _multiple(network: nn.Module, name: str, outputs: int) -> int:
    """Smallest divisor of height and width for which the network, on `meta`, returns maps of the image size."""
    reason = ""
    for multiple in _MULTIPLES:
        shapes = [(1, 1, a * multiple, b * multiple) for a, b in _TRIAL_SIZES]
        try:
            results = [network(torch.zeros(shape, device="meta")) for shape in shapes]
        except Exception as error:  # a wrong size raises any of MONAI's and torch's errors
            reason = _line(error)
            continue
        expected = [(1, outputs, *shape[2:]) for shape in shapes]
        if [tuple(getattr(result, "shape", ())) for result in results] == expected:
            return multiple
        reason = "its output is not one map of the image's size per output channel"
    raise UserError(f"model.options: {name} cannot be used with these options: {reason}; change them")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
