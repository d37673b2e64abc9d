"""What an epoch costs on a cluster, from measured pieces: each resource's seconds, of which the longest is the epoch's.

The model behind docs/scaling.md. Parts overlap: data tasks, network and GPUs work at once, so that an epoch takes as
long as the busiest of them. `bench scale` measures the pieces and shows the model beside runs of 1, 2 and 3 nodes.
"""

from typing import NamedTuple


class Pieces(NamedTuple):
    """Measured; seconds and bytes of one image unless said."""

    read: float
    """One core's seconds to read and decode it from a shard."""
    transform: float
    """One core's seconds to deform, turn and crop it."""
    task: float
    """Ray Data's seconds for a block beyond its samples, on the core that runs it."""
    take: float
    """The training process's seconds to take it out of the object store, in a thread beside training."""
    stored: float
    """Bytes in its shard that training reads."""
    requests: float
    """To the store, for them: two reads, and opening the shard (its length, its footer) where there are many."""
    sample: float
    """Bytes as it is trained on."""
    block: int
    """Images in a block."""


class Cluster(NamedTuple):
    """GPUs, and cores that prepare samples, behind one network."""

    gpus: int
    gpu_images_per_s: float
    """Of one GPU, for the network that is trained."""
    nodes: int
    cores: int
    """Of all nodes together, for data tasks."""
    network: float
    """Bytes/s into and out of a node."""
    store_requests_per_s: float
    """That the store of the shards answers."""


def epoch(pieces: Pieces, cluster: Cluster, images: int, batch: int, parameters: int) -> dict[str, float]:
    """Seconds that each part of the cluster is busy in an epoch of `images` seen once, each read from its shard.

    Args:
        pieces: measured.
        cluster: what there is.
        images: samples of the epoch, transformed copies counted.
        batch: images of a step, over all GPUs.
        parameters: of the network; gradients are float32, summed in a ring over the nodes.
    """
    steps = images / batch
    ring = 2 * (cluster.nodes - 1) / cluster.nodes
    core = pieces.read + pieces.transform + pieces.task / pieces.block
    elsewhere = (cluster.nodes - 1) / cluster.nodes  # a block is made on any node, and used on one
    return {
        "GPUs": images / (cluster.gpus * cluster.gpu_images_per_s),
        "cores for data": images * core / cluster.cores,
        "training processes, taking samples": images * pieces.take / cluster.gpus,
        "store, requests": images * pieces.requests / cluster.store_requests_per_s,
        "network, shards": images * pieces.stored / (cluster.nodes * cluster.network),
        "network, samples between nodes": images * pieces.sample * elsewhere / (cluster.nodes * cluster.network),
        "network, gradients": steps * ring * 4 * parameters / cluster.network,
    }


def busiest(parts: dict[str, float]) -> tuple[str, float]:
    """The part that the epoch waits for, and its seconds."""
    name = max(parts, key=parts.__getitem__)
    return name, parts[name]
