"""Geometry of the charts in the growth report: axes and SVG paths, in the pixels of one chart.

The template draws them as inline SVG: hundreds of small charts stay sharp, follow the colour scheme and need no script.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from raylivecell.growth.curves import Curve, Value
from raylivecell.growth.fit import Fit

LABELS = {"cells": "cells per image", "confluence": "confluence, %", "area": "median cell area, pixels"}
SCALE = {"cells": 1.0, "confluence": 100.0, "area": 1.0}
DOT_PX = 4
"""Smallest distance of dots in small charts."""
FIT_STEPS = 24
"""Segments of a fitted curve."""


class Axis(NamedTuple):
    """A linear or logarithmic axis."""

    low: float
    high: float
    is_log: bool
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        """Position of a value, 0 at `low` to 1 at `high`; values outside are moved to the ends."""
        low, high, value = ((math.log(max(v, 1e-9)) if self.is_log else v) for v in (self.low, self.high, value))
        return min(max((value - low) / (high - low), 0.0), 1.0)


class Box(NamedTuple):
    """Size of a chart and of its plot area, in pixels."""

    width: int
    height: int
    left: int
    top: int
    right: int
    bottom: int
    """Edges of the plot area."""


class Mark(NamedTuple):
    """A point with the text that is shown when the pointer is on it."""

    x: float
    y: float
    title: str


class Chart(NamedTuple):
    """One chart: SVG path data, ticks and points."""

    box: Box
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    band: str
    """Mean plus and minus one standard deviation; "" without spreads."""
    line: str
    wells: Sequence[str]
    """Thin lines: replicate wells."""
    points: Sequence[Mark]
    dots: str
    """The points as one path, for round line caps: small charts have no titles of points. "" if they would touch."""
    fit: str
    trusted: bool


def hours_axis(curves: Iterable[Curve]) -> Axis:
    """Time axis of all curves: ticks every 6, 12, 24 h, ..."""
    hours = [point.hours for curve in curves for point in curve.points]
    low, high = min(0.0, min(hours)), max(hours)
    high = high if high > low else low + 1
    step = next((s for s in (0.5, 1, 2, 4, 6, 12, 24, 48, 96, 168, 336) if (high - low) / s <= 4), (high - low) / 4)
    return Axis(low, high, False, _multiples(low, high, step))


def value_axis(curves: Iterable[Curve], measure: str) -> Axis:
    """Axis of a measure for all curves: cell counts on a logarithmic scale, on which exponential growth is a line."""
    points = [getattr(point, measure) for curve in curves for point in curve.points]
    values = [SCALE[measure] * value.mean for value in points if value is not None]
    if measure != "cells":
        highest = max(values, default=0.0) or 1.0
        step = _nice(highest / 3)
        top = math.ceil(1.05 * highest / step) * step
        top = min(top, 100.0) if measure == "confluence" else top
        return Axis(0, top, False, _multiples(0, top, step))
    positive = [value for value in values if value > 0] or [1.0]
    low, high = min(positive) / 1.3, max(positive) * 1.3
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = (1, 2, 5) if high / low < 100 else (1,)
    ticks = tuple(s * 10.0**d for d in decades for s in every if low <= s * 10.0**d <= high)
    if len(ticks) < 2:
        ticks = _multiples(low, high, _nice((high - low) / 3))
    return Axis(low, high, True, ticks)


def _multiples(low: float, high: float, step: float) -> tuple[float, ...]:
    first = math.ceil(low / step - 1e-9)
    return tuple(number * step for number in range(first, math.floor(high / step + 1e-9) + 1))


def _nice(step: float) -> float:
    """Round a step up to 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))


def chart(curve: Curve, measure: str, x: Axis, y: Axis, box: Box, wells: Sequence[Curve] = ()) -> Chart:
    """Draw one measure of a curve; `wells` are its replicates, as thin lines."""

    def at(hours: float, value: float) -> tuple[float, float]:
        return (
            round(box.left + x.at(hours) * (box.right - box.left), 1),
            round(box.bottom - y.at(SCALE[measure] * value) * (box.bottom - box.top), 1),
        )

    points, upper, lower = [], [], []
    for point in curve.points:
        value: Value | None = getattr(point, measure)
        if value is None or (y.is_log and value.mean <= 0):
            continue
        points.append(Mark(*at(point.hours, value.mean), _title(point.hours, value, measure)))
        if value.spread is not None:
            upper.append(at(point.hours, value.mean + value.spread))
            lower.append(at(point.hours, value.mean - value.spread))
    fit = curve.fits.get(measure)
    return Chart(
        box,
        [(at(tick, 0)[0], f"{tick:g}") for tick in x.ticks],
        [(round(box.bottom - y.at(tick) * (box.bottom - box.top), 1), f"{tick:,g}") for tick in y.ticks],
        _path([*upper, *reversed(lower)]) + "Z" if len(upper) > 1 else "",
        _path([(mark.x, mark.y) for mark in points]),
        [chart(well, measure, x, y, box).line for well in wells],
        points,
        "".join(f"M{mark.x:g} {mark.y:g}h0" for mark in points) if len(points) * DOT_PX < box.width else "",
        _fit_path(fit, at) if fit else "",
        fit is not None and not fit.reasons,
    )


def _fit_path(fit: Fit, at: Callable[[float, float], tuple[float, float]]) -> str:
    if fit.rate is None or fit.start_value is None or fit.start is None or fit.end is None:
        return ""
    steps = [fit.start + (fit.end - fit.start) * step / FIT_STEPS for step in range(FIT_STEPS + 1)]
    return _path([at(hours, fit.start_value * math.exp(fit.rate * (hours - fit.start))) for hours in steps])


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in points) if points else ""


def _title(hours: float, value: Value, measure: str) -> str:
    spread = "" if value.spread is None else f" +- {SCALE[measure] * value.spread:.3g}"
    return f"{hours:g} h: {SCALE[measure] * value.mean:.4g}{spread} {LABELS[measure]}"
