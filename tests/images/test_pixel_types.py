"""Signed, wide and floating-point pixels: the same values for files and arrays, or an error that gives the reason."""

import io
import struct
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from raylivecell.core.errors import UnsupportedImageError
from raylivecell.images import formats, pixel_types

RNG = np.random.default_rng(0)
SHAPE = (37, 53)


def tiff(array: np.ndarray, **options: Any) -> bytes:
    sink = io.BytesIO()
    tifffile.imwrite(sink, array, **{"photometric": "minisblack", "metadata": None, **options})
    return sink.getvalue()


@st.composite
def whole_numbers(draw: st.DrawFn) -> np.ndarray:
    """Whole numbers from 0 to 65535 (or the largest exact one) of any type that can contain them."""
    dtype = np.dtype(draw(st.sampled_from(["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8"])))
    largest = 2048 if dtype == np.float16 else min(65535, 65535 if dtype.kind == "f" else np.iinfo(dtype).max)
    top = draw(st.integers(2, largest))
    return np.random.default_rng(draw(st.integers(0, 99))).integers(0, top + 1, SHAPE).astype(dtype)


@given(whole_numbers(), st.sampled_from("<>"))
def test_whole_numbers_are_unchanged_in_files_and_arrays(values: np.ndarray, order: str) -> None:
    if values.max() < 2:
        return
    unsigned = pixel_types.to_unsigned(values.astype(values.dtype.newbyteorder(order)))
    assert unsigned.dtype == (np.uint8 if values.dtype.itemsize == 1 else np.uint16)
    np.testing.assert_array_equal(unsigned, values)
    decoded = formats.decode(tiff(values, byteorder=order)).pixels
    assert decoded.dtype == unsigned.dtype
    np.testing.assert_array_equal(decoded, unsigned)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("layout", [{}, {"tile": (16, 32)}, {"rowsperstrip": 5}])
def test_fractions_in_every_layout(dtype: str, order: str, layout: dict[str, Any]) -> None:
    fractions = RNG.random(SHAPE).astype(dtype)
    deep = (RNG.random(SHAPE) * 2000).astype(dtype)
    for values, factor in ((fractions, 65535), (deep, 1), (fractions * 0, 1)):
        expected = np.rint(values.astype(np.float64) * factor).astype(int)
        for compression in ({}, {"compression": "zlib"}, {"compression": "zlib", "predictor": 3}):
            pixels = formats.decode(tiff(values, byteorder=order, **layout, **compression)).pixels
            assert pixels.dtype == np.uint16
            assert np.abs(pixels - expected).max() <= (dtype != "f8")  # products are rounded to float32
            np.testing.assert_array_equal(pixels, pixel_types.to_unsigned(values))


def test_predictor_3_of_colour_and_predictor_2_of_floats() -> None:
    rgb = np.dstack([RNG.random(SHAPE).astype(np.float32)] * 3)
    data = tiff(rgb, photometric="rgb", compression="zlib", predictor=3)
    np.testing.assert_array_equal(formats.decode(data).pixels, pixel_types.to_unsigned(rgb[..., 0]))
    values = (RNG.random(SHAPE) * 1000).astype(np.float32)
    differences = np.diff(values.view(np.uint32), axis=1, prepend=np.uint32(0))
    # tifffile does not write predictor 2 for floats, libtiff does: the differences of their bits, as integers.
    data = tiff(differences.view(np.int32), compression="zlib", extratags=[(65000, 3, 1, 2, True)])
    signed, floats = (struct.pack("<HHIHH", 339, 3, 1, value, 0) for value in (2, 3))
    assert signed in data
    data = data.replace(signed, floats).replace(struct.pack("<HHI", 65000, 3, 1), struct.pack("<HHI", 317, 3, 1))
    np.testing.assert_array_equal(formats.decode(data).pixels, np.rint(values))


REFUSED = {
    "NaN": (np.array([[0.5, np.nan]]), "NaN or infinite"),
    "infinite": (np.array([[0.5, np.inf]], np.float32), "NaN or infinite"),
    "negative": (np.array([[-0.1, 0.5]]), "values from -0.1 to 0.5"),
    "over 16 bits": (np.array([[0, 70_000]]), "values from 0 to 70000"),
    "just over 1": (np.array([[0.2, 1.1]]), "fractions from 0.2 to 1.1, of unknown scale"),
    "filtered 8 bit": (np.array([[0.2, 254.9]]), "of unknown scale"),
    "mask": (np.array([[0.0, 1.0]]), "0 and 1 only"),
    "boolean": (np.array([[True, False]]), "bool pixels"),
    "complex": (np.array([[1j]]), "complex128 pixels"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_values_are_refused(kind: str) -> None:
    values, reason = REFUSED[kind]
    with pytest.raises(UnsupportedImageError, match=r"^unsupported: .*(convert all images of the series)") as error:
        pixel_types.to_unsigned(values)
    assert reason in str(error.value)
    if values.dtype.kind in "if":
        with pytest.raises(UnsupportedImageError) as file_error:
            formats.decode(tiff(values))
        assert str(file_error.value) == str(error.value)


@pytest.mark.parametrize("layout", [{}, {"tile": (16, 32)}, {"rowsperstrip": 5}])
def test_jpeg_2000_and_webp_strips_and_tiles(layout: dict[str, Any]) -> None:
    grey = RNG.integers(0, 256, SHAPE, np.uint8)
    deep = RNG.integers(0, 65536, SHAPE, np.uint16)
    for values, kind, compression in (
        (grey, "JPEG2000", 34712),
        (deep, "JPEG2000", 34712),
        (np.dstack([grey] * 3), "JPEG2000", 33005),
        (np.dstack([grey] * 3), "WEBP", 50001),
    ):
        data = picture_tiff(values, kind, compression, **layout)
        np.testing.assert_array_equal(formats.decode(data).pixels, values if values.ndim == 2 else grey)
        for cut in (0, 30, 60):
            with pytest.raises(formats.UnreadableImageError):
                formats.decode(picture_tiff(values, kind, compression, cut, **layout))


def picture_tiff(values: np.ndarray, kind: str, compression: int, cut: int | None = None, **layout: Any) -> bytes:
    """Build a TIFF whose strips or tiles are lossless pictures encoded by Pillow, optionally cut after `cut` bytes."""
    rows, columns = layout.get("tile", (layout.get("rowsperstrip", SHAPE[0]), SHAPE[1]))
    segments = []
    for y in range(0, SHAPE[0], rows):
        for x in range(0, SHAPE[1], columns):
            part = values[y : y + rows, x : x + columns]
            if "tile" in layout:
                margin = [(0, rows - part.shape[0]), (0, columns - part.shape[1]), (0, 0)]
                part = np.pad(part, margin[: part.ndim])
            sink = io.BytesIO()
            options = {"lossless": True, "exact": True} if kind == "WEBP" else {"no_jp2": True}
            Image.fromarray(np.ascontiguousarray(part)).save(sink, kind, **options)
            segments.append(sink.getvalue()[:cut])
    sink = io.BytesIO()
    with tifffile.TiffWriter(sink) as file:
        file.write(
            iter(segments),
            shape=values.shape,
            dtype=values.dtype,
            photometric="minisblack" if values.ndim == 2 else "rgb",
            compression="jpeg2000" if kind == "JPEG2000" else "webp",
            metadata=None,
            **layout,
        )
    return sink.getvalue().replace(
        struct.pack("<HHIHH", 259, 3, 1, 34712, 0), struct.pack("<HHIHH", 259, 3, 1, compression, 0)
    )


def test_jpeg_2000_of_another_depth_is_refused() -> None:
    data = bytearray(picture_tiff(RNG.integers(0, 65536, SHAPE, np.uint16), "JPEG2000", 34712))
    depth = data.index(b"\xff\x4f\xff\x51") + 42
    for value in (11, 0x8F):  # 12 bits, which Pillow would scale to 16; 16 bits with sign
        data[depth] = value
        with pytest.raises(UnsupportedImageError, match="JPEG 2000 samples of a depth other than 16 bits"):
            formats.decode(bytes(data))
