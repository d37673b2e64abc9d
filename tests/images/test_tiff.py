"""Decoding of TIFF files: correct pixels, or an error that names the unsupported feature."""

import io
import json
import struct
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from raylivecell.images import formats

GRAY = np.random.default_rng(0).integers(0, 256, (37, 53), dtype=np.uint8)
DEEP = np.random.default_rng(1).integers(0, 2**16, (37, 53), dtype=np.uint16)


def tiff(array: np.ndarray, photometric: str = "minisblack", **options: Any) -> bytes:
    sink = io.BytesIO()
    tifffile.imwrite(sink, array, photometric=photometric, **{"metadata": None, **options})
    return sink.getvalue()


def pillow_tiff(array: np.ndarray, compression: str, **options: Any) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(array).save(sink, "TIFF", compression=compression, **options)
    return sink.getvalue()


def raw_tiff(width: int, height: int, tags: dict[int, Any], strip: bytes) -> bytes:
    """Build a TIFF of one strip with any tags (None removes one)."""
    tags = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 277: 1, 278: height, **tags}
    tags = {code: value for code, value in {279: len(strip), **tags}.items() if value is not None}
    start = 8 + 2 + 12 * (len(tags) + 1) + 4
    entries = [struct.pack("<HHII", code, 4, 1, value) for code, value in sorted({**tags, 273: start}.items())]
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + bytes(4) + strip


def pixels_of(data: bytes) -> np.ndarray:
    return formats.decode(data).pixels


def error_message(data: bytes) -> str:
    with pytest.raises(formats.UnreadableImageError) as error:
        formats.decode(data)
    return str(error.value)


@st.composite
def tifffile_images(draw: st.DrawFn) -> tuple[bytes, np.ndarray]:
    """A file written by tifffile with random options, and its pixels."""
    dtype = draw(st.sampled_from([np.uint8, np.uint16]))
    shape = draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    seed = draw(st.integers(0, 2**16))
    grey = np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)
    kind = draw(st.sampled_from(["minisblack", "miniswhite", "rgb", "planar", "rgba"]))
    options: dict[str, Any] = {"byteorder": draw(st.sampled_from("<>")), "bigtiff": draw(st.booleans())}
    options |= draw(st.sampled_from([{"tile": (16, 32)}, {"rowsperstrip": 3}, {"rowsperstrip": 2**31 - 1}]))
    options["compression"] = draw(st.sampled_from([None, "zlib", "lzma"]))
    options["predictor"] = options["compression"] is not None and draw(st.booleans())
    array = grey if kind[0] == "m" else np.dstack([grey] * 3)
    if kind == "planar":
        array, options["planarconfig"] = np.stack([grey] * 3), "separate"
    if kind == "rgba":
        array, options["extrasamples"] = np.dstack([array, grey[::-1]]), ["unassalpha"]
    data = tiff(array, kind if kind[0] == "m" else "rgb", **options)
    return data, np.iinfo(dtype).max - grey if kind == "miniswhite" else grey


@given(tifffile_images())
def test_layouts(file: tuple[bytes, np.ndarray]) -> None:
    pixels = pixels_of(file[0])
    assert pixels.dtype == file[1].dtype
    np.testing.assert_array_equal(pixels, file[1])


@pytest.mark.parametrize("compression", ["tiff_lzw", "packbits", "tiff_adobe_deflate", "tiff_deflate", "zstd", "lzma"])
@pytest.mark.parametrize("options", [{}, {"tiffinfo": {317: 2}}, {"tiffinfo": {278: 5}}])
def test_compressions(compression: str, options: dict[str, Any]) -> None:
    if compression == "packbits" and options.get("tiffinfo") == {317: 2}:
        assert "predictor 2" in error_message(pillow_tiff(GRAY, compression, **options))
        return
    np.testing.assert_array_equal(pixels_of(pillow_tiff(GRAY, compression, **options)), GRAY)
    np.testing.assert_array_equal(pixels_of(pillow_tiff(DEEP, compression, **options)), DEEP)
    rgb = np.dstack([GRAY] * 3)
    np.testing.assert_array_equal(pixels_of(pillow_tiff(rgb, compression, **options)), GRAY)


@pytest.mark.parametrize("compression", [None, "group3", "group4", "tiff_ccitt", "tiff_lzw"])
@pytest.mark.parametrize("photometric", [0, 1])
def test_bilevel(compression: str | None, photometric: int) -> None:
    bits, sink = Image.fromarray(GRAY > 128), io.BytesIO()
    bits.save(sink, "TIFF", compression=compression, tiffinfo={262: photometric})
    expected = np.where(GRAY > 128, 255, 0)
    np.testing.assert_array_equal(pixels_of(sink.getvalue()), expected)


def test_jpeg_strips_have_the_colour_space_of_the_tags() -> None:
    smooth = cv2.GaussianBlur(GRAY, (0, 0), 3)
    colour = np.dstack([smooth, smooth[::-1], smooth[:, ::-1]])
    assert np.abs(pixels_of(pillow_tiff(smooth, "jpeg", quality=95)).astype(int) - smooth).max() <= 4
    data = pillow_tiff(colour, "jpeg", quality=95, tiffinfo={278: 16})
    assert np.abs(pixels_of(data).astype(int) - cv2.cvtColor(colour, cv2.COLOR_RGB2GRAY)).max() <= 8
    # Photometric RGB: the components are red, green and blue, even if the JPEG header says otherwise.
    data = raw_tiff(53, 37, {258: 8, 259: 7, 262: 2, 277: 3}, _without_subsampling(colour))
    assert np.abs(pixels_of(data).astype(int) - cv2.cvtColor(colour, cv2.COLOR_RGB2GRAY)).max() <= 8


def _without_subsampling(components: np.ndarray) -> bytes:
    """Build a JPEG stream of `components`, with a JFIF header that declares them as YCbCr."""
    sink = io.BytesIO()
    image = Image.merge("YCbCr", [Image.fromarray(np.ascontiguousarray(components[..., i])) for i in range(3)])
    image.save(sink, "JPEG", quality=95, subsampling=0)
    return sink.getvalue()


@pytest.mark.parametrize("bits", [1, 2, 4, 9, 10, 12, 14, 15])
@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("reverse", [False, True])
def test_packed_bits(bits: int, photometric: int, reverse: bool) -> None:
    values = np.random.default_rng(bits).integers(0, 2**bits, (7, 13))
    stream = (values[..., None] >> np.arange(bits)[::-1]) & 1
    packed = np.packbits(stream.reshape(7, -1).astype(np.uint8), axis=1)
    if reverse:
        packed = np.packbits(np.unpackbits(packed).reshape(-1, 8)[:, ::-1])
    data = raw_tiff(13, 7, {258: bits, 262: photometric, 266: 2 if reverse else 1}, packed.tobytes())
    displayed = values if photometric else 2**bits - 1 - values
    expected = displayed * (255 // (2**bits - 1)) if bits < 8 else displayed
    pixels = pixels_of(data)
    assert pixels.dtype == (np.uint8 if bits < 8 else np.uint16)
    np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.uint32, np.int64, np.uint64])
def test_other_integer_types_if_every_value_fits(dtype: type) -> None:
    values = (GRAY // 2).astype(dtype)
    np.testing.assert_array_equal(pixels_of(tiff(values)), GRAY // 2)
    out_of_range = values.copy()
    out_of_range[3, 3] = -1 if np.issubdtype(dtype, np.signedinteger) else 70_000
    assert error_message(tiff(out_of_range)).startswith("unsupported: values from")


UNSUPPORTED = {
    "float24": (raw_tiff(53, 37, {258: 24, 339: 3}, bytes(6000)), "24 bits per sample"),
    "inverted floats": (tiff(GRAY.astype(np.float32), "miniswhite"), "MINISWHITE"),
    "complex": (tiff(GRAY.astype(np.complex64)), "complex"),
    "two channels": (
        tiff(np.dstack([GRAY, GRAY]), extrasamples=["unspecified"]),
        "2 channels; choose one with --channel 0 to 1",
    ),
    "five channels": (
        tiff(np.stack([GRAY] * 5), planarconfig="separate"),
        "5 channels; choose one with --channel 0 to 4",
    ),
    "rgb and infrared": (
        tiff(np.dstack([GRAY] * 4), "rgb", extrasamples=["unspecified"]),
        "4 channels, the last of unknown meaning",
    ),
    "CIELab": (tiff(np.dstack([GRAY] * 3), "cielab"), "CIELab"),
    "YCbCr": (raw_tiff(53, 37, {262: 6, 277: 3}, bytes(6000)), "YCbCr colour without JPEG"),
    "camera raw": (raw_tiff(53, 37, {262: 32803}, GRAY.tobytes()), "raw mosaic"),
    "JPEG 2000 of YCbCr": (raw_tiff(53, 37, {259: 33003}, b"x"), "TIFF compression JPEG 2000 of YCbCr"),
    "12-bit JPEG 2000": (raw_tiff(53, 37, {258: 12, 259: 34712}, b"x"), "12-bit JPEG 2000"),
    "16-bit WebP": (raw_tiff(53, 37, {258: 16, 259: 50001}, b"x"), "16-bit JPEG or WebP"),
    "LERC": (raw_tiff(53, 37, {259: 34887}, b"x"), "TIFF compression LERC"),
    "JPEG XL": (raw_tiff(53, 37, {259: 50002}, b"x"), "TIFF compression JPEG XL"),
    "old JPEG": (raw_tiff(53, 37, {259: 6}, b"x"), "old-style JPEG"),
    "12-bit JPEG": (raw_tiff(53, 37, {258: 12, 259: 7}, b"x"), "12-bit JPEG"),
    "compression 4711": (raw_tiff(53, 37, {259: 4711}, b"x"), "number 4711"),
    "predictor 3": (raw_tiff(53, 37, {259: 8, 317: 3}, b"x"), "predictor 3"),
    "24 bits": (raw_tiff(53, 37, {258: 24}, bytes(6000)), "24 bits per sample"),
    "depth": (raw_tiff(53, 37, {32997: 3}, GRAY.tobytes() * 3), "contains 3 planes (ImageDepth)"),
    "LSM": (raw_tiff(53, 37, {34412: 0, 262: 2, 277: 3}, GRAY.tobytes() * 3), "3 channels (LSM)"),
    "pages": (tiff(np.stack([GRAY] * 4)), "contains 4 images"),
    "ImageJ, one directory": (
        tiff(np.stack([GRAY] * 4), imagej=True, truncate=True, metadata={"axes": "TYX"}),
        "contains 4 images (t0 to t3); choose one with --plane, such as t0",
    ),
    "ImageJ hyperstack": (
        tiff(np.zeros((2, 3, 2, 9, 9), np.uint8), imagej=True, truncate=True, metadata={"axes": "TZCYX"}),
        "contains 12 images (t0 to t1, z0 to z2, c0 to c1) of 2 channels; choose one with --channel 0 to 1",
    ),
    "ImageJ, many directories": (
        tiff(np.stack([GRAY] * 4), imagej=True, metadata={"axes": "TYX"}),
        "contains 4 images",
    ),
    "tifffile, one directory": (
        tiff(np.stack([GRAY] * 4), truncate=True, metadata={"axes": "TYX"}),
        "contains 4 images (t0 to t3)",
    ),
    "OME": (tiff(np.stack([GRAY] * 4), ome=True, metadata={"axes": "ZYX"}), "contains 4 images"),
    "palette of labels": (
        tiff(GRAY, "palette", colormap=np.random.default_rng(0).integers(0, 2**16, (3, 256), dtype=np.uint16)),
        "palette that is not a ramp",
    ),
    "inverted, signed": (tiff(DEEP.astype(np.int16), "miniswhite"), "MINISWHITE"),
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_unsupported_features_are_reported(kind: str) -> None:
    data, reason = UNSUPPORTED[kind]
    message = error_message(data)
    assert message.startswith("unsupported: ")
    assert reason in message


DAMAGED = {
    "no size": raw_tiff(53, 37, {256: None}, GRAY.tobytes()),
    "no photometric": raw_tiff(53, 37, {262: None}, GRAY.tobytes()),
    "short strip": raw_tiff(53, 37, {279: 100}, GRAY.tobytes()),
    "strip beyond the end": raw_tiff(53, 37, {}, GRAY.tobytes())[:-1],
    "missing strips": raw_tiff(53, 37, {278: 5}, GRAY.tobytes()),
    "compressed without sizes": raw_tiff(53, 37, {259: 5, 279: None}, GRAY.tobytes()),
    "tile of width 0": raw_tiff(53, 37, {322: 0, 323: 16, 324: 9, 325: 9}, GRAY.tobytes()),
    "planar configuration 3": raw_tiff(53, 37, {284: 3}, GRAY.tobytes()),
    "invalid lzw": raw_tiff(53, 37, {259: 5}, GRAY.tobytes()),
    "invalid deflate": raw_tiff(53, 37, {259: 8}, GRAY.tobytes()),
    "invalid jpeg": raw_tiff(53, 37, {259: 7}, GRAY.tobytes()),
    "no directory": b"II*\0" + bytes(40),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_files_are_reported_as_damaged(kind: str) -> None:
    assert error_message(DAMAGED[kind]).startswith("damaged: ")


@pytest.mark.parametrize("tags", [{278: None}, {278: 2**32 - 1}, {278: 0}, {279: None}, {279: 0}, {274: 0}, {274: 1}])
def test_absent_and_zero_tags(tags: dict[int, int | None]) -> None:
    np.testing.assert_array_equal(pixels_of(raw_tiff(53, 37, tags, GRAY.tobytes())), GRAY)


def test_constant_extra_sample_is_ignored() -> None:
    rgbx = np.dstack([GRAY, GRAY, GRAY, np.full_like(GRAY, 255)])
    np.testing.assert_array_equal(pixels_of(tiff(rgbx, "rgb", extrasamples=["unspecified"])), GRAY)


def test_sixteen_bit_colour_and_cmyk_become_luma() -> None:
    colour = np.dstack([DEEP, DEEP[::-1], DEEP[:, ::-1]])
    np.testing.assert_array_equal(pixels_of(tiff(colour, "rgb")), cv2.cvtColor(colour, cv2.COLOR_RGB2GRAY))
    sink = io.BytesIO()
    Image.fromarray(GRAY).convert("CMYK").save(sink, "TIFF")
    np.testing.assert_array_equal(pixels_of(sink.getvalue()), GRAY)


def test_reduced_copies_and_masks_are_ignored() -> None:
    for subfiletype, copy in ((1, GRAY[::4, ::4]), (4, GRAY > 0), (5, GRAY[::4, ::4] > 0)):
        sink = io.BytesIO()
        with tifffile.TiffWriter(sink) as file:
            file.write(copy, photometric="minisblack", subfiletype=subfiletype, metadata=None)
            file.write(GRAY, photometric="minisblack", metadata=None)
        np.testing.assert_array_equal(pixels_of(sink.getvalue()), GRAY)


def test_sub_directories() -> None:
    for levels, message in ((GRAY[::2, ::2], ""), (GRAY, "SubIFD")):
        sink = io.BytesIO()
        with tifffile.TiffWriter(sink) as file:
            file.write(GRAY, subifds=1, photometric="minisblack", metadata=None)
            file.write(levels, photometric="minisblack", metadata=None)
        if message:
            assert message in error_message(sink.getvalue())
        else:
            np.testing.assert_array_equal(pixels_of(sink.getvalue()), GRAY)


@pytest.mark.parametrize(
    ("files", "planes", "refused"),
    [
        ((), 1, ""),
        ((), 6, "contains 1 of the 6 planes in its OME-XML metadata"),
        (("a", "a"), 6, "describes a directory twice"),
        (("a", "b"), 6, ""),
    ],
)
def test_ome_metadata_of_one_directory(files: tuple[str, ...], planes: int, refused: str) -> None:
    """Planes stored in other files are accepted; planes that no file contains are refused."""
    parts = "".join(f'<TiffData IFD="0"><UUID FileName="{name}.ome.tif">urn:x</UUID></TiffData>' for name in files)
    text = (
        f'<?xml version="1.0"?><OME xmlns="http://x"><Image ID="Image:0"><Pixels SizeC="1" SizeT="{planes}" SizeX="53" '
    )
    data = tiff(GRAY, description=text + f'SizeY="37" SizeZ="1">{parts}</Pixels></Image></OME>')
    if refused:
        assert refused in error_message(data)
    else:
        np.testing.assert_array_equal(pixels_of(data), GRAY)


def test_descriptions_without_a_stack() -> None:
    for text in (
        "",
        "ImageJ=1.54f\nimages=1\n",
        json.dumps({"shape": [100, 100]}),
        '{"shape": [3',
        "images=5",
        "<OME/>",
    ):
        np.testing.assert_array_equal(pixels_of(tiff(GRAY, description=text or None)), GRAY)


VALID_FILES = {
    "bytes first": pillow_tiff(GRAY, "tiff_lzw", tiffinfo={278: 7}),
    "directory first": tiff(GRAY, rowsperstrip=7),
    "tiles": tiff(DEEP, tile=(16, 16), compression="zlib", predictor=True),
    "packbits": pillow_tiff(GRAY, "packbits"),
    "group 4": pillow_tiff(GRAY > 128, "group4"),
    "jpeg": pillow_tiff(GRAY, "jpeg"),
    "zstd": pillow_tiff(GRAY, "zstd"),
    "lzma": pillow_tiff(GRAY, "lzma"),
    "planar big-endian BigTIFF": tiff(
        np.stack([GRAY] * 3), "rgb", planarconfig="separate", bigtiff=True, byteorder=">"
    ),
    "palette": tiff(GRAY, "palette", colormap=np.stack([np.arange(256, dtype=np.uint16) * 257] * 3)),
    "ImageJ": tiff(GRAY, imagej=True, metadata={"Info": "x" * 300}),
}


@pytest.mark.parametrize("kind", VALID_FILES)
def test_truncated_file_is_refused_or_has_the_same_pixels(kind: str) -> None:
    data = VALID_FILES[kind]
    expected = pixels_of(data)
    for cut in range(0, len(data), 1 if len(data) < 3000 else 7):
        try:
            pixels = formats.decode(data[:cut]).pixels
        except formats.UnreadableImageError:
            continue
        np.testing.assert_array_equal(pixels, expected)


def test_truncated_stacks_are_refused() -> None:
    stack = np.stack([GRAY] * 3)
    for options in ({"imagej": True, "truncate": True}, {"imagej": True}, {"truncate": True}):
        data = tiff(stack, metadata={"axes": "TYX"}, **options)
        for cut in range(0, len(data), 37):
            error_message(data[:cut])


@given(
    st.sampled_from(sorted(VALID_FILES)), st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=6)
)
def test_changed_bytes_do_not_crash(kind: str, changes: list[tuple[int, int]]) -> None:
    data = bytearray(VALID_FILES[kind])
    for position, value in changes:
        data[position % len(data)] = value
    try:
        pixels = formats.decode(bytes(data)).pixels
    except formats.UnreadableImageError:
        return
    assert pixels.ndim == 2
    assert pixels.dtype in (np.uint8, np.uint16)
