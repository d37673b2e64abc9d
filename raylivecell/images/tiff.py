"""Decoding of TIFF files to grey pixels; files with ambiguous tags are refused.

1. Find the directory of the one full-size image (`read_directories`, `_find_image`); stacks are refused.
2. Read the pixel layout from its tags (`_layout`) and refuse unsupported ones before decoding.
3. Decode the samples (`tiff_segments`), then convert to the grey that viewers display (`_to_grey`).
"""

import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.ExifTags import Base as Tag

from raylivecell.core.errors import DamagedImageError, UnsupportedImageError
from raylivecell.images.channels import grey_of_palette, grey_of_rgb
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
_LABEL_FORMATS = {**_SAMPLE_FORMATS, 3: "f"}
_OTHER_FORMATS = {3: "floating-point", 5: "complex integer", 6: "complex"}
_STK_PLANES, _NIH_HEADER, _IMAGE_DEPTH = 33629, 43314, 32997  # tags without a name in Pillow
_MAX_SUBIFDS, _MAX_TEXT = 64, 2**22
_OME_PIXELS = re.compile(rb"<(?:\w{1,20}:)?Pixels\s([^<>]{0,4000})>")
_OME_SIZES = {axis: re.compile(rb"\bSize%s\s?=\s?[\"'](\d{1,9})[\"']" % axis.encode()) for axis in "CTZ"}
_OME_FILES = re.compile(rb"\bFileName\s?=\s?[\"']([^\"'<>]{1,1000})[\"']|<(?:\w{1,20}:)?BinaryOnly\b")


def decode(data: bytes, max_pixels: int) -> tuple[NDArray[Any], bool]:
    """Decode a TIFF file to uint8 or uint16 (H, W), and return whether it has colour, alpha or a palette.

    MINISWHITE is inverted over its bit depth. 1, 2 and 4 bits are scaled to 0..255; 9 to 15 bits are unchanged; signed
    and wider integers are accepted if every value fits uint16. Alpha is ignored.

    Args:
        data: content of the file.
        max_pixels: limit, including padding of tiles.

    Raises:
        UnreadableImageError: unsupported or damaged.
    """
    directory = _find_image(read_directories(data))
    if reason := orientation_problem(directory.number(Tag.Orientation, 1)):
        raise UnsupportedImageError(reason)
    photometric, layout = _layout(directory)
    if max(layout.width * layout.height, layout.padded_pixels) > max_pixels:
        raise UnsupportedImageError(
            f"{layout.width} x {layout.height} is more than {max_pixels} pixels with tile padding; cut it into tiles"
        )
    _refuse_stack(directory, layout)
    samples = read_samples(directory, layout, ycbcr=photometric == YCBCR)
    return _to_grey(directory, photometric, layout, samples)


def decode_labels(data: bytes, max_pixels: int) -> NDArray[Any]:
    """Decode the values of a label image as stored: integers or floats of 1 to 64 bits (H, W); palettes: the indices.

    Args:
        data: content of the file.
        max_pixels: limit, including padding of tiles.

    Raises:
        UnreadableImageError: unsupported or damaged; colour, several planes, or inverted values (MINISWHITE).
    """
    directory = _find_image(read_directories(data))
    if reason := orientation_problem(directory.number(Tag.Orientation, 1)):
        raise UnsupportedImageError(reason)
    photometric, layout = _layout(directory, _LABEL_FORMATS)
    if max(layout.width * layout.height, layout.padded_pixels) > max_pixels:
        raise UnsupportedImageError(f"{layout.width} x {layout.height} is more than {max_pixels} pixels with padding")
    _refuse_stack(directory, layout)
    if photometric == MINISWHITE:
        raise UnsupportedImageError("inverted values (MINISWHITE): programs disagree which are 0; save it as grey")
    if _CHANNELS[photometric] > 1 or layout.samples > 1:
        raise UnsupportedImageError(f"{layout.samples} channels, a label image has one; save the labels as grey")
    if layout.compression == JPEG:
        raise UnsupportedImageError("JPEG compression, which changes labels; save them without loss")
    return read_samples(directory, layout, ycbcr=False)[..., 0]


def orientation_problem(orientation: int) -> str:
    """Return the reason to refuse an orientation tag; empty for 1 and values outside 2 to 8, which viewers ignore."""
    if not 2 <= orientation <= 8:
        return ""
    return (
        f"orientation tag {orientation}: some programs rotate the image by it, others do not, so that labels may not "
        "match; save it upright, or remove the tag (exiftool -Orientation=)"
    )


def _find_image(directories: Iterable[Directory]) -> Directory:
    """Return the only directory that is neither a reduced copy nor a mask."""
    image, count = None, 0
    for directory in directories:
        if not _is_auxiliary(directory):
            image, count = image or directory, count + 1
    if image is None:
        raise DamagedImageError("TIFF file without an image, or with reduced copies and masks only")
    if count > 1:
        raise UnsupportedImageError(f"contains {count} images; save each as a separate file")
    for offset in image.numbers(Tag.SubIFDs)[:_MAX_SUBIFDS]:
        sub, _ = read_directory(image.data, image.order, image.big, offset)
        if not _is_auxiliary(sub) and _area(sub) >= _area(image):
            raise UnsupportedImageError("contains another image in a sub-directory (SubIFD); save only one")
    return image


def _area(directory: Directory) -> int:
    return directory.number(Tag.ImageWidth, 0) * directory.number(Tag.ImageLength, 0)


def _is_auxiliary(directory: Directory) -> bool:
    """Return whether the directory is a thumbnail, a pyramid level or a transparency mask."""
    return bool(directory.number(Tag.NewSubfileType, 0) & 0b101) or directory.number(Tag.SubfileType, 0) == 2


def _layout(directory: Directory, formats: Mapping[int, str] = _SAMPLE_FORMATS) -> tuple[int, Layout]:
    """Read the photometric interpretation and the layout of the samples; refuse unsupported ones."""
    photometric, samples = directory.number(Tag.PhotometricInterpretation, -1), directory.number(Tag.SamplesPerPixel, 1)
    if photometric == -1:
        raise DamagedImageError("no PhotometricInterpretation tag: 0 could be black or white")
    if photometric not in _CHANNELS:
        name = _OTHER_PHOTOMETRICS.get(photometric, f"photometric interpretation {photometric}")
        raise UnsupportedImageError(f"{name}; save it as grey or RGB")
    _refuse_channels(directory, photometric, samples)
    bits, sample_format = (
        _uniform_value(directory, Tag.BitsPerSample, samples),
        _uniform_value(directory, Tag.SampleFormat, samples),
    )
    if sample_format not in formats:
        name = _OTHER_FORMATS.get(sample_format, f"sample format {sample_format}")
        raise UnsupportedImageError(f"{bits}-bit {name} pixels; save it as 8 or 16 bit")
    layout = Layout.of(directory, samples, bits, formats[sample_format])
    if photometric == YCBCR and layout.compression != JPEG:
        raise UnsupportedImageError("YCbCr colour without JPEG compression; save it as grey or RGB")
    if photometric in (PALETTE, CMYK) and bits > 8:
        raise UnsupportedImageError(f"{bits}-bit palette or CMYK colour; save it as grey or RGB")
    return photometric, layout


def _refuse_channels(directory: Directory, photometric: int, samples: int) -> None:
    """Refuse channels other than colour and alpha."""
    channels = _CHANNELS[photometric]
    if samples < channels:
        raise DamagedImageError(f"{samples} samples per pixel, but its colour space needs {channels}")
    if directory.count(LSM) and samples > 1:
        raise UnsupportedImageError(f"{samples} channels (LSM); save one channel as a separate file")
    if samples > channels + 1 or (channels == 1 and samples == 2 and not _has_alpha(directory)):
        raise UnsupportedImageError(f"{samples} channels; save one channel as a separate file")
    if photometric == CMYK and directory.number(Tag.InkSet, 1) != 1:
        raise UnsupportedImageError("inks other than CMYK; save it as grey or RGB")


def _has_alpha(directory: Directory) -> bool:
    return directory.number(Tag.ExtraSamples, 0) in (1, 2)


def _uniform_value(directory: Directory, code: int, samples: int) -> int:
    """Return the value of a tag with one value per sample, 1 if absent; refuse samples that differ."""
    values = set(directory.numbers(code)[:samples]) or {1}
    if len(values) > 1:
        raise UnsupportedImageError(f"channels of different depth or type (TIFF tag {code}); save it as grey")
    return values.pop()


def _refuse_stack(directory: Directory, layout: Layout) -> None:
    """Refuse several planes in one directory, and metadata that lists more planes than directories."""
    planes, source = max(
        (directory.number(_IMAGE_DEPTH, 1), "ImageDepth"),
        (directory.count(_STK_PLANES), "MetaMorph STK"),
        (_nih_planes(directory), "NIH Image"),
        *(_described_planes(text, layout) for text in directory.texts(Tag.ImageDescription, _MAX_TEXT)),
    )
    if planes > 1:
        raise UnsupportedImageError(f"contains {planes} planes ({source}); save each as a separate file")


def _nih_planes(directory: Directory) -> int:
    header = b"".join(directory.texts(_NIH_HEADER, 512))
    return int.from_bytes(header[260:262], "big" if directory.order == ">" else "little")


def _described_planes(text: bytes, layout: Layout) -> tuple[int, str]:
    """Return the number of planes according to an image description, and the program or format that wrote it."""
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
    """Count planes in the shape that tifffile describes; 1 if the shape does not match this image."""
    match = re.search(rb'"shape"\s?:\s?(\[[\d\s,]{1,500}\])', text)
    shape = json.loads(match[1]) if match and re.fullmatch(rb"\[\s*\d{1,9}(\s*,\s*\d{1,9})*\s*\]", match[1]) else []
    size = layout.width * layout.height * layout.samples
    matches = (layout.height, layout.width) in itertools.pairwise(shape)
    return math.prod(shape) // size if matches else 1


def _ome_planes(text: bytes, samples: int) -> int:
    """Count the planes of all images in OME-XML; 1 if they are in several files: each file is decoded separately."""
    files = {match[1] for match in _OME_FILES.finditer(text)}
    if len(files) > 1 or None in files:
        return 1
    planes = 0
    for pixels in _OME_PIXELS.finditer(text):
        sizes = {axis: int(match[1]) for axis, size in _OME_SIZES.items() if (match := size.search(pixels[1]))}
        planes += sizes.get("T", 1) * sizes.get("Z", 1) * max(1, sizes.get("C", 1) // samples)
    return planes


def _to_grey(
    directory: Directory, photometric: int, layout: Layout, samples: NDArray[Any]
) -> tuple[NDArray[Any], bool]:
    """Convert `samples` (H, W, S) to grey (H, W), and return whether they have colour, alpha or a palette."""
    channels = _CHANNELS[photometric]
    if samples.shape[2] > channels and not _has_alpha(directory) and np.ptp(samples[..., -1]):
        raise UnsupportedImageError(f"{samples.shape[2]} channels, the last of unknown meaning; save it as grey or RGB")
    pixels = samples[..., :channels]
    if photometric == PALETTE:
        return grey_of_palette(np.ascontiguousarray(pixels[..., 0]), _palette(directory, layout.bits)), True
    if photometric == MINISWHITE:
        pixels = _invert(pixels, layout)
    pixels = _to_uint8_or_uint16(pixels, layout.bits)
    if channels == 1:
        return pixels[..., 0], samples.shape[2] > 1
    if photometric == CMYK:
        pixels = np.asarray(Image.fromarray(np.ascontiguousarray(pixels), "CMYK").convert("RGB"))
    return np.asarray(grey_of_rgb(np.ascontiguousarray(pixels))), True


def _invert(pixels: NDArray[Any], layout: Layout) -> NDArray[Any]:
    if layout.kind != "u" or layout.bits > 16:
        raise UnsupportedImageError(f"inverted {layout.bits}-bit pixels (MINISWHITE); save it as 8 or 16 bit")
    return pixels.dtype.type(2**layout.bits - 1) - pixels


def _to_uint8_or_uint16(pixels: NDArray[Any], bits: int) -> NDArray[Any]:
    """Convert integers to uint8 or uint16; refuse values that do not fit."""
    if bits < 8:
        return cv2.LUT(pixels, (np.arange(256) * 255 // (2**bits - 1)).astype(np.uint8)).reshape(pixels.shape)
    if pixels.dtype in (np.uint8, np.uint16):
        return pixels
    low, high = int(pixels.min()), int(pixels.max())
    if low < 0 or high > 65535:
        raise UnsupportedImageError(f"values from {low} to {high} do not fit 16 bits; save it as 8 or 16 bit")
    return pixels.astype(np.uint8 if bits == 8 else np.uint16)


def _palette(directory: Directory, bits: int) -> NDArray[np.uint8]:
    """Read the colours (2^bits, 3); a 16-bit colour map with only 8-bit values is used unscaled, like libtiff."""
    values = np.array(directory.numbers(Tag.ColorMap), np.int64)
    if len(values) != 3 * 2**bits:
        raise DamagedImageError(f"palette of {len(values) // 3} colours for {bits}-bit pixels")
    return (values if values.max() < 256 else values >> 8).reshape(3, -1).T.astype(np.uint8)
