"""Image files to gray pixels: TIFF, PNG, JPEG or BMP; 8 or 16 bit; gray or colour; refused where that would guess.

Decoded by Pillow, not OpenCV: as fast on LIVECell's LZW TIFF (2 ms), reads a file's size before its pixels, and fails
on a cut-off file where OpenCV may return half a picture.
"""

import io
import warnings
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg", ".bmp")
"""Names of image files end so, in any case."""

MAX_PIXELS = 2**26
"""Larger pictures (8192 x 8192) are refused before they are decoded: a few kB of file can claim gigabytes."""

_FORMATS = ("TIFF", "PNG", "JPEG", "BMP")  # Pillow knows fifty more; for PostScript it runs Ghostscript
_TILE_WIDTH, _TILE_LENGTH = 322, 323
_GRAY = {"L", "1", "I;16", "I;16L", "I;16B", "I;16N"}
_COLOUR = {"RGB", "RGBA", "RGBX", "LA", "La", "RGBa", "P", "PA", "CMYK", "YCbCr", "LAB", "HSV"}


class UnreadableImageError(ValueError):
    """An image file that holds no picture this project can use; the message says why, without the file's name."""


@dataclass(frozen=True)
class Picture:
    """One decoded image file."""

    pixels: np.ndarray
    """uint8 or uint16 (H, W), as stored; of a colour file its luma."""
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
    """The picture in the bytes of an image file; `UnreadableImageError` where there is none, or more than one.

    `most`: of pixels; at most 2^27, as Pillow itself refuses pictures not much larger.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata and of sizes that MAX_PIXELS refuses anyway
            return _decode(data, most)
    except UnreadableImageError:
        raise
    except Image.DecompressionBombError as error:
        raise UnreadableImageError(f"more than {most} pixels") from error
    # Pillow's readers raise any of these on broken bytes.
    except (OSError, ValueError, SyntaxError, EOFError, KeyError, TypeError, IndexError, OverflowError) as error:
        detail = "" if type(error).__name__ == "UnidentifiedImageError" else f" ({error})"
        raise UnreadableImageError(f"not a whole image file{detail}") from error


def used_bits(pixels: np.ndarray) -> int:
    """How many bits the largest value of `pixels` needs, at least 8: 12 for what a 12-bit camera wrote as uint16."""
    return max(8, int(pixels.max(initial=0)).bit_length())


def to_uint8(pixels: np.ndarray, bits: int) -> NDArray[np.uint8]:
    """`pixels`, uint8 or uint16 of `bits` used bits, as uint8: divided by 2^(bits - 8), rounded down.

    One `bits` for all images of a set keeps their brightness comparable, and 8-bit data stored as 257 x comes back
    exactly. uint8 comes back as it is.
    """
    if pixels.dtype == np.uint8:
        return pixels
    return np.minimum(pixels >> (bits - 8), 255).astype(np.uint8)


def _decode(data: bytes, most: int) -> Picture:
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        width, height = image.size
        if max(width * height, _tile_pixels(image)) > most:
            raise UnreadableImageError(f"{width} x {height} is more than {most} pixels; cut it into tiles")
        if (pictures := getattr(image, "n_frames", 1)) != 1:
            raise UnreadableImageError(f"holds {pictures} pictures; save each as a file of its own")
        if image.mode in _COLOUR:
            return Picture(_luma(image, data), True)
        if image.mode not in _GRAY:
            raise UnreadableImageError(f"pixels of kind {image.mode}; save it as 8 or 16 bit gray")
        pixels = np.asarray(image.convert("L") if image.mode == "1" else image)
    return Picture(pixels if pixels.dtype == np.uint8 else pixels.astype(np.uint16), False)


def _tile_pixels(image: ImageFile.ImageFile) -> int:
    """Pixels of a TIFF's tile, 0 without tiles: a small picture may be a corner of a huge one, decoded whole."""
    tags = getattr(image, "tag_v2", {})
    return int(tags.get(_TILE_WIDTH, 0)) * int(tags.get(_TILE_LENGTH, 0))


def _luma(image: ImageFile.ImageFile, data: bytes) -> np.ndarray:
    """uint8 or uint16 (H, W): 0.299 R + 0.587 G + 0.114 B; three equal channels give back their own value."""
    deep = any(";16" in str(tile[3]) for tile in image.tile)
    rgb = np.asarray(image.convert("RGB"))
    if not deep:
        return cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    # Pillow has no 16-bit colour and would silently keep 8 bits of it; it has proved the file whole all the same.
    bgr = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_ANYDEPTH | cv2.IMREAD_COLOR)
    if bgr is None or bgr.dtype != np.uint16:
        raise UnreadableImageError("16-bit colour of a kind that cannot be read; save it as 16 bit gray")
    return cv2.cvtColor(bgr, cv2.COLOR_BGR2GRAY)
