"""`bench evaluate`: milliseconds per image of scoring cells, compared with pycocotools' COCOeval.

Frames of 520x704 with 295 cells, the mean of LIVECell's test images, and the same number of predicted cells, each
slightly displaced. Ours computes all scores of `evaluate`, intervals included; COCOeval, with LIVECell's parameters,
computes AP only. One process.
"""

import contextlib
import io
import time
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from raylivecell.annotations import rle
from raylivecell.bench.figures import Figures, Options, measure_in_turn, ratios, summaries
from raylivecell.scoring import average_precision, scores

SIZE, CELLS = (520, 704), 295
GRID = (15, 20)
"""Rows and columns of positions; the first CELLS are used."""
BASELINE_IMAGES = 4
OURS, BASELINE = "raylivecell, all scores", "pycocotools COCOeval, AP alone"


def bench(options: Options) -> Figures:
    """Milliseconds per image of our scores and of COCOeval.

    Args:
        options: `images` to score with ours; each of `repeats` scores BASELINE_IMAGES with both.

    Returns:
        `cells`: number of true cells; `milliseconds`: variant -> summary; `ratio`; `summary_seconds`: time of the work
        done once for all images (means, AP, 95 % intervals); `seconds_1564_images`: predicted for LIVECell's test
        images.
    """
    pairs = [(_labels(2 * number), _labels(2 * number + 1)) for number in range(BASELINE_IMAGES)]

    def ours() -> float:
        begin = time.perf_counter()
        _score(pairs)
        return 1000 * (time.perf_counter() - begin) / len(pairs)

    def baseline() -> float:
        begin = time.perf_counter()
        _cocoeval(pairs)
        return 1000 * (time.perf_counter() - begin) / len(pairs)

    times = measure_in_turn({OURS: ours, BASELINE: baseline}, options.repeats)
    images = options.images
    scored = _score([pairs[number % len(pairs)] for number in range(images)])
    rows = [
        {**row, "file_name": f"{number}.tif", "cell_type": "AB"[number % 2]} for number, (row, _) in enumerate(scored)
    ]
    begin = time.perf_counter()
    scores.summarise(rows, [matches for _, matches in scored])
    summary_seconds = time.perf_counter() - begin
    return {
        "images": images,
        "cells": CELLS * images,
        "milliseconds": summaries(times),
        "ratio": ratios(times, [(BASELINE, OURS)]),
        "summary_seconds": summary_seconds,
        "seconds_1564_images": 1.564 * float(np.median(times[OURS])) + summary_seconds * 1564 / images,
    }


Pair = tuple[np.ndarray, np.ndarray]
"""Predicted and true labels."""


def _labels(seed: int) -> np.ndarray:
    """Ellipses on a grid, each slightly displaced."""
    rng = np.random.default_rng((3, seed // 2))  # the same cells in the predicted and the true image
    labels = np.zeros(SIZE, np.int32)
    rows, columns = GRID
    for number in range(1, CELLS + 1):
        y, x = divmod(number - 1, columns)
        axes, angle = rng.integers(9, 17, 2).tolist(), float(rng.uniform(0, 180))
        offset = np.random.default_rng((seed, number)).normal(0, 1.5, 2)
        centre = (round((x + 0.5) * SIZE[1] / columns + offset[0]), round((y + 0.5) * SIZE[0] / rows + offset[1]))
        cv2.ellipse(labels, centre, axes, angle, 0, 360, number, -1)
    return labels


def _score(pairs: Sequence[Pair]) -> list[Any]:
    results = []
    for predicted, true in pairs:
        masks = rle.encode(predicted)
        prediction = scores.Prediction(predicted != 0, predicted, masks, np.linspace(1, 0.5, len(masks)))
        results.append(scores.of_image(prediction, scores.GroundTruth(true, rle.encode(true))))
    return results


def _cocoeval(pairs: Sequence[Pair]) -> None:
    from pycocotools import mask as coco_mask

    truth: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "cell"}]}
    results = []
    for number, (predicted, true) in enumerate(pairs, 1):
        truth["images"].append({"id": number, "height": SIZE[0], "width": SIZE[1]})
        for mask in rle.encode(true):
            ids = {"id": len(truth["annotations"]) + 1, "image_id": number, "category_id": 1, "iscrowd": 0}
            truth["annotations"].append({**ids, "segmentation": mask, "area": int(coco_mask.area(mask))})
        masks = rle.encode(predicted)
        records = average_precision.results(number, masks, np.linspace(1, 0.5, len(masks)))
        results += [{key: value for key, value in record.items() if key != "bbox"} for record in records]
    livecell_evaluation(truth, results)


def livecell_evaluation(truth: dict[str, Any], results: list[dict[str, Any]]) -> Any:
    """Run pycocotools' COCOeval up to `accumulate`, configured as in LIVECell's evaluation script.

    Args:
        truth: content of a COCO annotation file.
        results: {"image_id", "category_id", "segmentation", "score"}; without "bbox", whose area COCO would use.
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
