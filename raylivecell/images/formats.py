"""Image files to gray pixels: TIFF, PNG, JPEG or BMP; 8 or 16 bit; refused where a reading would be a guess.

TIFF is read by `tiff`, from its tags; the rest by Pillow, which knows a file's size before its pixels and fails on a
file that is cut off. The rules that hold for every format:

- Pixels are those of the stored raster. A file with an orientation tag (TIFF, EXIF, XMP) other than 1 is refused:
  programs differ in whether they turn it (Fiji does not, browsers do), so labels drawn on it may be turned or not.
- One file is one picture. Several pages, planes, frames or channels are refused with their number; thumbnails, pyramid
  levels, masks and alpha are left out.
- Colour is its luma; one hue is its brightest channel (`channels.gray_of_rgb`); a palette is the gray it shows, or its
  indices where it is a ramp (`channels.gray_of_palette`).
"""

import io
import lzma
import struct
import warnings
import zlib
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile

from raylivecell.core.errors import DamagedImageError, UnreadableImageError, UnsupportedImageError
from raylivecell.images import file_kinds, jpeg, tiff
from raylivecell.images.channels import gray_of_palette, gray_of_rgb

SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg", ".bmp")
"""Names of image files end so, in any case."""

MAX_PIXELS = 2**26
"""Larger pictures (8192 x 8192) are refused before they are decoded: a few kB of file can claim gigabytes."""

_FORMATS = ("PNG", "JPEG", "BMP")  # Pillow knows fifty more; for PostScript it runs Ghostscript
_SUPPORTED = {"TIFF image", "PNG image", "JPEG image", "BMP image"}
_GRAY = {"L", "1", "I;16", "I;16L", "I;16B", "I;16N"}
_COLOUR = {"RGB", "RGBA", "RGBX", "LA", "La", "RGBa", "P", "PA", "CMYK", "YCbCr"}


@dataclass(frozen=True)
class Picture:
    """One decoded image file."""

    pixels: np.ndarray
    """uint8 or uint16 (H, W), of the stored raster, black 0."""
    colour: bool
    """Whether the file holds colour, alpha or palette channels."""

    @property
    def deep(self) -> bool:
        """Whether the pixels are 16 bit."""
        return self.pixels.dtype == np.uint16


def is_image_name(name: str) -> bool:
    """Whether `name` ends as an image file's does and is not hidden (macOS copies hold `._name.tif`)."""
    return name.lower().endswith(SUFFIXES) and not name.rsplit("/", 1)[-1].startswith(".")


def decode(data: bytes, most: int = MAX_PIXELS) -> Picture:
    """Decode the one picture in the bytes of an image file.

    Args:
        data: the file.
        most: pixels; at most 2^27, as Pillow itself refuses pictures not much larger.

    Raises:
        UnsupportedImageError: a sound file of a kind that is not read; the message starts with "unsupported: ".
        DamagedImageError: a file that is cut off or contradicts itself; the message starts with "damaged: ".
    """
    kind = file_kinds.kind_of(data)
    if kind not in _SUPPORTED:
        raise _no_image(data, kind)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata and of sizes that MAX_PIXELS refuses anyway
            pixels, colour = tiff.decode(data, most) if kind == "TIFF image" else _decode(data, most)
            return Picture(np.ascontiguousarray(pixels), colour)
    except UnreadableImageError:
        raise
    except Image.DecompressionBombError as error:
        raise UnsupportedImageError(f"more than {most} pixels; cut it into tiles") from error
    # Readers raise any of these on broken bytes.
    except (
        *(OSError, ValueError, SyntaxError, EOFError, KeyError, TypeError, IndexError, OverflowError),
        *(struct.error, zlib.error, lzma.LZMAError, cv2.error),
    ) as error:
        if (frame := jpeg.frame_of(data)) and kind == "JPEG image":
            jpeg.refuse_frame(frame)
        detail = "" if type(error).__name__ == "UnidentifiedImageError" else f" ({error})"
        raise DamagedImageError(f"incomplete or broken {kind}{detail}") from error


def _no_image(data: bytes, kind: str | None) -> UnreadableImageError:
    """Say what a file is that is none of the supported formats."""
    if not data.strip(b"\0"):
        return DamagedImageError("the file holds only zero bytes" if data else "the file is empty")
    return UnsupportedImageError(
        f"{kind or 'no known image format'}, whatever its name says; use TIFF, PNG, JPEG or BMP"
    )


def _decode(data: bytes, most: int) -> tuple[NDArray[Any], bool]:
    """Gray pixels (H, W) of a PNG, JPEG or BMP file, and whether it holds colour, alpha or a palette."""
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        width, height = image.size
        if width * height > most:
            raise UnsupportedImageError(f"{width} x {height} is more than {most} pixels; cut it into tiles")
        if (pictures := getattr(image, "n_frames", 1)) != 1:
            raise UnsupportedImageError(f"holds {pictures} images; save each as a file of its own")
        if image.mode not in _COLOUR | _GRAY:
            raise UnsupportedImageError(f"pixels of kind {image.mode}; save it as 8 or 16 bit gray")
        deep = any(";16" in str(tile[3]) for tile in image.tile)
        image.load()
        if reason := tiff.orientation_refused(_orientation(image)):
            raise UnsupportedImageError(reason)
        if image.mode in _COLOUR:
            return _gray(image, deep, data), True
        pixels = np.asarray(image.convert("L") if image.mode == "1" else image)
    return pixels if pixels.dtype == np.uint8 else pixels.astype(np.uint16), False


def _orientation(image: ImageFile.ImageFile) -> int:
    """The EXIF or XMP orientation; 1 without one, and where EXIF cannot be read: no viewer turns by it then."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (OSError, ValueError, SyntaxError, EOFError, KeyError, TypeError, IndexError, struct.error):
        return 1
    return orientation if isinstance(orientation, int) else 1


def _gray(image: ImageFile.ImageFile, deep: bool, data: bytes) -> NDArray[Any]:
    if image.mode == "P" and (table := image.getpalette("RGB")):
        return gray_of_palette(np.asarray(image), np.array(table, np.uint8).reshape(-1, 3))
    if not deep:
        return np.asarray(gray_of_rgb(np.asarray(image.convert("RGB"))))
    # Pillow keeps only 8 bits of 16-bit colour. It has decoded the file, which shows that the file is complete.
    bgr = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_ANYDEPTH | cv2.IMREAD_COLOR)
    if bgr is None or bgr.dtype != np.uint16:
        raise UnsupportedImageError("16-bit colour of a kind that cannot be read; save it as 16 bit gray")
    return np.asarray(gray_of_rgb(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)))
