"""The same pixels in `prepare`, `predict` and the Python API: every depth, floating-point numbers and stacks."""

from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
from pyarrow import fs as pafs

from raylivecell.cells.watershed import InstanceConfig
from raylivecell.core import storage
from raylivecell.data import draw
from raylivecell.data.plan import ImagePlan, ShardPlan, ShardTask
from raylivecell.images import intensity
from raylivecell.images.grey_levels import Measures
from raylivecell.images.intensity import Intensity
from raylivecell.images.planes import EVERYTHING, Choice
from raylivecell.inference import image_file, stacks
from raylivecell.inference.segmenter import Segmenter

SHAPE = (40, 56)


def frame(seed: int) -> np.ndarray:
    """Bright disks on a background of 128 grey levels, without saturation."""
    rng = np.random.default_rng(seed)
    image = rng.normal(128, 3, SHAPE)
    for _ in range(6):
        centre = (int(rng.integers(SHAPE[1])), int(rng.integers(SHAPE[0])))
        cv2.circle(image, centre, int(rng.integers(3, 7)), float(rng.integers(150, 230)), -1)
    return np.clip(image, 1, 254).round().astype(np.uint8)


GREY = frame(1)
OTHERS = np.stack([frame(2), GREY, frame(3)])
STORED: dict[str, np.ndarray] = {
    "8 bit": GREY,
    "12 in 16 bit": GREY.astype(np.uint16) << 4,
    "16 bit": GREY.astype(np.uint16) * 257,
    "int16": GREY.astype(np.int16) << 4,
    "uint32": GREY.astype(np.uint32) * 256,
    "float32 to 1": (GREY / 255).astype(np.float32),
    "float64 to 1": GREY / 255,
    "float32 of 16 bit": GREY.astype(np.float32) * 257,
}


def write(path: Path, kind: str) -> tuple[Choice, str]:
    """Write a file that contains GREY, as `kind`; return the choice of its plane, and the name in `predict`."""
    if kind in STORED:
        tifffile.imwrite(path, STORED[kind], photometric="minisblack")
        return EVERYTHING, ""
    deep = OTHERS.astype(np.uint16) * 257
    if kind == "one directory":
        tifffile.imwrite(path, deep, imagej=True, truncate=True, metadata={"axes": "TYX"})
        return Choice("t1"), "t1"
    if kind == "OME of floats":
        tifffile.imwrite(path, (OTHERS / 255).astype(np.float32), ome=True, metadata={"axes": "ZYX"})
        return Choice("1"), "z1"
    if kind == "pages":
        tifffile.imwrite(path, deep, photometric="minisblack", compression="zlib", predictor=True, metadata=None)
        return Choice("p1"), "p1"
    tifffile.imwrite(path, OTHERS, photometric="minisblack", planarconfig="separate", metadata=None)
    return Choice(channel=1), ""


@pytest.mark.parametrize("kind", [*STORED, "one directory", "OME of floats", "pages", "channels"])
def test_prepare_predict_and_python_have_the_same_pixels(kind: str, tmp_path: Path) -> None:
    choice, plane = write(tmp_path / "a.tif", kind)
    info = draw.examine(str(tmp_path / "a.tif"), choice)
    assert not info.error
    rule = intensity.choose([Measures(*info.measures)])
    prepared = prepared_pixels(tmp_path, info.sha256, rule, choice)
    np.testing.assert_array_equal(prepared, GREY)

    network = Segmenter(lambda image: image[None] / np.float32(255), "foreground", InstanceConfig(), "", rule)
    addresses = list(stacks.expand(str(tmp_path), {"a.tif": pafs.FileInfo("a.tif")}, choice))
    assert addresses == [f"a.tif#{plane}" if plane else "a.tif"]
    pixels = stacks.read(str(tmp_path), addresses[0], choice, image_file.MAX_PIXELS).pixels
    for image, options in ((pixels, EVERYTHING), (tmp_path / "a.tif", choice), (STORED.get(kind, pixels), EVERYTHING)):
        np.testing.assert_array_equal(network.frame(image, options).levels, GREY)
    stacks._open.cache_clear()


def prepared_pixels(folder: Path, sha256: str, rule: Intensity, choice: Choice) -> np.ndarray:
    """The pixels of `a.tif` in a shard that `prepare` draws."""
    image = ImagePlan("a.tif", "a.tif", "train", "train.json", 1, "cells", sha256, (1.0, 1.0), GREY.size)
    plan = ShardPlan("train", "train/part-00000.parquet", (image,))
    out, work = str(folder / "out"), str(folder / "work")
    task = ShardTask(plan, str(folder), out, work, rule, 5.0, {}, (0,), choice)
    storage.write_bytes(task.cells_uri, b"")
    draw.draw_shard(ShardTask.from_row(task.to_row()))
    row = pq.read_table(task.shard_uri).to_pylist()[0]
    return np.frombuffer(row["image"], np.uint8).reshape(row["height"], row["width"])
