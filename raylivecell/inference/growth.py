"""Growth curves of `predict`, from images.csv and cells.csv where file names contain well and time.

    growth.csv         one row per well and time
    growth_fits.csv    one row per well or group of replicates, and measure: doubling time, interval, reasons
    growth.html        the curves in the layout of the plate (`reports/growth_page.py`)

They are computed again at the end of every run, so they depend only on the tables, and are deleted if no name matches.
"""

import csv
import io
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence

from raylivecell.core import storage
from raylivecell.core.console import console
from raylivecell.core.errors import UserError
from raylivecell.growth.curves import FITTED, MEASURES, Collector, Curve, Curves, ImageCount, Value
from raylivecell.growth.names import NamePattern
from raylivecell.inference import results
from raylivecell.reports import growth_page

POINTS, FITS, PAGE = "growth.csv", "growth_fits.csv", "growth.html"
FILES = (POINTS, FITS, PAGE)
POINT_COLUMNS = (
    *("plate", "condition", "well", "hours", "images", "sites", "failed", "warnings"),
    *("cells", "cells_sd", "confluence", "confluence_sd", "median_area_px", "median_area_px_sd"),
)
FIT_COLUMNS = (
    *("plate", "condition", "wells", "measure", "times", "from_hours", "to_hours"),
    *("growth_rate_per_hour", "growth_rate_low", "growth_rate_high"),
    *("doubling_hours", "doubling_hours_low", "doubling_hours_high", "r2", "trusted", "reasons"),
)
"""`doubling_hours_high` is empty if there is no upper bound: zero growth is in the interval."""


def check_names(names: NamePattern, files: Sequence[str], reasons: Mapping[str, str]) -> None:
    """Raise UserError if the user gave a pattern or `--frame-hours`, and no file has a well and a time.

    Args:
        names: the pattern.
        files: addresses of images.
        reasons: the reason by file, for those of `files` whose planes, and thus their frames, are unknown.
    """
    if not names.is_explicit or any(names.parse(file) for file in files):
        return
    unread = sorted(reasons)
    example = f"{unread[0]}: {reasons[unread[0]]}" if unread else ""
    listed = [file for file in files if file not in reasons]
    if not listed:
        raise UserError(f"none of the {len(files)} images can be read: {example}")
    raise UserError(
        f"--name-pattern and --frame-hours match none of the {len(listed)} images, such as {listed[0]}; "
        "correct them, or leave them out"
        + (f"; {len(unread)} file{'s' * (len(unread) > 1)} cannot be read: {example}" if unread else "")
    )


def write(out: str, names: NamePattern) -> None:
    """Write the growth files of the images in images.csv into `out`, or delete those of an earlier run."""
    collector, unmatched = Collector(), []
    for row, areas in results.rows_with_areas(out):
        position = names.parse(row.file)
        if position is None:
            unmatched.append(row.file)
            continue
        area = statistics.median(areas) if areas else None
        size = (row.height, row.width)
        collector.add(position, ImageCount(row.cells, row.confluence, area, size, bool(row.warning)))
    curves = collector.curves()
    if all(len(curve.points) < 2 for curve in curves.wells):
        delete(out)
        if collector.images:
            print_line(f"no growth curves: no well has images of two times; wells: {len(curves.wells)}")
        return
    remarks = notes(collector, unmatched)
    _write_changed(out, POINTS, _csv([POINT_COLUMNS, *_point_rows(curves.wells)]))
    _write_changed(out, FITS, _csv([FIT_COLUMNS, *_fit_rows(curves)]))
    _write_changed(out, PAGE, growth_page.render(curves, remarks))
    for note in remarks:
        print_line(f"growth curves: {note}")
    wells = f"{len(curves.wells)} well{'s' * (len(curves.wells) != 1)}"
    print_line(f"growth curves of {wells}: {storage.join(out, PAGE)}")


def delete(out: str) -> None:
    """Delete the growth files in `out`."""
    for name in FILES:
        storage.delete(storage.join(out, name))


def print_line(text: str) -> None:
    """Print a line to standard error."""
    console.print(text, markup=False, soft_wrap=True)


def _write_changed(out: str, name: str, data: bytes) -> None:
    """Write a file unless it has this content: a run without new images changes no file."""
    uri = storage.join(out, name)
    if not (storage.exists(uri) and storage.read_bytes(uri) == data):
        storage.write_bytes(uri, data)


def _csv(rows: Iterable[Sequence[str]]) -> bytes:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue().encode()


def notes(collector: Collector, unmatched: Sequence[str]) -> list[str]:
    """Remarks about images that were left out or averaged, one line each."""
    remarks = []
    if unmatched:
        count = f"{len(unmatched)} of {len(unmatched) + collector.images}"
        remarks.append(f"{count} images left out: no well and time in the name, first {unmatched[0]}")
    if collector.duplicates:
        remarks.append(f"{collector.duplicates} images have the well, site and time of another: averaged with it")
    return remarks


def _point_rows(wells: Iterable[Curve]) -> Iterator[list[str]]:
    for curve in wells:
        for point in curve.points:
            counts = (point.images, point.parts, point.failed, point.warnings)
            values: list[str] = []
            for name in MEASURES:
                value: Value | None = getattr(point, name)
                values += ["", ""] if value is None else [_number(value.mean), _number(value.spread)]
            yield [curve.plate, curve.condition, curve.well, _number(point.hours), *map(str, counts), *values]


def _fit_rows(curves: Curves) -> Iterator[list[str]]:
    for curve in (*curves.replicates, *curves.wells):
        for name in FITTED:
            fit = curve.fits[name]
            numbers = (fit.rate, fit.rate_low, fit.rate_high, fit.doubling, fit.doubling_low, fit.doubling_high, fit.r2)
            window = (str(fit.times), _number(fit.start), _number(fit.end))
            verdict = ("no" if fit.reasons else "yes", "; ".join(fit.reasons))
            names = (curve.plate, curve.condition, " ".join(curve.wells), name)
            yield [*names, *window, *map(_number, numbers), *verdict]


def _number(value: float | None) -> str:
    """Six digits: more would depend on the machine's linear algebra."""
    return "" if value is None else f"{value:.6g}"
