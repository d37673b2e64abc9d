"""Progress of `train` on the console: a live bar in a terminal, plain lines elsewhere."""

import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

from raylivecell.core.console import ProgressBar, console

# Seconds between two polls for messages: at 0.5 s polling and sending took 4 % of a core.
POLL_S = 1.0


class ProgressDisplay:
    """Context manager that displays the messages returned by `read_messages`.

    {"step", "images_per_s"} updates the bar; {"row": metrics}, {"start": phases} and {"acceleration": text} print a
    line.
    """

    def __init__(self, steps: int, read_messages: Callable[[], Iterable[dict[str, Any]]]) -> None:
        self.steps, self.read_messages = steps, read_messages
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._listen, daemon=True)
        self.bar, self.exit_stack = ProgressBar("starting workers", steps), ExitStack()

    def __enter__(self) -> "ProgressDisplay":
        self.exit_stack.enter_context(self.bar)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()
        self.exit_stack.close()

    def _listen(self) -> None:
        while not self.stop.is_set():
            for message in self.read_messages():
                self._show(message)
            self.stop.wait(POLL_S)
        for message in self.read_messages():
            self._show(message)

    def _show(self, message: dict[str, Any]) -> None:
        if "row" in message:
            console.print(describe(message["row"], self.steps), soft_wrap=True)
            return
        if "acceleration" in message:
            console.print(message["acceleration"], soft_wrap=True)
            return
        if "start" in message:
            console.print(describe_start(message["start"]), soft_wrap=True)
            return
        self.bar.update(message["step"], text=f"training, {message['images_per_s']:.1f} images/s")


def describe(row: dict[str, Any], steps: int) -> str:
    """Format a row of the history as one line."""
    parts = [f"step {row['step']}/{steps}", f"epoch {row['epoch']}", f"loss {row['loss']:.4f}"]
    if "val_dice" in row:
        parts.append(f"val dice {row['val_dice']:.4f} iou {row['val_iou']:.4f}")
    if "val_msa" in row:
        parts.append(f"mSA {row['val_msa']:.4f}")
    parts += [f"{row['images_per_s']:.1f} images/s", f"waiting for data {row['data_wait_fraction']:.0%}"]
    return "  ".join(parts)


def describe_start(phases: Sequence[tuple[str, float]]) -> str:
    """Format the time to the first optimiser step and its phases, (name, seconds), as one line."""
    total = sum(seconds for _, seconds in phases)
    shown = [f"{name} {seconds:.1f}" for name, seconds in phases if seconds >= 0.05]
    return f"first step after {total:.1f} s: {', '.join(shown)}"
