"""Progress of `train` on the console: a live bar in a terminal, plain lines elsewhere."""

import threading
import time
from collections.abc import Sequence
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from raylivecell.core.console import PLAIN_EVERY_S, console

# Seconds between two looks for messages: two remote calls, which with those that send them took 4 % of a core at 0.5.
LOOK_S = 1.0


class ProgressDisplay:
    """Shows the messages that come out of `take` until it is left.

    {"step", "images_per_s"}: the bar; {"row": metrics}: a line; {"start": parts}: `describe_start`.
    """

    def __init__(self, steps: int, take: Any) -> None:
        self.steps, self.take = steps, take
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._listen, daemon=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.task = self.bar.add_task("starting workers", total=steps)
        self.last_plain = 0.0

    def __enter__(self) -> "ProgressDisplay":
        self.bar.start()
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()
        self.bar.stop()

    def _listen(self) -> None:
        while not self.stop.is_set():
            for message in self.take():
                self._show(message)
            self.stop.wait(LOOK_S)
        for message in self.take():
            self._show(message)

    def _show(self, message: dict[str, Any]) -> None:
        if "row" in message:
            console.print(describe(message["row"], self.steps), soft_wrap=True)
            return
        if "start" in message:
            console.print(describe_start(message["start"]), soft_wrap=True)
            return
        self.bar.update(self.task, completed=message["step"], description=f"{message['images_per_s']:.1f} images/s")
        if not console.is_terminal and time.monotonic() - self.last_plain > PLAIN_EVERY_S:
            self.last_plain = time.monotonic()
            console.print(f"step {message['step']}/{self.steps}  {message['images_per_s']:.1f} images/s")


def describe(row: dict[str, Any], steps: int) -> str:
    """A row of the history in one line."""
    parts = [f"step {row['step']}/{steps}", f"epoch {row['epoch']}", f"loss {row['loss']:.4f}"]
    if "val_dice" in row:
        parts.append(f"val dice {row['val_dice']:.4f} iou {row['val_iou']:.4f}")
    if "val_msa" in row:
        parts.append(f"mSA {row['val_msa']:.4f}")
    parts += [f"{row['images_per_s']:.1f} images/s", f"waiting for data {row['data_wait_fraction']:.0%}"]
    return "  ".join(parts)


def describe_start(parts: Sequence[tuple[str, float]]) -> str:
    """The time to the first optimiser step and its parts, (name, seconds) in their order, in one line."""
    total = sum(seconds for _, seconds in parts)
    shown = [f"{name} {seconds:.1f}" for name, seconds in parts if seconds >= 0.05]
    return f"first step after {total:.1f} s: {', '.join(shown)}"
