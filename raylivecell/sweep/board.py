"""Progress of a sweep's trials on the console: a live table in a terminal, plain lines elsewhere."""

import time
from typing import Any

from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from raylivecell.core.console import console


class TrialTable:
    """Table of running trials; prints a line when a trial ends and, without a terminal, at most one report a minute."""

    SHOWN = 12
    PLAIN_EVERY_S = 60.0

    def __init__(self, trials: int, done: int, best: float | None, score: str, what: str = "trials") -> None:
        self.trials, self.done, self.best, self.score, self.what = trials, done, best, score, what
        self.running: dict[str, dict[str, Any]] = {}
        self.last_plain = time.monotonic()
        self.live = Live(console=console, transient=True, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> "TrialTable":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def start(self, name: str, values: dict[str, Any]) -> None:
        """Add a trial that starts, or resumes after a crash."""
        self.running[name] = {"values": describe_values(values), "score": None, "progress": 0.0}
        self._refresh()

    def report(self, name: str, row: dict[str, Any]) -> None:
        """Show a trial's report: `score`, `progress`, `step` and `steps`."""
        self.running[name] |= {key: row[key] for key in ("score", "progress", "step", "steps")}
        if not self.live and time.monotonic() - self.last_plain > self.PLAIN_EVERY_S:
            self._print(f"{name} {self.score} {row['score']:.4f} at step {row['step']}/{row['steps']}")
        self._refresh()

    def end(self, name: str, state: str, why: str | None) -> None:
        """Remove a trial that ended, and print its result."""
        trial = self.running.pop(name)
        self.done += 1
        if state == "complete" and trial["score"] is not None:
            self.best = trial["score"] if self.best is None else max(self.best, trial["score"])
        parts = [f"{self.what} {self.done}/{self.trials}", f"{name} {state}"]
        if trial["score"] is not None:
            parts.append(f"{self.score} {trial['score']:.4f} at step {trial['step']}/{trial['steps']}")
        if self.best is not None:
            parts.append(f"best {self.best:.4f}")
        self._print("  ".join([*parts, why or trial["values"]]))
        self._refresh()

    def _print(self, line: str) -> None:
        self.last_plain = time.monotonic()
        console.print(line, soft_wrap=True)

    def _refresh(self) -> None:
        if not self.live:
            return
        best = "" if self.best is None else f", best {self.score} {self.best:.4f}"
        table = Table(
            "trial", "progress", self.score, "values", box=None, title=f"{self.done}/{self.trials} {self.what}{best}"
        )
        for name, trial in list(self.running.items())[: self.SHOWN]:
            bar = ProgressBar(total=100, completed=trial["progress"], width=20)
            table.add_row(name, bar, "" if trial["score"] is None else f"{trial['score']:.4f}", trial["values"])
        self.live.update(table, refresh=True)


def describe_values(values: dict[str, Any]) -> str:
    """Format searched fields and their values in one line, with the last part of each path."""
    return " ".join(
        f"{path.rpartition('.')[2]}={value:.3g}" if isinstance(value, float) else f"{path.rpartition('.')[2]}={value}"
        for path, value in values.items()
    )
