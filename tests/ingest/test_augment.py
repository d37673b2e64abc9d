import itertools
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from raylivecell.ingest.augment import RandomParameters, augment, augment_planes, random_crop, random_crop_planes
from raylivecell.recipe import AugmentConfig
from raylivecell.targets import sample_planes

SIZES = [(520, 704), (333, 434), (97, 61), (16, 200)]


def config(**fields: Any) -> AugmentConfig:
    """A configuration with only the transforms in `fields`."""
    disabled = {"elastic": {"p": 0}, "rotation": {"p": 0}, "flip": 0, "brightness": 0, "contrast": 0}
    return AugmentConfig.model_validate(disabled | fields)


def rng(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


def frozen(array: np.ndarray) -> np.ndarray:
    array.setflags(write=False)
    return array


def cells(shape: tuple[int, int], seed: int = 0, count: int = 30) -> np.ndarray:
    random, labels = rng(seed), np.zeros(shape, np.uint16)
    y, x = np.mgrid[: shape[0], : shape[1]]
    for k in range(1, count + 1):
        cy, cx, radius = random.uniform(0, shape[0]), random.uniform(0, shape[1]), random.uniform(3, 20)
        labels[(y - cy) ** 2 + (x - cx) ** 2 < radius**2] = k
    return frozen(labels)


def noise(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return frozen(rng(seed).integers(0, 256, shape, np.uint8))


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("size", [None, (33, 47), (61, 61)])
def test_augment_is_a_function_of_its_rng_and_does_not_modify_its_input(
    shape: tuple[int, int], size: tuple[int, int] | None
) -> None:
    image, planes = noise(shape), noise((*shape, 2), 1)
    first = augment(image, planes, rng(1, 2), AugmentConfig(), size)
    augment(noise((50, 60)), planes[:50, :60], rng(7), AugmentConfig())  # reuses the buffers
    again = augment(image, planes, rng(1, 2), AugmentConfig(), size)
    other = augment(image, planes, rng(1, 3), AugmentConfig(), size)
    for a, b, c in zip(first, again, other):
        np.testing.assert_array_equal(a, b)
        assert (a != c).mean() > 0.5
        assert a.flags.c_contiguous
        assert a.dtype == np.uint8
        assert a.shape[:2] == (size or shape)
    assert first[1].shape[2] == 2


def test_the_next_sample_does_not_change_earlier_results() -> None:
    image, labels = noise((200, 300)), cells((200, 300))
    result = augment(image, labels, rng(1), AugmentConfig())
    copies = [array.copy() for array in result]
    augment(image, labels, rng(2), AugmentConfig())
    random_crop(image, labels, rng(2))[0][:] = 0
    for a, b in zip(result, copies):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
@pytest.mark.parametrize("border", ["reflect", "constant"])
def test_no_new_label_is_created(dtype: type, border: str) -> None:
    labels = (cells((211, 180)) * (1 if dtype == np.uint8 else 2000)).astype(dtype)
    for seed in range(5):
        _, warped = augment(noise(labels.shape), labels, rng(seed), AugmentConfig(border=border), (150, 170))
        assert warped.dtype == dtype
        assert warped.shape == (150, 170)
        assert set(np.unique(warped)) <= set(np.unique(labels))
        assert len(np.unique(warped)) > 10


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_planes_are_warped_like_a_label_image(channels: int) -> None:
    labels = cells((120, 131)).astype(np.uint8)
    planes = frozen(np.stack([labels + 50 * c for c in range(channels)], axis=2))
    strided = frozen(np.stack([labels + 50 * c for c in range(channels)])).transpose(1, 2, 0)
    image = noise(labels.shape)
    for seed in range(4):
        _, expected = augment(image, labels, rng(seed), AugmentConfig(), (90, 101))
        for targets in (planes, strided):
            _, warped = augment(image, targets, rng(seed), AugmentConfig(), (90, 101))
            for c in range(channels):
                np.testing.assert_array_equal(warped[..., c], expected + 50 * c)


def test_zero_strength_is_a_random_crop() -> None:
    image, labels = noise((101, 90)), cells((101, 90))
    corners = set()
    for seed in range(40):
        zero_strength = config(elastic={"p": 1, "alpha_x": 0, "alpha_y": 0}, rotation={"p": 1, "degrees": 0})
        result = augment(image, labels, rng(seed), zero_strength, (50, 31))
        crop = random_crop(image, labels, rng(seed), (50, 31))  # also draws the crop's top and left first
        for a, b in zip(result, crop):
            np.testing.assert_array_equal(a, b)
        windows = np.lib.stride_tricks.sliding_window_view(image, (50, 31))
        matches = np.argwhere((windows == result[0]).all(axis=(2, 3)))
        assert len(matches) == 1
        top, left = matches[0]
        np.testing.assert_array_equal(result[1], labels[top : top + 50, left : left + 31])
        corners.add((int(top), int(left)))
    assert len(corners) > 30
    assert min(corner[0] for corner in corners) < 10 < 40 < max(corner[0] for corner in corners)


def test_flips_are_exact() -> None:
    image, labels = noise((65, 80)), cells((65, 80))
    seen = set()
    for seed in range(30):
        flipped = augment(image, labels, rng(seed), config(flip=0.5))
        for y, x in itertools.product((1, -1), repeat=2):
            if np.array_equal(flipped[0], image[::y, ::x]):
                np.testing.assert_array_equal(flipped[1], labels[::y, ::x])
                seen.add((y, x))
    assert len(seen) == 4


class Angle(np.random.Generator):
    """Random generator that draws 0 except for the angle: the fraction `turn` of the range from -degrees to degrees."""

    def __init__(self, turn: float) -> None:
        super().__init__(np.random.PCG64(0))
        self.turn = turn

    def random(self, size: Any = None, dtype: Any = np.float64, out: Any = None) -> Any:
        draws = np.zeros(size, dtype)
        draws[4] = self.turn
        return draws


@pytest.mark.parametrize("side", [64, 65, 333])
@pytest.mark.parametrize("flip", [0, 1])
@pytest.mark.parametrize(("turn", "quarters"), [(0.0, -2), (0.25, -1), (0.5, 0), (0.75, 1)])
def test_quarter_turns_are_exact(side: int, flip: int, turn: float, quarters: int) -> None:
    image, labels = noise((side, side)), cells((side, side))
    rotated = augment(image, labels, Angle(turn), config(rotation={"p": 1, "degrees": 180}, flip=flip))
    for result, source in zip(rotated, (image, labels)):
        expected = np.rot90(source, quarters)
        np.testing.assert_array_equal(result, expected[::-1, ::-1] if flip else expected)


def test_a_positive_angle_rotates_as_in_opencv() -> None:
    image, labels = cv2.GaussianBlur(noise((150, 200)), (0, 0), 3), cells((150, 200))
    matrix = cv2.getRotationMatrix2D((99.5, 74.5), 27, 1)
    expected = cv2.warpAffine(image, matrix, (200, 150), borderMode=cv2.BORDER_REFLECT_101)
    rotated, _ = augment(image, labels, Angle(0.5 + 27 / 360), config(rotation={"p": 1, "degrees": 180}))
    assert np.abs(rotated.astype(int) - expected).max() <= 2


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("border", ["reflect", "constant"])
@pytest.mark.parametrize("sigma", [2.0, 10.0])
def test_image_and_targets_stay_aligned_to_the_pixel(shape: tuple[int, int], border: str, sigma: float) -> None:
    """The image is its own foreground: both must agree where the four interpolated pixels agree."""
    foreground = (cells(shape, count=60) > 0).astype(np.uint8)
    image = frozen(55 + 145 * foreground)
    strong = {"p": 1, "alpha_x": 20 * sigma, "alpha_y": 35 * sigma, "sigma": sigma}
    for seed in range(6):
        warped, mask = augment(
            image, foreground, rng(seed), config(elastic=strong, rotation={"p": 0.5}, flip=0.5, border=border), (80, 60)
        )
        pure = (warped == 55) | (warped == 200)
        assert pure.mean() > 0.5
        np.testing.assert_array_equal(mask[pure], warped[pure] == 200)
        # In bilinear interpolation the nearest pixel has a weight of at least a quarter.
        value = (warped.astype(float) - 55) / 145
        inside = warped != 128 if border == "constant" else np.ones(warped.shape, bool)
        assert (np.abs(value - mask)[inside & (warped >= 55)] <= 0.76).mean() > 0.999


@pytest.mark.parametrize("border", ["reflect", "constant"])
@pytest.mark.parametrize("size", [None, (40, 50), (90, 70)])
def test_the_ignore_region_moves_with_the_image(size: tuple[int, int] | None, border: str) -> None:
    """As labels and as planes, elastic, rotated, enlarged, flipped and cropped: it is where its own image is."""
    shape = (61, 83)
    labels, region = cells(shape).astype(np.uint16), cells(shape, seed=9, count=6) > 0
    image, edges = frozen(np.where(region, 200, 55).astype(np.uint8)), noise(shape)
    foreground = sample_planes.with_ignored((labels > 0).astype(np.uint8), region)
    np.testing.assert_array_equal(foreground == sample_planes.IGNORED, region & (labels == 0))
    strong = config(elastic={"alpha_x": 80, "alpha_y": 80, "sigma": 8}, scale=0.4, border=border)
    for seed in range(5):
        plain, moved = augment(image, region.astype(np.uint8), rng(seed), strong, size)
        warped, packed = augment(image, sample_planes.pack(labels, edges, region), rng(seed), strong, size)
        planes = sample_planes.draw(warped, packed, "foreground")
        _, moved_cells = augment(image, (labels > 0).astype(np.uint8), rng(seed), strong, size)
        np.testing.assert_array_equal(warped, plain)
        np.testing.assert_array_equal(planes[1], np.where(moved_cells > 0, 1, 2 * moved))
        np.testing.assert_array_equal(planes[2], augment(image, edges, rng(seed), strong, size)[1])
        stored = np.stack([image, foreground, edges])
        np.testing.assert_array_equal(augment_planes(stored, rng(seed), strong, size), planes)
        pure = (warped == 55) | (warped == 200)
        np.testing.assert_array_equal(moved[pure], warped[pure] == 200)


def test_alpha_x_displaces_along_x_only() -> None:
    shape = (120, 150)
    rows = frozen(np.repeat(np.arange(120, dtype=np.uint8)[:, None], 150, axis=1))
    columns = frozen(np.repeat(np.arange(150, dtype=np.uint8)[None], 120, axis=0))
    labels = cells(shape)
    along_x = config(elastic={"p": 1, "alpha_x": 300, "alpha_y": 0})
    along_y = config(elastic={"p": 1, "alpha_x": 0, "alpha_y": 300})
    for seed in range(5):
        np.testing.assert_array_equal(augment(rows, labels, rng(seed), along_x)[0], rows)
        np.testing.assert_array_equal(augment(columns, labels, rng(seed), along_y)[0], columns)
        assert (augment(columns, labels, rng(seed), along_x)[0] != columns).mean() > 0.5


def test_the_image_is_displaced_by_the_field() -> None:
    """A ramp image encodes its displacement: image and labels have the same field, of the configured strength."""
    ramp = frozen(np.tile((np.arange(300) % 256).astype(np.uint8), (200, 1)))
    labels = np.tile(np.arange(300, dtype=np.uint16), (200, 1))
    strength = config(elastic={"p": 1, "alpha_x": 300, "alpha_y": 0, "sigma": 8})
    displacements = []
    for seed in range(12):
        image, warped = augment(ramp, labels, rng(seed), strength)
        inner = np.s_[:, 30:220]
        displacements.append((warped.astype(int) - labels)[inner])
        assert np.abs(image.astype(int) - warped)[inner].max() <= 1
    assert np.std(displacements) == pytest.approx(0.1629 * 300 / 8, rel=0.1)


@pytest.mark.parametrize("size", [(64, 80), (101, 111)])
def test_a_crop_is_a_part_of_the_complete_frame(size: tuple[int, int]) -> None:
    shape = (130, 170)
    image, labels = cv2.GaussianBlur(noise(shape), (0, 0), 2), cells(shape)
    for seed in range(4):
        frame, _ = augment(image, labels, rng(seed), config(elastic={"p": 1}, rotation={"p": 1}))
        crop, _ = augment(image, labels, rng(seed), config(elastic={"p": 1}, rotation={"p": 1}), size)
        top, left = (int(u * (n - m + 1)) for u, n, m in zip(rng(seed).random(2), shape, size))
        expected = frame[top : top + size[0], left : left + size[1]].astype(int)
        assert np.abs(crop - expected).mean() < 1  # not equal: the control points differ
        assert np.corrcoef(crop.ravel(), expected.ravel())[0, 1] > 0.99


@pytest.mark.parametrize("shape", [(20, 31), (40, 300), (1, 1), (5, 500)])
def test_small_images_are_padded_by_reflection(shape: tuple[int, int]) -> None:
    image, labels = noise(shape), noise(shape, 1).astype(np.uint16)
    size = (64, 96)
    padded = random_crop(image, labels, rng(1), size)
    for array, source in zip(padded, (image, labels)):
        assert array.shape == size
        assert set(np.unique(array)) <= set(np.unique(source))
    image_out, labels_out = augment(image, labels, rng(3), AugmentConfig(), size)
    assert image_out.shape == labels_out.shape == size
    assert set(np.unique(labels_out)) <= set(np.unique(labels))
    if shape == (20, 31):
        np.testing.assert_array_equal(padded[0][22:42, 32:63], image)
        np.testing.assert_array_equal(padded[0][21, 32:63], image[1])


@pytest.mark.parametrize("size", [None, (90, 101), (150, 400)])
def test_planes_are_sampled_at_the_same_positions_as_the_image(size: tuple[int, int] | None) -> None:
    planes = noise((3, 141, 160))
    targets = planes[1:].transpose(1, 2, 0)
    for seed in range(6):
        for result, image_and_targets in (
            (
                augment_planes(planes, rng(seed), AugmentConfig(), size),
                augment(planes[0], targets, rng(seed), AugmentConfig(), size),
            ),
            (random_crop_planes(planes, rng(seed), size), random_crop(planes[0], targets, rng(seed), size)),
        ):
            image, masks = image_and_targets
            np.testing.assert_array_equal(result, np.concatenate([image[None], masks.transpose(2, 0, 1)]))
    batch = np.zeros((2, 3, *(size or (141, 160))), np.uint8)
    out = augment_planes(planes, rng(0), AugmentConfig(), size, out=batch[1])
    assert out is not batch
    np.testing.assert_array_equal(batch[1], augment_planes(planes, rng(0), AugmentConfig(), size))
    assert batch[1].any()
    assert not batch[0].any()
    random_crop_planes(planes, rng(0), size, out=batch[0])
    np.testing.assert_array_equal(batch[0], random_crop_planes(planes, rng(0), size))


def test_brightness_and_contrast_stay_in_their_range() -> None:
    image = frozen(np.tile(np.arange(256, dtype=np.uint8), (20, 1)))
    labels = cells(image.shape)
    shifts, slopes = [], []
    for seed in range(200):
        recoloured, unchanged = augment(image, labels, rng(seed), config(brightness=12, contrast=0.25))
        np.testing.assert_array_equal(unchanged, labels)
        assert (np.diff(recoloured.astype(int), axis=1) >= 0).all()
        shifts.append(int(recoloured[0, 128]) - 128)
        slopes.append((int(recoloured[0, 168]) - int(recoloured[0, 88])) / 80)
    assert -12 <= min(shifts) < -9 < 9 < max(shifts) <= 12
    assert 1 / 1.27 < min(slopes) < 0.85 < 1.18 < max(slopes) < 1.27


def test_a_setting_does_not_change_the_other_random_parameters() -> None:
    image, labels = noise((120, 130)), cells((120, 130))
    for seed in range(5):
        first = augment(image, labels, rng(seed), config(flip=0.5, rotation={"p": 1}), (64, 64))
        second = augment(image, labels, rng(seed), config(flip=0.5, rotation={"p": 1}, brightness=20), (64, 64))
        np.testing.assert_array_equal(first[1], second[1])


@given(st.sampled_from([None, (64, 80), (119, 149)]), st.floats(0.1, 3), st.booleans(), st.integers(0, 99))
@settings(max_examples=60)
def test_a_zoomed_crop_is_an_evenly_scaled_part_of_the_image(
    size: tuple[int, int] | None, strength: float, rotated: bool, seed: int
) -> None:
    """The targets are their own coordinates: distances are divided by the zoom, and nothing outside is shown."""
    shape = (120, 150)
    coordinates = np.arange(120 * 150, dtype=np.int32).reshape(shape)
    rotation = {"p": float(rotated), "degrees": 0}  # a map without rotation
    _, sources = augment(noise(shape), coordinates, rng(seed), config(scale=strength, rotation=rotation), size)
    y, x = np.divmod(sources, 150)
    zoom = (1 + strength) ** (2 * rng(seed).random(16)[9] - 1)
    for values, length, full in zip((y, x.T), size or shape, shape):
        lines = values.astype(float)
        assert (lines == lines[:, :1]).all()  # neither rotated nor sheared
        if length / zoom > full:
            middle = lines[abs(np.arange(length) - (length - 1) / 2) < full * zoom / 2 - 1, 0]
            assert (middle[0], middle[-1]) == pytest.approx((0, full - 1), abs=1 + 2 / zoom)  # all of the image
        else:
            middle = lines[:, 0]
        assert np.diff(middle).min() >= 0  # no reflection
        assert middle[-1] - middle[0] == pytest.approx((len(middle) - 1) / zoom, abs=1.01)


def test_zoomed_crops_reach_all_edges_of_the_image() -> None:
    coordinates = np.arange(120 * 150, dtype=np.int32).reshape(120, 150)
    results = [augment(noise((120, 150)), coordinates, rng(s), config(scale=1.0), (60, 70))[1] for s in range(900)]
    zooms = [(result // 150).max() - (result // 150).min() for result in results]
    assert min(zooms) < 33 < 110 < max(zooms)  # 60 / 2 to 60 * 2, at most 119
    seen = np.bincount(np.concatenate([result.ravel() for result in results]), minlength=coordinates.size)
    assert (seen.reshape(40, 3, 50, 3).sum((1, 3)) > 0).all()


def test_gamma_curves_around_the_background() -> None:
    image = frozen(np.tile(np.arange(256, dtype=np.uint8), (20, 1)))
    bends = []
    for seed in range(100):
        curved = augment(image, cells(image.shape), rng(seed), config(gamma=0.5), background=100)[0][0].astype(int)
        assert (np.diff(curved) >= 0).all()
        assert curved[100] == 100
        assert curved[110] - curved[90] == pytest.approx(20, abs=2)
        bends.append((curved[180] - 100) / 80)
    assert min(bends) < 0.93 < 1.07 < max(bends)


@given(st.integers(0, 999), st.booleans(), st.floats(1, 40), st.floats(1, 40))
def test_noise_and_shading_have_the_stated_strength(seed: int, deformed: bool, noise: float, shading: float) -> None:
    image, labels = np.full((140, 160), 128, np.uint8), cells((140, 160))
    elastic = {"p": float(deformed)}
    noisy, moved = augment(image, labels, rng(seed), config(noise=noise, elastic=elastic))
    uneven, _ = augment(image, labels, rng(seed), config(shading=shading))
    both, _ = augment(image, labels, rng(seed), config(noise=noise, shading=shading, elastic=elastic))
    draws = RandomParameters.draw(rng(seed))
    # Noise below 0.15 levels is rounded away, with it the 0.29 of rounding.
    assert noisy.std() == pytest.approx(np.hypot(draws.noise * noise, 0.29), rel=0.05, abs=0.35)
    # Smooth: the slope of the second cosine over 140 pixels, with amplitudes beyond three sigma improbable.
    assert np.abs(np.diff(uneven.astype(int), axis=0)).max() <= 1 + shading / 4
    assert uneven.std() < 3 * shading
    inside = np.all([(result > 0) & (result < 255) for result in (noisy, uneven, both)], axis=0)
    assert np.abs(both.astype(int) - noisy - uneven + 128)[inside].max(initial=0) <= 1  # each is rounded once
    np.testing.assert_array_equal(moved, augment(image, labels, rng(seed), config(elastic=elastic))[1])


def test_blur_lowers_the_contrast_of_edges_but_not_the_mean() -> None:
    image, labels = noise((120, 130)), cells((120, 130))
    results = [augment(image, labels, rng(seed), config(blur=2)) for seed in range(20)]
    deviations = [blurred.std() for blurred, _ in results]
    assert min(deviations) < 15 < 60 < max(deviations)
    for blurred, unchanged in results:
        assert blurred.mean() == pytest.approx(image.mean(), abs=1)
        np.testing.assert_array_equal(unchanged, labels)


@pytest.mark.parametrize("fields", [{"elastic": {"sigma": 0.5}}, {"flip": 1.5}, {"elastik": {}}, {"border": "wrap"}])
def test_invalid_fields_are_rejected(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        AugmentConfig.model_validate(fields)
