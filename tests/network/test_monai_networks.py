"""MONAI networks in recipes: any image size, all targets, clear errors; the Dice loss is MONAI's."""

import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from raylivecell import recipe
from raylivecell.core.errors import UserError
from raylivecell.network import forward
from raylivecell.network.unet import build_model
from raylivecell.recipe import ModelConfig, Network
from raylivecell.runs import checkpoint
from raylivecell.runs.progress import Progress
from raylivecell.sweep import space, space_check, sweep
from raylivecell.sweep.space import Condition, Dimension, SweepConfig
from raylivecell.targets import dice
from raylivecell.training import preflight

SMALL: dict[str, dict[str, Any]] = {
    "AttentionUnet": {"channels": [4, 8, 8], "strides": [2, 2]},
    "BasicUNet": {"features": [4, 4, 4, 8, 8, 4]},
    "DynUNet": {"kernel_size": [3] * 3, "strides": [1, 2, 2], "upsample_kernel_size": [2, 2], "filters": [4, 8, 8]},
    "SegResNet": {"init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]},
    "SegResNetDS": {"init_filters": 8, "blocks_down": [1, 1]},
    "UNet": {"channels": [4, 8, 8], "strides": [2, 2]},
    "VNet": {"bias": False},
}


@pytest.mark.parametrize("name", [name for name in get_args(Network) if name != "unet"])
def test_any_image_size_and_a_gradient_for_every_weight(name: str) -> None:
    network = build_model(ModelConfig(name=name, options=SMALL.get(name, {})), outputs=3)
    for size in ((1, 1), (57, 90), (64, 32)):
        logits = network(torch.randn(2, 1, *size))
        assert logits.shape == (2, 3, *size)
    logits.square().mean().backward()
    assert [key for key, weight in network.named_parameters() if weight.grad is None] == [], "DDP would wait for them"


def test_padding_changes_no_image_of_a_suitable_size() -> None:
    network = build_model(ModelConfig(name="SegResNet", options=SMALL["SegResNet"]), outputs=2).eval()
    image = 255 * torch.rand(1, 1, 48, 64)
    with torch.inference_mode():
        torch.testing.assert_close(network(image), network.network(network.normalise(image)))
        assert network.multiple == 2
        logits = network(image[..., :43, :61])
        padded = torch.nn.functional.pad(image[..., :43, :61], (0, 1, 0, 1), mode="replicate")
        torch.testing.assert_close(logits, network.network(network.normalise(padded))[..., :43, :61])


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            {"name": "SegResNet", "options": {"filters": 8}},
            "SegResNet has no option filters; its options are init_filters",
        ),
        ({"name": "SegResNet", "options": {"out_channels": 8}}, "has no option out_channels"),
        ({"name": "BasicUNet", "options": {"features": [4, 4]}}, "BasicUNet rejects"),
        ({"name": "DynUNet", "options": {"deep_supervision": True}}, None),
        ({"name": "UNet", "options": {"channels": [4, 8], "strides": [3, 7]}}, "UNet"),
        ({"name": "unet", "options": {"channels": [4]}}, "options are for MONAI networks"),
        ({"name": "SegResNet", "options": {"blocks_down": [1, 10**9]}}, "numbers up to 4096"),
        ({"name": "Unet"}, "model.name"),
    ],
)
def test_invalid_options_are_rejected_before_training(model: dict[str, Any], reason: str | None) -> None:
    if reason is None:  # deep supervision has several heads instead of one map per channel
        reason = "cannot be used with these options"
    with pytest.raises(UserError, match=reason):
        preflight.network(recipe.parse({"model": model}, "test"))


def test_a_checkpoint_gives_the_same_maps(tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = recipe.parse({"targets": "distance", "model": {"name": "DynUNet", "options": SMALL["DynUNet"]}}, "test")
    network = build_model(settings.model, settings.outputs).eval()
    checkpoint.save(str(tmp_path), network, {}, Progress(), settings)
    loaded, loaded_settings = checkpoint.load_model(str(tmp_path))
    assert loaded_settings == settings
    image = np.random.default_rng(0).integers(0, 255, (45, 70)).astype(np.uint8)
    np.testing.assert_array_equal(forward.maps(loaded, image), forward.maps(network, image))


def test_a_sweep_searches_networks_and_their_options() -> None:
    filters = Dimension(choices=({}, {"init_filters": 16}), when={"model.name": Condition(in_=("SegResNet",))})
    names = Dimension(choices=("unet", "SegResNet"))
    config = SweepConfig(space={"model.name": names, "model.options": filters}, shares=())
    base = recipe.parse({"model": {"features": [4, 8]}}, "test")
    space_check.check(base, config)
    trial = space.apply(base, {"model.name": "SegResNet", "model.options": {"init_filters": 16}})
    assert trial.model == ModelConfig(name="SegResNet", features=(4, 8), options={"init_filters": 16})
    sweep._check_networks(base, config)


def test_a_sweep_over_invalid_options_is_rejected() -> None:
    """Before the first trial, unless network and options are both searched: then trials with bad combinations fail."""
    base = recipe.parse({"model": {"name": "SegResNet", "options": {"init_filters": 8}}}, "test")
    options = Dimension(choices=({"init_filters": 8}, {"filters": 16}))
    with pytest.raises(UserError, match=r"with model.options \{'filters': 16\}, .*SegResNet has no option filters"):
        sweep._check_networks(base, SweepConfig(space={"model.options": options}, shares=()))
    names = Dimension(choices=("SegResNet", "BasicUNet"))
    with pytest.raises(UserError, match=r"with model.name 'BasicUNet', .*BasicUNet has no option init_filters"):
        sweep._check_networks(base, SweepConfig(space={"model.name": names}, shares=()))
    sweep._check_networks(base, SweepConfig(space={"model.name": names, "model.options": options}, shares=()))
    one_option = {"model.name": names, "model.options.init_filters": Dimension(choices=(8, 16))}
    sweep._check_networks(base, SweepConfig(space=one_option, shares=()))


def test_the_dice_loss_is_that_of_monai_and_only_training_imports_it() -> None:
    from monai.losses import DiceLoss

    loss = dice.dice_loss()
    assert type(loss) is DiceLoss
    assert (loss.sigmoid, loss.squared_pred, loss.reduction) == (True, True, "mean")
    modules = "inference.segmenter", "runs.checkpoint", "training.train", "ingest.blocks"
    code = f"import sys, {', '.join(f'raylivecell.{module}' for module in modules)}\n"
    subprocess.run([sys.executable, "-c", code + "sys.exit('monai' in sys.modules)"], check=True)
