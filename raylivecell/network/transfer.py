"""Arrays and tensors of this process's memory, and tensors on the device that computes."""

import warnings
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor


def tensors(batches: Iterator[Mapping[str, np.ndarray]]) -> Iterator[dict[str, Tensor]]:
    """The arrays of each batch as tensors that share their memory, which is not to be written."""
    for batch in batches:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # the loop only reads
            converted = {name: torch.from_numpy(values) for name, values in batch.items()}
        yield converted


class DeviceTransfer:
    """Sends tensors to `device`.

    To a GPU from pinned memory, in a stream of its own: the copy goes on while the last step computes, and this process
    does not wait for either. Out of ordinary memory a copy waits until the GPU has done all that it was told before.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, tensor: Tensor) -> Tensor:
        """The tensor on the device; itself where it lies there."""
        if self.stream is None or tensor.is_cuda:
            return tensor.to(self.device)
        with torch.cuda.stream(self.stream):
            sent = tensor.pin_memory().to(self.device, non_blocking=True)
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self.stream)
        sent.record_stream(computing)  # else its memory is given to a later copy before the step that reads it ran
        return sent
