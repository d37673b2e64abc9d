"""Decoding of image files to grey pixels: TIFF, PNG, JPEG or BMP; 8 or 16 bit; ambiguous files are refused.

TIFF is decoded by `tiff`, CZI, LIF and ND2 by `microscopes`; the other formats by Pillow, which reads the size before
the pixels and fails on truncated files. Rules for all formats:

- Pixels are decoded as stored, not rotated. A file with an orientation tag (TIFF, EXIF, XMP) other than 1 is refused:
  some programs apply it (browsers), others do not (Fiji), so labels drawn in one do not fit in another.
- One plane is one image. `ImageFile` lists the planes of a file; `decode` needs the choice of one if there are
  several. Several frames of other formats are counted and refused; thumbnails, pyramid levels, masks and alpha are
  ignored.
- Colour is converted to luma, images of one hue to their brightest channel (`channels.grey_of_rgb`), palettes to the
  displayed grey, or to their indices if they are ramps (`channels.grey_of_palette`). Channels of other files are never
  combined: one must be chosen.
"""

import io
import lzma
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image
from PIL.ImageFile import ImageFile as ImageFileOfPillow

from raylivecell.core.errors import DamagedImageError, TooManyPixelsError, UnreadableImageError, UnsupportedImageError
from raylivecell.images import file_kinds, jpeg, planes, tiff
from raylivecell.images.channels import grey_of_palette, grey_of_rgb
from raylivecell.images.microscopes import files as microscopes
from raylivecell.images.planes import EVERYTHING, Choice, Position
from raylivecell.images.ranges import Data

SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg", ".bmp", *microscopes.SUFFIXES)
"""Suffixes of image files, compared ignoring case."""

STACK_SUFFIXES = (".tif", ".tiff", *microscopes.SUFFIXES)
"""Suffixes of files that may contain several planes."""

MAX_PIXELS = 2**26
"""8192 x 8192. Larger images are refused before decoding: a file of a few kB can declare gigabytes."""

HEAD = 512
"""Bytes that identify a format."""
_FORMATS = ("PNG", "JPEG", "BMP")  # Pillow reads fifty more; for PostScript it runs Ghostscript
_SUPPORTED = {"TIFF image", "PNG image", "JPEG image", "BMP image", *microscopes.KINDS}
_GREY = {"L", "1", "I;16", "I;16L", "I;16B", "I;16N"}
_THREE_CHANNELS = {"RGB", "RGBA", "RGBX", "RGBa", "YCbCr"}
_COLOUR = {"RGB", "RGBA", "RGBX", "LA", "La", "RGBa", "P", "PA", "CMYK", "YCbCr"}


@dataclass(frozen=True)
class DecodedImage:
    """One decoded image file."""

    pixels: np.ndarray
    """uint8 or uint16 (H, W), as stored, black is 0."""
    colour: bool
    """Whether the file has colour, alpha or a palette."""

    @property
    def deep(self) -> bool:
        """Whether the pixels have 16 bits."""
        return self.pixels.dtype == np.uint16


def is_image_name(name: str) -> bool:
    """Return whether `name` has an image suffix and is not hidden (macOS adds `._name.tif`)."""
    return name.lower().endswith(SUFFIXES) and not name.rsplit("/", 1)[-1].startswith(".")


class ImageFile:
    """An open image file: its planes, decoded one by one."""

    def __init__(self, data: Data) -> None:
        """Read the list of planes.

        Raises:
            UnsupportedImageError: an intact file of an unsupported kind; the message starts with "unsupported: ".
            DamagedImageError: a truncated or contradictory file; the message starts with "damaged: ".
        """
        self.data = data
        self.kind = file_kinds.kind_of(data[:HEAD])
        if self.kind not in _SUPPORTED:
            raise _unsupported_format(data, self.kind)
        with self._translating_errors(0):
            self.tiff = tiff.read_planes(data) if self.kind == "TIFF image" else []
            self.others = microscopes.read_planes(self.kind, data) if self.kind in microscopes.KINDS else []
        positions = [*(plane.position for plane in self.tiff), *(plane.position for plane in self.others)]
        self.positions: list[Position] = positions or [{}]
        self.names = planes.names(self.positions)
        """Name of each plane (`planes`); "" for the only one."""

    def select(self, choice: Choice = EVERYTHING) -> list[int]:
        """Return the numbers of the chosen planes; UnsupportedImageError if there is none, or several channels."""
        return planes.select(self.positions, choice)

    def decode(self, choice: Choice = EVERYTHING, max_pixels: int = MAX_PIXELS) -> DecodedImage:
        """Decode the chosen plane, which must be one; errors as in `__init__`."""
        numbers = self.select(choice)
        if len(numbers) > 1:
            contents = f"contains {len(self.names)} images ({planes.extent(self.positions)})"
            raise UnsupportedImageError(f"{contents}; choose one with --plane, such as {self.names[numbers[0]]}")
        channel = None if planes.has_channels(self.positions) else choice.channel
        with self._translating_errors(max_pixels):
            if self.tiff:
                pixels, colour = tiff.decode(self.tiff[numbers[0]], max_pixels, channel)
            elif self.others:
                pixels, colour = microscopes.decode(self.kind or "", self.others[numbers[0]], max_pixels, channel)
            else:
                pixels, colour = _decode(self.data[:], max_pixels, channel)
            return DecodedImage(np.ascontiguousarray(pixels), colour)

    @contextmanager
    def _translating_errors(self, max_pixels: int) -> Iterator[None]:
        """Turn the errors of decoders into UnreadableImageError; ignore warnings about unusual metadata."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        except UnreadableImageError:
            raise
        except Image.DecompressionBombError as error:
            raise TooManyPixelsError(f"more than {max_pixels} pixels; cut it into tiles") from error
        # Decoders raise any of these on damaged files.
        except (
            *(OSError, ValueError, SyntaxError, EOFError, KeyError, TypeError, IndexError, OverflowError),
            *(struct.error, zlib.error, lzma.LZMAError, cv2.error),
        ) as error:
            if self.kind == "JPEG image" and (frame := jpeg.frame_of(self.data[:])):
                jpeg.refuse_frame(frame)
            detail = "" if type(error).__name__ == "UnidentifiedImageError" else f" ({error})"
            raise DamagedImageError(f"incomplete or corrupt {self.kind}{detail}") from error


def decode(data: Data, max_pixels: int = MAX_PIXELS, choice: Choice = EVERYTHING) -> DecodedImage:
    """Decode one plane of an image file.

    Args:
        data: content of the file.
        max_pixels: at most 2^27, since Pillow itself refuses slightly larger images.
        choice: the plane and channel, if the file has several.

    Raises:
        UnsupportedImageError: an intact file of an unsupported kind; the message starts with "unsupported: ".
        DamagedImageError: a truncated or contradictory file; the message starts with "damaged: ".
    """
    return ImageFile(data).decode(choice, max_pixels)


def _unsupported_format(data: Data, kind: str | None) -> UnreadableImageError:
    """Build the error for a file in an unsupported format."""
    if not data[:].strip(b"\0"):
        return DamagedImageError("the file contains only zero bytes" if data else "the file is empty")
    return UnsupportedImageError(
        f"{kind or 'not a known image format'}, detected by content; use TIFF, PNG, JPEG or BMP"
    )


def _decode(data: bytes, max_pixels: int, channel: int | None) -> tuple[NDArray[Any], bool]:
    """Decode PNG, JPEG or BMP: grey pixels (H, W), and whether the file has colour, alpha or a palette."""
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise TooManyPixelsError(f"{width} x {height} is more than {max_pixels} pixels; cut it into tiles")
        if (frames := getattr(image, "n_frames", 1)) != 1:
            raise UnsupportedImageError(f"contains {frames} images; save each as a separate file")
        if image.mode not in _COLOUR | _GREY:
            raise UnsupportedImageError(f"pixel format {image.mode}; save it as 8 or 16 bit grey")
        deep = any(";16" in str(tile[3]) for tile in image.tile)
        image.load()
        if reason := tiff.orientation_problem(_orientation(image)):
            raise UnsupportedImageError(reason)
        count = 3 if image.mode in _THREE_CHANNELS else 1
        if channel is not None and not 0 <= channel < count:
            raise planes.no_channel(channel, count)
        if image.mode in _COLOUR:
            return _to_grey(image, deep, data, channel), True
        pixels = np.asarray(image.convert("L") if image.mode == "1" else image)
    return pixels if pixels.dtype == np.uint8 else pixels.astype(np.uint16), False


def _orientation(image: ImageFileOfPillow) -> int:
    """Return the EXIF or XMP orientation; 1 if it is absent, or unreadable so that no viewer applies it."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (OSError, ValueError, SyntaxError, EOFError, KeyError, TypeError, IndexError, struct.error):
        return 1
    return orientation if isinstance(orientation, int) else 1


def _to_grey(image: ImageFileOfPillow, deep: bool, data: bytes, channel: int | None) -> NDArray[Any]:
    if image.mode == "P" and (table := image.getpalette("RGB")):
        return grey_of_palette(np.asarray(image), np.array(table, np.uint8).reshape(-1, 3))
    rgb = np.asarray(image.convert("RGB")) if not deep else _deep_rgb(data)
    if channel is not None and image.mode in _THREE_CHANNELS:
        return np.ascontiguousarray(rgb[..., channel])
    return np.asarray(grey_of_rgb(rgb))


def _deep_rgb(data: bytes) -> NDArray[np.uint16]:
    """Decode 16-bit colour (H, W, 3) by OpenCV, after Pillow, which reduces it to 8 bits, has checked the file."""
    bgr = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_ANYDEPTH | cv2.IMREAD_COLOR)
    if bgr is None or bgr.dtype != np.uint16:
        raise UnsupportedImageError("16-bit colour in an unsupported layout; save it as 16 bit grey")
    return np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), np.uint16)
