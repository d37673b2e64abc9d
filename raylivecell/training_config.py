"""What a recipe says of the network and how it is trained: ModelConfig, LossConfig, OptimizerConfig, LoopConfig.

Apart from the code that they configure, which loads torch: who only reads a recipe starts 1 s earlier without it.
"""

import json
from collections.abc import Iterator
from typing import Literal

from pydantic import Field, JsonValue, PositiveInt, ValidationInfo, field_validator

from raylivecell.core.settings import StrictModel

Norm = Literal["batch", "sync_batch", "group"]
Network = Literal[
    "unet",
    "AttentionUnet",
    "BasicUNet",
    "DynUNet",
    "HighResNet",
    "MedNeXt",
    "SegResNet",
    "SegResNetDS",
    "UNet",
    "VNet",
]
"""`unet`: this project's; the others are classes of monai.networks.nets, by their names there."""
MAX_OPTIONS_BYTES, MAX_OPTION = 2000, 4096
"""Limits of `ModelConfig.options`, as JSON and of each number: a checkpoint's recipe is untrusted, and a network of a
billion blocks would fill the memory before its weights are looked at."""


class ModelConfig(StrictModel):
    """The network."""

    name: Network = "unet"
    """`unet`: the paper's U-Net, with `features` and `norm`. The others are MONAI's 2-D networks, with `options`."""
    features: tuple[PositiveInt, ...] = Field((64, 128, 256, 512), min_length=1, max_length=12)
    """Of `unet`: channels of each level of the contracting path; the bottleneck has twice the last."""
    norm: Norm = "batch"
    """Of `unet`. `batch`: BatchNorm2d (the paper). `sync_batch`: its statistics over all workers' images (GPU only).
    `group`: GroupNorm, whose result does not depend on how a batch is split over workers."""
    options: dict[str, JsonValue] = Field(default_factory=dict)
    """Of a network of MONAI: arguments of its class, as JSON, such as {"init_filters": 16}; what is not given keeps
    MONAI's default."""

    @field_validator("options")
    @classmethod
    def _for_monai(cls, options: dict[str, JsonValue], info: ValidationInfo) -> dict[str, JsonValue]:
        if options and info.data.get("name", "unet") == "unet":
            raise ValueError("unet takes features and norm; options are for MONAI's networks (model.name)")
        if len(json.dumps(options)) > MAX_OPTIONS_BYTES or any(abs(one) > MAX_OPTION for one in _numbers(options)):
            raise ValueError(f"at most {MAX_OPTIONS_BYTES} bytes of JSON and numbers up to {MAX_OPTION}")
        return options


def _numbers(value: JsonValue) -> Iterator[float]:
    """Every number in a JSON value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from _numbers(one)
    elif isinstance(value, int | float):
        yield value


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
    field_weight: float = Field(1.0, ge=0)
    """Of the loss of boundaries or distances, beside that of the foreground, which weighs 1."""


class OptimizerConfig(StrictModel):
    """Adam (Kingma and Ba 2015), with AMSGrad (Reddi et al. 2018) as in the paper."""

    lr: float = Field(1e-3, gt=0)
    """Learning rate at its highest; it does not depend on the number of workers (the batch is global)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Exponential decay rates of the first and the second moment."""
    amsgrad: bool = True
    """Use the largest second moment so far."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay (AdamW) of convolution weights; 0 is plain Adam."""
    schedule: Literal["constant", "poly", "cosine"] = "constant"
    """`poly`: (1 - t)^0.9; `cosine`: (1 + cos(pi t)) / 2; t from 0 to 1 over the run."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the rate rises linearly from 0."""
    clip_norm: float | None = Field(None, gt=0)
    """Largest L2 norm of the gradient; none: not clipped."""
    ema_decay: float = Field(0.0, ge=0, lt=1)
    """Validate and keep an exponential moving average of the weights with this decay; 0: the weights themselves."""


class LoopConfig(StrictModel):
    """How the recipe is computed."""

    report_steps: int | None = Field(None, ge=1)
    """Steps between reports (validation, metrics, checkpoint); none: a report at the end of every epoch."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the forward pass; `auto`: bfloat16 where the GPU has it, float32 elsewhere. Weights stay float32. A CPU with
    AMX trains 1.3 times as fast in bfloat16, compiled 2.5 times (`bench step`)."""
    channels_last: bool = True
    """Keep activations with the channels innermost: faster on GPU and CPU alike."""
    compile: bool = False
    """`torch.compile` the network, which takes 15 to 60 s and on a CPU a C++ compiler: pays after minutes of training
    (1.3 times as fast on a CPU with AMX, on one with AVX-512 alone not at all: `bench step`)."""
