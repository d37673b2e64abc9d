"""MONAI's 2-D networks in place of our U-Net: any image size, one input channel, a logit map for each output.

1. The options of a network are MONAI's own arguments; where MONAI gives no default (channels, strides), ours stand in.
2. Most of these networks take sizes that their strides divide, and no others. `Padded` pads an image at its lower and
   right edge by repeating the last row and column, and crops the logits.
3. The size that the strides ask for is found by trying: on the `meta` device a forward pass computes shapes alone.

Importing MONAI takes 3 to 5 s: only what builds such a network does it.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from raylivecell.core.errors import UserError

RESERVED = ("spatial_dims", "in_channels", "out_channels")
"""Arguments that the task decides, not the recipe."""
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
"""Options where MONAI has no default: five levels, as in its tutorials."""
_MULTIPLES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# Sizes tried, in multiples: the smallest that is ever given, and odd ones, which halve only as often as they must.
_TRIED = ((2, 2), (3, 5), (7, 3))


class Padded(nn.Module):
    """`network` for any image size: grey levels 0 to 255 (B, 1, H, W) -> logits (B, C, H, W).

    Args:
        normalise: `unet.Normalise`, the first layer.
        network: takes sizes divisible by `multiple`.
        multiple: of height and width; at least two of it are given, since instance normalisation needs several pixels.
    """

    def __init__(self, normalise: nn.Module, network: nn.Module, multiple: int) -> None:
        super().__init__()
        self.normalise, self.network, self.multiple = normalise, network, multiple

    def forward(self, image: Tensor) -> Tensor:
        """Logits; the sigmoid is the caller's."""
        height, width = image.shape[-2:]
        padded = _extended(_extended(self.normalise(image), 2, self.multiple), 3, self.multiple)
        return _first(_first(self.network(padded), 2, height), 3, width)


def _extended(x: Tensor, axis: int, multiple: int) -> Tensor:
    """`x` with its last row (or column) repeated up to the next multiple, at least two of them."""
    size = x.shape[axis]
    wanted = torch.sym_max((size + multiple - 1) // multiple, 2) * multiple
    if not torch.compiler.is_exporting() and wanted == size:
        return x
    # An index instead of F.pad: torch.export takes a length that depends on the image's.
    return x.index_select(axis, torch.arange(wanted, device=x.device).clamp(max=size - 1))


def _first(x: Tensor, axis: int, size: int) -> Tensor:
    if torch.compiler.is_exporting():  # a slice would be specialised to whether it cuts anything off
        return x.index_select(axis, torch.arange(size, device=x.device))
    return x.narrow(axis, 0, size)


def build(name: str, options: Mapping[str, Any], outputs: int, normalise: nn.Module) -> nn.Module:
    """The network `name` of monai.networks.nets with fresh weights from torch's random state.

    Args:
        name: one of `recipe.Network`, but for `unet`.
        options: arguments of its class, without RESERVED.
        outputs: channels of its logits.
        normalise: `unet.Normalise`, the first layer.

    Raises:
        UserError: an option that it does not take, or with which it does not work.
    """
    with torch.device("meta"):
        multiple = _multiple(_make(name, options, outputs), name, outputs)
    return Padded(normalise, _make(name, options, outputs), multiple)


def describe(name: str, options: Mapping[str, Any], outputs: int) -> str:
    """The network `build` would give, in one line, without its memory; UserError as `build`."""
    with torch.device("meta"):
        network = _make(name, options, outputs)
        multiple = _multiple(network, name, outputs)
    parameters = sum(one.numel() for one in network.parameters())
    return (
        f"network: {name} of MONAI, {parameters:,} parameters, images padded to multiples of {multiple}; "
        "model.features and model.norm are unet's and not used"
    )


def _make(name: str, options: Mapping[str, Any], outputs: int) -> nn.Module:
    from monai.networks import nets

    network = getattr(nets, name)
    taken = [one for one in inspect.signature(network).parameters if one not in RESERVED]
    if unknown := [option for option in options if option not in taken]:
        raise UserError(f"model.options: {name} has no option {unknown[0]}; it takes {', '.join(taken)}")
    try:
        return network(spatial_dims=2, in_channels=1, out_channels=outputs, **{**DEFAULTS.get(name, {}), **options})
    except Exception as error:  # MONAI checks its arguments by whatever fails first: KeyError, TypeError, RuntimeError
        raise UserError(f"model.options: {name} refuses {dict(options)}: {_line(error)}") from error


def _multiple(network: nn.Module, name: str, outputs: int) -> int:
    """The least multiple of height and width for which the network, on `meta`, gives a map of the image's size."""
    reason = ""
    for multiple in _MULTIPLES:
        shapes = [(1, 1, a * multiple, b * multiple) for a, b in _TRIED]
        try:
            found = [network(torch.zeros(shape, device="meta")) for shape in shapes]
        except Exception as error:  # a size that does not fit ends in any of MONAI's and torch's errors
            reason = _line(error)
            continue
        wanted = [(1, outputs, *shape[2:]) for shape in shapes]
        if [tuple(getattr(one, "shape", ())) for one in found] == wanted:
            return multiple
        reason = "its output is not one map of the image's size for each target"
    raise UserError(f"model.options: {name} cannot be used with these options: {reason}; change them")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
