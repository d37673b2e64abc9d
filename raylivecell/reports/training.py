"""report.html of a training run: scores, curves, segmentations, recipe, dataset and licence."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from raylivecell.core import addresses, storage
from raylivecell.reports import page
from raylivecell.runs.parents import Parent, shorten
from raylivecell.runs.progress import validation_score
from raylivecell.runs.teachers import Teacher

Row = dict[str, Any]
Picture = tuple[str, bytes]
"""Title and PNG."""

# Title, unit of the y axis, and the history's columns with their names and colours (Okabe and Ito).
CURVES: tuple[tuple[str, str, tuple[tuple[str, str, str], ...]], ...] = (
    (
        "Loss, training",
        "",
        (
            ("loss", "total", "#000000"),
            ("bce", "BCE", "#0072B2"),
            ("dice_loss", "Dice", "#D55E00"),
            ("aux_loss", "boundary or distances", "#009E73"),
            ("teacher_loss", "teacher's maps", "#CC79A7"),
        ),
    ),
    (
        "Scores, validation",
        "",
        (
            ("val_mean_image_dice", "mean image Dice", "#000000"),
            ("val_dice", "Dice", "#009E73"),
            ("val_iou", "IoU", "#CC79A7"),
            ("val_msa", "mSA", "#0072B2"),
        ),
    ),
    ("Learning rate", "", (("lr", "learning rate", "#0072B2"),)),
    ("Speed", "images/s", (("images_per_s", "images/s", "#0072B2"),)),
    ("Time spent waiting for data", "fraction", (("data_wait_fraction", "waiting", "#D55E00"),)),
)


def write_run_report(
    out_uri: str,
    recipe_yaml: str,
    history: Sequence[Row],
    overlays: Sequence[Picture],
    dataset: dict[str, Any] | None,
    chain: Sequence[Parent] = (),
    teacher: Teacher | None = None,
) -> None:
    """Write `report.html` of a training run into the folder `out_uri`, atomically.

    Args:
        out_uri: the run's folder.
        recipe_yaml: the recipe as text.
        history: rows of the training loop, one per report, oldest first; `val_*` may be absent.
        overlays: titles and PNGs of segmentations.
        dataset: the dataset's `dataset.json`, or None.
        chain: the network from which the run started, and its parents.
        teacher: the network whose maps the run learned.
    """
    columns = list(dict.fromkeys(name for row in history for name in row))
    page_bytes = page.render(
        "training",
        f"Run {addresses.name(out_uri)}",
        "Training of a U-Net on cells in phase contrast",
        headline=headline(history),
        curves=page.images(curves(history), "svg+xml"),
        overlays=page.images(overlays, "png"),
        dataset=dataset,
        parents=_parents(chain),
        teacher=_teacher(teacher),
        splits=_splits(dataset or {}),
        cell_types=_cell_types(dataset or {}),
        defects=_defects(dataset or {}),
        recipe=recipe_yaml,
        history=page.number_table(history, columns),
    )
    storage.write_bytes(storage.join(out_uri, "report.html"), page_bytes)


def headline(history: Sequence[Row]) -> list[tuple[str, str]]:
    """Summary figures of the run: label and value; best scores are those of the best checkpoint."""
    if not history:
        return []
    tiles = []
    scored = [row for row in history if "val_mean_image_dice" in row]
    if scored:
        best = max(scored, key=validation_score)
        tiles += [("mSA, validation, best", f"{best['val_msa']:.4f}")] if "val_msa" in best else []
        tiles += [
            ("mean image Dice, validation, best", f"{best['val_mean_image_dice']:.4f}"),
            ("Dice over all pixels, same report", f"{best['val_dice']:.4f}"),
            ("IoU over all pixels, same report", f"{best['val_iou']:.4f}"),
            ("best at step", f"{best['step']:,}"),
        ]
    seconds = sum(row["seconds"] for row in history)
    waited = sum(row["data_wait_fraction"] * row["seconds"] for row in history)
    trained = sum(row["images_per_s"] * row["seconds"] for row in history)
    return [
        *tiles,
        ("loss, last", f"{history[-1]['loss']:.4f}"),
        ("steps", f"{history[-1]['step']:,}"),
        ("time in steps", page.duration(seconds)),
        ("images/s, mean", f"{trained / max(seconds, 1e-9):,.1f}"),
        ("waiting for data", f"{waited / max(seconds, 1e-9):.0%}"),
    ]


def curves(history: Sequence[Row]) -> list[tuple[str, bytes]]:
    """Title and SVG of each figure of `CURVES` with values in the history.

    The x axis is the epoch if every report has a different one, otherwise the step.
    """
    epochs = [row["epoch"] for row in history]
    axis = "epoch" if len(set(epochs)) == len(epochs) else "step"
    figures = []
    for title, unit, lines in CURVES:
        present = [line for line in lines if any(line[0] in row for row in history)]
        if present:
            figures.append((title, page.svg(_curve(history, axis, unit, present))))
    return figures


def _curve(history: Sequence[Row], axis: str, unit: str, lines: Sequence[tuple[str, str, str]]) -> Figure:
    """Plot a line for each column, through the reports that have it."""
    figure, axes = page.axes_of()
    marker = "o" if len(history) <= 30 else ""  # single points must be visible; hundreds would hide the line
    for column, name, colour in lines:
        points = [(row[axis], row[column]) for row in history if column in row]
        axes.plot(*zip(*points), color=colour, label=name, marker=marker, markersize=3, linewidth=1.6)
    axes.set_xlabel(axis)
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    low, high = axes.get_ylim()
    if all(column.startswith("val_") for column, *_ in lines):
        axes.set_ylim(max(0.0, low), min(1.0, high))
    elif "lr" not in {column for column, *_ in lines}:
        axes.set_ylim(0, max(high, 1e-3))
    else:
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=9)
    return figure


def _parents(chain: Sequence[Parent]) -> page.Table:
    head = ["checkpoint", "SHA-256 of the weights", "step", "targets", "weights that fit", "trained on", "licence"]
    head += ["citation"]
    rows = []
    for parent in chain:
        new = f"; new: {shorten(parent.new_layers)}" if parent.new_layers else ""
        about = [parent.data.name, parent.data.licence, parent.data.citation]
        fits = f"{parent.loaded:.2%}{new}"
        rows.append([parent.checkpoint, parent.sha256[:16], f"{parent.step:,}", parent.targets, fits, *about])
    return page.Table(head, rows)


def _teacher(teacher: Teacher | None) -> page.Table:
    head = ["checkpoint", "network", "SHA-256 of the weights", "step", "trained on", "licence", "citation"]
    rows = []
    for data in teacher.datasets if teacher else ():
        about = [teacher.checkpoint, teacher.network, teacher.sha256[:16], f"{teacher.step:,}"] if teacher else []
        rows.append([*about, data.name, data.licence, data.citation])
    return page.Table(head, rows)


def _splits(dataset: dict[str, Any]) -> page.Table:
    rows = [
        [name, f"{split['images']:,}", f"{split['cells']:,}" if "cells" in split else ""]
        for name, split in dataset.get("splits", {}).items()
    ]
    return page.Table(["split", "images", "cells"], rows)


def _cell_types(dataset: dict[str, Any]) -> page.Table:
    splits = list(dataset.get("splits", {}))
    head = ["cell type", *(f"images, {split}" for split in splits), "cells", "foreground"]
    rows = []
    for name, counts in dataset.get("cell_types", {}).items():
        images = [f"{counts.get('images', {}).get(split, 0):,}" for split in splits]
        fraction = counts.get("foreground_share")
        rows.append([name, *images, f"{counts.get('cells', 0):,}", "" if fraction is None else f"{fraction:.1%}"])
    return page.Table(head, rows)


def _defects(dataset: dict[str, Any]) -> str:
    counts = dataset.get("defects", {}).get("counts", {})
    return ", ".join(f"{name} {count:,}" for name, count in counts.items() if count)
