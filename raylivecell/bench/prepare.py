"""`bench prepare`: images/s and peak memory of preparing a synthetic dataset, compared with common tools.

The dataset has LIVECell's format and frame size: 520x704 8-bit LZW TIFF, 325 cells with 60 corners, about 1 kB of JSON
per cell; 5,239 images have 1.7 million cells and 1.6 GB of JSON. The baseline works as most scripts do: `pycocotools`
on the entire JSON, and for each cell `annToMask` and a full-frame distance transform for the U-Net's border weights; it
draws a few images only.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import psutil

from raylivecell.bench.figures import Figures, Options, summary

HEIGHT, WIDTH = 520, 704
PATTERNS = 32
"""Number of different cell patterns; images repeat them with different noise, so that no two are equal."""
ROWS, COLUMNS, CORNERS = 13, 25, 60
SPLITS = {"train": 0.62, "val": 0.11, "test": 0.27}
BASELINE_IMAGES = 2
BASELINE = "pycocotools and scipy on full frames, one process"
SAMPLE_EVERY_S = 1.0


def bench(options: Options, folder: str | None = None) -> Figures:
    """Write a dataset, prepare it in a separate process, and measure; the dataset is deleted afterwards.

    Args:
        options: number of `images`; LIVECell has 5,239 (3.4 GB on disk during the run).
        folder: parent of the dataset's folder; default: the system's temporary folder.

    Returns:
        images, cells, json_bytes, seconds (of which start_seconds until Ray is up), images_per_s,
        reader_peak_mib (peak resident memory of the process that reads the JSON), tree_peak_mib (highest sum, sampled
        every second, of the proportional memory of that process and its descendants, Ray's included), and `baseline`.
    """
    images = options.images
    root = Path(tempfile.mkdtemp(prefix="raylivecell-bench-", dir=folder))
    try:
        cells = write_source(root / "source", images)
        size = sum(path.stat().st_size for path in root.glob("source/*.json"))
        ours = _measure(root)
        baseline, baseline_speed = _baseline(root)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    speed = images / ours["seconds"]
    return {
        "images": images,
        "cells": cells,
        "json_bytes": size,
        **ours,
        "images_per_s": {"raylivecell": summary([speed]), BASELINE: summary([baseline_speed])},
        "ratio": {f"raylivecell / {BASELINE}": summary([speed / baseline_speed])},
        "baseline": baseline,
    }


def write_source(root: Path, images: int) -> int:
    """Write the dataset; returns the number of cells."""
    patterns = [_pattern(np.random.default_rng(seed)) for seed in range(PATTERNS)]
    (root / "images").mkdir(parents=True)
    names = [f"{'AB'[number % 2]}_Phase_{number:05d}.tif" for number in range(images)]
    for number, name in enumerate(names):
        rng = np.random.default_rng((1, number))
        noise = rng.integers(0, 4, (HEIGHT, WIDTH), np.uint8)
        cv2.imwrite(str(root / "images" / name), patterns[number % PATTERNS][0] + noise)
    starts = np.cumsum([0, *(round(fraction * images) for fraction in SPLITS.values())])
    starts[-1] = images
    for split, first, end in zip(SPLITS, starts, starts[1:]):
        _write_json(root / f"livecell_coco_{split}.json", names, range(first, end), patterns)
    return images * ROWS * COLUMNS


def _pattern(rng: np.random.Generator) -> tuple[np.ndarray, list[str]]:
    """A frame without noise, uint8 (520, 704), and each cell's `segmentation` as JSON text."""
    frame = np.full((HEIGHT, WIDTH), 126, np.uint8)
    texts = []
    angles = np.linspace(0, 2 * np.pi, CORNERS, endpoint=False)
    for row, column in np.ndindex(ROWS, COLUMNS):
        centre = (np.array([column, row]) + rng.uniform(0.3, 0.7, 2)) * (WIDTH / COLUMNS, HEIGHT / ROWS)
        radius = rng.uniform(9, 13) * (1 + 0.1 * np.sin(3 * angles + rng.uniform(0, 6)))
        outline = centre + radius[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        cv2.fillPoly(frame, [outline.round().astype(np.int32)], int(rng.integers(90, 180)))
        texts.append(json.dumps([outline.round(2).ravel().tolist()]))
    return frame, texts


def _write_json(path: Path, names: list[str], numbers: range, patterns: list[tuple[np.ndarray, list[str]]]) -> None:
    """Write JSON in LIVECell's format: images, then annotations, with ids from one sequence."""
    stride = ROWS * COLUMNS + 1
    images = [
        {"id": n * stride, "width": WIDTH, "height": HEIGHT, "file_name": names[n], "original_filename": names[n]}
        for n in numbers
    ]
    head = {
        "info": {"description": "bench"},
        "licenses": [],
        "categories": [{"id": 1, "name": "cell"}],
        "images": images,
    }
    with open(path, "w") as stream:
        stream.write(json.dumps(head)[:-1] + ', "annotations": [')
        for index, number in enumerate(numbers):
            cells = enumerate(patterns[number % PATTERNS][1], number * stride + 1)
            stream.write(
                (", " if index else "")
                + ", ".join(
                    f'{{"id": {cell}, "image_id": {number * stride}, "category_id": 1, "segmentation": {text}, '
                    '"area": 471.2389, "bbox": [446.36, 367.89, 29.88, 39.65], "iscrowd": 0}'
                    for cell, text in cells
                )
            )
        stream.write("]}")


_CHILD = """
import json, resource, sys, time
start = time.perf_counter()
from raylivecell.runtime import session as runtime
from raylivecell.data.prepare import prepare
runtime.connect()
up = time.perf_counter()
dataset = prepare(*sys.argv[1:])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
cells = sum(split["cells"] for split in dataset["splits"].values())
times = {"seconds": time.perf_counter() - start, "start_seconds": up - start}
print(json.dumps(times | {"reader_peak_mib": peak, "cells_kept": cells}))
"""


def _measure(root: Path) -> Figures:
    """Prepare the dataset in `root` in a separate process."""
    command = [sys.executable, "-c", _CHILD, str(root / "source"), str(root / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        peak = max(_tree_mib(child), default=0.0)
        output = child.communicate()[0]
    if child.returncode:
        raise RuntimeError(f"prepare ended with {child.returncode}")
    figures = json.loads(output.splitlines()[-1])
    return {name: round(value, 1) for name, value in figures.items()} | {"tree_peak_mib": round(peak, 1)}


def _tree_mib(child: "subprocess.Popen[str]") -> Iterator[float]:
    """MiB of a process and its descendants until it ends, each shared page counted once."""
    process = psutil.Process(child.pid)
    while child.poll() is None:
        total = 0.0
        try:
            for member in [process, *process.children(recursive=True)]:
                total += _pss_mib(member)
        except psutil.NoSuchProcess:
            continue
        yield total
        time.sleep(SAMPLE_EVERY_S)


def _pss_mib(process: psutil.Process) -> float:
    try:
        return process.memory_full_info().pss / 2**20
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0.0  # the process ended after it was listed


_BASELINE = """
import json, resource, sys, time
import numpy as np
from PIL import Image
from scipy import ndimage
from pycocotools.coco import COCO
start = time.perf_counter()
coco = COCO(sys.argv[1])
load = time.perf_counter() - start
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
start = time.perf_counter()
for entry in list(coco.imgs.values())[: int(sys.argv[3])]:
    np.asarray(Image.open(f"{sys.argv[2]}/{entry['file_name']}"))
    masks = [coco.annToMask(cell) for cell in coco.imgToAnns[entry["id"]]]
    labels = np.zeros(masks[0].shape, np.uint16)
    for number, mask in enumerate(masks, 1):
        labels[mask > 0] = number
    near = np.sort(np.partition(np.stack([ndimage.distance_transform_edt(mask == 0) for mask in masks]), 1, 0)[:2], 0)
    border = np.exp(-(near.sum(axis=0) ** 2) / 50)
print(json.dumps({"load": load, "memory": memory, "draw": time.perf_counter() - start}))
"""


def _baseline(root: Path) -> tuple[Figures, float]:
    """Load the smallest annotation file and draw two of its images, with pycocotools and scipy in one process.

    Returns:
        Figures of loading, and images/s of drawing.
    """
    path = min(root.glob("source/*.json"), key=lambda file: file.stat().st_size)
    command = [sys.executable, "-c", _BASELINE, str(path), str(root / "source" / "images"), str(BASELINE_IMAGES)]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    output = json.loads(process.stdout.splitlines()[-1])
    megabytes = path.stat().st_size / 1e6
    figures = {
        "json_bytes": path.stat().st_size,
        "json_mb_per_s": round(megabytes / output["load"], 1),
        "peak_mib": round(output["memory"], 1),
    }
    return figures, BASELINE_IMAGES / output["draw"]
