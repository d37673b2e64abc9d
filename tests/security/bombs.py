"""Read small files that expand to gigabytes, in a process limited to 256 MiB beyond its memory after the imports."""

import io
import json
import resource
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

sys.path.append(str(Path(__file__).parents[1]))
import image_bombs
from image_bombs import GIGABYTE, MIB, chunk, gigabyte_tile, png, tiff

from raylivecell import recipe
from raylivecell.annotations import coco, label_images
from raylivecell.core.errors import UserError
from raylivecell.data import cell_defects, shards
from raylivecell.images import formats, tiff_segments
from raylivecell.network.unet import build_model
from raylivecell.recipe import ModelConfig
from raylivecell.runs import checkpoint, progress
from raylivecell.scoring import coco_results

HERE = Path(sys.argv[1])
DEEP, LONG = "[" * 100_000, "9" * 5_000
IMAGES = [coco_results.Image("a.tif", "a.tif", "1", (64, 64))]


def message_of(function: Callable[..., Any], *arguments: Any) -> str:
    """The error message of `function`, or "read" if it succeeds."""
    try:
        function(*arguments)
        return "read"
    except (UserError, formats.UnreadableImageError) as error:
        return " ".join(str(error).split())


def write_file(name: str, text: str | bytes) -> str:
    (HERE / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(HERE / name)


def images() -> Iterator[tuple[str, str]]:
    for name, data in image_bombs.images():
        yield name, message_of(formats.decode, data)


def label_bombs() -> Iterator[tuple[str, str]]:
    decode = label_images.decode
    strips = {278: 100_000, 273: "offset", 279: "length"}
    yield "png of 100,000 x 100,000", message_of(decode, png(100_000, chunk(b"IDAT", GIGABYTE)))
    yield "tiff of 100,000 x 100,000", message_of(decode, tiff(100_000, 100_000, strips, GIGABYTE))
    yield "tiff with a tile of a gigabyte", message_of(decode, gigabyte_tile())
    for name, shape in (("large", "(900000, 900000)"), ("negative", "(-2, -900000)"), ("deep", "(" * 900)):
        header = f"{{'descr': '<u8', 'fortran_order': False, 'shape': {shape}, }}".encode()
        yield (
            f"npy with a {name} shape",
            message_of(decode, b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header),
        )
    # 62,875 labels in boxes of 388 x 10 pixels: their masks would have 244 MB.
    corners = np.zeros((512, 512), np.uint16)
    corners[:125, 9:] = corners[-125:, :-9] = np.arange(1, 62_876).reshape(125, 503)
    yield "labels in two parts", message_of(label_images.cells_of_labels, corners, "refuse", "keep")


def annotations() -> Iterator[tuple[str, str]]:
    for name, text in (
        ("a deep record", '{"annotations": [' + DEEP),
        ("a deep start", DEEP),
        ("deep info", '{"info": {"a": ' + DEEP),
        ("a long number", '{"images": [{"id": ' + LONG + "}]}"),
    ):
        yield name, str(coco.read_annotations(io.BytesIO(text.encode()), "train.json").broken)
    wide = 2**31 - 1
    for name, shape in (
        ("a wide mask", {"size": [wide, wide], "counts": [0, wide]}),
        ("a long run", {"size": [64, 64], "counts": [10**30]}),
        ("a run without end", {"size": [64, 64], "counts": "o" * 2**20}),
        ("a far polygon", [[0, 0, 1e300, 0, 1e300, 1e300]]),
        ("a large polygon", [[0, 0, 1e9, 0, 1e9, 1e9]]),
    ):
        record = {"id": 1, "image_id": 1, "segmentation": shape}
        read = coco.read_annotations(io.BytesIO(json.dumps({"annotations": [record]}).encode()), "train.json")
        cells = coco.decode_cells(read.payload(1))
        checked = cell_defects.check_cells(cells, (64, 64), (1.0, 1.0), {})
        yield name, f"{len(checked.cells)} {read.bad} {list(checked.defects)}"


def results() -> Iterator[tuple[str, str]]:
    mask = '[{"image_id": 1, "score": 1, "segmentation": {"size": [64, 64], "counts": %s}}]'
    wide = '[{"image_id": 1, "score": 1, "segmentation": {"size": [2147483647, 2147483647], "counts": [1]}}]'
    for name, text in (
        ("deep", DEEP),
        ("a deep record", '[{"image_id": 1, "score": 1, "segmentation": [' + DEEP),
        ("wide", wide),
        ("a long number", LONG),
        ("a long run", mask % f"[{'9' * 30}]"),
        ("two halves", mask % "[9223372036854775807, 1]"),
        ("a run without end", mask % ('"' + "o" * 2**20 + '"')),
    ):
        yield name, message_of(coco_results.read, write_file("results.json", text), IMAGES)


def recipes() -> Iterator[tuple[str, str]]:
    layers = "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    for name, text in (
        ("laughs", "a0: &a0 [x, x]\n" + layers + "seed: *a11\n"),
        ("merges", "a: &a {b: 1}\nc: {<<: *a}"),
        ("deep", DEEP),
        ("a long number", f"seed: {LONG}"),
        ("many levels", f"model: {{features: {[4] * 10_000}}}"),
    ):
        yield name, message_of(recipe.load, write_file("r.yaml", text))


def small_table() -> pa.Table:
    """A shard of one row whose outlines are 4 MiB of zeros."""
    row: dict[str, Any] = {"height": 8, "width": 8, "cells": 1, "labels": bytes(128), "outlines": [bytes(MIB)] * 4}
    row |= dict.fromkeys(("file_name", "cell_type", "source", "sha256", "annotation"), "x")
    row |= dict.fromkeys(("image", "foreground", "border"), bytes(64))
    return pa.Table.from_pylist([row], schema=shards.SCHEMA)


def datasets() -> Iterator[tuple[str, str]]:
    header = f'{{"format_version": {shards.FORMAT_VERSION}, "splits": '
    empty = '{"sizes": [], "shards": []}'
    row = f'{{"test": {empty}, "val": {empty}, "train": {{"sizes": [], "shards": [%s]}}}}}}'
    row = row.replace("%s", '{"file": "train/a.parquet", "rows": %s}')
    for name, text in (
        ("deep", DEEP),
        ("a long number", LONG),
        ("deep splits", header + DEEP),
        ("endless rows", header + row % "1e12"),
        ("many rows", header + row % 10**12),
    ):
        write_file("dataset.json", text)
        yield name, message_of(shards.list_rows, str(HERE), "train")
    table = small_table()
    packed = pa.DictionaryArray.from_arrays(pa.array(np.zeros(10**6, np.int32)), pa.array([bytes(MIB)]))
    repeated = pa.ListArray.from_arrays(pa.array([0, 10**6], pa.int32()), packed)
    bomb = table.set_column(table.schema.get_field_index("outlines"), "outlines", repeated)
    pq.write_table(bomb, HERE / "dictionary.parquet", store_schema=False)
    yield (
        "a terabyte of one outline",
        message_of(shards.read_row, shards.Row(str(HERE / "dictionary.parquet"), 0), ["outlines"]),
    )
    shards.MAX_ROW_BYTES = 2**20
    pq.write_table(table, HERE / "zstd.parquet", compression="zstd", use_dictionary=False)
    yield "a row of zeros", message_of(shards.read_row, shards.Row(str(HERE / "zstd.parquet"), 0), ["outlines"])
    pq.write_table(
        table.set_column(2, "height", pa.array([2**31 - 1], pa.int32())), HERE / "h.parquet", use_dictionary=False
    )
    shards.MAX_ROW_BYTES = 2**31
    yield "a high image", message_of(shards.read_row, shards.Row(str(HERE / "h.parquet"), 0), ["image"])


def checkpoints() -> Iterator[tuple[str, str]]:
    config = recipe.Recipe(model=ModelConfig(features=(4,)), crop=(16, 16))
    network = build_model(config.model)
    checkpoint.save(str(HERE), network, {}, progress.Progress(), config)
    with (
        zipfile.ZipFile(HERE / checkpoint.TRAINING, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed,
        packed.open("archive/data/0", "w", force_zip64=True) as stream,
    ):
        for _ in range(1024):
            stream.write(bytes(MIB))
    yield "a packed gigabyte", message_of(checkpoint.load_training, str(HERE))
    for name, text in (("a deep state", DEEP), ("a long step", '{"step": ' + LONG + "}")):
        write_file(progress.STATE, text)
        yield name, message_of(progress.load_state, str(HERE))
    write_file(progress.RECIPE, f"model: {{features: [{10**6}, {10**6}]}}")
    yield "a network of terabytes", message_of(checkpoint.load_model, str(HERE))
    header = json.dumps({"w": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}).encode()
    for name, data in (
        ("a wide tensor", struct.pack("<Q", len(header)) + header + bytes(4)),
        ("a long header", b"\xff" * 8),
    ):
        write_file(progress.MODEL, data)
        yield name, message_of(checkpoint.load_model, str(HERE))


def unguarded() -> Iterator[tuple[str, str]]:
    """Show that the memory limit works: the tile does not fit if its check is disabled."""
    tiff_segments._MAX_SEGMENT_BYTES, Image.MAX_IMAGE_PIXELS = 2**40, None
    tiff_segments.Layout.padded_pixels = property(lambda layout: 0)  # type: ignore[assignment,method-assign]
    try:
        yield "tiff with a tile of a gigabyte", message_of(formats.decode, gigabyte_tile())
    except MemoryError:
        yield "tiff with a tile of a gigabyte", "MemoryError"


def main() -> None:
    # Start all threads before the limit, because their stacks count.
    pq.write_table(small_table(), HERE / "small.parquet", use_dictionary=False)
    pq.read_table(HERE / "small.parquet")
    build_model(ModelConfig(features=(4,)))
    limit = psutil.Process().memory_info().vms + 256 * MIB
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    kinds = (images, label_bombs, annotations, results, recipes, datasets, checkpoints, unguarded)
    print(json.dumps({kind.__name__: dict(kind()) for kind in kinds}))


if __name__ == "__main__":
    main()
