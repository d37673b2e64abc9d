"""What a GPU computes, and that nothing waits for it within a step. Skipped without one."""

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from raylivecell.bench import step as bench_step
from raylivecell.ingest import gpu_augment
from raylivecell.ingest.order import SampleSchedule
from raylivecell.network import forward
from raylivecell.network.transfer import DeviceTransfer
from raylivecell.recipe import AugmentConfig, LoopConfig, LossConfig, ModelConfig, PhaseConfig, Recipe
from raylivecell.training import loop

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
STEPS = 12
RECIPE = Recipe(model=ModelConfig(features=(16, 32)), batch_size=4)


@pytest.fixture
def gpu() -> torch.device:
    return torch.device("cuda")


def test_batches_arrive_whole_while_it_computes(gpu: torch.device) -> None:
    send, work = DeviceTransfer(gpu), torch.randn(4096, 4096, device=gpu)
    batches = [torch.randint(0, 256, (4, 3, 300, 300), dtype=torch.uint8) for _ in range(20)]
    sums = []
    for batch in batches:
        work = torch.tanh(work @ work)  # keeps it behind this process
        sums.append(send(batch).long().sum() + 0 * work[0, 0].long())
    assert [int(one) for one in sums] == [int(batch.long().sum()) for batch in batches]


def test_no_step_waits_for_it(gpu: torch.device) -> None:
    planes = bench_step.random_planes(4)
    plan = SampleSchedule(0, 4, 4, (PhaseConfig(steps=STEPS),))

    def on_step(step: int, images_per_s: float) -> None:
        torch.cuda.set_sync_debug_mode("error" if 2 <= step < STEPS - 1 else "default")

    training = loop.start(forward.build(RECIPE, gpu), RECIPE.optimizer, plan.steps)
    batches = itertools.repeat({"planes": planes})
    try:
        for _ in loop.run(
            training,
            training.model,
            batches,
            plan,
            LoopConfig(report_steps=STEPS),
            LossConfig(),
            "foreground",
            lambda network: {},
            on_step,
        ):
            pass
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert training.state.step == STEPS


def test_bfloat16_learns_as_float32(gpu: torch.device) -> None:
    assert bench_step.loss_off(bench_step.recipe(gpu), gpu) < 1e-2


def test_augment_on_it_as_on_torch_s_cpu(gpu: torch.device) -> None:
    planes = bench_step.random_planes(5).numpy()
    plan = SampleSchedule(3, 5, 5, (PhaseConfig(epochs=1, augmented_copies=1),))
    config = AugmentConfig(device="cuda")

    def frames() -> Iterator[dict[str, torch.Tensor]]:
        for step in range(plan.steps):
            rows = plan.rows(step)
            yield {"planes": torch.from_numpy(planes[rows[:, 1]]), "rows": torch.from_numpy(rows)}

    here, there = (gpu_augment.batches(frames(), plan, config, (200, 180), one) for one in (torch.device("cpu"), gpu))
    for a, b in zip(here, there):
        off = np.abs(a["planes"].numpy().astype(int) - b["planes"].cpu().numpy())
        assert (off > 1).mean() < 0.01
