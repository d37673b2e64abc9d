"""Overlays match their legend; the report is self-contained."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest

from raylivecell.reports import overlay, pictures, training
from raylivecell.runs.parents import DataRecord, Parent


def disk(size: int = 64, centre: tuple[int, int] = (32, 32), radius: int = 15) -> np.ndarray:
    y, x = np.ogrid[:size, :size]
    return ((y - centre[0]) ** 2 + (x - centre[1]) ** 2 <= radius**2).astype(np.uint8)


def decode(png: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)


def history(rows: int = 6) -> list[dict]:
    out = []
    for i in range(1, rows + 1):
        row = {"epoch": i, "step": 10 * i, "samples": 20 * i, "loss": 1 / i, "bce": 0.5 / i, "dice_loss": 0.5 / i}
        row |= {"lr": 1e-3, "images_per_s": 20.0, "data_wait_fraction": 0.1, "seconds": 3.0}
        if i % 2 == 0:
            row |= {"val_dice": 0.8, "val_iou": 0.7, "val_mean_image_dice": 0.1 * i}
        out.append(row)
    return out


DATASET = {
    "name": "tiny <set>",
    "licence": "CC BY-NC 4.0",
    "citation": "A & B",
    "splits": {"train": {"images": 3, "cells": 1234}, "val": {"images": 1, "cells": 5}},
    "cell_types": {"A172": {"images": {"train": 3}, "cells": 1239, "foreground_share": 0.25}},
    "defects": {"counts": {"leak": 2, "duplicate": 0}},
}

CHAIN = [
    Parent(
        start_from="runs/<p>",
        checkpoint="runs/<p>/checkpoint_1",
        sha256="ab" * 32,
        step=1500,
        targets="foreground",
        data=DataRecord(name="LIVECell", licence="licence of the parent", citation="Edlund", sha256="cd" * 32),
        loaded=0.5,
        new_layers=("head",),
    )
]


class Page(HTMLParser):
    """Parser that collects unclosed tags, sources, and text."""

    void = frozenset({"meta", "img", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.sources: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in self.void:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def write_report(folder: Path, rows: list[dict], dataset: dict | None = DATASET) -> Page:
    panels = [("one.tif", pictures.panel(np.full((64, 64), 128, np.uint8), disk(), disk(centre=(30, 34))))]
    training.write_run_report(str(folder), "seed: 0 # <script>", rows, panels, dataset, CHAIN)
    return Page((folder / "report.html").read_text())


def test_overlay_colours_match_the_legend() -> None:
    image = np.full((64, 64), 128, np.uint8)
    truth, predicted = disk(centre=(32, 26)), disk(centre=(32, 38))
    pixels = overlay.overlay(image, truth, predicted).astype(int)
    assert pixels.shape == (64, 64, 3)
    false, missed, agreeing = pixels[32, 50], pixels[32, 13], pixels[32, 41]
    assert false[0] > false[2] + 60
    assert missed[2] > missed[0] + 60
    assert tuple(agreeing) == overlay.FOUND
    assert (pixels[32, 32] == 128).all()  # the inside of a predicted cell is unchanged
    assert (pixels[2, 2] == 128).all()
    assert (image == 128).all()


def test_outlines_of_touching_cells_are_both_visible() -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    labels = np.kron(np.arange(1, 17).reshape(4, 4), np.ones((15, 15), int))
    labels = np.pad(labels, 2)
    pixels = overlay.outlined(image, labels)
    lines = overlay.edges(labels)
    assert (pixels[~lines] == image[~lines][:, None]).all()
    assert lines.sum() == 16 * (15 * 15 - 13 * 13)  # the outline of each cell is closed
    colours = {}
    for label in range(1, 17):
        (colour,) = {tuple(pixel) for pixel in pixels[lines & (labels == label)].tolist()}
        assert colour in overlay.OUTLINES
        colours[label] = colour
    for label, colour in colours.items():
        neighbours = [label + 1] * (label % 4 > 0) + [label + 4] + [label + 5] * (label % 4 > 0)
        assert colour not in [colours[other] for other in neighbours if other in colours]


def test_outlines_of_cells_with_a_gap_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlay, "BAND", 7)  # cells span several bands
    labels = np.zeros((50, 30), np.int32)
    labels[:20], labels[20 + overlay.NEAR : 40], labels[41 + overlay.NEAR :] = 1, 2, 3
    pixels = overlay.outlined(np.zeros(labels.shape, np.uint8), labels)
    seen = [{tuple(pixel) for pixel in pixels[labels == label].tolist()} - {(0, 0, 0)} for label in (1, 2, 3)]
    assert [len(colours) for colours in seen] == [1, 1, 1]
    assert seen[0] != seen[1]
    assert seen[0] == seen[2]  # farther away than NEAR: the first colour again
    assert (overlay.outlined(np.full((3, 4), 9, np.uint8), np.zeros((3, 4), int)) == 9).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1)])
def test_overlay_of_the_smallest_images(shape: tuple[int, int]) -> None:
    pixels = overlay.overlay(np.zeros(shape, np.uint8), np.ones(shape), np.zeros(shape))
    assert pixels.shape == (*shape, 3)
    assert decode(overlay.png(pixels)).shape == (*shape, 3)


def test_panel_preserves_the_pixels_of_the_image() -> None:
    image = np.random.default_rng(1).integers(0, 256, (211, 333), np.uint8)
    shown = decode(pictures.panel(image, disk(333)[:211], disk(333)[:211], "title"))
    np.testing.assert_array_equal(shown[34 : 34 + 211, :333, 0], image)


def test_report_is_self_contained_and_well_formed(tmp_path: Path) -> None:
    page = write_report(tmp_path, history())
    assert page.stack == []
    assert not page.tags & {"script", "link", "iframe", "object"}
    assert len(page.sources) == 6  # five curves, one overlay
    assert all(re.match(r"data:image/(png|svg\+xml);base64,", source) for source in page.sources)
    assert "@import" not in page.text
    assert "url(" not in page.text
    for source in page.sources:
        assert len(base64.b64decode(source.split(",", 1)[1])) > 1000


def test_report_shows_its_inputs(tmp_path: Path) -> None:
    page = write_report(tmp_path / "run-1", history())
    for expected in (
        "Run run-1",
        "seed: 0 # <script>",
        "tiny <set>",
        "CC BY-NC 4.0",
        "A & B",
        "1,234",
        "25.0%",
        "leak 2",
        "runs/<p>/checkpoint_1",
        "50.00%; new: head",
        "licence of the parent",
    ):
        assert expected in page.text
    assert "duplicate" not in page.text
    assert "0.6000" in page.text  # the best mean image Dice
    assert [p.name for p in (tmp_path / "run-1").iterdir()] == ["report.html"]


def test_report_without_validation_dataset_or_rows(tmp_path: Path) -> None:
    plain = [{k: v for k, v in row.items() if not k.startswith("val_")} for row in history(1)]
    page = write_report(tmp_path, plain, None)
    assert "Dice, validation" not in page.text
    assert len(page.sources) == 5
    assert "No reports." in write_report(tmp_path, []).text


def test_curves_of_a_run_are_reproducible() -> None:
    assert training.curves(history()) == training.curves(history())


def test_reports_within_an_epoch_are_drawn_over_steps() -> None:
    rows = [row | {"epoch": 1} for row in history()]
    assert training.curves(rows) != training.curves(history())
