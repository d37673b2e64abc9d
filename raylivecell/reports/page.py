"""The parts of an HTML page that needs no network, no script and no other file; used by the reports.

All text given is escaped; what is named HTML is not.
"""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from raylivecell.core.version import __version__

# Okabe and Ito (2008): told apart in every common form of colour blindness.
BLACK, BLUE, GREEN, RED, PINK, GRAY = "#000000", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#9aa5b1"
LINES = "#e1e6ec"
STYLE = """
:root{--ink:#1c2430;--soft:#5b6675;--line:#e1e6ec;--back:#f5f7f9}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--ink);
  font:15px/1.5 system-ui,"Segoe UI",Roboto,"Liberation Sans",Arial,sans-serif}
main{max-width:1160px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:25px;margin:0}h2{font-size:18px;margin:36px 0 12px}
p{margin:6px 0}.soft{color:var(--soft)}
.grid{display:grid;gap:14px}.tiles{grid-template-columns:repeat(auto-fit,minmax(150px,1fr));margin-top:18px}
.curves{grid-template-columns:repeat(auto-fit,minmax(320px,1fr))}
.card{background:#fff;border:1px solid var(--line);border-radius:8px;padding:12px 14px}
.tile b{display:block;font-size:24px;font-weight:600;font-variant-numeric:tabular-nums}
img{display:block;max-width:100%;height:auto;margin:0 auto}
figure{margin:0}figcaption{color:var(--soft);margin-bottom:8px;overflow-wrap:anywhere}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:4px 12px;border-bottom:1px solid var(--line);white-space:nowrap}
th{color:var(--soft);font-weight:600}th:first-child,td:first-child{text-align:left;padding-left:0}
.wide{overflow-x:auto}
pre{margin:10px 0 0;font:13px/1.45 ui-monospace,"DejaVu Sans Mono",monospace;overflow-x:auto}
summary{cursor:pointer;font-weight:600}
@media print{body{background:#fff}.card{break-inside:avoid}}
"""


def page(title: str, subtitle: str, body: Iterable[str]) -> str:
    """A whole HTML page; `title` and `subtitle` are text, `body` is HTML."""
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    )
    top = f'<h1>{html.escape(title)}</h1><p class="soft">{html.escape(subtitle)} &middot; raylivecell {__version__}</p>'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n'
        f"<body><main>{top}\n" + "\n".join(body) + "\n</main></body></html>\n"
    )


def log_axis(axis: Axis) -> None:
    """A logarithmic axis with 1, 2 and 5 of each decade in plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def axes_of(width: float = 4.6, height: float = 2.7) -> tuple[Figure, Axes]:
    """A figure of so many inches with one pair of axes, in the reports' manner."""
    drawn = Figure(figsize=(width, height), layout="constrained")
    axes = drawn.add_subplot()
    axes.grid(color=LINES)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return drawn, axes


def number(value: Any) -> str:
    """A cell of a table: floats to four digits, nothing for none."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """In words, to the second."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """HTML of a table of text."""
    top = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{top}</tr>{lines}</table></div>'


def tile(label: str, value: str) -> str:
    """HTML of a figure in large type over its label."""
    return f'<div class="card tile"><b>{html.escape(value)}</b><span class="soft">{html.escape(label)}</span></div>'


def figure(title: str, source: str) -> str:
    """HTML of a picture (a data URI) under its title."""
    text = html.escape(title)
    return f'<figure class="card"><figcaption>{text}</figcaption><img src="{source}" alt="{text}"></figure>'


def grid(kind: str, cells: Iterable[str]) -> str:
    """HTML of cells side by side; `kind`: tiles, curves or pictures."""
    return f'<div class="grid {kind}">' + "".join(cells) + "</div>"


def svg(figure: Figure) -> bytes:
    """The figure as SVG, the same bytes for the same figure."""
    buffer = io.BytesIO()
    # No date and no random ids in it: the same run gives the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "raylivecell"}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    return buffer.getvalue()


def data_uri(data: bytes, kind: str) -> str:
    """The bytes of an image of `kind` (png, svg+xml) as a URI."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
