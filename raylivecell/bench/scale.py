"""`bench scale`: images/s of the stream on 1, 2 and 3 nodes whose CPUs only prepare samples.

A simulation, for machines with fewer cores than nodes: each node is a separate Ray node (raylet, object store,
processes) with one CPU, and a sample's transformation is a wait of WAIT_S, so that nodes do not compete for cores. All
that could limit scaling is real: sample order, tasks, scheduling, objects, and their transfer between nodes and into
batches. The parts of `cost.py` are measured too, and its predictions for these clusters are shown next to the runs.
"""

import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import ray
from ray.cluster_utils import Cluster

from raylivecell.annotations import rle
from raylivecell.bench import cost, frames
from raylivecell.bench.feed import BATCH, images_per_s, in_rounds
from raylivecell.bench.figures import Figures, Options, summaries, summary
from raylivecell.core.errors import UserError
from raylivecell.data import shards
from raylivecell.ingest import augment, blocks, stream
from raylivecell.recipe import AugmentConfig
from raylivecell.runtime.data_settings import quiet_data
from raylivecell.synthetic import writer
from raylivecell.targets import sample_planes

NODES = (1, 2, 3)
# Seconds per sample on a core: `bench feed` needs 6 ms for a full frame on cores shared with loop and system.
WAIT_S = 0.010
CROP = (333, 434)
BLOCK = stream.BLOCK_BYTES // (3 * CROP[0] * CROP[1]) // BATCH * BATCH
# Requests to a store per sample, for many shards: two for its columns, two for its shard's length and footer.
REQUESTS = 4
STORE = 512 * 2**20
PART_IMAGES, PART_REPEATS = 8, 5
# The clusters of docs/scaling.md: GPUs, nodes.
CLUSTERS = {"8 GPUs, 1 node": (8, 1), "64 GPUs, 8 nodes": (64, 8), "512 GPUs, 64 nodes": (512, 64)}


def bench(options: Options) -> Figures:
    """Images/s by number of nodes, fraction of linear growth, `cost.Parts` and the predictions from them.

    Args:
        options: `images` frames of 520x704 in the object store; `repeats` runs of each number of nodes, in turn.

    Returns:
        `images_per_s`: nodes -> summary; `predicted_images_per_s`: nodes -> prediction of cost.py; `share_of_linear`:
        nodes -> summary of the ratio to one node in the same turn, divided by the number of nodes; `parts`:
        `cost.Parts` of this machine; `seconds_of_ten_million_images`: the table of docs/scaling.md.

    Raises:
        UserError: Ray is already running in this process, or RAY_ADDRESS is set.
    """
    if ray.is_initialized() or os.environ.get("RAY_ADDRESS"):
        raise UserError("bench scale starts its own cluster; unset RAY_ADDRESS")
    speeds: dict[int, list[float]] = {nodes: [] for nodes in NODES}
    fetch_times, task_times = [], []
    for _ in range(options.repeats):
        with _cluster(1, 0.0):
            speed, fetch_s = _feed(options.images, 4)
            task_times.append(BLOCK / speed)
            fetch_times.append(fetch_s)
        for nodes in NODES:
            with _cluster(nodes, WAIT_S):
                speeds[nodes].append(_feed(options.images, nodes)[0])
    parts = _parts(float(np.median(task_times)), float(np.median(fetch_times)))
    return {
        "simulated_ms_per_image": 1000 * WAIT_S,
        "crop": list(CROP),
        "images_per_s": summaries({f"{nodes} nodes": values for nodes, values in speeds.items()}),
        "predicted_images_per_s": {f"{nodes} nodes": _predicted(parts, nodes) for nodes in NODES},
        "share_of_linear": {
            f"{nodes} nodes": summary([a / b / nodes for a, b in zip(speeds[nodes], speeds[1])]) for nodes in NODES[1:]
        },
        "parts": parts._asdict(),
        "seconds_of_ten_million_images": {name: _ten_million(parts, *size) for name, size in CLUSTERS.items()},
    }


@contextmanager
def _cluster(nodes: int, wait_s: float) -> Iterator[None]:
    """Start a head without CPUs, where the samples are consumed, and `nodes` nodes with one CPU."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": STORE})
    try:
        for _ in range(nodes):
            cluster.add_node(num_cpus=1, object_store_memory=STORE)
        cluster.wait_for_nodes()
        hook = {"worker_process_setup_hook": _wait_instead(wait_s)}
        ray.init(cluster.address, log_to_driver=False, logging_level=logging.ERROR, runtime_env=hook)
        with quiet_data():
            yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def _wait_instead(wait_s: float) -> Callable[[], None]:
    """Hook for Ray's processes that replaces the transformation by a wait and a crop."""

    def hook() -> None:
        def transform(sample: np.ndarray, key: Any, source: blocks.Source, out: np.ndarray) -> np.ndarray:
            time.sleep(wait_s)
            out[...] = sample[:, : CROP[0], : CROP[1]]
            return out

        blocks.transform = transform  # type: ignore[assignment]

    return hook


def _feed(images: int, length: int) -> tuple[float, float]:
    """Images/s, and CPU seconds of this process per image, in rounds of `length` blocks."""
    source, warm_up = in_rounds(frames.frames(images), CROP, length)
    with closing(stream.Stream(source, 0, 0, 1)) as batches:
        begin = time.process_time()
        speed = images_per_s(batches, BATCH, warm_up)
        return speed, (time.process_time() - begin) / (source.schedule.steps * BATCH)


def _predicted(parts: cost.Parts, nodes: int) -> float:
    """Predicted images/s of one-core nodes that wait instead of transforming and read no shards."""
    simulated = parts._replace(read_s=0.0, transform_s=WAIT_S)
    cluster = cost.Cluster(
        gpus=1, gpu_images_per_s=np.inf, nodes=nodes, cores=nodes, network=np.inf, store_requests_per_s=np.inf
    )
    return 1 / cost.busiest(cost.epoch(simulated, cluster, images=1, batch=BATCH, parameters=0))[1]


def _ten_million(parts: cost.Parts, gpus: int, nodes: int) -> dict[str, float]:
    """Busy seconds of each resource in an epoch of ten million images, 16 per GPU and step.

    Assumes the paper's network (31 million parameters) and S3's request rate under one prefix.
    """
    cluster = cost.Cluster(gpus, 400, nodes, cores=96 * nodes, network=25e9, store_requests_per_s=5500)
    return cost.epoch(parts, cluster, images=10**7, batch=16 * gpus, parameters=31 * 10**6)


def _parts(task_s: float, fetch_s: float) -> cost.Parts:
    """Measure the parts on one core of this machine, with synthetic frames in a shard on its disk."""
    with tempfile.TemporaryDirectory(prefix="raylivecell-bench-") as folder:
        shard = f"{folder}/part-00000.parquet"
        shards.write_shard(shard, (_row(index) for index in range(PART_IMAGES)))
        group = pq.ParquetFile(shard).metadata.row_group(0)
        columns = [group.column(i) for i in range(group.num_columns)]
        stored_bytes = sum(
            column.total_compressed_size for column in columns if column.path_in_schema in sample_planes.STORED
        )
        rows = [shards.Row(shard, index) for index in range(PART_IMAGES)]
        read_s = _median_seconds(lambda number: blocks.read_sample(rows[number]))
        decoded = [np.asarray(blocks.read_sample(row)) for row in rows]
    out = np.empty((3, *CROP), np.uint8)
    config = AugmentConfig()
    transform_s = _median_seconds(
        lambda number: augment.augment_planes(decoded[number], np.random.default_rng(number), config, CROP, out)
    )
    return cost.Parts(read_s, transform_s, task_s, fetch_s, stored_bytes, REQUESTS, out.nbytes, BLOCK)


def _row(index: int) -> dict[str, Any]:
    """A synthetic frame as a row of a shard."""
    image, labels = writer.draw_labels(0, index)
    outlines = [mask["counts"] for mask in rle.encode(labels)]
    row = {"file_name": f"{index}.tif", "cell_type": "synthetic", "height": image.shape[0], "width": image.shape[1]}
    row |= {"image": image, "labels": labels, "foreground": labels > 0, "border": np.zeros_like(image)}
    return {**row, "cells": len(outlines), "outlines": outlines, "source": "", "sha256": "", "annotation": ""}


def _median_seconds(work: Callable[[int], Any]) -> float:
    """Median CPU seconds of this thread per call."""
    times = []
    for _ in range(PART_REPEATS):
        for number in range(PART_IMAGES):
            begin = time.thread_time()
            work(number)
            times.append(time.thread_time() - begin)
    return float(np.median(times))
