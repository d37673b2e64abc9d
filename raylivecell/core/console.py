"""Progress of long work on standard error: a live bar in a terminal, otherwise a plain line every few seconds."""

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

Item = TypeVar("Item")
PLAIN_EVERY_S = 5.0
# Characters per line in a file or a pipe, so that table rows and paths are not wrapped.
UNWRAPPED = 10_000


def _console() -> Console:
    console = Console(stderr=True, highlight=False)
    if console.is_terminal or console.is_jupyter:
        return console
    return Console(stderr=True, highlight=False, width=UNWRAPPED)


console = _console()


class ProgressBar:
    """Progress of one task, shown inside a `with` block: a bar in a terminal, otherwise a line every PLAIN_EVERY_S."""

    def __init__(self, text: str, total: int | None = None, unit: Literal["", " bytes"] = "") -> None:
        self.text, self.total, self.unit = text, total, unit
        amounts = (DownloadColumn(), TransferSpeedColumn()) if unit else (MofNCompleteColumn(),)
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), *amounts, TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task(text, total=total)
        self._last_line = time.monotonic()

    def __enter__(self) -> "ProgressBar":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, completed: int, total: int | None = None, text: str | None = None) -> None:
        """Show `completed` units of the task; `total` and `text` replace the previous ones if given."""
        self.total, self.text = total or self.total, text or self.text
        self._bar.update(self._task, completed=completed, total=self.total, description=self.text)
        if not console.is_terminal and time.monotonic() - self._last_line > PLAIN_EVERY_S:
            self._last_line = time.monotonic()
            print(f"{self.text}: {completed}/{self.total or '?'}{self.unit}", file=sys.stderr, flush=True)


def track(items: Iterable[Item], text: str, total: int) -> Iterator[Item]:
    """Yield `items`, and show the number of `total` that the caller has processed."""
    with ProgressBar(text, total) as bar:
        for completed, item in enumerate(items, 1):
            yield item
            bar.update(completed)


def show_warnings(warnings: Mapping[str, Sequence[str]], file: str) -> None:
    """Print one line per kind of warning (its text before the first colon): number of images, and the first image.

    Args:
        warnings: texts by image name.
        file: the file that lists all warnings.
    """
    kinds: dict[str, list[tuple[str, str]]] = {}
    for image, texts in warnings.items():
        for text in texts:
            kind, _, detail = text.partition(":")
            kinds.setdefault(kind, []).append((image, detail.strip()))
    for kind, entries in kinds.items():
        images = f"{len(entries)} image{'s' * (len(entries) != 1)}"
        first_image, detail = entries[0]
        line = f"warning: {kind}: {images}, first {first_image} ({detail}); all in {file}"
        console.print(line, soft_wrap=True, markup=False)
