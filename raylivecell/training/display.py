"""What `train` and `sweep` say meanwhile: a live bar or table in a terminal, plain lines elsewhere."""

import threading
import time
from collections.abc import Sequence
from typing import Any

from rich.live import Live as RichLive
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.table import Table

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


class TrialTable:
    """The trials of a sweep: a line for each trial's end; a live table in a terminal, elsewhere a line a minute."""

    SHOWN = 12
    PLAIN_EVERY_S = 60.0

    def __init__(self, trials: int, done: int, best: float | None, score: str, what: str = "trials") -> None:
        self.trials, self.done, self.best, self.score, self.what = trials, done, best, score, what
        self.running: dict[str, dict[str, Any]] = {}
        self.last_plain = time.monotonic()
        self.live = RichLive(console=console, transient=True, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> "TrialTable":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def start(self, name: str, values: dict[str, Any]) -> None:
        """A trial begins, or goes on after a crash."""
        self.running[name] = {"values": describe_values(values), "score": None, "progress": 0.0}
        self._refresh()

    def report(self, name: str, row: dict[str, Any]) -> None:
        """A trial has come to a report: `score`, `progress`, `step` and `steps`."""
        self.running[name] |= {key: row[key] for key in ("score", "progress", "step", "steps")}
        if not self.live and time.monotonic() - self.last_plain > self.PLAIN_EVERY_S:
            self._say(f"{name} {self.score} {row['score']:.4f} at step {row['step']}/{row['steps']}")
        self._refresh()

    def end(self, name: str, state: str, why: str | None) -> None:
        """A trial came to an end."""
        last = self.running.pop(name)
        self.done += 1
        if state == "complete" and last["score"] is not None:
            self.best = last["score"] if self.best is None else max(self.best, last["score"])
        parts = [f"{self.what} {self.done}/{self.trials}", f"{name} {state}"]
        if last["score"] is not None:
            parts.append(f"{self.score} {last['score']:.4f} at step {last['step']}/{last['steps']}")
        if self.best is not None:
            parts.append(f"best {self.best:.4f}")
        self._say("  ".join([*parts, why or last["values"]]))
        self._refresh()

    def _say(self, line: str) -> None:
        self.last_plain = time.monotonic()
        console.print(line, soft_wrap=True)

    def _refresh(self) -> None:
        if not self.live:
            return
        best = "" if self.best is None else f", best {self.score} {self.best:.4f}"
        table = Table(
            "trial", "progress", self.score, "values", box=None, title=f"{self.done}/{self.trials} {self.what}{best}"
        )
        for name, one in list(self.running.items())[: self.SHOWN]:
            bar = ProgressBar(total=100, completed=one["progress"], width=20)
            table.add_row(name, bar, "" if one["score"] is None else f"{one['score']:.4f}", one["values"])
        self.live.update(table, refresh=True)


def describe_values(values: dict[str, Any]) -> str:
    """Searched fields and their values in one line, by the last parts of their paths."""
    return " ".join(
        f"{path.rpartition('.')[2]}={value:.3g}" if isinstance(value, float) else f"{path.rpartition('.')[2]}={value}"
        for path, value in values.items()
    )
