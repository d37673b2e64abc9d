"""Cell size: the factor that brings an image to the pixel size of the network's training images, and back.

1. `Scale`          of a dataset: the factor of its images, and the size of its training cells; in dataset.json,
                    checkpoints (scale.json) and exported files
2. `resize_frame`   an image on the network's grey levels -> the network's pixel size
3. `resize_mask`    the mask of one annotated cell -> the prepared image
4. `labels_back`    the segmented cells -> the pixels of the original image, with smooth outlines

The centre of pixel i is at i + 0.5 on either grid, so that positions are multiplied by the factor alone, as are the
coordinates of COCO outlines. No Ray, no torch.
"""

import math
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from raylivecell.core.settings import StrictModel
from raylivecell.images.intensity import Frame, Range, trimmed_range

MIN_SCALE, MAX_SCALE = 1 / 16, 16.0
"""Range of factors. A factor outside is a mistake: 1/16 leaves 3 pixels of a cell of 50."""
FAR_DIAMETER = 2.0
"""Warn if the median diameter differs from that of the training cells by more than this factor."""
MIN_CELLS = 10
"""Minimum cells of an image for this warning."""
TOLERANCE = 1.1
"""Diameters of datasets that agree within this factor are equal: the medians of LIVECell's splits agree within 3 %."""
BAND = 2**20
"""Pixels that `labels_back` and `resize_mask` process at once: 40 MB."""


class Scale(StrictModel):
    """Pixel size and cell size of a dataset. Default: images as stored, cells of unknown size."""

    pixel_scale: float = Field(1.0, ge=MIN_SCALE, le=MAX_SCALE)
    """Factor from the original images to the prepared ones: 0.5 halves width and height."""
    diameter: float | None = Field(None, gt=0, le=2**17)
    """Median diameter of the training cells (2 sqrt(area / pi)) in pixels of the prepared images; None: unknown."""
    diameters: Range | None = None
    """Minimum and maximum over the training images of their median diameter, trimmed like `Intensity.backgrounds`."""

    @model_validator(mode="after")
    def _check_finite(self) -> "Scale":
        values = [self.pixel_scale, self.diameter or 1.0, *(self.diameters or ())]
        if not all(math.isfinite(value) and value > 0 for value in values):
            raise ValueError("pixel_scale and diameters must be finite and above 0")
        return self

    def factor(self, diameter: float | None = None) -> float:
        """Factor from an original image to the network's pixels.

        Args:
            diameter: typical diameter of its cells in its own pixels; None: `pixel_scale`.

        Raises:
            ValueError: the training cells' diameter is unknown, or the factor is out of range.
        """
        if diameter is None:
            return self.pixel_scale
        if self.diameter is None:
            raise ValueError(
                "the network was trained by an older version without the size of its cells; leave the diameter out"
            )
        factor = self.diameter / diameter if diameter > 0 else math.inf
        if not MIN_SCALE <= factor <= MAX_SCALE:
            low, high = self.diameter / MAX_SCALE, self.diameter / MIN_SCALE
            raise ValueError(f"give the diameter of the cells in pixels of the image, {low:.2g} to {high:.4g}")
        return factor

    def same_cells(self, other: "Scale") -> bool:
        """Whether the training cells of two datasets have the same size, to within `TOLERANCE`."""
        if self.diameter is None or other.diameter is None:
            return False
        return 1 / TOLERANCE <= self.diameter / other.diameter <= TOLERANCE

    def fits(self, other: "Scale") -> bool:
        """Whether one network suits the images of two datasets: their pixel scale is the same, or their cells' size."""
        return self.pixel_scale == other.pixel_scale or self.same_cells(other)

    def prepare_flag(self, uri: str) -> str:
        """Flag of `prepare` that gives a dataset this scale, which is that of the dataset or network at `uri`."""
        return f"--diameter-from {uri}" if self.diameter else f"--pixel-scale {self.pixel_scale:g}"

    def __str__(self) -> str:
        size = "unknown size" if self.diameter is None else f"{self.diameter:.1f} px"
        return f"cells of {size} at pixel scale {self.pixel_scale:g}"

    def warning(self, areas: NDArray[np.integer[Any]], factor: float) -> tuple[str, ...]:
        """Warn if segmented cells are far larger or smaller than the training cells.

        The training set may be of several cell types: their median diameters are not far.

        Args:
            areas: pixels of each cell, at the network's pixel size.
            factor: from the original image to the network's pixel size; the warning is in original pixels.
        """
        if self.diameter is None or len(areas) < MIN_CELLS:
            return ()
        median = float(np.median(diameter_of(areas)))
        low, high = self.diameters or (self.diameter, self.diameter)
        low, high = min(self.diameter / FAR_DIAMETER, low), max(self.diameter * FAR_DIAMETER, high)
        if low <= median <= high:
            return ()
        details = f"median diameter {median / factor:.1f} px, theirs {self.diameter / factor:.1f}"
        return (f"{CELL_SIZE_WARNING}: {details}",)


UNSCALED = Scale()
"""Images as stored, cells of unknown size."""
CELL_SIZE_WARNING = "cell size far from the training images'"


def diameter_of(area: Any) -> Any:
    """Diameter of a circle with this area."""
    return 2 * np.sqrt(np.asarray(area) / np.pi)


def of_dataset(pixel_scale: float, areas: dict[int, int], medians: Sequence[float]) -> Scale:
    """Compute the scale of a dataset.

    Args:
        pixel_scale: factor of its images.
        areas: number of training cells by area in pixels.
        medians: median diameter of the cells of each training image with cells.
    """
    if not areas or not medians:
        return Scale(pixel_scale=pixel_scale)
    values = np.array(sorted(areas))
    ends = np.cumsum([areas[value] for value in values.tolist()])
    median = values[np.searchsorted(ends, (ends[-1] + 1) / 2)]
    low, high = trimmed_range(medians)
    return Scale(
        pixel_scale=pixel_scale,
        diameter=round(float(diameter_of(median)), 3),
        diameters=(round(low, 3), round(high, 3)),
    )


def areas_of(labels: NDArray[np.integer[Any]], count: int) -> NDArray[np.int64]:
    """Count the pixels of each label 1 to `count` of an image (H, W), int64 (count,), in bounded memory."""
    total = np.zeros(count + 1, np.int64)
    rows = max(1, BAND // labels.shape[1])
    for first in range(0, len(labels), rows):
        total += np.bincount(labels[first : first + rows].ravel(), minlength=count + 1)
    return total[1:]


def scaled_shape(shape: tuple[int, ...], factor: float) -> tuple[int, int]:
    """Height and width of an image of `shape` (H, W) after scaling: rounded, at least 1."""
    return max(1, round(shape[0] * factor)), max(1, round(shape[1] * factor))


def resize_image(image: NDArray[np.uint8], factor: float) -> NDArray[np.uint8]:
    """Scale an image, uint8 (H, W), by a factor: `resize_to`."""
    return resize_to(image, scaled_shape(image.shape, factor))


def resize_to(image: NDArray[np.uint8], shape: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize an image, uint8 (h, w), to `shape` (H, W): averages of areas if smaller, else linear interpolation."""
    if image.shape == shape:
        return image
    # LINEAR_EXACT has the same bits on every processor, as shards need.
    method = cv2.INTER_AREA if shape[0] * shape[1] < image.size else cv2.INTER_LINEAR_EXACT
    return np.asarray(cv2.resize(image, shape[::-1], interpolation=method), np.uint8)


def resize_frame(frame: Frame, factor: float) -> Frame:
    """Scale an image on the network's grey levels, with its padding: pixels of which half is padding."""
    if scaled_shape(frame.levels.shape, factor) == frame.levels.shape:
        return frame
    padding = frame.padding
    if padding is not None:
        padding = resize_image(padding.astype(np.uint8) * 255, factor) >= 128
        padding = padding if padding.any() and not padding.all() else None
    return frame._replace(levels=resize_image(frame.levels, factor), padding=padding)


def resize_mask(
    mask: NDArray[np.bool_], top: int, left: int, size: tuple[int, int], shape: tuple[int, int]
) -> tuple[int, int, NDArray[np.bool_]]:
    """Resize the mask of a cell: pixels of which at least half is inside it, as in `resize_to`.

    An axis is weighted by area if it becomes shorter, else interpolated linearly. All numbers are integers, so that the
    result does not depend on the window or the processor.

    Args:
        mask: bool (h, w), False outside the window too.
        top: first row of the window in the image.
        left: its first column.
        size: (H, W) of the image.
        shape: (H, W) of the resized image.

    Returns:
        (top, left, mask) of a window of the resized image that contains all of the cell; it may be empty.
    """
    if size == shape:
        return top, left, mask
    first, last = _lines(top, mask.shape[0], size[0], shape[0])
    columns = _lines(left, mask.shape[1], size[1], shape[1])
    inside = np.zeros((last - first, columns[1] - columns[0]), np.bool_)
    total = _total(size[0], shape[0]) * _total(size[1], shape[1])
    step = max(1, BAND // max(mask.shape[1], inside.shape[1], 1) // (1 + size[0] // shape[0]))
    for start in range(first, last, step):
        rows = (start, min(start + step, last))
        skipped = max(0, rows[0] * size[0] // shape[0] - 2 - top)
        near = mask[skipped : max(skipped, -(-rows[1] * size[0] // shape[0]) + 2 - top)].astype(np.int64)
        narrow = _resample(near.T, left, columns, size[1], shape[1]).T
        coverage = _resample(narrow, top + skipped, rows, size[0], shape[0])
        inside[rows[0] - first : rows[1] - first] = 2 * coverage >= total
    return first, columns[0], inside


def _lines(start: int, count: int, length: int, new_length: int) -> tuple[int, int]:
    """First and last + 1 line of the resized image to which `count` lines from `start` may contribute."""
    last = -(-(start + count) * new_length // length) + new_length // length + 1
    return max(0, start * new_length // length - new_length // length - 1), min(new_length, last)


def _total(length: int, new_length: int) -> int:
    """Sum of the weights of a line in `_resample`."""
    return length if new_length < length else 2 * new_length


def _resample(
    lines: NDArray[np.int64], start: int, window: tuple[int, int], length: int, new_length: int
) -> NDArray[np.int64]:
    """Resize `length` lines to `new_length`; return those of `window`, with weights of the sum `_total`.

    Args:
        lines: int64 (h, w), the lines from `start`; all others are 0.
        start: index of the first one.
        window: first and last + 1 of the resized lines.
    """
    padded = np.pad(lines, ((1, 1), (0, 0)))

    def at(index: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.clip(index - start + 1, 0, len(padded) - 1)

    if new_length < length:
        line, part = np.divmod(np.arange(window[0], window[1] + 1) * length, new_length)
        before = np.cumsum(padded, axis=0) - padded  # the sum of the lines above each one
        return np.diff(before[at(line)] * new_length + padded[at(line)] * part[:, None], axis=0)
    line, part = np.divmod((2 * np.arange(*window) + 1) * length - new_length, 2 * new_length)
    low, high = at(np.clip(line, 0, length - 1)), at(np.clip(line + 1, 0, length - 1))
    return padded[low] * (2 * new_length - part[:, None]) + padded[high] * part[:, None]


def labels_back(labels: NDArray[Any], shape: tuple[int, int]) -> NDArray[Any]:
    """Bring a label image to another pixel size, with smooth outlines.

    Each pixel's centre is interpolated linearly between the four nearest pixels of `labels`: it belongs to a cell if
    cells have half of the weight, and to the one with the most. Outlines of enlarged cells are smooth, unlike those of
    the nearest neighbour, and touching cells stay in contact without a gap. A cell without a pixel is missing.

    Args:
        labels: integers or bool (h, w), 0 background.
        shape: (H, W) of the result.

    Returns:
        Array of the same dtype.
    """
    if labels.shape == shape:
        return labels
    result = np.empty(shape, labels.dtype)
    left, right, weight_x = _neighbours(labels.shape[1], shape[1])
    tops, bottoms, weights_y = _neighbours(labels.shape[0], shape[0])
    rows_per_band = max(1, BAND // shape[1])
    for first in range(0, shape[0], rows_per_band):
        rows = slice(first, first + rows_per_band)
        top, bottom, weight_y = tops[rows, None], bottoms[rows, None], weights_y[rows, None]
        corners = [labels[y, x] for y in (top, bottom) for x in (left, right)]
        result[rows] = corners[0]
        # Only the pixels at outlines need weights: 5 times faster.
        y, x = np.nonzero((corners[0] != corners[1]) | (corners[0] != corners[2]) | (corners[0] != corners[3]))
        from_bottom, from_right = weight_y[y, 0], weight_x[x]
        weights = [v * h for v in (1 - from_bottom, from_bottom) for h in (1 - from_right, from_right)]
        result[rows][y, x] = _vote([corner[y, x] for corner in corners], weights)
    return result


def _neighbours(length: int, new_length: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Indices of the two nearest pixels of each new pixel along an axis, and the weight of the second one."""
    position = (np.arange(new_length) + 0.5) * (length / new_length) - 0.5
    first = np.floor(position).astype(np.int64)
    weight = (position - first).astype(np.float32)
    return np.clip(first, 0, length - 1), np.clip(first + 1, 0, length - 1), weight


def _vote(corners: Sequence[NDArray[Any]], weights: Sequence[NDArray[np.float32]]) -> NDArray[Any]:
    """Label with the most weight of four, (N,); 0 if cells have less than half of the weight."""
    best = np.zeros(weights[0].shape, np.float32)
    label = np.zeros(weights[0].shape, corners[0].dtype)
    in_cells = sum((corner != 0) * weight for corner, weight in zip(corners, weights))
    for corner in corners:
        total = sum((other == corner) * weight for other, weight in zip(corners, weights))
        better = (corner != 0) & (total > best)
        best[better], label[better] = total[better], corner[better]
    label[in_cells < 0.5] = 0
    return label
