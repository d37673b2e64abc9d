"""What `auto` chooses on each kind of machine, and how far bfloat16 and float32 differ."""

import copy
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from raylivecell.annotations.drawing import border_map
from raylivecell.ingest.order import SampleSchedule
from raylivecell.network.forward import build
from raylivecell.recipe import LoopConfig, ModelConfig, OptimizerConfig, PhaseConfig, Recipe, Targets
from raylivecell.targets import sample_planes
from raylivecell.training import acceleration, loop, preflight
from raylivecell.training.acceleration import COMPILE_STEPS

CPU = torch.device("cpu")
MAX_DIFFERENCE, MEAN_DIFFERENCE = 0.05, 0.005
"""As in the docstring of acceleration.py."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of such small networks wait for each other: 10 times as slow on busy cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def amx(monkeypatch: pytest.MonkeyPatch, present: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": present}, raising=False)


def choose(loop_config: LoopConfig, steps: int = COMPILE_STEPS, **options: object) -> tuple[str, bool]:
    recipe = Recipe(loop=loop_config, model=ModelConfig(name=str(options.pop("network", "unet"))))
    compiler = options.pop("compiler", "g++")
    chosen = acceleration.choose(recipe, CPU, steps, lambda: compiler, **options)  # type: ignore[arg-type,return-value]
    return chosen.precision, chosen.compiled


def planes(targets: Targets) -> torch.Tensor:
    """Four noisy images of bright disks, uint8 (4, 2 + C, 64, 64)."""
    samples = []
    for number in range(4):
        rng = np.random.default_rng(number)
        labels = np.zeros((64, 64), np.uint16)
        for label in range(1, 6):
            cv2.circle(labels, tuple(rng.integers(8, 56, 2).tolist()), int(rng.integers(6, 12)), label, -1)
        image = np.clip(120 + 40 * (labels > 0) + rng.normal(0, 15, labels.shape), 0, 255).astype(np.uint8)
        packed = sample_planes.pack(labels, border_map(labels, 5.0))
        samples.append(sample_planes.draw(image, packed, targets))
    return torch.from_numpy(np.stack(samples))


def train(
    precision: str,
    steps: int,
    targets: Targets = "foreground",
    stop: int | None = None,
    resume: loop.TrainState | None = None,
    on_logits: Callable[[Any], None] = lambda logits: None,
) -> loop.TrainState:
    """Train a small network for `steps`, or until `stop`, or from the state of `resume`."""
    recipe = Recipe(
        batch_size=4,
        phases=(PhaseConfig(steps=steps),),
        targets=targets,
        model=ModelConfig(features=(8, 16, 32), norm="group"),
        optimizer=OptimizerConfig(lr=5e-3),
        loop=LoopConfig(report_steps=stop or steps, precision=precision),  # type: ignore[arg-type]
    )
    schedule = SampleSchedule(0, 4, 4, recipe.phases)
    torch.manual_seed(0)
    state = loop.start(build(recipe, CPU), recipe.optimizer, steps)
    if resume is not None:
        state.load(resume.state_dict(), resume.state)
    state.model.register_forward_hook(lambda module, images, logits: on_logits(logits))
    batches = itertools.repeat({"planes": planes(targets)})
    config = recipe.loop, recipe.loss, targets
    next(loop.run(state, state.model, batches, schedule, *config, validate=lambda network: {}))
    return state


def test_auto_depends_on_amx_length_network_and_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    auto = LoopConfig()
    amx(monkeypatch, present=True)
    assert choose(auto) == ("bfloat16", True)
    assert choose(auto, COMPILE_STEPS - 1) == ("bfloat16", False)
    assert choose(auto, compiler=None) == ("bfloat16", False)
    assert choose(auto, network="BasicUNet") == ("bfloat16", False)
    assert choose(LoopConfig(precision="float32", compile=False)) == ("float32", False)
    assert choose(auto, on_all_ranks=lambda value: False) == ("float32", False), "another rank has no AMX"
    no_compiler = acceleration.choose(Recipe(), CPU, COMPILE_STEPS, lambda: None)
    assert str(no_compiler).startswith(
        "training in bfloat16, not compiled (no C++ compiler or Python headers: install g++"
    )
    amx(monkeypatch, present=False)
    assert choose(auto) == ("float32", False)
    assert choose(LoopConfig(precision="bfloat16", compile=True), steps=1) == ("bfloat16", True)
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert choose(auto) == ("float32", False), "an older torch"


def test_a_compiler_without_pythons_headers_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(preflight.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(preflight.sysconfig, "get_path", lambda name: str(tmp_path))
    assert preflight.find_compiler(gpu=False) is None
    (tmp_path / "Python.h").touch()
    assert preflight.find_compiler(gpu=False)


def test_the_loop_trains_in_the_chosen_precision_and_keeps_float32_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for present in (True, False):
        amx(monkeypatch, present)
        training = train("auto", steps=1, on_logits=lambda logits: seen.append(logits.dtype))
        assert {weight.dtype for weight in training.model.parameters()} == {torch.float32}
    assert seen == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("targets", ["foreground", "distance"])
def test_outputs_of_one_network_in_bfloat16_differ_by_at_most_the_stated_tolerance(
    targets: Targets,
) -> None:
    network = train("float32", steps=40, targets=targets).model.eval()
    probabilities = []
    with torch.no_grad():
        for precision in ("float32", "bfloat16"):
            with acceleration.autocast(precision, CPU):
                probabilities.append(torch.sigmoid(network(planes(targets)[:, :1]).float()))
    difference = (probabilities[0] - probabilities[1]).abs()
    assert probabilities[0].std() > 0.2, "a trained network"
    assert 0 < difference.max() <= MAX_DIFFERENCE
    assert difference.mean() <= MEAN_DIFFERENCE


def test_bfloat16_learns_as_float32_and_a_run_may_resume_in_another_precision() -> None:
    expected = last_loss(train("float32", steps=40))
    assert last_loss(train("bfloat16", steps=40)) == pytest.approx(expected, rel=0.05)
    first = train("bfloat16", steps=40, stop=20)
    resumed = train("float32", steps=40, resume=copy.deepcopy(first))
    assert (first.state.step, resumed.state.step) == (20, 40)
    assert last_loss(resumed) < last_loss(first)


def last_loss(training: loop.TrainState) -> float:
    return float(training.state.history[-1]["loss"])
