"""Predict the time of an epoch on a cluster, as busy seconds of each resource, from measured parts.

The cost model of docs/scaling.md. Data tasks, network and GPUs work concurrently, so an epoch takes as long as its
busiest resource. `bench scale` measures the parts and compares predictions with runs on 1, 2 and 3 nodes.
"""

from typing import NamedTuple


class Parts(NamedTuple):
    """Measured costs of one image."""

    read_s: float
    """Core seconds to read it from a shard and decode it."""
    transform_s: float
    """Core seconds to deform, rotate and crop it."""
    task_s: float
    """Core seconds of overhead of a Ray Data task, per block."""
    fetch_s: float
    """Seconds of the training process to fetch it from the object store, in a thread parallel to training."""
    stored_bytes: float
    """Bytes that training reads from its shard."""
    requests: float
    """Requests to the store: two reads, and with many shards two to open the shard (length, footer)."""
    sample_bytes: float
    """Bytes of the transformed sample."""
    block_images: int
    """Images per block."""


class Cluster(NamedTuple):
    """GPUs, and cores that prepare samples, connected by one network."""

    gpus: int
    gpu_images_per_s: float
    """Training speed of one GPU with the given network."""
    nodes: int
    cores: int
    """Cores for data tasks, all nodes together."""
    network: float
    """Bandwidth of a node in each direction, bytes/s."""
    store_requests_per_s: float
    """Maximum request rate of the store of the shards."""


def epoch(parts: Parts, cluster: Cluster, images: int, batch: int, parameters: int) -> dict[str, float]:
    """Busy seconds of each resource in an epoch of `images` samples, each read from its shard once.

    Args:
        parts: measured costs of one image.
        cluster: GPUs, cores, network and store.
        images: samples per epoch, augmented copies included.
        batch: images per step, over all GPUs.
        parameters: number of parameters of the network; gradients are float32, summed by ring all-reduce over nodes.
    """
    steps = images / batch
    ring = 2 * (cluster.nodes - 1) / cluster.nodes
    core = parts.read_s + parts.transform_s + parts.task_s / parts.block_images
    remote = (cluster.nodes - 1) / cluster.nodes  # a block is created on any node and used on one
    return {
        "GPUs": images / (cluster.gpus * cluster.gpu_images_per_s),
        "cores for data": images * core / cluster.cores,
        "training processes, fetching samples": images * parts.fetch_s / cluster.gpus,
        "store, requests": images * parts.requests / cluster.store_requests_per_s,
        "network, shards": images * parts.stored_bytes / (cluster.nodes * cluster.network),
        "network, samples between nodes": images * parts.sample_bytes * remote / (cluster.nodes * cluster.network),
        "network, gradients": steps * ring * 4 * parameters / cluster.network,
    }


def busiest(seconds: dict[str, float]) -> tuple[str, float]:
    """Resource that limits the epoch, and its busy seconds."""
    name = max(seconds, key=seconds.__getitem__)
    return name, seconds[name]
