"""Run lengths of masks: pycocotools' own bytes."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco_mask

from raylivecell.annotations import rle

SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 12))


@given(hnp.arrays(np.uint16, SHAPES, elements=st.sampled_from([0, 0, 3, 4, 900])))
def test_labels_are_encoded_as_pycocotools_does_one_by_one(labels: np.ndarray) -> None:
    names = [name for name in np.unique(labels) if name]
    expected = [coco_mask.encode(np.asfortranarray((labels == name).astype(np.uint8))) for name in names]
    assert rle.encode(labels) == expected
    for name, mask in zip(names, map(rle.decode, expected)):
        np.testing.assert_array_equal(mask != 0, labels == name)


@given(hnp.arrays(np.uint8, SHAPES, elements=st.sampled_from([0, 1, 1])), st.integers(0, 3), st.integers(0, 3), SHAPES)
def test_a_patch_is_encoded_as_the_whole_frame(mask: np.ndarray, top: int, left: int, more: tuple[int, int]) -> None:
    shape = (top + mask.shape[0] + more[0] - 1, left + mask.shape[1] + more[1] - 1)
    frame = np.zeros(shape, np.uint8, order="F")
    frame[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
    assert rle.encode_patch(mask, top, left, shape) == coco_mask.encode(frame)


def test_damaged_rle_decodes_to_no_mask() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        runs = rle.run_lengths(rng.integers(0, 256, rng.integers(0, 40), dtype=np.uint8).tobytes())
        mask = rle.mask_of_runs((5, 7), runs)
        assert mask is None or mask.shape == (5, 7)
    assert rle.mask_of_runs((5, 7), np.array([40, -5])) is None
    assert rle.mask_of_runs((5, 7), np.array([34])) is None
