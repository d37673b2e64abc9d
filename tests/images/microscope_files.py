"""Builders of small CZI and LIF files, by the published layouts; the tests compare them with czifile and liffile."""

import struct
from collections.abc import Mapping

import numpy as np

CZI_TYPES = {("u1", 1): 0, ("u2", 1): 1, ("f4", 1): 2, ("u1", 3): 3, ("u2", 3): 4}


def _segment(name: str, content: bytes) -> bytes:
    size = -(-len(content) // 32) * 32
    return struct.pack("<16sqq", name.encode(), size, len(content)) + content.ljust(size, b"\0")


def _entry(position: int, index: Mapping[str, int], pixels: np.ndarray, compression: int, stored: float) -> bytes:
    """Build a DirectoryEntryDV; `stored` below 1 marks a reduced copy."""
    samples = 3 if pixels.ndim == 3 else 1
    sizes = {"X": pixels.shape[1], "Y": pixels.shape[0], **dict.fromkeys(index, 1)}
    dimensions = b"".join(
        struct.pack("<4siifi", axis.encode(), index.get(axis, 0), size, 0, int(size * stored) if axis in "XY" else 1)
        for axis, size in sizes.items()
    )
    kind = CZI_TYPES[pixels.dtype.str[1:], samples]
    return struct.pack("<2siqiiB5xi", b"DV", kind, position, 0, compression, stored < 1, len(sizes)) + dimensions


def czi(blocks: list[tuple[dict[str, int], np.ndarray, int, bytes | None]], stored: float = 1.0) -> bytes:
    """Build a CZI of blocks (index by axis, pixels, compression, compressed pixels); `stored` is that of the last."""
    data, entries = bytes(32 + 512), []
    for number, (index, pixels, compression, compressed) in enumerate(blocks):
        factor = stored if number == len(blocks) - 1 else 1.0
        entry = _entry(len(data), index, pixels, compression, factor)
        payload = pixels.tobytes() if compressed is None else compressed
        head = (struct.pack("<iiq", 0, 0, len(payload)) + entry).ljust(256, b"\0")
        data += _segment("ZISRAWSUBBLOCK", head + payload)
        entries.append(entry)
    directory = struct.pack("<i", len(entries)).ljust(128, b"\0") + b"".join(entries)
    header = struct.pack("<iiii16s16siqqiq", 1, 0, 0, 0, b"", b"", 0, len(data), 0, 0, 0).ljust(512, b"\0")
    return _segment("ZISRAWFILE", header) + data[32 + 512 :] + _segment("ZISRAWDIRECTORY", directory)


def lif(images: Mapping[str, tuple[str, np.ndarray]], head: str = "") -> bytes:
    """Build a LIF of images (axes, slowest first, such as TZCYX or YXS; array) by name; `head` precedes the XML."""
    elements, blocks = [], b""
    for number, (name, (axes, array)) in enumerate(images.items()):
        strides = dict(zip(axes, np.cumprod([array.itemsize, *array.shape[:0:-1]]).tolist()[::-1]))
        sizes = dict(zip(axes, array.shape))
        channel = "S" if "S" in axes else "C"
        channels = "".join(
            f'<ChannelDescription DataType="0" ChannelTag="{1 + c if channel == "S" else 0}" '
            f'Resolution="{8 * array.itemsize}" NameOfMeasuredQuantity="" Min="0" Max="1" Unit="" LUTName="Gray" '
            f'IsLUTInverted="0" BytesInc="{c * strides.get(channel, 0)}" BitInc="0"/>'
            for c in range(sizes.get(channel, 1))
        )
        dimensions = "".join(
            f'<DimensionDescription DimID="{number}" NumberOfElements="{sizes[axis]}" Origin="0" Length="1" Unit="m" '
            f'BytesInc="{strides[axis]}" BitInc="0"/>'
            for number, axis in ((1, "X"), (2, "Y"), (3, "Z"), (4, "T"), (10, "M"))
            if axis in axes
        )
        block = f"MemBlock_{number}"
        elements.append(
            f'<Element Name="{name}" UniqueID="{number}"><Memory Size="{array.nbytes}" MemoryBlockID="{block}"/>'
            f"<Data><Image><ImageDescription><Channels>{channels}</Channels><Dimensions>{dimensions}</Dimensions>"
            f"</ImageDescription></Image></Data></Element>"
        )
        text = block.encode("utf-16-le")
        description = struct.pack("<BQBI", 0x2A, array.nbytes, 0x2A, len(block)) + text
        blocks += struct.pack("<II", 0x70, len(description)) + description + array.tobytes()
    xml = (
        f'{head}<LMSDataContainerHeader Version="2"><Element Name="project"><Children>{"".join(elements)}</Children>'
        "</Element></LMSDataContainerHeader>"
    )
    text = xml.encode("utf-16-le")
    return struct.pack("<IIBI", 0x70, 5 + len(text), 0x2A, len(xml)) + text + blocks
