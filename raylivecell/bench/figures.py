"""Repeated measurements of several variants in turn: summaries, ratios and a bar chart."""

import io
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from raylivecell.core.console import track

UNITS = {
    "milliseconds": "milliseconds (shorter is better)",
    "seconds": "seconds (shorter is better)",
    "images_per_s": "images/s (longer is better)",
}
LOG_SCALE_RATIO = 30
"""Above this ratio of the largest to the smallest median the chart's axis is logarithmic."""

Figures = dict[str, Any]
"""Result of a benchmark: name -> number, text, summary, or nested figures."""


class Options(NamedTuple):
    """Options of the command line; each benchmark reads those that it needs."""

    repeats: int = 5
    images: int = 200


def measure_in_turn(variants: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Measure each variant `repeats` times, alternating, so that a drift of the machine's speed affects all."""
    values: dict[str, list[float]] = {name: [] for name in variants}
    turns = [name for _ in range(repeats) for name in variants]
    for name in track(turns, "measuring", len(turns)):
        values[name].append(variants[name]())
    return values


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, minimum and maximum of repeated measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summaries(values: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Summary of each variant's values."""
    return {name: summary(repeats) for name, repeats in values.items()}


def ratios(values: Mapping[str, Sequence[float]], pairs: Iterable[tuple[str, str]]) -> dict[str, dict[str, float]]:
    """Map "A / B" to the summary of the ratios between values of the same turn."""
    return {f"{a} / {b}": summary([x / y for x, y in zip(values[a], values[b])]) for a, b in pairs}


def chart(title: str, figures: Figures) -> bytes:
    """Bar chart as PNG of the first of UNITS in `figures` that maps name -> summary."""
    from matplotlib.figure import Figure  # 0.3 s to import

    unit = next(name for name in UNITS if isinstance(figures.get(name), dict))  # `seconds` may be one number
    bars = figures[unit]
    lows, medians, highs = ([bar[name] for bar in bars.values()] for name in ("min", "median", "max"))
    errors = [[m - low for m, low in zip(medians, lows)], [high - m for m, high in zip(medians, highs)]]
    figure = Figure(figsize=(8, 0.7 + 0.36 * len(bars)), layout="constrained")
    axes = figure.subplots()
    axes.barh(list(bars), medians, xerr=errors, color="#4477aa", ecolor="#222222", capsize=2)
    for position, (median, high) in enumerate(zip(medians, highs)):
        axes.annotate(f" {median:.3g}", (high, position), va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(right=1.12 * max(highs))
    axes.set_xlabel(UNITS[unit])
    if max(medians) > LOG_SCALE_RATIO * min(medians):
        axes.set_xscale("log")
        axes.set_xlim(0.7 * min(lows), 2 * max(highs))
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
