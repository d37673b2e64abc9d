"""TorchScript files, for programs that run no ONNX: QuPath and ilastik. Only our own, in memory, are loaded.

A TorchScript file contains pickles. torch's writer also stores where in this machine's files each operation comes from,
in members that no reader needs; these are removed.
"""

import io
import zipfile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from raylivecell.inference.graph_files import Maps

ALIGNMENT = 64
"""torch's reader maps tensors into memory: their offsets in the file are multiples of this, by an extra field."""
EPOCH = (1980, 1, 1, 0, 0, 0)


@torch.no_grad()
def write(model: nn.Module, example: torch.Tensor) -> bytes:
    """Trace `model`, images float32 (B, 1, H, W) to maps float32 (B, C, H, W).

    Args:
        model: in evaluation mode. Its result must depend on the image's size only through tensors, as in `unet.UNet`.
        example: images.

    Returns:
        The file; equal in new processes, but not for a second trace in a process: torch numbers its classes.
    """
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, example, check_trace=False), buffer)
    stripped = io.BytesIO()
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(stripped, "w", zipfile.ZIP_STORED) as target:
        for name in source.namelist():
            if name.endswith((".debug_pkl", "/serialization_id")):
                continue
            member = zipfile.ZipInfo(name, EPOCH)
            start = stripped.tell() + 30 + len(name) + 4  # local header, name, head of the extra field
            padding = -start % ALIGNMENT
            member.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
            target.writestr(member, source.read(name))
    return stripped.getvalue()


def maps(data: bytes) -> Maps:
    """Load a file from `write`: a function from images float32 (B, 1, H, W) to maps float32 (B, C, H, W)."""
    module = torch.jit.load(io.BytesIO(data))

    @torch.no_grad()
    def run(image: NDArray[np.float32]) -> NDArray[np.float32]:
        return module(torch.from_numpy(image)).numpy()

    return run
