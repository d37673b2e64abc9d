"""The recipe: everything that decides what is trained, and nothing of where. YAML in and out.

The shipped recipes are recipes/*.yaml; `find` turns their names into paths.

A recipe file names only what differs from the defaults. An unknown or ill-typed field is refused with its path and
the nearest right name. Reading a recipe imports neither torch nor Ray.
"""

import difflib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, JsonValue, PositiveInt, ValidationInfo, field_validator, model_validator

from raylivecell.core.errors import UserError
from raylivecell.core.settings import StrictModel, read, validate

SWEEP = "sweep"
"""The part of a recipe file that says how to search (sweep/space.py); no part of the recipe itself."""
Targets = Literal["foreground", "boundary", "distance"]
CHANNELS: dict[Targets, tuple[str, ...]] = {
    "foreground": ("foreground",),
    "boundary": ("foreground", "boundary"),
    "distance": ("foreground", "centre_distance", "boundary_distance"),
}
"""What the network's outputs mean, as probabilities or distances, after a sigmoid."""


class PhaseConfig(StrictModel):
    """A part of the training. Its length is given in epochs or in steps."""

    epochs: int | None = Field(None, ge=1)
    """Length in passes over the set (its transformed copies included)."""
    steps: int | None = Field(None, ge=1)
    """Length in optimiser steps; the length in time is then the same for any size of set."""
    plain: bool = True
    """Each epoch holds every image as it is (cropped at random)."""
    transformed: int = Field(0, ge=0)
    """Each epoch holds so many transformed copies of every image, different ones every epoch."""

    @model_validator(mode="after")
    def _one_length_and_some_images(self) -> "PhaseConfig":
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give a phase either epochs or steps")
        if not self.plain and not self.transformed:
            raise ValueError("a phase needs images: plain: true, or transformed: 1 or more")
        return self

    def copies(self) -> int:
        """How often an epoch holds each image."""
        return int(self.plain) + self.transformed


class ElasticConfig(StrictModel):
    """Elastic deformation by Gaussian-blurred random fields."""

    p: float = Field(default=1.0, ge=0, le=1)
    """Probability that a sample is deformed."""
    alpha_x: float = Field(default=200.0, ge=0)
    """Strength along x. The displacement is alpha times noise of uniform(-1, 1), blurred and not normalised again:
    its standard deviation is 0.163 alpha / sigma pixels (3.3 for 200 at sigma 10)."""
    alpha_y: float = Field(default=200.0, ge=0)
    """Strength along y, as `alpha_x`."""
    sigma: float = Field(default=10.0, ge=1)
    """Smoothness in pixels: standard deviation of the Gaussian that blurs the noise."""


class RotationConfig(StrictModel):
    """Rotation about the image's centre, after the elastic deformation."""

    p: float = Field(default=1.0, ge=0, le=1)
    """Probability that a sample is rotated."""
    degrees: float = Field(default=180.0, ge=0, le=180)
    """The angle is uniform in [-degrees, degrees]; positive turns counter-clockwise."""


class AugmentConfig(StrictModel):
    """Random transformations of the transformed samples; plain samples are only cropped."""

    elastic: ElasticConfig = ElasticConfig()
    rotation: RotationConfig = RotationConfig()
    flip: float = Field(default=0.5, ge=0, le=1)
    """Probability of a left-right flip, and of an up-down flip, each on its own."""
    brightness: float = Field(default=12.0, ge=0, le=255)
    """Grey levels (of 255) added: uniform in [-brightness, brightness]."""
    contrast: float = Field(default=0.2, ge=0)
    """Differences from the set's background are multiplied by exp(u), u uniform in [-log(1 + contrast),
    log(1 + contrast)]."""
    border: Literal["reflect", "constant"] = "reflect"
    """What lies outside the image: its mirror image (image and targets alike), or the set's background."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where samples are transformed: by Ray Data's tasks, or by the training process on its GPU, for clusters with few
    CPUs a GPU. The same transformations of the same samples, to within rounding; all images must be equally large."""


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


# First the plain images, then plain and transformed ones together.
PAPER_PHASES = (PhaseConfig(epochs=10), PhaseConfig(epochs=10, transformed=1))


class Recipe(StrictModel):
    """Everything that decides what is trained, and nothing of where."""

    seed: int = Field(0, ge=0)
    """Of the weights, the order of the samples, and every random transformation."""
    batch_size: int = Field(2, ge=1)
    """Images in an optimiser step, over all workers together."""
    crop: tuple[int, int] | None = (333, 434)
    """Height and width of the random crops trained on, pixels; none: whole images, which then must be equally large."""
    targets: Targets = "foreground"
    """What is learnt: cell or not (the paper); also the boundaries of cells; also distances to their centres and
    boundaries, by which cells that touch are told apart best."""
    phases: tuple[PhaseConfig, ...] = Field(PAPER_PHASES, min_length=1)
    """The parts of the training, one after the other."""
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    augment: AugmentConfig = AugmentConfig()
    loop: LoopConfig = LoopConfig()

    @model_validator(mode="after")
    def _crop_fits_network(self) -> "Recipe":
        least = 2 ** len(self.model.features)
        if self.model.name == "unet" and self.crop is not None and min(self.crop) < least:
            raise ValueError(f"crop: {len(self.model.features)} levels need at least {least} x {least} pixels")
        return self

    @model_validator(mode="after")
    def _gpu_transforms_the_foreground_alone(self) -> "Recipe":
        if self.augment.device == "cuda" and self.targets != "foreground":
            raise ValueError("augment.device: fields of cells are drawn on CPUs; use cpu, or targets: foreground")
        return self

    @property
    def outputs(self) -> int:
        """Channels of the network's output."""
        return len(CHANNELS[self.targets])


def shipped() -> dict[str, Path]:
    """The recipes that this package holds: name -> YAML file, by name."""
    return {path.stem: path for path in sorted(Path(__file__).with_name("recipes").glob("*.yaml"))}


def describe(path: Path) -> str:
    """The comment at the top of a recipe file, as one paragraph: what the recipe is for, costs and reaches."""
    lines = path.read_text().splitlines()
    end = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return " ".join(line.lstrip("# ") for line in lines[:end])


def find(name: str) -> str:
    """Path of the shipped recipe `name` (a word such as small); anything else is a path or URI, returned as it is.

    Raises:
        UserError: a word that no shipped recipe is called.
    """
    known = shipped()
    if not re.fullmatch(r"[\w-]+", name):
        return name
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"shipped: {', '.join(known)}"
        raise UserError(f"no recipe is called {name!r}; {hint} (a file of your own: its path, as ./{name}.yaml)")
    return str(known[name])


def load(uri: str | Path) -> Recipe:
    """The recipe in the YAML file at `uri`; UserError naming the file, the field and the fix if it is wrong."""
    values = read(uri)
    values.pop(SWEEP, None)
    return parse(values, str(uri))


def parse(values: dict[str, Any], source: str) -> Recipe:
    """`values` as a Recipe; UserError beginning with `source` and the field's path where they are none."""
    return validate(Recipe, values, source)


def dump(recipe: Recipe) -> str:
    """The whole recipe as YAML, every field written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
