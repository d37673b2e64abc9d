"""Image files: depth, colour, and everything that is refused."""

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from raylivecell.images import formats


@pytest.fixture
def gray() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (37, 53), dtype=np.uint8)


def encode(array: np.ndarray, suffix: str) -> bytes:
    ok, data = cv2.imencode(suffix, array)
    assert ok
    return data.tobytes()


@pytest.mark.parametrize("suffix", [".tif", ".png", ".bmp"])
def test_gray_comes_back_as_it_is(gray: np.ndarray, suffix: str) -> None:
    picture = formats.decode(encode(gray, suffix))
    assert (picture.colour, picture.deep) == (False, False)
    np.testing.assert_array_equal(picture.pixels, gray)


@pytest.mark.parametrize("suffix", [".tif", ".png"])
def test_sixteen_bits_come_back_as_they_are(gray: np.ndarray, suffix: str) -> None:
    gray[0, 0] = 255
    picture = formats.decode(encode(gray.astype(np.uint16) * 257, suffix))
    assert picture.deep
    np.testing.assert_array_equal(picture.pixels, gray.astype(np.uint16) * 257)


@pytest.mark.parametrize("suffix", [".tif", ".png", ".bmp"])
def test_colour_of_equal_channels_is_the_gray(gray: np.ndarray, suffix: str) -> None:
    picture = formats.decode(encode(np.dstack([gray] * 3), suffix))
    assert picture.colour
    np.testing.assert_array_equal(picture.pixels, gray)


@pytest.mark.parametrize("suffix", [".tif", ".png"])
def test_sixteen_bit_colour_keeps_its_depth(gray: np.ndarray, suffix: str) -> None:
    deep = gray.astype(np.uint16) * 200 + 13
    picture = formats.decode(encode(np.dstack([deep] * 3), suffix))
    assert picture.colour
    assert picture.deep
    np.testing.assert_array_equal(picture.pixels, deep)


def test_palette_and_alpha_are_colour(gray: np.ndarray) -> None:
    for mode in ("P", "LA", "RGBA"):
        sink = io.BytesIO()
        Image.fromarray(gray).convert(mode).save(sink, "PNG")
        picture = formats.decode(sink.getvalue())
        assert picture.colour
        np.testing.assert_array_equal(picture.pixels, gray)


def test_every_cut_of_a_png_is_refused(gray: np.ndarray) -> None:
    data = encode(gray, ".png")
    for cut in [0, 1, 8, 20, *range(33, len(data) - 16, 97)]:
        with pytest.raises(formats.UnreadableImageError):
            formats.decode(data[:cut])


def test_cuts_of_a_tiff_are_refused(gray: np.ndarray) -> None:
    sink = io.BytesIO()
    Image.fromarray(gray).save(sink, "TIFF", compression="tiff_lzw")
    for data in (sink.getvalue(), encode(gray, ".tif")):
        for cut in range(0, len(data) - 300, 61):
            with pytest.raises(formats.UnreadableImageError):
                formats.decode(data[:cut])


def test_random_bytes_are_refused_and_never_crash(gray: np.ndarray) -> None:
    rng = np.random.default_rng(1)
    for suffix in (".tif", ".png", ".bmp", ".jpg"):
        good = encode(gray, suffix)
        for _ in range(60):
            data = bytearray(good)
            for place in rng.integers(0, min(len(data), 200), 4):
                data[place] = rng.integers(256)
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


def saved(kind: str, image: np.ndarray) -> bytes:
    options = dict(FORMATS[kind])
    if options.pop("deep", False):
        return encode(np.dstack([image.astype(np.uint16) * 257] * 3), ".png")
    sink = io.BytesIO()
    Image.fromarray(image).save(sink, kind.split()[-1] if "PNG" not in kind else "PNG", **options)
    return sink.getvalue()


@pytest.mark.parametrize("kind", FORMATS)
def test_a_cut_file_is_refused_or_gives_the_same_pixels(kind: str, gray: np.ndarray) -> None:
    data = saved(kind, gray)
    expected = formats.decode(data).pixels
    for cut in range(0, len(data), 7):
        try:
            pixels = formats.decode(data[:cut]).pixels
        except formats.UnreadableImageError:
            continue
        np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("kind", ["TIFF", "PNG", "JPEG"])
def test_one_rule_for_orientation(kind: str, gray: np.ndarray) -> None:
    for orientation in range(1, 9):
        exif, sink = Image.Exif(), io.BytesIO()
        exif[0x0112] = orientation
        options = {"tiffinfo": {274: orientation}} if kind == "TIFF" else {"exif": exif, "quality": 100}
        Image.fromarray(gray).save(sink, kind, **options)
        if orientation == 1:
            assert formats.decode(sink.getvalue()).pixels.shape == gray.shape
        else:
            with pytest.raises(formats.UnsupportedImageError, match=f"orientation tag {orientation}"):
                formats.decode(sink.getvalue())


def test_one_hue_is_its_brightest_channel(gray: np.ndarray) -> None:
    empty = np.zeros_like(gray)
    for channels in ([empty, empty, gray], [gray, empty, empty], [gray, empty, gray], [empty, gray, gray]):
        np.testing.assert_array_equal(formats.decode(encode(np.dstack(channels), ".png")).pixels, gray)
    deep = np.dstack([empty, empty, gray]).astype(np.uint16) * 100
    np.testing.assert_array_equal(formats.decode(encode(deep, ".png")).pixels, gray.astype(np.uint16) * 100)
    smooth = cv2.GaussianBlur(gray, (0, 0), 4)
    labelled = np.dstack([smooth, empty, empty])
    labelled[:3, :8] = 255  # a scale bar in white
    np.testing.assert_array_equal(formats.decode(encode(labelled, ".png")).pixels, labelled.max(axis=2))
    lossy = formats.decode(encode(np.dstack([empty, empty, smooth]), ".jpg")).pixels
    assert np.abs(lossy.astype(int) - smooth).max() < 20


def test_colours_that_differ_are_luma(gray: np.ndarray) -> None:
    stained = np.dstack([200 + gray // 8, 150 + gray // 4, 210 + gray // 16])
    merged = np.dstack([gray, gray[::-1], np.zeros_like(gray)])
    for bgr in (stained, merged):
        expected = cv2.cvtColor(bgr, cv2.COLOR_BGR2GRAY)
        np.testing.assert_array_equal(formats.decode(encode(bgr, ".png")).pixels, expected)


def with_palette(indices: np.ndarray, table: np.ndarray, kind: str) -> bytes:
    image, sink = Image.fromarray(indices), io.BytesIO()
    image.putpalette(table.astype(np.uint8).tobytes())
    image.save(sink, kind)
    return sink.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_palettes(kind: str, gray: np.ndarray) -> None:
    ramp = np.arange(256)
    shuffled = np.random.default_rng(1).permutation(256)
    zero, marked = np.zeros(256), np.stack([ramp] * 3, axis=1)
    marked[0], marked[255] = (0, 0, 255), (255, 0, 0)  # Fiji's HiLo
    expected = {
        "straight": (np.stack([ramp] * 3, axis=1), gray),
        "inverted": (np.stack([255 - ramp] * 3, axis=1), 255 - gray),
        "grays in any order": (np.stack([shuffled] * 3, axis=1), shuffled[gray]),
        "green": (np.stack([zero, ramp, zero], axis=1), gray),
        "blue to white": (np.stack([255 - ramp, 255 - ramp, zero + 255], axis=1), 255 - gray),
        "saturation marked": (marked, gray),
    }
    for name, (table, pixels) in expected.items():
        np.testing.assert_array_equal(formats.decode(with_palette(gray, table, kind)).pixels, pixels, err_msg=name)
    jet = np.stack([ramp, 255 - abs(2 * ramp - 255), 255 - ramp], axis=1)
    for table in (jet, np.random.default_rng(2).integers(0, 256, (256, 3))):
        with pytest.raises(formats.UnsupportedImageError, match="palette"):
            formats.decode(with_palette(gray, table, kind))


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"GIF89a" + bytes(20), "GIF image"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "WebP image"),
        (b"\0\0\0\x18ftypheic" + bytes(9), "HEIC image"),
        (bytes(128) + b"DICM" + bytes(20), "DICOM file"),
        (b"\0\0\0\x0cjP  \r\n", "JPEG 2000 image"),
        (b"ZISRAWFILE" + bytes(20), "Zeiss CZI file"),
        (b"\xda\xce\xbe\x0a" + bytes(20), "Nikon ND2 file"),
        (b"\x89HDF\r\n\x1a\n", "HDF5 file"),
        (b"%!PS-Adobe", "PostScript file"),
        (b'{"images": []}', "JSON file"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"hello", "no known image format"),
    ],
)
def test_other_formats_are_named(data: bytes, name: str) -> None:
    with pytest.raises(formats.UnsupportedImageError, match=r"^unsupported: .*use TIFF, PNG, JPEG or BMP") as caught:
        formats.decode(data)
    assert name in str(caught.value)


def test_empty_files_and_rare_jpegs(gray: np.ndarray) -> None:
    for data in (b"", bytes(100)):
        with pytest.raises(formats.DamagedImageError, match=r"^damaged: the file"):
            formats.decode(data)
    data = bytearray(encode(gray, ".jpg"))
    frame = data.index(b"\xff\xc0")
    for place, value, reason in ((frame + 4, 12, "12-bit JPEG"), (frame + 1, 0xC3, "lossless")):
        changed = data.copy()
        changed[place] = value
        with pytest.raises(formats.UnsupportedImageError, match=reason):
            formats.decode(bytes(changed))


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    for side in (9000, 60000):
        header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
        data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
        with pytest.raises(formats.UnreadableImageError, match="more than"):
            formats.decode(data)


def test_image_names() -> None:
    assert formats.is_image_name("a/B.TIF")
    assert not formats.is_image_name("a/._B.tif")
    assert not formats.is_image_name("a/B.json")
