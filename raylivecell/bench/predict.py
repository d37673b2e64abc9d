"""`bench predict`: milliseconds per image of each stage of `predict`, compared with common libraries.

A synthetic frame of 520x704; maps drawn from its true cells replace a trained network's output, so that later stages
have realistic work. The network has the size of recipe `small` and random weights, which do not affect its speed. One
process; the network uses all cores, everything else one; the variants run in turn.
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
from raylivecell.bench.figures import Figures, Options, measure_in_turn, ratios, summary
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


def bench(options: Options) -> Figures:
    """Milliseconds of each of our stages and of its baseline.

    Args:
        options: `repeats` runs of each stage, in turn, after one warm-up run.

    Returns:
        `cells`; `milliseconds`: stage or baseline -> summary; `ratio`: baseline / ours -> summary; `share`: stage ->
        fraction of the total time of our stages.
    """
    cv2.setNumThreads(1)
    image, labels = max((writer.draw_labels(0, index) for index in range(8)), key=lambda frame: frame[1].max())
    with tempfile.TemporaryDirectory(prefix="raylivecell-bench-") as folder:
        stages, baselines = _stages(image, labels, folder), _baselines(image, labels)
        variants = {name: partial(_milliseconds, run) for name, run in (stages | baselines).items()}
        times = {name: values[1:] for name, values in measure_in_turn(variants, options.repeats + 1).items()}
    stage_of = {name: name.split(":")[0] for name in times}
    names = sorted(times, key=lambda name: list(stages).index(stage_of[name]))  # each baseline after its stage
    figures = {name: summary(times[name]) for name in names}
    total = sum(figures[name]["median"] for name in stages)
    pairs = [(name, stage_of[name]) for name in baselines]
    return {
        "cells": int(labels.max()),
        "milliseconds": figures,
        "ratio": ratios(times, pairs),
        "share": {name: round(figures[name]["median"] / total, 4) for name in stages},
    }


def _milliseconds(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - begin)


def _maps(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Maps as a good network would predict them: the true ones, blurred."""
    packed = sample_planes.pack(labels, np.zeros(labels.shape, np.uint8))
    planes = sample_planes.draw(image, packed, "distance")
    maps = np.stack([planes[sample_planes.FOREGROUND] * 255.0, *planes[sample_planes.MAPS]]).astype(np.float32) / 255
    return np.stack([cv2.GaussianBlur(plane, (0, 0), 1.0) for plane in maps])


def _stages(image: np.ndarray, labels: np.ndarray, folder: str) -> dict[str, Callable[[], Any]]:
    """Map each stage to a run of our code."""
    network = forward.build(RECIPE, torch.device("cpu")).eval()
    maps, config = _maps(image, labels), instances.default("distance")
    segmented = instances.segment(maps, "distance", config)
    cells = Cells(segmented, instances.scores(segmented, maps[0]), maps[0] > config.threshold)
    table = measure.lines("x", measure.measure(segmented, image), cells.scores)
    result = results.ImageResult(results.ImageRow("x"), table, [])
    return {
        "network": lambda: forward.maps(network, image),
        "watershed": lambda: instances.segment(maps, "distance", config),
        "scores": lambda: instances.scores(segmented, maps[0]),
        "cells.csv": lambda: measure.lines("x", measure.measure(segmented, image), cells.scores),
        "coco.json": lambda: [
            results.record(cell) for cell in average_precision.results(0, rle.encode(segmented), cells.scores)
        ],
        **{kind: partial(write, image, cells) for kind, (_, write) in image_file.PICTURES.items()},
        "part": lambda: results.write(folder, "x", result),
    }


def _baselines(image: np.ndarray, labels: np.ndarray) -> dict[str, Callable[[], Any]]:
    """Map "STAGE: LIBRARY" to a run of the same stage by a library."""
    from pycocotools import mask as coco_mask
    from skimage.feature import peak_local_max
    from skimage.measure import regionprops_table
    from skimage.segmentation import mark_boundaries, watershed

    channels_first = RECIPE.model_copy(update={"loop": LoopConfig(channels_last=False)})
    network = forward.build(channels_first, torch.device("cpu")).eval()
    maps = _maps(image, labels)

    def flood() -> np.ndarray:
        height = cv2.GaussianBlur(target("distance").height(maps, maps[0] > 0.5), (0, 0), 1.0)
        foreground = maps[0] > 0.5
        peaks = peak_local_max(height, labels=foreground.astype(np.int32), min_distance=3)
        markers = np.zeros(image.shape, np.int32)
        markers[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
        return watershed(-height, markers, mask=foreground)

    segmented = flood()
    return {
        "network: channels first": lambda: forward.maps(network, image),
        "watershed: scikit-image": flood,
        "cells.csv: scikit-image": lambda: regionprops_table(segmented, image, properties=TABLE),
        "coco.json: pycocotools": lambda: [
            coco_mask.encode(np.asfortranarray(segmented == label, np.uint8)) for label in range(1, segmented.max() + 1)
        ],
        "overlays: scikit-image": lambda: png((255 * mark_boundaries(image, segmented)).astype(np.uint8)),
    }
