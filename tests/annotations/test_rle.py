"""Run-length encoding, compared with the bytes of pycocotools."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco_mask

from raylivecell.annotations import rle

SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 12))


@given(hnp.arrays(np.uint16, SHAPES, elements=st.sampled_from([0, 0, 3, 4, 900])))
def test_labels_are_encoded_as_by_pycocotools(labels: np.ndarray) -> None:
    values = [value for value in np.unique(labels) if value]
    expected = [coco_mask.encode(np.asfortranarray((labels == value).astype(np.uint8))) for value in values]
    assert rle.encode(labels) == expected
    for value, mask in zip(values, map(rle.decode, expected)):
        np.testing.assert_array_equal(mask != 0, labels == value)


@given(hnp.arrays(np.uint8, SHAPES, elements=st.sampled_from([0, 1, 1])), st.integers(0, 3), st.integers(0, 3), SHAPES)
def test_patch_is_encoded_as_the_full_image(mask: np.ndarray, top: int, left: int, extra: tuple[int, int]) -> None:
    shape = (top + mask.shape[0] + extra[0] - 1, left + mask.shape[1] + extra[1] - 1)
    image = np.zeros(shape, np.uint8, order="F")
    image[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
    assert rle.encode_patch(mask, top, left, shape) == coco_mask.encode(image)


def test_damaged_rle_decodes_to_no_mask() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        runs = rle.run_lengths(rng.integers(0, 256, rng.integers(0, 40), dtype=np.uint8).tobytes())
        mask = rle.mask_of_runs((5, 7), runs)
        assert mask is None or mask.shape == (5, 7)
    assert rle.mask_of_runs((5, 7), np.array([40, -5])) is None
    assert rle.mask_of_runs((5, 7), np.array([34])) is None
