"""Decoding of TIFF files to grey pixels; files with ambiguous tags are refused.

1. Find the directories of the full-size images (`read_directories`, `_find_images`), and their planes (`tiff_stacks`).
2. Read the pixel layout of a plane from its tags (`_layout`) and refuse unsupported ones before decoding.
3. Decode the samples (`tiff_segments`), then convert to the grey that viewers display (`_to_grey`).
"""

from collections.abc import Iterable
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.ExifTags import Base as Tag

from raylivecell.core.errors import DamagedImageError, TooManyPixelsError, UnsupportedImageError
from raylivecell.images.channels import grey_of_palette, grey_of_rgb
from raylivecell.images.pixel_types import to_unsigned
from raylivecell.images.planes import no_channel
from raylivecell.images.ranges import Data
from raylivecell.images.tiff_segments import JPEG, JPEG_2000, LSM, WEBP, Layout, read_samples
from raylivecell.images.tiff_stacks import Plane, planes
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
_SAMPLE_FORMATS = {1: "u", 2: "i", 3: "f", 4: "u"}
_OTHER_FORMATS = {5: "complex integer", 6: "complex"}
_MAX_SUBIFDS = 64


def read_planes(data: Data) -> list[Plane]:
    """Return the planes of a file in the order of storage, without decoding pixels.

    Raises:
        UnreadableImageError: damaged directories, or metadata that contradicts them.
    """
    return planes(_find_images(read_directories(data)))


def decode(plane: Plane, max_pixels: int, channel: int | None = None) -> tuple[NDArray[Any], bool]:
    """Decode a plane to uint8 or uint16 (H, W), and return whether it has colour, channels, alpha or a palette.

    MINISWHITE is inverted over its bit depth. 1, 2 and 4 bits are scaled to 0..255; 9 to 15 bits are unchanged; signed,
    wider and floating-point numbers are converted by `pixel_types.to_unsigned`. Alpha is ignored.

    Args:
        plane: one of `read_planes`.
        max_pixels: limit, including padding of tiles.
        channel: the sample of each pixel to return, from 0; default: the only one, or the grey of a colour.

    Raises:
        UnreadableImageError: unsupported or damaged.
    """
    directory = plane.directory
    if reason := orientation_problem(directory.number(Tag.Orientation, 1)):
        raise UnsupportedImageError(reason)
    photometric, layout = _layout(directory, channel)
    if max(layout.width * layout.height, layout.padded_pixels) > max_pixels:
        raise TooManyPixelsError(
            f"{layout.width} x {layout.height} is more than {max_pixels} pixels with tile padding; cut it into tiles"
        )
    samples = read_samples(directory, layout, photometric == YCBCR, plane.number)
    return _to_grey(directory, photometric, layout, samples, channel)


def decode_labels(data: Data, max_pixels: int) -> NDArray[Any]:
    """Decode the values of a label image as stored: integers or floats of 1 to 64 bits (H, W); palettes: the indices.

    Args:
        data: content of the file.
        max_pixels: limit, including padding of tiles.

    Raises:
        UnreadableImageError: unsupported or damaged; colour, several planes, or inverted values (MINISWHITE).
    """
    stack = read_planes(data)
    if len(stack) != 1:
        raise UnsupportedImageError(f"contains {len(stack)} planes, a label image has one; save each as a file")
    directory = stack[0].directory
    if reason := orientation_problem(directory.number(Tag.Orientation, 1)):
        raise UnsupportedImageError(reason)
    photometric, layout = _layout(directory, None)
    if max(layout.width * layout.height, layout.padded_pixels) > max_pixels:
        raise UnsupportedImageError(f"{layout.width} x {layout.height} is more than {max_pixels} pixels with padding")
    if photometric == MINISWHITE:
        raise UnsupportedImageError("inverted values (MINISWHITE): programs disagree which are 0; save it as grey")
    if _CHANNELS[photometric] > 1 or layout.samples > 1:
        raise UnsupportedImageError(f"{layout.samples} channels, a label image has one; save the labels as grey")
    if layout.compression in {JPEG, *WEBP, *JPEG_2000}:
        raise UnsupportedImageError("JPEG or WebP compression, which changes labels; save them without loss")
    return read_samples(directory, layout, False, stack[0].number)[..., 0]


def orientation_problem(orientation: int) -> str:
    """Return the reason to refuse an orientation tag; empty for 1 and values outside 2 to 8, which viewers ignore."""
    if not 2 <= orientation <= 8:
        return ""
    return (
        f"orientation tag {orientation}: some programs rotate the image by it, others do not, so that labels may not "
        "match; save it upright, or remove the tag (exiftool -Orientation=)"
    )


def _find_images(directories: Iterable[Directory]) -> list[tuple[int, Directory]]:
    """Return the directories that are neither a reduced copy nor a mask, with their numbers."""
    images = [(number, directory) for number, directory in enumerate(directories) if not _is_auxiliary(directory)]
    if not images:
        raise DamagedImageError("TIFF file without an image, or with reduced copies and masks only")
    for _, image in images:
        for offset in image.numbers(Tag.SubIFDs)[:_MAX_SUBIFDS]:
            sub, _ = read_directory(image.data, image.order, image.big, offset)
            if not _is_auxiliary(sub) and _area(sub) >= _area(image):
                raise UnsupportedImageError("contains another image in a sub-directory (SubIFD); save only one")
    return images


def _area(directory: Directory) -> int:
    return directory.number(Tag.ImageWidth, 0) * directory.number(Tag.ImageLength, 0)


def _is_auxiliary(directory: Directory) -> bool:
    """Return whether the directory is a thumbnail, a pyramid level or a transparency mask."""
    return bool(directory.number(Tag.NewSubfileType, 0) & 0b101) or directory.number(Tag.SubfileType, 0) == 2


def _layout(directory: Directory, channel: int | None) -> tuple[int, Layout]:
    """Read the photometric interpretation and the layout of the samples; refuse unsupported ones."""
    photometric, samples = directory.number(Tag.PhotometricInterpretation, -1), directory.number(Tag.SamplesPerPixel, 1)
    if photometric == -1:
        raise DamagedImageError("no PhotometricInterpretation tag: 0 could be black or white")
    if photometric not in _CHANNELS:
        name = _OTHER_PHOTOMETRICS.get(photometric, f"photometric interpretation {photometric}")
        raise UnsupportedImageError(f"{name}; save it as grey or RGB")
    _refuse_channels(directory, photometric, samples, channel)
    bits, sample_format = (
        _uniform_value(directory, Tag.BitsPerSample, samples),
        _uniform_value(directory, Tag.SampleFormat, samples),
    )
    if sample_format not in _SAMPLE_FORMATS:
        name = _OTHER_FORMATS.get(sample_format, f"sample format {sample_format}")
        raise UnsupportedImageError(f"{bits}-bit {name} pixels; save it as 8 or 16 bit")
    layout = Layout.of(directory, samples, bits, _SAMPLE_FORMATS[sample_format])
    if photometric == YCBCR and layout.compression != JPEG:
        raise UnsupportedImageError("YCbCr colour without JPEG compression; save it as grey or RGB")
    if photometric in (PALETTE, CMYK) and (bits > 8 or layout.kind != "u"):
        raise UnsupportedImageError(f"{bits}-bit palette or CMYK colour; save it as grey or RGB")
    return photometric, layout


def _refuse_channels(directory: Directory, photometric: int, samples: int, channel: int | None) -> None:
    """Refuse channels other than colour and alpha, if none is chosen; or a channel that does not exist."""
    colours = _CHANNELS[photometric]
    if samples < colours:
        raise DamagedImageError(f"{samples} samples per pixel, but its colour space needs {colours}")
    if photometric == CMYK and directory.number(Tag.InkSet, 1) != 1:
        raise UnsupportedImageError("inks other than CMYK; save it as grey or RGB")
    if channel is not None:
        count = 1 if photometric in (CMYK, PALETTE) else samples - _has_alpha(directory)
        if not 0 <= channel < count:
            raise no_channel(channel, count)
        return
    fix = f"choose one with --channel 0 to {samples - 1}"
    if directory.count(LSM) and samples > 1:
        raise UnsupportedImageError(f"{samples} channels (LSM); {fix}")
    if samples > colours + 1 or (colours == 1 and samples == 2 and not _has_alpha(directory)):
        raise UnsupportedImageError(f"{samples} channels; {fix}")


def _has_alpha(directory: Directory) -> bool:
    return directory.number(Tag.ExtraSamples, 0) in (1, 2)


def _uniform_value(directory: Directory, code: int, samples: int) -> int:
    """Return the value of a tag with one value per sample, 1 if absent; refuse samples that differ."""
    values = set(directory.numbers(code)[:samples]) or {1}
    if len(values) > 1:
        raise UnsupportedImageError(f"channels of different depth or type (TIFF tag {code}); save it as grey")
    return values.pop()


def _to_grey(
    directory: Directory, photometric: int, layout: Layout, samples: NDArray[Any], channel: int | None
) -> tuple[NDArray[Any], bool]:
    """Convert `samples` (H, W, S) to grey (H, W), and return whether they have colour, alpha or a palette."""
    channels = _CHANNELS[photometric]
    if channel is not None and photometric not in (CMYK, PALETTE):
        pixels = np.ascontiguousarray(samples[..., channel])
        pixels = _invert(pixels, layout) if photometric == MINISWHITE else pixels
        return _to_uint8_or_uint16(pixels, layout.bits), samples.shape[2] > 1
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
    """Scale 1, 2 and 4 bits to uint8; convert other types by `to_unsigned`."""
    if bits < 8:
        return cv2.LUT(pixels, (np.arange(256) * 255 // (2**bits - 1)).astype(np.uint8)).reshape(pixels.shape)
    return to_unsigned(pixels)


def _palette(directory: Directory, bits: int) -> NDArray[np.uint8]:
    """Read the colours (2^bits, 3); a 16-bit colour map with only 8-bit values is used unscaled, like libtiff."""
    values = np.array(directory.numbers(Tag.ColorMap), np.int64)
    if len(values) != 3 * 2**bits:
        raise DamagedImageError(f"palette of {len(values) // 3} colours for {bits}-bit pixels")
    return (values if values.max() < 256 else values >> 8).reshape(3, -1).T.astype(np.uint8)
