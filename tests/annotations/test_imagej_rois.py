"""ImageJ ROIs: exact round trips, ImageJ's rules for pixels on a border, real annotations, damaged files."""

import contextlib
import io
import struct
import zipfile

import numpy as np
import pytest
import roifile
from conftest import SHARED
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_st
from PIL import Image
from skimage.draw import polygon2mask
from skimage.measure import points_in_poly

from raylivecell.annotations import imagej_rois, pixel_outlines
from raylivecell.annotations.errors import AnnotationError
from raylivecell.annotations.rle import label_runs, mask_of_runs

# Few values in a small image: parts, holes, diagonal contacts, single pixels and cells at borders are all frequent.
LABELS = numpy_st.arrays(np.int32, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.integers(0, 3))
RING_IN_RING = np.array([[1, 1, 1, 1, 1], [1, 0, 0, 0, 1], [1, 0, 1, 0, 1], [1, 0, 0, 0, 1], [1, 1, 1, 1, 0]], np.int32)
PINCHED = np.array([[1, 1, 1], [1, 0, 1], [1, 1, 0]], np.int32)  # the hole touches the outside at a corner


def masks(records, shape):
    return [mask_of_runs(*record.runs[0]) if record.runs else np.zeros(shape, bool) for record in records]


def labels_of(data, shape):
    """Label image of written ROIs, whose names are the labels."""
    labels = np.zeros(shape, np.int32)
    records = imagej_rois.read(data, shape)
    for record, mask in zip(records, masks(records, shape)):
        assert not labels[mask].any()
        labels[mask] = int(record.id)
    return labels


def rois_of(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: roifile.ImagejRoi.frombytes(archive.read(name)) for name in archive.namelist()}


def zip_of(**rois):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, roi in rois.items():
            archive.writestr(f"{name}.roi", roi if isinstance(roi, bytes) else roi.tobytes())
    return buffer.getvalue()


@given(LABELS)
@example(RING_IN_RING)
@example(PINCHED)
@example(np.arange(1, 601, dtype=np.int32).reshape(20, 30))
@example(np.array([[70_000, 0, 2**31 - 1]], np.int32))
def test_labels_written_and_read_again_are_equal(labels):
    data = imagej_rois.write(labels)
    assert data == imagej_rois.write(labels.copy())
    assert np.array_equal(labels_of(data, labels.shape), labels)
    rois = rois_of(data)
    assert list(rois) == sorted(rois)
    assert [int(name[:-4]) for name in rois] == np.unique(labels[labels > 0]).tolist()
    for name, roi in rois.items():
        # Independent reading: roifile's coordinates, and scikit-image's test of pixel centres.
        inside = np.zeros(labels.shape, bool)
        for ring in roi.coordinates(multi=True):
            inside ^= polygon2mask(labels.shape, ring[:, ::-1] - 0.5)
        assert np.array_equal(inside, labels == int(name[:-4]))
        assert roi.name == name[:-4]


@given(LABELS)
@example(RING_IN_RING)
@example(PINCHED)
def test_traced_rings_are_simple_closed_and_oriented(labels):
    for outline in pixel_outlines.trace(labels):
        areas = [[pixel_outlines.doubled_area(ring) for ring in polygon] for polygon in outline.polygons]
        assert all(exterior > 0 and all(hole < 0 for hole in holes) for exterior, *holes in areas)
        assert sum(map(sum, areas)) == 2 * np.count_nonzero(labels == outline.label)
        for ring in (ring for polygon in outline.polygons for ring in polygon):
            assert len(np.unique(ring, axis=0)) == len(ring) >= 4
            steps = np.roll(ring, -1, axis=0) - ring
            assert ((steps != 0).sum(axis=1) == 1).all()  # along one axis
            assert ((steps[:, 0] != 0) != (np.roll(steps, 1, axis=0)[:, 0] != 0)).all()  # only corners


def test_coordinates_beyond_16_bits():
    labels = np.zeros((3, 70_000), np.int32)
    labels[1, 32_760:32_780], labels[0, 65_530:65_540], labels[2, 69_990:], labels[2, 60_000] = 1, 2, 3, 4
    labels[:, 60_100:60_103], labels[1, 60_101] = 5, 0
    assert np.array_equal(labels_of(imagej_rois.write(labels), labels.shape), labels)


@given(numpy_st.arrays(np.float32, st.tuples(st.integers(3, 9), st.just(2)), elements=st.floats(-3, 14, width=32)))
def test_float_outlines_contain_the_pixels_whose_centre_is_inside(corners):
    corners = corners + np.float32(0.0137)  # no centre exactly on an edge, where libraries differ
    shape = (11, 9)
    roi = roifile.ImagejRoi.frompoints(corners)
    mask = masks(imagej_rois.read(roi.tobytes(), shape), shape)[0]
    rows, columns = np.indices(shape) + 0.5
    inside = points_in_poly(np.stack([columns.ravel(), rows.ravel()], axis=1), corners.astype(float))
    differing = np.argwhere(mask != inside.reshape(shape))
    edges = np.roll(corners, -1, axis=0).astype(float) - corners
    for row, column in differing:  # only centres within rounding of an edge may differ
        centre = np.array([column, row]) + 0.5 - corners
        length = np.maximum(np.hypot(*edges.T), 1e-9)
        assert (np.abs(edges[:, 0] * centre[:, 1] - edges[:, 1] * centre[:, 0]) / length).min() < 1e-4


def test_rules_of_imagej_for_each_kind_of_area():
    shape = (8, 8)
    polygon = roifile.ImagejRoi.frompoints

    def mask_of(roi):
        return masks(imagej_rois.read(roi if isinstance(roi, bytes) else roi.tobytes(), shape), shape)[0]

    # Both triangles of a square have the centres of its diagonal on their border: inside the left one, at its right.
    left, right = mask_of(polygon([[0, 0], [4, 0], [0, 4]])), mask_of(polygon([[4, 0], [4, 4], [0, 4]]))
    assert left.sum() == 10
    assert right.sum() == 6
    assert not (left & right).any()
    rectangle = roifile.ImagejRoi(roitype=roifile.ROI_TYPE.RECT, left=-2, top=6, right=3, bottom=12)
    assert np.argwhere(mask_of(rectangle)).tolist() == [[y, x] for y in (6, 7) for x in (0, 1, 2)]
    oval = roifile.ImagejRoi(roitype=roifile.ROI_TYPE.OVAL, left=1, top=1, right=5, bottom=5)
    assert mask_of(oval)[1:5, 1:5].tolist() == [[0, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 0]]
    # A figure eight is filled by the even-odd rule, its twice enclosed part is outside.
    twice = polygon([[0, 0], [6, 0], [6, 6], [2, 6], [2, 2], [4, 2], [4, 4], [0, 4]])
    assert mask_of(twice)[2:4].astype(int).tolist() == [[1, 1, 0, 0, 1, 1, 0, 0]] * 2
    # A composite of a circle of radius 4 as four Bezier curves: the pixels of an oval.
    k = 4 * 0.5522848
    arcs = [0, 4, 0, 3, 4 + k, 0, 8, 4 - k, 8, 4, 3, 8, 4 + k, 4 + k, 8, 4, 8, 3, 4 - k, 8, 0, 4 + k, 0, 4]
    arcs += [3, 0, 4 - k, 4 - k, 0, 4, 0, 4]
    circle = roifile.ImagejRoi(roitype=roifile.ROI_TYPE.RECT, right=8, bottom=8, shape_roi_size=len(arcs))
    circle.multi_coordinates = np.array(arcs, np.float32)
    oval = roifile.ImagejRoi(roitype=roifile.ROI_TYPE.OVAL, right=8, bottom=8)
    assert np.array_equal(mask_of(circle), mask_of(oval))
    # An ellipse and a rotated rectangle are stored as an axis and a width; their integer corners are not used.
    for subtype, parameter in ((roifile.ROI_SUBTYPE.ELLIPSE, 1.0), (roifile.ROI_SUBTYPE.ROTATED_RECT, 8.0)):
        roi = polygon([[0, 0], [1, 0], [1, 1]])
        roi.roitype, roi.subtype = roifile.ROI_TYPE.FREEHAND, subtype
        roi.x1, roi.y1, roi.x2, roi.y2 = 0, 4, 8, 4
        data = roi.tobytes()
        mask = mask_of(data[:52] + struct.pack(">f", parameter) + data[56:])
        assert mask.sum() == {1.0: mask_of(oval).sum(), 8.0: 64}[parameter]


def test_rois_without_area_and_overlaps_are_listed_by_name():
    polygon = roifile.ImagejRoi.frompoints
    point = polygon([[1.5, 1.5]])
    point.roitype = roifile.ROI_TYPE.POINT
    line = roifile.ImagejRoi(roitype=roifile.ROI_TYPE.LINE, x2=5, y2=5)
    small, large = (polygon([[1, 1], [n, 1], [n, n], [1, n]]) for n in (3, 6))
    away = polygon([[90, 90], [95, 90], [95, 95]])
    data = zip_of(small=small, p=point, l=line, large=large, top=small, away=away)
    records = imagej_rois.read(data, (8, 8))
    assert [record.id for record in records] == [
        "small (covered by later ROIs)",
        "p (point, no area)",
        "l (line, no area)",
        "large",
        "top",
        "away (no pixel in the image)",
    ]
    assert [mask.sum() for mask in masks(records, (8, 8))] == [0, 0, 0, 21, 4, 0]


def test_a_single_roi_is_ignored_by_the_name_in_it():
    roi = roifile.ImagejRoi.frompoints([[1, 1], [5, 1], [5, 5]], name="debris")
    assert [(record.id, record.region) for record in imagej_rois.read(roi.tobytes(), (9, 9))] == [("debris", "")]
    assert [record.region for record in imagej_rois.read(roi.tobytes(), (9, 9), ignore=("Debris",))] == ["Debris"]


def test_what_cannot_be_read_exactly_is_refused(monkeypatch):
    polygon = roifile.ImagejRoi.frompoints([[1, 1], [5, 1], [5, 5]])
    spline = roifile.ImagejRoi.frompoints([[1, 1], [5, 1], [5, 5]])
    spline.options |= roifile.ROI_OPTIONS.SPLINE_FIT
    rounded = roifile.ImagejRoi(roitype=roifile.ROI_TYPE.RECT, right=5, bottom=5, rounded_rect_arc_size=3)
    second = roifile.ImagejRoi.frompoints([[1, 1], [5, 1], [5, 5]], position=1)
    third = roifile.ImagejRoi.frompoints([[1, 1], [5, 1], [5, 5]], position=2)
    infinite = roifile.ImagejRoi.frompoints([[1.0, 1], [5, 1], [5, 5]])
    infinite.subpixel_coordinates[0, 0] = np.inf
    cut = zip_of(a=polygon)
    for data, reason in (
        (zip_of(s=spline), "ROI s is a spline fit"),
        (zip_of(r=rounded), "ROI r is a rounded rectangle"),
        (zip_of(a=second, b=third), "2 slices of a stack"),
        (zip_of(a=polygon.tobytes()[:70]), "ROI a is damaged"),
        (infinite.tobytes(), "not a number of pixels"),
        (cut[: len(cut) // 2], "neither a RoiSet.zip nor a .roi"),
        (b"", "neither a RoiSet.zip nor a .roi"),
        (zip_of(a=b"").replace(b".roi", b".txt"), "contains no .roi file"),
    ):
        with pytest.raises(AnnotationError, match=reason):
            imagej_rois.read(data, (8, 8))
    assert len(imagej_rois.read(zip_of(a=polygon, b=second), (8, 8))) == 2
    monkeypatch.setattr(imagej_rois, "MAX_BYTES", 100)
    with pytest.raises(AnnotationError, match="cut the image into tiles"):
        imagej_rois.read(cut, (8, 8))
    # A header that understates the size: zipfile stops at the stated size and finds a wrong checksum.
    lying = cut.replace(len(polygon.tobytes()).to_bytes(4, "little"), (70).to_bytes(4, "little"))
    with pytest.raises(AnnotationError):
        imagej_rois.read(lying, (8, 8))
    monkeypatch.setattr(pixel_outlines, "MAX_WORK", 100)
    with pytest.raises(AnnotationError, match="cover the image many times"):
        pixel_outlines.fill([[np.array([[0, 0], [0, 99], [99, 99]])]], (99, 99), pixel_outlines.Budget(100))


@given(st.data())
def test_damaged_bytes_end_in_an_annotation_error(data):
    content = bytearray(imagej_rois.write(np.array([[1, 0], [2, 2]])))
    roi = bytearray(next(iter(rois_of(bytes(content)).values())).tobytes())
    for target in (content, roi):
        for _ in range(data.draw(st.integers(1, 4))):
            target[data.draw(st.integers(0, len(target) - 1))] = data.draw(st.integers(0, 255))
        with contextlib.suppress(AnnotationError):
            assert len(imagej_rois.read(bytes(target), (5, 5))) <= 2


def test_real_annotations_agree_with_their_label_images():
    folder = SHARED / "usiigaci-mini"
    if not folder.is_dir():
        pytest.skip(f"no real ROIs at {folder}: set RAYLIVECELL_SHARED to the folder that contains usiigaci-mini")
    agreement = []
    for path in sorted((folder / "rois").glob("*.zip")):
        truth = np.array(Image.open(folder / "masks" / f"{path.stem}.png")).astype(int)
        records = imagej_rois.read(path.read_bytes(), truth.shape)
        labels = np.zeros(truth.shape, int)
        for number, mask in enumerate(masks(records, truth.shape), 1):
            assert not labels[mask].any()
            labels[mask] = number
        pairs, counts = np.unique(truth * 1000 + labels, return_counts=True)
        shared = {divmod(pair, 1000): n for pair, n in zip(pairs.tolist(), counts.tolist())}
        true_areas, areas = np.bincount(truth.ravel()), np.bincount(labels.ravel())
        best: dict[int, float] = {}
        for (t, p), n in ((pair, n) for pair, n in shared.items() if all(pair)):
            best[t] = max(best.get(t, 0.0), n / (true_areas[t] + areas[p] - n))
        assert len(best) == truth.max() == len(records)
        agreement += best.values()
        written = imagej_rois.read(imagej_rois.write(truth), truth.shape)
        runs = label_runs(truth)
        assert [int(record.id) for record in written] == list(runs)
        assert all(np.array_equal(record.runs[0][1], runs[int(record.id)]) for record in written)
    assert len(agreement) == 645
    # Below 1 because these label images test another point of each pixel: see `imagej_rois.read`.
    assert min(agreement) > 0.94
    assert np.median(agreement) > 0.988
