"""Training on a GPU: equal results, and no synchronisation within a step. Skipped without a GPU."""

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


def test_batches_arrive_unchanged_while_the_gpu_computes(gpu: torch.device) -> None:
    send, activations = DeviceTransfer(gpu), torch.randn(4096, 4096, device=gpu)
    batches = [torch.randint(0, 256, (4, 3, 300, 300), dtype=torch.uint8) for _ in range(20)]
    sums = []
    for batch in batches:
        activations = torch.tanh(activations @ activations)  # keeps the GPU busy, so that it lags behind this process
        sums.append(send(batch).long().sum() + 0 * activations[0, 0].long())
    assert [int(total) for total in sums] == [int(batch.long().sum()) for batch in batches]


def test_no_step_synchronises_with_the_gpu(gpu: torch.device) -> None:
    planes = bench_step.random_planes(4)
    schedule = SampleSchedule(0, 4, 4, (PhaseConfig(steps=STEPS),))

    def on_step(step: int, images_per_s: float) -> None:
        torch.cuda.set_sync_debug_mode("error" if 2 <= step < STEPS - 1 else "default")

    training = loop.start(forward.build(RECIPE, gpu), RECIPE.optimizer, schedule.steps)
    batches = itertools.repeat({"planes": planes})
    try:
        for _ in loop.run(
            training,
            training.model,
            batches,
            schedule,
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


def test_bfloat16_training_loss_equals_float32_within_one_percent(gpu: torch.device) -> None:
    assert bench_step.loss_difference(bench_step.recipe(gpu), gpu) < 1e-2


def test_a_compiled_network_equals_itself_uncompiled(gpu: torch.device) -> None:
    # 70 and 102 are halved to odd sizes, so that the upsampled maps are cropped.
    torch.manual_seed(0)
    network = forward.build(RECIPE, gpu).eval()
    image = torch.rand(2, 1, 70, 102, device=gpu) * 255
    with torch.no_grad():
        expected = network(image)
        network.compile()
        # TF32 and another order of sums: 0.003 in probability on an H200
        torch.testing.assert_close(network(image).sigmoid(), expected.sigmoid(), rtol=0, atol=0.01)


def test_gpu_augmentation_equals_cpu_augmentation(gpu: torch.device) -> None:
    planes = bench_step.random_planes(5).numpy()
    schedule = SampleSchedule(3, 5, 5, (PhaseConfig(epochs=1, augmented_copies=1),))
    config = AugmentConfig(device="cuda")

    def frames() -> Iterator[dict[str, torch.Tensor]]:
        for step in range(schedule.steps):
            rows = schedule.rows(step)
            yield {"planes": torch.from_numpy(planes[rows[:, 1]]), "rows": torch.from_numpy(rows)}

    on_cpu, on_gpu = (
        gpu_augment.batches(frames(), schedule, config, (200, 180), device) for device in (torch.device("cpu"), gpu)
    )
    for a, b in zip(on_cpu, on_gpu):
        difference = np.abs(a["planes"].numpy().astype(int) - b["planes"].cpu().numpy())
        assert (difference > 1).mean() < 0.01
