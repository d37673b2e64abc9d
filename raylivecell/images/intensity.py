"""Intensity rule: the map from stored images (uint8 or uint16) to the network's 8-bit scale, shared by all commands.

1. `choose`    computes the rule of a dataset, from robust statistics of its training images; `prepare` stores it in
               dataset.json
2. `to_uint8`  applies a rule: image -> grey levels 0 to 255, padding, warnings

Kinds of rules (`Intensity.rule`):

    robust      One map for all images. 8 bits as stored; 16 bits by their bit depth, or stretched to the range of the
                training images if they use few levels. An image whose background is outside the range of the training
                images is first multiplied so that it has the dataset's background, with a warning.
    as_is       As robust, but no image is stretched or multiplied: the map depends on the bit depth only.
    percentile  Each image by its own statistics, which makes images of different microscopes comparable: its
                background maps to 128, and 80 levels are the difference of its 99.8th and 1st percentile.

Checkpoints (intensity.json) and exported files contain the rule; `predict`, `evaluate`, ONNX and the Python API apply
it. No Ray, no torch.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from raylivecell.core.settings import StrictModel
from raylivecell.images.grey_levels import Grey, Measures, measure, padding_mask

Range = tuple[float, float]
Kind = Literal["as_is", "robust", "percentile"]

LIVECELL_SPREAD, LIVECELL_SCALE = 60.0, 5.0
"""Difference of LIVECell's 99th and 1st percentile in grey levels, median over images; the scale that trains best."""
MIN_LEVELS = 64
"""A 16-bit dataset keeps the scale of its bit depth if its pixels use this many of 256 levels, or is stretched."""
MAX_GAIN = 4.0
"""An image is unusable if it must be multiplied or divided by more."""
MIN_CONTRAST = 4.0
"""An image that must be multiplied is unusable if its spread is below 1/4 of the training images' minimum."""
FAR_SPREAD, FAR_FOREGROUND = 2.0, 0.3
"""Warn if the spread is outside the training range by this factor, or the foreground fraction by this difference."""
PERCENTILE_BACKGROUND, PERCENTILE_LEVELS = 128.0, 80.0
"""Rule `percentile`: levels of the background, and of the difference between the 99.8th and 1st percentile. LIVECell's
images have 128 and, at the median, 80: they are changed little, and the network's zero and scale fit."""
MIN_STORED_LEVELS = 8
"""Rule `percentile`: an image is unusable if fewer stored grey levels are between these percentiles, because its noise
would be amplified to the contrast of cells. An empty LIVECell image has about 6."""


class Intensity(StrictModel):
    """Rule of a dataset, and the range of its training images, in stored grey levels. Default: LIVECell."""

    rule: Kind = "robust"
    """`robust`, `as_is`: `low` maps to 0 and `high` to 256, rounded down, clipped to 255. `percentile`: `background`
    and `spread` are levels, to which each image's background and percentiles map; `depth`, `low`, `high` and the ranges
    except `foreground` are not used."""
    depth: Literal[8, 16] = 8
    """Bits of the dataset's files; images of the other depth are first multiplied to have the dataset's background."""
    low: float = Field(0.0, ge=0, le=2**17)
    high: float = Field(256.0, ge=1, le=2**17)
    background: float = Field(128.0, ge=0, le=2**16)
    """Median over the training images."""
    backgrounds: Range = (0.0, 65535.0)
    """Minimum and maximum."""
    medians: Range = (0.0, 65535.0)
    """Minimum and maximum of the image medians."""
    spread: float = Field(LIVECELL_SPREAD, ge=0, le=2**16)
    """Difference of the 99th and 1st percentile, median over the training images."""
    spreads: Range = (0.0, 65535.0)
    """Minimum and maximum."""
    foreground: Range = (0.0, 1.0)
    """Minimum and maximum fraction of an image's pixels in cells."""

    @field_validator("rule", mode="before")
    @classmethod
    def _rename(cls, rule: object) -> object:
        """Files written before there were several kinds have `linear`, which is `robust`."""
        return "robust" if rule == "linear" else rule

    @model_validator(mode="after")
    def _check_range(self) -> "Intensity":
        values = [self.low, self.high, self.background, self.spread]
        values += [*self.backgrounds, *self.medians, *self.spreads, *self.foreground]
        if not all(math.isfinite(value) for value in values) or self.high - self.low < 1:
            raise ValueError("high must exceed low by 1 or more, and all values must be finite")
        if self.rule == "percentile" and not (
            (self.depth, self.low, self.high) == (8, 0.0, 256.0) and self.background <= 255 and self.spread >= 1
        ):
            raise ValueError("percentile needs depth 8, low 0, high 256, background up to 255 and spread of 1 or more")
        return self

    def same_levels(self, other: "Intensity") -> bool:
        """Whether two rules map an image that is usual for both datasets to the same levels, with the same zero."""
        return all(
            getattr(self, name) == getattr(other, name) for name in ("rule", "depth", "low", "high", "background_level")
        )

    @property
    def unit(self) -> float:
        """Stored grey levels per level of the 8-bit scale."""
        return (self.high - self.low) / 256

    @property
    def background_level(self) -> int:
        """Background on the 8-bit scale: the zero of the network input."""
        # Rounding down lowers continuous values by half a level, shifted 8-bit values not at all: use a quarter.
        rounding = 0.25 if self.depth == 16 else 0.0
        return min(255, max(0, round((self.background - self.low) / self.unit - rounding)))

    @property
    def scale(self) -> float:
        """Levels around the background in which the network input is about linear: 5 for LIVECell.

        Proportional to the spread, rounded to a power of two, so that datasets like LIVECell get the same value.
        """
        steps = round(math.log2(max(self.spread / self.unit, 1.0) / LIVECELL_SPREAD))
        return LIVECELL_SCALE * 2.0 ** min(3, max(-2, steps))

    @property
    def by_background(self) -> bool:
        """Whether the background measures the exposure: false for bright cells on a dark background."""
        return self.background >= self.spread / 2

    @property
    def as_stored(self) -> bool:
        """Whether 8-bit images within the range are used unchanged."""
        return self.rule != "percentile" and (self.depth, self.low, self.high) == (8, 0.0, 256.0)

    def on_levels(self) -> "Intensity":
        """Return the same ranges for images already on the 8-bit scale."""

        def level(value: float) -> float:
            return max(0.0, (value - self.low) / self.unit)

        return Intensity(
            rule=self.rule,
            background=level(self.background),
            backgrounds=(level(self.backgrounds[0]), level(self.backgrounds[1])),
            medians=(level(self.medians[0]), level(self.medians[1])),
            spread=self.spread / self.unit,
            spreads=(self.spreads[0] / self.unit, self.spreads[1] / self.unit),
            foreground=self.foreground,
        )


LIVECELL = Intensity()
"""LIVECell's rule, with a range that contains every image."""


class Frame(NamedTuple):
    """An image on the network's 8-bit scale."""

    levels: NDArray[np.uint8]
    """(H, W); padding is filled with the background level."""
    padding: NDArray[np.bool_] | None = None
    """(H, W), True in padding; None without padding."""
    gain: float = 1.0
    """Factor applied to the stored values before the rule."""
    usable: bool = True
    """False for failed exposures, which are segmented as empty."""
    warnings: tuple[str, ...] = ()
    """Each `KIND: DETAILS`."""

    @property
    def own_pixels(self) -> int:
        """Number of pixels outside padding."""
        return self.levels.size - (0 if self.padding is None else int(self.padding.sum()))


class Fit(NamedTuple):
    """How a rule applies to an image; fields as in `Frame`."""

    gain: float
    usable: bool
    warnings: tuple[str, ...]


def conversion(prepared: Intensity, target: Intensity) -> Intensity | None:
    """Return the rule that converts images prepared by one rule to the scale of another; None if the rules are equal.

    Raises:
        ValueError: prepared from 16-bit images by another map, or by percentiles, so that the stored values are lost.
    """
    if prepared.model_dump(exclude={"foreground"}) == target.model_dump(exclude={"foreground"}):
        return None
    if prepared.rule == "percentile":
        raise ValueError("its images were scaled by their own percentiles")
    if prepared.as_stored:
        return target
    maps = [(rule.depth, rule.low, rule.high) for rule in (prepared, target)]
    if maps[0] == maps[1] and target.rule != "percentile":
        return target.on_levels()
    raise ValueError("its 16-bit images were converted to 8 bits by another map")


def choose(images: Sequence[Measures], kind: Kind = "robust") -> Intensity:
    """Compute the rule of a dataset from the measures of its training images, each with the same weight.

    Outliers have no influence: images whose background is over 1.5 times the median, or under 1/1.5 of it, are ignored,
    then ranges are trimmed (`trimmed_range`). For a dataset of both bit depths, the rule has the more frequent one.
    """
    if kind == "percentile":
        return Intensity(rule="percentile", background=PERCENTILE_BACKGROUND, spread=PERCENTILE_LEVELS)
    usable = [image for image in images if not image.fault]
    deep = [image for image in usable if image.depth == 16]
    majority = deep if 2 * len(deep) > len(usable) else [image for image in usable if image.depth == 8]
    if not majority:
        return Intensity(rule=kind)
    majority = _without_outliers(majority)
    low, high = _map_range(majority, kind == "robust") if majority[0].depth == 16 else (0.0, 256.0)
    return Intensity(
        rule=kind,
        depth=16 if majority[0].depth == 16 else 8,
        low=low,
        high=high,
        background=float(np.median([image.background for image in majority])),
        backgrounds=trimmed_range([image.background for image in majority]),
        medians=trimmed_range([image.median for image in majority]),
        spread=float(np.median([image.spread for image in majority])),
        spreads=trimmed_range([image.spread for image in majority]),
    )


def trimmed_range(values: Sequence[float]) -> Range:
    """Minimum and maximum of `values`; with five or more values, without 2.5 % (at least one) at each end."""
    ordered = sorted(values)
    trim = max(1, len(ordered) // 40) if len(ordered) >= 5 else 0
    return float(ordered[trim]), float(ordered[-1 - trim])


def _without_outliers(images: list[Measures]) -> list[Measures]:
    median = float(np.median([image.background for image in images]))
    if median < float(np.median([image.spread for image in images])) / 2:
        return images  # ratios of a dark background are meaningless
    return [image for image in images if median / 1.5 <= image.background <= median * 1.5] or images


def _map_range(images: Sequence[Measures], stretch: bool) -> Range:
    """Return the stored values that map to 0 and 256, for 16-bit images.

    If the pixels use enough levels of their bit depth (a power of two above the 99.9th percentile), it is
    the scale, which restores 8-bit data stored as 257 x or shifted exactly. Otherwise the scale extends the used range
    by half at both ends, if `stretch`.
    """
    first, last = trimmed_range([image.low for image in images])[0], trimmed_range([image.high for image in images])[1]
    used = max(last - first, 1.0)
    bits = min(16, max(8, int(last + used / 16).bit_length()))
    if not stretch or used * 256 / 2**bits >= MIN_LEVELS:
        return 0.0, float(2**bits)
    return max(0.0, first - used / 2), max(last + used / 2, first + 64)


def fit(image: Measures, rule: Intensity) -> Fit:
    """Determine how an image with these measures is mapped by a rule."""
    padding = (f"padding: {100 * image.padding:.0f} % of the image is ignored",) if image.padding else ()
    if image.fault:
        return Fit(1.0, False, (f"unusable image: {image.fault}", *padding))
    if rule.rule == "percentile":
        if image.contrast < MIN_STORED_LEVELS:
            problem = f"almost no contrast: {image.contrast:g} grey levels from the 1st to the 99.8th percentile"
            return Fit(1.0, False, (f"unusable image: {problem}", *padding))
        return Fit(1.0, True, padding)
    gain = _gain(image, rule)
    if gain != 1.0 and (problem := _unusable(image, gain, rule)):
        return Fit(1.0, False, (f"unusable image: {problem}", *padding))
    return Fit(gain, True, (*_warnings(image, gain, rule), *padding))


def _gain(image: Measures, rule: Intensity) -> float:
    """Return 1 for images in range, otherwise the factor to the dataset's background, if possible a power of two.

    With `as_is` only an image of another bit depth is multiplied, by a power of two.
    """
    same_depth = image.depth == rule.depth
    if rule.rule == "as_is" and same_depth:
        return 1.0
    if not rule.by_background:
        # Exposure cannot be distinguished from cells: only another bit depth is corrected, by the spread.
        return 1.0 if same_depth else _power_of_two(rule.spread / max(image.spread, 1.0))
    if same_depth and _inside(image, 1.0, rule):
        return 1.0
    ratio = rule.background / max(image.background, 0.01)
    power = _power_of_two(ratio)
    if rule.rule == "as_is":
        return power
    return power if (not same_depth or image.depth == 16) and _inside(image, power, rule) else ratio


def _power_of_two(ratio: float) -> float:
    return 2.0 ** round(math.log2(max(ratio, 2.0**-17)))


def _inside(image: Measures, gain: float, rule: Intensity) -> bool:
    """Return whether background or median, times `gain`, is in the training range, plus the network's linear range.

    Either suffices: in a confluent layer the median is the grey level of cells, and the most uniform blocks may be a
    dark corner. An image that is darker everywhere has both outside.
    """
    margin = rule.scale * rule.unit
    pairs = ((image.background, rule.backgrounds), (image.median, rule.medians))
    return any(low - margin <= value * gain <= high + margin for value, (low, high) in pairs)


def _unusable(image: Measures, gain: float, rule: Intensity) -> str:
    """Return why an image that must be multiplied by `gain` is unusable; empty if it is usable."""
    if image.spread * gain * MIN_CONTRAST < rule.spreads[0]:
        return f"almost no contrast: spread {image.spread:g}, background {image.background:g}"
    other_bit_depth = _power_of_two(gain) == gain and image.depth == 16
    if image.depth == rule.depth and not other_bit_depth and not 1 / MAX_GAIN <= gain <= MAX_GAIN:
        return f"background {image.background:g} is {_times(gain)} away from the training images'"
    if gain / rule.unit > MAX_GAIN:
        return f"background {image.background:g} of a {image.depth}-bit file is almost black"
    return ""


def _warnings(image: Measures, gain: float, rule: Intensity) -> tuple[str, ...]:
    """Warn about a usable image whose background or spread is far from the training images'."""
    warnings = []
    (low, high), background = rule.backgrounds, f"background {image.background:g}"
    if gain != 1.0 and (image.depth == rule.depth or _power_of_two(gain) != gain):
        expected = f"training images have {low:g} to {high:g} ({rule.depth} bit)"
        warnings.append(f"scaled to the background of the training images: {background}, {expected}, {_times(gain)}")
    elif (gain == 1.0 or rule.rule == "as_is") and not _inside(image, gain, rule):
        warnings.append(f"background far from the training images': {background}, theirs {low:g} to {high:g}")
    spread, (low, high) = image.spread * gain, rule.spreads
    if not low / FAR_SPREAD <= spread <= high * FAR_SPREAD:
        warnings.append(f"spread far from the training images': {spread:g}, theirs {low:g} to {high:g}")
    return tuple(warnings)


def _times(gain: float) -> str:
    return f"x {gain:.3g}" if gain >= 1 else f"/ {1 / gain:.3g}"


def foreground_warning(fraction: float, rule: Intensity) -> tuple[str, ...]:
    """Warn if the segmented foreground fraction is far from the training images'."""
    low, high = rule.foreground
    if low - FAR_FOREGROUND <= fraction <= high + FAR_FOREGROUND:
        return ()
    return (f"foreground far from the training images': {fraction:.2f}, theirs {low:.2f} to {high:.2f}",)


def to_uint8(pixels: Grey, rule: Intensity, padding: NDArray[np.bool_] | None = None) -> Frame:
    """Map a stored image to the network's 8-bit scale; no other function does.

    Args:
        pixels: uint8 or uint16 (H, W), not modified; the result may share its memory.
        rule: rule of the dataset.
        padding: `padding_mask` of the image; computed by default.
    """
    pixels = np.ascontiguousarray(pixels)
    padding = padding_mask(pixels) if padding is None else padding
    image = measure(pixels, padding)
    image_fit = fit(image, rule)

    def apply_rule(values: Grey) -> NDArray[np.uint8]:
        return (
            _by_percentiles(values, rule, image) if rule.rule == "percentile" else apply(values, rule, image_fit.gain)
        )

    levels = apply_rule(pixels)
    if padding is not None:
        centre = np.array([[round(image.background)]], pixels.dtype)
        levels = np.where(padding, apply_rule(centre)[0, 0], levels)
    return Frame(levels, padding, image_fit.gain, image_fit.usable, image_fit.warnings)


def apply(pixels: Grey, rule: Intensity, gain: float = 1.0) -> NDArray[np.uint8]:
    """Map stored pixels times `gain` by `robust` or `as_is`; 8-bit pixels of an 8-bit dataset are unchanged."""
    if rule.rule == "percentile":
        raise ValueError("percentile depends on the image; call to_uint8")
    if gain == 1.0 and rule.as_stored and pixels.dtype == np.uint8:
        return pixels.astype(np.uint8, copy=False)
    # The centre of each stored value, rounded down: 257 x and shifted 8-bit values are restored exactly.
    centres = (np.arange(2 ** (8 * pixels.dtype.itemsize)) + 0.5) * gain
    return _look_up(np.floor((centres - rule.low) / rule.unit), pixels)


def _by_percentiles(pixels: Grey, rule: Intensity, image: Measures) -> NDArray[np.uint8]:
    """Map stored pixels of an image with these measures by `percentile`, rounded to the nearest level."""
    values = np.arange(2 ** (8 * pixels.dtype.itemsize)) - image.background
    return _look_up(np.rint(rule.background + values * (rule.spread / max(image.contrast, 1.0))), pixels)


def _look_up(levels: NDArray[np.float64], pixels: Grey) -> NDArray[np.uint8]:
    """Look up each pixel in `levels`, indexed by stored value and clipped to 0 to 255."""
    result: NDArray[np.uint8] = np.take(np.clip(levels, 0, 255).astype(np.uint8), pixels)
    return result
