"""Bootstrap intervals: coverage, and agreement with a plain loop over resamples."""

import numpy as np
import pytest

from raylivecell.scoring import bootstrap, pixel_scores


def test_interval_covers_the_true_mean_at_its_level() -> None:
    """For 200 samples of 60 images with a known true mean, about 95 % of the intervals contain it."""
    rng = np.random.default_rng(5)
    covered = 0
    for trial in range(200):
        tp = rng.binomial(100, rng.beta(8, 2, size=60))  # Dice of an image = 2 tp / (2 tp + fp + fn) = tp / 100
        counts = np.stack([tp, 100 - tp, 100 - tp, np.zeros_like(tp)], axis=1)
        bounds = bootstrap.interval(np.mean, pixel_scores.image_dice(counts), seed=trial, resamples=300)
        assert bounds is not None
        covered += bounds[0] <= 0.8 <= bounds[1]
    assert 178 <= covered <= 198


@pytest.mark.parametrize("resamples", [7, 250])  # one batch of resamples, several batches
def test_interval_equals_a_loop_over_resamples(resamples: int) -> None:
    counts = np.random.default_rng(1).integers(0, 999, (20, 4))
    rng = np.random.default_rng(3)
    dice = [pixel_scores.dice(counts[rng.integers(20, size=20)]) for _ in range(resamples)]
    bounds = bootstrap.interval(pixel_scores._dice, *counts.T[:3], seed=3, resamples=resamples, level=0.8, paired=True)
    np.testing.assert_allclose(bounds, np.quantile(dice, [0.1, 0.9]))


def test_several_statistics_and_undefined_resamples() -> None:
    def statistics(values: np.ndarray) -> np.ndarray:
        return np.array([values.mean() if values.any() else np.nan, len(values)])

    bounds = bootstrap.interval(statistics, [0.0, 0.0, 0.0, 6.0], seed=1, vectorized=False)
    assert bounds is not None
    assert bounds.tolist() == [[1.5, 4.5], [4.0, 4.0]], "the 32 % of resamples without the 6 do not count"
    again = bootstrap.interval(statistics, [0.0, 0.0, 0.0, 6.0], seed=1, vectorized=False)
    np.testing.assert_array_equal(bounds, again)


def test_one_value_has_no_interval() -> None:
    assert bootstrap.interval(np.mean, [0.5]) is None
    assert bootstrap.interval(lambda a, b, axis: a.mean(axis) - b.mean(axis), [0.5, 0.6], [0.5]) is None
