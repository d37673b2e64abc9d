"""Augmentation on a torch device: the same warps of the same samples as on the CPU, to within rounding."""

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raylivecell.data import shards
from raylivecell.ingest import augment, blocks, gpu_augment
from raylivecell.ingest.order import SampleSchedule
from raylivecell.recipe import AugmentConfig, PhaseConfig, Recipe

CPU = torch.device("cpu")
configs = st.builds(
    AugmentConfig.model_validate,
    st.fixed_dictionaries(
        {
            "elastic": st.fixed_dictionaries(
                {
                    "p": st.sampled_from([0.0, 0.5, 1.0]),
                    "alpha_x": st.floats(0, 200),
                    "alpha_y": st.floats(0, 200),
                    "sigma": st.floats(1, 15),
                }
            ),
            "rotation": st.fixed_dictionaries({"p": st.sampled_from([0.0, 0.5, 1.0])}),
            "scale": st.sampled_from([0.0, 0.4, 1.0]),
            "gamma": st.sampled_from([0.0, 0.5]),
            "border": st.sampled_from(["reflect", "constant"]),
        }
    ),
)


def frame(seed: int, height: int, width: int) -> np.ndarray:
    """A smooth image and two masks of blobs; the foreground has ignored pixels too."""
    rng = np.random.default_rng(seed)
    smooth = [cv2.GaussianBlur(rng.random((height, width), np.float32), (0, 0), 4) for _ in range(3)]
    image, foreground, border = [(plane - plane.min()) / np.ptp(plane) for plane in smooth]
    classes = np.where(foreground > 0.5, 1, 2 * (border > 0.6))
    return np.stack([255 * image, classes, 255 * border]).astype(np.uint8)


def on_cpu_and_torch(
    planes: np.ndarray, key: tuple[int, ...], config: AugmentConfig, size: tuple[int, int] | None
) -> list[np.ndarray]:
    """The same crop computed by `augment` and by `gpu_augment`."""
    from_cpu = augment.augment_planes(planes, np.random.default_rng(key), config, size)
    warp = augment.warp_of(planes.shape[1:], np.random.default_rng(key), config, size, augmented=True)
    batch = gpu_augment.apply_warp(torch.from_numpy(planes)[None], *gpu_augment.stack_warps([warp]), config, size)
    return [from_cpu, batch[0].numpy()]


@settings(max_examples=60)
@given(configs, st.integers(0, 9), st.sampled_from([None, (40, 64), (61, 77)]))
def test_pixels_are_equal_to_within_rounding(config: AugmentConfig, seed: int, size: tuple[int, int] | None) -> None:
    planes = frame(seed, 61, 77)
    expected, result = on_cpu_and_torch(planes, (seed, 1), config, size)
    assert result.shape == expected.shape
    error = np.abs(result[0].astype(int) - expected[0])
    assert np.quantile(error, 0.98) <= 2  # OpenCV rounds positions to 1/32 pixel
    assert error.mean() < 0.5
    assert (result[1] != expected[1]).mean() < 0.05  # ties between two nearest pixels
    assert set(np.unique(result[1])) <= {0, 1, 2}


def test_flips_and_quarter_turns_are_exact() -> None:
    planes = frame(0, 64, 64)
    config = AugmentConfig.model_validate({"elastic": {"p": 0}, "rotation": {"p": 0}, "flip": 1})
    expected, result = on_cpu_and_torch(planes, (3,), config, None)
    np.testing.assert_array_equal(result, expected)


def test_batches_contain_the_scheduled_originals_and_augmented_copies() -> None:
    frames = [frame(i, 50, 60) for i in range(5)]
    schedule = SampleSchedule(7, 5, 4, (PhaseConfig(epochs=2, augmented_copies=1),))
    config, size = AugmentConfig(device="cuda"), (64, 40)  # larger than the images, which are padded
    source = blocks.Source([shards.Row("memory", i) for i in range(5)], schedule, config, size, (50, 60))
    rows = [schedule.rows(step) for step in range(schedule.steps)]
    frame_batches = (
        {"planes": torch.from_numpy(np.stack([frames[i] for i in r[:, 1]])), "rows": torch.from_numpy(r)} for r in rows
    )
    batches = list(gpu_augment.batches(frame_batches, schedule, config, size, CPU))
    assert len(batches) == schedule.steps
    on_cpu = source.config.model_copy(update={"device": "cpu"})
    for batch, row in zip(batches, rows):
        for result, (epoch, sample, variant) in zip(batch["planes"].numpy(), row.tolist()):
            rng = np.random.default_rng((7, epoch, sample, variant))
            if variant:
                expected = augment.augment_planes(frames[sample], rng, on_cpu, size)
                assert np.abs(result[0].astype(int) - expected[0]).mean() < 0.5
            else:
                np.testing.assert_array_equal(result, augment.random_crop_planes(frames[sample], rng, size))


def test_data_tasks_return_complete_frames_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [frame(i, 50, 60) for i in range(3)]
    monkeypatch.setattr(blocks, "read_sample", lambda row, cells: frames[row.group])
    schedule = SampleSchedule(0, 3, 3, (PhaseConfig(epochs=1),))
    source = blocks.Source(
        [shards.Row("", i) for i in range(3)], schedule, AugmentConfig(device="cuda"), (20, 20), (50, 60)
    )
    rows = schedule.rows(0)
    np.testing.assert_array_equal(blocks.load(rows, source), np.stack([frames[i] for i in rows[:, 1]]))


def test_distance_targets_cannot_be_augmented_on_a_gpu() -> None:
    with pytest.raises(ValueError, match=r"augment\.device"):
        Recipe(targets="distance", augment=AugmentConfig(device="cuda"))
