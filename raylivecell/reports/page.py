"""Render the HTML reports from templates/*.html.j2, and the tables and figures that all reports share.

Each page is one file without scripts or external resources. Jinja2 escapes every value.
"""

import base64
import io
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jinja2
import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from raylivecell.core.version import __version__

# Okabe and Ito (2008): distinguishable with every common form of colour blindness.
BLACK, BLUE, GREEN, RED, PINK, GRAY = "#000000", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#9aa5b1"
LINES = "#e1e6ec"
ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("raylivecell.reports"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


class Image(NamedTuple):
    """A titled image that is embedded in the page."""

    title: str
    uri: str
    """Data URI."""


class Table(NamedTuple):
    """A table of text cells."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def render(template: str, title: str, subtitle: str, **values: Any) -> bytes:
    """Render templates/TEMPLATE.html.j2 as UTF-8."""
    page = ENVIRONMENT.get_template(f"{template}.html.j2")
    return page.render(title=title, subtitle=subtitle, version=__version__, **values).encode()


def images(data: Iterable[tuple[str, bytes]], kind: str) -> list[Image]:
    """Embed titled image files of one `kind`: png, jpeg or svg+xml."""
    return [Image(title, f"data:image/{kind};base64,{base64.b64encode(file).decode()}") for title, file in data]


def log_axis(axis: Axis) -> None:
    """Label 1, 2 and 5 of each decade of a logarithmic axis in plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def axes_of(width: float = 4.6, height: float = 2.7) -> tuple[Figure, Axes]:
    """Create a figure of `width` x `height` inches with one pair of axes in the reports' style."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(color=LINES)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def number(value: Any) -> str:
    """Format a table cell: floats to four digits, empty for None."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def number_table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> Table:
    """Table of `columns`, one line per row; missing values are empty."""
    return Table(columns, [[number(row.get(name)) for name in columns] for row in rows])


def duration(seconds: float) -> str:
    """Format hours and minutes, or minutes and seconds below one hour."""
    minutes, remainder = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {remainder} s"


def svg(figure: Figure) -> bytes:
    """Draw a figure as SVG; equal figures give equal bytes."""
    buffer = io.BytesIO()
    # No date, and fixed element ids.
    with matplotlib.rc_context({"svg.hashsalt": "raylivecell"}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    return buffer.getvalue()
