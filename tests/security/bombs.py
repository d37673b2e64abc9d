"""Read small files that expand to gigabytes, in a process limited to 256 MiB beyond its memory after the imports."""

import io
import json
import lzma
import resource
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

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
MIB = 2**20
DEEP, LONG = "[" * 100_000, "9" * 5_000
IMAGES = [coco_results.Image("a.tif", "a.tif", "1", (64, 64))]


def compressed_gigabyte() -> bytes:
    compressor, block = zlib.compressobj(1), bytes(MIB)
    return b"".join(compressor.compress(block) for _ in range(1024)) + compressor.flush()


GIGABYTE = compressed_gigabyte()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(side: int, *chunks: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


def tiff(width: int, height: int, tags: dict[int, Any], data: bytes) -> bytes:
    entries = sorted({256: width, 257: height, 258: 8, 259: 8, 262: 1, 277: 1, **tags}.items())
    offset = 8 + 2 + 12 * len(entries) + 4
    values = {"offset": offset, "length": len(data)}
    packed = [struct.pack("<HHII", tag, 4, 1, values.get(value, value)) for tag, value in entries]
    return b"II*\0" + struct.pack("<IH", 8, len(packed)) + b"".join(packed) + bytes(4) + data


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


def gigabyte_tile() -> bytes:
    return tiff(64, 64, {322: 2**15, 323: 2**15, 324: "offset", 325: "length"}, GIGABYTE)


def images() -> Iterator[tuple[str, str]]:
    yield "png of 100,000 x 100,000", message_of(formats.decode, png(100_000, chunk(b"IDAT", GIGABYTE)))
    yield "png with a gigabyte too much", message_of(formats.decode, png(64, chunk(b"IDAT", GIGABYTE)))
    for kind in (b"zTXt", b"iTXt", b"iCCP"):
        lead = b"a\0\1\0\0\0" if kind == b"iTXt" else b"a\0\0"
        yield f"png with {kind.decode()}", message_of(formats.decode, png(64, chunk(kind, lead + GIGABYTE)))
    strips = {278: 100_000, 273: "offset", 279: "length"}
    yield "tiff of 100,000 x 100,000", message_of(formats.decode, tiff(100_000, 100_000, strips, GIGABYTE))
    yield "tiff with a tile of a gigabyte", message_of(formats.decode, gigabyte_tile())
    yield from tiffs()
    yield (
        "bmp of 100,000 x 100,000",
        message_of(
            formats.decode,
            b"BM"
            + struct.pack("<IIIIiiHHIIIIII", 100, 0, 54, 40, 100_000, 100_000, 1, 8, 0, 0, 0, 0, 0, 0)
            + bytes(46),
        ),
    )
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n"
    yield "postscript", message_of(formats.decode, postscript)


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


def tiffs() -> Iterator[tuple[str, str]]:
    strip = {278: 64, 273: "offset", 279: "length"}
    good = tiff(64, 64, {**strip, 259: 1}, bytes(64 * 64))
    end = 8 + 2 + 12 * struct.unpack_from("<H", good, 8)[0]

    def with_next_directory(offset: int, appended: bytes = b"") -> bytes:
        return good[:end] + struct.pack("<I", offset) + good[end + 4 :] + appended

    yield "tiff directories in a cycle", message_of(formats.decode, with_next_directory(8))
    chain = (struct.pack("<HI", 0, len(good) + 6 * (i + 1)) for i in range(100_000))
    yield "tiff of 100,000 directories", message_of(formats.decode, with_next_directory(len(good), b"".join(chain)))
    overlapping = b"".join(struct.pack("<HHII", 65000 + i % 9, 3, 1, 0) for i in range(4000))
    wide = struct.pack("<H", 4000) + overlapping + bytes(4)
    yield (
        "tiff tag of four billion values",
        message_of(
            formats.decode,
            tiff(64, 64, {**strip, 258: 8}, b"").replace(
                struct.pack("<HHI", 273, 4, 1), struct.pack("<HHI", 273, 4, 2**32 - 1)
            ),
        ),
    )
    yield "tiff with 4000 tags", message_of(formats.decode, with_next_directory(len(good), wide))
    for name, text in (("ome", b"<OME>" + b"<Pixels " * 400_000), ("imagej", b"ImageJ=\n" + b"a=1 \n" * 10**6)):
        entry = struct.pack("<HHII", 270, 2, len(text), len(good) + 12)
        count = struct.pack("<H", struct.unpack_from("<H", good, 8)[0] + 1)
        entries = sorted([*(good[i : i + 12] for i in range(10, end, 12)), entry], key=lambda entry: entry[:2])
        relocated = [
            struct.pack("<HHII", 273, 4, 1, end + 16) if entry[:2] == b"\x11\1" else entry for entry in entries
        ]
        data = good[:8] + count + b"".join(relocated) + bytes(4) + good[end + 4 :] + text
        yield f"tiff with a long {name} description", message_of(formats.decode, data)
    frame = struct.pack(">HHBHHBBBB", 0xFFC0, 11, 8, 65500, 65500, 1, 1, 17, 0)
    jpeg = b"\xff\xd8" + frame + b"\xff\xda\0\x08\1\1\0\0\x3f\0" + bytes(99)
    yield "tiff with a jpeg of 65,500 x 65,500", message_of(formats.decode, tiff(64, 64, {**strip, 259: 7}, jpeg))
    packed = bytearray(lzma.compress(bytes(64 * 64), filters=[{"id": lzma.FILTER_LZMA2, "preset": 0}]))
    packed[16] = 36  # the block's dictionary: 2^30 bytes
    size = 4 * packed[12]
    packed[12 + size : 16 + size] = struct.pack("<I", zlib.crc32(packed[12 : 12 + size]))
    yield (
        "tiff with an lzma dictionary of a gigabyte",
        message_of(formats.decode, tiff(64, 64, {**strip, 259: 34925}, bytes(packed))),
    )


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
