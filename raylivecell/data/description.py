"""dataset.json: the description of a prepared dataset, computed from the accounts of its shards."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from raylivecell.data.defects import Defect
from raylivecell.data.shards import FORMAT_VERSION, SPLITS
from raylivecell.images import scale
from raylivecell.images.intensity import trimmed_range

LIVECELL_LICENCE = "CC BY-NC 4.0"
LIVECELL_CITATION = (
    "Edlund, C., Jackson, T. R., Khalid, N. et al. LIVECell - A large-scale dataset for label-free live cell "
    "segmentation. Nature Methods 18, 1038-1045 (2021). https://doi.org/10.1038/s41592-021-01249-6"
)
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)


@dataclass(frozen=True)
class ImageStatistics:
    """Statistics of one image of a shard."""

    cell_type: str
    cells: int
    foreground: int
    """Pixels in cells."""
    pixels: int
    """Pixels without padding."""
    size: list[int]
    """[height, width]."""
    diameter: float = 0.0
    """Median diameter of its cells in pixels; 0 without cells."""
    ignored: int = 0
    """Of these, pixels without annotation."""

    @property
    def annotated(self) -> int:
        """Pixels without padding and ignore region, at least 1."""
        return max(1, self.pixels - self.ignored)


@dataclass
class ShardAccount:
    """Checksum, statistics and defects of one shard, written after the shard."""

    split: str
    file: str
    """Relative to the dataset."""
    rows: int = 0
    bytes: int = 0
    sha256: str = ""
    images: list[ImageStatistics] = field(default_factory=list)
    histogram: list[int] = field(default_factory=lambda: [0] * 256)
    """Pixels by grey level."""
    areas: dict[str, dict[str, int]] = field(default_factory=dict)
    """Cells by cell type and area in pixels."""
    defects: list[Defect] = field(default_factory=list)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "ShardAccount":
        """Restore an account from the result of `asdict`."""
        images = [ImageStatistics(**image) for image in value["images"]]
        return cls(**{**value, "images": images, "defects": [Defect(**defect) for defect in value["defects"]]})


def cell_type_of(file_name: str, category: str) -> str:
    """Return the cell type of an image.

    The part before the first underscore for names like LIVECell's (`A172_Phase_...`), otherwise the category of most of
    its annotations, otherwise `unknown`. A category named `cell` is not a cell type.
    """
    name = file_name.replace("\\", "/").rsplit("/", 1)[-1]
    if match := re.match(r"([^_]+)_Phase_", name):
        return match.group(1)
    return category if category and category.lower() not in ("cell", "cells") else "unknown"


def legal(info: Mapping[str, Any], licences: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return name, licence and citation of a source, from the `info` and `licenses` of its annotation files."""
    name = str(info.get("description") or "")
    if name.startswith("LIVECell"):
        return {"name": "LIVECell", "licence": LIVECELL_LICENCE, "citation": LIVECELL_CITATION}
    names = [str(licence.get("name") or licence.get("url") or "") for licence in licences]
    licence = "; ".join(dict.fromkeys(text for text in names if text))
    citation = " ".join(str(info[key]) for key in ("contributor", "year", "url") if info.get(key))
    return {"name": name or "unnamed", "licence": licence or "not stated", "citation": citation or "not stated"}


def describe(
    accounts: Sequence[ShardAccount],
    head: Mapping[str, Any],
    defects: Sequence[Defect],
    listed: Mapping[str, Mapping[str, int]],
) -> dict[str, Any]:
    """Return the content of dataset.json, in a fixed order and without time stamps: equal for equal sources.

    Args:
        accounts: one per shard, in order.
        head: name, licence, citation, source, targets, rules, categories, intensity, scale (only `pixel_scale`).
        defects: defects of images and files; the accounts contain those of cells.
        listed: `images` and `cells` in the annotation files, by split.
    """
    every_defect = [*defects, *(defect for account in accounts for defect in account.defects)]
    counts = Counter(defect.defect for defect in every_defect)
    ids = Counter(defect.defect for defect in every_defect for _ in defect.ids)
    return {
        "format_version": FORMAT_VERSION,
        **head,
        "splits": {split: _describe_split(accounts, split) | {"listed": dict(listed[split])} for split in SPLITS},
        "intensity": _with_foreground(head["intensity"], accounts),
        "scale": _scale(head["scale"]["pixel_scale"], accounts),
        "grey_levels": _grey_levels(accounts),
        "cell_types": _cell_types(accounts),
        "defects": {
            "counts": dict(sorted(counts.items())),
            "ids": dict(sorted(ids.items())),
            "found": [asdict(defect) for defect in every_defect],
        },
    }


def _describe_split(accounts: Sequence[ShardAccount], split: str) -> dict[str, Any]:
    written = [account for account in accounts if account.split == split and account.rows]
    images = [image for account in written for image in account.images]
    sizes = {tuple(image.size) for image in images}
    ignored = [image.ignored for image in images if image.ignored]
    return {
        "images": sum(account.rows for account in written),
        "cells": sum(image.cells for image in images),
        # Only in partly annotated datasets.
        **({"ignored": {"images": len(ignored), "pixels": sum(ignored)}} if ignored else {}),
        "sizes": [list(size) for size in sorted(sizes)],
        "shards": [
            {"file": account.file, "rows": account.rows, "bytes": account.bytes, "sha256": account.sha256}
            for account in written
        ],
    }


def _with_foreground(rule: Mapping[str, Any], accounts: Sequence[ShardAccount]) -> dict[str, Any]:
    """Add the range of foreground fractions of the training images to an intensity rule, unless it has one."""
    split = _first_split(accounts)
    images = [image for account in accounts if account.split == split for image in account.images]
    fractions = [round(image.foreground / image.annotated, 4) for image in images if image.pixels > image.ignored]
    has_range = tuple(rule["foreground"]) != (0.0, 1.0) or not fractions
    return {**rule, "foreground": rule["foreground"] if has_range else list(trimmed_range(fractions))}


def _scale(pixel_scale: float, accounts: Sequence[ShardAccount]) -> dict[str, Any]:
    """Return the `scale.Scale` of the dataset, from its training cells, or those of the first split with an image."""
    split = _first_split(accounts)
    areas: Counter[int] = Counter()
    medians = []
    for account in accounts:
        if account.split == split:
            medians += [image.diameter for image in account.images if image.diameter]
            for histogram in account.areas.values():
                areas.update({int(area): count for area, count in histogram.items()})
    return scale.of_dataset(pixel_scale, areas, medians).model_dump(mode="json")


def _first_split(accounts: Sequence[ShardAccount]) -> str:
    """Return train, or the first split with an image."""
    return next((split for split in SPLITS if any(a.rows for a in accounts if a.split == split)), "train")


def _grey_levels(accounts: Sequence[ShardAccount]) -> dict[str, Any]:
    """Return statistics of the grey levels, 0 to 255, of train, or of the first split with an image."""
    split = _first_split(accounts)
    histogram = np.zeros(256, np.int64)
    for account in accounts:
        if account.split == split:
            histogram += np.array(account.histogram)
    total = max(1, int(histogram.sum()))
    levels = np.arange(256)
    mean = float(histogram @ levels) / total
    variance = float(histogram @ (levels - mean) ** 2) / total
    return {
        "split": split,
        "mean": round(mean, 4),
        "std": round(variance**0.5, 4),
        "percentiles": _percentiles(levels, histogram),
    }


def _percentiles(values: np.ndarray, counts: np.ndarray) -> dict[str, int]:
    """Return, for each p, the smallest of the ascending `values` at or below which at least p % of the counts are."""
    if not counts.sum():
        return {}
    cumulative = np.cumsum(counts)
    indices = np.searchsorted(cumulative, np.array(PERCENTILES) / 100 * cumulative[-1])
    return {f"p{p}": int(values[index]) for p, index in zip(PERCENTILES, indices)}


def _cell_types(accounts: Sequence[ShardAccount]) -> dict[str, Any]:
    images: dict[str, list[tuple[str, ImageStatistics]]] = defaultdict(list)
    areas: dict[str, Counter[int]] = defaultdict(Counter)
    for account in accounts:
        for image in account.images:
            images[image.cell_type].append((account.split, image))
        for cell_type, histogram in account.areas.items():
            areas[cell_type].update({int(area): count for area, count in histogram.items()})
    return {cell_type: _cell_type(images[cell_type], areas[cell_type]) for cell_type in sorted(images)}


def _cell_type(images: Sequence[tuple[str, ImageStatistics]], areas: Mapping[int, int]) -> dict[str, Any]:
    cells_per_image = Counter(image.cells for _, image in images)
    splits = Counter(split for split, _ in images)
    foreground = sum(image.foreground for _, image in images)
    return {
        "images": {split: splits[split] for split in SPLITS},
        "cells": sum(image.cells for _, image in images),
        "foreground_share": round(foreground / sum(image.annotated for _, image in images), 6),
        "cells_per_image": {
            "min": min(cells_per_image),
            **_percentiles_of_counts(cells_per_image),
            "max": max(cells_per_image),
        },
        "cell_area_px": _percentiles_of_counts(areas),
    }


def _percentiles_of_counts(counts: Mapping[int, int]) -> dict[str, int]:
    values = np.array(sorted(counts), np.int64)
    return _percentiles(values, np.array([counts[value] for value in values.tolist()], np.int64))
