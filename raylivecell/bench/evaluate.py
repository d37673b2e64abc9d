"""`bench evaluate`: milliseconds an image of scoring cells, beside pycocotools' COCOeval with LIVECell's parameters.

Frames of 520x704 with 295 cells, as many as LIVECell's test images have in the mean, and as many found, each a little
beside its place. Ours gives all that `evaluate` reports, intervals included; the rival gives AP alone. One process.
"""

import contextlib
import io
import time
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from raylivecell.annotations import rle
from raylivecell.bench.spread import spread
from raylivecell.scoring import average_precision, scores

SIZE, CELLS = (520, 704), 295
GRID = (15, 20)
"""Places, of which CELLS are taken."""
RIVAL_IMAGES = 4
OURS, RIVAL = "raylivecell, all scores", "pycocotools COCOeval, AP alone"


def bench_evaluate(images: int = 200, repeats: int = 3) -> dict[str, Any]:
    """Milliseconds an image, ours in parts; `seconds_1564_images`: what LIVECell's test set takes at that speed.

    Args:
        images: to score; the rival scores RIVAL_IMAGES of them.
        repeats: of the rival, and of as many of our images beside it.

    Returns:
        `cells`: true ones; `milliseconds`: way -> spread; `ratio`; `summary_seconds`: of what is done once, for all
        images (means, AP, 95 % intervals).
    """
    drawn = [(_labels(2 * number), _labels(2 * number + 1)) for number in range(RIVAL_IMAGES)]
    ours: list[float] = []
    rival: list[float] = []
    for _ in range(repeats):
        for way, spent in ((_scored, ours), (_evaluated, rival)):
            begin = time.perf_counter()
            way(drawn)
            spent.append(1000 * (time.perf_counter() - begin) / len(drawn))
    rows = _scored([drawn[number % len(drawn)] for number in range(images)])
    named = [
        {**row, "file_name": f"{number}.tif", "cell_type": "AB"[number % 2]} for number, (row, _) in enumerate(rows)
    ]
    begin = time.perf_counter()
    scores.summarise(named, [matches for _, matches in rows])
    summary = time.perf_counter() - begin
    return {
        "images": images,
        "cells": CELLS * images,
        "milliseconds": {OURS: spread(ours), RIVAL: spread(rival)},
        "ratio": {f"{RIVAL} / {OURS}": spread([b / a for a, b in zip(ours, rival)])},
        "summary_seconds": summary,
        "seconds_1564_images": 1.564 * float(np.median(ours)) + summary * 1564 / images,
    }


Pair = tuple[np.ndarray, np.ndarray]
"""Found and true labels of an image."""


def _labels(seed: int) -> np.ndarray:
    """Ellipses on a grid, each a little beside its place."""
    rng = np.random.default_rng((3, seed // 2))  # the same cells for found and true
    labels = np.zeros(SIZE, np.int32)
    rows, columns = GRID
    for number in range(1, CELLS + 1):
        y, x = divmod(number - 1, columns)
        axes, angle = rng.integers(9, 17, 2).tolist(), float(rng.uniform(0, 180))
        off = np.random.default_rng((seed, number)).normal(0, 1.5, 2)
        centre = (round((x + 0.5) * SIZE[1] / columns + off[0]), round((y + 0.5) * SIZE[0] / rows + off[1]))
        cv2.ellipse(labels, centre, axes, angle, 0, 360, number, -1)
    return labels


def _scored(pairs: Sequence[Pair]) -> list[Any]:
    made = []
    for found, true in pairs:
        masks = rle.encode(found)
        said = scores.Prediction(found != 0, found, masks, np.linspace(1, 0.5, len(masks)))
        made.append(scores.of_image(said, scores.GroundTruth(true, rle.encode(true))))
    return made


def _evaluated(pairs: Sequence[Pair]) -> None:
    from pycocotools import mask as coco_mask

    truth: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "cell"}]}
    results = []
    for number, (found, true) in enumerate(pairs, 1):
        truth["images"].append({"id": number, "height": SIZE[0], "width": SIZE[1]})
        for mask in rle.encode(true):
            one = {"id": len(truth["annotations"]) + 1, "image_id": number, "category_id": 1, "iscrowd": 0}
            truth["annotations"].append({**one, "segmentation": mask, "area": int(coco_mask.area(mask))})
        masks = rle.encode(found)
        said = average_precision.results(number, masks, np.linspace(1, 0.5, len(masks)))
        results += [{key: value for key, value in one.items() if key != "bbox"} for one in said]
    livecell_evaluation(truth, results)


def livecell_evaluation(truth: dict[str, Any], results: list[dict[str, Any]]) -> Any:
    """pycocotools' COCOeval after `accumulate`, set up as LIVECell's script sets up its own.

    Args:
        truth: what a COCO annotation file holds.
        results: {"image_id", "category_id", "segmentation", "score"}; without "bbox", whose area COCO would take.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "segm")
        evaluation.params.catIds, evaluation.params.useCats = [1], 0
        evaluation.params.maxDets = [100, 500, 2000]
        evaluation.params.areaRng = [list(area) for area in average_precision.AREAS]
        evaluation.params.areaRngLbl = ["all", "small", "medium", "large"]
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation
