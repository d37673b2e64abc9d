"""Average precision equals that of pycocotools with LIVECell's changes."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from raylivecell.annotations.rle import Rle
from raylivecell.bench.evaluate import livecell_evaluation
from raylivecell.scoring import average_precision as protocol

SIZE = (60, 60)
Image = tuple[list[Rle], np.ndarray, list[Rle]] | tuple[list[Rle], np.ndarray, list[Rle], Rle]
"""Detections, their scores, the true cells, and perhaps an ignore region."""


def rectangle(top: int, left: int, height: int, width: int) -> Rle:
    mask = np.zeros(SIZE, np.uint8, order="F")
    mask[top : top + height, left : left + width] = 1
    return coco_mask.encode(mask)


def image(rng: np.random.Generator, cells: int, detections: int) -> Image:
    """Overlapping rectangles, some of exactly 324 and 961 pixels; detections near them, with equal scores."""
    sides = [(18, 18), (31, 31), (9, 12), (20, 25), (33, 30), (6, 6)]
    boxes = [(*rng.integers(0, 25, 2).tolist(), *sides[rng.integers(len(sides))]) for _ in range(cells)]
    prediction = []
    for _ in range(detections):
        top, left, height, width = boxes[rng.integers(cells)] if cells else (3, 4, 9, 9)
        shift = rng.integers(-2, 3, 4)
        prediction.append((max(top + shift[0], 0), max(left + shift[1], 0), height + shift[2], width + shift[3]))
    scores = rng.integers(0, 6, detections) / 5
    return [rectangle(*map(int, box)) for box in prediction], scores, [rectangle(*box) for box in boxes]


def reference(images: list[Image]) -> dict[str, float]:
    """Scores by COCOeval; -1 if there is no cell of that size."""
    truth: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "cell"}]}
    results = []
    for number, (prediction, scores, true, *regions) in enumerate(images, 1):
        truth["images"].append({"id": number, "height": SIZE[0], "width": SIZE[1]})
        for crowd, mask in [*((0, mask) for mask in true), *((1, mask) for mask in regions)]:
            about = {"id": len(truth["annotations"]) + 1, "image_id": number, "category_id": 1, "iscrowd": crowd}
            truth["annotations"].append({**about, "segmentation": mask, "area": int(coco_mask.area(mask))})
        results += protocol.results(number, prediction, scores)
    for record in results:
        del record["bbox"]  # as in LIVECell's script: makes COCO use the area of the box
    evaluation = livecell_evaluation(truth, results)
    precision, recall = evaluation.eval["precision"][:, :, 0, :, 2], evaluation.eval["recall"][:, 0, 0, :]
    metrics = {f"ap{letter}": precision[:, :, area].mean() for area, letter in enumerate(["", "s", "m", "l"])}
    metrics |= {"ap50": precision[0, :, 0].mean(), "ap75": precision[5, :, 0].mean()}
    metrics |= {f"ar{most}": recall[:, place].mean() for place, most in enumerate((100, 500, 2000))}
    return {**metrics, "afnr": 1 - metrics["ar2000"] if metrics["ar2000"] >= 0 else -1}


def compare(images: list[Image]) -> None:
    actual = protocol.average_precision([protocol.match(*case) for case in images])
    expected = reference(images)
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert (-1 if value is None else value) == pytest.approx(expected[name], abs=1e-9), name


@given(st.integers(0, 2**32), st.lists(st.tuples(st.integers(0, 6), st.integers(1, 9)), min_size=1, max_size=4))
@settings(max_examples=60)
def test_scores_equal_pycocotools(seed: int, sizes: list[tuple[int, int]]) -> None:
    rng = np.random.default_rng(seed)
    compare([image(rng, cells, detections) for cells, detections in sizes])


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.lists(st.tuples(st.integers(0, 8), st.integers(1, 12)), min_size=1, max_size=3))
def test_an_ignore_region_counts_as_a_crowd_of_pycocotools(seed: int, sizes: list[tuple[int, int]]) -> None:
    rng = np.random.default_rng(seed)
    images: list[Image] = []
    for size in sizes:
        prediction, scores, true, *_ = image(rng, *size)
        mask = coco_mask.decode(rectangle(*rng.integers(0, 30, 2).tolist(), *rng.integers(1, 50, 2).tolist()))
        for cell in true:
            mask[coco_mask.decode(cell) != 0] = 0  # an ignore region contains no pixel of a true cell
        images.append((prediction, scores, true, coco_mask.encode(np.asfortranarray(mask))))
    compare(images)


def test_more_than_a_hundred_detections_count() -> None:
    rng = np.random.default_rng(0)
    images = [image(rng, 70, 250), image(rng, 40, 600)]
    compare(images)
    figures = protocol.average_precision([protocol.match(*case) for case in images])
    assert figures["ar100"] < figures["ar500"] <= figures["ar2000"]
    apart = [rectangle(5 * (i // 12), 5 * (i % 12), 4, 4) for i in range(101)]
    compare([(apart, np.ones(101), apart)])
    assert protocol.average_precision([protocol.match(apart, np.ones(101), apart)])["ar100"] == pytest.approx(100 / 101)


def test_detections_past_the_best_two_thousand_do_not_count() -> None:
    prediction, scores, truth = image(np.random.default_rng(0), 3, 2000)
    extra = rectangle(50, 50, 7, 7)
    late = ([*prediction, extra], np.append(scores, -1.0), [*truth, extra])
    compare([late])
    assert len(protocol.match(*late).scores) == 2000
    early = ([extra, *prediction], np.append(2.0, scores), [*truth, extra])
    assert (
        protocol.average_precision([protocol.match(*early)])["afnr"]
        < (protocol.average_precision([protocol.match(*late)])["afnr"])
    )


def test_images_without_detections_or_without_cells() -> None:
    nothing = protocol.match([], np.zeros(0), [])
    missed = protocol.match([], np.zeros(0), [rectangle(0, 0, 9, 9)])
    assert set(protocol.average_precision([nothing]).values()) == {None}
    assert protocol.average_precision([nothing, missed])["afnr"] == 1
    assert protocol.average_precision([nothing, missed])["ap"] == 0
    assert protocol.average_precision([nothing, missed])["apl"] is None


def test_intervals_contain_the_score_and_are_reproducible() -> None:
    rng = np.random.default_rng(1)
    matches = [protocol.match(*image(rng, 5, 6)) for _ in range(12)]
    figures, bounds = protocol.average_precision(matches), protocol.interval(matches, seed=3)
    assert bounds == protocol.interval(matches, seed=3) != protocol.interval(matches, seed=4)
    for name, (low, high) in bounds.items():
        assert low <= figures[name] <= high
    assert protocol.interval(matches[:1])["ap"] is None


@given(st.integers(0, 2**32), st.lists(st.integers(0, 4), min_size=5, max_size=5))
@settings(max_examples=40)
def test_weighting_images_equals_repeating_them(seed: int, times: list[int]) -> None:
    """Exact if no two detections have equal scores: COCO counts ties one by one, weights count them at once."""
    rng = np.random.default_rng(seed)
    images = [image(rng, *rng.integers(0, 9, 2)) for _ in times]
    matches = [protocol.match(prediction, rng.random(len(prediction)), truth) for prediction, _, truth in images]
    table, weights = protocol._Table(matches), np.array(times, float)
    repeated = [match for match, count in zip(matches, times) for _ in range(count)]
    expected = protocol.average_precision(repeated) if repeated else {"ap": None, "ap75": None, "afnr": None}
    for name, levels in (("ap", slice(None)), ("ap75", slice(5, 6))):
        precision = table.precision(0, weights, levels)
        assert (None if precision is None else precision.mean()) == pytest.approx(expected[name])
    recall = table.recall(2000, weights)
    assert (None if recall is None else 1 - recall.mean()) == pytest.approx(expected["afnr"])
