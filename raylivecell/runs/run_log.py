"""What a run writes as it goes, besides checkpoints: metrics.jsonl and TensorBoard's events, in its folder."""

import json
import os
import tempfile
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from raylivecell.core import storage


class RunLog:
    """Of the run in the folder `out` (a URI), from `step` on. Whole files each time: object stores cannot append."""

    def __init__(self, out: str, step: int) -> None:
        self.out = out
        self.folder = tempfile.TemporaryDirectory(prefix="tensorboard-")
        self.board = SummaryWriter(self.folder.name, purge_step=step or None)

    def write(self, history: list[dict[str, Any]]) -> None:
        """The whole history to metrics.jsonl, its last row to TensorBoard."""
        lines = "".join(json.dumps(row) + "\n" for row in history)
        storage.write_bytes(storage.join(self.out, "metrics.jsonl"), lines.encode())
        for name, value in history[-1].items():
            self.board.add_scalar(name, value, history[-1]["step"])
        self.board.flush()
        for name in os.listdir(self.folder.name):
            with open(os.path.join(self.folder.name, name), "rb") as events:
                storage.write_bytes(storage.join(self.out, "tensorboard", name), events.read())

    def close(self) -> None:
        """Delete what was only for the way."""
        self.board.close()
        self.folder.cleanup()
