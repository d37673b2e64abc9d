"""Segment one image file for `predict`, without Ray: output images, and rows of the tables."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import tifffile
from numpy.typing import NDArray

from raylivecell.annotations import geojson, imagej_rois, rle
from raylivecell.cells import measure
from raylivecell.core import storage
from raylivecell.core.errors import MachineError
from raylivecell.images import formats
from raylivecell.images.planes import EVERYTHING, Choice
from raylivecell.inference import results, segmenter, stacks
from raylivecell.inference.results import ImageResult, ImageRow
from raylivecell.inference.segmenter import Cells, Segmenter
from raylivecell.reports import overlay
from raylivecell.scoring import average_precision

Output = Literal["labels", "masks", "overlays", "coco", "cells", "rois", "geojson"]
OUTPUTS: tuple[Output, ...] = get_args(Output)
DEFAULT_OUTPUTS = OUTPUTS[:5]
MAX_PIXELS = 2**27
"""11,585 x 11,585."""


@dataclass(frozen=True)
class PredictJob:
    """Model, folders and settings of a `predict` run."""

    model: str
    root: str
    """Folder of the images."""
    out: str
    write: tuple[Output, ...]
    tta: bool
    threshold: float | None
    choice: Choice = EVERYTHING
    """Planes and channel of files with several."""
    diameter: float | None = None
    """Typical diameter of the cells in the images' pixels; None: the network's `pixel_scale`."""

    @property
    def with_torch(self) -> bool:
        """Whether the model is a checkpoint."""
        return not self.model.endswith(segmenter.ONNX)


def load(job: PredictJob, device: str | None = None) -> Segmenter:
    """Load the job's network, with the job's threshold."""
    network = segmenter.load(job.model, job.tta, device)
    if job.threshold is not None:
        network.config = network.config.model_copy(update={"threshold": job.threshold})
    return network


def segment_file(job: PredictJob, network: Segmenter, file: str, name: str, version: str) -> ImageResult:
    """Segment an image file, or a plane of one, and write its output images.

    Args:
        job: the settings.
        network: from `load`.
        file: path of the image in `job.root`, or address of a plane (`planes.address`).
        name: path of its output images without suffix.
        version: `results.version` of the image.
    """
    try:
        pixels = stacks.read(job.root, file, job.choice, MAX_PIXELS).pixels
    except formats.UnreadableImageError as error:
        return ImageResult(ImageRow(file, error=_one_line(error), version=version))
    except FileNotFoundError:
        return ImageResult(ImageRow(file, error="no such file: deleted, a broken link, or a name that is not UTF-8"))
    except (OSError, MachineError) as error:  # without a version: the next run tries to read it again
        return ImageResult(ImageRow(file, error=_one_line(error)))
    frame = network.frame(pixels)
    try:
        image, cells = frame.levels, network.segment_frame(frame, network.factor(job.diameter))
    except segmenter.TooLargeError as error:
        return ImageResult(ImageRow(file, error=_one_line(error), version=version))
    pictures: dict[str, Any] = {kind: f"{kind}/{name}{end}" for kind, (end, _) in PICTURES.items() if kind in job.write}
    for kind, path in pictures.items():
        storage.write_bytes(storage.join(job.out, path), PICTURES[kind][1](image, cells))
    row = ImageRow(
        file,
        height=image.shape[0],
        width=image.shape[1],
        cells=len(cells.scores),
        confluence=round(float((cells.labels != 0).sum()) / max(1, frame.own_pixels), 6),
        foreground_pixels=int(cells.foreground.sum()),
        gain=frame.gain,
        warning="; ".join(cells.warnings),
        version=version,
        **pictures,
    )
    table, records = "", []
    if "cells" in job.write:
        table = measure.lines(file, measure.measure(cells.labels, image), cells.scores)
    if "coco" in job.write:
        # `evaluate --predictions` identifies the image by its path: its id in an annotation file is a different one.
        detections = average_precision.results(0, rle.encode(cells.labels), cells.scores)
        records = [results.record({**detection, "file_name": file}) for detection in detections]
    return ImageResult(row, table, records)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def label_tiff(labels: NDArray[np.int32]) -> bytes:
    """Encode labels (H, W) as a TIFF: grayscale, deflate compression, uint16 with ImageJ's metadata.

    Above 65,535 cells uint32 without that metadata: ImageJ has no such type and would read the labels as floats.
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
    "rois": (".zip", lambda _, cells: imagej_rois.write(cells.labels)),
    "geojson": (".geojson", lambda _, cells: geojson.write(cells.labels, cells.scores)),
}
"""Outputs with one file per image, in the folder of that name: suffix, and encoder of an image (H, W) and its cells."""
