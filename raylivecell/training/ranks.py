"""Ranks, the training processes that share each batch, and their collective operations."""

from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor, nn


@dataclass(frozen=True)
class RankContext:
    """One of the `ranks` training processes that share each batch."""

    rank: int
    ranks: int
    device: torch.device
    threads: int


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of `values` over all ranks; `values` itself without a process group."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        values = values.clone()
        torch.distributed.all_reduce(values)
    return values


def broadcast_buffers(network: nn.Module) -> None:
    """Copy rank 0's buffers to every rank, so that all validate the network that rank 0 saves.

    BatchNorm statistics differ by rank: each computes them from its own images.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        for buffer in network.buffers():
            torch.distributed.broadcast(buffer, 0)
