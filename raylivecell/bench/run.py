"""`raylivecell bench`: run a benchmark, print its figures as a table, write bench.json and a chart."""

import importlib
import platform
from datetime import date
from pathlib import Path
from typing import Literal

import psutil
from rich.table import Table

from raylivecell.bench.figures import Figures, Options, chart
from raylivecell.core import storage
from raylivecell.core.console import console
from raylivecell.core.version import __version__

Benchmark = Literal["augment", "feed", "step", "train", "prepare", "predict", "evaluate", "startup", "scale", "serve"]
"""Modules of this package with a function `bench`, imported when chosen: some import Ray or torch."""


def bench(benchmark: Benchmark, out: Path, repeats: int, images: int) -> Figures:
    """Run one benchmark, print its figures, write OUT/bench.json and bench.png; returns the content of bench.json.

    Args:
        benchmark: its name.
        out: output folder.
        repeats: runs of each variant, in turn; figures are medians.
        images: number of images (`feed`, `train`, `prepare`, `evaluate`, `scale`, `serve`).
    """
    figures = _measure(benchmark, Options(repeats, images))
    hardware = {"processor": _processor(), "cores": psutil.cpu_count(), "memory_gib": _memory_gib()}
    result = {
        "bench": benchmark,
        "raylivecell": __version__,
        "date": date.today().isoformat(),
        "hardware": hardware,
        "figures": figures,
    }
    storage.write_json(storage.join(out, "bench.json"), result)
    png = chart(f"bench {benchmark}, {hardware['processor']}, {hardware['cores']} cores", figures)
    storage.write_bytes(storage.join(out, "bench.png"), png)
    console.print(_table(benchmark, figures))
    console.print(f"written: {out}/bench.json, bench.png")
    return result


def _measure(benchmark: Benchmark, options: Options) -> Figures:
    return importlib.import_module(f"raylivecell.bench.{benchmark}").bench(options)


def _table(benchmark: str, figures: Figures) -> Table:
    table = Table(title=f"bench {benchmark}", show_header=False)
    for name, text in _rows(figures):
        table.add_row(name, text)
    return table


def _rows(figures: Figures, prefix: str = "") -> list[tuple[str, str]]:
    """(path and name, text) of every figure; a summary is one figure."""
    rows: list[tuple[str, str]] = []
    for name, figure in figures.items():
        if isinstance(figure, dict) and set(figure) == {"median", "min", "max"}:
            rows.append((prefix + name, f"{figure['median']:.4g}  ({figure['min']:.4g} to {figure['max']:.4g})"))
        elif isinstance(figure, dict):
            rows += _rows(figure, f"{prefix}{name}: ")
        else:
            rows.append((prefix + name, f"{figure:.4g}" if isinstance(figure, float) else str(figure)))
    return rows


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        return names[0] if names else platform.processor()
    return platform.processor()


def _memory_gib() -> float:
    return round(psutil.virtual_memory().total / 2**30, 1)
