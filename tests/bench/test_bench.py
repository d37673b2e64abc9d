"""`bench`: each figure beside its rival's, from the same run."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from raylivecell.bench import chart, predict, run, scale, startup
from raylivecell.core import storage
from raylivecell.core.errors import UserError
from raylivecell.recipe import ModelConfig


def test_written_shown_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {
        "images_per_s": {
            name: {"median": m, "min": m / 2, "max": 2 * m} for name, m in (("ours", 30.0), ("other", 9.0))
        },
        "ratio": {"ours / other": {"median": 3.3, "min": 3.0, "max": 4.0}},
    }
    monkeypatch.setattr(run, "_run", lambda what, repeats, images: figures)
    with run.console.capture() as shown:
        result = run.bench("feed", tmp_path, 1, 1)
    assert storage.read_json(tmp_path / "bench.json") == result
    assert result["figures"] == figures
    assert result["hardware"]["cores"] > 0
    text = " ".join(shown.get().split())
    assert "ours / other" in text
    assert "3.3 (3 to 4)" in text
    drawn = cv2.imread(str(tmp_path / "bench.png"))
    assert drawn.shape[1] > 600


def test_a_chart_s_bars_are_as_long_as_their_medians() -> None:
    bars = {name: {"median": m, "min": m, "max": m} for name, m in (("a", 10.0), ("b", 5.0))}
    figures = {"seconds": 29.2, "images_per_s": bars}
    drawn = cv2.imdecode(np.frombuffer(chart.chart("x", figures), np.uint8), cv2.IMREAD_COLOR)
    blue = (np.abs(drawn.astype(int) - (0xAA, 0x77, 0x44)) < 8).all(axis=2)
    lengths = blue.sum(axis=1)
    upper, lower = (part[part > 0] for part in np.split(lengths, [len(lengths) // 2]))
    assert np.median(upper) == pytest.approx(2 * np.median(lower), rel=0.03)


@pytest.mark.slow
def test_stages_of_predict_beside_the_libraries() -> None:
    figures = predict.bench_predict(repeats=1)
    assert figures["cells"] > 50
    assert sum(figures["share"].values()) == pytest.approx(1, abs=0.01)
    assert {"network", "watershed", "scores", "cells.csv", "coco.json", "labels", "masks", "overlays"} < set(
        figures["share"]
    )
    assert len(figures["ratio"]) == 5


def test_start_is_read_from_what_train_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    told = "x\nfirst step after 9.3 s: imports 2.0, Ray 4.1, first batch and step 3.2\nstep 3/3  epoch 1  loss 1.2\n"
    monkeypatch.setattr(startup, "_timed", lambda *words: (12.0, told))
    seconds, parts = startup._train(Path("x"), 0)
    assert seconds == 9.3
    assert parts == {"imports": 2.0, "Ray": 4.1, "first batch and step": 3.2}


def test_scale_takes_no_cluster_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(UserError, match="unset RAY_ADDRESS"):
        scale.bench_scale()


@pytest.mark.slow
def test_steps_by_each_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    from raylivecell.bench import step

    monkeypatch.setattr(step, "PART", 1)
    monkeypatch.setattr(step, "CROP", (32, 32))
    monkeypatch.setattr(step, "SIDES", {"cpu": 64})
    monkeypatch.setattr(step, "CPU_BATCHES", (2,))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model: None)  # compiling takes 15 s
    figures = step.bench_step(repeats=1)
    speeds, shares = figures["images_per_s"], figures["share_of_peak"]
    assert set(speeds) == set(shares)
    assert len(speeds) == 9
    ours, peak = speeds["raylivecell"]["median"], 1000 * figures["peak_tflops"]["float32"]
    assert shares["raylivecell"]["median"] == pytest.approx(ours * figures["gflop_an_image"] / peak)
    assert 0 < figures["loss_off"] < 0.05


def test_operations_of_the_paper_s_network() -> None:
    from raylivecell.bench import step
    from raylivecell.recipe import Recipe

    tiny = Recipe(model=ModelConfig(features=(4,)))
    h, w = step.CROP
    # Each convolution once forward and twice backward, but not for the gradient of the image.
    inside = [(1, 4, 9, 1), (4, 4, 9, 1), (4, 8, 9, 4), (8, 8, 9, 4), (8, 4, 4, 4), (8, 4, 9, 1), (4, 4, 9, 1)]
    forward = [2 * a * b * taps * h * w / part for a, b, taps, part in [*inside, (4, 1, 1, 1)]]
    counted = step.flop_an_image(tiny, torch.device("cpu"))
    assert counted == pytest.approx(3 * sum(forward) - forward[0], rel=1e-6)


@pytest.mark.slow
def test_training_with_and_without_ray(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from raylivecell.bench import step, train

    monkeypatch.setattr(train, "RUN_PART", 2)
    monkeypatch.setattr(step, "PART", 1)
    monkeypatch.setattr(train, "LOADER_WARM_UP", 2)
    monkeypatch.setattr(train, "LOADER_BATCHES", 4)
    figures: dict[str, Any] = train.bench_train(images=4, repeats=1)
    assert len(figures["images_per_s"]) == 8
    assert all(one["median"] > 0 for one in figures["images_per_s"].values())
    assert 0 <= figures["data_wait_fraction"]["median"] <= 1
    assert 0 <= figures["ray_train_cpu_share"]["median"] <= 1
    assert len(figures["ratio"]) == 5
