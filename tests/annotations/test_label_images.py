"""Label images: decoding of TIFF, PNG and NPY, refusals, cells of labels."""

import contextlib
import io
import pickle
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from conftest import SHARED
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from raylivecell.annotations import image_files, label_images
from raylivecell.annotations.drawing import draw_labels
from raylivecell.annotations.errors import AnnotationError
from raylivecell.annotations.label_images import cells_of_labels, decode, to_integers
from raylivecell.annotations.rle import mask_of_runs, window_of_runs
from raylivecell.data.cell_defects import check_cells


def tiff(values: np.ndarray, **options: Any) -> bytes:
    stream = io.BytesIO()
    tifffile.imwrite(stream, values, **options)
    return stream.getvalue()


def png(values: np.ndarray | Image.Image, **options: Any) -> bytes:
    stream = io.BytesIO()
    image = values if isinstance(values, Image.Image) else Image.fromarray(values)
    image.save(stream, "PNG", **options)
    return stream.getvalue()


def npy(values: np.ndarray, **options: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values, **options)
    return stream.getvalue()


def cv2_png(values: np.ndarray) -> bytes:
    return cv2.imencode(".png", values)[1].tobytes()


LABELS = np.arange(12 * 17).reshape(12, 17) % 23
TILED = {"tile": (16, 16), "compression": "zlib", "predictor": True}


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4"])
@pytest.mark.parametrize("options", [{}, {"compression": "zlib", "predictor": True}, TILED, {"bigtiff": True}])
@pytest.mark.parametrize("order", ["<", ">"])
def test_tiff_labels_of_all_integer_types(dtype: str, options: dict[str, Any], order: str) -> None:
    high = np.iinfo(dtype).max
    labels = np.where(LABELS > 20, high - LABELS.astype(np.int64), LABELS).astype(dtype)
    decoded = decode(tiff(labels, byteorder=order, photometric="minisblack", **options))
    assert decoded.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(decoded, labels)


@pytest.mark.parametrize("dtype", ["|b1", "<u1", "<i2", ">i2", "<u4", ">i8", "<u8", "<f2", "<f4", ">f8"])
def test_npy_labels(dtype: str) -> None:
    labels = (LABELS % 2 if dtype == "|b1" else LABELS).astype(dtype)
    for values in (labels, np.asfortranarray(labels)):
        np.testing.assert_array_equal(to_integers(decode(npy(values))), labels.astype(np.int64))


def test_png_labels_and_indices_of_palettes() -> None:
    grey = LABELS.astype(np.uint8)
    palette = Image.fromarray(grey, "P")
    palette.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    for data in (png(grey), png(palette), cv2_png(grey), png(palette, bits=8)):
        np.testing.assert_array_equal(decode(data), grey)
    deep = (LABELS * 2900).astype(np.uint16)
    np.testing.assert_array_equal(to_integers(decode(cv2_png(deep))), deep)
    binary = Image.fromarray(grey % 2 == 1)
    np.testing.assert_array_equal(to_integers(decode(png(binary))), grey % 2)
    np.testing.assert_array_equal(decode(tiff(grey, photometric="palette", colormap=np.zeros((3, 256), "u2"))), grey)


PICKLE = npy(np.array({"masks": LABELS}, dtype=object), allow_pickle=True)
HUGE = (
    b"\x93NUMPY\x01\x00v\x00"
    + b"{'descr': '<u8', 'fortran_order': False, 'shape': (900000, 900000), }".ljust(117)
    + b"\n"
)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (PICKLE, "File > Save Masks as PNG/tif, which writes _cp_masks"),
        (npy(LABELS[None]), r"shape \(1, 12, 17\), not \(H, W\)"),
        (npy(LABELS)[:-3], "does not match its shape"),
        (npy(LABELS.astype("c8")), "not of numbers"),
        (HUGE, "pixels; cut it into tiles"),
        (pickle.dumps(LABELS), "not a known format"),
        (png(np.stack([LABELS.astype(np.uint8)] * 3, axis=2)), "a colour image"),
        (png(LABELS.astype(np.uint8))[:-30], "damaged"),
        (cv2.imencode(".jpg", LABELS.astype(np.uint8))[1].tobytes(), "JPEG image, which changes labels"),
        (tiff(np.stack([LABELS.astype(np.uint16)] * 3), photometric="minisblack"), "contains 3"),
        (tiff(np.zeros((9, 9, 3), np.uint8), photometric="rgb"), "channels"),
        (tiff(LABELS.astype(np.uint8), photometric="miniswhite"), "MINISWHITE"),
        (tiff(LABELS.astype(np.uint16))[:-200], "damaged"),
        (
            png(LABELS.astype(np.uint8), exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0"),
            "orientation",
        ),
        (b"", "not a known format"),
    ],
)
def test_refused_files_have_a_reason(data: bytes, message: str) -> None:
    with pytest.raises(AnnotationError, match=message):
        decode(data)


@given(arrays.arrays("u1", 150), st.sampled_from([tiff, png, npy]), st.integers(0, 400))
def test_damaged_files_raise_annotation_errors_only(noise: np.ndarray, write: Any, at: int) -> None:
    data = bytearray(write(LABELS.astype(np.uint8)))
    data[at : at + 8] = noise.tobytes()[:8]
    with contextlib.suppress(AnnotationError):
        decode(bytes(data))


def test_floats_are_labels_only_if_all_are_integers() -> None:
    rules = {"background_label": "refuse", "binary_mask": "refuse", "label_in_pieces": "keep"}
    data = tiff(LABELS.astype(np.float32), compression="zlib")
    annotation = image_files.read([("a.tif", data)], False, LABELS.shape, rules)
    assert annotation.defects["float_labels"] == ("32-bit floats, all of them integers", [])
    assert len(annotation.cells) == 22
    for wrong in (0.5, np.nan, np.inf, 1e300):
        with pytest.raises(AnnotationError, match="are not integers"):
            to_integers(np.array([[0.0, wrong]]))
    with pytest.raises(AnnotationError, match="label -1 is negative"):
        to_integers(np.array([[-1, 2]]))


def drawn_labels(records: list[Any], shape: tuple[int, int]) -> np.ndarray:
    checked = check_cells(records, shape, (1.0, 1.0), {})
    assert not checked.defects
    return draw_labels(checked.cells, shape)


@given(
    arrays.arrays(
        st.sampled_from(["u1", "u2", "i4", "u8"]), st.tuples(st.integers(1, 9), st.integers(1, 9)), fill=st.just(0)
    ).map(np.abs)
)
def test_cells_are_the_labels_up_to_renumbering(labels: np.ndarray) -> None:
    """Also with holes, at the edges, of one pixel, in pieces, and with values above 65,535."""
    labels = np.where(labels < 0, 0, labels)  # abs of the lowest integer
    records, _ = cells_of_labels(labels, "one_cell", "keep")
    values = np.unique(labels[labels > 0])
    assert [record.id for record in records] == values.tolist()
    expected = np.where(labels > 0, np.searchsorted(values, labels) + 1, 0)
    np.testing.assert_array_equal(drawn_labels(records, labels.shape), expected)


@given(arrays.arrays("u1", (7, 8), elements=st.integers(0, 1)))
def test_windows_of_runs_are_the_mask(mask: np.ndarray) -> None:
    runs = label_images.cells_of_mask(mask, "a", "keep")[0][0].runs[0][1]
    left, window = window_of_runs((7, 8), runs)  # type: ignore[misc]  # not None
    expected = mask_of_runs((7, 8), runs)
    assert expected is not None
    np.testing.assert_array_equal(window, expected[:, left : left + window.shape[1]])
    assert window.sum() == mask.sum()
    assert window_of_runs((7, 9), runs) is None


RING = np.zeros((20, 30), np.uint16)
RING[2:12, 2:12] = 7
RING[4:8, 4:8] = 0
RING[15:17, 20:25] = 7
RING[17:19, 25:28] = 7  # touches the piece above at a corner
RING[0, 29] = 70


def test_rules_for_labels_in_pieces() -> None:
    cells, defects = cells_of_labels(RING, "refuse", "keep")
    assert [cell.id for cell in cells] == [7, 70]
    assert defects == {"label_in_pieces": ("labels in 2 pieces", [7])}
    cells, _ = cells_of_labels(RING, "refuse", "largest")
    ring = np.where(RING == 7, 1, 0)
    ring[13:] = 0
    np.testing.assert_array_equal(drawn_labels(cells, RING.shape) == 1, ring)
    cells, _ = cells_of_labels(RING, "refuse", "split")
    assert [cell.id for cell in cells] == ["7.1", "7.2", 70]
    np.testing.assert_array_equal(drawn_labels(cells, RING.shape) > 0, RING > 0)


def test_binary_masks_and_masks_of_classes_are_not_cells() -> None:
    mask = np.where(RING > 0, 255, 0).astype(np.uint8)
    cells, defects = cells_of_labels(mask, "refuse", "keep")
    assert "one value, 255, in 3 pieces" in defects["binary_mask"][0]
    assert len(cells) == 1
    assert len(cells_of_labels(mask, "components", "keep").cells) == 3
    assert len(cells_of_labels(mask, "one_cell", "split").cells) == 1
    classes = np.kron(np.arange(24).reshape(4, 6) % 3, np.ones((4, 4), int))  # 16 squares of classes 1 and 2
    classes[::4] = classes[:, ::4] = 0
    assert "2 values in 16 pieces" in cells_of_labels(classes, "refuse", "keep").defects["binary_mask"][0]
    only = np.where(ring_only := RING == 70, 255, 0)
    assert cells_of_labels(only, "refuse", "keep").defects == {}
    assert ring_only.sum() == 1


DISKS = np.zeros((60, 80), np.uint8)
"""Five cells; the third is cut by an edge."""
for number, centre in enumerate([(12, 12), (50, 14), (0, 40), (40, 45), (65, 45)], 1):
    cv2.circle(DISKS, centre, 8, number, -1)
ERODED = np.where(cv2.erode(DISKS, np.ones((3, 3), np.uint8)) > 0, DISKS, 0)
OUTLINES = np.where((ERODED == 0) & (DISKS > 0), 255, DISKS)


def read(values: np.ndarray, **rules: str) -> image_files.ImageAnnotation:
    chosen = {"background_label": "refuse", "binary_mask": "components", "label_in_pieces": "keep", **rules}
    return image_files.read([("masks/a.png", png(values))], False, DISKS.shape, chosen)


@pytest.mark.parametrize(
    ("values", "label", "expected"),
    [
        (np.where(DISKS == 0, 255, DISKS), 255, DISKS),
        (np.where(DISKS == 0, 1, np.where(ERODED > 0, DISKS + 1, 0)), 1, ERODED),  # 0: dams of a watershed
        (np.where(DISKS == 0, 255, 0), 255, DISKS),  # inverted
        (DISKS == 0, 1, DISKS),
        (np.full_like(DISKS, 7), 7, np.zeros_like(DISKS)),
        (OUTLINES, 255, ERODED),  # Pascal VOC
        (np.where(OUTLINES == 255, 2, OUTLINES > 0), 2, ERODED),  # classes: cell and border
    ],
)
def test_background_and_outlines_are_no_cells(values: np.ndarray, label: int, expected: np.ndarray) -> None:
    values = values if values.dtype == bool else values.astype(np.uint8)
    annotation = read(values)
    ((reason, ids),) = annotation.defects.values()
    assert (list(annotation.defects), ids) == (["background_label"], [label])
    percent = 100 * (values == label).mean()
    assert reason.startswith(f"masks/a.png: label {label} covers {percent:.0f} %" if percent > 10 else "masks/a.png")
    cells = read(values, background_label="background").cells
    assert len(cells) == len(np.unique(expected)) - 1
    np.testing.assert_array_equal(drawn_labels(cells, DISKS.shape) > 0, expected > 0)
    all_cells = read(values, background_label="keep", binary_mask="one_cell").cells
    np.testing.assert_array_equal(drawn_labels(all_cells, DISKS.shape) > 0, values > 0)


def test_large_cells_and_cells_around_a_cell_are_cells() -> None:
    inside = np.pad(np.full((58, 78), 3, np.uint8), 1)  # 94 %, without the edges
    half = np.where(np.arange(80) < 40, 1, 2) + np.zeros((60, 1), int)  # no label of over half
    around = np.where(DISKS == 1, 9, 0) + (ERODED == 1)  # a cell around one other cell
    hole = np.kron(np.arange(1, 13).reshape(3, 4), np.ones((20, 20), int))  # without background, but for one pixel
    hole[30, 30] = 0
    assert label_images.find_background(DISKS[:0]) is label_images.find_outline(DISKS[:0]) is None
    for values in (DISKS, ERODED, inside, half, around, hole, np.zeros_like(DISKS)):
        assert "background_label" not in read(values.astype(np.uint8)).defects
    huge = np.where(DISKS == 1, 0, 8).astype(np.uint8)
    (cell,) = read(huge, background_label="keep").cells
    np.testing.assert_array_equal(drawn_labels([cell], DISKS.shape), huge > 0)


def test_no_real_label_is_background() -> None:
    masks = sorted((SHARED / "usiigaci-mini" / "masks").glob("*.png"))
    if not masks:
        pytest.skip(f"no real label images in {SHARED}: set RAYLIVECELL_SHARED")
    for path in masks:
        labels = to_integers(decode(path.read_bytes()))
        assert label_images.find_background(labels) is label_images.find_outline(labels) is None
        filled = np.where(labels == 0, labels.max() + 1, labels)
        background = label_images.find_background(filled)
        assert background is not None
        np.testing.assert_array_equal(label_images.without_background(filled, background.label), labels)


def test_masks_of_single_cells_may_be_inverted_or_classes() -> None:
    def read_masks(*masks: np.ndarray, **rules: str) -> image_files.ImageAnnotation:
        files = [(f"masks/m{n}.png", png(mask.astype(np.uint8) * 255)) for n, mask in enumerate(masks, 1)]
        chosen = {"background_label": "refuse", "binary_mask": "refuse", "label_in_pieces": "keep", **rules}
        return image_files.read(files, True, DISKS.shape, chosen)

    annotation = read_masks(DISKS == 1, DISKS != 2, DISKS != 3)
    ((kind, (reason, ids)),) = annotation.defects.items()
    assert (kind, ids) == ("background_label", ["m2", "m3"])
    assert reason.startswith("masks/m2.png: label 255 covers 96 % of the image")
    cells = read_masks(DISKS == 1, DISKS != 2, DISKS != 3, background_label="background").cells
    np.testing.assert_array_equal(drawn_labels(cells, DISKS.shape), np.where(DISKS < 4, DISKS, 0))
    classes = ERODED > 0, OUTLINES == 255
    assert read_masks(*classes).defects["binary_mask"][0].startswith("2 masks in 10 pieces: masks of classes")
    assert len(read_masks(*classes, binary_mask="components").cells) == 10
    assert len(read_masks(*classes, binary_mask="one_cell", label_in_pieces="split").cells) == 2


def test_images_of_noise_are_refused_in_bounded_time() -> None:
    noise = np.random.default_rng(0).integers(1, 60_000, (1500, 1500)).astype(np.uint16)
    with pytest.raises(AnnotationError, match="scattered"):
        cells_of_labels(noise, "components", "split")
    with pytest.raises(AnnotationError, match="90000 labels, more than 65535"):
        cells_of_labels(np.arange(1, 90_001).reshape(300, 300), "components", "split")
