"""One way to show that long work moves: a live bar in a terminal, a plain line every few seconds elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")
PLAIN_EVERY_S = 5.0
console = Console(stderr=True, highlight=False)


def track(items: Iterable[Item], what: str, total: int) -> Iterator[Item]:
    """Pass `items` through, showing `what` and how many of `total` are done, on standard error."""
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            yield from bar.track(items, total=total, description=what)
        return
    last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        if time.monotonic() - last > PLAIN_EVERY_S:
            last = time.monotonic()
            print(f"{what}: {done}/{total}", file=sys.stderr, flush=True)
