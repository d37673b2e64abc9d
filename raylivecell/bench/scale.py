"""`bench scale`: images/s of the feed over 1, 2 and 3 nodes of CPUs that do nothing but prepare samples.

A documented simulation, for machines with fewer cores than nodes: each node is a Ray node of its own (raylet, object
store, processes) with one CPU, and a sample's transformation is a wait of WAIT_S instead of work, so that nodes do not
take each other's cores. Real are the order, the tasks, the scheduling, the objects, their way from node to node and
into batches: what could keep throughput from growing. The parts that `bench/cost.py` adds up are measured too, and its
prediction for these clusters is shown next to the runs.
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
from raylivecell.bench.spread import spread
from raylivecell.core.errors import UserError
from raylivecell.data import shards
from raylivecell.ingest import augment, blocks, stream
from raylivecell.recipe import AugmentConfig
from raylivecell.runtime.data_settings import quiet_data
from raylivecell.synthetic import writer
from raylivecell.targets import sample_planes

NODES = (1, 2, 3)
# What a sample takes on a core: `bench feed` has 6 ms for a whole frame where loop and system share the cores.
WAIT_S = 0.010
CROP = (333, 434)
BLOCK = stream.BLOCK_BYTES // (3 * CROP[0] * CROP[1]) // BATCH * BATCH
# To a store for a sample of many shards: two for its columns; its shard's length and footer.
REQUESTS = 4
STORE = 512 * 2**20
PIECE_IMAGES, PIECE_REPEATS = 8, 5
# Of docs/scaling.md: (GPUs, nodes), the paper's network (31 million parameters), S3's requests under one prefix.
GROWN = {"8 GPUs, 1 node": (8, 1), "64 GPUs, 8 nodes": (64, 8), "512 GPUs, 64 nodes": (512, 64)}


def bench_scale(images: int = 100, repeats: int = 3) -> dict[str, Any]:
    """Images/s over nodes, in turn, the share of linear growth, and `cost.Pieces` with what they foretell.

    Args:
        images: frames of 520x704 in the object store.
        repeats: how often each number of nodes is measured.

    Returns:
        `images_per_s`: nodes -> spread; `foretold_images_per_s`: nodes -> bench/cost.py's; `share_of_linear`: nodes ->
        spread of the ratios to one node in the same turn, by their number; `pieces`: of this machine;
        `seconds_of_ten_million_images`: the table of docs/scaling.md.

    Raises:
        UserError: Ray is already running in this process, or a cluster is meant.
    """
    if ray.is_initialized() or os.environ.get("RAY_ADDRESS"):
        raise UserError("bench scale starts a cluster of its own; unset RAY_ADDRESS")
    speeds: dict[int, list[float]] = {nodes: [] for nodes in NODES}
    takes, tasks = [], []
    for _ in range(repeats):
        with _cluster(1, 0.0):
            speed, take = _feed(images, 4)
            tasks.append(BLOCK / speed)
            takes.append(take)
        for nodes in NODES:
            with _cluster(nodes, WAIT_S):
                speeds[nodes].append(_feed(images, nodes)[0])
    pieces = _pieces(float(np.median(tasks)), float(np.median(takes)))
    one = speeds[1]
    return {
        "simulated_ms_an_image": 1000 * WAIT_S,
        "crop": list(CROP),
        "images_per_s": {f"{nodes} nodes": spread(values) for nodes, values in speeds.items()},
        "foretold_images_per_s": {f"{nodes} nodes": _foretold(pieces, nodes) for nodes in NODES},
        "share_of_linear": {
            f"{nodes} nodes": spread([a / b / nodes for a, b in zip(speeds[nodes], one)]) for nodes in NODES[1:]
        },
        "pieces": pieces._asdict(),
        "seconds_of_ten_million_images": {name: _grown(pieces, *size) for name, size in GROWN.items()},
    }


@contextmanager
def _cluster(nodes: int, wait_s: float) -> Iterator[None]:
    """A head without CPUs, where the samples are read, and so many nodes of one CPU."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": STORE})
    try:
        for _ in range(nodes):
            cluster.add_node(num_cpus=1, object_store_memory=STORE)
        cluster.wait_for_nodes()
        hook = {"worker_process_setup_hook": _waiting(wait_s)}
        ray.init(cluster.address, log_to_driver=False, logging_level=logging.ERROR, runtime_env=hook)
        with quiet_data():
            yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def _waiting(wait_s: float) -> Callable[[], None]:
    """Run in each process of Ray's: a transformation becomes a wait, and a sample cut to size."""

    def hook() -> None:
        def transform(sample: np.ndarray, key: Any, source: blocks.Source, out: np.ndarray) -> np.ndarray:
            time.sleep(wait_s)
            out[...] = sample[:, : CROP[0], : CROP[1]]
            return out

        blocks.transform = transform  # type: ignore[assignment]

    return hook


def _feed(images: int, length: int) -> tuple[float, float]:
    """Images/s, and the seconds of this process's time that an image takes; in rounds of `length` blocks."""
    source, warm_up = in_rounds(frames.frames(images), CROP, length)
    with closing(stream.Stream(source, 0, 0, 1)) as batches:
        begin = time.process_time()
        speed = images_per_s(batches, BATCH, warm_up)
        return speed, (time.process_time() - begin) / (source.schedule.steps * BATCH)


def _foretold(pieces: cost.Pieces, nodes: int) -> float:
    """Images/s of nodes of one core whose transformation is a wait, and whose samples are read by none."""
    waiting = pieces._replace(read=0.0, transform=WAIT_S)
    cluster = cost.Cluster(
        gpus=1, gpu_images_per_s=np.inf, nodes=nodes, cores=nodes, network=np.inf, store_requests_per_s=np.inf
    )
    return 1 / cost.busiest(cost.epoch(waiting, cluster, images=1, batch=BATCH, parameters=0))[1]


def _grown(pieces: cost.Pieces, gpus: int, nodes: int) -> dict[str, float]:
    """Seconds of each part in an epoch of ten million images read from S3, 16 images a GPU and step."""
    cluster = cost.Cluster(gpus, 400, nodes, cores=96 * nodes, network=25e9, store_requests_per_s=5500)
    return cost.epoch(pieces, cluster, images=10**7, batch=16 * gpus, parameters=31 * 10**6)


def _pieces(task: float, take: float) -> cost.Pieces:
    """Measured on one core of this machine, on drawn frames in a shard on its disk."""
    with tempfile.TemporaryDirectory(prefix="raylivecell-bench-") as folder:
        shard = f"{folder}/part-00000.parquet"
        shards.write_shard(shard, (_row(index) for index in range(PIECE_IMAGES)))
        group = pq.ParquetFile(shard).metadata.row_group(0)
        columns = [group.column(i) for i in range(group.num_columns)]
        stored = sum(
            column.total_compressed_size for column in columns if column.path_in_schema in sample_planes.STORED
        )
        rows = [shards.Row(shard, index) for index in range(PIECE_IMAGES)]
        read = _seconds(lambda number: blocks.read_sample(rows[number]))
        decoded = [np.asarray(blocks.read_sample(row)) for row in rows]
    out = np.empty((3, *CROP), np.uint8)
    config = AugmentConfig()
    transform = _seconds(
        lambda number: augment.augment_planes(decoded[number], np.random.default_rng(number), config, CROP, out)
    )
    return cost.Pieces(read, transform, task, take, stored, REQUESTS, out.nbytes, BLOCK)


def _row(index: int) -> dict[str, Any]:
    """A drawn frame as a row of a shard."""
    image, labels = writer.draw_labels(0, index)
    outlines = [one["counts"] for one in rle.encode(labels)]
    row = {"file_name": f"{index}.tif", "cell_type": "drawn", "height": image.shape[0], "width": image.shape[1]}
    row |= {"image": image, "labels": labels, "foreground": labels > 0, "border": np.zeros_like(image)}
    return {**row, "cells": len(outlines), "outlines": outlines, "source": "", "sha256": "", "annotation": ""}


def _seconds(work: Callable[[int], Any]) -> float:
    """Median seconds of this thread's time."""
    spent = []
    for _ in range(PIECE_REPEATS):
        for number in range(PIECE_IMAGES):
            begin = time.thread_time()
            work(number)
            spent.append(time.thread_time() - begin)
    return float(np.median(spent))
