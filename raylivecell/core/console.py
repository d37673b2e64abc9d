"""Progress of long work on standard error: a live bar in a terminal, elsewhere a plain line every few seconds."""

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")
PLAIN_EVERY_S = 5.0
# Characters in a line where nothing limits them: in a file or a pipe a table or a path stays in one line.
UNWRAPPED = 10_000


def _console() -> Console:
    console = Console(stderr=True, highlight=False)
    return (
        console if console.is_terminal or console.is_jupyter else Console(stderr=True, highlight=False, width=UNWRAPPED)
    )


console = _console()


def track(items: Iterable[Item], what: str, total: int) -> Iterator[Item]:
    """Yield `items`, showing `what` and how many of `total` are done."""
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
