"""The model of an epoch's cost: what more of a thing does to the part that is made of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylivecell.bench import cost

PIECES = cost.Pieces(read=1e-3, transform=2e-3, task=1e-2, take=4e-4, stored=2e5, requests=4, sample=4e5, block=32)
CLUSTER = cost.Cluster(gpus=8, gpu_images_per_s=400, nodes=2, cores=64, network=1e9, store_requests_per_s=5500)


@given(st.integers(1, 100))
def test_parts_grow_with_the_images_and_shrink_with_what_bears_them(times: int) -> None:
    before = cost.epoch(PIECES, CLUSTER, 10_000, 128, 10**6)
    images = cost.epoch(PIECES, CLUSTER, times * 10_000, 128, 10**6)
    assert images == pytest.approx({name: times * seconds for name, seconds in before.items()})
    more = CLUSTER._replace(gpus=8 * times, cores=64 * times, store_requests_per_s=5500 * times)
    after = cost.epoch(PIECES, more, 10_000, 128, 10**6)
    for name in ("GPUs", "cores for data", "training processes, taking samples", "store, requests"):
        assert after[name] == pytest.approx(before[name] / times)


def test_one_node_sends_nothing_to_others() -> None:
    parts = cost.epoch(PIECES, CLUSTER._replace(nodes=1), 10_000, 128, 10**6)
    assert parts["network, gradients"] == parts["network, samples between nodes"] == 0
    assert parts["network, shards"] == pytest.approx(10_000 * 2e5 / 1e9)


def test_the_epoch_waits_for_its_busiest_part() -> None:
    parts = cost.epoch(PIECES, CLUSTER, 10_000, 128, 10**6)
    assert cost.busiest(parts) == ("store, requests", pytest.approx(10_000 * 4 / 5500))
    assert all(seconds <= 10_000 * 4 / 5500 for seconds in parts.values())
