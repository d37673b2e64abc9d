"""Pairing of images with annotation files, by the names of files and folders."""

import pytest

from raylivecell.core.errors import UserError
from raylivecell.data.pairing import Pair, find_format, find_pairs, short_name

LAYOUTS: list[tuple[str, str, str]] = [
    ("images/a.tif", "masks/a.png", "labels"),
    ("Images/A.TIF", "Masks/a.Png", "labels"),
    ("imgs/a.tif", "labels/a_mask.tif", "labels"),
    ("img/a.ome.tif", "gt/a.tif", "labels"),
    ("raw/a.tif", "ground_truth/a.npy", "labels"),
    ("train/images/a.tif", "train/masks/a.png", "labels"),
    ("images/train/a.tif", "masks/train/a.png", "labels"),
    ("train_images/a.tif", "train_masks/a.png", "labels"),
    ("set/valid/img/a.tif", "set/valid/annotations/a_labels.png", "labels"),
    ("a.tif", "masks/a.png", "labels"),
    ("well 1/a.tif", "well 1/a_masks.tif", "labels"),
    ("a.tif", "a_mask.png", "labels"),
    ("a.tif", "a_labels.tif", "labels"),
    ("images/a.tif", "images/a_cp_masks.png", "labels"),
    ("a.jpg", "a_seg.npy", "labels"),
    ("a.tif", "a-mask.png", "labels"),
    ("images/a.czi", "masks/a.tif", "labels"),
    ("images/a.tif", "rois/a.zip", "rois"),
    ("a.tif", "a.zip", "rois"),
    ("a.tif", "a_RoiSet.zip", "rois"),
    ("a.tif", "a_rois.zip", "rois"),
    ("a.tif", "a.roi", "rois"),
    ("a.tif", "a.geojson", "geojson"),
    ("a.tif", "a.tif.geojson", "geojson"),
    ("images/a.png", "annotations/a.geojson", "geojson"),
]


@pytest.mark.parametrize(("image", "annotation", "annotation_format"), LAYOUTS)
def test_layouts(image: str, annotation: str, annotation_format: str) -> None:
    paths = [image, annotation, "README.md", "notes.txt"]
    pairing = find_pairs(paths, annotation_format)
    assert pairing.pairs == [Pair(image, (annotation,), False)]
    assert pairing.ambiguous + pairing.images + pairing.annotations == []
    assert find_format(paths, "auto", False, None, "set") == annotation_format


@pytest.mark.parametrize(("images", "masks"), [("{0}/images/{0}.png", "{0}/masks/"), ("images/{0}.png", "masks/{0}/")])
def test_one_mask_per_cell(images: str, masks: str) -> None:
    names = ("stage1_train/0ab", "stage1_train/1cd")
    if not images.startswith("{"):
        names = ("0ab", "1cd")
    paths = [images.replace("/{0}.", "/{1}.").format(name, name.rpartition("/")[2]) for name in names]
    files = [masks.format(name) + f"{cell}.png" for name in names for cell in ("e1", "f2")]
    pairing = find_pairs([*files, *paths], "labels")
    assert pairing.pairs == [Pair(paths[0], tuple(files[:2]), True), Pair(paths[1], tuple(files[2:]), True)]
    assert pairing.ambiguous + pairing.images + pairing.annotations == []


def test_images_and_annotation_files_without_a_partner() -> None:
    paths = ["images/a.tif", "images/b.tif", "masks/b.png", "masks/c.png", "test/images/d.tif", "train/masks/d.png"]
    pairing = find_pairs(paths, "labels")
    assert pairing.pairs == [Pair("images/b.tif", ("masks/b.png",), False)]
    assert pairing.images == ["images/a.tif", "test/images/d.tif"]
    assert pairing.annotations == ["masks/c.png", "train/masks/d.png"]
    # The masks of another image in a folder named like the first image.
    paths = ["A/images/A.tif", "A/images/B.tif", "A/masks/B_final.png", "A/masks/C_final.png"]
    pairing = find_pairs(paths, "labels")
    assert (pairing.pairs, pairing.images, pairing.annotations) == ([], paths[:2], paths[2:])
    # A file of another name is never taken for the mask of a cell.
    pairing = find_pairs(["images/a.tif", "masks/other.png"], "labels")
    assert (pairing.pairs, pairing.images, pairing.annotations) == ([], ["images/a.tif"], ["masks/other.png"])


def test_several_files_for_one_image_are_ambiguous() -> None:
    assert find_pairs(["a.tif", "a_mask.png", "a_labels.png"], "labels").ambiguous == [
        (("a.tif",), ("a_labels.png", "a_mask.png"))
    ]
    assert find_pairs(["images/a.tif", "images/a.png", "masks/a.png"], "labels").ambiguous == [
        (("images/a.png", "images/a.tif"), ("masks/a.png",))
    ]
    # Cellpose writes both.
    pairing = find_pairs(["a.tif", "a_cp_masks.png", "a_seg.npy"], "labels")
    assert pairing.pairs == [Pair("a.tif", ("a_cp_masks.png",), False)]
    # An image whose name ends like that of a mask.
    pairing = find_pairs(["images/a.tif", "images/b_seg.tif", "masks/a.png", "masks/b_seg.png"], "labels")
    assert [pair.annotations for pair in pairing.pairs] == [("masks/a.png",), ("masks/b_seg.png",)]
    # Equal names have precedence over names with a suffix, but a copy of a mask remains a mask.
    paths = ["images/b.tif", "images/b_seg.tif", "masks/b.tif", "masks/b_seg.tif"]
    assert find_pairs(paths, "labels").pairs == [Pair(paths[n], (paths[n + 2],), False) for n in (0, 1)]
    paths = ["images/b.tif", "images/b_seg.tif", "masks/b_seg.tif"]
    assert find_pairs(paths, "labels").ambiguous == [((paths[0],), (paths[1], paths[2]))]


def test_detection_of_the_format() -> None:
    both = ["images/a.tif", "masks/a.png", "rois/a.zip"]
    with pytest.raises(UserError, match=r"labels \(1 images\) and rois \(1 images\); choose with --format labels or"):
        find_format(both, "auto", False, None, "set")
    assert find_format(both, "rois", False, None, "set") == "rois"
    assert find_format(both, "auto", True, None, "set") == "coco"
    assert find_format(["images/a.tif", "masks/b.png"], "auto", False, None, "set") == "labels"
    assert find_format(["a.tif", "a.json"], "auto", False, None, "set") == "coco"
    # Also for folders of images with any name.
    frames = ["frames/x/a.tif", "masks/x/a.png"]
    assert find_pairs(frames, "labels").pairs == []
    assert find_pairs(frames, "labels", "frames/").pairs == [Pair(frames[0], (frames[1],), False)]
    assert (short_name("train/images/a.tif"), short_name(frames[0], "frames")) == ("train/a.tif", "x/a.tif")
