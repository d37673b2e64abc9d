"""`dataset.json`: what a prepared dataset holds, told from the accounts of its parts."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from raylivecell.data.shards import FORMAT_VERSION, SPLITS
from raylivecell.images.intensity import trimmed_range

LIVECELL_LICENCE = "CC BY-NC 4.0"
LIVECELL_CITATION = (
    "Edlund, C., Jackson, T. R., Khalid, N. et al. LIVECell - A large-scale dataset for label-free live cell "
    "segmentation. Nature Methods 18, 1038-1045 (2021). https://doi.org/10.1038/s41592-021-01249-6"
)
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)


def legal(info: Mapping[str, Any], licences: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Name, licence and citation of a source, from the `info` and `licenses` of its annotation files."""
    described = str(info.get("description") or "")
    if described.startswith("LIVECell"):
        return {"name": "LIVECell", "licence": LIVECELL_LICENCE, "citation": LIVECELL_CITATION}
    named = [str(licence.get("name") or licence.get("url") or "") for licence in licences]
    stated = "; ".join(dict.fromkeys(name for name in named if name))
    cited = " ".join(str(info[key]) for key in ("contributor", "year", "url") if info.get(key))
    return {"name": described or "unnamed", "licence": stated or "not stated", "citation": cited or "not stated"}


def cell_type_of(file_name: str, category: str) -> str:
    """The cell type of an image.

    The part before the first underscore where the name is like LIVECell's (`A172_Phase_...`), else the category of
    most of its annotations, else `unknown`. A category named `cell` says nothing.
    """
    name = file_name.replace("\\", "/").rsplit("/", 1)[-1]
    if match := re.match(r"([^_]+)_Phase_", name):
        return match.group(1)
    return category if category and category.lower() not in ("cell", "cells") else "unknown"


def describe(
    accounts: Sequence[Mapping[str, Any]],
    head: Mapping[str, Any],
    found: Sequence[Mapping[str, Any]],
    listed: Mapping[str, Mapping[str, int]],
) -> dict[str, Any]:
    """The whole of dataset.json, in a fixed order and without a time: the same for the same source.

    Args:
        accounts: of every part, in order; each with `split` added.
        head: name, licence, citation, source, targets, rules, categories, intensity.
        found: defects of images and files; those of cells are in the accounts.
        listed: `images` and `cells` that the annotation files list, by split.
    """
    everything = [*found, *(one for account in accounts for one in account["found"])]
    counts = Counter(one["defect"] for one in everything)
    cells = Counter(one["defect"] for one in everything for _ in one["ids"])
    return {
        "format_version": FORMAT_VERSION,
        **head,
        "splits": {split: _split(accounts, split) | {"listed": dict(listed[split])} for split in SPLITS},
        "intensity": _with_foreground(head["intensity"], accounts),
        "grey_levels": _grey_levels(accounts),
        "cell_types": _cell_types(accounts),
        "defects": {"counts": dict(sorted(counts.items())), "ids": dict(sorted(cells.items())), "found": everything},
    }


def _split(accounts: Sequence[Mapping[str, Any]], split: str) -> dict[str, Any]:
    mine = [account for account in accounts if account["split"] == split and account["rows"]]
    sizes = {tuple(image["size"]) for account in mine for image in account["images"]}
    return {
        "images": sum(account["rows"] for account in mine),
        "cells": sum(image["cells"] for account in mine for image in account["images"]),
        "sizes": [list(size) for size in sorted(sizes)],
        "shards": [{key: account[key] for key in ("file", "rows", "bytes", "sha256")} for account in mine],
    }


def _first_split(accounts: Sequence[Mapping[str, Any]]) -> str:
    """Train, or the first split that has an image."""
    return next((split for split in SPLITS if _split(accounts, split)["images"]), "train")


def _with_foreground(rule: Mapping[str, Any], accounts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The intensity rule with the range of the training images' foreground shares; one that has a range keeps it."""
    split = _first_split(accounts)
    images = [image for account in accounts if account["split"] == split for image in account["images"]]
    shares = [round(image["foreground"] / max(1, image["pixels"]), 4) for image in images]
    known = tuple(rule["foreground"]) != (0.0, 1.0) or not shares
    return {**rule, "foreground": rule["foreground"] if known else list(trimmed_range(shares))}


def _grey_levels(accounts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Statistics of the levels of train, or of the first split that has an image; 0 to 255."""
    split = _first_split(accounts)
    histogram = np.zeros(256, np.int64)
    for account in accounts:
        if account["split"] == split:
            histogram += np.array(account["histogram"])
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
    """The smallest of the ascending `values` that at least p % of the counted do not exceed."""
    if not counts.sum():
        return {}
    summed = np.cumsum(counts)
    places = np.searchsorted(summed, np.array(PERCENTILES) / 100 * summed[-1])
    return {f"p{p}": int(values[place]) for p, place in zip(PERCENTILES, places)}


def _cell_types(accounts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    images: dict[str, list[tuple[str, Mapping[str, Any]]]] = defaultdict(list)
    areas: dict[str, Counter[int]] = defaultdict(Counter)
    for account in accounts:
        for image in account["images"]:
            images[image["cell_type"]].append((account["split"], image))
        for name, histogram in account["areas"].items():
            areas[name].update({int(area): count for area, count in histogram.items()})
    return {name: _cell_type(images[name], areas[name]) for name in sorted(images)}


def _cell_type(images: Sequence[tuple[str, Mapping[str, Any]]], areas: Mapping[int, int]) -> dict[str, Any]:
    per_image = Counter(image["cells"] for _, image in images)
    splits = Counter(split for split, _ in images)
    foreground = sum(image["foreground"] for _, image in images)
    return {
        "images": {split: splits[split] for split in SPLITS},
        "cells": sum(image["cells"] for _, image in images),
        "foreground_share": round(foreground / sum(image["pixels"] for _, image in images), 6),
        "cells_per_image": {"min": min(per_image), **_of(per_image), "max": max(per_image)},
        "cell_area_px": _of(areas),
    }


def _of(counted: Mapping[int, int]) -> dict[str, int]:
    values = np.array(sorted(counted), np.int64)
    return _percentiles(values, np.array([counted[value] for value in values.tolist()], np.int64))
