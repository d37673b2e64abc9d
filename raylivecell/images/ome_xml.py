"""Planes of an OME-TIFF by its OME-XML: series, time, depth and channel of each directory.

The XML is parsed by expat without building a tree; a document type, and with it any entity, is refused.

Specification: https://docs.openmicroscopy.org/ome-model/latest/ome-tiff/specification.html
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from xml.parsers import expat

from raylivecell.core.errors import DamagedImageError, UnsupportedImageError
from raylivecell.images.planes import Position

_MAX_ELEMENTS = 500_000
"""Limit on the elements: 150 MB in memory. A plane has about three."""


@dataclass
class _TiffData:
    """A TiffData element: a run of planes, and the directories that contain them."""

    attributes: Mapping[str, str]
    file: str = ""
    uuid: str = ""


@dataclass
class _Pixels:
    attributes: Mapping[str, str]
    samples: int = 0
    """Of the first channel; 0 if not stated."""
    blocks: list[_TiffData] = field(default_factory=list)

    def number(self, name: str) -> int:
        """Return a positive attribute, 1 if it is missing."""
        return max(1, _integer(self.attributes, name, 1))


def positions(text: bytes, directories: Sequence[int], samples: int) -> list[Position] | None:
    """Return the position of the plane in each directory.

    Args:
        text: the OME-XML.
        directories: number of each image's directory in the chain.
        samples: samples per pixel.

    Returns:
        None if the XML does not describe the planes: none, or of several files of which this one is not known. More
        positions than directories if planes are missing.

    Raises:
        UnreadableImageError: a directory that the XML does not describe, or planes of unknown channels.
    """
    root, pixels, error = _parse(text)
    if error and len(directories) > 1:
        raise DamagedImageError(f"invalid OME-XML ({error}), so that the planes are unknown")
    if error or not pixels:
        return None
    files = {block.file for p in pixels for block in p.blocks if block.file}
    if "" in root or len(files) > 1:
        own = root.get("UUID")
        blocks = [block for p in pixels for block in p.blocks if block.uuid == own]
        if len(directories) == 1:
            return None
        if own is None or not blocks:
            if any(p.number("SizeC") > (p.samples or samples) for p in pixels):
                raise UnsupportedImageError(
                    "OME-TIFF of several files and channels; save each plane as a separate file"
                )
            return None
    else:
        own = None
    described: dict[int, Position] = {}
    for series, p in enumerate(pixels):
        _describe(p, series, p.samples or samples, own, described)
    if len(described) > len(directories):
        return list(described.values())
    if missing := [number for number in directories if number not in described]:
        raise DamagedImageError(f"OME-XML does not describe {len(missing)} of {len(directories)} images")
    return [described[number] for number in directories]


def _describe(pixels: _Pixels, series: int, samples: int, own: str | None, described: dict[int, Position]) -> None:
    """Add the position of each directory of a series to `described`."""
    sizes = {axis: pixels.number(f"Size{axis}") for axis in "TZC"}
    sizes["C"] = max(1, sizes["C"] // samples)
    order = pixels.attributes.get("DimensionOrder", "XYCZT")[2:]
    if sorted(order) != ["C", "T", "Z"]:
        raise DamagedImageError(f"OME-XML with the dimension order {order!r}")
    count = sizes["T"] * sizes["Z"] * sizes["C"]
    first_free = max(described, default=-1) + 1
    for block in pixels.blocks or [_TiffData({})]:
        if own is not None and block.uuid != own:
            continue
        first = sum(
            _integer(block.attributes, f"First{axis}", 0) * step
            for axis, step in zip(order, (1, sizes[order[0]], sizes[order[0]] * sizes[order[1]]))
        )
        directory = _integer(block.attributes, "IFD", first_free if not pixels.blocks else 0)
        length = _integer(block.attributes, "PlaneCount", 1 if "IFD" in block.attributes else count - first)
        if first + length > count or len(described) + length > 10_000:
            raise DamagedImageError(f"OME-XML of {first + length} planes in a series of {count}")
        for offset in range(length):
            rest, position = first + offset, {"s": series}
            for axis in order:
                rest, position[axis.lower()] = divmod(rest, sizes[axis])
            if directory + offset in described:
                raise DamagedImageError("OME-XML that describes a directory twice")
            described[directory + offset] = position


def _integer(attributes: Mapping[str, str], name: str, default: int) -> int:
    value = attributes.get(name, "")
    return int(value) if value.isascii() and value.isdigit() and len(value) < 10 else default


def _parse(text: bytes) -> tuple[dict[str, str], list[_Pixels], str]:
    """Return the root's attributes (with the key "" if planes are in other files), every Pixels element, and an error.

    The error is empty for valid XML.
    """
    root: dict[str, str] = {}
    pixels: list[_Pixels] = []
    element, count = "", 0

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal element, count
        count += 1
        if count > _MAX_ELEMENTS:
            raise UnsupportedImageError(f"OME-XML of over {_MAX_ELEMENTS} elements; split the file")
        element = name.rpartition(":")[2]
        if element == "OME":
            root.update(attributes)
        elif element == "BinaryOnly":
            root[""] = "other files"
        elif element == "Pixels":
            pixels.append(_Pixels(attributes))
        elif element == "TiffData" and pixels:
            pixels[-1].blocks.append(_TiffData(attributes))
        elif element == "Channel" and pixels and not pixels[-1].samples:
            pixels[-1].samples = _integer(attributes, "SamplesPerPixel", 0)
        elif element == "UUID" and pixels and pixels[-1].blocks:
            pixels[-1].blocks[-1].file = attributes.get("FileName", "")

    def characters(data: str) -> None:
        if element == "UUID" and pixels and pixels[-1].blocks:
            pixels[-1].blocks[-1].uuid += data.strip()

    def refuse(*_: object) -> None:
        raise UnsupportedImageError("OME-XML with a document type, which could contain entities")

    parser = expat.ParserCreate()
    parser.StartElementHandler = start
    parser.CharacterDataHandler = characters
    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    try:
        parser.Parse(text.rstrip(b"\0 \r\n"), True)
    except expat.ExpatError as error:
        return root, [], str(error)
    return root, pixels, ""
