"""One image file -> its cells, their pictures and what the tables hold of them: the work of `predict`, without Ray."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import tifffile
from numpy.typing import NDArray

from raylivecell.annotations import rle
from raylivecell.cells import measure
from raylivecell.core import storage
from raylivecell.images import formats
from raylivecell.inference import results as parts
from raylivecell.inference import segmenter
from raylivecell.inference.results import ImageResult
from raylivecell.inference.segmenter import Cells, Segmenter
from raylivecell.reports import overlay
from raylivecell.scoring import average_precision

Output = Literal["labels", "masks", "overlays", "coco", "cells"]
OUTPUTS: tuple[Output, ...] = get_args(Output)
MAX_PIXELS = 2**27
"""11,585 x 11,585."""


@dataclass(frozen=True)
class Job:
    """What is the same for all images."""

    model: str
    root: str
    """Folder of the images."""
    out: str
    write: tuple[Output, ...]
    tta: bool
    threshold: float | None

    @property
    def with_torch(self) -> bool:
        """Whether the model is a checkpoint."""
        return not self.model.endswith(segmenter.ONNX)


def load(job: Job, device: str | None = None) -> Segmenter:
    """The job's network, with its threshold."""
    network = segmenter.load(job.model, job.tta, device)
    if job.threshold is not None:
        network.config = network.config.model_copy(update={"threshold": job.threshold})
    return network


def part(job: Job, network: Segmenter, file: str, name: str, version: str) -> ImageResult:
    """Segment an image and write its pictures.

    Args:
        job: of all images.
        network: `load`'s.
        file: path of the image in `job.root`.
        name: what its outputs are called.
        version: of the image, as `results.version`.
    """
    told = {"file": file, "version": version}
    try:
        pixels = formats.decode(storage.read_bytes(storage.join(job.root, file)), MAX_PIXELS).pixels
    except formats.UnreadableImageError as error:
        return ImageResult({**told, "error": _line(error)}, "", [])
    except FileNotFoundError:
        return ImageResult(
            {"file": file, "error": "no such file: deleted, a broken link, or a name that is not UTF-8"}, "", []
        )
    except OSError as error:  # perhaps it can be read another time: not this version's fault
        return ImageResult({"file": file, "error": _line(error)}, "", [])
    frame = network.frame(pixels)
    image, cells = frame.levels, network.segment_frame(frame)
    places: dict[str, Any] = {kind: f"{kind}/{name}{end}" for kind, (end, _) in PICTURES.items() if kind in job.write}
    for kind, place in places.items():
        storage.write_bytes(storage.join(job.out, place), PICTURES[kind][1](image, cells))
    found: dict[str, Any] = {
        "height": image.shape[0],
        "width": image.shape[1],
        "cells": len(cells.scores),
        "gain": frame.gain,
        "warning": "; ".join(cells.warnings),
    }
    found["confluence"] = round(float((cells.labels != 0).sum()) / max(1, frame.own_pixels), 6)
    found["foreground_pixels"] = int(cells.foreground.sum())
    return ImageResult({**told, **found, **places}, *_lines(job, file, image, cells))


def label_tiff(labels: NDArray[np.int32]) -> bytes:
    """A TIFF of labels (H, W): grayscale, deflated, uint16 with ImageJ's metadata.

    Above 65,535 cells uint32 without them: ImageJ has no such type of its own, it shows the numbers as floats.
    """
    deep = labels.max(initial=0) > np.iinfo(np.uint16).max
    buffer = io.BytesIO()
    pixels = labels.astype(np.uint32 if deep else np.uint16)
    tifffile.imwrite(
        buffer, pixels, imagej=not deep, photometric="minisblack", compression="zlib", metadata=None if deep else {}
    )
    return buffer.getvalue()


PICTURES: dict[str, tuple[str, Callable[[NDArray[np.uint8], Cells], bytes]]] = {
    "labels": (".tif", lambda _, cells: label_tiff(cells.labels)),
    "masks": (".png", lambda _, cells: overlay.png(cells.foreground.astype(np.uint8) * 255)),
    "overlays": (".png", lambda image, cells: overlay.png(overlay.outlined(image, cells.labels))),
}
"""The outputs that are a file an image, in a folder of their name: suffix, and the file of an image (H, W)."""


def _lines(job: Job, file: str, image: NDArray[np.uint8], cells: Cells) -> tuple[str, list[str]]:
    """The image's share of cells.csv and of coco.json."""
    table, records = "", []
    if "cells" in job.write:
        table = measure.lines(file, measure.measure(cells.labels, image), cells.scores)
    if "coco" in job.write:
        results = average_precision.results(0, rle.encode(cells.labels), cells.scores)
        # By its path `evaluate --predictions` knows the image, whose number in the annotation file is another.
        records = [parts.record({**result, "file_name": file}) for result in results]
    return table, records


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
