"""`bench`: each figure compared with its baseline in the same run."""

import importlib
import inspect
from pathlib import Path
from typing import get_args

import cv2
import numpy as np
import pytest
import torch

from raylivecell.bench import figures, predict, run, scale, startup
from raylivecell.bench.figures import Options
from raylivecell.core import storage
from raylivecell.core.errors import UserError
from raylivecell.recipe import ModelConfig


def test_figures_are_written_printed_and_charted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {
        "images_per_s": {
            name: {"median": m, "min": m / 2, "max": 2 * m} for name, m in (("ours", 30.0), ("other", 9.0))
        },
        "ratio": {"ours / other": {"median": 3.3, "min": 3.0, "max": 4.0}},
    }
    monkeypatch.setattr(run, "_measure", lambda benchmark, options: measured)
    with run.console.capture() as output:
        result = run.bench("feed", tmp_path, 1, 1)
    assert storage.read_json(tmp_path / "bench.json") == result
    assert result["figures"] == measured
    assert result["hardware"]["cores"] > 0
    text = " ".join(output.get().split())
    assert "ours / other" in text
    assert "3.3 (3 to 4)" in text
    chart = cv2.imread(str(tmp_path / "bench.png"))
    assert chart.shape[1] > 600


def test_every_benchmark_is_a_module_with_a_function_bench() -> None:
    for name in get_args(run.Benchmark):
        function = importlib.import_module(f"raylivecell.bench.{name}").bench
        assert next(iter(inspect.signature(function).parameters)) == "options", name


def test_ratios_are_of_values_of_the_same_turn() -> None:
    turns = iter([2.0, 1.0, 12.0, 3.0, 3.0, 1.0])
    values = figures.measure_in_turn({"a": lambda: next(turns), "b": lambda: next(turns)}, 3)
    assert values == {"a": [2.0, 12.0, 3.0], "b": [1.0, 3.0, 1.0]}
    assert figures.ratios(values, [("a", "b")]) == {"a / b": {"median": 3.0, "min": 2.0, "max": 4.0}}


def test_lengths_of_bars_are_proportional_to_medians() -> None:
    bars = {name: {"median": m, "min": m, "max": m} for name, m in (("a", 10.0), ("b", 5.0))}
    png = figures.chart("x", {"seconds": 29.2, "images_per_s": bars})
    chart = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)
    blue = (np.abs(chart.astype(int) - (0xAA, 0x77, 0x44)) < 8).all(axis=2)
    lengths = blue.sum(axis=1)
    upper, lower = (half[half > 0] for half in np.split(lengths, [len(lengths) // 2]))
    assert np.median(upper) == pytest.approx(2 * np.median(lower), rel=0.03)


@pytest.mark.slow
def test_predict_stages_are_compared_with_libraries() -> None:
    result = predict.bench(Options(repeats=1))
    assert result["cells"] > 50
    assert sum(result["share"].values()) == pytest.approx(1, abs=0.01)
    assert {"network", "watershed", "scores", "cells.csv", "coco.json", "labels", "masks", "overlays"} < set(
        result["share"]
    )
    assert len(result["ratio"]) == 5


def test_startup_is_read_from_the_output_of_train(monkeypatch: pytest.MonkeyPatch) -> None:
    output = "x\nfirst step after 9.3 s: imports 2.0, Ray 4.1, first batch and step 3.2\nstep 3/3  epoch 1  loss 1.2\n"
    monkeypatch.setattr(startup, "_run_command", lambda *words: (12.0, output))
    seconds, parts = startup._train(Path("x"), 0)
    assert seconds == 9.3
    assert parts == {"imports": 2.0, "Ray": 4.1, "first batch and step": 3.2}


def test_scale_does_not_join_another_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(UserError, match="unset RAY_ADDRESS"):
        scale.bench(Options())


@pytest.mark.slow
def test_steps_of_each_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    from raylivecell.bench import step

    monkeypatch.setattr(step, "INTERVAL_STEPS", 1)
    monkeypatch.setattr(step, "CROP", (32, 32))
    monkeypatch.setattr(step, "SIDES", {"cpu": 64})
    monkeypatch.setattr(step, "CPU_BATCHES", (2,))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model: None)  # compiling takes 15 s
    result = step.bench(Options(repeats=1))
    speeds, shares = result["images_per_s"], result["share_of_peak"]
    assert set(speeds) == set(shares)
    assert len(speeds) == 9
    ours, peak = speeds["raylivecell"]["median"], 1000 * result["peak_tflops"]["float32"]
    assert shares["raylivecell"]["median"] == pytest.approx(ours * result["gflop_per_image"] / peak)
    assert 0 < result["loss_difference"] < 0.05


def test_operations_per_image_of_a_unet() -> None:
    from raylivecell.bench import step
    from raylivecell.recipe import Recipe

    tiny = Recipe(model=ModelConfig(features=(4,)))
    h, w = step.CROP
    # Each convolution runs once forward and twice backward, except for the gradient of the image. Factors: input and
    # output channels, taps, and the factor by which pooling shrinks the image.
    inner = [(1, 4, 9, 1), (4, 4, 9, 1), (4, 8, 9, 4), (8, 8, 9, 4), (8, 4, 4, 4), (8, 4, 9, 1), (4, 4, 9, 1)]
    forward = [2 * a * b * taps * h * w / factor for a, b, taps, factor in [*inner, (4, 1, 1, 1)]]
    operations = step.flop_per_image(tiny, torch.device("cpu"))
    assert operations == pytest.approx(3 * sum(forward) - forward[0], rel=1e-6)


@pytest.mark.slow
def test_training_with_and_without_ray(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from raylivecell.bench import step, train

    monkeypatch.setattr(train, "RUN_INTERVAL_STEPS", 2)
    monkeypatch.setattr(step, "INTERVAL_STEPS", 1)
    monkeypatch.setattr(train, "LOADER_WARM_UP", 2)
    monkeypatch.setattr(train, "LOADER_BATCHES", 4)
    result = train.bench(Options(repeats=1, images=4))
    assert len(result["images_per_s"]) == 8
    assert all(speed["median"] > 0 for speed in result["images_per_s"].values())
    assert 0 <= result["data_wait_fraction"]["median"] <= 1
    assert 0 <= result["ray_train_cpu_share"]["median"] <= 1
    assert len(result["ratio"]) == 5
