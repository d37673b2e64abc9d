"""`bench serve`: requests/s and latency of `serve` next to `predict` on the same images, its start, and its memory.

Synthetic frames of 520x704 and a network of the size of recipe `small` with random weights. Both run as a user starts
them, with one process that has the network. The speed of `predict` is that after its start: N images minus one image.
"""

import io
import itertools
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import requests
import tifffile
import torch
from numpy.typing import NDArray

from raylivecell.bench.figures import Figures, Options, measure_in_turn, ratios, summaries, summary
from raylivecell.core.errors import MachineError
from raylivecell.network.unet import build_model
from raylivecell.recipe import ModelConfig, Recipe
from raylivecell.runs import checkpoint
from raylivecell.runs.progress import Progress
from raylivecell.serving.settings import TOKEN_VARIABLE
from raylivecell.synthetic import writer

RECIPE = Recipe(targets="distance", model=ModelConfig(features=(8, 16, 24, 40, 56), norm="group"))
CLIENTS = 16
MANY, SINGLE, PREDICT = f"serve, {CLIENTS} clients", "serve, 1 client", "predict, after its start"
START_S = 300


def bench(options: Options) -> Figures:
    """Images per second and seconds per request.

    Args:
        options: `images` per run; `repeats` runs of each variant, in turn.

    Returns:
        `images_per_s`: variant -> summary; `seconds_per_request`: variant -> p50 and p95, summaries; `ratio` to
        `predict`; `seconds_to_first_answer`: from the start of the command; `memory_mib`: of the service's processes
        after the first answer and at the end; `requests`: their number.
    """
    latencies: dict[str, list[list[float]]] = {MANY: [], SINGLE: []}
    with tempfile.TemporaryDirectory(prefix="raylivecell-bench-") as folder:
        root = Path(folder)
        files = _write_images(root / "images", options.images)
        _write_images(root / "image", 1)
        network = _write_network(root / "network")
        numbers = itertools.count()

        def predict() -> float:
            times = [_predict(network, root / name, root / f"out-{next(numbers)}") for name in ("images", "image")]
            return (options.images - 1) / (times[0] - times[1])

        with _service(network) as (url, process, began):
            _post(url, files[0].read_bytes())
            first = time.monotonic() - began
            before = _memory_mib(process)

            def serve(name: str, clients: int) -> float:
                seconds, total = _load(url, _shifted(files, 1 + next(numbers)), clients)
                latencies[name].append(seconds)
                return options.images / total

            variants = {
                MANY: lambda: serve(MANY, CLIENTS),
                SINGLE: lambda: serve(SINGLE, 1),
                PREDICT: predict,
            }
            speeds = measure_in_turn(variants, options.repeats)
            after = _memory_mib(process)
    return {
        "images_per_s": summaries(speeds),
        "ratio": ratios(speeds, [(MANY, PREDICT), (SINGLE, PREDICT)]),
        "seconds_per_request": {name: _quantiles(runs) for name, runs in latencies.items()},
        "seconds_to_first_answer": round(first, 1),
        "memory_mib": {"after the first answer": before, "at the end": after},
        "requests": 1 + 2 * options.repeats * options.images,
    }


def _write_images(folder: Path, count: int) -> list[Path]:
    folder.mkdir()
    files = [folder / f"{number:04}.tif" for number in range(count)]
    for number, file in enumerate(files):
        file.write_bytes(_tiff(writer.draw_labels(0, number)[0]))
    return files


def _tiff(image: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, image)
    return buffer.getvalue()


def _write_network(folder: Path) -> str:
    folder.mkdir()
    torch.manual_seed(0)
    checkpoint.save(str(folder), build_model(RECIPE.model, RECIPE.outputs), {}, Progress(), RECIPE)
    return str(folder)


@contextmanager
def _service(network: str) -> Iterator[tuple[str, psutil.Process, float]]:
    """A running service: its address, its process, and when that was started (`time.monotonic`)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, began = f"http://127.0.0.1:{port}", time.monotonic()
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", TOKEN_VARIABLE)}
    words = ["raylivecell", "serve", "--checkpoint", network, "--port", str(port)]
    with subprocess.Popen(
        [sys.executable, "-m", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    ) as process:
        try:
            _wait(url, process, began)
            yield url, psutil.Process(process.pid), began
        finally:
            process.terminate()


def _wait(url: str, process: subprocess.Popen[bytes], began: float) -> None:
    while process.poll() is None and time.monotonic() - began < START_S:
        try:
            if requests.get(f"{url}/healthz", timeout=10).ok:
                return
        except (requests.ConnectionError, requests.Timeout):
            pass  # it does not listen yet, or starts
        time.sleep(0.1)
    raise MachineError(f"`serve` was not ready within {START_S} s; run `raylivecell serve` for its messages")


def _post(url: str, image: bytes) -> float:
    """Seconds of one request."""
    began = time.monotonic()
    response = requests.post(f"{url}/segment?format=csv", data=image, timeout=600)
    response.raise_for_status()
    return time.monotonic() - began


def _shifted(files: Sequence[Path], columns: int) -> list[bytes]:
    """The images moved to the right: other images for the service, whose maps it does not have in memory."""
    return [_tiff(np.roll(tifffile.imread(file), columns, axis=1)) for file in files]


def _load(url: str, images: Sequence[bytes], clients: int) -> tuple[list[float], float]:
    """Seconds of each request, and of all together, with `clients` requests at the same time."""
    began = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        seconds = list(pool.map(lambda image: _post(url, image), images))
    return seconds, time.monotonic() - began


def _predict(network: str, images: Path, out: Path) -> float:
    """Seconds of `predict`."""
    began = time.monotonic()
    words = ["raylivecell", "predict", "--checkpoint", network, "--images", str(images), "--out", str(out)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-m", *words, "--write", "cells"], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        raise MachineError(f"`predict` ended with {done.returncode}: {done.stderr[-500:]}")
    return time.monotonic() - began


def _memory_mib(service: psutil.Process) -> dict[str, float]:
    """Private memory of each kind of process, the largest of a kind: pages of Ray's shared memory are not theirs."""
    sizes: dict[str, float] = {}
    for child in service.children(recursive=True):
        name = child.name() if child.is_running() else ""
        if name.startswith("ray::ServeRep"):
            kind = next((kind for kind in ("Api", "Network", "Segmentation") if kind in " ".join(child.cmdline())), "")
            memory = child.memory_info()
            private = memory.rss - getattr(memory, "shared", 0)  # Linux
            sizes[kind] = max(sizes.get(kind, 0.0), round(private / 2**20, 1))
    return sizes


def _quantiles(runs: Sequence[Sequence[float]]) -> dict[str, dict[str, float]]:
    cuts = [statistics.quantiles(seconds, n=20, method="inclusive") for seconds in runs if len(seconds) > 1]
    return {"p50": summary([cut[9] for cut in cuts]), "p95": summary([cut[18] for cut in cuts])}
