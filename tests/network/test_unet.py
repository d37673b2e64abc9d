"""The network and its loss."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raylivecell.network.losses import segmentation_loss, with_teacher
from raylivecell.network.optimizer import schedule
from raylivecell.network.unet import Normalise, build_model, count_parameters
from raylivecell.recipe import LossConfig, ModelConfig, OptimizerConfig
from raylivecell.targets import sample_planes
from raylivecell.targets.registry import NAMES, Targets, target
from raylivecell.targets.sample_planes import BORDER, FOREGROUND, MAPS


@settings(max_examples=30)
@given(st.integers(16, 70), st.integers(16, 70), st.sampled_from([(4,), (4, 8), (4, 8, 8, 8)]))
def test_the_output_has_the_size_of_the_input(height: int, width: int, features: tuple[int, ...]) -> None:
    model = build_model(ModelConfig(features=features)).eval()
    assert model(torch.zeros(1, 1, height, width)).shape == (1, 1, height, width)


def test_the_papers_crop_and_size() -> None:
    model = build_model(ModelConfig()).eval()
    assert count_parameters(model) == 31_036_481  # the original's 31.0 M, without the biases that BatchNorm cancels
    with torch.inference_mode():
        assert model(torch.zeros(1, 1, 333, 434)).shape == (1, 1, 333, 434)


def test_background_becomes_zero_and_grey_levels_stay_ordered() -> None:
    grey = Normalise()(torch.arange(256, dtype=torch.uint8))
    assert grey[128] == 0
    assert Normalise(90, 2.5)(torch.tensor([90.0])) == 0
    assert grey.dtype == torch.float32
    assert (grey.diff() > 0).all()
    torch.testing.assert_close(grey[129:], -grey[1:128].flip(0))
    assert grey[130] - grey[128] > 0.05 * grey[255], "a faint cell remains visible"


def batch(targets: Targets) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and planes of six samples."""
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(6, len(target(targets).channels), 9, 7, generator=random)
    planes = (255 * torch.rand(6, sample_planes.count(targets), 9, 7, generator=random)).to(torch.uint8)
    planes[:, FOREGROUND] = planes[:, FOREGROUND] > 127
    return logits, planes


@pytest.mark.parametrize("targets", NAMES)
@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_the_loss_does_not_depend_on_how_a_batch_is_split(parts: int, targets: Targets) -> None:
    config = LossConfig(border_weight=10, background_weight=2)
    logits, planes = batch(targets)
    expected = segmentation_loss(logits, planes, config, targets)
    losses = [segmentation_loss(*part, config, targets) for part in zip(logits.chunk(parts), planes.chunk(parts))]
    for name in expected._fields:
        mean = torch.stack([getattr(loss, name) for loss in losses]).mean()
        torch.testing.assert_close(mean, getattr(expected, name))


@pytest.mark.parametrize("targets", NAMES)
@given(weight=st.floats(0, 1), scale=st.floats(0.1, 3))
def test_the_loss_of_a_teachers_maps(targets: Targets, weight: float, scale: float) -> None:
    """Maps equal to those of the labels have the loss of the labels; the gradient is that of the student alone."""
    config = LossConfig(border_weight=10, background_weight=2, bce_weight=0.3, aux_weight=4)
    logits, planes = batch(targets)
    logits = (scale * logits).requires_grad_()
    hard = segmentation_loss(logits, planes, config, targets)
    labels = torch.cat([planes[:, FOREGROUND, None].float(), planes[:, MAPS] / 255], 1)
    teacher_logits = torch.logit(labels.double()).clamp(-100, 100).float()
    same = with_teacher(hard, logits, teacher_logits, planes, weight, config, targets)
    torch.testing.assert_close(same.teacher, hard.total, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(same.total, hard.total, rtol=1e-4, atol=1e-5)
    # A student that equals its teacher has no gradient from it.
    perfect = with_teacher(hard, logits, logits.detach(), planes, 1.0, config, targets)
    gradient = torch.autograd.grad(perfect.total, logits)[0]
    assert gradient.abs().max() < 1e-6


def test_the_loss_matches_its_formula() -> None:
    logits, planes = batch("foreground")
    foreground, border = planes[:, FOREGROUND], planes[:, BORDER]
    config = LossConfig(bce_weight=0.3, background_weight=2, cell_weight=3, border_weight=10)
    p, g = torch.sigmoid(logits[:, 0]).double(), foreground.double()
    weight = torch.where(g > 0, 3.0, 2.0) + 10 * border.double() / 255
    bce = -(weight * (g * p.log() + (1 - g) * (1 - p).log())).mean()
    axes = (1, 2)
    dice = (1 - 2 * (p * g).sum(axes) / ((p**2).sum(axes) + (g**2).sum(axes))).mean()
    loss = segmentation_loss(logits, planes, config, "foreground")
    torch.testing.assert_close(loss.bce.double(), bce, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss.dice.double(), dice, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss.total.double(), 0.3 * bce + 0.7 * dice, rtol=1e-5, atol=1e-6)


def test_distance_loss_is_computed_inside_cells_only() -> None:
    logits, planes = batch("distance")
    config = LossConfig(aux_weight=0.5)
    loss = segmentation_loss(logits, planes, config, "distance")
    foreground = planes[:, FOREGROUND, None]
    error = (torch.sigmoid(logits[:, 1:]) - planes[:, MAPS] / 255) ** 2 * foreground
    per_image = error.sum((2, 3)) / foreground.sum((2, 3))
    torch.testing.assert_close(loss.aux, 10 * per_image.mean())
    torch.testing.assert_close(loss.total, 0.5 * loss.bce + 0.5 * loss.dice + 0.5 * loss.aux)
    changed_outside = torch.where(foreground > 0, logits[:, 1:], 7.0)
    changed = segmentation_loss(torch.cat([logits[:, :1], changed_outside], 1), planes, config, "distance")
    torch.testing.assert_close(changed.aux, loss.aux)
    planes[:, FOREGROUND] = 0  # no cell in any image
    assert segmentation_loss(logits, planes, config, "distance").aux == 0


@given(st.sampled_from(["constant", "poly", "cosine"]), st.integers(0, 20), st.integers(21, 100))
def test_schedules_rise_during_warmup_only(kind: str, warmup: int, steps: int) -> None:
    factor = schedule(OptimizerConfig(schedule=kind, warmup_steps=warmup), steps)
    values = [factor(step) for step in range(steps)]
    assert all(0 < value <= 1 for value in values)
    after = values[warmup:]
    assert all(a >= b for a, b in pairwise(after))
