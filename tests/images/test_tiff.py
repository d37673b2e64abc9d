"""TIFF files of every kind: the right pixels, or a refusal that names the kind."""

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


def by_pillow(array: np.ndarray, compression: str, **options: Any) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(array).save(sink, "TIFF", compression=compression, **options)
    return sink.getvalue()


def raw_tiff(width: int, height: int, tags: dict[int, Any], strip: bytes) -> bytes:
    """A TIFF of one strip, with any tags (None: without it)."""
    tags = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 277: 1, 278: height, **tags}
    tags = {code: value for code, value in {279: len(strip), **tags}.items() if value is not None}
    start = 8 + 2 + 12 * (len(tags) + 1) + 4
    words = [struct.pack("<HHII", code, 4, 1, value) for code, value in sorted({**tags, 273: start}.items())]
    return b"II*\0" + struct.pack("<IH", 8, len(words)) + b"".join(words) + bytes(4) + strip


def pixels_of(data: bytes) -> np.ndarray:
    return formats.decode(data).pixels


def refusal(data: bytes) -> str:
    with pytest.raises(formats.UnreadableImageError) as caught:
        formats.decode(data)
    return str(caught.value)


@st.composite
def written(draw: st.DrawFn) -> tuple[bytes, np.ndarray]:
    """A file that tifffile writes, and the picture in it."""
    dtype = draw(st.sampled_from([np.uint8, np.uint16]))
    shape = draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    seed = draw(st.integers(0, 2**16))
    gray = np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)
    kind = draw(st.sampled_from(["minisblack", "miniswhite", "rgb", "planar", "rgba"]))
    options: dict[str, Any] = {"byteorder": draw(st.sampled_from("<>")), "bigtiff": draw(st.booleans())}
    options |= draw(st.sampled_from([{"tile": (16, 32)}, {"rowsperstrip": 3}, {"rowsperstrip": 2**31 - 1}]))
    options["compression"] = draw(st.sampled_from([None, "zlib", "lzma"]))
    options["predictor"] = options["compression"] is not None and draw(st.booleans())
    array = gray if kind[0] == "m" else np.dstack([gray] * 3)
    if kind == "planar":
        array, options["planarconfig"] = np.stack([gray] * 3), "separate"
    if kind == "rgba":
        array, options["extrasamples"] = np.dstack([array, gray[::-1]]), ["unassalpha"]
    data = tiff(array, kind if kind[0] == "m" else "rgb", **options)
    return data, np.iinfo(dtype).max - gray if kind == "miniswhite" else gray


@given(written())
def test_every_layout_gives_the_picture(file: tuple[bytes, np.ndarray]) -> None:
    pixels = pixels_of(file[0])
    assert pixels.dtype == file[1].dtype
    np.testing.assert_array_equal(pixels, file[1])


@pytest.mark.parametrize("compression", ["tiff_lzw", "packbits", "tiff_adobe_deflate", "tiff_deflate", "zstd", "lzma"])
@pytest.mark.parametrize("options", [{}, {"tiffinfo": {317: 2}}, {"tiffinfo": {278: 5}}])
def test_compressions(compression: str, options: dict[str, Any]) -> None:
    if compression == "packbits" and options.get("tiffinfo") == {317: 2}:
        assert "predictor 2" in refusal(by_pillow(GRAY, compression, **options))
        return
    np.testing.assert_array_equal(pixels_of(by_pillow(GRAY, compression, **options)), GRAY)
    np.testing.assert_array_equal(pixels_of(by_pillow(DEEP, compression, **options)), DEEP)
    rgb = np.dstack([GRAY] * 3)
    np.testing.assert_array_equal(pixels_of(by_pillow(rgb, compression, **options)), GRAY)


@pytest.mark.parametrize("compression", [None, "group3", "group4", "tiff_ccitt", "tiff_lzw"])
@pytest.mark.parametrize("photometric", [0, 1])
def test_bilevel(compression: str | None, photometric: int) -> None:
    bits, sink = Image.fromarray(GRAY > 128), io.BytesIO()
    bits.save(sink, "TIFF", compression=compression, tiffinfo={262: photometric})
    expected = np.where(GRAY > 128, 255, 0)
    np.testing.assert_array_equal(pixels_of(sink.getvalue()), expected)


def test_jpeg_strips_follow_the_tags_colour_space() -> None:
    smooth = cv2.GaussianBlur(GRAY, (0, 0), 3)
    colour = np.dstack([smooth, smooth[::-1], smooth[:, ::-1]])
    assert np.abs(pixels_of(by_pillow(smooth, "jpeg", quality=95)).astype(int) - smooth).max() <= 4
    data = by_pillow(colour, "jpeg", quality=95, tiffinfo={278: 16})
    assert np.abs(pixels_of(data).astype(int) - cv2.cvtColor(colour, cv2.COLOR_RGB2GRAY)).max() <= 8
    # Photometric RGB: the three components are red, green and blue, whatever the stream's own header says.
    data = raw_tiff(53, 37, {258: 8, 259: 7, 262: 2, 277: 3}, _without_subsampling(colour))
    assert np.abs(pixels_of(data).astype(int) - cv2.cvtColor(colour, cv2.COLOR_RGB2GRAY)).max() <= 8


def _without_subsampling(components: np.ndarray) -> bytes:
    """A JPEG stream whose components are `components`, with a JFIF header that calls them YCbCr."""
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
    shown = values if photometric else 2**bits - 1 - values
    expected = shown * (255 // (2**bits - 1)) if bits < 8 else shown
    pixels = pixels_of(data)
    assert pixels.dtype == (np.uint8 if bits < 8 else np.uint16)
    np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.uint32, np.int64, np.uint64])
def test_other_integers_where_every_value_fits(dtype: type) -> None:
    values = (GRAY // 2).astype(dtype)
    np.testing.assert_array_equal(pixels_of(tiff(values)), GRAY // 2)
    lowest = values.copy()
    lowest[3, 3] = -1 if np.issubdtype(dtype, np.signedinteger) else 70_000
    assert refusal(tiff(lowest)).startswith("unsupported: values from")


UNSUPPORTED = {
    "float16": (tiff(GRAY.astype(np.float16)), "16-bit floating-point"),
    "float32": (tiff(GRAY.astype(np.float32)), "32-bit floating-point"),
    "complex": (tiff(GRAY.astype(np.complex64)), "complex"),
    "two channels": (tiff(np.dstack([GRAY, GRAY]), extrasamples=["unspecified"]), "2 channels; save one channel"),
    "five channels": (tiff(np.stack([GRAY] * 5), planarconfig="separate"), "5 channels; save one channel"),
    "rgb and infrared": (
        tiff(np.dstack([GRAY] * 4), "rgb", extrasamples=["unspecified"]),
        "4 channels, the last of unknown meaning",
    ),
    "CIELab": (tiff(np.dstack([GRAY] * 3), "cielab"), "CIELab"),
    "YCbCr": (raw_tiff(53, 37, {262: 6, 277: 3}, bytes(6000)), "YCbCr colour without JPEG"),
    "camera raw": (raw_tiff(53, 37, {262: 32803}, GRAY.tobytes()), "raw mosaic"),
    "JPEG 2000": (raw_tiff(53, 37, {259: 34712}, b"x"), "TIFF compression JPEG 2000"),
    "WebP": (raw_tiff(53, 37, {259: 50001}, b"x"), "TIFF compression WebP"),
    "JPEG XL": (raw_tiff(53, 37, {259: 50002}, b"x"), "TIFF compression JPEG XL"),
    "old JPEG": (raw_tiff(53, 37, {259: 6}, b"x"), "old-style JPEG"),
    "12-bit JPEG": (raw_tiff(53, 37, {258: 12, 259: 7}, b"x"), "12-bit JPEG"),
    "compression 4711": (raw_tiff(53, 37, {259: 4711}, b"x"), "number 4711"),
    "predictor 3": (raw_tiff(53, 37, {259: 8, 317: 3}, b"x"), "predictor 3"),
    "24 bits": (raw_tiff(53, 37, {258: 24}, bytes(6000)), "24 bits a sample"),
    "depth": (raw_tiff(53, 37, {32997: 3}, GRAY.tobytes() * 3), "holds 3 planes (ImageDepth)"),
    "LSM": (raw_tiff(53, 37, {34412: 0, 262: 2, 277: 3}, GRAY.tobytes() * 3), "3 channels (LSM)"),
    "pages": (tiff(np.stack([GRAY] * 4)), "holds 4 images"),
    "ImageJ, one directory": (
        tiff(np.stack([GRAY] * 4), imagej=True, truncate=True, metadata={"axes": "TYX"}),
        "holds 4 planes (ImageJ stack)",
    ),
    "ImageJ hyperstack": (
        tiff(np.zeros((2, 3, 2, 9, 9), np.uint8), imagej=True, truncate=True, metadata={"axes": "TZCYX"}),
        "holds 12 planes (ImageJ stack)",
    ),
    "ImageJ, many directories": (tiff(np.stack([GRAY] * 4), imagej=True, metadata={"axes": "TYX"}), "holds 4 images"),
    "tifffile, one directory": (
        tiff(np.stack([GRAY] * 4), truncate=True, metadata={"axes": "TYX"}),
        "holds 4 planes (tifffile stack)",
    ),
    "OME": (tiff(np.stack([GRAY] * 4), ome=True, metadata={"axes": "ZYX"}), "holds 4 images"),
    "palette of labels": (
        tiff(GRAY, "palette", colormap=np.random.default_rng(0).integers(0, 2**16, (3, 256), dtype=np.uint16)),
        "palette that is no ramp",
    ),
    "inverted, signed": (tiff(DEEP.astype(np.int16), "miniswhite"), "MINISWHITE"),
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_unsupported_kinds_are_named(kind: str) -> None:
    data, reason = UNSUPPORTED[kind]
    message = refusal(data)
    assert message.startswith("unsupported: ")
    assert reason in message


DAMAGED = {
    "no size": raw_tiff(53, 37, {256: None}, GRAY.tobytes()),
    "no photometric": raw_tiff(53, 37, {262: None}, GRAY.tobytes()),
    "short strip": raw_tiff(53, 37, {279: 100}, GRAY.tobytes()),
    "strip beyond the end": raw_tiff(53, 37, {}, GRAY.tobytes())[:-1],
    "strips that are missing": raw_tiff(53, 37, {278: 5}, GRAY.tobytes()),
    "compressed without sizes": raw_tiff(53, 37, {259: 5, 279: None}, GRAY.tobytes()),
    "tile of no width": raw_tiff(53, 37, {322: 0, 323: 16, 324: 9, 325: 9}, GRAY.tobytes()),
    "planar configuration 3": raw_tiff(53, 37, {284: 3}, GRAY.tobytes()),
    "lzw that is none": raw_tiff(53, 37, {259: 5}, GRAY.tobytes()),
    "deflate that is none": raw_tiff(53, 37, {259: 8}, GRAY.tobytes()),
    "jpeg that is none": raw_tiff(53, 37, {259: 7}, GRAY.tobytes()),
    "no directory": b"II*\0" + bytes(40),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_files_are_called_so(kind: str) -> None:
    assert refusal(DAMAGED[kind]).startswith("damaged: ")


@pytest.mark.parametrize("tags", [{278: None}, {278: 2**32 - 1}, {278: 0}, {279: None}, {279: 0}, {274: 0}, {274: 1}])
def test_absent_and_zero_tags(tags: dict[int, int | None]) -> None:
    np.testing.assert_array_equal(pixels_of(raw_tiff(53, 37, tags, GRAY.tobytes())), GRAY)


def test_an_extra_sample_that_is_constant_holds_nothing() -> None:
    rgbx = np.dstack([GRAY, GRAY, GRAY, np.full_like(GRAY, 255)])
    np.testing.assert_array_equal(pixels_of(tiff(rgbx, "rgb", extrasamples=["unspecified"])), GRAY)


def test_sixteen_bit_channels_and_cmyk_keep_luma() -> None:
    colour = np.dstack([DEEP, DEEP[::-1], DEEP[:, ::-1]])
    np.testing.assert_array_equal(pixels_of(tiff(colour, "rgb")), cv2.cvtColor(colour, cv2.COLOR_RGB2GRAY))
    sink = io.BytesIO()
    Image.fromarray(GRAY).convert("CMYK").save(sink, "TIFF")
    np.testing.assert_array_equal(pixels_of(sink.getvalue()), GRAY)


def test_reduced_copies_and_masks_are_no_planes() -> None:
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
            assert message in refusal(sink.getvalue())
        else:
            np.testing.assert_array_equal(pixels_of(sink.getvalue()), GRAY)


@pytest.mark.parametrize(
    ("files", "planes", "refused"), [((), 1, False), ((), 6, True), (("a", "a"), 6, True), (("a", "b"), 6, False)]
)
def test_ome_metadata_of_one_directory(files: tuple[str, ...], planes: int, refused: bool) -> None:
    """Planes in other files are read there; planes that are nowhere make the file incomplete."""
    parts = "".join(f'<TiffData IFD="0"><UUID FileName="{name}.ome.tif">urn:x</UUID></TiffData>' for name in files)
    text = (
        f'<?xml version="1.0"?><OME xmlns="http://x"><Image ID="Image:0"><Pixels SizeC="1" SizeT="{planes}" SizeX="53" '
    )
    data = tiff(GRAY, description=text + f'SizeY="37" SizeZ="1">{parts}</Pixels></Image></OME>')
    if refused:
        assert f"holds {planes} planes (OME-TIFF)" in refusal(data)
    else:
        np.testing.assert_array_equal(pixels_of(data), GRAY)


def test_descriptions_that_are_no_stacks() -> None:
    for text in (
        "",
        "ImageJ=1.54f\nimages=1\n",
        json.dumps({"shape": [100, 100]}),
        '{"shape": [3',
        "images=5",
        "<OME/>",
    ):
        np.testing.assert_array_equal(pixels_of(tiff(GRAY, description=text or None)), GRAY)


SOUND = {
    "bytes first": by_pillow(GRAY, "tiff_lzw", tiffinfo={278: 7}),
    "directory first": tiff(GRAY, rowsperstrip=7),
    "tiles": tiff(DEEP, tile=(16, 16), compression="zlib", predictor=True),
    "packbits": by_pillow(GRAY, "packbits"),
    "group 4": by_pillow(GRAY > 128, "group4"),
    "jpeg": by_pillow(GRAY, "jpeg"),
    "zstd": by_pillow(GRAY, "zstd"),
    "lzma": by_pillow(GRAY, "lzma"),
    "planar big-endian BigTIFF": tiff(
        np.stack([GRAY] * 3), "rgb", planarconfig="separate", bigtiff=True, byteorder=">"
    ),
    "palette": tiff(GRAY, "palette", colormap=np.stack([np.arange(256, dtype=np.uint16) * 257] * 3)),
    "ImageJ": tiff(GRAY, imagej=True, metadata={"Info": "x" * 300}),
}


@pytest.mark.parametrize("kind", SOUND)
def test_a_cut_file_is_refused_or_gives_the_same_pixels(kind: str) -> None:
    data = SOUND[kind]
    expected = pixels_of(data)
    for cut in range(0, len(data), 1 if len(data) < 3000 else 7):
        try:
            pixels = formats.decode(data[:cut]).pixels
        except formats.UnreadableImageError:
            continue
        np.testing.assert_array_equal(pixels, expected)


def test_cut_stacks_never_give_one_plane() -> None:
    stack = np.stack([GRAY] * 3)
    for options in ({"imagej": True, "truncate": True}, {"imagej": True}, {"truncate": True}):
        data = tiff(stack, metadata={"axes": "TYX"}, **options)
        for cut in range(0, len(data), 37):
            refusal(data[:cut])


@given(st.sampled_from(sorted(SOUND)), st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=6))
def test_damaged_bytes_never_crash(kind: str, changes: list[tuple[int, int]]) -> None:
    data = bytearray(SOUND[kind])
    for place, value in changes:
        data[place % len(data)] = value
    try:
        pixels = formats.decode(bytes(data)).pixels
    except formats.UnreadableImageError:
        return
    assert pixels.ndim == 2
    assert pixels.dtype in (np.uint8, np.uint16)
