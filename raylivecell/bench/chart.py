"""A chart of what `bench` measured: a bar each way, with its spread."""

import io
from typing import Any

UNITS = {
    "milliseconds": "milliseconds (shorter is better)",
    "seconds": "seconds (shorter is better)",
    "images_per_s": "images/s (longer is better)",
}

WIDE = 30
"""A chart of a loader and a training step shows nothing of the step, but on a logarithmic scale."""


def chart(title: str, figures: dict[str, Any]) -> bytes:
    """A PNG of the first of UNITS in `figures`: name -> {median, min, max}."""
    from matplotlib.figure import Figure  # 0.3 s that only this needs

    unit = next(name for name in UNITS if isinstance(figures.get(name), dict))  # `seconds` may be those of a whole run
    bars = figures[unit]
    least, medians, most = ([bar[name] for bar in bars.values()] for name in ("min", "median", "max"))
    errors = [[m - low for m, low in zip(medians, least)], [high - m for m, high in zip(medians, most)]]
    figure = Figure(figsize=(8, 0.7 + 0.36 * len(bars)), layout="constrained")
    axes = figure.subplots()
    axes.barh(list(bars), medians, xerr=errors, color="#4477aa", ecolor="#222222", capsize=2)
    for place, (median, high) in enumerate(zip(medians, most)):
        axes.annotate(f" {median:.3g}", (high, place), va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(right=1.12 * max(most))
    axes.set_xlabel(UNITS[unit])
    if max(medians) > WIDE * min(medians):
        axes.set_xscale("log")
        axes.set_xlim(0.7 * min(least), 2 * max(most))
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
