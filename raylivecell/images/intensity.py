"""How a stored image (uint8 or uint16) becomes the network's 8-bit scale: the one rule, for every command.

1. `choose`    the rule of a set, from robust statistics of its training images: `prepare` stores it in dataset.json
2. `to_uint8`  an image -> grey levels 0 to 255, by the rule; its padding; what is unusual about it

Checkpoints (intensity.json) and exported files carry the rule; `predict`, `evaluate`, ONNX and the Python API apply it.
An image inside the range of the training images is mapped by the rule alone. One whose background is outside is
multiplied first, so that it has the set's background, and a warning says so. No Ray, no torch.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from raylivecell.core.settings import StrictModel
from raylivecell.images.grey_levels import Grey, Measures, measure, padding_mask

Range = tuple[float, float]

LIVECELL_SPREAD, LIVECELL_SCALE = 60.0, 5.0
"""Grey levels between LIVECell's 1st and 99th percentile, median over images; the scale at which it is learnt best."""
MIN_LEVELS = 64
"""A 16-bit set keeps its bit depth's own scale if its pixels use so many of the 256 levels; else it is stretched."""
MAX_GAIN = 4.0
"""An image that must be multiplied by more, or divided by more, holds no usable picture."""
MIN_CONTRAST = 4.0
"""Nor does one that must be multiplied and then has under a quarter of the least spread of the training images."""
FAR_SPREAD, FAR_SHARE = 2.0, 0.3
"""A warning is given where the spread is outside the training images' by this factor, the foreground share by this."""


class Intensity(StrictModel):
    """The rule of a set, and the range of its training images; grey values are stored ones. Default: LIVECell's."""

    rule: Literal["linear"] = "linear"
    """`linear`: from `low` (level 0) to `high` (over level 255), rounded down, clipped."""
    depth: Literal[8, 16] = 8
    """Bits of the set's files; images of the other depth are first multiplied to have the set's background."""
    low: float = Field(0.0, ge=0, le=2**17)
    high: float = Field(256.0, ge=1, le=2**17)
    background: float = Field(128.0, ge=0, le=2**16)
    """Median over the training images."""
    backgrounds: Range = (0.0, 65535.0)
    """Least and largest."""
    medians: Range = (0.0, 65535.0)
    """Of the images' medians."""
    spread: float = Field(LIVECELL_SPREAD, ge=0, le=2**16)
    """From the 1st to the 99th percentile, median over the training images."""
    spreads: Range = (0.0, 65535.0)
    """Least and largest."""
    foreground: Range = (0.0, 1.0)
    """Least and largest share of an image's pixels in cells."""

    @model_validator(mode="after")
    def _finite(self) -> "Intensity":
        values = [self.low, self.high, self.background, self.spread]
        values += [*self.backgrounds, *self.medians, *self.spreads, *self.foreground]
        if not all(math.isfinite(value) for value in values) or self.high - self.low < 1:
            raise ValueError("low and high must be 1 apart, and all values finite")
        return self

    @property
    def unit(self) -> float:
        """Stored grey values per level."""
        return (self.high - self.low) / 256

    @property
    def background_level(self) -> int:
        """The background on the 8-bit scale: the network's zero."""
        # Rounding down costs continuous values half a level and shifted 8-bit values none: a quarter fits both.
        lost = 0.25 if self.depth == 16 else 0.0
        return min(255, max(0, round((self.background - self.low) / self.unit - lost)))

    @property
    def scale(self) -> float:
        """Levels from the background over which the network's input is about linear: 5 for LIVECell.

        It follows the spread in steps of two, so that sets like LIVECell share LIVECell's own.
        """
        steps = round(math.log2(max(self.spread / self.unit, 1.0) / LIVECELL_SPREAD))
        return LIVECELL_SCALE * 2.0 ** min(3, max(-2, steps))

    @property
    def by_background(self) -> bool:
        """Whether the background tells the exposure: not where cells are bright on a dark ground."""
        return self.background >= self.spread / 2

    @property
    def as_stored(self) -> bool:
        """Whether 8-bit images inside the range are taken as they are."""
        return (self.depth, self.low, self.high) == (8, 0.0, 256.0)

    def on_levels(self) -> "Intensity":
        """The same ranges for images that are on the 8-bit scale already."""

        def level(value: float) -> float:
            return max(0.0, (value - self.low) / self.unit)

        return Intensity(
            background=level(self.background),
            backgrounds=(level(self.backgrounds[0]), level(self.backgrounds[1])),
            medians=(level(self.medians[0]), level(self.medians[1])),
            spread=self.spread / self.unit,
            spreads=(self.spreads[0] / self.unit, self.spreads[1] / self.unit),
            foreground=self.foreground,
        )


LIVECELL = Intensity()
"""LIVECell's rule, with a range that every image is in."""


class Frame(NamedTuple):
    """An image on the network's scale."""

    levels: NDArray[np.uint8]
    """(H, W); padding has the background's level."""
    padding: NDArray[np.bool_] | None = None
    """(H, W), where the frame is padding; None: nowhere."""
    gain: float = 1.0
    """Factor of the stored values before the rule was applied."""
    usable: bool = True
    """Whether the file holds a picture: else it has no cell."""
    warnings: tuple[str, ...] = ()
    """What is unusual: a kind, a colon, and the figures."""

    @property
    def own_pixels(self) -> int:
        """Pixels that are not padding."""
        return self.levels.size - (0 if self.padding is None else int(self.padding.sum()))


class Fit(NamedTuple):
    """How an image fits a rule."""

    gain: float
    usable: bool
    warnings: tuple[str, ...]


def between(prepared: Intensity, wanted: Intensity) -> Intensity | None:
    """The rule that brings images prepared by one rule to the scale of another; None: they are on it.

    Raises:
        ValueError: prepared from 16-bit images by another map, so that the stored values are lost.
    """
    if prepared.model_dump(exclude={"foreground"}) == wanted.model_dump(exclude={"foreground"}):
        return None
    if prepared.as_stored:
        return wanted
    ends = [(rule.depth, rule.low, rule.high) for rule in (prepared, wanted)]
    if ends[0] == ends[1]:
        return wanted.on_levels()
    raise ValueError("its 16-bit images were brought to 8 bits in another way")


def choose(images: Sequence[Measures]) -> Intensity:
    """The rule of a set from its training images' measures, each image with the same weight.

    Extreme images move nothing: the fifth to the next are left out at both ends of a range from five images on, and
    before that those whose background is over 1.5 times the set's, or under 1 / 1.5. A set of both depths takes the
    depth of most of its images.
    """
    pictures = [one for one in images if not one.fault]
    deep = [one for one in pictures if one.depth == 16]
    mine = deep if 2 * len(deep) > len(pictures) else [one for one in pictures if one.depth == 8]
    if not mine:
        return LIVECELL
    mine = _without_odd(mine)
    low, high = _ends(mine) if mine[0].depth == 16 else (0.0, 256.0)
    return Intensity(
        depth=16 if mine[0].depth == 16 else 8,
        low=low,
        high=high,
        background=float(np.median([one.background for one in mine])),
        backgrounds=trimmed_range([one.background for one in mine]),
        medians=trimmed_range([one.median for one in mine]),
        spread=float(np.median([one.spread for one in mine])),
        spreads=trimmed_range([one.spread for one in mine]),
    )


def trimmed_range(values: Sequence[float]) -> Range:
    """Least and largest of `values`, from five values on without the extreme 2.5 % (at least one) at each end."""
    ordered = sorted(values)
    cut = max(1, len(ordered) // 40) if len(ordered) >= 5 else 0
    return float(ordered[cut]), float(ordered[-1 - cut])


def _without_odd(images: list[Measures]) -> list[Measures]:
    middle = float(np.median([one.background for one in images]))
    if middle < float(np.median([one.spread for one in images])) / 2:
        return images  # on a dark ground the background's ratio says nothing
    return [one for one in images if middle / 1.5 <= one.background <= middle * 1.5] or images


def _ends(images: Sequence[Measures]) -> Range:
    """Stored values of level 0 and of the level after 255, of 16-bit images.

    Where the pixels use enough levels of their bit depth (a power of two over the 99.9th percentile), that is the
    scale: 8-bit data stored as 257 x or shifted come back exactly. Else half their range is left free at both ends.
    """
    first, last = trimmed_range([one.low for one in images])[0], trimmed_range([one.high for one in images])[1]
    used = max(last - first, 1.0)
    bits = min(16, max(8, int(last + used / 16).bit_length()))
    if used * 256 / 2**bits >= MIN_LEVELS:
        return 0.0, float(2**bits)
    return max(0.0, first - used / 2), max(last + used / 2, first + 64)


def fit(image: Measures, rule: Intensity) -> Fit:
    """How an image with these measures is brought to the rule's scale."""
    padded = (f"padding: {100 * image.padding:.0f} % of the frame is left out",) if image.padding else ()
    if image.fault:
        return Fit(1.0, False, (f"no usable picture: {image.fault}", *padded))
    gain = _gain(image, rule)
    if gain != 1.0 and (problem := _unusable(image, gain, rule)):
        return Fit(1.0, False, (f"no usable picture: {problem}", *padded))
    return Fit(gain, True, (*_remarks(image, gain, rule), *padded))


def _gain(image: Measures, rule: Intensity) -> float:
    """1 for an image inside the range; else what gives it the set's background, a power of two where that will do."""
    same = image.depth == rule.depth
    if not rule.by_background:
        # Exposure cannot be told from cells: only another bit depth is corrected, by the spread.
        return 1.0 if same else _power_of_two(rule.spread / max(image.spread, 1.0))
    if same and _inside(image, 1.0, rule):
        return 1.0
    ratio = rule.background / max(image.background, 0.01)
    power = _power_of_two(ratio)
    return power if (not same or image.depth == 16) and _inside(image, power, rule) else ratio


def _power_of_two(ratio: float) -> float:
    return 2.0 ** round(math.log2(max(ratio, 2.0**-17)))


def _inside(image: Measures, gain: float, rule: Intensity) -> bool:
    """Whether background or median, times `gain`, is the training images', to within the network's linear range.

    Either will do: in a sheet of cells the median is the cells' level, and the calmest blocks may be a dark corner. A
    frame that is darker as a whole has both outside.
    """
    margin = rule.scale * rule.unit
    pairs = ((image.background, rule.backgrounds), (image.median, rule.medians))
    return any(least - margin <= value * gain <= most + margin for value, (least, most) in pairs)


def _unusable(image: Measures, gain: float, rule: Intensity) -> str:
    """Why an image that must be multiplied by `gain` is no picture; empty where it is one."""
    if image.spread * gain * MIN_CONTRAST < rule.spreads[0]:
        return f"almost no contrast: spread {image.spread:g}, background {image.background:g}"
    bit_depth = _power_of_two(gain) == gain and image.depth == 16
    if image.depth == rule.depth and not bit_depth and not 1 / MAX_GAIN <= gain <= MAX_GAIN:
        return f"background {image.background:g} is {_times(gain)} away from the training images'"
    if gain / rule.unit > MAX_GAIN:
        return f"background {image.background:g} of a {image.depth}-bit file is almost black"
    return ""


def _remarks(image: Measures, gain: float, rule: Intensity) -> tuple[str, ...]:
    """Warnings of a usable image: its background or spread is far from the training images'."""
    remarks = []
    wanted, given = rule.backgrounds, f"background {image.background:g}"
    if gain != 1.0 and (image.depth == rule.depth or _power_of_two(gain) != gain):
        theirs = f"training images have {wanted[0]:g} to {wanted[1]:g} ({rule.depth} bit)"
        remarks.append(f"scaled to the background of the training images: {given}, {theirs}, {_times(gain)}")
    elif gain == 1.0 and not _inside(image, 1.0, rule):
        remarks.append(f"background far from the training images': {given}, theirs {wanted[0]:g} to {wanted[1]:g}")
    spread, (least, most) = image.spread * gain, rule.spreads
    if not least / FAR_SPREAD <= spread <= most * FAR_SPREAD:
        remarks.append(f"spread far from the training images': {spread:g}, theirs {least:g} to {most:g}")
    return tuple(remarks)


def _times(gain: float) -> str:
    return f"x {gain:.3g}" if gain >= 1 else f"/ {1 / gain:.3g}"


def share_warning(share: float, rule: Intensity) -> tuple[str, ...]:
    """A warning where the foreground found, as a share 0 to 1, is far from the training images'."""
    least, most = rule.foreground
    if least - FAR_SHARE <= share <= most + FAR_SHARE:
        return ()
    return (f"foreground far from the training images': {share:.2f}, theirs {least:.2f} to {most:.2f}",)


def to_uint8(pixels: Grey, rule: Intensity, padding: NDArray[np.bool_] | None = None) -> Frame:
    """Bring a stored image to the network's scale: the one function that does.

    Args:
        pixels: uint8 or uint16 (H, W), never written; levels may share its memory.
        rule: the set's.
        padding: where the frame is padding, if known; default: found here.
    """
    pixels = np.ascontiguousarray(pixels)
    padding = padding_mask(pixels) if padding is None else padding
    image = measure(pixels, padding)
    found = fit(image, rule)
    levels = apply(pixels, rule, found.gain)
    if padding is not None:
        centre = np.array([[round(image.background)]], pixels.dtype)
        levels = np.where(padding, apply(centre, rule, found.gain)[0, 0], levels)
    return Frame(levels, padding, found.gain, found.usable, found.warnings)


def apply(pixels: Grey, rule: Intensity, gain: float = 1.0) -> NDArray[np.uint8]:
    """Grey levels of stored pixels times `gain`; 8-bit pixels of an 8-bit set come back as they are."""
    if gain == 1.0 and rule.as_stored and pixels.dtype == np.uint8:
        return pixels.astype(np.uint8, copy=False)
    # The middle of each stored value, rounded down: 257 x and shifted 8-bit values come back exactly.
    centres = (np.arange(2 ** (8 * pixels.dtype.itemsize)) + 0.5) * gain
    table = np.clip(np.floor((centres - rule.low) / rule.unit), 0, 255).astype(np.uint8)
    levels: NDArray[np.uint8] = np.take(table, pixels)
    return levels
