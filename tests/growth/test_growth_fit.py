"""Doubling times: intervals contain the true value as often as they claim, and doubtful fits are marked."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylivecell.growth import fit
from raylivecell.growth.fit import Fit, fit_curve

RATE = math.log(2) / 24


def noisy(rng: np.random.Generator, hours: np.ndarray) -> np.ndarray:
    """Exact growth, counted with independent errors of 8 %."""
    return 120 * np.exp(RATE * hours + rng.normal(0, 0.08, len(hours)))


def births(rng: np.random.Generator, hours: np.ndarray) -> np.ndarray:
    """A pure birth process of 150 cells, counted with independent errors of 5 %: divisions are random."""
    counts = [150]
    for step in np.diff(hours):
        counts.append(counts[-1] + int(rng.negative_binomial(counts[-1], math.exp(-RATE * step))))
    return np.array(counts) * np.exp(rng.normal(0, 0.05, len(hours)))


@pytest.mark.parametrize("series", [noisy, births])
@pytest.mark.parametrize("times", [5, 10, 19])
def test_intervals_contain_the_true_rate_as_often_as_they_claim(series, times: int) -> None:
    rng = np.random.default_rng(times)
    hours = np.linspace(0, 72, times)
    fits = [fit_curve(hours, series(rng, hours), np.full(times, 0.3)) for _ in range(300)]
    covered = np.mean([result.rate_low <= RATE <= result.rate_high for result in fits])
    assert covered >= 0.9  # 300 draws: the standard error of 0.95 is 0.013; independent errors give up to 1
    widths = [result.rate_high - result.rate_low for result in fits]
    assert np.median(widths) < (0.6 if times > 5 else 0.9) * RATE  # not by being too wide
    doubling = [result.doubling for result in fits]
    assert np.median(doubling) == pytest.approx(24, rel=0.03)
    assert np.mean([not result.reasons for result in fits]) > 0.9
    assert all(result.doubling_low < result.doubling < result.doubling_high for result in fits if not result.reasons)


def test_intervals_of_replicates_contain_the_true_rate() -> None:
    rng = np.random.default_rng(0)
    hours = np.linspace(0, 72, 10)
    groups = [
        fit.combine([fit_curve(hours, births(rng, hours), np.full(10, 0.3)) for _ in range(4)]) for _ in range(100)
    ]
    assert 0.9 <= np.mean([group.rate_low <= RATE <= group.rate_high for group in groups]) <= 0.99  # N = 100
    two = fit.combine([fit_curve(hours, births(rng, hours), np.zeros(10)) for _ in range(2)])
    assert two.rate == pytest.approx(RATE, rel=0.2)
    assert two.rate_low is None
    assert "needs 3" in two.reasons[0]
    assert fit.combine([]).rate is None


@given(
    st.floats(1e-3, 0.5), st.floats(1, 1e4), st.integers(4, 40), st.floats(-50, 50), st.sampled_from([1.0, 60.0, 1e-2])
)
def test_exact_growth_is_found_in_any_unit(rate: float, first: float, times: int, start: float, unit: float) -> None:
    hours = start + np.linspace(0, 3 / rate, times)
    result = fit_curve(hours, first * unit * np.exp(rate * (hours - start)), np.zeros(times))
    assert result.rate == pytest.approx(rate, rel=1e-6)
    assert result.doubling == pytest.approx(math.log(2) / rate, rel=1e-6)
    assert result.start_value == pytest.approx(first * unit, rel=1e-5)
    assert result.r2 == pytest.approx(1)
    assert result.reasons == ()
    assert (result.times, result.start, result.end) == (times, hours[0], hours[-1])


def reasons(values: np.ndarray, confluence: np.ndarray | None = None, hours: np.ndarray | None = None) -> str:
    hours = np.arange(len(values)) * 6.0 if hours is None else hours
    return "; ".join(fit_curve(hours, values, np.zeros(len(values)) if confluence is None else confluence).reasons)


def test_doubtful_fits_are_marked_with_the_reason() -> None:
    rng = np.random.default_rng(4)
    hours = np.arange(13) * 6.0
    growing = 100 * np.exp(RATE * hours)
    noise = np.exp(rng.normal(0, 0.04, 13))
    assert reasons(growing * noise) == ""
    assert "only 3 times; 4 are needed" in reasons(growing[:3])
    assert "only 0 times" in reasons(growing[:0])
    brief = 100 * np.exp(RATE * hours / 10 + rng.normal(0, 1e-3, 13))
    assert reasons(brief, hours=hours / 10) == "the 7.2 h are less than a third of the doubling time"
    assert "includes zero growth" in reasons(100 * noise)
    assert "R2 below" in reasons(100 * noise)
    assert reasons(growing[::-1] * noise) == "the values decrease"
    saturating = 400 / (1 + 3 * np.exp(-2 * RATE * hours))
    assert "not exponential: the growth rate decreases" in reasons(saturating * noise**0.5)
    confluent = np.linspace(0.2, 1, 13) ** 0.3
    assert "confluence above 0.8 at most times" in reasons(growing * noise, confluent)
    assert "no cells at some times" in reasons(np.where(hours == 6, 0, growing))


def test_only_times_before_confluence_are_fitted() -> None:
    hours = np.arange(13) * 6.0
    confluence = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.79, 0.81, 0.5, 0.9, 0.9, 0.9, 0.9, 0.9])
    values = np.where(hours <= 30, np.exp(RATE * hours), 2.0)
    result = fit_curve(hours, values, confluence)
    assert (result.times, result.start, result.end) == (6, 0, 30)
    assert result.doubling == pytest.approx(24)


def test_no_growth_has_only_a_lower_bound() -> None:
    flat = 100 * np.exp(np.random.default_rng(1).normal(0, 0.05, 12))
    result = fit_curve(np.arange(12) * 6, flat, np.zeros(12))
    assert result.doubling_high is None
    assert 0 < result.doubling_low < math.inf
    falling = fit_curve(np.arange(12) * 6, np.exp(-RATE * np.arange(12)), np.zeros(12))
    assert falling.doubling is falling.doubling_low is falling.doubling_high is None
    assert falling.rate == pytest.approx(-RATE / 6)
    assert Fit(0, None, None).doubling is None


def test_long_curves_are_grouped() -> None:
    rng = np.random.default_rng(2)
    hours = np.linspace(0, 72, 3001)
    result = fit_curve(hours, 100 * np.exp(RATE * hours + rng.normal(0, 0.1, 3001)), np.zeros(3001))
    assert result.times == 3001
    assert result.doubling_low < 24 < result.doubling_high
    assert result.doubling == pytest.approx(24, rel=0.02)
