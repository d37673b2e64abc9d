"""Small image files that expand to gigabytes, or otherwise exhaust a decoder."""

import lzma
import struct
import zlib
from collections.abc import Iterator
from typing import Any

MIB = 2**20


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


def gigabyte_tile() -> bytes:
    return tiff(64, 64, {322: 2**15, 323: 2**15, 324: "offset", 325: "length"}, GIGABYTE)


def images() -> Iterator[tuple[str, bytes]]:
    yield "png of 100,000 x 100,000", png(100_000, chunk(b"IDAT", GIGABYTE))
    yield "png with a gigabyte too much", png(64, chunk(b"IDAT", GIGABYTE))
    for kind in (b"zTXt", b"iTXt", b"iCCP"):
        lead = b"a\0\1\0\0\0" if kind == b"iTXt" else b"a\0\0"
        yield f"png with {kind.decode()}", png(64, chunk(kind, lead + GIGABYTE))
    strips = {278: 100_000, 273: "offset", 279: "length"}
    yield "tiff of 100,000 x 100,000", tiff(100_000, 100_000, strips, GIGABYTE)
    yield "tiff with a tile of a gigabyte", gigabyte_tile()
    yield from tiffs()
    yield (
        "bmp of 100,000 x 100,000",
        b"BM" + struct.pack("<IIIIiiHHIIIIII", 100, 0, 54, 40, 100_000, 100_000, 1, 8, 0, 0, 0, 0, 0, 0) + bytes(46),
    )
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n"
    yield "postscript", postscript


def tiffs() -> Iterator[tuple[str, bytes]]:
    strip = {278: 64, 273: "offset", 279: "length"}
    good = tiff(64, 64, {**strip, 259: 1}, bytes(64 * 64))
    end = 8 + 2 + 12 * struct.unpack_from("<H", good, 8)[0]

    def with_next_directory(offset: int, appended: bytes = b"") -> bytes:
        return good[:end] + struct.pack("<I", offset) + good[end + 4 :] + appended

    yield "tiff directories in a cycle", with_next_directory(8)
    chain = (struct.pack("<HI", 0, len(good) + 6 * (i + 1)) for i in range(100_000))
    yield "tiff of 100,000 directories", with_next_directory(len(good), b"".join(chain))
    overlapping = b"".join(struct.pack("<HHII", 65000 + i % 9, 3, 1, 0) for i in range(4000))
    wide = struct.pack("<H", 4000) + overlapping + bytes(4)
    yield (
        "tiff tag of four billion values",
        tiff(64, 64, {**strip, 258: 8}, b"").replace(
            struct.pack("<HHI", 273, 4, 1), struct.pack("<HHI", 273, 4, 2**32 - 1)
        ),
    )
    yield "tiff with 4000 tags", with_next_directory(len(good), wide)
    for name, text in (("ome", b"<OME>" + b"<Pixels " * 400_000), ("imagej", b"ImageJ=\n" + b"a=1 \n" * 10**6)):
        entry = struct.pack("<HHII", 270, 2, len(text), len(good) + 12)
        count = struct.pack("<H", struct.unpack_from("<H", good, 8)[0] + 1)
        entries = sorted([*(good[i : i + 12] for i in range(10, end, 12)), entry], key=lambda entry: entry[:2])
        relocated = [
            struct.pack("<HHII", 273, 4, 1, end + 16) if entry[:2] == b"\x11\1" else entry for entry in entries
        ]
        data = good[:8] + count + b"".join(relocated) + bytes(4) + good[end + 4 :] + text
        yield f"tiff with a long {name} description", data
    frame = struct.pack(">HHBHHBBBB", 0xFFC0, 11, 8, 65500, 65500, 1, 1, 17, 0)
    jpeg = b"\xff\xd8" + frame + b"\xff\xda\0\x08\1\1\0\0\x3f\0" + bytes(99)
    yield "tiff with a jpeg of 65,500 x 65,500", tiff(64, 64, {**strip, 259: 7}, jpeg)
    packed = bytearray(lzma.compress(bytes(64 * 64), filters=[{"id": lzma.FILTER_LZMA2, "preset": 0}]))
    packed[16] = 36  # the block's dictionary: 2^30 bytes
    size = 4 * packed[12]
    packed[12 + size : 16 + size] = struct.pack("<I", zlib.crc32(packed[12 : 12 + size]))
    yield (
        "tiff with an lzma dictionary of a gigabyte",
        tiff(64, 64, {**strip, 259: 34925}, bytes(packed)),
    )
