"""One way to show that long work moves: a live bar in a terminal, a plain line every few seconds elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
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


def show_warnings(warnings: Mapping[str, Sequence[str]], where: str) -> None:
    """Print one line for each kind of warning (its text before the first colon): how many images, and the first.

    Args:
        warnings: by image.
        where: the file that holds them all.
    """
    kinds: dict[str, list[tuple[str, str]]] = {}
    for image, texts in warnings.items():
        for text in texts:
            kind, _, detail = text.partition(":")
            kinds.setdefault(kind, []).append((image, detail.strip()))
    for kind, named in kinds.items():
        count = f"{len(named)} image{'s' * (len(named) != 1)}"
        line = f"warning: {kind}: {count}, first {named[0][0]} ({named[0][1]}); all in {where}"
        console.print(line, soft_wrap=True, markup=False)
