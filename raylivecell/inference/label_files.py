"""Label images of any tool, for `evaluate --labels`: find the file of each image of a split, and decode it.

1. `find`   by name: NAME.tif, NAME_cp_masks.png, ... for NAME, in any subfolder
2. `read`   integers of one file, with its checksum
"""

import hashlib
import posixpath
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from raylivecell.annotations import label_images
from raylivecell.annotations.errors import AnnotationError
from raylivecell.core import storage
from raylivecell.core.errors import UserError
from raylivecell.data.image_names import folded
from raylivecell.data.listing import list_infos
from raylivecell.data.pairing import NAME_SUFFIXES
from raylivecell.images import planes
from raylivecell.scoring.coco_results import Image

_FILE_SUFFIX = re.compile(r"(\.ome)?\.(tiff?|png|jpe?g|bmp|npy)$")
SHOWN = 3
"""Maximum names listed in a message."""


class LabelFile(NamedTuple):
    """A decoded label image."""

    labels: NDArray[np.int32]
    """(H, W), 1 to N in ascending order of the stored labels, 0 background."""
    sha256: str
    """Checksum of the file."""
    warnings: tuple[str, ...]


def find(folder: str, images: Sequence[Image]) -> list[str]:
    """Return the path in `folder` of the label image of each image.

    A file belongs to an image of the same name, ignoring case, file types and one suffix such as _cp_masks, _masks or
    _labels (`NAME_SUFFIXES`). With such a suffix it precedes one without, which may be a copy of the image. Among files
    of one name, that with the most equal folders before it is chosen.

    Raises:
        UserError: no such folder, no label image of an image, several, or one of several images.
    """
    by_name: dict[str, list[str]] = defaultdict(list)
    by_stem: dict[str, list[str]] = defaultdict(list)  # without a suffix such as _masks
    for path in sorted(list_infos(folder)):
        if path.lower().endswith(label_images.SUFFIXES):
            name = _name(path)
            by_name[name].append(path)
            if (stem := NAME_SUFFIXES.sub("", name)) != name:
                by_stem[stem].append(path)
    matches = [_match(image, by_stem, by_name) for image in images]
    missing = [image.source for image, paths in zip(images, matches) if not paths]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(images)} images have no label image in {folder}: {_listed(missing)}; name the "
            "files like the images, such as NAME.tif or NAME_cp_masks.png, with an empty one for an image without cells"
        )
    for image, paths in zip(images, matches):
        if len(paths) > 1:
            raise UserError(
                f"{folder} has several label images of {image.source}: {_listed(paths)}; "
                "keep one of them, or give the folder of the label images alone"
            )
    owners: dict[str, str] = {}
    for image, (path,) in zip(images, matches):
        if path in owners:
            raise UserError(
                f"{path} in {folder} is the label image of both {owners[path]} and {image.source}; put the files into "
                "the folders of the images"
            )
        owners[path] = image.source
    return [path for (path,) in matches]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _name(path: str) -> str:
    """Name of a file without folders, types of files, and case."""
    name = folded(posixpath.basename(path))
    while (stem := _FILE_SUFFIX.sub("", name)) != name:
        name = stem
    return name


def _match(image: Image, *paths_by_name: Mapping[str, list[str]]) -> list[str]:
    """Return the files that match an image equally well, from the first mapping that contains its name."""
    for source in dict.fromkeys((image.source, image.file_name)):
        file, plane = planes.split_address(source)
        name = f"{_name(file)}_{folded(plane)}" if plane else _name(file)  # as `predict` names the labels of a plane
        paths = next((by_name[name] for by_name in paths_by_name if name in by_name), [])
        ranks = [_equal_folders(path, source) for path in paths]
        if paths:
            return [path for path, rank in zip(paths, ranks) if rank == max(ranks)]
    return []


def _equal_folders(path: str, source: str) -> int:
    """Number of equal folders directly before the names of two files."""
    count = 0
    for a, b in zip(reversed(folded(path).split("/")[:-1]), reversed(folded(source).split("/")[:-1])):
        if a != b:
            break
        count += 1
    return count


def read(uri: str, size: tuple[int, int]) -> LabelFile:
    """Decode the label image at `uri`.

    Args:
        uri: TIFF, PNG or NPY.
        size: (H, W) of its image.

    Raises:
        UserError: damaged, unsupported, not integers, or of another size.
    """
    return decode(storage.read_bytes(uri), size, uri)


def decode(data: bytes, size: tuple[int, int], name: str) -> LabelFile:
    """Decode a label image, as `read`; `name` is that of the file in an error."""
    try:
        stored = label_images.to_integers(label_images.decode(data))
    except AnnotationError as error:
        raise UserError(f"{name}: {error}") from error
    if stored.shape != size:
        raise UserError(
            f"{name} is {stored.shape[1]} x {stored.shape[0]}, its image {size[1]} x {size[0]}; save the labels in the "
            "size of the image"
        )
    values, numbers = np.unique(stored, return_inverse=True)
    labels = numbers.reshape(size) + (values[0] != 0)
    return LabelFile(labels.astype(np.int32), hashlib.sha256(data).hexdigest(), tuple(_warnings(labels)))


def _warnings(labels: NDArray[Any]) -> list[str]:
    if labels.max(initial=0) != 1:
        return []
    pieces = cv2.connectedComponents((labels != 0).astype(np.uint8), connectivity=8)[0] - 1
    return [f"label image with one cell in several pieces, a binary mask?: {pieces} pieces"] if pieces > 1 else []
