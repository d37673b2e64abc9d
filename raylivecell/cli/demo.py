"""The whole way in minutes, on cells that it draws itself: synth, prepare, train, evaluate, predict."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from raylivecell import recipe
from raylivecell.core.console import console
from raylivecell.core.errors import UserError
from raylivecell.data import prepare
from raylivecell.inference import evaluate, predict
from raylivecell.runtime import session
from raylivecell.synthetic import writer
from raylivecell.training import preflight, train

IMAGES = 64
LEAST_IMAGES = 8
# In a folder that the demo made; only such a folder is emptied.
MARK = ".raylivecell-demo"


def demo(out: Path, recipe_file: str, images: int = IMAGES, seed: int = 0) -> dict[str, Any]:
    """Write everything under `out` and end with the scores and the pictures to open; `pixel_scores.json`'s content.

    Training uses two workers where this machine has room for them, else one.

    Raises:
        UserError: `out` holds something that no demo wrote; the recipe cannot be trained here.
    """
    begin = time.monotonic()
    chosen = recipe.load(recipe.find(recipe_file))
    if images < LEAST_IMAGES:
        raise UserError(
            f"--images {images}: the demo needs {LEAST_IMAGES}, to have some to train on, validate and test"
        )
    _check_free(out)
    session.connect()
    workers = _workers(chosen)
    _clear(out)
    cells, data, run, scores, found = (out / name for name in ("cells", "data", "run", "scores", "found"))
    _step("1/5  drawing cells", lambda: writer.write_dataset(cells, images, seed, mapper=session.ordered_map))
    _step("2/5  preparing the dataset", lambda: prepare.prepare(str(cells), str(data), prepare.PrepareConfig()))
    _step("3/5  training", lambda: train.train(str(data), str(run), chosen, workers))
    result = _step("4/5  scoring the test images", lambda: evaluate.evaluate(str(run), str(data), "test", str(scores)))
    folder = cells / "images" / "livecell_test_images"
    _step("5/5  finding cells", lambda: predict.predict(str(run), str(folder), str(found)))
    _show(out, time.monotonic() - begin)
    return result


def _workers(chosen: recipe.Recipe) -> int:
    """Workers that have room on this cluster; UserError where training would be refused after all the rest was done."""
    workers = preflight.demo_workers(chosen.batch_size)
    console.print(f"training will use {workers} worker{'s' if workers > 1 else ''}")
    preflight.hardware(chosen)
    preflight.worker_gpus(workers)
    preflight.worker_cpus(workers)
    preflight.gpus_work()
    return workers


def _check_free(out: Path) -> None:
    if out.exists() and any(out.iterdir()) and not (out / MARK).exists():
        raise UserError(f"{out} holds files that no demo wrote; choose another --out")


def _clear(out: Path) -> None:
    for name in ("cells", "data", "run", "scores", "found"):
        prepare.storage.delete(out / name)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).touch()


def _step(what: str, work: Callable[[], Any]) -> Any:
    begin = time.monotonic()
    console.print(f"[bold]{what}[/bold]")
    result = work()
    console.print(f"     {time.monotonic() - begin:.0f} s")
    return result


def _show(out: Path, seconds: float) -> None:
    table = Table(title=f"done in {seconds:.0f} s; open these", show_header=False)
    table.add_row("how it learned", str(out / "run" / "report.html"))
    table.add_row("worst, median and best image", str(out / "scores" / "overlays"))
    table.add_row("every test image with the cells found", str(out / "found" / "overlays"))
    table.add_row("a row a cell, a row an image", f"{out / 'found' / 'cells.csv'}, images.csv")
    console.print(table)
