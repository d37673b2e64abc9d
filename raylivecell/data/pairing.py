"""Pair each image with its annotation files, by the names of files and folders, for formats with files per image.

An annotation file belongs to the image with the same folder and the same name, compared ignoring case, after removing:

- folders named after their content: `images`, `masks`, `rois`, `train_images`, ... (`IMAGE_WORDS`, `ANNOTATION_WORDS`);
  names of splits remain, so that `train/images/a.tif` belongs to `train/masks/a.png`
- the suffixes of file types, and of annotation files: `a_cp_masks.png` belongs to `a.tif` (`NAME_SUFFIXES`)

The masks of single cells (DSB 2018) are in a folder named after the image: `ID/images/ID.png` and `ID/masks/*.png`, or
`images/ID.png` and `masks/ID/*.png`.
"""

import itertools
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from raylivecell.core.errors import UserError
from raylivecell.data.image_names import SPLIT_WORDS, folded, splits_of_folder
from raylivecell.images import formats

Format = Literal["coco", "labels", "rois", "geojson", "images"]
FILE_SUFFIXES: dict[str, tuple[str, ...]] = {
    "labels": (".tif", ".tiff", ".png", ".npy"),
    "rois": (".zip", ".roi"),
    "geojson": (".geojson",),
}
"""Suffixes of annotation files by format; COCO has one file for many images, `images` none."""
OTHER_SUFFIXES = (".jpg", ".jpeg", ".bmp")
"""Suffixes of images that cannot be label images; named like label images they are reported as unreadable."""
IMAGE_WORDS = {"image", "images", "img", "imgs", "raw"}
ANNOTATION_WORDS = {
    *("mask", "masks", "label", "labels", "annotation", "annotations", "gt", "groundtruth", "seg", "segmentation"),
    *("segmentations", "roi", "rois", "geojson"),
}
OTHER_WORDS = {*SPLIT_WORDS, "cp"}
"""Words that may occur next to those in the name of such a folder; those of a split remain in it."""
NAME_SUFFIXES = re.compile(r"[_-](cp[_-]masks?|masks?|labels?|seg|gt|rois?|roiset)$")
_FILE_SUFFIXES = {*formats.SUFFIXES, *itertools.chain(*FILE_SUFFIXES.values())}
_FILE_SUFFIX = re.compile(rf"(\.ome)?({'|'.join(map(re.escape, sorted(_FILE_SUFFIXES)))})$")


class Key(NamedTuple):
    """What an image and its annotation file have in common: folder and name, normalised."""

    folder: str
    name: str


class File(NamedTuple):
    """A file and what its path says about its content."""

    path: str
    role: str
    """`image` or `annotation`, by the deepest folder with a role; "" without one."""
    key: Key


@dataclass(frozen=True)
class Pair:
    """One image and its annotation files."""

    image: str
    """Relative to the source."""
    annotations: tuple[str, ...]
    cell_masks: bool
    """Whether each annotation file is the mask of one cell."""


@dataclass
class Pairing:
    """Result of `find_pairs`."""

    pairs: list[Pair] = field(default_factory=list)
    ambiguous: list[tuple[tuple[str, ...], tuple[str, ...]]] = field(default_factory=list)
    """(images, annotation files) that share one name."""
    images: list[str] = field(default_factory=list)
    """Images without an annotation file."""
    annotations: list[str] = field(default_factory=list)
    """Annotation files without an image."""


def find_pairs(paths: Sequence[str], annotation_format: str, image_folder: str | None = None) -> Pairing:
    """Pair the images in `paths` with their annotation files of one format.

    Args:
        paths: files of the source, with forward slashes.
        annotation_format: key of `FILE_SUFFIXES`; with any other every image is without an annotation file.
        image_folder: folder of the images; default: by the names of folders.
    """
    prefix = _prefix(image_folder)
    files = [_file(path, prefix) for path in sorted(paths)]
    images, annotations = _by_content(files, annotation_format, prefix)
    images_by_key: dict[Key, list[str]] = defaultdict(list)
    for image in images:
        images_by_key[image.key].append(image.path)
    by_image: dict[Key, list[str]] = defaultdict(list)
    by_folder: dict[str, list[str]] = defaultdict(list)
    for file in annotations:
        key = file.key if file.key in images_by_key else _without_suffix(file.key)
        if key in images_by_key:
            by_image[key].append(file.path)
        else:
            by_folder[file.key.folder if file.role == "annotation" else ""].append(file.path)
    images_in_folder = Counter(key.folder for key in images_by_key)
    result = Pairing()
    for key, image_paths in images_by_key.items():
        masks_possible = annotation_format == "labels" and not by_image[key]
        paths_of_masks = _cell_masks(key, by_folder, images_in_folder[key.folder]) if masks_possible else []
        candidates = tuple(paths_of_masks or _without_pickles(by_image[key]))
        if candidates and (len(image_paths) > 1 or (len(candidates) > 1 and not paths_of_masks)):
            result.ambiguous.append((tuple(image_paths), candidates))
        elif candidates:
            result.pairs.append(Pair(image_paths[0], candidates, bool(paths_of_masks)))
        else:
            result.images += image_paths
    result.annotations += sorted(path for members in by_folder.values() for path in members)
    return result


def find_unlabelled(paths: Sequence[str], image_folder: str | None, uri: str) -> Pairing:
    """Find the images in `paths`, each as a pair without an annotation file.

    Args:
        paths: files of the source, with forward slashes. Those named like annotation files are left out.
        image_folder: as in `find_pairs`.
        uri: the source, for messages.

    Raises:
        UserError: no image, or images in folders named after val or test.
    """
    images = find_pairs(paths, "images", image_folder).images
    if not images:
        raise UserError(f"no image in {uri}; if the folder of the images is inside, set --images FOLDER")
    for path in images:
        if (splits := splits_of_folder(path)) and "train" not in splits:
            raise UserError(
                f"images without annotations are for training only, but {path} is in a folder named after another "
                "split; choose the folder of the others with --images FOLDER"
            )
    return Pairing([Pair(path, (), False) for path in images])


def _prefix(image_folder: str | None) -> str:
    return image_folder.strip("/") + "/" if image_folder and image_folder.strip("/.") else ""


def _file(path: str, prefix: str) -> File:
    in_images = bool(prefix) and path.startswith(prefix)
    parts = folded(path.removeprefix(prefix) if in_images else path).split("/")
    role, folders = "", []
    for part in parts[:-1]:
        part_role, rest = _role(part)
        role = part_role or role
        folders += [rest] if rest else []
    name = parts[-1]
    while (stem := _FILE_SUFFIX.sub("", name)) != name:  # QuPath: a.tif.geojson
        name = stem
    return File(path, "image" if in_images and role != "annotation" else role, Key("/".join(folders), name))


def _role(part: str) -> tuple[str, str]:
    """Return the role of a folder, and its name without the words of the role."""
    words = re.findall(r"[a-z]+|[^a-z]+", part.replace("ground_truth", "groundtruth"))
    names = [word for word in words if word.isalpha()]
    if any(word.strip(" _-") for word in words if not word.isalpha()):
        return "", part
    roles = IMAGE_WORDS | ANNOTATION_WORDS
    if not any(word in roles for word in names) or any(word not in roles | OTHER_WORDS for word in names):
        return "", part
    role = "annotation" if any(word in ANNOTATION_WORDS for word in names) else "image"
    return role, "_".join(word for word in names if word in SPLIT_WORDS)


def _by_content(files: Sequence[File], annotation_format: str, prefix: str) -> tuple[list[File], list[File]]:
    """Separate images from annotation files of one format."""
    suffixes = FILE_SUFFIXES.get(annotation_format, ()) + (OTHER_SUFFIXES if annotation_format == "labels" else ())
    all_paths = {(posixpath.dirname(file.path), file.key.name) for file in files if _is_image(file, prefix)}
    image_keys = {file.key for file in files if _is_image(file, prefix)}
    annotation_keys = {file.key for file in files if file.role == "annotation"}
    images, annotations = [], []
    for file in files:
        without_suffix = _without_suffix(file.key)
        stripped = without_suffix.name
        # images/a.tif and images/a_seg.tif with masks of both names are two images.
        has_equal = file.key in annotation_keys and (
            without_suffix not in image_keys or without_suffix in annotation_keys
        )
        alongside = stripped != file.key.name and (posixpath.dirname(file.path), stripped) in all_paths
        has_suffix = alongside or (stripped != file.key.name and file.role != "image")
        is_annotation = file.role == "annotation" or (has_suffix and not has_equal)
        suffix = posixpath.splitext(file.path)[1].lower()
        if not is_annotation and _is_image(file, prefix):
            images.append(file)
        elif suffix in suffixes and (is_annotation or annotation_format != "labels"):
            annotations.append(file)
    return images, annotations


def _is_image(file: File, prefix: str) -> bool:
    return formats.is_image_name(file.path) and file.role != "annotation" and file.path.startswith(prefix)


def _without_suffix(key: Key) -> Key:
    return key._replace(name=NAME_SUFFIXES.sub("", key.name))


def _without_pickles(paths: list[str]) -> list[str]:
    """Leave out Cellpose's NAME_seg.npy if there is another file of the image."""
    others = [path for path in paths if not path.lower().endswith("_seg.npy")]
    return others or paths


def _cell_masks(key: Key, by_folder: dict[str, list[str]], images_in_folder: int) -> list[str]:
    """Remove and return the masks of single cells of the image `key`, one of `images_in_folder` in its folder."""
    own_folder = posixpath.join(key.folder, key.name)
    is_only_image = posixpath.basename(key.folder) == key.name and images_in_folder == 1
    folder = key.folder if is_only_image else own_folder
    return by_folder.pop(folder, [])


def find_format(paths: Sequence[str], requested: str, has_coco: bool, image_folder: str | None, uri: str) -> Format:
    """Return the format of a source: the only one with a pair of image and annotation file, otherwise `coco`.

    Without any pair and JSON file, it is the format of most annotation files: their names are wrong.

    Args:
        paths: files of the source.
        requested: a format, or `auto`.
        has_coco: whether there are COCO files, which have precedence.
        image_folder: folder of the images, if set.
        uri: the source, for messages.

    Raises:
        UserError: several formats.
    """
    if requested != "auto":
        return requested  # type: ignore[return-value]  # a Literal of PrepareConfig
    if has_coco:
        return "coco"
    pairings = {name: find_pairs(paths, name, image_folder) for name in FILE_SUFFIXES}
    counts = {name: len(pairing.pairs) + len(pairing.ambiguous) for name, pairing in pairings.items()}
    present = [name for name, count in counts.items() if count]
    if len(present) > 1:
        names = " and ".join(f"{name} ({counts[name]} images)" for name in present)
        raise UserError(f"{uri} has annotations as {names}; choose with --format {' or --format '.join(present)}")
    if not present and not any(path.lower().endswith(".json") for path in paths):
        present = sorted(FILE_SUFFIXES, key=lambda name: -len(pairings[name].annotations))[:1]
        present = present if pairings[present[0]].annotations else []
    return present[0] if present else "coco"  # type: ignore[return-value]  # a key of FILE_SUFFIXES


def short_name(path: str, image_folder: str | None = None) -> str:
    """Return the path of an image without folders named after images: `train/a.tif` for `train/images/a.tif`."""
    prefix = _prefix(image_folder)
    *folders, name = (path.removeprefix(prefix) if prefix else path).split("/")
    return "/".join([*(part for part in folders if _role(folded(part)) != ("image", "")), name])


def check_ignore(pairing: Pairing, annotation_format: str, ignore: Sequence[str]) -> None:
    """UserError if label images are to be ignored by a name, or masks of single cells by a label."""
    if not ignore or annotation_format != "labels":
        return
    if any(pair.cell_masks for pair in pairing.pairs):
        raise UserError("--ignore is not for masks of single cells: use label images, ROIs, GeoJSON or COCO files")
    if wrong := [word for word in ignore if not re.fullmatch(r"-?[0-9]{1,18}", word)]:
        raise UserError(f"--ignore {wrong[0]}: label images have no names; give the label, such as --ignore 255")
