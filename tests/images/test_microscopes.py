"""Files of microscopes: every plane with its own pixels, or an error that names the reason."""

import io
import struct
import sys
import zlib
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from microscope_files import czi, lif, nd2

from raylivecell.images import formats
from raylivecell.images.channels import grey_of_rgb
from raylivecell.images.planes import EVERYTHING, Choice
from raylivecell.images.ranges import RangeReader

RNG = np.random.default_rng(0)
SHAPE = (24, 37)


def planes_of(data: bytes) -> dict[str, np.ndarray]:
    """Decode every plane by its name, by reading ranges."""
    image = formats.ImageFile(RangeReader(io.BytesIO(data)))
    return {name: image.decode(Choice(name or None)).pixels for name in image.names}


def error_message(data: bytes, choice: Choice = EVERYTHING) -> str:
    with pytest.raises(formats.UnreadableImageError) as error:
        formats.decode(data, choice=choice)
    return str(error.value)


def random_planes(dtype: str, top: int) -> dict[str, np.ndarray]:
    shape = (*SHAPE, 3) if dtype.startswith("3") else SHAPE
    return {f"t{t}_c{c}": RNG.integers(0, top, shape).astype(dtype[-2:]) for t in range(3) for c in range(2)}


def index_of(name: str) -> dict[str, int]:
    return {part[0].upper(): int(part[1:]) for part in name.split("_")}


def zstd(pixels: np.ndarray, header: bytes = b"") -> bytes:
    """Compress like CZI's Zstandard; with the header of split bytes, low bytes first."""
    raw = pixels.tobytes()
    if header == b"\3\1\1":
        raw = np.frombuffer(raw, np.uint8).reshape(-1, 2).T.tobytes()
    return header + bytes(pa.compress(raw, codec="zstd", asbytes=True))


class TestCzi:
    czifile = pytest.importorskip("czifile")

    @pytest.mark.parametrize("dtype", ["u1", "u2", "f4", "3u1", "3u2"])
    @pytest.mark.parametrize("compression", ["none", "zstd", "zstd with header", "zstd of split bytes"])
    def test_planes(self, dtype: str, compression: str) -> None:
        arrays = random_planes(dtype, 4096 if "2" in dtype else 256)
        headers = {"zstd": (5, b""), "zstd with header": (6, b"\1"), "zstd of split bytes": (6, b"\3\1\1")}
        if compression == "zstd of split bytes" and "u2" not in dtype:
            return
        number, header = headers.get(compression, (0, b""))
        data = czi([(index_of(n), a, number, zstd(a, header) if number else None) for n, a in arrays.items()])
        assert "of 2 channels; choose one with --channel 0 to 1" in error_message(data)
        decoded = planes_of(data)
        assert list(decoded) == list(arrays)
        for name, array in arrays.items():
            expected = grey_of_rgb(np.ascontiguousarray(array[..., ::-1])) if array.ndim == 3 else array
            np.testing.assert_array_equal(decoded[name], expected)
        if not number:
            theirs = self.czifile.CziFile(io.BytesIO(data)).asarray().squeeze()
            ours = np.stack(list(arrays.values())).reshape(3, 2, *SHAPE, -1)
            axes = self.czifile.CziFile(io.BytesIO(data)).axes  # the order of its array
            order = [axis for axis in axes if axis in "TC"]
            ours = ours if order == ["T", "C"] else ours.swapaxes(0, 1)
            np.testing.assert_array_equal(theirs, ours[..., ::-1].squeeze())

    def test_pictures_in_blocks(self) -> None:
        smooth = cv2.GaussianBlur(RNG.integers(0, 256, SHAPE, np.uint8), (0, 0), 4)
        jpeg = cv2.imencode(".jpg", smooth, [cv2.IMWRITE_JPEG_QUALITY, 100])[1].tobytes()
        pixels = formats.decode(czi([({}, smooth, 1, jpeg)])).pixels
        assert np.abs(pixels.astype(int) - smooth).max() <= 2
        assert "JPEG of 37 x 24 in a CZI block" in error_message(czi([({}, smooth[:-1], 1, jpeg)]))
        imagecodecs = pytest.importorskip("imagecodecs")
        for dtype in ("u1", "u2"):
            array = RNG.integers(0, 256, SHAPE).astype(dtype)
            picture = imagecodecs.jpegxr_encode(array, level=1.0)
            np.testing.assert_array_equal(formats.decode(czi([({}, array, 4, picture)])).pixels, array)
            error_message(czi([({}, array[:, :-1], 4, picture)]))

    def test_other_contents_are_refused(self) -> None:
        array = RNG.integers(0, 256, SHAPE, np.uint8)
        assert "several tiles per plane" in error_message(czi([({"M": m}, array, 0, None) for m in range(2)]))
        assert "axis H" in error_message(czi([({"H": h}, array, 0, None) for h in range(2)]))
        assert "compression LZW" in error_message(czi([({}, array, 2, b"x" * 99)]))
        assert "compression 77" in error_message(czi([({}, array, 77, b"x" * 99)]))
        assert "header of 9 bytes" in error_message(czi([({}, array, 6, b"\x09" * 99)]))
        bomb = bytes(pa.compress(bytes(10**8), codec="zstd", asbytes=True))
        assert "corrupt Zeiss CZI" in error_message(czi([({}, array, 5, bomb)]))
        large = np.broadcast_to(np.uint8(0), (10_000, 10_000))
        assert "10000 x 10000 is more than" in error_message(czi([({}, large, 5, b"x" * 99)]))
        reduced = czi([({}, array, 0, None), ({}, array, 0, None)], stored=0.5)
        np.testing.assert_array_equal(formats.decode(reduced).pixels, array)


class TestLif:
    liffile = pytest.importorskip("liffile")

    def test_planes(self) -> None:
        series = RNG.integers(0, 4096, (3, 2, 2, *SHAPE)).astype(np.uint16)
        still = RNG.integers(0, 256, (5, 7), np.uint8)
        data = lif({"series": ("TZCYX", series), "still": ("YX", still)})
        assert "choose one with --channel" in error_message(data)
        decoded = planes_of(data)
        names = [f"s0_t{t}_z{z}_c{c}" for t in range(3) for z in range(2) for c in range(2)]
        assert list(decoded) == [*names, "s1_t0_z0_c0"]
        for name, array in zip(names, series.reshape(12, *SHAPE)):
            np.testing.assert_array_equal(decoded[name], array)
        np.testing.assert_array_equal(decoded["s1_t0_z0_c0"], still)
        np.testing.assert_array_equal(self.liffile.LifFile(io.BytesIO(data)).images[0].asarray(), series)

    def test_colour_and_one_image(self) -> None:
        rgb = RNG.integers(0, 256, (*SHAPE, 3), np.uint8)
        np.testing.assert_array_equal(formats.decode(lif({"a": ("YXS", rgb)})).pixels, grey_of_rgb(rgb))
        data = lif({"a": ("YX", np.ascontiguousarray(rgb[..., 0]))})
        np.testing.assert_array_equal(formats.decode(data).pixels, rgb[..., 0])

    def test_other_contents_are_refused(self) -> None:
        tiles = RNG.integers(0, 256, (2, *SHAPE), np.uint8)
        assert "axis M" in error_message(lif({"a": ("MYX", tiles)}))
        entities = '<!DOCTYPE x [<!ENTITY a "1">]>'
        assert "document type" in error_message(lif({"a": ("YX", tiles[0])}, entities))
        data = bytearray(lif({"a": ("YX", tiles[0])}))
        struct.pack_into("<I", data, 9, 2**31)
        assert "XML of 4294967296 bytes" in error_message(bytes(data))
        large = np.broadcast_to(np.uint8(0), (10_000, 10_000))
        data = lif({"a": ("YX", large)})
        assert "10000 x 10000 is more than" in error_message(data)


def nd2_of(
    array: np.ndarray, loops: dict[str, int], padding: int = 0, frames: list[bytes] | None = None, **changes: Any
) -> bytes:
    """Build an ND2 of frames (N, H, W, C), with rows that are padded by some bytes."""
    _, height, width, channels = array.shape
    row = width * channels * array.itemsize
    rows = np.pad(array.reshape(len(array), height, -1).view(np.uint8), ((0, 0), (0, 0), (0, padding)))
    extra = changes.pop("extra", {})
    attributes = {
        "uiWidth": width,
        "uiHeight": height,
        "uiWidthBytes": row + padding,
        "uiComp": channels,
        "uiBpcInMemory": 8 * array.itemsize,
        "uiBpcSignificant": 8 * array.itemsize,
        "uiSequenceCount": len(array),
        "eCompression": 2,
        **changes,
    }
    return nd2(frames or [frame.tobytes() for frame in rows], attributes, loops, extra)


class TestNd2:
    nd2 = pytest.importorskip("nd2")
    array = RNG.integers(0, 4096, (6, *SHAPE, 2)).astype(np.uint16)

    @pytest.mark.parametrize("loops", [{"T": 2, "Z": 3}, {"P": 3, "T": 2}, {"Z": 6}])
    @pytest.mark.parametrize("padding", [0, 6])
    @pytest.mark.parametrize("lossless", [False, True])
    def test_planes(self, loops: dict[str, int], padding: int, lossless: bool) -> None:
        data = nd2_of(self.array, loops, padding)
        if lossless:
            rows = np.pad(self.array.reshape(6, SHAPE[0], -1).view(np.uint8), ((0, 0), (0, 0), (0, padding)))
            frames = [zlib.compress(frame.tobytes()) for frame in rows]
            data = nd2_of(self.array, loops, padding, frames, eCompression=0)
        decoded = planes_of(data)
        sizes = list(loops.items())
        for number in range(12):
            indices = np.unravel_index(number, [*loops.values(), 2])
            position = {{"P": "s"}.get(axis, axis.lower()): i for (axis, _), i in zip([*sizes, ("c", 2)], indices)}
            name = "_".join(f"{axis}{position[axis]}" for axis in "stzc" if axis in position)
            np.testing.assert_array_equal(decoded[name], self.array[number // 2, ..., number % 2], err_msg=name)
        with self.nd2.ND2File(io.BytesIO(data)) as file:
            theirs = file.asarray().reshape(6, 2, *SHAPE)
        np.testing.assert_array_equal(theirs, np.moveaxis(self.array, 3, 1))

    def test_one_frame_and_frames_that_were_not_acquired(self) -> None:
        single = np.ascontiguousarray(self.array[:1, ..., :1])
        np.testing.assert_array_equal(formats.decode(nd2_of(single, {})).pixels, single[0, ..., 0])
        data = nd2_of(self.array, {"T": 9})  # nd2 itself would return zeros for t6 to t8
        assert formats.ImageFile(data).names[-1] == "t5_c1"

    def test_other_contents_are_refused(self) -> None:
        assert "of 6 frames, described as T" in error_message(nd2_of(self.array, {"T": 5}))
        assert "lossy" in error_message(nd2_of(self.array, {"T": 6}, eCompression=1))
        assert "tiles" in error_message(nd2_of(self.array, {"T": 6}, uiTileWidth=5))
        assert "over a million frames" in error_message(nd2_of(self.array, {"T": 10**6, "Z": 10**3}))
        assert "rows of 8 bytes" in error_message(nd2_of(self.array, {"T": 6}, uiWidthBytes=8), Choice("t0_c0"))
        short = nd2_of(self.array, {"T": 6}, uiHeight=99)
        assert "frame of 3552 bytes, expected 14652" in error_message(short, Choice("t0_c0"))
        assert "100000 x 100000 is more than" in error_message(
            nd2_of(self.array, {"T": 6}, uiWidth=100_000, uiHeight=100_000), Choice("t0_c0")
        )
        name = b"ImageMetadataLV!"
        entities = {name: b'<!DOCTYPE x [<!ENTITY a "1">]><x>&a;</x>'}
        assert "document type" in error_message(nd2_of(self.array, {}, extra=entities))
        bomb = b"\x4c\0" + bytes(10) + zlib.compress(bytes(10**8))
        nested = b"\x4c\0" + bytes(10) + zlib.compress(bomb)
        inside = b"\x09\2a\0\0\0" + struct.pack("<Q", len(bomb)) + bomb
        for content in (bomb, nested, inside):
            assert "decompresses to over" in error_message(nd2_of(self.array, {}, extra={name: content}))


FILES: dict[str, Any] = {
    "czi": lambda: czi([(index_of(n), a, 0, None) for n, a in random_planes("u1", 256).items()]),
    "lif": lambda: lif({"a": ("TCYX", RNG.integers(0, 256, (3, 2, *SHAPE), np.uint8))}),
    "nd2": lambda: nd2_of(RNG.integers(0, 256, (3, *SHAPE, 2), np.uint8), {"T": 3}),
}
LIBRARIES = {"czi": "czifile", "lif": "liffile", "nd2": "nd2"}


@pytest.mark.parametrize("kind", FILES)
def test_truncated_files_have_the_same_planes_or_errors(kind: str) -> None:
    pytest.importorskip(LIBRARIES[kind])
    data = FILES[kind]()
    expected = planes_of(data)
    for cut in range(0, len(data), 61 if len(data) < 20_000 else 997):
        try:
            image = formats.ImageFile(data[:cut])
        except formats.UnreadableImageError:
            continue
        for name in image.names:
            try:
                np.testing.assert_array_equal(image.decode(Choice(name)).pixels, expected[name])
            except formats.UnreadableImageError:
                continue


@given(st.sampled_from(sorted(FILES)), st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), max_size=6))
def test_changed_bytes_do_not_crash(kind: str, changes: list[tuple[int, int]]) -> None:
    pytest.importorskip(LIBRARIES[kind])
    data = bytearray(FILES[kind]())
    for position, value in changes:
        data[position if position < 1500 else -position + 1500] = value
    try:
        image = formats.ImageFile(bytes(data))
        image.decode(Choice(image.names[0] or None))
    except formats.UnreadableImageError:
        return


@pytest.mark.parametrize(("kind", "library"), LIBRARIES.items())
def test_a_missing_library_is_reported_with_its_installation(
    kind: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = FILES[kind]()
    monkeypatch.setitem(sys.modules, library, None)  # as if it was not installed
    monkeypatch.delitem(sys.modules, f"raylivecell.images.microscopes.{kind}_file", raising=False)
    assert f"needs {library}: pip install 'raylivecell[formats]', or export OME-TIFF" in error_message(data)
