"""`bench scale`: images/s of the feed over 1, 2 and 3 nodes of CPUs that do nothing but prepare samples.

A documented simulation, for machines with fewer cores than nodes: each node is a Ray node of its own (raylet, object
store, processes) with one CPU, and a sample's transformation is a wait of WAIT_S instead of work, so that nodes do not
take each other's cores. Real are the order, the tasks, the scheduling, the objects, their way from node to node and
into batches: what could keep throughput from growing.
"""

import os
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
import ray
from ray.cluster_utils import Cluster

from raylivecell import augment, bench_frames, ingest
from raylivecell.bench_feed import images_per_s
from raylivecell.bench_spread import spread
from raylivecell.errors import UserError
from raylivecell.order import PhaseConfig, Plan

NODES = (1, 2, 3)
# What a sample takes on a core: `bench feed` has 6 ms for a whole frame where loop and system share the cores.
WAIT_S = 0.010
BATCH, CROP = 8, (333, 434)
WARM_UP_BATCHES, MEASURED_BATCHES = 32, 96
STORE = 512 * 2**20


def bench_scale(images: int = 100, repeats: int = 3) -> dict[str, Any]:
    """Images/s over nodes, in turn, and the share of linear growth.

    Args:
        images: frames of 520x704 in the object store.
        repeats: how often each number of nodes is measured.

    Returns:
        `images_per_s`: nodes -> spread; `ideal_images_per_s`: what one node's waits allow; `share_of_linear`: nodes ->
        spread of the ratios to one node in the same turn, by their number.

    Raises:
        UserError: Ray is already running in this process, or a cluster is meant.
    """
    if ray.is_initialized() or os.environ.get("RAY_ADDRESS"):
        raise UserError("bench scale starts a cluster of its own; unset RAY_ADDRESS")
    speeds: dict[int, list[float]] = {nodes: [] for nodes in NODES}
    for _ in range(repeats):
        for nodes in NODES:
            with _cluster(nodes):
                speeds[nodes].append(_feed(images, nodes))
    one = speeds[1]
    return {
        "simulated_ms_an_image": 1000 * WAIT_S,
        "crop": list(CROP),
        "ideal_images_per_s": 1 / WAIT_S,
        "images_per_s": {f"{nodes} nodes": spread(values) for nodes, values in speeds.items()},
        "share_of_linear": {
            f"{nodes} nodes": spread([a / b / nodes for a, b in zip(speeds[nodes], one)]) for nodes in NODES[1:]
        },
    }


@contextmanager
def _cluster(nodes: int) -> Iterator[None]:
    """A head without CPUs, where the samples are read, and so many nodes of one CPU."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": STORE})
    try:
        for _ in range(nodes):
            cluster.add_node(num_cpus=1, object_store_memory=STORE)
        cluster.wait_for_nodes()
        ray.init(cluster.address, log_to_driver=False, runtime_env={"worker_process_setup_hook": _wait_for_work})
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def _wait_for_work() -> None:
    """Run in each process of Ray's: a transformation is a wait, and a sample cut to size."""

    def transform(
        sample: np.ndarray, key: tuple[int, int, int, int], source: ingest.Source, out: np.ndarray
    ) -> np.ndarray:
        time.sleep(WAIT_S)
        out[...] = sample[:, : CROP[0], : CROP[1]]
        return out

    ingest.transform = transform  # type: ignore[assignment]


def _feed(images: int, nodes: int) -> float:
    samples = bench_frames.samples(bench_frames.frames(images))
    steps = nodes * (WARM_UP_BATCHES + MEASURED_BATCHES)
    plan = Plan(0, images, BATCH, (PhaseConfig(steps=steps, plain=False, transformed=1),))
    source = ingest.Source(samples.train, plan, augment.AugmentConfig(), CROP, samples.kept_train)
    with closing(ingest.Stream(source, 0, 0, 1)) as batches:
        return images_per_s(batches, BATCH, nodes * WARM_UP_BATCHES)
