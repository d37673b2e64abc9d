"""TIFF files to gray pixels: tags first, pixels only where the tags leave one meaning.

1. The directory of the one full picture (`read_directories`, `_only_picture`); more pictures or planes are refused.
2. What its tags say of the pixels (`_layout`), and whether that is supported, before anything is decoded.
3. The samples (`tiff_segments`), then gray as a viewer shows it (`_gray`).
"""

import itertools
import json
import math
import re
from collections.abc import Iterable
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from raylivecell.core.errors import DamagedImageError, UnsupportedImageError
from raylivecell.images.channels import gray_of_palette, gray_of_rgb
from raylivecell.images.tiff_segments import JPEG, LSM, Layout, read_samples
from raylivecell.images.tiff_tags import Directory, read_directories, read_directory

MINISWHITE, MINISBLACK, RGB, PALETTE, CMYK, YCBCR = 0, 1, 2, 3, 5, 6
_CHANNELS = {MINISWHITE: 1, MINISBLACK: 1, RGB: 3, PALETTE: 1, CMYK: 4, YCBCR: 3}
_OTHER_PHOTOMETRICS = {
    4: "a transparency mask",
    8: "CIELab colour",
    9: "ICCLab colour",
    10: "ITULab colour",
    32803: "a camera's raw mosaic (CFA)",
    32844: "LogL",
    32845: "LogLuv colour",
    34892: "camera raw (LinearRaw)",
}
_SAMPLE_FORMATS = {1: "u", 2: "i", 4: "u"}
_OTHER_FORMATS = {3: "floating-point", 5: "complex integer", 6: "complex"}
_STK_PLANES, _NIH_HEADER = 33629, 43314
_MAX_SUBIFDS, _MAX_TEXT = 64, 2**22
_OME_PIXELS = re.compile(rb"<(?:\w{1,20}:)?Pixels\s([^<>]{0,4000})>")
_OME_SIZES = {axis: re.compile(rb"\bSize%s\s?=\s?[\"'](\d{1,9})[\"']" % axis.encode()) for axis in "CTZ"}
_OME_FILES = re.compile(rb"\bFileName\s?=\s?[\"']([^\"'<>]{1,1000})[\"']|<(?:\w{1,20}:)?BinaryOnly\b")


def decode(data: bytes, most: int) -> tuple[NDArray[Any], bool]:
    """The picture of a TIFF file: uint8 or uint16 (H, W), and whether it holds colour, alpha or palette.

    MINISWHITE is inverted over its bit depth. 1, 2 and 4 bits are spread over 0 to 255; 9 to 15 bits stay as they are;
    signed and wider integers are read where every value fits uint16. Alpha is left out.

    Args:
        data: the file.
        most: pixels, padding of tiles included.

    Raises:
        UnreadableImageError: unsupported or damaged.
    """
    directory = _only_picture(read_directories(data))
    if orientation_refused(directory.number(274, 1)):
        raise UnsupportedImageError(orientation_refused(directory.number(274, 1)))
    photometric, layout = _layout(directory)
    if max(layout.width * layout.height, layout.padded_pixels) > most:
        raise UnsupportedImageError(
            f"{layout.width} x {layout.height} is more than {most} pixels (with its tiles); cut it into tiles"
        )
    _refuse_stack(directory, layout)
    samples = read_samples(directory, layout, ycbcr=photometric == YCBCR)
    return _gray(directory, photometric, layout, samples)


def orientation_refused(orientation: int) -> str:
    """Reason to refuse an orientation tag; empty for 1 and for values outside 2 to 8, which viewers ignore."""
    if not 2 <= orientation <= 8:
        return ""
    return (
        f"orientation tag {orientation}: some programs turn the image by it, others do not, so that labels may not "
        "match; save it upright, or remove the tag (exiftool -Orientation=)"
    )


def _only_picture(directories: Iterable[Directory]) -> Directory:
    """The one directory that is neither a reduced copy nor a mask."""
    picture, count = None, 0
    for directory in directories:
        if not _is_auxiliary(directory):
            picture, count = picture or directory, count + 1
    if picture is None:
        raise DamagedImageError("TIFF file without an image, or with reduced copies and masks alone")
    if count > 1:
        raise UnsupportedImageError(f"holds {count} images; save each as a file of its own")
    for offset in picture.numbers(330)[:_MAX_SUBIFDS]:
        sub, _ = read_directory(picture.data, picture.order, picture.big, offset)
        if not _is_auxiliary(sub) and _area(sub) >= _area(picture):
            raise UnsupportedImageError("holds another image in a sub-directory (SubIFD); save it alone")
    return picture


def _area(directory: Directory) -> int:
    return directory.number(256, 0) * directory.number(257, 0)


def _is_auxiliary(directory: Directory) -> bool:
    """Whether the directory is a thumbnail, a pyramid's level or a transparency mask."""
    return bool(directory.number(254, 0) & 0b101) or directory.number(255, 0) == 2


def _layout(directory: Directory) -> tuple[int, Layout]:
    """Photometric interpretation and layout of the samples; refused where it is not one of those supported."""
    photometric, samples = directory.number(262, -1), directory.number(277, 1)
    if photometric == -1:
        raise DamagedImageError("no PhotometricInterpretation tag: 0 may be black or white")
    if photometric not in _CHANNELS:
        name = _OTHER_PHOTOMETRICS.get(photometric, f"photometric interpretation {photometric}")
        raise UnsupportedImageError(f"{name}; save it as gray or RGB")
    _refuse_channels(directory, photometric, samples)
    bits, sample_format = _same(directory, 258, samples), _same(directory, 339, samples)
    if sample_format not in _SAMPLE_FORMATS:
        name = _OTHER_FORMATS.get(sample_format, f"sample format {sample_format}")
        raise UnsupportedImageError(f"{bits}-bit {name} pixels; save it as 8 or 16 bit")
    layout = Layout.of(directory, samples, bits, _SAMPLE_FORMATS[sample_format])
    if photometric == YCBCR and layout.compression != JPEG:
        raise UnsupportedImageError("YCbCr colour without JPEG compression; save it as gray or RGB")
    if photometric in (PALETTE, CMYK) and bits > 8:
        raise UnsupportedImageError(f"{bits}-bit palette or CMYK colour; save it as gray or RGB")
    return photometric, layout


def _refuse_channels(directory: Directory, photometric: int, samples: int) -> None:
    """Refuse channels that are neither colour nor alpha."""
    channels = _CHANNELS[photometric]
    if samples < channels:
        raise DamagedImageError(f"{samples} samples a pixel where its colour takes {channels}")
    if directory.count(LSM) and samples > 1:
        raise UnsupportedImageError(f"{samples} channels (LSM); save one channel as a file of its own")
    if samples > channels + 1 or (channels == 1 and samples == 2 and not _has_alpha(directory)):
        raise UnsupportedImageError(f"{samples} channels; save one channel as a file of its own")
    if photometric == CMYK and directory.number(332, 1) != 1:
        raise UnsupportedImageError("inks other than CMYK; save it as gray or RGB")


def _has_alpha(directory: Directory) -> bool:
    return directory.number(338, 0) in (1, 2)


def _same(directory: Directory, code: int, samples: int) -> int:
    """The value of a tag that has one value a sample, 1 where it is absent."""
    values = set(directory.numbers(code)[:samples]) or {1}
    if len(values) > 1:
        raise UnsupportedImageError(f"channels that differ in depth or kind (TIFF tag {code}); save it as gray")
    return values.pop()


def _refuse_stack(directory: Directory, layout: Layout) -> None:
    """Refuse planes that have no directory of their own, and directories that were left out."""
    planes, kind = max(
        (directory.number(32997, 1), "ImageDepth"),
        (directory.count(_STK_PLANES), "MetaMorph STK"),
        (_nih_planes(directory), "NIH Image"),
        *(_described_planes(text, layout) for text in directory.texts(270, _MAX_TEXT)),
    )
    if planes > 1:
        raise UnsupportedImageError(f"holds {planes} planes ({kind}); save each as a file of its own")


def _nih_planes(directory: Directory) -> int:
    header = b"".join(directory.texts(_NIH_HEADER, 512))
    return int.from_bytes(header[260:262], "big" if directory.order == ">" else "little")


def _described_planes(text: bytes, layout: Layout) -> tuple[int, str]:
    """Number of planes that an image description counts, and whose description it is."""
    if text.startswith(b"ImageJ="):
        counts = {key: int(value) for key, value in re.findall(rb"(?m)^(\w{1,20})=(\d{1,9})\s*?$", text[:4096])}
        product = math.prod(counts.get(key, 1) for key in (b"channels", b"slices", b"frames"))
        return max(counts.get(b"images", 1), product), "ImageJ stack"
    if text.startswith(b"{"):
        return _shaped_planes(text[:4096].rstrip(b"\0 \n"), layout), "tifffile stack"
    if b"<OME" in text[:4096] or b":OME" in text[:4096]:
        return _ome_planes(text, layout.samples), "OME-TIFF"
    return 1, ""


def _shaped_planes(text: bytes, layout: Layout) -> int:
    """Planes in the shape that tifffile describes; 1 where it is not this image's."""
    match = re.search(rb'"shape"\s?:\s?(\[[\d\s,]{1,500}\])', text)
    shape = json.loads(match[1]) if match and re.fullmatch(rb"\[\s*\d{1,9}(\s*,\s*\d{1,9})*\s*\]", match[1]) else []
    size = layout.width * layout.height * layout.samples
    follows = (layout.height, layout.width) in itertools.pairwise(shape)
    return math.prod(shape) // size if follows else 1


def _ome_planes(text: bytes, samples: int) -> int:
    """Planes that OME-XML counts in all its images; 1 where it spreads them over several files, each read alone."""
    files = {match[1] for match in _OME_FILES.finditer(text)}
    if len(files) > 1 or None in files:
        return 1
    planes = 0
    for pixels in _OME_PIXELS.finditer(text):
        sizes = {axis: int(match[1]) for axis, size in _OME_SIZES.items() if (match := size.search(pixels[1]))}
        planes += sizes.get("T", 1) * sizes.get("Z", 1) * max(1, sizes.get("C", 1) // samples)
    return planes


def _gray(directory: Directory, photometric: int, layout: Layout, samples: NDArray[Any]) -> tuple[NDArray[Any], bool]:
    """`samples` (H, W, S) as gray (H, W), and whether they are colour, alpha or palette."""
    channels = _CHANNELS[photometric]
    if samples.shape[2] > channels and not _has_alpha(directory) and np.ptp(samples[..., -1]):
        raise UnsupportedImageError(f"{samples.shape[2]} channels, the last of unknown meaning; save it as gray or RGB")
    picture = samples[..., :channels]
    if photometric == PALETTE:
        return gray_of_palette(np.ascontiguousarray(picture[..., 0]), _palette(directory, layout.bits)), True
    if photometric == MINISWHITE:
        picture = _inverted(picture, layout)
    picture = _depth(picture, layout.bits)
    if channels == 1:
        return picture[..., 0], samples.shape[2] > 1
    if photometric == CMYK:
        picture = np.asarray(Image.fromarray(np.ascontiguousarray(picture), "CMYK").convert("RGB"))
    return np.asarray(gray_of_rgb(np.ascontiguousarray(picture))), True


def _inverted(picture: NDArray[Any], layout: Layout) -> NDArray[Any]:
    if layout.kind != "u" or layout.bits > 16:
        raise UnsupportedImageError(f"inverted {layout.bits}-bit pixels (MINISWHITE); save it as 8 or 16 bit")
    return picture.dtype.type(2**layout.bits - 1) - picture


def _depth(picture: NDArray[Any], bits: int) -> NDArray[Any]:
    """Integers as uint8 or uint16; refused where a value does not fit."""
    if bits < 8:
        return cv2.LUT(picture, (np.arange(256) * 255 // (2**bits - 1)).astype(np.uint8)).reshape(picture.shape)
    if picture.dtype in (np.uint8, np.uint16):
        return picture
    low, high = int(picture.min()), int(picture.max())
    if low < 0 or high > 65535:
        raise UnsupportedImageError(f"values from {low} to {high} do not fit 16 bits; save it as 8 or 16 bit")
    return picture.astype(np.uint8 if bits == 8 else np.uint16)


def _palette(directory: Directory, bits: int) -> NDArray[np.uint8]:
    """Colours (2^bits, 3); 8-bit values that stand in the 16-bit map are taken as such, as libtiff does."""
    values = np.array(directory.numbers(320), np.int64)
    if len(values) != 3 * 2**bits:
        raise DamagedImageError(f"palette of {len(values) // 3} colours for {bits} bits")
    return (values if values.max() < 256 else values >> 8).reshape(3, -1).T.astype(np.uint8)
