"""Kinds of intensity rules: `as_is` multiplies by powers of two only, `percentile` removes gain and offset."""

from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raylivecell.data.config import PrepareConfig
from raylivecell.images import intensity
from raylivecell.images.grey_levels import Measures, measure, padding_mask
from raylivecell.images.intensity import Intensity, choose, conversion, to_uint8


def phase_contrast(seed: int) -> np.ndarray:
    """Simulate an image, float32 (120, 160): noise on a background of 128, grey cells with bright rims."""
    rng = np.random.default_rng(seed)
    image = np.full((120, 160), 128, np.float32)
    for _ in range(9):
        centre = (int(rng.integers(160)), int(rng.integers(120)))
        cv2.circle(image, centre, 11, 183, 3)
        cv2.circle(image, centre, 9, 103, -1)
    image = cv2.GaussianBlur(image, (0, 0), 1) + rng.normal(0, 1.5, image.shape).astype(np.float32)
    return np.clip(image, 1, 254)


def fluorescence(seed: int) -> np.ndarray:
    """Simulate an image, float32 (120, 160): bright cells on a dark background."""
    rng = np.random.default_rng(seed)
    image = np.full((120, 160), 6, np.float32)
    for _ in range(9):
        cv2.circle(image, (int(rng.integers(160)), int(rng.integers(120))), 9, float(rng.uniform(60, 200)), -1)
    return np.clip(cv2.GaussianBlur(image, (0, 0), 1) + rng.normal(0, 0.5, image.shape), 1, 254).astype(np.float32)


def measures_of(image: np.ndarray) -> Measures:
    return measure(image, padding_mask(image))


PERCENTILE = choose([], "percentile")
FRAMES = [np.rint(phase_contrast(seed)).astype(np.uint8) for seed in range(6)]


@given(st.sampled_from([phase_contrast(0), fluorescence(1)]), st.floats(20, 240), st.floats(0, 4000))
@settings(max_examples=30, deadline=None)
def test_percentile_removes_gain_and_offset(image: np.ndarray, gain: float, offset: float) -> None:
    """The same field by two cameras has the same grey levels to within rounding."""
    reference = to_uint8(np.rint(image * 257).astype(np.uint16), PERCENTILE)
    stored = np.rint(image * gain + offset).astype(np.uint16)
    result = to_uint8(stored, PERCENTILE)
    assert np.abs(result.levels.astype(int) - reference.levels).max() <= 2
    assert (result.usable, result.gain, result.warnings) == (True, 1, ())
    measures = measures_of(stored)
    assert result.levels.flat[np.abs(stored - measures.background).argmin()] == 128
    assert np.percentile(result.levels, 99.8) - np.percentile(result.levels, 1) == pytest.approx(80, abs=2)


def test_percentile_ignores_hot_pixels_and_padding() -> None:
    image = FRAMES[0]
    levels = to_uint8(image, PERCENTILE).levels
    hot = image.copy()
    hot[[5, 60], [5, 80]] = 255
    assert (to_uint8(hot, PERCENTILE).levels != levels).sum() <= 2
    padded = to_uint8(np.pad(image, ((0, 90), (0, 140))), PERCENTILE)
    np.testing.assert_array_equal(padded.levels[:120, :160], levels)
    assert set(np.unique(padded.levels[120:])) == {128}, "padding has the level of the background"
    assert padded.warnings[0].startswith("padding: ")


@pytest.mark.parametrize("noise", [0, 1])
def test_percentile_does_not_amplify_the_noise_of_empty_images(noise: float) -> None:
    empty = np.rint(128 + np.random.default_rng(0).normal(0, noise, (120, 160))).astype(np.uint8)
    result = to_uint8(empty, PERCENTILE)
    assert not result.usable
    assert result.warnings[0].startswith("unusable image: ")


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_as_is_depends_on_the_bit_depth_only(bits: int) -> None:
    stored = FRAMES if bits == 8 else [image.astype(np.uint16) << (bits - 8) for image in FRAMES]
    rule = choose([measures_of(image) for image in stored], "as_is")
    assert (rule.rule, rule.low, rule.high) == ("as_is", 0, 2.0**bits)
    for image, original in zip(stored, FRAMES):
        np.testing.assert_array_equal(to_uint8(image, rule).levels, original)
        dark = to_uint8(image // 2, rule)
        np.testing.assert_array_equal(dark.levels, original // 2)
        assert dark.gain == 1
        assert dark.warnings[0].startswith("background far from the training images'")
        other_depth = original.astype(np.uint16) * 257 if bits == 8 else original
        np.testing.assert_array_equal(to_uint8(other_depth, rule).levels, original)


def test_as_is_does_not_stretch() -> None:
    faint = [image.astype(np.uint16) * 3 + 30000 for image in FRAMES]
    measures = [measures_of(image) for image in faint]
    assert (choose(measures, "as_is").low, choose(measures, "as_is").high) == (0, 32768)
    assert choose(measures).low > 20000


def test_default_is_robust_also_in_older_files() -> None:
    rule = choose([measures_of(image) for image in FRAMES])
    assert rule.rule == "robust"
    values: dict[str, Any] = rule.model_dump(mode="json") | {"rule": "linear"}
    assert Intensity.model_validate(values) == rule
    assert conversion(Intensity.model_validate(values), rule) is None


def test_conversion_applies_the_rule_to_stored_pixels_or_is_refused() -> None:
    eight = choose([measures_of(image) for image in FRAMES])
    deep = choose([measures_of(image.astype(np.uint16) * 20 + 1000) for image in FRAMES])
    assert conversion(eight, PERCENTILE) == PERCENTILE, "8-bit images are stored unchanged"
    assert conversion(PERCENTILE, PERCENTILE.model_copy(update={"foreground": (0.1, 0.2)})) is None
    with pytest.raises(ValueError, match="by another map"):
        conversion(deep, PERCENTILE)
    for target in (eight, deep, choose([], "as_is")):
        with pytest.raises(ValueError, match="by their own percentiles"):
            conversion(PERCENTILE, target)


def test_invalid_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="leave out --intensity"):
        PrepareConfig(intensity="percentile", intensity_from="runs/cells")
    with pytest.raises(ValueError, match="percentile needs"):
        Intensity(rule="percentile", depth=16, high=65536)
    with pytest.raises(ValueError, match="call to_uint8"):
        intensity.apply(FRAMES[0], PERCENTILE)
