"""A run's log in its folder: metrics.jsonl and TensorBoard events."""

import json
import os
import tempfile
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from raylivecell.core import storage


class RunLog:
    """Log of the run in the folder `out` (a URI), starting at `step`.

    Each write replaces entire files, because object stores cannot append.
    """

    def __init__(self, out: str, step: int) -> None:
        self.out = out
        self.folder = tempfile.TemporaryDirectory(prefix="tensorboard-")
        self.writer = SummaryWriter(self.folder.name, purge_step=step or None)

    def write(self, history: list[dict[str, Any]]) -> None:
        """Write the entire history to metrics.jsonl and its last row to TensorBoard."""
        lines = "".join(json.dumps(row) + "\n" for row in history)
        storage.write_bytes(storage.join(self.out, "metrics.jsonl"), lines.encode())
        for name, value in history[-1].items():
            self.writer.add_scalar(name, value, history[-1]["step"])
        self.writer.flush()
        for name in os.listdir(self.folder.name):
            with open(os.path.join(self.folder.name, name), "rb") as events:
                storage.write_bytes(storage.join(self.out, "tensorboard", name), events.read())

    def close(self) -> None:
        """Close TensorBoard's writer and delete its temporary folder."""
        self.writer.close()
        self.folder.cleanup()
