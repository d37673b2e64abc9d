"""The loss leaves ignored pixels out, and equals the plain loss to the bit where nothing is ignored."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from raylivecell.network.losses import Loss, segmentation_loss
from raylivecell.recipe import LossConfig
from raylivecell.targets import sample_planes
from raylivecell.targets.dice import dice_loss
from raylivecell.targets.registry import NAMES, Targets, target
from raylivecell.targets.sample_planes import BORDER, FOREGROUND, IGNORED, MAPS

CONFIG = LossConfig(bce_weight=0.3, background_weight=2.0, cell_weight=1.5, border_weight=4.0, aux_weight=0.7)
SHAPE = (24, 31)


def planes_of(rng: np.random.Generator, targets: Targets, ignored: list[np.ndarray]) -> torch.Tensor:
    """Planes of random cells, uint8 (B, 2 + C, H, W), with the ignored pixels that are in no cell."""
    samples = []
    for mask in ignored:
        labels = np.kron(rng.integers(0, 3, (6, 8)), np.ones((4, 4), int))[: SHAPE[0], : SHAPE[1]].astype(np.uint16)
        image, border = rng.integers(0, 256, (2, *SHAPE), np.uint8)
        samples.append(sample_planes.draw(image, sample_planes.pack(labels, border, mask), targets))
    return torch.from_numpy(np.stack(samples))


def plain_loss(logits: torch.Tensor, planes: torch.Tensor, targets: Targets) -> list[torch.Tensor]:
    """BCE, Dice and the loss of the other maps, without ignored pixels."""
    foreground = planes[:, FOREGROUND, None].float()
    weight = CONFIG.background_weight + (CONFIG.cell_weight - CONFIG.background_weight) * foreground
    weight = weight + planes[:, BORDER, None].float() * (CONFIG.border_weight / 255.0)
    maps, other = planes[:, MAPS].float() / 255.0, logits[:, 1:]
    losses = [F.binary_cross_entropy_with_logits(logits[:, :1], foreground, weight=weight)]
    losses.append(dice_loss()(logits[:, :1], foreground))
    if targets == "boundary":
        return [*losses, F.binary_cross_entropy_with_logits(other, maps) + dice_loss()(other, maps)]
    return [*losses, target(targets).loss(other, maps, foreground, torch.zeros_like(foreground, dtype=torch.bool))]


def loss_and_gradient(logits: torch.Tensor, planes: torch.Tensor, targets: Targets) -> tuple[Loss, torch.Tensor]:
    leaf = logits.clone().requires_grad_()
    loss = segmentation_loss(leaf, planes, CONFIG, targets)
    loss.total.backward()
    assert leaf.grad is not None
    return loss, leaf.grad


@pytest.mark.parametrize("targets", NAMES)
@settings(max_examples=25)
@given(st.integers(0, 10**6), st.floats(0.05, 0.95))
def test_ignored_pixels_change_neither_loss_nor_gradient(targets: Targets, seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    masks = [rng.random(SHAPE) < share, np.zeros(SHAPE, bool)]
    planes = planes_of(rng, targets, masks)
    ignored = planes[:, FOREGROUND] == IGNORED
    assert ignored[0].any()
    logits = torch.from_numpy(rng.normal(0, 3, (2, len(target(targets).channels), *SHAPE)).astype(np.float32))
    loss, gradient = loss_and_gradient(logits, planes, targets)
    assert not gradient.movedim(1, -1)[ignored].any()
    other_logits, other_planes = logits.clone(), planes.clone()
    other_logits.movedim(1, -1)[ignored] = torch.from_numpy(
        rng.normal(0, 9, other_logits.movedim(1, -1)[ignored].shape)
    ).float()
    for plane in (BORDER, *range(MAPS.start, planes.shape[1])):
        other_planes[:, plane][ignored] = torch.from_numpy(rng.integers(0, 256, int(ignored.sum()), np.uint8))
    changed, other_gradient = loss_and_gradient(other_logits, other_planes, targets)
    assert [value.item() for value in changed] == [value.item() for value in loss]
    assert torch.equal(other_gradient, gradient)
    # The image with ignored pixels counts as much as the other: BCE is the mean of the means over counted pixels.
    foreground, counted = (planes[:1, FOREGROUND, None] == 1).float(), ~ignored[:1, None]
    weight = CONFIG.background_weight + (CONFIG.cell_weight - CONFIG.background_weight) * foreground
    weight = weight + planes[:1, BORDER, None].float() * (CONFIG.border_weight / 255.0)
    each = F.binary_cross_entropy_with_logits(logits[:1, :1], foreground, weight=weight, reduction="none")
    single = segmentation_loss(logits[:1], planes[:1], CONFIG, targets)
    assert single.bce.item() == pytest.approx(float(each[counted].mean()), rel=1e-5)


@pytest.mark.parametrize("targets", NAMES)
@settings(max_examples=25)
@given(st.integers(0, 10**6))
def test_without_ignored_pixels_the_loss_is_the_plain_one_to_the_bit(targets: Targets, seed: int) -> None:
    rng = np.random.default_rng(seed)
    planes = planes_of(rng, targets, [np.zeros(SHAPE, bool)] * 3)
    logits = torch.from_numpy(rng.normal(0, 3, (3, len(target(targets).channels), *SHAPE)).astype(np.float32))
    logits = logits.to(memory_format=torch.channels_last)  # as in training
    loss, gradient = loss_and_gradient(logits, planes, targets)
    leaf = logits.clone().requires_grad_()
    bce, dice, aux = plain_loss(leaf, planes, targets)
    assert (loss.bce.item(), loss.dice.item(), loss.aux.item()) == (bce.item(), dice.item(), aux.item())
    (CONFIG.bce_weight * bce + (1 - CONFIG.bce_weight) * dice + CONFIG.aux_weight * aux).backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, gradient)


@pytest.mark.parametrize("targets", NAMES)
def test_a_completely_ignored_image_has_no_gradient(targets: Targets) -> None:
    planes = torch.zeros((2, sample_planes.count(targets), *SHAPE), dtype=torch.uint8)
    planes[:, FOREGROUND] = IGNORED
    logits = torch.randn((2, len(target(targets).channels), *SHAPE), generator=torch.Generator().manual_seed(0))
    loss, gradient = loss_and_gradient(logits, planes, targets)
    assert loss.bce.item() == 0
    assert torch.isfinite(loss.total)
    assert not gradient.any()
