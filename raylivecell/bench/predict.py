"""`bench predict`: milliseconds an image of each stage of `predict`, beside the usual library's way to do the same.

A drawn frame of 520x704; its cells' true fields stand for what a trained network gives, so that later stages have real
work. The network (fresh weights: they do not change its speed) has small.yaml's size. One process, all its cores for
the network, one for all else; in turn.
"""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import cv2
import numpy as np
import torch

from raylivecell.annotations import rle
from raylivecell.bench.spread import spread
from raylivecell.cells import measure
from raylivecell.cells import watershed as instances
from raylivecell.inference import image_file, results
from raylivecell.inference.segmenter import Cells
from raylivecell.network import forward
from raylivecell.recipe import LoopConfig, ModelConfig, Recipe
from raylivecell.reports.overlay import png
from raylivecell.scoring import average_precision
from raylivecell.synthetic import writer
from raylivecell.targets import sample_planes
from raylivecell.targets.registry import target

RECIPE = Recipe(targets="distance", model=ModelConfig(features=(8, 16, 24, 40, 56), norm="group"))
TABLE = ("area", "centroid", "bbox", "eccentricity", "mean_intensity")


def bench_predict(repeats: int = 5) -> dict[str, Any]:
    """Milliseconds of each stage, ours and the rival's; `share`: of ours, of their sum.

    Args:
        repeats: how often each stage is run, in turn, after one run to warm up.

    Returns:
        `cells`; `milliseconds`: way -> spread; `ratio`: rival / ours -> spread; `share`: stage -> part of the sum.
    """
    cv2.setNumThreads(1)
    image, labels = max((writer.draw_labels(0, index) for index in range(8)), key=lambda drawn: drawn[1].max())
    with tempfile.TemporaryDirectory(prefix="raylivecell-bench-") as folder:
        ours, rivals = _ours(image, labels, folder), _rivals(image, labels)
        spent: dict[str, list[float]] = {name: [] for name in (*ours, *rivals)}
        for _ in range(repeats + 1):
            for name, way in (ours | rivals).items():
                begin = time.perf_counter()
                way()
                spent[name].append(1000 * (time.perf_counter() - begin))
    beside = sorted(spent, key=lambda name: list(ours).index(name.split(":")[0]))  # each rival after its stage
    figures = {name: spread(spent[name][1:]) for name in beside}
    whole = sum(figures[name]["median"] for name in ours)
    pairs = [(rival, rival.split(":")[0]) for rival in rivals]
    return {
        "cells": int(labels.max()),
        "milliseconds": figures,
        "ratio": {f"{a} / ours": spread([x / y for x, y in zip(spent[a][1:], spent[b][1:])]) for a, b in pairs},
        "share": {name: round(figures[name]["median"] / whole, 4) for name in ours},
    }


def _maps(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """What a good network would give."""
    packed = sample_planes.pack(labels, np.zeros(labels.shape, np.uint8))
    planes = sample_planes.draw(image, packed, "distance")
    maps = np.stack([planes[sample_planes.FOREGROUND] * 255.0, *planes[sample_planes.MAPS]]).astype(np.float32) / 255
    return np.stack([cv2.GaussianBlur(one, (0, 0), 1.0) for one in maps])


def _ours(image: np.ndarray, labels: np.ndarray, folder: str) -> dict[str, Callable[[], Any]]:
    network = forward.build(RECIPE, torch.device("cpu")).eval()
    maps, config = _maps(image, labels), instances.default("distance")
    found = instances.segment(maps, "distance", config)
    cells = Cells(found, instances.scores(found, maps[0]), maps[0] > config.threshold)
    part = results.ImageResult({"file": "x"}, measure.lines("x", measure.measure(found, image), cells.scores), [])
    return {
        "network": lambda: forward.maps(network, image),
        "watershed": lambda: instances.segment(maps, "distance", config),
        "scores": lambda: instances.scores(found, maps[0]),
        "cells.csv": lambda: measure.lines("x", measure.measure(found, image), cells.scores),
        "coco.json": lambda: [
            results.record(one) for one in average_precision.results(0, rle.encode(found), cells.scores)
        ],
        **{kind: partial(write, image, cells) for kind, (_, write) in image_file.PICTURES.items()},
        "part": lambda: results.write(folder, "x", part),
    }


def _rivals(image: np.ndarray, labels: np.ndarray) -> dict[str, Callable[[], Any]]:
    """STAGE: how -> the same of a library."""
    from pycocotools import mask as coco_mask
    from skimage.feature import peak_local_max
    from skimage.measure import regionprops_table
    from skimage.segmentation import mark_boundaries, watershed

    channels_first = RECIPE.model_copy(update={"loop": LoopConfig(channels_last=False)})
    network = forward.build(channels_first, torch.device("cpu")).eval()
    maps = _maps(image, labels)

    def flooded() -> np.ndarray:
        height = cv2.GaussianBlur(target("distance").height(maps, maps[0] > 0.5), (0, 0), 1.0)
        cell = maps[0] > 0.5
        peaks = peak_local_max(height, labels=cell.astype(np.int32), min_distance=3)
        seeds = np.zeros(image.shape, np.int32)
        seeds[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
        return watershed(-height, seeds, mask=cell)

    found = flooded()
    return {
        "network: channels first": lambda: forward.maps(network, image),
        "watershed: scikit-image": flooded,
        "cells.csv: scikit-image": lambda: regionprops_table(found, image, properties=TABLE),
        "coco.json: pycocotools": lambda: [
            coco_mask.encode(np.asfortranarray(found == label, np.uint8)) for label in range(1, found.max() + 1)
        ],
        "overlays: scikit-image": lambda: png((255 * mark_boundaries(image, found)).astype(np.uint8)),
    }
