"""`raylivecell bench`: each figure beside its rival's in the same run, as a table and in bench.json."""

import platform
from datetime import date
from pathlib import Path
from typing import Any, Literal

import psutil
from rich.table import Table

from raylivecell.bench.chart import chart
from raylivecell.core import storage
from raylivecell.core.console import console
from raylivecell.core.version import __version__

What = Literal["augment", "feed", "step", "train", "prepare", "predict", "evaluate", "startup", "scale"]


def bench(what: What, out: Path, repeats: int, images: int) -> dict[str, Any]:
    """Run one benchmark, print it and write OUT/bench.json and bench.png; what was written.

    Args:
        what: which.
        out: folder of both.
        repeats: runs of each rival, in turn; medians are given.
        images: size of the set (`feed`, `train`, `prepare`, `evaluate`, `scale`).
    """
    figures = _run(what, repeats, images)
    hardware = {"processor": _processor(), "cores": psutil.cpu_count(), "memory_gib": _memory_gib()}
    result = {
        "bench": what,
        "raylivecell": __version__,
        "date": date.today().isoformat(),
        "hardware": hardware,
        "figures": figures,
    }
    storage.write_json(storage.join(out, "bench.json"), result)
    drawn = chart(f"bench {what}, {hardware['processor']}, {hardware['cores']} cores", figures)
    storage.write_bytes(storage.join(out, "bench.png"), drawn)
    console.print(_table(what, figures))
    console.print(f"written: {out}/bench.json, bench.png")
    return result


def _run(what: What, repeats: int, images: int) -> dict[str, Any]:
    """Each in a room of its own, imported when asked for: some start Ray."""
    match what:
        case "augment":
            from raylivecell.bench.augment import bench_augment

            return bench_augment(repeats=repeats)
        case "feed":
            from raylivecell.bench.feed import bench_feed

            return bench_feed(images, repeats)
        case "step":
            from raylivecell.bench.step import bench_step

            return bench_step(repeats)
        case "train":
            from raylivecell.bench.train import bench_train

            return bench_train(images, repeats)
        case "prepare":
            from raylivecell.bench.prepare import bench_prepare

            return bench_prepare(images)
        case "predict":
            from raylivecell.bench.predict import bench_predict

            return bench_predict(repeats)
        case "evaluate":
            from raylivecell.bench.evaluate import bench_evaluate

            return bench_evaluate(images, repeats)
        case "startup":
            from raylivecell.bench.startup import bench_startup

            return bench_startup(repeats)
        case "scale":
            from raylivecell.bench.scale import bench_scale

            return bench_scale(images, repeats)


def _table(what: str, figures: dict[str, Any]) -> Table:
    table = Table(title=f"bench {what}", show_header=False)
    for name, value in _leaves(figures):
        table.add_row(name, value)
    return table


def _leaves(value: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """(dotted name, text) of every figure; a spread is one."""
    rows: list[tuple[str, str]] = []
    for name, item in value.items():
        if isinstance(item, dict) and set(item) == {"median", "min", "max"}:
            rows.append((prefix + name, f"{item['median']:.4g}  ({item['min']:.4g} to {item['max']:.4g})"))
        elif isinstance(item, dict):
            rows += _leaves(item, f"{prefix}{name}: ")
        else:
            rows.append((prefix + name, f"{item:.4g}" if isinstance(item, float) else str(item)))
    return rows


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        return names[0] if names else platform.processor()
    return platform.processor()


def _memory_gib() -> float:
    return round(psutil.virtual_memory().total / 2**30, 1)
