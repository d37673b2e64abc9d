"""All stages on synthetic cells in minutes: synth, prepare, train, evaluate, predict."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from raylivecell import recipe
from raylivecell.core import storage
from raylivecell.core.console import console
from raylivecell.core.errors import UserError
from raylivecell.data import prepare
from raylivecell.inference import evaluate, predict
from raylivecell.runtime import session
from raylivecell.synthetic import writer
from raylivecell.training import preflight, train

IMAGES = 64
MIN_IMAGES = 8
FOLDERS = ("cells", "data", "run", "scores", "found")
# Marks a folder created by the demo; the demo deletes files only in such a folder.
MARK = ".raylivecell-demo"


def demo(out: Path, recipe_file: str, images: int = IMAGES, seed: int = 0) -> dict[str, Any]:
    """Run all stages in `out`, print which files to open, and return the scores of `evaluate`.

    Training uses two workers if this machine has CPUs for them, otherwise one.

    Raises:
        UserError: `out` contains files not written by the demo; the recipe cannot be trained here.
    """
    begin = time.monotonic()
    settings = recipe.load(recipe.find(recipe_file))
    if images < MIN_IMAGES:
        raise UserError(f"--images {images}: the demo needs {MIN_IMAGES} for its train, val and test splits")
    _check_free(out)
    session.connect()
    workers = _workers(settings)
    _clear(out)
    cells, data, run, scores, predictions = (out / name for name in FOLDERS)
    _step("1/5  drawing cells", lambda: writer.write_dataset(cells, images, seed, mapper=session.ordered_map))
    _step("2/5  preparing the dataset", lambda: prepare.prepare(str(cells), str(data), prepare.PrepareConfig()))
    _step("3/5  training", lambda: train.train(str(data), str(run), settings, workers))
    result = _step("4/5  scoring the test images", lambda: evaluate.evaluate(str(run), str(data), "test", str(scores)))
    folder = cells / "images" / "livecell_test_images"
    _step("5/5  segmenting the test images", lambda: predict.predict(str(run), str(folder), str(predictions)))
    _show(out, time.monotonic() - begin)
    return result


def _workers(settings: recipe.Recipe) -> int:
    """Number of workers for this machine; UserError, before any stage runs, if training would fail here."""
    workers = preflight.demo_workers(settings.batch_size)
    console.print(f"training will use {workers} worker{'s' if workers > 1 else ''}")
    preflight.hardware(settings)
    preflight.worker_gpus(workers)
    preflight.worker_cpus(workers)
    preflight.gpus_work()
    return workers


def _check_free(out: Path) -> None:
    if out.exists() and any(out.iterdir()) and not (out / MARK).exists():
        raise UserError(f"{out} contains files not written by the demo; choose another --out")


def _clear(out: Path) -> None:
    for name in FOLDERS:
        storage.delete(out / name)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).touch()


def _step(title: str, work: Callable[[], Any]) -> Any:
    begin = time.monotonic()
    console.print(f"[bold]{title}[/bold]")
    result = work()
    console.print(f"     {time.monotonic() - begin:.0f} s")
    return result


def _show(out: Path, seconds: float) -> None:
    table = Table(title=f"done in {seconds:.0f} s; open these", show_header=False)
    table.add_row("training curves", str(out / "run" / "report.html"))
    table.add_row("worst, median and best image", str(out / "scores" / "overlays"))
    table.add_row("test images with outlines of the cells", str(out / "found" / "overlays"))
    table.add_row("one row per cell, one row per image", f"{out / 'found' / 'cells.csv'}, images.csv")
    console.print(table)
