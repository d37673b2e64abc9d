"""The memory of blocks is reused if, and only if, nothing refers to it any more."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from ray.data.block import BlockAccessor

from raylivecell.ingest.blocks import ReusedMemory

SIZES = st.integers(1, 5)


@given(st.lists(st.tuples(SIZES, SIZES, SIZES, st.sampled_from(["drop", "array", "slice", "block"])), max_size=12))
def test_memory_in_use_is_never_reused(blocks: list[tuple[int, int, int, str]]) -> None:
    memory, references = ReusedMemory(), []
    for number, (count, height, width, use) in enumerate(blocks):
        array = memory.empty((count, height, width))
        array[...] = number
        expected = array.copy()
        if use == "array":
            references.append((array, expected))
        elif use == "slice":
            references.append((array[-1:, ::2], expected[-1:, ::2]))
        elif use == "block":
            references.append((BlockAccessor.batch_to_block({"planes": array}), expected))
    for value, expected in references:
        array = value if isinstance(value, np.ndarray) else BlockAccessor.for_block(value).to_numpy("planes")
        np.testing.assert_array_equal(array, expected)


def test_memory_is_reused_after_a_block_is_deleted() -> None:
    memory = ReusedMemory()
    addresses = set()
    for _ in range(5):
        array = memory.empty((4, 100, 100))
        addresses.add(array.ctypes.data)
        block = BlockAccessor.batch_to_block({"planes": array})
        del array, block
    assert len(addresses) == 1, "allocating new pages for each block costs as much as the transforms"
