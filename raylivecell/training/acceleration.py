"""Precision and compilation of the training step, chosen for the hardware where the recipe says `auto`. No Ray.

The weights, their gradients, the loss and validation are float32 in all cases; bfloat16 is that of `torch.autocast` in
the forward pass. So a run may resume on a machine for which another choice is made.

Tolerance: probabilities of one network computed in bfloat16 and float32 differ by at most 0.05, on average by at most
0.005 (recipe `small` on five LIVECell images: 0.017 and 0.0009). Two trainings of 120 steps with crops of 128x128, one
in each: probabilities differ by at most 0.097, on average by 0.006 (two seeds: 0.11); mean Dice of two validation
images 0.866 and 0.867.
"""

import contextlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch

from raylivecell.recipe import LoopConfig, Recipe

COMPILE_STEPS = 1000
"""Fewest steps of a run that `compile: auto` compiles: compiling takes 15 to 60 s. It is the number of steps of the
entire run, so that a resumed run is compiled as the uninterrupted one."""
Precision = Literal["float32", "bfloat16"]


class Acceleration(NamedTuple):
    """How the training step is computed."""

    precision: Precision
    compiled: bool
    note: str
    """Why it is not compiled, if the recipe leaves that open; otherwise empty."""

    def __str__(self) -> str:
        reason = f" ({self.note})" if self.note else ""
        return f"training in {self.precision}, {'compiled' if self.compiled else 'not compiled'}{reason}"


def has_amx() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (Intel AMX); False in older versions of torch, which do
    not report it. AVX512_BF16, of CPUs without AMX, does not count.
    """
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16")) and torch.backends.mkldnn.is_available()


def precision_of(setting: str, device: torch.device) -> Precision:
    """Precision of the forward pass on `device` for `LoopConfig.precision`."""
    if setting != "auto":
        return "bfloat16" if setting == "bfloat16" else "float32"
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if device.type == "cpu" and has_amx() else "float32"


def autocast(precision: Precision, device: torch.device) -> contextlib.AbstractContextManager:
    """Context of the forward pass."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else contextlib.nullcontext()


def choose(
    recipe: Recipe,
    device: torch.device,
    steps: int,
    compiler: Callable[[], str | None],
    on_all_ranks: Callable[[bool], bool] = lambda value: value,
) -> Acceleration:
    """Choose precision and compilation for a run of `steps`.

    Args:
        recipe: its `loop` states them, or `auto`.
        device: the device of this rank.
        steps: of the entire run.
        compiler: returns the C++ compiler for torch.compile, None if it cannot be used.
        on_all_ranks: whether a condition holds on every rank. A batch is computed in one precision, even if only some
            machines have AMX.
    """
    config = recipe.loop
    precision: Precision = "float32"
    if on_all_ranks(precision_of(config.precision, device) == "bfloat16"):
        precision = "bfloat16"
    if config.compile != "auto":
        return Acceleration(precision, config.compile, "")
    if device.type != "cpu" or recipe.model.name != "unet" or not on_all_ranks(has_amx()):
        return Acceleration(precision, False, "")
    if steps < COMPILE_STEPS:
        return Acceleration(precision, False, f"fewer than {COMPILE_STEPS:,} steps")
    if not on_all_ranks(compiler() is not None):
        return Acceleration(
            precision, False, "no C++ compiler or Python headers: install g++ and python3-dev for about twice the speed"
        )
    return Acceleration(precision, True, "")


def settings(config: LoopConfig, chosen: Acceleration) -> LoopConfig:
    """Return `config` with what was chosen in place of `auto`."""
    return config.model_copy(update={"precision": chosen.precision, "compile": chosen.compiled})
