"""Decoding of image files: bit depth, colour, and files that are refused."""

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from raylivecell.images import formats


@pytest.fixture
def grey() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (37, 53), dtype=np.uint8)


def encode(array: np.ndarray, suffix: str) -> bytes:
    success, data = cv2.imencode(suffix, array)
    assert success
    return data.tobytes()


@pytest.mark.parametrize("suffix", [".tif", ".png", ".bmp"])
def test_grey_is_unchanged(grey: np.ndarray, suffix: str) -> None:
    image = formats.decode(encode(grey, suffix))
    assert (image.colour, image.deep) == (False, False)
    np.testing.assert_array_equal(image.pixels, grey)


@pytest.mark.parametrize("suffix", [".tif", ".png"])
def test_sixteen_bits_are_unchanged(grey: np.ndarray, suffix: str) -> None:
    grey[0, 0] = 255
    image = formats.decode(encode(grey.astype(np.uint16) * 257, suffix))
    assert image.deep
    np.testing.assert_array_equal(image.pixels, grey.astype(np.uint16) * 257)


@pytest.mark.parametrize("suffix", [".tif", ".png", ".bmp"])
def test_colour_of_equal_channels_is_grey(grey: np.ndarray, suffix: str) -> None:
    image = formats.decode(encode(np.dstack([grey] * 3), suffix))
    assert image.colour
    np.testing.assert_array_equal(image.pixels, grey)


@pytest.mark.parametrize("suffix", [".tif", ".png"])
def test_sixteen_bit_colour_keeps_its_depth(grey: np.ndarray, suffix: str) -> None:
    deep = grey.astype(np.uint16) * 200 + 13
    image = formats.decode(encode(np.dstack([deep] * 3), suffix))
    assert image.colour
    assert image.deep
    np.testing.assert_array_equal(image.pixels, deep)


def test_palette_and_alpha_are_colour(grey: np.ndarray) -> None:
    for mode in ("P", "LA", "RGBA"):
        sink = io.BytesIO()
        Image.fromarray(grey).convert(mode).save(sink, "PNG")
        image = formats.decode(sink.getvalue())
        assert image.colour
        np.testing.assert_array_equal(image.pixels, grey)


def test_truncated_png_is_refused(grey: np.ndarray) -> None:
    data = encode(grey, ".png")
    for cut in [0, 1, 8, 20, *range(33, len(data) - 16, 97)]:
        with pytest.raises(formats.UnreadableImageError):
            formats.decode(data[:cut])


def test_truncated_tiff_is_refused(grey: np.ndarray) -> None:
    sink = io.BytesIO()
    Image.fromarray(grey).save(sink, "TIFF", compression="tiff_lzw")
    for data in (sink.getvalue(), encode(grey, ".tif")):
        for cut in range(0, len(data) - 300, 61):
            with pytest.raises(formats.UnreadableImageError):
                formats.decode(data[:cut])


def test_random_bytes_are_refused_without_a_crash(grey: np.ndarray) -> None:
    rng = np.random.default_rng(1)
    for suffix in (".tif", ".png", ".bmp", ".jpg"):
        valid = encode(grey, suffix)
        for _ in range(60):
            data = bytearray(valid)
            for position in rng.integers(0, min(len(data), 200), 4):
                data[position] = rng.integers(256)
            try:
                pixels = formats.decode(bytes(data)).pixels
            except formats.UnreadableImageError:
                continue
            assert pixels.ndim == 2


FORMATS = {
    "PNG": {},
    "PNG of 16 bit colour": {"deep": True},
    "JPEG": {"quality": 95},
    "progressive JPEG": {"quality": 95, "progressive": True},
    "BMP": {},
}


def saved_bytes(kind: str, image: np.ndarray) -> bytes:
    options = dict(FORMATS[kind])
    if options.pop("deep", False):
        return encode(np.dstack([image.astype(np.uint16) * 257] * 3), ".png")
    sink = io.BytesIO()
    Image.fromarray(image).save(sink, kind.split()[-1] if "PNG" not in kind else "PNG", **options)
    return sink.getvalue()


@pytest.mark.parametrize("kind", FORMATS)
def test_truncated_file_is_refused_or_has_the_same_pixels(kind: str, grey: np.ndarray) -> None:
    data = saved_bytes(kind, grey)
    expected = formats.decode(data).pixels
    for cut in range(0, len(data), 7):
        try:
            pixels = formats.decode(data[:cut]).pixels
        except formats.UnreadableImageError:
            continue
        np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("kind", ["TIFF", "PNG", "JPEG"])
def test_orientation_tags_are_refused_in_all_formats(kind: str, grey: np.ndarray) -> None:
    for orientation in range(1, 9):
        exif, sink = Image.Exif(), io.BytesIO()
        exif[0x0112] = orientation
        options = {"tiffinfo": {274: orientation}} if kind == "TIFF" else {"exif": exif, "quality": 100}
        Image.fromarray(grey).save(sink, kind, **options)
        if orientation == 1:
            assert formats.decode(sink.getvalue()).pixels.shape == grey.shape
        else:
            with pytest.raises(formats.UnsupportedImageError, match=f"orientation tag {orientation}"):
                formats.decode(sink.getvalue())


def test_one_hue_becomes_the_brightest_channel(grey: np.ndarray) -> None:
    empty = np.zeros_like(grey)
    for channels in ([empty, empty, grey], [grey, empty, empty], [grey, empty, grey], [empty, grey, grey]):
        np.testing.assert_array_equal(formats.decode(encode(np.dstack(channels), ".png")).pixels, grey)
    deep = np.dstack([empty, empty, grey]).astype(np.uint16) * 100
    np.testing.assert_array_equal(formats.decode(encode(deep, ".png")).pixels, grey.astype(np.uint16) * 100)
    smooth = cv2.GaussianBlur(grey, (0, 0), 4)
    with_scale_bar = np.dstack([smooth, empty, empty])
    with_scale_bar[:3, :8] = 255  # white
    np.testing.assert_array_equal(formats.decode(encode(with_scale_bar, ".png")).pixels, with_scale_bar.max(axis=2))
    lossy = formats.decode(encode(np.dstack([empty, empty, smooth]), ".jpg")).pixels
    assert np.abs(lossy.astype(int) - smooth).max() < 20


def test_other_colours_become_luma(grey: np.ndarray) -> None:
    stained = np.dstack([200 + grey // 8, 150 + grey // 4, 210 + grey // 16])
    merged = np.dstack([grey, grey[::-1], np.zeros_like(grey)])
    for bgr in (stained, merged):
        expected = cv2.cvtColor(bgr, cv2.COLOR_BGR2GRAY)
        np.testing.assert_array_equal(formats.decode(encode(bgr, ".png")).pixels, expected)


def with_palette(indices: np.ndarray, table: np.ndarray, kind: str) -> bytes:
    image, sink = Image.fromarray(indices), io.BytesIO()
    image.putpalette(table.astype(np.uint8).tobytes())
    image.save(sink, kind)
    return sink.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_palettes(kind: str, grey: np.ndarray) -> None:
    ramp = np.arange(256)
    shuffled = np.random.default_rng(1).permutation(256)
    zero, hilo = np.zeros(256), np.stack([ramp] * 3, axis=1)
    hilo[0], hilo[255] = (0, 0, 255), (255, 0, 0)  # the lookup table HiLo of Fiji
    expected = {
        "straight": (np.stack([ramp] * 3, axis=1), grey),
        "inverted": (np.stack([255 - ramp] * 3, axis=1), 255 - grey),
        "greys in any order": (np.stack([shuffled] * 3, axis=1), shuffled[grey]),
        "green": (np.stack([zero, ramp, zero], axis=1), grey),
        "blue to white": (np.stack([255 - ramp, 255 - ramp, zero + 255], axis=1), 255 - grey),
        "saturation marked": (hilo, grey),
    }
    for name, (table, pixels) in expected.items():
        np.testing.assert_array_equal(formats.decode(with_palette(grey, table, kind)).pixels, pixels, err_msg=name)
    jet = np.stack([ramp, 255 - abs(2 * ramp - 255), 255 - ramp], axis=1)
    for table in (jet, np.random.default_rng(2).integers(0, 256, (256, 3))):
        with pytest.raises(formats.UnsupportedImageError, match="palette"):
            formats.decode(with_palette(grey, table, kind))


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"GIF89a" + bytes(20), "GIF image"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "WebP image"),
        (b"\0\0\0\x18ftypheic" + bytes(9), "HEIC image"),
        (bytes(128) + b"DICM" + bytes(20), "DICOM file"),
        (b"\0\0\0\x0cjP  \r\n", "JPEG 2000 image"),
        (b"II\xbc\1" + bytes(20), "JPEG XR image"),
        (b"\x89HDF\r\n\x1a\n", "HDF5 file"),
        (b"%!PS-Adobe", "PostScript file"),
        (b'{"images": []}', "JSON file"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"hello", "not a known image format"),
    ],
)
def test_other_formats_are_reported_by_name(data: bytes, name: str) -> None:
    with pytest.raises(formats.UnsupportedImageError, match=r"^unsupported: .*use TIFF, PNG, JPEG or BMP") as error:
        formats.decode(data)
    assert name in str(error.value)


def test_empty_files_and_rare_jpegs(grey: np.ndarray) -> None:
    for data in (b"", bytes(100)):
        with pytest.raises(formats.DamagedImageError, match=r"^damaged: the file"):
            formats.decode(data)
    data = bytearray(encode(grey, ".jpg"))
    frame = data.index(b"\xff\xc0")
    for position, value, reason in ((frame + 4, 12, "12-bit JPEG"), (frame + 1, 0xC3, "lossless")):
        changed = data.copy()
        changed[position] = value
        with pytest.raises(formats.UnsupportedImageError, match=reason):
            formats.decode(bytes(changed))


def test_decompression_bomb_is_refused_before_decoding() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    for side in (9000, 60000):
        header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
        data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
        with pytest.raises(formats.UnreadableImageError, match="more than"):
            formats.decode(data)


def test_image_file_names() -> None:
    assert formats.is_image_name("a/B.TIF")
    assert not formats.is_image_name("a/._B.tif")
    assert not formats.is_image_name("a/B.json")
