"""growth.html of `predict`: growth curves of replicates and wells, in the layout of the plate, with doubling times."""

import statistics
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from raylivecell.growth import fit as fitting
from raylivecell.growth.curves import FITTED, MEASURES, Curve, Curves
from raylivecell.growth.fit import Fit
from raylivecell.growth.names import row_and_column
from raylivecell.reports import growth_charts, page
from raylivecell.reports.growth_charts import Axis, Box, Chart

FORMATS = ((2, 3), (3, 4), (4, 6), (6, 8), (8, 12), (16, 24), (32, 48))
"""Rows and columns of plates with 6 to 1,536 wells."""
USUAL = (8, 12)
LARGE = Box(350, 216, 46, 12, 340, 178)
MAX_LARGE = 24
"""Curves with a large chart of their own."""
OPEN_ROWS = 100
"""A longer table of fits is folded."""
TITLES = {
    "cells": "Cells per image, logarithmic scale",
    "confluence": "Confluence, %",
    "area": "Median cell area, pixels",
}


class Panel(NamedTuple):
    """A well of a plate; `chart` is None if it has no images."""

    chart: Chart | None
    title: str = ""
    text: str = ""
    """Doubling time."""


class PlateRow(NamedTuple):
    """A row of a plate with its label."""

    label: str
    panels: Sequence[Panel]

    @property
    def is_used(self) -> bool:
        """Whether a well of the row has images."""
        return any(panel.chart for panel in self.panels)


class Grid(NamedTuple):
    """A measure of all wells of a plate."""

    title: str
    box: Box
    columns: Sequence[tuple[str, bool]]
    """Label, and whether a well of the column has images."""
    rows: Sequence[PlateRow]
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]


class Card(NamedTuple):
    """Large charts of replicates or of a well."""

    title: str
    doubling: str
    reasons: Sequence[str]
    charts: Sequence[tuple[str, Chart]]


class FitRow(NamedTuple):
    """A row of the table of fits."""

    cells: Sequence[str]
    reasons: str


def render(curves: Curves, notes: Sequence[str]) -> bytes:
    """Render the page.

    Args:
        curves: curves of at least one well with a point.
        notes: remarks about images, one line each.
    """
    x = growth_charts.hours_axis(curves.wells)
    axes = {name: growth_charts.value_axis(curves.wells, name) for name in MEASURES}
    plates = [(name, [*wells]) for name, wells in groupby(curves.wells, lambda curve: curve.plate)]
    large = cards(curves)
    rows = [row for curve in (*curves.replicates, *curves.wells) for row in _fit_rows(curve, len(plates) > 1)]
    return page.render(
        "growth",
        f"Growth of {_count(len(curves.wells), 'well')}",
        "Cell counts, confluence and cell area over time",
        headline=_headline(curves),
        notes=notes,
        cards=large[:MAX_LARGE],
        hidden_cards=max(len(large) - MAX_LARGE, 0),
        plates=[
            (_plate_title(name, wells), [_grid(wells, measure, x, axes[measure]) for measure in MEASURES])
            for name, wells in plates
        ],
        fit_head=_fit_head(len(plates) > 1),
        fit_rows=rows,
        fits_open=len(rows) <= OPEN_ROWS,
        limits=fitting,
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _headline(curves: Curves) -> list[tuple[str, str]]:
    points = [point for curve in curves.wells for point in curve.points]
    hours = [point.hours for point in points]
    fits = [curve.fits["cells"] for curve in curves.wells]
    trusted = [fit.doubling for fit in fits if not fit.reasons and fit.doubling is not None]
    median = f"{statistics.median(trusted):.3g} h" if trusted else "-"
    return [
        ("wells", str(len(curves.wells))),
        ("images", f"{sum(point.images + point.failed for point in points):,}"),
        ("from first to last image", f"{max(hours) - min(hours):.4g} h"),
        ("times", str(len(set(hours)))),
        ("doubling time of the count, median of trusted wells", median),
        ("wells with a trusted fit of the count", f"{len(trusted)} of {len(fits)}"),
    ]


def doubling_text(fit: Fit, interval: bool = True) -> str:
    """Doubling time with its interval, a lower bound, or why there is none."""
    if fit.rate is None:
        return "no fit"
    if fit.rate_low is None or fit.rate_high is None:
        return f"{fit.doubling:.3g} h" if fit.doubling is not None else "no growth"
    if fit.doubling_low is None:
        return "decreasing"
    if fit.doubling is None or fit.doubling_high is None:
        return f"> {fit.doubling_low:.3g} h"
    limits = f" ({fit.doubling_low:.3g} to {fit.doubling_high:.3g})" if interval else ""
    return f"{fit.doubling:.3g} h{limits}"


def cards(curves: Curves) -> list[Card]:
    """Large charts: of replicates, then of wells that have none."""
    x = growth_charts.hours_axis(curves.wells)
    by_name = {(curve.plate, curve.condition, curve.well): curve for curve in curves.wells}
    members = {
        (curve.plate, curve.condition): [by_name[curve.plate, curve.condition, well] for well in curve.wells]
        for curve in curves.replicates
    }
    single = [curve for curve in curves.wells if (curve.plate, curve.condition) not in members]
    result = []
    for curve in (*curves.replicates, *single):
        wells = members[curve.plate, curve.condition] if not curve.well else []
        axes = {name: growth_charts.value_axis(wells or [curve], name) for name in MEASURES}
        charts = [(TITLES[name], growth_charts.chart(curve, name, x, axes[name], LARGE, wells)) for name in MEASURES]
        title = ", ".join(dict.fromkeys(filter(None, (curve.plate, curve.condition, _wells(curve)))))
        result.append(Card(title, doubling_text(curve.fits["cells"]), curve.fits["cells"].reasons, charts))
    return result


def _wells(curve: Curve) -> str:
    if curve.well:
        return f"well {curve.well}"
    return f"{_count(len(curve.wells), 'well')}: {' '.join(curve.wells)}"


def plate_format(wells: Sequence[str]) -> tuple[int, int] | None:
    """Rows and columns of the plate that contains `wells`; None if a name is not a row and a column.

    96 wells, or more if needed; fewer if at least half of the wells of a smaller plate are used.
    """
    places = [row_and_column(well) for well in wells]
    used = {place for place in places if place is not None}
    if None in places or len(used) < len(wells):
        return None
    fitting_formats = [
        (rows, columns) for rows, columns in FORMATS if all(row < rows and column < columns for row, column in used)
    ]
    for rows, columns in fitting_formats:
        if (rows, columns) >= USUAL or 2 * len(used) >= rows * columns:
            return rows, columns
    return None


def _plate_title(name: str, wells: Sequence[Curve]) -> str:
    layout = plate_format([curve.well for curve in wells])
    wells_of_plate = f", {layout[0] * layout[1]:,} wells" if layout else ""
    return f"Plate {name}".strip() + wells_of_plate


def _grid(wells: Sequence[Curve], measure: str, x: Axis, y: Axis) -> Grid:
    layout = plate_format([curve.well for curve in wells])
    columns = layout[1] if layout else min(len(wells), 12)
    box = _panel_box(columns)
    each = [_panel(curve, measure, x, y, box) for curve in wells]
    if layout is None:  # in the order of their names, which the panels then show
        each = [panel._replace(text=f"{curve.well} {panel.text}".strip()) for curve, panel in zip(wells, each)]
        rows = [PlateRow("", each[start : start + columns]) for start in range(0, len(each), columns)]
        heads = [""] * columns
    else:
        panels = {curve.well: panel for curve, panel in zip(wells, each)}
        letters = [_row_name(row) for row in range(layout[0])]
        heads = [str(column + 1) for column in range(columns)]
        rows = [PlateRow(row, [panels.get(row + column, Panel(None)) for column in heads]) for row in letters]
    example = growth_charts.chart(wells[0], measure, x, y, box)
    x_ticks = [example.x_ticks[0], example.x_ticks[-1]] if len(example.x_ticks) > 1 else example.x_ticks
    x_ticks = x_ticks[-1:] if box.width < 60 else x_ticks
    used = [any(row.panels[column].chart for row in rows if column < len(row.panels)) for column in range(columns)]
    return Grid(TITLES[measure], box, [*zip(heads, used)], rows, x_ticks, _spaced(example.y_ticks))


def _panel_box(columns: int) -> Box:
    """A plate with up to 24 columns is as wide as the page."""
    sizes = ((6, 150, 96), (8, 110, 76), (12, 80, 60))
    width, height = next(((width, height) for most, width, height in sizes if columns <= most), (38, 32))
    return Box(width, height, 1, 1, width - 1, height - 1)


def _spaced(ticks: Sequence[tuple[float, str]], gap: float = 11) -> list[tuple[float, str]]:
    """Ticks at least `gap` pixels apart: labels do not overlap."""
    chosen: list[tuple[float, str]] = []
    for tick in ticks:
        if not chosen or abs(tick[0] - chosen[-1][0]) >= gap:
            chosen.append(tick)
    return chosen


def _panel(curve: Curve, measure: str, x: Axis, y: Axis, box: Box) -> Panel:
    chart = growth_charts.chart(curve, measure, x, y, box)
    fit = curve.fits.get(measure)
    lines = [", ".join(filter(None, (curve.well, curve.condition, _count(len(curve.points), "time"))))]
    text = ""
    if fit is not None:
        lines += [f"doubling time {doubling_text(fit)}", *(f"! {reason}" for reason in fit.reasons)]
        text = doubling_text(fit, interval=False) if box.width > 38 else ""
        text = f"! {text}".strip() if fit.reasons else text
    last = next((mark.title for mark in reversed(chart.points)), "")
    return Panel(chart, "\n".join([*lines, *filter(None, [last])]), text)


def _row_name(row: int) -> str:
    return (chr(64 + row // 26) if row >= 26 else "") + chr(65 + row % 26)


def _fit_head(with_plate: bool) -> list[str]:
    numbers = ["doubling time, h", "growth/day", "R2", "times", "window, h"]
    return [*(["plate"] if with_plate else []), "condition", "wells", "fit of", *numbers]


def _fit_rows(curve: Curve, with_plate: bool) -> list[FitRow]:
    rows = []
    for name in FITTED:
        fit = curve.fits[name]
        window = "" if fit.start is None or fit.end is None else f"{fit.start:g} to {fit.end:g}"
        cells = [
            *([curve.plate] if with_plate else []),
            curve.condition,
            " ".join(curve.wells),
            "count" if name == "cells" else name,
            doubling_text(fit).replace(" h", ""),
            "-" if fit.rate is None else f"{24 * fit.rate:.3f}",
            "" if fit.r2 is None else f"{fit.r2:.3f}",
            str(fit.times),
            window,
        ]
        rows.append(FitRow(cells, "; ".join(fit.reasons)))
    return rows
