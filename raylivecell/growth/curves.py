"""Growth curves of wells: the mean and spread of the images of a well at each time, and replicate wells.

A well's value is the mean over its sites, a site's value the mean over its crops, so that a site with more crops has no
more weight. Spreads are standard deviations (N - 1) between the sites of a well, or between replicate wells. A plate is
a folder (or vessel); wells of one name with two conditions in a folder belong to two plates.
"""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from raylivecell.growth import fit
from raylivecell.growth.fit import Fit
from raylivecell.growth.names import Position, sort_key

MEASURES = ("cells", "confluence", "area")
FITTED = ("cells", "confluence")
MAX_MISSING = 0.1
"""Largest fraction of missing images, or of images with warnings, of a trusted fit."""
MAX_AREA_RATIO = 3
"""Largest ratio of the median cell areas of a well in a trusted fit of the count: cells spread, but less than that."""


class ImageCount(NamedTuple):
    """Result of one image."""

    cells: int | None
    """None: the image could not be read."""
    confluence: float | None = None
    area: float | None = None
    """Median area of its cells in pixels; None without cells or without cells.csv."""
    size: tuple[int | None, int | None] = (None, None)
    """Height and width."""
    has_warning: bool = False


class Value(NamedTuple):
    """Mean, and standard deviation if there are two or more parts."""

    mean: float
    spread: float | None


class Point(NamedTuple):
    """A well, or the replicates of a condition, at one time."""

    hours: float
    images: int
    """Images with a result."""
    parts: int
    """Sites of a well, or wells of a condition, with a result."""
    failed: int
    warnings: int
    cells: Value | None
    """Cells per image; None if every image failed."""
    confluence: Value | None
    area: Value | None


class Curve(NamedTuple):
    """Growth of one well, or of the replicate wells of a condition."""

    plate: str
    condition: str
    well: str
    """"" for replicates."""
    wells: tuple[str, ...]
    points: tuple[Point, ...]
    fits: Mapping[str, Fit]
    """By measure (`FITTED`)."""


class Curves(NamedTuple):
    """All growth curves of a folder of images."""

    wells: Sequence[Curve]
    """Sorted by plate, condition and well."""
    replicates: Sequence[Curve]
    """A curve per plate and condition with two or more wells."""


Key = tuple[str, str, str]


class Collector:
    """Collects the images of wells; memory grows with the number of images, not with that of cells."""

    def __init__(self) -> None:
        self._wells: dict[Key, dict[float, list[tuple[Position, ImageCount]]]] = defaultdict(lambda: defaultdict(list))
        self._positions: set[Position] = set()
        self.images = 0
        self.duplicates = 0
        """Images with the plate, condition, well, site, crop and time of an earlier one."""

    def add(self, position: Position, image: ImageCount) -> None:
        """Add the result of one image."""
        self.images += 1
        if position.site is not None:
            self.duplicates += position in self._positions
            self._positions.add(position)
        self._wells[position.plate, position.condition, position.well][position.hours].append((position, image))

    def curves(self) -> Curves:
        """Compute the curves and their fits."""
        names = self._plate_names()
        origins = self._origins()
        wells = []
        for (plate, condition, well), times in self._wells.items():
            shown = names[plate, condition]
            rounded: dict[float, list[tuple[Position, ImageCount]]] = defaultdict(list)
            for hours, images in times.items():
                origin = origins.get(plate, 0.0) if images[0][0].dated else 0.0
                rounded[round(hours - origin, 4)] += images
            wells.append(_well_curve(shown, condition, well, dict(sorted(rounded.items()))))
        wells.sort(key=lambda curve: [(sort_key(name), name) for name in (curve.plate, curve.condition, curve.well)])
        return Curves(wells, replicates(wells))

    def _origins(self) -> dict[str, float]:
        """First dated time of each plate."""
        origins: dict[str, float] = {}
        for (plate, _, _), times in self._wells.items():
            for hours, images in times.items():
                if images[0][0].dated:
                    origins[plate] = min(hours, origins.get(plate, hours))
        return origins

    def _plate_names(self) -> dict[tuple[str, str], str]:
        """Name of the plate of each (folder, condition)."""
        conditions: dict[tuple[str, str], set[str]] = defaultdict(set)
        for plate, condition, well in self._wells:
            conditions[plate, well].add(condition)
        shared = {plate for (plate, _), values in conditions.items() if len(values) > 1}
        return {
            (plate, condition): " ".join(filter(None, (plate, condition))) if plate in shared else plate
            for plate, condition, _ in self._wells
        }


def _well_curve(
    plate: str, condition: str, well: str, times: Mapping[float, Sequence[tuple[Position, ImageCount]]]
) -> Curve:
    points = tuple(_point(hours, images) for hours, images in times.items())
    usable = [point for point in points if point.cells and point.confluence]
    hours = [point.hours for point in usable]
    confluence = [point.confluence.mean for point in usable if point.confluence]
    end = fit.window(confluence)
    fitted = {time: images for time, images in times.items() if end == len(hours) or time < hours[end]}
    reasons = {"confluence": _image_reasons(fitted)}
    reasons["cells"] = reasons["confluence"] + _area_reasons(usable[:end])
    fits = {
        name: fit.fit_curve(hours, [getattr(point, name).mean for point in usable], confluence, reasons[name])
        for name in FITTED
    }
    return Curve(plate, condition, well, (well,), points, fits)


def _point(hours: float, images: Sequence[tuple[Position, ImageCount]]) -> Point:
    read = [(position, image) for position, image in images if image.cells is not None]
    sites: dict[str | int, list[ImageCount]] = defaultdict(list)
    for number, (position, image) in enumerate(read):
        sites[number if position.site is None else position.site].append(image)

    def value(name: str) -> Value | None:
        means = []
        for members in sites.values():
            values = [getattr(image, name) for image in members if getattr(image, name) is not None]
            means += [statistics.fmean(values)] if values else []
        return _value(means)

    warnings = sum(image.has_warning for _, image in read)
    measures = (value(name) for name in MEASURES)
    return Point(hours, len(read), len(sites), len(images) - len(read), warnings, *measures)


def _value(values: Sequence[float]) -> Value | None:
    if not values:
        return None
    return Value(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def _image_reasons(times: Mapping[float, Sequence[tuple[Position, ImageCount]]]) -> list[str]:
    """Reasons, from the images in the window of a fit, not to trust it."""
    images = [image for members in times.values() for _, image in members]
    read = [image for image in images if image.cells is not None]
    expected = len(set[object]().union(*(_views(members) for members in times.values()))) * len(times)
    present = sum(len(_views([pair for pair in members if pair[1].cells is not None])) for members in times.values())
    reasons = []
    if present < (1 - MAX_MISSING) * expected:
        reasons.append(f"{expected - present} of {expected} images are missing or could not be read")
    if (warned := sum(image.has_warning for image in read)) > MAX_MISSING * len(read):
        reasons.append(f"{warned} of {len(read)} images have a warning in images.csv")
    if len({image.size for image in read}) > 1:
        reasons.append("the images have different sizes")
    return reasons


def _area_reasons(points: Sequence[Point]) -> list[str]:
    """A reason not to trust the fit of the count if debris is counted as cells, or cells are joined or split."""
    areas = [point.area.mean for point in points if point.area is not None]
    if not areas or max(areas) <= MAX_AREA_RATIO * min(areas):
        return []
    sizes = f"{min(areas):.3g} and {max(areas):.3g} pixels"
    return [f"the median cell area varies between {sizes}: the segmentation may be wrong"]


def _views(images: Sequence[tuple[Position, ImageCount]]) -> set[tuple[str | int, str]]:
    """Sites with their crops; images without a site are numbered."""
    return {(n if position.site is None else position.site, position.crop) for n, (position, _) in enumerate(images)}


def replicates(wells: Sequence[Curve]) -> list[Curve]:
    """Curves of the conditions, where known, that have two or more wells on a plate."""
    groups: dict[tuple[str, str], list[Curve]] = defaultdict(list)
    for curve in wells:
        if curve.condition:
            groups[curve.plate, curve.condition].append(curve)
    return [_replicate_curve(members) for members in groups.values() if len(members) > 1]


def _replicate_curve(members: Sequence[Curve]) -> Curve:
    at_time: dict[float, list[Point]] = defaultdict(list)
    for curve in members:
        for point in curve.points:
            at_time[point.hours].append(point)
    points = tuple(_mean_point(hours, at_time[hours]) for hours in sorted(at_time))
    fits = {name: fit.combine([curve.fits[name] for curve in members]) for name in FITTED}
    first = members[0]
    return Curve(first.plate, first.condition, "", tuple(curve.well for curve in members), points, fits)


def _mean_point(hours: float, points: Sequence[Point]) -> Point:
    def value(name: str) -> Value | None:
        return _value([getattr(point, name).mean for point in points if getattr(point, name) is not None])

    sums = [sum(getattr(point, name) for point in points) for name in ("images", "failed", "warnings")]
    parts = sum(point.cells is not None for point in points)
    return Point(hours, sums[0], parts, sums[1], sums[2], *(value(name) for name in MEASURES))
