"""`bench augment` and its direct form."""

import cv2
import numpy as np

from raylivecell.bench.augment import augment_direct, bench
from raylivecell.bench.figures import Options
from raylivecell.ingest.augment import augment
from raylivecell.recipe import AugmentConfig


def test_the_direct_form_equals_augment_without_deformation() -> None:
    """The same random numbers give the same flips, angle and colours."""
    random = np.random.default_rng(0)
    image = cv2.GaussianBlur(random.integers(0, 256, (120, 150), np.uint8), (0, 0), 3)
    labels = random.integers(0, 9, (8, 10), np.uint16).repeat(15, axis=0).repeat(15, axis=1)
    config = AugmentConfig.model_validate({"elastic": {"p": 0}})
    for seed in range(5):
        ours, direct = (
            make(image, labels, np.random.default_rng((seed,)), config) for make in (augment, augment_direct)
        )
        for a, b in zip(ours, direct):
            assert (np.abs(a.astype(int) - b) <= 3).mean() > 0.97


def test_bench_reports_each_time_and_its_ratio_to_the_baseline() -> None:
    threads = cv2.getNumThreads()
    result = bench(Options(repeats=3), (64, 80), sigma=6, alpha=50)
    assert cv2.getNumThreads() == threads
    assert len(result["milliseconds"]) == 8
    assert len(result["ratio"]) == 3
    for figures in (*result["milliseconds"].values(), *result["ratio"].values()):
        assert 0 < figures["min"] <= figures["median"] <= figures["max"]
