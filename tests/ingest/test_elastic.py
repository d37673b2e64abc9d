"""The displacement field compared with its direct form.

Both are separable and linear in independent random numbers, so the covariance of any two pixels can be computed
exactly, without random draws.
"""

from typing import Any

import cv2
import numpy as np
import pytest

from raylivecell.ingest.elastic import field, field_direct


class Amplitude(np.random.Generator):
    """Random generator that draws a single amplitude of 1: frequency k along y, frequency 0 along x."""

    def __init__(self, k: int) -> None:
        super().__init__(np.random.PCG64(0))
        self.k, self.count = k, 0

    def standard_normal(self, size: Any = None, dtype: Any = np.float64, out: Any = None) -> Any:
        draws = np.zeros(size, dtype)
        draws[:, self.k, 0] = 1
        self.count = size[1]
        return draws


def our_rows(length: int, sigma: float) -> np.ndarray:
    """The field along one axis: row = pixel, column = weight of an independent random number of variance 1."""
    first = Amplitude(0)
    constant = field(first, (length, length), sigma)[0, :, 0].astype(float)
    others = [field(Amplitude(k), (length, length), sigma)[0, :, 0] for k in range(1, first.count)]
    # Divide by the weight of frequency 0 along x, equal for all pixels; the noise has variance 1/3.
    level = np.sqrt(constant[0] * np.sqrt(3))
    return np.stack([constant, *others], axis=1) * np.sqrt(3) / level


def direct_rows(length: int, sigma: float) -> np.ndarray:
    """The direct form along one axis: row = pixel, column = weight of the noise at a pixel."""
    taps = int(np.rint(8 * sigma + 1)) | 1  # kernel size of cv2.GaussianBlur for float images
    return cv2.GaussianBlur(np.eye(length), (1, taps), sigmaX=sigma, sigmaY=sigma, borderType=cv2.BORDER_REFLECT)


def covariance(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Standard deviation of each pixel, and correlation of each pair."""
    products = rows @ rows.T
    deviation = np.sqrt(np.diag(products))
    return deviation, products / np.outer(deviation, deviation)


def correlation_length(correlation: np.ndarray) -> float:
    """Lag at which `correlation` (starting at lag 0) first falls below 1/e, interpolated between pixels."""
    after = int(np.argmax(correlation < np.exp(-1)))
    high, low = correlation[after - 1], correlation[after]
    return float(after - (np.exp(-1) - low) / (high - low))


@pytest.mark.parametrize(
    ("length", "sigma"),
    [
        (97, 3.0),
        (97, 4.1),
        (120, 5.5),
        (61, 7.9),
        (333, 10.0),
        (434, 10.0),
        (333, 17.0),
        (520, 25.0),
        (97, 40.0),
        (520, 40.0),
    ],
)
def test_the_field_is_distributed_as_its_direct_form(length: int, sigma: float) -> None:
    (ours, our_correlation), (direct, correlation) = (covariance(f(length, sigma)) for f in (our_rows, direct_rows))
    assert np.abs((ours / direct) ** 2 - 1).max() < 0.02  # squared: the worst pixels of both axes
    assert np.mean((ours / direct) ** 2) == pytest.approx(1, abs=0.005)
    np.testing.assert_allclose(our_correlation, correlation, atol=0.015)
    for pixel in {0, 3, length // 4, length // 2}:
        if correlation[pixel, pixel:].min() < 0.3:
            expected = correlation_length(correlation[pixel, pixel:])
            assert correlation_length(our_correlation[pixel, pixel:]) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("sigma", "draw"), [(2.0, field), (3.0, field), (6.0, field), (6.0, field_direct)])
def test_fields_have_the_stated_strength_and_correlation_length(sigma: float, draw: Any) -> None:
    fields = np.stack([draw(np.random.default_rng(seed), (400, 437), sigma) for seed in range(12)])
    inner = fields[:, :, 20:-20, 20:-20].astype(float)
    assert np.sqrt((inner**2).mean()) == pytest.approx(0.5 / np.sqrt(3 * np.pi) / sigma, rel=0.02)
    for axis in (2, 3):
        lags = range(int(4 * sigma))
        along = np.moveaxis(inner, axis, 0)
        products = np.array([(along[: len(along) - lag] * along[lag:]).mean() for lag in lags])
        assert correlation_length(products / products[0]) == pytest.approx(2 * sigma, rel=0.05)
    assert abs(np.corrcoef(inner[:, 0].ravel(), inner[:, 1].ravel())[0, 1]) < 0.05
