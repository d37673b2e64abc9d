"""Pixel counts are summed before ratios are computed; MONAI gives the same scores."""

import numpy as np
import pytest
import torch
from monai.metrics import DiceMetric, MeanIoU

from raylivecell.scoring import pixel_scores


def random_batch(seed: int, images: int = 5, size: tuple[int, int] = (37, 41)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    truth = torch.rand(images, *size, generator=generator) < torch.rand(images, 1, 1, generator=generator)
    logits = torch.randn(images, 1, *size, generator=generator) + truth[:, None] * 2 - 1
    return logits, truth


@pytest.mark.parametrize("seed", range(5))
def test_torch_and_numpy_count_the_same(seed: int) -> None:
    logits, truth = random_batch(seed)
    counted = pixel_scores.pixel_counts(logits, truth)
    assert counted.dtype == torch.int64
    assert counted.shape == (5, 4)
    assert (counted.sum(dim=1) == 37 * 41).all()
    rows = [pixel_scores.mask_counts((logit[0] > 0).numpy(), cell.numpy()) for logit, cell in zip(logits, truth)]
    np.testing.assert_array_equal(pixel_scores.as_counts(rows), counted.numpy())


@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_monai(seed: int) -> None:
    logits, truth = random_batch(seed)
    counts = pixel_scores.pixel_counts(logits, truth).numpy()
    predicted, cell = (logits > 0).float(), truth[:, None].float()
    monai_dice = DiceMetric(include_background=True, reduction="none")(predicted, cell)[:, 0].numpy()
    monai_iou = MeanIoU(include_background=True, reduction="none")(predicted, cell)[:, 0].numpy()
    np.testing.assert_allclose(pixel_scores.image_dice(counts), monai_dice, rtol=1e-6)
    np.testing.assert_allclose([pixel_scores.iou(row) for row in counts], monai_iou, rtol=1e-6)
    np.testing.assert_allclose([pixel_scores.dice(row) for row in counts], monai_dice, rtol=1e-6)
    assert pixel_scores.mean_image_dice(counts) == pytest.approx(monai_dice.mean(), rel=1e-6)
    # Summing over pixels = scoring one image that contains all images side by side.
    combined = DiceMetric(include_background=True, reduction="none")(
        predicted.reshape(1, 1, -1, 41), cell.reshape(1, 1, -1, 41)
    )
    assert pixel_scores.dice(counts) == pytest.approx(combined.item(), rel=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_ignored_pixels_are_in_no_count(seed: int) -> None:
    logits, truth = random_batch(seed)
    rng = torch.Generator().manual_seed(seed)
    ignored = torch.rand(truth.shape, generator=rng) < 0.3
    counts = pixel_scores.pixel_counts(logits, truth, ignored)
    assert counts.sum(1).tolist() == (~ignored).sum(dim=(1, 2)).tolist()
    other_logits, other_truth = logits.clone(), truth.clone()
    other_logits[:, 0][ignored] *= -1
    other_truth[ignored] = ~other_truth[ignored].bool()
    assert torch.equal(pixel_scores.pixel_counts(other_logits, other_truth, ignored), counts)
    for row, logit, cell, mask in zip(counts.tolist(), logits, truth, ignored.numpy()):
        assert list(pixel_scores.mask_counts((logit[0] > 0).numpy(), cell.numpy(), mask).values()) == row


def test_split_into_batches_changes_nothing() -> None:
    logits, truth = random_batch(7, images=6)
    counts = pixel_scores.pixel_counts(logits, truth)
    parts = torch.cat([pixel_scores.pixel_counts(logits[i : i + 2], truth[i : i + 2]) for i in (0, 2, 4)])
    assert torch.equal(counts, parts)
    assert pixel_scores.dice(counts) == pixel_scores.dice(parts.sum(dim=0)) == pixel_scores.dice(parts.flip(0))


def test_dice_of_empty_masks() -> None:
    assert (
        pixel_scores.dice([0, 0, 0, 9])
        == pixel_scores.iou([0, 0, 0, 9])
        == pixel_scores.mean_image_dice([[0, 0, 0, 9]])
        == 1
    )
    assert (
        pixel_scores.dice([0, 3, 0, 6])
        == pixel_scores.iou([0, 0, 3, 6])
        == pixel_scores.mean_image_dice([[0, 3, 0, 6]])
        == 0
    )


def test_truth_may_be_labels_and_shapes_are_checked() -> None:
    logits = torch.tensor([[[[1.0, 1.0, -1.0, -1.0]]]])
    assert pixel_scores.pixel_counts(logits, torch.tensor([[[7, 0, 300, 0]]])).tolist() == [[1, 1, 1, 1]]
    assert pixel_scores.mask_counts(np.array([[255, 1, 0, 0]]), np.array([[7, 0, 300, 0]])) == {
        "tp": 1,
        "fp": 1,
        "fn": 1,
        "tn": 1,
    }
    with pytest.raises(ValueError, match="differ in shape"):
        pixel_scores.mask_counts(np.zeros((2, 2)), np.zeros((2, 3)))
    with pytest.raises(ValueError, match="expected"):
        pixel_scores.pixel_counts(torch.zeros(1, 1, 3, 3), torch.zeros(1, 3, 4))


def test_counts_do_not_overflow() -> None:
    many = np.full((2000, 4), 2**31, np.int64)  # 2000 images of 8 gigapixels
    assert pixel_scores.dice(many) == pytest.approx(0.5)


def test_intervals_contain_the_scores() -> None:
    rng = np.random.default_rng(0)
    summary = pixel_scores.scores(rng.integers(1, 5000, (30, 4)))
    assert summary.keys() == {"images", "dice", "iou", "mean_image_dice", "intervals"}
    assert summary["images"] == 30
    for name, (low, high) in summary["intervals"].items():
        assert 0 <= low < summary[name] < high <= 1
    alone = pixel_scores.scores([[1, 2, 3, 4]])
    assert alone["intervals"] == {"dice": None, "iou": None, "mean_image_dice": None}
