"""Predicted epoch time: how the seconds of each resource depend on images and cluster size."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylivecell.bench import cost

PARTS = cost.Parts(
    read_s=1e-3,
    transform_s=2e-3,
    task_s=1e-2,
    fetch_s=4e-4,
    stored_bytes=2e5,
    requests=4,
    sample_bytes=4e5,
    block_images=32,
)
CLUSTER = cost.Cluster(gpus=8, gpu_images_per_s=400, nodes=2, cores=64, network=1e9, store_requests_per_s=5500)


@given(st.integers(1, 100))
def test_seconds_grow_with_images_and_shrink_with_resources(factor: int) -> None:
    before = cost.epoch(PARTS, CLUSTER, 10_000, 128, 10**6)
    images = cost.epoch(PARTS, CLUSTER, factor * 10_000, 128, 10**6)
    assert images == pytest.approx({name: factor * seconds for name, seconds in before.items()})
    larger = CLUSTER._replace(gpus=8 * factor, cores=64 * factor, store_requests_per_s=5500 * factor)
    after = cost.epoch(PARTS, larger, 10_000, 128, 10**6)
    for name in ("GPUs", "cores for data", "training processes, fetching samples", "store, requests"):
        assert after[name] == pytest.approx(before[name] / factor)


def test_one_node_sends_nothing_to_others() -> None:
    seconds = cost.epoch(PARTS, CLUSTER._replace(nodes=1), 10_000, 128, 10**6)
    assert seconds["network, gradients"] == seconds["network, samples between nodes"] == 0
    assert seconds["network, shards"] == pytest.approx(10_000 * 2e5 / 1e9)


def test_the_busiest_resource_limits_the_epoch() -> None:
    resources = cost.epoch(PARTS, CLUSTER, 10_000, 128, 10**6)
    assert cost.busiest(resources) == ("store, requests", pytest.approx(10_000 * 4 / 5500))
    assert all(seconds <= 10_000 * 4 / 5500 for seconds in resources.values())
