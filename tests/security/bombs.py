"""Reads small files that would fill a memory, in a process that may take 256 MiB more than it has at its start."""

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
from raylivecell.annotations import coco
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


def zeros() -> bytes:
    packer, block = zlib.compressobj(1), bytes(MIB)
    return b"".join(packer.compress(block) for _ in range(1024)) + packer.flush()


GIGA = zeros()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(side: int, *more: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + chunk(b"IEND", b"")


def tiff(width: int, height: int, tags: dict[int, Any], data: bytes) -> bytes:
    entries = sorted({256: width, 257: height, 258: 8, 259: 8, 262: 1, 277: 1, **tags}.items())
    place = 8 + 2 + 12 * len(entries) + 4
    known = {"place": place, "length": len(data)}
    words = [struct.pack("<HHII", tag, 4, 1, known.get(value, value)) for tag, value in entries]
    return b"II*\0" + struct.pack("<IH", 8, len(words)) + b"".join(words) + bytes(4) + data


def told(function: Callable[..., Any], *given: Any) -> str:
    try:
        function(*given)
        return "read"
    except (UserError, formats.UnreadableImageError) as error:
        return " ".join(str(error).split())


def file(name: str, text: str | bytes) -> str:
    (HERE / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(HERE / name)


def gigabyte_tile() -> bytes:
    return tiff(64, 64, {322: 2**15, 323: 2**15, 324: "place", 325: "length"}, GIGA)


def pictures() -> Iterator[tuple[str, str]]:
    yield "png of 100,000 x 100,000", told(formats.decode, png(100_000, chunk(b"IDAT", GIGA)))
    yield "png with a gigabyte too much", told(formats.decode, png(64, chunk(b"IDAT", GIGA)))
    for kind in (b"zTXt", b"iTXt", b"iCCP"):
        lead = b"a\0\1\0\0\0" if kind == b"iTXt" else b"a\0\0"
        yield f"png with {kind.decode()}", told(formats.decode, png(64, chunk(kind, lead + GIGA)))
    strips = {278: 100_000, 273: "place", 279: "length"}
    yield "tiff of 100,000 x 100,000", told(formats.decode, tiff(100_000, 100_000, strips, GIGA))
    yield "tiff with a tile of a gigabyte", told(formats.decode, gigabyte_tile())
    yield from tiffs()
    yield (
        "bmp of 100,000 x 100,000",
        told(
            formats.decode,
            b"BM"
            + struct.pack("<IIIIiiHHIIIIII", 100, 0, 54, 40, 100_000, 100_000, 1, 8, 0, 0, 0, 0, 0, 0)
            + bytes(46),
        ),
    )
    ghost = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n"
    yield "postscript", told(formats.decode, ghost)


def tiffs() -> Iterator[tuple[str, str]]:
    strip = {278: 64, 273: "place", 279: "length"}
    good = tiff(64, 64, {**strip, 259: 1}, bytes(64 * 64))
    end = 8 + 2 + 12 * struct.unpack_from("<H", good, 8)[0]

    def chained(offset: int, more: bytes = b"") -> bytes:
        return good[:end] + struct.pack("<I", offset) + good[end + 4 :] + more

    yield "tiff directories in a circle", told(formats.decode, chained(8))
    chain = (struct.pack("<HI", 0, len(good) + 6 * (i + 1)) for i in range(100_000))
    yield "tiff of 100,000 directories", told(formats.decode, chained(len(good), b"".join(chain)))
    overlapping = b"".join(struct.pack("<HHII", 65000 + i % 9, 3, 1, 0) for i in range(4000))
    wide = struct.pack("<H", 4000) + overlapping + bytes(4)
    yield (
        "tiff tag of four billion values",
        told(
            formats.decode,
            tiff(64, 64, {**strip, 258: 8}, b"").replace(
                struct.pack("<HHI", 273, 4, 1), struct.pack("<HHI", 273, 4, 2**32 - 1)
            ),
        ),
    )
    yield "tiff with 4000 tags", told(formats.decode, chained(len(good), wide))
    for name, text in (("ome", b"<OME>" + b"<Pixels " * 400_000), ("imagej", b"ImageJ=\n" + b"a=1 \n" * 10**6)):
        entry = struct.pack("<HHII", 270, 2, len(text), len(good) + 12)
        head = struct.pack("<H", struct.unpack_from("<H", good, 8)[0] + 1)
        entries = sorted([*(good[i : i + 12] for i in range(10, end, 12)), entry], key=lambda one: one[:2])
        moved = [struct.pack("<HHII", 273, 4, 1, end + 16) if one[:2] == b"\x11\1" else one for one in entries]
        data = good[:8] + head + b"".join(moved) + bytes(4) + good[end + 4 :] + text
        yield f"tiff with a long {name} description", told(formats.decode, data)
    frame = struct.pack(">HHBHHBBBB", 0xFFC0, 11, 8, 65500, 65500, 1, 1, 17, 0)
    jpeg = b"\xff\xd8" + frame + b"\xff\xda\0\x08\1\1\0\0\x3f\0" + bytes(99)
    yield "tiff with a jpeg of 65,500 x 65,500", told(formats.decode, tiff(64, 64, {**strip, 259: 7}, jpeg))
    packed = bytearray(lzma.compress(bytes(64 * 64), filters=[{"id": lzma.FILTER_LZMA2, "preset": 0}]))
    packed[16] = 36  # the block's dictionary: 2^30 bytes
    size = 4 * packed[12]
    packed[12 + size : 16 + size] = struct.pack("<I", zlib.crc32(packed[12 : 12 + size]))
    yield (
        "tiff with an lzma dictionary of a gigabyte",
        told(formats.decode, tiff(64, 64, {**strip, 259: 34925}, bytes(packed))),
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
        kept, _, found = cell_defects.check_cells(cells, (64, 64), (1.0, 1.0), {})
        yield name, f"{len(kept)} {read.bad} {list(found)}"


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
        yield name, told(coco_results.read, file("results.json", text), IMAGES)


def recipes() -> Iterator[tuple[str, str]]:
    layers = "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    for name, text in (
        ("laughs", "a0: &a0 [x, x]\n" + layers + "seed: *a11\n"),
        ("merges", "a: &a {b: 1}\nc: {<<: *a}"),
        ("deep", DEEP),
        ("a long number", f"seed: {LONG}"),
        ("many levels", f"model: {{features: {[4] * 10_000}}}"),
    ):
        yield name, told(recipe.load, file("r.yaml", text))


def small_table() -> pa.Table:
    """A shard's only row, its outlines 4 MiB of zeros."""
    row: dict[str, Any] = {"height": 8, "width": 8, "cells": 1, "labels": bytes(128), "outlines": [bytes(MIB)] * 4}
    row |= dict.fromkeys(("file_name", "cell_type", "source", "sha256", "annotation"), "x")
    row |= dict.fromkeys(("image", "foreground", "border"), bytes(64))
    return pa.Table.from_pylist([row], schema=shards.SCHEMA)


def datasets() -> Iterator[tuple[str, str]]:
    head = f'{{"format_version": {shards.FORMAT_VERSION}, "splits": '
    none = '{"sizes": [], "shards": []}'
    row = f'{{"test": {none}, "val": {none}, "train": {{"sizes": [], "shards": [%s]}}}}}}'
    row = row.replace("%s", '{"file": "train/a.parquet", "rows": %s}')
    for name, text in (
        ("deep", DEEP),
        ("a long number", LONG),
        ("deep splits", head + DEEP),
        ("endless rows", head + row % "1e12"),
        ("many rows", head + row % 10**12),
    ):
        file("dataset.json", text)
        yield name, told(shards.list_rows, str(HERE), "train")
    table = small_table()
    packed = pa.DictionaryArray.from_arrays(pa.array(np.zeros(10**6, np.int32)), pa.array([bytes(MIB)]))
    many = pa.ListArray.from_arrays(pa.array([0, 10**6], pa.int32()), packed)
    bomb = table.set_column(table.schema.get_field_index("outlines"), "outlines", many)
    pq.write_table(bomb, HERE / "dictionary.parquet", store_schema=False)
    yield (
        "a terabyte of one outline",
        told(shards.read_row, shards.Row(str(HERE / "dictionary.parquet"), 0), ["outlines"]),
    )
    shards.MAX_ROW_BYTES = 2**20
    pq.write_table(table, HERE / "zstd.parquet", compression="zstd", use_dictionary=False)
    yield "a row of zeros", told(shards.read_row, shards.Row(str(HERE / "zstd.parquet"), 0), ["outlines"])
    pq.write_table(
        table.set_column(2, "height", pa.array([2**31 - 1], pa.int32())), HERE / "h.parquet", use_dictionary=False
    )
    shards.MAX_ROW_BYTES = 2**31
    yield "a high image", told(shards.read_row, shards.Row(str(HERE / "h.parquet"), 0), ["image"])


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
    yield "a packed gigabyte", told(checkpoint.load_training, str(HERE))
    for name, text in (("a deep state", DEEP), ("a long step", '{"step": ' + LONG + "}")):
        file(progress.STATE, text)
        yield name, told(progress.load_state, str(HERE))
    file(progress.RECIPE, f"model: {{features: [{10**6}, {10**6}]}}")
    yield "a network of terabytes", told(checkpoint.load_model, str(HERE))
    header = json.dumps({"w": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}).encode()
    for name, data in (
        ("a wide tensor", struct.pack("<Q", len(header)) + header + bytes(4)),
        ("a long header", b"\xff" * 8),
    ):
        file(progress.MODEL, data)
        yield name, told(checkpoint.load_model, str(HERE))


def unguarded() -> Iterator[tuple[str, str]]:
    """Show that the memory limit holds: the tile, if it is not refused, does not fit."""
    tiff_segments._MAX_SEGMENT_BYTES, Image.MAX_IMAGE_PIXELS = 2**40, None
    tiff_segments.Layout.padded_pixels = property(lambda layout: 0)  # type: ignore[assignment,method-assign]
    try:
        yield "tiff with a tile of a gigabyte", told(formats.decode, gigabyte_tile())
    except MemoryError:
        yield "tiff with a tile of a gigabyte", "MemoryError"


def main() -> None:
    # What starts threads does so before the limit: their stacks count.
    pq.write_table(small_table(), HERE / "small.parquet", use_dictionary=False)
    pq.read_table(HERE / "small.parquet")
    build_model(ModelConfig(features=(4,)))
    most = psutil.Process().memory_info().vms + 256 * MIB
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    kinds = (pictures, annotations, results, recipes, datasets, checkpoints, unguarded)
    print(json.dumps({kind.__name__: dict(kind()) for kind in kinds}))


if __name__ == "__main__":
    main()
