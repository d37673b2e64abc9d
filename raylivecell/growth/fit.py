"""Doubling time of a growing population: fit, 95 % interval, and the reasons not to trust it.

The model. In the exponential phase y(t) = y0 exp(r t) of a cell count or of confluence, the doubling time is ln 2 / r.
ln y is fitted by a straight line, because the noise of counts is multiplicative.

The interval. The deviations from the line are not independent: the same cells are seen in the next image, and a
division that happened early shifts all later counts. Least squares with independent errors ignores that: of intervals
for a simulated birth process with 37 images, 50 % contained the true rate instead of 95 %. Therefore the covariance of
ln y has two parts, noise of single images and a random walk:

    Cov = s^2 (I + L K),    K_ij = min(t_i, t_j),    t from 0 to 1 over the window

For each ratio L in `RATIOS` the slope has a t distribution (generalised least squares with flat priors on the
coefficients and on ln s). They are averaged, weighted by the marginal likelihood of L, as is usual in Bayesian model
averaging; the interval is the central 95 % of the average.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

MAX_CONFLUENCE = 0.8
"""End of the exponential phase: above it, cells divide more slowly and are hard to separate."""
MIN_TIMES = 4
MIN_R2 = 0.8
MIN_DOUBLINGS = 1 / 3
MAX_CURVATURE = 0.5
"""Largest change of the rate within the window, relative to its mean, if the change is significant."""
LEVEL = 0.95
RATIOS = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""0 for fields with many cells, 2 for 150 cells that are counted with an error of 5 %. Prior weights are equal: in
simulated birth processes of 150 cells, 93 to 98 % of the intervals of 5 to 37 images contain the true rate."""
MAX_POINTS = 200
"""Longer curves are averaged in groups of consecutive times: the fit takes a time proportional to the cube."""
NO_NOISE = 1e-6
"""Smallest standard deviation of ln y: results are rounded to about six digits."""

Floats = NDArray[np.float64]


class Fit(NamedTuple):
    """Exponential fit of one curve. Rates are per hour, times in hours since the start of the experiment."""

    times: int
    """Points in the window."""
    start: float | None
    """First and last time of the window; None without a point."""
    end: float | None
    rate: float | None = None
    """None without a fit."""
    rate_low: float | None = None
    rate_high: float | None = None
    start_value: float | None = None
    """Fitted value at `start`."""
    r2: float | None = None
    """Coefficient of determination of ln y."""
    reasons: tuple[str, ...] = ()
    """Why the fit should not be trusted; empty if it may be."""

    @property
    def doubling(self) -> float | None:
        """Doubling time in hours; None without growth."""
        return _doubling(self.rate)

    @property
    def doubling_low(self) -> float | None:
        """Lower bound of the doubling time; None if even the upper bound of the rate is not positive."""
        return _doubling(self.rate_high)

    @property
    def doubling_high(self) -> float | None:
        """Upper bound of the doubling time; None if there is none: zero growth is in the interval."""
        return _doubling(self.rate_low)


def _doubling(rate: float | None) -> float | None:
    return math.log(2) / rate if rate is not None and rate > 0 else None


def fit_curve(hours: ArrayLike, values: ArrayLike, confluence: ArrayLike, reasons: Sequence[str] = ()) -> Fit:
    """Fit an exponential to the part of a curve in front of its first confluence above `MAX_CONFLUENCE`.

    Args:
        hours: times (N,), ascending.
        values: cells per image or confluence (N,); times with 0 are left out.
        confluence: fraction of the area in cells (N,).
        reasons: further reasons not to trust the fit, about the images.
    """
    t, y, area = (np.asarray(array, np.float64) for array in (hours, values, confluence))
    fitted = window(area)
    marks = []
    if len(t) and (area > MAX_CONFLUENCE).sum() * 2 > len(t):
        marks.append(f"confluence above {MAX_CONFLUENCE:g} at most times")
    if (y[:fitted] <= 0).any():
        marks.append("no cells at some times")
    used = y[:fitted] > 0
    t, y = t[:fitted][used], y[:fitted][used]
    if len(t) < MIN_TIMES:
        marks.insert(0, _too_few(len(t), fitted < len(area)))
    if len(t) < 3:
        start, end = (float(t[0]), float(t[-1])) if len(t) else (None, None)
        return Fit(len(t), start, end, reasons=(*marks, *reasons))
    result = _fit_line(t, np.log(y))
    return result._replace(reasons=(*marks, *_marks(result, t, np.log(y)), *reasons))


def window(confluence: ArrayLike) -> int:
    """Number of points in front of the first above `MAX_CONFLUENCE`: those that are fitted."""
    above = np.flatnonzero(np.asarray(confluence, np.float64) > MAX_CONFLUENCE)
    return int(above[0]) if len(above) else np.size(confluence)


def _too_few(times: int, confluent: bool) -> str:
    where = f" below a confluence of {MAX_CONFLUENCE:g}" if confluent else ""
    return f"only {times} time{'s' * (times != 1)}{where}; {MIN_TIMES} are needed"


def _fit_line(t: Floats, log_y: Floats) -> Fit:
    span = t[-1] - t[0]
    x, y = _grouped((t - t[0]) / span), _grouped(log_y)
    slope, low, high = (float(value / span) for value in _coefficient(x, y, 1))
    centre, mean = float(t.mean()), float(log_y.mean())
    residual = log_y - mean - slope * (t - centre)
    total = float(((log_y - mean) ** 2).sum())
    r2 = 1 - float((residual**2).sum()) / total if total > 0 else 0.0
    start_value = math.exp(mean + slope * (t[0] - centre))
    return Fit(len(t), float(t[0]), float(t[-1]), slope, low, high, start_value, r2)


def _marks(fit: Fit, t: Floats, log_y: Floats) -> list[str]:
    """Reasons, from the numbers, not to trust a fit."""
    span, rate, low, high = t[-1] - t[0], fit.rate or 0.0, fit.rate_low or 0.0, fit.rate_high or 0.0
    if high < 0:
        return ["the values decrease"]
    marks = []
    if low <= 0:
        marks.append("the interval includes zero growth")
    elif span * rate < MIN_DOUBLINGS * math.log(2):
        marks.append(f"the {span:.3g} h are less than a third of the doubling time")
    if (fit.r2 or 0.0) < MIN_R2:
        marks.append(f"poor fit: R2 below {MIN_R2:g}")
    if len(t) > MIN_TIMES:
        change, change_low, change_high = (
            2 * value / span for value in _coefficient(_grouped((t - t[0]) / span), _grouped(log_y), 2)
        )
        if change_low * change_high > 0 and abs(change) > MAX_CURVATURE * abs(rate):
            marks.append(f"not exponential: the growth rate {'increases' if change > 0 else 'decreases'}")
    return marks


def _grouped(values: Floats) -> Floats:
    """Means of at most `MAX_POINTS` groups of consecutive values."""
    if len(values) <= MAX_POINTS:
        return values
    return np.array([group.mean() for group in np.array_split(values, MAX_POINTS)])


@functools.lru_cache(maxsize=64)
def _walk(times: tuple[float, ...]) -> tuple[Floats, Floats]:
    """Eigenvalues and eigenvectors of K; the wells of a plate have equal times."""
    values, vectors = np.linalg.eigh(np.minimum.outer(times, times))
    return np.maximum(values, 0), vectors


def _coefficient(t: Floats, y: Floats, degree: int) -> tuple[float, float, float]:
    """Highest coefficient of a polynomial in t (0 to 1): its mean and the limits of its 95 % interval."""
    from scipy import optimize, special  # imported late: 0.3 s

    eigenvalues, vectors = _walk(tuple(t.tolist()))
    design, response = vectors.T @ np.vander(t, degree + 1, increasing=True), vectors.T @ y
    freedom = len(t) - degree - 1
    means, errors, evidence = [], [], []
    for ratio in RATIOS:
        weight = 1 / (1 + ratio * eigenvalues)
        information = (design * weight[:, None]).T @ design
        coefficients = np.linalg.solve(information, (design * weight[:, None]).T @ response)
        squares = float((weight * (response - design @ coefficients) ** 2).sum())
        squares = max(squares, freedom * NO_NOISE**2)
        means.append(float(coefficients[-1]))
        errors.append(math.sqrt(squares / freedom * np.linalg.inv(information)[-1, -1]))
        determinants = np.log(weight).sum() - np.linalg.slogdet(information)[1]
        evidence.append((determinants - freedom * math.log(squares)) / 2)
    mean, error = np.array(means), np.array(errors)
    posterior = np.exp(np.array(evidence) - max(evidence))
    posterior /= posterior.sum()
    tail = (1 - LEVEL) / 2
    reach = 1.01 * special.stdtrit(freedom, 1 - tail) * error
    bracket = float((mean - reach).min()), float((mean + reach).max())

    def quantile(probability: float) -> float:
        return float(
            optimize.brentq(
                lambda value: posterior @ special.stdtr(freedom, (value - mean) / error) - probability, *bracket
            )
        )

    return float(posterior @ mean), quantile(tail), quantile(1 - tail)


def combine(fits: Sequence[Fit]) -> Fit:
    """Mean rate of replicate wells, with the t interval of the mean (N - 1 degrees of freedom; needs three wells).

    The wells are independent of each other, so the interval is valid whatever the errors within a well are.
    """
    from scipy import special  # imported late: 0.3 s

    fitted = [fit for fit in fits if fit.rate is not None]
    rates = np.array([fit.rate for fit in fitted], np.float64)
    start = min((fit.start for fit in fitted if fit.start is not None), default=None)
    end = max((fit.end for fit in fitted if fit.end is not None), default=None)
    reasons = []
    if len(rates) < 3:
        reasons.append(f"wells with a fit: {len(rates)}; an interval between wells needs 3")
    marked = [fit.reasons[0] for fit in fits if fit.reasons]
    if len(marked) * 2 > len(fits):
        reasons.append(f"{len(marked)} of {len(fits)} wells have no trusted fit ({marked[0]})")
    result = Fit(min((fit.times for fit in fitted), default=0), start, end)
    if not len(rates):
        return result._replace(reasons=tuple(reasons))
    rate = float(rates.mean())
    starts = [
        math.log(fit.start_value) - (fit.rate or 0) * ((fit.start or 0) - (start or 0))
        for fit in fitted
        if fit.start_value
    ]
    result = result._replace(rate=rate, start_value=math.exp(sum(starts) / len(starts)))
    if len(rates) > 2:
        reach = float(special.stdtrit(len(rates) - 1, (1 + LEVEL) / 2) * rates.std(ddof=1) / math.sqrt(len(rates)))
        result = result._replace(rate_low=rate - reach, rate_high=rate + reach)
        if rate + reach < 0:
            reasons.append("the values decrease")
        elif rate - reach <= 0:
            reasons.append("the interval includes zero growth")
    return result._replace(reasons=tuple(reasons))
