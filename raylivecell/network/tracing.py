"""Whether a network is being traced for export, where Python must not branch on the image size."""

import torch


def exporting() -> bool:
    """Whether the network is being exported to a graph for every image size.

    Not under `torch.compile`: torch 2.11 answers `is_exporting()` with True there (seen on an H200), and a compiled
    network would copy maps that it can slice.
    """
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
