"""All scores of one image, by pixels and by cells, and of many images, with intervals.

Pixel counts are summed over images, ratios computed last (pixel_scores). mSA and similar scores are computed per image
and averaged (instance_scores). AP and the false-negative ratio follow LIVECell's COCO protocol, over all cells of all
images (average_precision). Each is given for all images, for each cell type, and as the mean over types (`macro`), in
which a type of few images has the same weight as one of many.

True cells that overlap become a label image by two rules (label_rules). All scores are by the dataset's rule, except
those whose name ends in `_torch_em`, which are comparable with published figures. Pixel scores hardly depend on the
rule, AP not at all, since it uses complete cells.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from raylivecell.annotations.rle import Rle, encode
from raylivecell.scoring import average_precision, bootstrap, instance_scores, label_rules, pixel_scores
from raylivecell.scoring.average_precision import Matches

TORCH_EM = {name: f"{name}_torch_em" for name in ("msa", "sa50", "sa75", "true_cells")}
"""Score -> name of the same score by torch-em's rule, `label_rules.larger_on_top`."""
COUNTS = ("cells", "true_cells", TORCH_EM["true_cells"])
# Averaged over images; for ERRORS the absolute values.
MEANS = ("msa", "sa50", "sa75", "pq", TORCH_EM["msa"], TORCH_EM["sa50"], TORCH_EM["sa75"])
ERRORS = ("count_error", "confluence_error")


class Prediction(NamedTuple):
    """Prediction for an image (H, W)."""

    foreground: NDArray[np.bool_]
    labels: NDArray[np.integer[Any]]
    """0 background; disjoint."""
    rles: Sequence[Rle]
    """Cells as COCO masks, which may overlap."""
    scores: NDArray[np.float64]
    """Score of each of `rles`, by which they are ranked."""


class GroundTruth(NamedTuple):
    """Ground truth of an image (H, W)."""

    labels: NDArray[np.integer[Any]]
    """0 background; disjoint: a pixel of overlapping cells belongs to the smaller one."""
    rles: Sequence[Rle]
    """Complete cells, which may overlap."""
    ignored: NDArray[np.bool_] | None = None
    """(H, W): the ignore region, without pixels of `rles`; None: the image is completely annotated."""


def of_image(prediction: Prediction, truth: GroundTruth) -> tuple[dict[str, Any], Matches]:
    """Scores of one image.

    Returns:
        Pixel counts, `dice`, `iou`, `instance_scores`, and the scores of TORCH_EM; and the matches for
        `average_precision`.
    """
    counts = pixel_scores.mask_counts(prediction.foreground, truth.labels, truth.ignored)
    pixels = [counts[name] for name in pixel_scores.COUNTS]
    row = {**counts, "dice": pixel_scores.dice(pixels), "iou": pixel_scores.iou(pixels)}
    row |= instance_scores.instance_scores(prediction.labels, truth.labels, truth.ignored)
    height, width = truth.labels.shape
    other_labels = label_rules.larger_on_top(truth.rles, (height, width))
    other = instance_scores.instance_scores(prediction.labels, other_labels, truth.ignored)
    row |= {name: other[score] for score, name in TORCH_EM.items()}
    region = None if truth.ignored is None or not truth.ignored.any() else encode(truth.ignored.astype(np.uint8))[0]
    return row, average_precision.match(prediction.rles, prediction.scores, truth.rles, region)


def score(
    labels: NDArray[np.integer[Any]], truth: NDArray[np.integer[Any]], ignored: NDArray[np.bool_] | None = None
) -> dict[str, float]:
    """Scores of one label image against another, both integer (H, W), 0 background.

    Args:
        labels: predicted cells.
        truth: true cells.
        ignored: bool (H, W), the pixels without annotation; those of true cells are counted nevertheless.

    Returns:
        `dice` and `iou` of the pixels in cells, `msa`, `sa50`, `sa75`, `pq`, `cells`, `true_cells`, `count_error`,
        `confluence_error`: see `instance_scores`.

    Raises:
        TypeError: an argument is not an array.
        ValueError: the shapes differ, or `ignored` is not bool.
    """
    if not isinstance(labels, np.ndarray) or not isinstance(truth, np.ndarray):
        wrong = type(truth if isinstance(labels, np.ndarray) else labels).__name__
        raise TypeError(f"a {wrong} is not a label image; give two integer arrays (H, W), predicted and true labels")
    if ignored is not None:
        if ignored.shape != truth.shape or ignored.dtype != bool:
            raise ValueError(f"ignored is {ignored.dtype} {ignored.shape}, not bool {truth.shape} as the labels")
        ignored = ignored & (truth == 0)
    counts = pixel_scores.mask_counts(labels, truth, ignored)
    pixels = [counts[name] for name in pixel_scores.COUNTS]
    return {
        "dice": pixel_scores.dice(pixels),
        "iou": pixel_scores.iou(pixels),
        **instance_scores.instance_scores(labels, truth, ignored),
    }


def summarise(rows: Sequence[Mapping[str, Any]], matches: Sequence[Matches], seed: int = 0) -> dict[str, Any]:
    """Scores of many images: of all, `per_cell_type`, and `macro`, the mean over cell types.

    Args:
        rows: from `of_image`, with `file_name` and `cell_type`; any order.
        matches: from `of_image`, in the order of `rows`.
        seed: seed of the bootstrap.

    Returns:
        `images`, COUNTS, `dice`, `iou`, `mean_image_dice`, MEANS, ERRORS, `ap`, `ap50`, `ap75`, `aps`,
        `apm`, `apl`, `afnr`, `ar100`, `ar500`, `ar2000`, and `intervals`: 95 % intervals by name, None for one image.
    """
    if not rows:
        raise ValueError("no images to summarise")
    # Sorted, so that the intervals do not depend on the order in which workers finish.
    order = sorted(range(len(rows)), key=lambda i: str(rows[i]["file_name"]))
    kinds = sorted({str(row["cell_type"]) for row in rows})
    by_kind = {kind: [i for i in order if rows[i]["cell_type"] == kind] for kind in kinds}

    def of(members: Sequence[int]) -> dict[str, Any]:
        return _summary([rows[i] for i in members], [matches[i] for i in members], seed)

    per_type = {kind: of(members) for kind, members in by_kind.items()}
    return {**of(order), "macro": _macro(list(per_type.values())), "per_cell_type": per_type}


def _summary(rows: Sequence[Mapping[str, Any]], matches: Sequence[Matches], seed: int) -> dict[str, Any]:
    pixels = pixel_scores.scores(pixel_scores.as_counts([dict(row) for row in rows]), seed)
    images, intervals = pixels.pop("images"), pixels.pop("intervals")
    values = {name: np.array([row[name] for row in rows]) for name in MEANS}
    values |= {name: np.abs([row[name] for row in rows]) for name in ERRORS}
    return {
        "images": images,
        **{name: sum(int(row[name]) for row in rows) for name in COUNTS},
        **pixels,
        **{name: float(value.mean()) for name, value in values.items()},
        **average_precision.average_precision(matches),
        "intervals": {
            **intervals,
            **{name: _interval(value, seed) for name, value in values.items()},
            **average_precision.interval(matches, seed),
        },
    }


def _interval(values: NDArray[np.float64], seed: int) -> list[float] | None:
    """95 % interval of the mean over images."""
    bounds = bootstrap.interval(np.mean, values, seed=seed)
    return None if bounds is None else bounds.tolist()


def _macro(kinds: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Means over the cell types that have a value; None without one."""
    names = [name for name in kinds[0] if name not in ("images", *COUNTS, "intervals")]
    values = {name: [kind[name] for kind in kinds if kind[name] is not None] for name in names}
    return {name: float(np.mean(column)) if column else None for name, column in values.items()}
