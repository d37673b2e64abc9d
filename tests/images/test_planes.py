"""Files with several planes: every plane by its name with its own pixels, or an error; never the first plane alone."""

import io
import itertools
import json
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st

from raylivecell.images import formats, planes
from raylivecell.images.planes import Choice
from raylivecell.images.ranges import RangeReader

SHAPE = (12, 9)


def stack(*sizes: int, dtype: type = np.uint16) -> np.ndarray:
    """Random planes (*sizes, 12, 9)."""
    return np.random.default_rng(len(sizes)).integers(0, 256, (*sizes, *SHAPE)).astype(dtype)


def tiff(array: np.ndarray, **options: Any) -> bytes:
    sink = io.BytesIO()
    tifffile.imwrite(sink, array, **{"photometric": "minisblack", **options})
    return sink.getvalue()


def every_plane(data: bytes, channel: int | None = None) -> dict[str, np.ndarray]:
    """Decode each plane by its name, from bytes and by reading ranges, with equal results."""
    image = formats.ImageFile(data)
    names = [image.names[number] for number in image.select(Choice(channel=channel))]
    ranges = formats.ImageFile(RangeReader(io.BytesIO(data)))
    pixels = {name: image.decode(Choice(name or None, channel)).pixels for name in names}
    for number, name in enumerate(names):
        np.testing.assert_array_equal(ranges.decode(Choice(name or None, channel)).pixels, pixels[name])
        np.testing.assert_array_equal(formats.decode(data, choice=Choice(str(number), channel)).pixels, pixels[name])
    return pixels


def error_message(data: bytes, choice: Choice = planes.EVERYTHING) -> str:
    with pytest.raises(formats.UnreadableImageError) as error:
        formats.decode(data, choice=choice)
    return str(error.value)


def expected_planes(array: np.ndarray, axes: str) -> dict[str, np.ndarray]:
    """Name the planes of an array with `axes`, e.g. tzc, slowest first."""
    sizes = dict(zip(axes, array.shape))
    order = [axis for axis in planes.AXES if sizes.get(axis, 1) > 1]
    return {
        "_".join(f"{a}{index[axes.index(a)]:0{len(str(sizes[a] - 1))}d}" for a in order): array[index]
        for index in itertools.product(*(range(sizes[axis]) for axis in axes))
    }


def check(data: bytes, array: np.ndarray, axes: str) -> None:
    """Check that every plane has its own pixels, one channel at a time."""
    expected = expected_planes(array, axes)
    channels = array.shape[axes.index("c")] if "c" in axes else 1
    if channels == 1:
        actual = every_plane(data)
    else:
        assert f"of {channels} channels; choose one with --channel" in error_message(data)
        actual = {name: pixels for c in range(channels) for name, pixels in every_plane(data, c).items()}
    assert sorted(actual) == sorted(expected)
    for name, pixels in actual.items():
        np.testing.assert_array_equal(pixels, expected[name], err_msg=name)


@pytest.mark.parametrize("truncate", [False, True])
@pytest.mark.parametrize("sizes", [(3, 1, 1), (1, 4, 1), (2, 3, 1), (11, 1, 2), (2, 3, 2)])
def test_imagej_stacks(sizes: tuple[int, ...], truncate: bool) -> None:
    array = stack(*sizes)
    check(tiff(array, imagej=True, truncate=truncate, metadata={"axes": "TZCYX"}), array, "tzc")


@given(st.permutations("tzc"), st.tuples(*[st.integers(1, 3)] * 3), st.sampled_from("<>"), st.booleans())
def test_ome_tiff_in_any_dimension_order(axes: list[str], sizes: tuple[int, ...], order: str, big: bool) -> None:
    array = stack(*sizes)
    data = tiff(array, ome=True, byteorder=order, bigtiff=big, metadata={"axes": "".join(axes).upper() + "YX"})
    check(data, array, "".join(axes))


@pytest.mark.parametrize("options", [{}, {"truncate": True}, {"compression": "zlib"}])
def test_tifffile_stacks(options: dict[str, Any]) -> None:
    array = stack(2, 3)
    check(tiff(array, metadata={"axes": "TZYX"}, **options), array, "tz")
    check(tiff(array, **options), array.reshape(6, *SHAPE), "p")  # no axes in the file
    check(tiff(array, metadata={"axes": "QZYX"}, **options), array.reshape(6, *SHAPE), "p")
    if "truncate" not in options:
        check(tiff(array, metadata=None, **options), array.reshape(6, *SHAPE), "p")


def test_ome_series_and_pages_of_different_sizes_and_types() -> None:
    sink, sizes = io.BytesIO(), [(2, 5, 7), (3, 9, 4)]
    arrays = [np.random.default_rng(i).integers(0, 99, size, np.uint8) for i, size in enumerate(sizes)]
    with tifffile.TiffWriter(sink, ome=True) as file:
        for array in arrays:
            file.write(array, photometric="minisblack", metadata={"axes": "TYX"})
    actual = every_plane(sink.getvalue())
    expected = {f"s{s}_t{t}": plane for s, array in enumerate(arrays) for t, plane in enumerate(array)}
    assert list(actual) == list(expected)
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name])
    sink = io.BytesIO()
    pages = [np.full((3, 4), 9, np.uint8), np.full((5, 2), 0.5, np.float32)]
    with tifffile.TiffWriter(sink) as file:
        for page in pages:
            file.write(page, photometric="minisblack")
        file.write(pages[0][::2], photometric="minisblack", subfiletype=1)  # a thumbnail
    actual = every_plane(sink.getvalue())
    assert {name: int(pixels[0, 0]) for name, pixels in actual.items()} == {"p0": 9, "p1": 32768}


def test_ome_tiff_of_several_files() -> None:
    """A file that names its own planes by its UUID has these; otherwise their channels are unknown."""

    block = '<TiffData IFD="{k}" FirstT="{t}" PlaneCount="1"><UUID FileName="{f}.tif">urn:{f}</UUID></TiffData>'

    def text(uuid: str, channels: int, blocks: str = "") -> str:
        blocks = blocks or "".join(block.format(k=k, t=2 * f + k, f=f) for f in range(2) for k in range(2))
        size = f'SizeX="9" SizeY="12" SizeT="4" SizeZ="1" SizeC="{channels}" DimensionOrder="XYTZC"'
        return f'<OME xmlns="http://x" {uuid}><Image><Pixels {size}>{blocks}</Pixels></Image></OME>'

    def pages(description: str) -> bytes:
        sink = io.BytesIO()
        with tifffile.TiffWriter(sink) as file:
            for number, page in enumerate(stack(2)):
                file.write(page, photometric="minisblack", metadata=None, description=None if number else description)
        return sink.getvalue()

    assert list(every_plane(pages(text('UUID="urn:1"', 1)))) == ["t2", "t3"]
    assert list(every_plane(pages(text("", 1)))) == ["p0", "p1"]
    assert "several files and channels" in error_message(pages(text("", 2)))
    assert "does not describe 1 of 2" in error_message(pages(text("", 1, '<TiffData IFD="0" PlaneCount="1"/>')))
    assert "planes in a series of 4" in error_message(pages(text("", 1, '<TiffData IFD="0" PlaneCount="5"/>')))
    assert "invalid OME-XML" in error_message(pages(text("", 1)[:-3]))
    bomb = '<!DOCTYPE x [<!ENTITY a "1"><!ENTITY b "&a;&a;">]>' + text("", 1).replace('SizeT="4"', 'SizeT="&b;"')
    assert "document type" in error_message(pages(bomb))


def test_micro_manager_planes_have_the_indices_of_their_tags() -> None:
    array, sink = stack(3, 2), io.BytesIO()
    order = [(2, 0), (0, 1), (0, 0), (1, 1), (2, 1), (1, 0)]  # not ImageJ's, which the description claims
    with tifffile.TiffWriter(sink) as file:
        for number, (t, c) in enumerate(order):
            text = json.dumps({"FrameIndex": t, "ChannelIndex": c, "SliceIndex": 0, "Width": 9}).encode() + b"\0"
            description = None if number else "ImageJ=1.52\nimages=6\nchannels=2\nframes=3\nhyperstack=true\n"
            file.write(
                array[t, c],
                photometric="minisblack",
                metadata=None,
                description=description,
                extratags=[(51123, 2, len(text), text, True)],
            )
    check(sink.getvalue(), array, "tc")


def test_channels_of_pixels_and_colours() -> None:
    channels = stack(3)
    for data in (
        tiff(channels, planarconfig="separate", metadata=None),
        tiff(np.moveaxis(channels, 0, 2), planarconfig="contig", metadata=None),
        tiff(np.moveaxis(channels, 0, 2), photometric="rgb", metadata=None),
        tiff(channels.astype(np.uint8), photometric="rgb", planarconfig="separate", tile=(16, 16), metadata=None),
        cv2.imencode(".png", np.moveaxis(channels[::-1], 0, 2))[1].tobytes(),
        cv2.imencode(".bmp", np.moveaxis(channels[::-1], 0, 2).astype(np.uint8))[1].tobytes(),
    ):
        for number, pixels in enumerate(channels):
            np.testing.assert_array_equal(formats.decode(data, choice=Choice(channel=number)).pixels, pixels)
        assert "no channel 3: the file has 3 channels, 0 to 2" in error_message(data, Choice(channel=3))
    inverted = tiff(255 - channels[0].astype(np.uint8), photometric="miniswhite")
    np.testing.assert_array_equal(formats.decode(inverted, choice=Choice("0", 0)).pixels, channels[0])
    assert "no channel 1: the file has 1 channel, 0" in error_message(inverted, Choice(channel=1))
    alpha = tiff(np.dstack([channels[0], channels[1]]), planarconfig="contig", extrasamples=["unassalpha"])
    assert "no channel 1" in error_message(alpha, Choice(channel=1))


def test_one_plane_by_number_or_axes() -> None:
    array = stack(11, 3)
    data = tiff(array, imagej=True, metadata={"axes": "TZYX"})
    image = formats.ImageFile(data)
    assert image.names[5] == "t01_z2"
    assert [image.names[number] for number in image.select(Choice("z1"))][9:] == ["t09_z1", "t10_z1"]
    for text in ("5", "t01_z2", "t1_z2", "z2_t1"):
        np.testing.assert_array_equal(formats.decode(data, choice=Choice(text)).pixels, array[1, 2])
    for text, reason in (
        ("33", "contains 33 images (t0 to t10, z0 to z2), no plane 33"),
        ("c1", "no plane c1"),
        ("t3", "choose one with --plane, such as t03_z0"),
        ("-1", "no plane '-1'; give its number from 0"),
        ("T3", "no plane 'T3'"),
    ):
        assert reason in error_message(data, Choice(text))
    assert "contains 1 image, no plane 1" in error_message(tiff(array[0, 0]), Choice("1"))


@pytest.mark.parametrize("options", [{"imagej": True, "truncate": True}, {"imagej": True}, {"ome": True}, {}])
def test_truncated_stacks_have_the_same_planes_or_errors(options: dict[str, Any]) -> None:
    data = tiff(stack(4), metadata={"axes": "TYX"}, **options)
    expected = every_plane(data)
    for cut in range(0, len(data), 5):
        try:
            image = formats.ImageFile(data[:cut])
        except formats.UnreadableImageError:
            continue
        assert image.names == list(expected)
        for name, pixels in expected.items():
            try:
                np.testing.assert_array_equal(image.decode(Choice(name)).pixels, pixels)
            except formats.UnreadableImageError:
                continue


def test_addresses() -> None:
    for name in ("", "t3", "s0_t03_z2", "p000"):
        assert planes.split_address(planes.address("a b#1/c.tif", name)) == ("a b#1/c.tif", name or None)
    assert planes.split_address("a#t3.tif") == ("a#t3.tif", None)


def test_slices_that_annotations_state() -> None:
    data = tiff(stack(3, 2, 2), imagej=True, metadata={"axes": "TZCYX"})
    positions = formats.ImageFile(data).positions
    place = planes.place_of(positions, 10)  # t2_z1_c0
    assert place is not None
    assert (place.name, place.slices) == ("t2_z1_c0", (11, 12))
    for z, t, same in (
        (1, 2, True),
        (None, 2, True),
        (1, None, True),
        (None, None, True),
        (2, 1, False),
        (0, 2, False),
    ):
        assert place.is_at(z, t) == same
    unknown = planes.place_of([{"p": 0}, {"p": 1}, {"p": 2}], 2)
    assert unknown is not None
    for z, t, same in ((2, 0, True), (0, 2, True), (None, 2, True), (None, 0, False), (2, 2, False), (1, 1, False)):
        assert unknown.is_at(z, t) == same
    assert planes.place_of([{}], 0) is None
    assert planes.place_of([{"c": 0}, {"c": 1}], 1) is None
