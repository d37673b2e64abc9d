"""The recipe: all settings that determine the trained network, but not where it is trained; a YAML file.

The shipped recipes are recipes/*.yaml; `find` turns their names into paths.

A recipe file contains only the fields that differ from the defaults. An unknown field or a wrong type is an error with
the field's path and the nearest valid name. Reading a recipe imports neither torch nor Ray.
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
from raylivecell.targets.registry import Targets, target

SWEEP = "sweep"
"""Key of a recipe file with the settings of a sweep (sweep/space.py); not part of the recipe itself."""


class PhaseConfig(StrictModel):
    """One phase of the training; its length is given in epochs or in steps."""

    epochs: int | None = Field(None, ge=1)
    """Length in epochs, each of which includes the augmented copies."""
    steps: int | None = Field(None, ge=1)
    """Length in optimizer steps, which does not depend on the size of the dataset."""
    originals: bool = True
    """Whether each epoch contains every image once unchanged (only cropped at random)."""
    augmented_copies: int = Field(0, ge=0)
    """Number of augmented copies of every image in each epoch; they differ in every epoch."""

    @model_validator(mode="after")
    def _one_length_and_at_least_one_image(self) -> "PhaseConfig":
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("a phase needs either epochs or steps")
        if not self.originals and not self.augmented_copies:
            raise ValueError("a phase needs images: originals: true, or augmented_copies: 1 or more")
        return self

    def copies(self) -> int:
        """Samples per image in one epoch."""
        return int(self.originals) + self.augmented_copies


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
    """Random transformations of the augmented copies; original images are only cropped."""

    elastic: ElasticConfig = ElasticConfig()
    rotation: RotationConfig = RotationConfig()
    flip: float = Field(default=0.5, ge=0, le=1)
    """Probability of a horizontal flip and, independently, of a vertical flip."""
    scale: float = Field(default=0.0, ge=0, le=3)
    """Images are enlarged by exp(u), u uniform in [-log(1 + scale), log(1 + scale)]: by 0.71 to 1.4 for 0.4."""
    brightness: float = Field(default=12.0, ge=0, le=255)
    """Grey levels (0 to 255) added: uniform in [-brightness, brightness]."""
    contrast: float = Field(default=0.2, ge=0)
    """Differences from the dataset's background level are multiplied by exp(u), u uniform in
    [-log(1 + contrast), log(1 + contrast)]."""
    gamma: float = Field(default=0.0, ge=0)
    """Grey levels are curved by the exponent exp(u), u uniform in [-log(1 + gamma), log(1 + gamma)]; level and slope at
    the background stay."""
    blur: float = Field(default=0.0, ge=0, le=10)
    """Gaussian blur with sigma uniform in [0, blur] pixels."""
    noise: float = Field(default=0.0, ge=0, le=100)
    """Gaussian noise with a standard deviation uniform in [0, noise] grey levels."""
    shading: float = Field(default=0.0, ge=0, le=100)
    """Uneven background: a smooth field with a standard deviation uniform in [0, shading] grey levels."""
    border: Literal["reflect", "constant"] = "reflect"
    """Values of pixels outside the image: reflected (image and targets), or the background level."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device of the augmentation. cpu: in Ray Data's tasks; cuda: in the training process on its GPU, for machines
    with few CPUs per GPU. The results agree to within rounding; all images must have the same size."""


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
"""`unet` is this project's network; all other names are classes of monai.networks.nets."""
MAX_OPTIONS_BYTES, MAX_OPTION = 2000, 4096
"""Limits of `ModelConfig.options`: bytes of JSON, and absolute value of each number. A checkpoint's recipe is
untrusted, and a network of a billion blocks would fill the memory before its weights are read."""


class ModelConfig(StrictModel):
    """The network."""

    name: Network = "unet"
    """unet: the paper's U-Net, with features and norm. All other names: networks of MONAI, with options."""
    features: tuple[PositiveInt, ...] = Field((64, 128, 256, 512), min_length=1, max_length=12)
    """unet only: channels of each level of the contracting path; the bottleneck has twice the last."""
    norm: Norm = "batch"
    """unet only. batch: BatchNorm2d (the paper). sync_batch: statistics over all workers' images (GPU only). group:
    GroupNorm, whose result does not depend on how a batch is split over workers."""
    options: dict[str, JsonValue] = Field(default_factory=dict)
    """MONAI networks only: arguments of the network's class as JSON, such as {"init_filters": 16}; arguments not
    listed keep MONAI's defaults."""

    @property
    def min_side(self) -> int:
        """Smallest height and width of an image, pixels."""
        return 2 ** len(self.features) if self.name == "unet" else 1

    @field_validator("options")
    @classmethod
    def _for_monai(cls, options: dict[str, JsonValue], info: ValidationInfo) -> dict[str, JsonValue]:
        if options and info.data.get("name", "unet") == "unet":
            raise ValueError("unet has features and norm; options are for MONAI networks (model.name)")
        if len(json.dumps(options)) > MAX_OPTIONS_BYTES or any(
            abs(number) > MAX_OPTION for number in _numbers(options)
        ):
            raise ValueError(f"at most {MAX_OPTIONS_BYTES} bytes of JSON and numbers up to {MAX_OPTION}")
        return options


def _numbers(value: JsonValue) -> Iterator[float]:
    """Every number in a JSON value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int | float):
        yield value


class LossConfig(StrictModel):
    """The loss: bce_weight * BCE + (1 - bce_weight) * Dice, plus aux_weight * the loss of boundaries or distances."""

    bce_weight: float = Field(0.5, ge=0, le=1)
    """Weight of the cross-entropy; the Dice loss has 1 - bce_weight."""
    background_weight: float = Field(1.0, gt=0)
    """BCE weight of a background pixel."""
    cell_weight: float = Field(1.0, gt=0)
    """BCE weight of a cell pixel."""
    border_weight: float = Field(1.0, ge=0)
    """w0: additional BCE weight between touching cells (10 in the original U-Net)."""
    aux_weight: float = Field(1.0, ge=0)
    """Weight of the loss of boundaries or distances; the foreground loss has weight 1."""


class DistillationConfig(StrictModel):
    """Learning from a teacher: the loss is (1 - weight) * `loss` of the annotations + weight * `loss` of its maps.

    Both are means over all images of a batch; an image without annotations adds 0 to the first.
    """

    weight: float = Field(0.0, ge=0, le=1)
    """Weight of the teacher's maps (`train --teacher CHECKPOINT`); 0: no teacher."""


class OptimizerConfig(StrictModel):
    """Adam (Kingma and Ba 2015), with AMSGrad (Reddi et al. 2018) as in the paper."""

    lr: float = Field(1e-3, gt=0)
    """Peak learning rate; independent of the number of workers, because batch_size is global."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Exponential decay rates of the first and second moment."""
    amsgrad: bool = True
    """Use the running maximum of the second moment (AMSGrad)."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay (AdamW) of convolution weights; 0 is plain Adam."""
    schedule: Literal["constant", "poly", "cosine"] = "constant"
    """`poly`: (1 - t)^0.9; `cosine`: (1 + cos(pi t)) / 2; t from 0 to 1 over the run."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate rises linearly from 0."""
    clip_norm: float | None = Field(None, gt=0)
    """Maximum L2 norm of the gradient; none: no clipping."""
    ema_decay: float = Field(0.0, ge=0, lt=1)
    """Decay of an exponential moving average of the weights, which is then validated and saved; 0: no averaging."""


class LoopConfig(StrictModel):
    """Settings of the training loop."""

    report_steps: int | None = Field(None, ge=1)
    """Steps between reports (validation, metrics, checkpoint); none: a report after every epoch."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the forward pass; auto: bfloat16 on GPUs that support it and on CPUs with AMX, otherwise float32.
    Weights stay float32. A CPU with AMX trains 1.3 times as fast in bfloat16, 2.5 times if also compiled (`bench
    step`)."""
    channels_last: bool = True
    """Memory format channels_last: faster on GPUs and CPUs."""
    compile: Literal["auto"] | bool = "auto"
    """Compile the network with torch.compile: 15 to 60 s at the start, and a C++ compiler on a CPU. Pays off in
    runs of minutes or more (1.3 times as fast on a CPU with AMX, no gain with AVX-512 alone: `bench step`). auto:
    compiled on CPUs with AMX and a compiler, for U-Nets and runs of at least 1,000 steps."""


# First the original images, then originals and augmented copies together.
PAPER_PHASES = (PhaseConfig(epochs=10), PhaseConfig(epochs=10, augmented_copies=1))


class Recipe(StrictModel):
    """All settings that determine the trained network; flags of the command determine where it is trained."""

    seed: int = Field(0, ge=0)
    """Seed of the initial weights, the sample order and all augmentation."""
    batch_size: int = Field(2, ge=1)
    """Images per optimizer step, over all workers together."""
    crop: tuple[int, int] | None = (333, 434)
    """Height and width of the random training crops, pixels; none: complete images of equal size."""
    targets: Targets = "foreground"
    """What the network predicts. foreground: cell or background (the paper). boundary: also the boundaries of cells.
    distance: also distances to each cell's centre and boundary, which separates touching cells best."""
    phases: tuple[PhaseConfig, ...] = Field(PAPER_PHASES, min_length=1)
    """The phases of the training, in order."""
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    distillation: DistillationConfig = DistillationConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    augment: AugmentConfig = AugmentConfig()
    loop: LoopConfig = LoopConfig()

    @model_validator(mode="after")
    def _crop_fits_network(self) -> "Recipe":
        smallest = self.model.min_side
        if self.crop is not None and min(self.crop) < smallest:
            raise ValueError(f"crop: {len(self.model.features)} levels need at least {smallest} x {smallest} pixels")
        return self

    @model_validator(mode="after")
    def _gpu_augments_foreground_targets_only(self) -> "Recipe":
        if self.augment.device == "cuda" and self.targets != "foreground":
            raise ValueError(
                "augment.device: boundary and distance maps are drawn on CPUs; use cpu, or targets: foreground"
            )
        if self.augment.device == "cuda" and (self.augment.blur or self.augment.noise or self.augment.shading):
            raise ValueError("augment.device: blur, noise and shading are added on CPUs; use cpu, or set them to 0")
        return self

    @property
    def outputs(self) -> int:
        """Channels of the network's output."""
        return len(target(self.targets).channels)

    @property
    def network(self) -> str:
        """Description of the network in a few words."""
        config = self.model
        if config.name != "unet":
            return f"{config.name} {config.options or ''}".strip() + f", {self.outputs} outputs"
        widths = "-".join(str(width) for width in config.features)
        return f"unet, features {widths}, norm {config.norm}, {self.outputs} outputs"


def shipped() -> dict[str, Path]:
    """Shipped recipes: name -> YAML file, sorted by name."""
    return {path.stem: path for path in sorted(Path(__file__).with_name("recipes").glob("*.yaml"))}


def describe(path: Path) -> str:
    """Return the comment at the top of a recipe file as one paragraph: the recipe's purpose, cost and scores."""
    lines = path.read_text().splitlines()
    end = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return " ".join(line.lstrip("# ") for line in lines[:end])


def find(name: str) -> str:
    """Path of the shipped recipe `name` (a word such as small); anything else is a path or URI, returned unchanged.

    Raises:
        UserError: a word that is not the name of a shipped recipe.
    """
    recipes = shipped()
    if not re.fullmatch(r"[\w-]+", name):
        return name
    if name not in recipes:
        near = difflib.get_close_matches(name, recipes, 1)
        hint = f"did you mean {near[0]}?" if near else f"shipped: {', '.join(recipes)}"
        raise UserError(f"no shipped recipe {name!r}; {hint} (for a file, give its path: ./{name}.yaml)")
    return str(recipes[name])


def load(uri: str | Path) -> Recipe:
    """Read the recipe in the YAML file at `uri`; UserError with the file, the field and the fix if it is invalid."""
    values = read(uri)
    values.pop(SWEEP, None)
    return parse(values, str(uri))


def parse(values: dict[str, Any], source: str) -> Recipe:
    """Validate `values` as a Recipe; UserError that starts with `source` and the path of the invalid field."""
    return validate(Recipe, values, source)


def dump(recipe: Recipe) -> str:
    """Format the complete recipe as YAML, including fields with default values."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
