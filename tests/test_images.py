"""Image files: depth, colour, and everything that is refused."""

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from raylivecell import images


@pytest.fixture
def gray() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (37, 53), dtype=np.uint8)


def encode(array: np.ndarray, suffix: str) -> bytes:
    ok, data = cv2.imencode(suffix, array)
    assert ok
    return data.tobytes()


@pytest.mark.parametrize("suffix", [".tif", ".png", ".bmp"])
def test_gray_comes_back_as_it_is(gray: np.ndarray, suffix: str) -> None:
    picture = images.decode(encode(gray, suffix))
    assert (picture.colour, picture.deep) == (False, False)
    np.testing.assert_array_equal(picture.pixels, gray)


@pytest.mark.parametrize("suffix", [".tif", ".png"])
def test_sixteen_bits_of_eight_bit_data_come_back_exactly(gray: np.ndarray, suffix: str) -> None:
    gray[0, 0] = 255
    picture = images.decode(encode(gray.astype(np.uint16) * 257, suffix))
    assert picture.deep
    bits = images.used_bits(picture.pixels)
    assert bits == 16
    np.testing.assert_array_equal(images.to_uint8(picture.pixels, bits), gray)


def test_a_twelve_bit_camera_uses_the_whole_range() -> None:
    pixels = np.array([[0, 2048, 4095]], np.uint16)
    bits = images.used_bits(pixels)
    assert bits == 12
    np.testing.assert_array_equal(images.to_uint8(pixels, bits), [[0, 128, 255]])
    np.testing.assert_array_equal(images.to_uint8(np.array([[65535]], np.uint16), 12), [[255]])


@pytest.mark.parametrize("suffix", [".tif", ".png", ".bmp"])
def test_colour_of_equal_channels_is_the_gray(gray: np.ndarray, suffix: str) -> None:
    picture = images.decode(encode(np.dstack([gray] * 3), suffix))
    assert picture.colour
    np.testing.assert_array_equal(picture.pixels, gray)


@pytest.mark.parametrize("suffix", [".tif", ".png"])
def test_sixteen_bit_colour_keeps_its_depth(gray: np.ndarray, suffix: str) -> None:
    deep = gray.astype(np.uint16) * 200 + 13
    picture = images.decode(encode(np.dstack([deep] * 3), suffix))
    assert picture.colour
    assert picture.deep
    np.testing.assert_array_equal(picture.pixels, deep)


def test_palette_and_alpha_are_colour(gray: np.ndarray) -> None:
    for mode in ("P", "LA", "RGBA"):
        sink = io.BytesIO()
        Image.fromarray(gray).convert(mode).save(sink, "PNG")
        picture = images.decode(sink.getvalue())
        assert picture.colour
        np.testing.assert_array_equal(picture.pixels, gray)


def test_every_cut_of_a_png_is_refused(gray: np.ndarray) -> None:
    data = encode(gray, ".png")
    for cut in [0, 1, 8, 20, *range(33, len(data) - 16, 97)]:
        with pytest.raises(images.UnreadableImageError):
            images.decode(data[:cut])


def test_cuts_of_a_tiff_are_refused(gray: np.ndarray) -> None:
    sink = io.BytesIO()
    Image.fromarray(gray).save(sink, "TIFF", compression="tiff_lzw")
    for data in (sink.getvalue(), encode(gray, ".tif")):
        for cut in range(0, len(data) - 300, 61):
            with pytest.raises(images.UnreadableImageError):
                images.decode(data[:cut])


def test_random_bytes_are_refused_and_never_crash(gray: np.ndarray) -> None:
    rng = np.random.default_rng(1)
    for suffix in (".tif", ".png", ".bmp", ".jpg"):
        good = encode(gray, suffix)
        for _ in range(60):
            data = bytearray(good)
            for place in rng.integers(0, min(len(data), 200), 4):
                data[place] = rng.integers(256)
            try:
                pixels = images.decode(bytes(data)).pixels
            except images.UnreadableImageError:
                continue
            assert pixels.ndim == 2


def test_a_stack_and_floats_are_refused_with_the_reason(gray: np.ndarray) -> None:
    sink = io.BytesIO()
    tifffile.imwrite(sink, np.stack([gray] * 4), photometric="minisblack")
    with pytest.raises(images.UnreadableImageError, match="holds 4 pictures"):
        images.decode(sink.getvalue())
    sink = io.BytesIO()
    tifffile.imwrite(sink, gray.astype(np.float32))
    with pytest.raises(images.UnreadableImageError, match="8 or 16 bit gray"):
        images.decode(sink.getvalue())


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    for side in (9000, 60000):
        header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
        data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
        with pytest.raises(images.UnreadableImageError, match="more than"):
            images.decode(data)


def test_image_names() -> None:
    assert images.is_image_name("a/B.TIF")
    assert not images.is_image_name("a/._B.tif")
    assert not images.is_image_name("a/B.json")
