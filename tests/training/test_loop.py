"""The training loop without Ray: learning, resuming, averaging, non-finite losses."""

import copy
from collections.abc import Iterator

import pytest
import torch

from raylivecell.ingest.order import SampleSchedule
from raylivecell.network.optimizer import build_optimizer
from raylivecell.network.unet import build_model
from raylivecell.recipe import LoopConfig, LossConfig, ModelConfig, OptimizerConfig, PhaseConfig
from raylivecell.targets.sample_planes import FOREGROUND, IGNORED
from raylivecell.training import loop

SCHEDULE = SampleSchedule(seed=0, samples=6, batch_size=2, phases=(PhaseConfig(epochs=4),))


def images() -> torch.Tensor:
    """Six bright squares on a dark background: uint8 (6, 3, 16, 16)."""
    planes = torch.zeros(6, 3, 16, 16, dtype=torch.uint8)
    planes[:, 0] = 100
    for i in range(6):
        planes[i, :2, 2 + i : 9 + i, 3:12] = torch.tensor([180, 1], dtype=torch.uint8)[:, None, None]
    return planes


def batches(start: int = 0) -> Iterator[dict[str, torch.Tensor]]:
    for step in range(start, SCHEDULE.steps):
        yield {"planes": images()[SCHEDULE.rows(step)[:, 1]]}


def new_state(ema: float = 0.0) -> loop.TrainState:
    torch.manual_seed(0)
    config = OptimizerConfig(lr=1e-2, ema_decay=ema, clip_norm=1.0)
    return loop.start(build_model(ModelConfig(features=(4, 8))), config, SCHEDULE.steps)


def run(
    training: loop.TrainState, batch_iterator: Iterator[dict[str, torch.Tensor]], **options: object
) -> list[loop.TrainState]:
    reports = loop.run(
        training,
        training.model,
        batch_iterator,
        SCHEDULE,
        LoopConfig(),
        LossConfig(),
        "foreground",
        validate=lambda network: {"val_mean_image_dice": 0.5},
        **options,  # type: ignore[arg-type]
    )
    return [copy.deepcopy(report) for report in reports]


def test_loss_falls_and_every_epoch_is_reported() -> None:
    training = new_state()
    assert len(run(training, batches())) == 4
    losses = [row["loss"] for row in training.state.history]
    assert losses[-1] < 0.7 * losses[0]
    assert [row["epoch"] for row in training.state.history] == [1, 2, 3, 4]
    assert all(0 <= row["data_wait_fraction"] <= 1 for row in training.state.history)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_resumed_run_ends_with_the_same_weights(ema: float) -> None:
    uninterrupted = new_state(ema)
    second = run(uninterrupted, batches())[1]
    resumed = new_state(ema)
    resumed.load(second.state_dict(), second.state)
    run(resumed, batches(resumed.state.step))
    for a, b in zip(uninterrupted.network().state_dict().values(), resumed.network().state_dict().values()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_optimizer_steps_equal_those_of_torch_adamw(amsgrad: bool) -> None:
    ours, theirs = (build_model(ModelConfig(features=(4, 8))) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    config = OptimizerConfig(lr=1e-2, betas=(0.8, 0.95), amsgrad=amsgrad)
    mine, _ = build_optimizer(ours, config, SCHEDULE.steps)
    adam = torch.optim.AdamW(theirs.parameters(), 1e-2, (0.8, 0.95), weight_decay=0, amsgrad=amsgrad, fused=True)
    for batch in batches():
        for network, optimizer in ((ours, mine), (theirs, adam)):
            optimizer.zero_grad()
            network(batch["planes"][:, :1].float()).square().mean().backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_run_resumed_from_a_checkpoint_between_reports_ends_with_the_same_weights(ema: float) -> None:
    """Checkpoints are requested at step 5, within an epoch of 3 steps, and at step 3, which is reported anyway."""
    uninterrupted = new_state(ema)
    yielded = run(uninterrupted, batches(), checkpoint_requested=lambda step: step in (3, 5))
    assert [training.state.step for training in yielded] == [3, 5, 6, 9, 12]
    early = yielded[1]
    assert [row["step"] for row in early.state.history] == [3]
    assert [training.state.score() for training in yielded] == [0.5, -1.0, 0.5, 0.5, 0.5], "never the best checkpoint"
    resumed = new_state(ema)
    resumed.load(early.state_dict(), early.state)
    run(resumed, batches(early.state.step))
    for a, b in zip(uninterrupted.network().state_dict().values(), resumed.network().state_dict().values()):
        assert torch.equal(a, b)
    assert [row["step"] for row in resumed.state.history] == [3, 6, 9, 12]


def test_a_network_learns_its_teachers_maps_without_annotations() -> None:
    """All pixels are ignored in the labels; the teacher, a trained network, knows the squares and is not changed."""
    trained = new_state()
    run(trained, batches())
    distillation = loop.Distillation(trained.model.eval(), 0.8)
    trained.optimizer.zero_grad()
    before = {name: value.clone() for name, value in trained.model.state_dict().items()}
    torch.manual_seed(1)
    student = loop.start(build_model(ModelConfig(features=(6, 12))), OptimizerConfig(lr=1e-2), SCHEDULE.steps)

    def without_labels() -> Iterator[dict[str, torch.Tensor]]:
        for batch in batches():
            batch["planes"][:, FOREGROUND] = IGNORED
            yield batch

    run(student, without_labels(), distillation=distillation)
    losses = [row["teacher_loss"] for row in student.state.history]
    assert [0.8 * loss for loss in losses] == pytest.approx([row["loss"] for row in student.state.history])
    assert {row["bce"] for row in student.state.history} == {0.0}
    assert losses[-1] < 0.8 * losses[0]
    pixels = images()[:, :1].float()
    square = student.model.eval()(pixels)[images()[:, 1:2] == 1].mean()
    assert square > student.model(pixels)[images()[:, 1:2] == 0].mean() + 1
    assert all(torch.equal(value, before[name]) for name, value in trained.model.state_dict().items())
    assert all(weight.grad is None for weight in trained.model.parameters()), "no gradient reaches the teacher"
    assert all("teacher_loss" not in row for row in trained.state.history)


def test_averaged_weights_lag_behind_the_weights() -> None:
    training = new_state(0.999)
    first = copy.deepcopy(training.model.state_dict())
    run(training, batches())
    name = "head.weight"
    distance = (training.model.state_dict()[name] - first[name]).norm()
    assert (training.network().state_dict()[name] - first[name]).norm() < 0.2 * distance


def test_a_non_finite_loss_stops_the_run_and_names_the_samples_of_the_batch() -> None:
    training = new_state()

    def batches_with_nan_weights() -> Iterator[dict[str, torch.Tensor]]:
        for step, batch in enumerate(batches()):
            if step == 4:
                with torch.no_grad():
                    training.model.head.bias.fill_(float("nan"))  # type: ignore[union-attr]
            yield batch

    with pytest.raises(loop.NonFiniteLoss) as caught:
        run(training, batches_with_nan_weights())
    assert caught.value.step == 4
    assert caught.value.samples == sorted(SCHEDULE.rows(4)[:, 1].tolist())


def test_a_non_finite_loss_on_another_rank_stops_this_rank_at_the_same_step() -> None:
    calls = []

    def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
        calls.append(values)
        return values + 1.0 if len(calls) == 3 else values

    with pytest.raises(loop.NonFiniteLoss) as caught:
        run(new_state(), batches(), sum_over_ranks=sum_over_ranks)
    assert caught.value.step == 2
