r"""Parse plate, condition, well, site and time from the names of images.

Without a pattern of the user, two forms are recognised:

    A172_Phase_A7_1_01d08h00m_2.tif         LIVECell, Incucyte: cell type, well, site, time since the start, crop
    VID123_A7_1_2020y01m31d_08h00m.tif      Incucyte's export: vessel, well, site, date and time

A user's pattern is a regular expression that is searched in the path relative to the folder of the images, without
suffix, with `/` between folders. Its named groups are listed in `GROUPS`.
"""

import math
import posixpath
import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import NamedTuple

from raylivecell.core.errors import UserError

GROUPS = {
    "well": "well, such as B7",
    "site": "position in the well",
    "crop": "part of the image of a site",
    "condition": "cell type or treatment; wells that share it are replicates",
    "plate": "plate; default: the folder",
    "hours": "time in hours",
    "d": "days",
    "h": "hours of a time in days, hours, minutes and seconds",
    "m": "minutes",
    "s": "seconds",
    "year": "year of a date",
    "month": "month",
    "day": "day of the month",
    "frame": "number of the frame, with --frame-hours",
}
"""Groups of `--name-pattern`: only `well` and a time are required."""
DATE, CLOCK = ("year", "month", "day"), ("d", "h", "m", "s")
CLOCK_HOURS = {"d": 24.0, "h": 1.0, "m": 1 / 60, "s": 1 / 3600}
EXAMPLE = r"(?P<well>[A-H]\d+)_(?P<site>\d+)_(?P<hours>\d+)h"
MAX_HOURS = 1e5
"""11 years: a larger number is not a time."""

_POSITION = r"(?:^|/)(?:(?P<condition>[^/]*)_)?(?P<well>[A-Z]{1,2}\d{1,2})_(?P<site>\d{1,4})"
_DEFAULTS = (
    _POSITION + r"_(?P<d>\d{1,3})d(?P<h>\d{1,2})h(?P<m>\d{1,2})m(?:_(?P<crop>\d{1,4}))?$",
    _POSITION + r"_(?P<year>\d{4})y(?P<month>\d{1,2})m(?P<day>\d{1,2})d_(?P<h>\d{1,2})h(?P<m>\d{1,2})m$",
)
_DEFAULT_OF_PLANES = _POSITION + "$"
"""Time stacks: the time is that of the plane."""
_PHASE = re.compile(r"_?Phase$", re.IGNORECASE)
_VESSEL = re.compile(r"VID\d+")
_WELL = re.compile(r"([A-Za-z]{1,2})0*(\d{1,2})")
_ADDRESS = re.compile(r"(?P<file>.+)#(?P<plane>[a-z]\d{1,6}(?:_[a-z]\d{1,6})*)", re.DOTALL)
"""A plane of a file: FILE#t03_s1 has the time index 3 and the position 1. An image file has no such name."""
_AXIS = re.compile(r"([a-z])(\d+)")
_NUMBER = re.compile(r"-?\d{1,9}(\.\d{1,9})?", re.ASCII)


class Position(NamedTuple):
    """Where and when an image was taken."""

    plate: str
    """Folder of the plate, or vessel; "" for the folder of the images."""
    condition: str
    """Cell type or treatment; "" if unknown."""
    well: str
    """Row and column without leading zeros, such as B7; any text with a user's pattern."""
    site: str | None
    """None: the name has no site, so every image of the well is a different one."""
    crop: str
    hours: float
    """Hours since the start; since 1970 if `dated`."""
    dated: bool


class NamePattern:
    """Parser of image names.

    Args:
        pattern: a user's regular expression with the groups of `GROUPS`; None for the two default forms.
        frame_hours: hours between frames (`frame` and the planes of time stacks), positive.

    Raises:
        UserError: the pattern cannot be compiled, or lacks a group.
    """

    def __init__(self, pattern: str | None = None, frame_hours: float | None = None) -> None:
        if frame_hours is not None and not 0 < frame_hours <= MAX_HOURS:
            raise UserError(f"--frame-hours {frame_hours:g}: give the hours between two frames, such as 0.5")
        self.frame_hours = frame_hours
        self.is_default = pattern is None
        self.is_explicit = pattern is not None or frame_hours is not None
        planes = (_DEFAULT_OF_PLANES,) if frame_hours is not None else ()
        texts = (*_DEFAULTS, *planes) if pattern is None else (pattern,)
        self._expressions = [_compiled(text) for text in texts]
        if pattern is not None:
            _check_groups(self._expressions[0].groupindex, frame_hours)

    def parse(self, file: str) -> Position | None:
        """Parse the relative path of an image, maybe with `#PLANE`; None if it does not match or has no valid time."""
        address = _ADDRESS.fullmatch(file)
        path, plane = (address["file"], address["plane"]) if address else (file, "")
        stem = posixpath.splitext(path)[0].removesuffix(".ome")
        for expression in self._expressions:
            if match := expression.search(stem):
                return self._position(match, stem, dict(_AXIS.findall(plane)))
        return None

    def _position(self, match: re.Match[str], stem: str, axes: Mapping[str, str]) -> Position | None:
        groups = {name: value for name, value in match.groupdict().items() if value is not None}
        hours = self._hours(groups, axes.get("t"))
        if hours is None or not groups.get("well"):
            return None
        # The folder in front of the match: the match itself may contain the folder of a well.
        plate, condition = posixpath.dirname(stem[: match.start()] + "x"), groups.get("condition", "")
        if self.is_default:
            plate, condition = posixpath.dirname(stem), _PHASE.sub("", condition)
            if _VESSEL.fullmatch(condition):
                plate, condition = posixpath.join(plate, condition), ""
        plate = groups.get("plate", plate)
        site, dated = groups.get("site"), "year" in groups
        if "s" in axes:  # the positions of a stack are different sites
            site = f"{site or ''}s{axes['s']}"
        return Position(plate, condition, normalised_well(groups["well"]), site, groups.get("crop", ""), hours, dated)

    def _hours(self, groups: Mapping[str, str], plane_time: str | None) -> float | None:
        """Time in hours of an image whose plane, if any, has the time index `plane_time`; None without a valid time."""
        parts = {name: _number(groups[name]) for name in ("hours", "frame", *CLOCK, *DATE) if name in groups}
        if any(value is None for value in parts.values()):
            return None
        values = {name: value for name, value in parts.items() if value is not None}
        hours = sum(values.get(name, 0.0) * factor for name, factor in CLOCK_HOURS.items())
        hours += values.get("hours", 0.0) + values.get("frame", 0.0) * (self.frame_hours or 0.0)
        if plane_time is not None:  # without --frame-hours the planes of a stack would all have one time
            if self.frame_hours is None:
                return None
            hours += float(plane_time) * self.frame_hours
        elif not values:
            return None
        if "year" in values:
            try:
                date = datetime(*(int(values[name]) for name in DATE), tzinfo=timezone.utc)  # type: ignore[misc, arg-type]
            except (KeyError, ValueError):
                return None
            return hours + date.timestamp() / 3600
        return hours if math.isfinite(hours) and abs(hours) <= MAX_HOURS else None


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(
            f"--name-pattern {pattern!r} is not a regular expression: {error}; example: {EXAMPLE}"
        ) from error


def _check_groups(groups: Mapping[str, int], frame_hours: float | None) -> None:
    """Raise UserError if the groups of a pattern are unknown, or do not give a well and one time."""
    if unknown := [name for name in groups if name not in GROUPS]:
        raise UserError(
            f"--name-pattern has the unknown group {', '.join(unknown)}; the groups are {', '.join(GROUPS)}"
        )
    has_date, has_clock = any(name in groups for name in DATE), any(name in groups for name in CLOCK)
    times = {"hours": "hours" in groups, "frame": "frame" in groups, "date and clock": has_date or has_clock}
    missing = [] if "well" in groups else ["well"]
    if not any(times.values()) and frame_hours is None:
        missing.append("time: hours, or d, h, m, or year, month, day, h, m, or frame")
    if has_date:
        missing += [name for name in DATE if name not in groups]
    if missing:
        raise UserError(f"--name-pattern lacks {'; '.join(missing)}; write a named group for each, as in {EXAMPLE}")
    if sum(times.values()) > 1 or (has_date and "d" in groups):
        raise UserError("--name-pattern has two kinds of time; use hours, or d, h, m, or a date, or frame")
    if "frame" in groups and frame_hours is None:
        raise UserError("--name-pattern has the group frame: give the hours between two frames as --frame-hours")


def _number(text: str) -> float | None:
    return float(text) if _NUMBER.fullmatch(text) else None


def normalised_well(name: str) -> str:
    """Write a07 and A07 as A7; other names stay as they are."""
    match = _WELL.fullmatch(name)
    return f"{match[1].upper()}{int(match[2])}" if match and int(match[2]) else name


def row_and_column(well: str) -> tuple[int, int] | None:
    """Row and column of a well on a plate, both from 0: A1 is (0, 0), AA1 is (26, 0); None for other names."""
    match = re.fullmatch(r"([A-Z]{1,2})([1-9]\d?)", well)
    if match is None:
        return None
    row = 0
    for letter in match[1]:
        row = 26 * row + ord(letter) - ord("A") + 1
    return row - 1, int(match[2]) - 1


def sort_key(text: str) -> tuple[tuple[int, int, str], ...]:
    """Key that sorts numbers in names by value: A2 before A10."""
    parts: Sequence[str] = re.findall(r"[0-9]{1,18}|[^0-9]+", text)
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts)
