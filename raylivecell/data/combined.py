"""Several prepared datasets as one: their samples one after another, on the grey levels of the first.

A network has one intensity rule, which its checkpoint carries and `predict` applies to every image. Images of another
dataset are therefore converted to the first dataset's rule when they are read, exactly as `evaluate` and `predict`
would; a dataset whose stored values are lost is refused.

Each function accepts the URI of one dataset, and then is the function of the same name in shards.py.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from raylivecell.core import storage
from raylivecell.core.errors import UserError
from raylivecell.data import shards
from raylivecell.data.shards import Rows
from raylivecell.images.intensity import Intensity
from raylivecell.images.scale import Scale


class Datasets(NamedTuple):
    """Two or more datasets."""

    uris: tuple[str, ...]
    weights: tuple[float, ...] = ()
    """Share of each in the samples of an epoch; empty: every sample once."""

    def __str__(self) -> str:
        return ", ".join(self.uris)


Data = str | Datasets


def of(uris: str | Sequence[str], weights: Sequence[float] = ()) -> Data:
    """Normalise the values of --data and --data-weights; a single dataset is its URI.

    Raises:
        UserError: no dataset, one given twice, or weights that do not match.
    """
    texts = tuple(storage.absolute(uri) for uri in ([uris] if isinstance(uris, str) else uris))
    if not texts:
        raise UserError("--data needs a value")
    if doubled := [uri for uri in dict.fromkeys(texts) if texts.count(uri) > 1]:
        raise UserError(f"--data {doubled[0]} is given twice; use --data-weights to draw its samples more often")
    if weights and len(weights) != len(texts):
        raise UserError(f"--data-weights: {len(weights)} weights for {len(texts)} datasets; give one for each --data")
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise UserError("--data-weights must be above 0; leave out the --data that is not to be used")
    return texts[0] if len(texts) == 1 else Datasets(texts, tuple(float(weight) for weight in weights))


def uris(data: Data) -> tuple[str, ...]:
    """The URIs of the datasets."""
    return (data,) if isinstance(data, str) else data.uris


def list_rows(data: Data, split: str) -> Rows:
    """Return the location of every sample of a split, in the order of the datasets."""
    if isinstance(data, str):
        return shards.list_rows(data, split)
    rules = [_conversion(uri, data.uris[0]) for uri in data.uris]
    return Rows.join([shards.list_rows(uri, split) for uri in data.uris], rules)


def _conversion(uri: str, first: str) -> Intensity | None:
    """Rule that converts images of the dataset at `uri` to that at `first`; None if both have the same rule."""
    try:
        return shards.conversion(uri, shards.intensity(first))
    except ValueError as error:
        raise UserError(
            f"dataset at {uri} cannot be combined with {first}: {error}; prepare it again with "
            f"`raylivecell prepare --intensity-from {first}`"
        ) from error


def sample_counts(data: Datasets, split: str) -> tuple[tuple[int, float], ...]:
    """Number of samples and weight of each dataset; empty without weights."""
    counts = [len(shards.list_rows(uri, split)) for uri in data.uris]
    return tuple(zip(counts, data.weights, strict=True)) if data.weights else ()


def image_sizes(data: Data, split: str) -> set[tuple[int, int]]:
    """Return all (height, width) of a split."""
    return {size for uri in uris(data) for size in shards.image_sizes(uri, split)}


def intensity(data: Data) -> Intensity:
    """Return the intensity rule: that of the first dataset."""
    return shards.intensity(uris(data)[0])


def scale(data: Data) -> Scale:
    """Return the scale: that of the first dataset, with the range of diameters of all.

    Raises:
        UserError: the images of another dataset have another pixel scale, and its cells another size.
    """
    first, *others = scales = [shards.scale(uri) for uri in uris(data)]
    for uri, other in zip(uris(data)[1:], others, strict=True):
        if not other.fits(first):
            has_cells = shards.labelled(uri)
            flag = first.prepare_flag(uris(data)[0]) if has_cells else f"--pixel-scale {first.pixel_scale:g}"
            raise UserError(
                f"dataset at {uri} has {other}, {uris(data)[0]} has {first}: one network cannot suit both; prepare it "
                f"again with `raylivecell prepare {flag}`"
            )
    ranges = [each.diameters for each in scales if each.diameters is not None]
    labelled = sum(shards.labelled(uri) for uri in uris(data))
    if not others or not ranges or len(ranges) < labelled:
        return first
    diameters = (min(low for low, _ in ranges), max(high for _, high in ranges))
    return first.model_copy(update={"diameters": diameters})


def scale_notes(data: Data) -> list[str]:
    """Describe in a line each dataset whose images need `predict --diameter`: scaled by another factor than the first.

    Their cells have the size of the first's (`scale`).
    """
    first, *others = [shards.scale(uri) for uri in uris(data)]
    return [
        f"images like those of {uri} need `raylivecell predict --diameter {other.diameter / other.pixel_scale:.3g}`: "
        f"their pixel scale is {other.pixel_scale:g}, that of the network {first.pixel_scale:g}"
        for uri, other in zip(uris(data)[1:], others, strict=True)
        if other.diameter is not None and other.pixel_scale != first.pixel_scale
    ]


def provenance(data: Data) -> dict[str, Any]:
    """Return `uri`, `name`, `licence`, `citation` and `sha256`, of all datasets together.

    Several datasets also have `datasets`, the provenance of each, and `weights`.
    """
    if isinstance(data, str):
        return shards.provenance(data)
    each = [shards.provenance(uri) for uri in data.uris]
    text = "\n".join([*(values["sha256"] for values in each), *(repr(weight) for weight in data.weights)])
    return {
        "uri": str(data),
        **_legal(each),
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "datasets": each,
        "weights": list(data.weights),
    }


def _legal(each: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Name, licence and citation of several datasets."""
    texts = [
        {name: str(values.get(name) or "not stated") for name in ("name", "licence", "citation")} for values in each
    ]
    return {
        "name": " + ".join(values["name"] for values in texts),
        "licence": "; ".join(dict.fromkeys(f"{values['name']}: {values['licence']}" for values in texts)),
        "citation": " ".join(dict.fromkeys(values["citation"] for values in texts)),
    }


def description(data: Data) -> dict[str, Any]:
    """Return the parts of dataset.json that a report shows; counts are sums, cell types are listed by dataset."""
    if isinstance(data, str):
        return shards.load_description(data)
    each = [shards.load_description(uri) for uri in data.uris]
    splits: dict[str, dict[str, int]] = {}
    defects: dict[str, int] = {}
    cell_types: dict[str, Any] = {}
    for number, values in enumerate(each, 1):
        for split, counts in values["splits"].items():
            total = splits.setdefault(split, {"images": 0, "cells": 0})
            for name in total:
                total[name] += int(counts.get(name, 0))
        for kind, count in values.get("defects", {}).get("counts", {}).items():
            defects[kind] = defects.get(kind, 0) + count
        name = str(values.get("name") or f"dataset {number}")
        cell_types |= {f"{number} {name}: {kind}": row for kind, row in values.get("cell_types", {}).items()}
    return {**_legal(each), "splits": splits, "defects": {"counts": defects}, "cell_types": cell_types}
