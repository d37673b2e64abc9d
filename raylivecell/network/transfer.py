"""Host arrays -> tensors, and their transfer to the device."""

import warnings
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor


def tensors(batches: Iterator[Mapping[str, np.ndarray]]) -> Iterator[dict[str, Tensor]]:
    """Convert the arrays of each batch to tensors that share their memory; do not write to them."""
    for batch in batches:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # the loop only reads
            converted = {name: torch.from_numpy(values) for name, values in batch.items()}
        yield converted


class DeviceTransfer:
    """Copies tensors to `device`.

    Copies to a GPU use pinned memory and a separate stream: they run during the previous step, and this process does
    not wait for them. A copy from pageable memory would wait until the GPU has finished all queued work.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return the tensor on the device; unchanged if already there."""
        if self.stream is None or tensor.is_cuda:
            return tensor.to(self.device)
        with torch.cuda.stream(self.stream):
            copy = tensor.pin_memory().to(self.device, non_blocking=True)
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self.stream)
        copy.record_stream(computing)  # otherwise a later copy could reuse its memory before the step has read it
        return copy
