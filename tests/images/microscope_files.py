"""Builders of small CZI, LIF and ND2 files; the tests compare them with what czifile, liffile and nd2 read.

CZI by Zeiss's published layout; LIF and ND2 by the layouts that liffile and nd2 describe.
"""

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


def _clx(name: str, value: object) -> bytes:
    """Encode a value as ND2 metadata: int, float, or a dict."""
    head = (name + "\0").encode("utf-16-le")
    if isinstance(value, dict):
        items = b"".join(_clx(key, member) for key, member in value.items())
        length = 2 + len(head) + 12 + len(items)
        return (
            struct.pack("<BB", 11, len(name) + 1)
            + head
            + struct.pack("<IQ", len(value), length)
            + items
            + bytes(8 * len(value))
        )
    number = isinstance(value, int)
    return struct.pack("<BB", 3 if number else 6, len(name) + 1) + head + struct.pack("<I" if number else "<d", value)


def nd2(
    frames: list[bytes], attributes: Mapping[str, int], loops: Mapping[str, int], extra: Mapping[bytes, bytes]
) -> bytes:
    """Build an ND2 3.0 of frames (pixels, perhaps compressed), attributes, and loops: count by P, T, Z, outer first."""
    experiment: dict[str, object] = {}
    for axis, count in reversed(loops.items()):
        parameters: dict[str, object] = {"uiCount": count}
        if axis == "T":
            parameters |= dict.fromkeys(("dStart", "dPeriod", "dDuration", "dMinPeriodDiff", "dMaxPeriodDiff"), 0.0)
            parameters["dAvgPeriodDiff"] = 0.0
        elif axis == "Z":
            parameters |= {"dZLow": 0.0, "dZHigh": 1.0, "dZStep": 1.0, "iType": 0, "bAbsolute": 0, "dZHome": 0.0}
        else:
            parameters |= {"bIsSettingZ": 0, "Points": {f"i{n:010}": {"dPosX": 0.0} for n in range(count)}}
        inner = {"ppNextLevelEx": {"i0000000000": experiment}} if experiment else {}
        experiment = {"eType": {"T": 1, "P": 2, "Z": 4}[axis], "uLoopPars": parameters, **inner}
    planes = {"sPicturePlanes": {"uiCount": attributes["uiComp"]}}
    chunks = {
        b"ImageAttributesLV!": _clx("SLxImageAttributes", dict(attributes)),
        b"ImageMetadataSeqLV|0!": _clx("SLxPictureMetadata", planes),
        **({b"ImageMetadataLV!": _clx("SLxExperiment", experiment)} if loops else {}),
        **{b"ImageDataSeq|%d!" % number: bytes(8) + frame for number, frame in enumerate(frames)},
        **extra,
    }
    data = struct.pack("<IIQ32s64s", 0x0ABECEDA, 32, 64, b"ND2 FILE SIGNATURE CHUNK NAME01!", b"Ver3.0")
    table = b""
    for name, content in chunks.items():
        table += name + struct.pack("<QQ", len(data), len(content))
        data += struct.pack("<IIQ", 0x0ABECEDA, 4072, len(content)) + name.ljust(4072, b"\0") + content
    end = b"ND2 CHUNK MAP SIGNATURE 0000001!" + struct.pack("<Q", len(data))
    name = b"ND2 FILEMAP SIGNATURE NAME 0001!"
    return data + struct.pack("<IIQ", 0x0ABECEDA, len(name), len(table) + len(end)) + name + table + end
