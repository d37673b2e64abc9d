"""Samples as PNG: the image next to its segmentation, coloured by agreement with the ground truth."""

import io
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray
from torch import nn

from raylivecell.data import combined, shards
from raylivecell.data.combined import Data
from raylivecell.network import forward
from raylivecell.reports.overlay import LEGEND, hatch, overlay
from raylivecell.scoring import pixel_scores


def overlays(network: nn.Module, data: Data, split: str, count: int) -> list[tuple[str, bytes]]:
    """Title and PNG (`panel`) of up to `count` evenly spaced images of a split."""
    rows = combined.list_rows(data, split)
    indices = dict.fromkeys(round(i) for i in np.linspace(0, len(rows) - 1, min(count, len(rows))))
    return [picture(network, rows[i]) for i in indices]


def picture(network: nn.Module, row: shards.Row) -> tuple[str, bytes]:
    """Title (file, Dice, IoU) and PNG (`panel`) of one sample."""
    sample = shards.read_row(row, ["file_name", "image", "padding", "foreground", "ignore"])
    prediction = forward.logits_of_picture(network, sample["image"], sample["padding"])[0].cpu().numpy() > 0
    ignored = sample["ignore"]
    counts = pixel_scores.as_counts([pixel_scores.mask_counts(prediction, sample["foreground"], ignored)])
    title = f"{sample['file_name']}   Dice {pixel_scores.dice(counts):.3f}   IoU {pixel_scores.iou(counts):.3f}"
    return title, panel(sample["image"], sample["foreground"], prediction, ignored=ignored)


def panel(
    image: NDArray[Any],
    truth: NDArray[Any],
    prediction: NDArray[Any],
    title: str = "",
    ignored: NDArray[np.bool_] | None = None,
) -> bytes:
    """Draw the image next to its segmentation, with title and legend; PNG at the image's scale.

    Args:
        image: uint8 (H, W).
        truth: (H, W), cell where not 0.
        prediction: (H, W), cell where not 0.
        title: one line; empty if the page shows it.
        ignored: bool (H, W), the ignore region, which is hatched; None: the image is completely annotated.
    """
    height, width = image.shape
    panel_width = max(width, 320)  # space for title and legend
    gap, head, foot = 10, 34 if title else 0, 34
    total_w, total_h = 2 * panel_width + gap, head + height + foot
    figure = Figure(figsize=(total_w / 100, total_h / 100), dpi=100)
    agreement = overlay(image, truth, prediction if ignored is None else np.where(ignored, 0, prediction))
    if ignored is not None:
        hatch(agreement, ignored)
    for left, pixels in ((0, np.dstack([image] * 3)), (panel_width + gap, agreement)):
        axes = figure.add_axes((left / total_w, foot / total_h, width / total_w, height / total_h))
        axes.imshow(pixels, interpolation="nearest", aspect="auto")
        axes.axis("off")
    figure.text(6 / total_w, 1 - 11 / total_h, title, va="top", fontsize=11)
    patches = [Patch(color=tuple(np.array(colour) / 255), label=text) for text, colour in LEGEND]
    figure.legend(handles=patches, loc="lower left", ncols=3, frameon=False, fontsize=9, bbox_to_anchor=(0, 0))
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
