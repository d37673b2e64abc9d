"""LIVECell's layout for a synthetic frame: its cell line, split, name, ids, path and JSON entry."""

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from raylivecell.core import storage
from raylivecell.synthetic.cell_shapes import HEIGHT, KINDS, WIDTH, Bytes

SPLITS = ("train", "val", "test")
# Each cell line gets 11 train, 2 val and 5 test of every 18 frames (61, 11, 28 %; LIVECell: 62, 11, 27). Frames 0, 1
# and 2 are one of each, and the first n frames deviate from these fractions by at most 1.8 frames for every n.
_SPLIT_CYCLE = "rtrrvrtrrtrrtrvrrt"
_SPLIT_STARTS = (3, 14, 6, 5, 10, 1, 0, 11)
_LETTER_SPLIT = {"r": "train", "v": "val", "t": "test"}
_WELLS, _FIELDS, _SITES, _HOURS = 96, 2, 4, 4
# Images and annotations share one id range, as in LIVECell; the step leaves ids for a frame's cells and, from +1000,
# those of a copy.
_FIRST_ID, _ID_STEP = 90_001, 2003


@dataclass(frozen=True)
class Frame:
    """One frame to draw: all that a worker needs, in a few bytes."""

    out: str
    seed: int
    index: int

    @property
    def kind(self) -> int:
        """Index in `KINDS`, which are cycled through in an order drawn from the seed."""
        return int(np.random.default_rng((self.seed, 0)).permutation(len(KINDS))[self.index % len(KINDS)])

    @property
    def split(self) -> str:
        """`train`, `val` or `test`."""
        turn, slot = divmod(self.index, len(KINDS))
        return _LETTER_SPLIT[_SPLIT_CYCLE[(turn + _SPLIT_STARTS[slot]) % len(_SPLIT_CYCLE)]]

    @property
    def image_id(self) -> int:
        """The id in the JSON; the ids that follow are its cells'."""
        return _FIRST_ID + _ID_STEP * self.index

    @property
    def file_name(self) -> str:
        """`<Type>_Phase_<well>_<field>_<time>_<site>.tif`, unique in a dataset."""
        return file_name(self.seed, self.kind, self.index // len(KINDS))

    @property
    def path(self) -> str:
        """Path of its TIFF."""
        return image_path(self.out, self.split, self.file_name)


def file_name(seed: int, kind: int, number: int) -> str:
    """Name of the `number`-th frame of a cell line: wells, fields, hours and sites in an order set by the seed."""
    hours = 120 // _HOURS
    count = _WELLS * _FIELDS * hours * _SITES
    # 9049 is coprime to `count`, so this visits every name once; frames beyond `count` get later days.
    code = (number * 9049 + kind * 2311 + seed % count) % count
    code, site = divmod(code, _SITES)
    code, field = divmod(code, _FIELDS)
    well, hour = divmod(code, hours)
    day, hour = divmod(hour * _HOURS, 24)
    row, column = divmod(well, 12)
    day += 5 * (number // count)
    return f"{KINDS[kind].name}_Phase_{'ABCDEFGH'[row]}{column + 1}_{field + 1}_{day:02d}d{hour:02d}h00m_{site + 1}.tif"


def image_path(out: str, split: str, name: str) -> str:
    """Path of an image of `split` in LIVECell's layout."""
    return storage.join(out, "images", f"livecell_{'test' if split == 'test' else 'train_val'}_images", name)


def json_path(out: str, split: str) -> str:
    """Path of the annotations of `split` in LIVECell's layout."""
    return storage.join(out, "annotations", "LIVECell", f"livecell_coco_{split}.json")


def encode_tiff(image: Bytes) -> bytes:
    """Encode as TIFF with LZW and horizontal differencing, like LIVECell's files."""
    options = [cv2.IMWRITE_TIFF_COMPRESSION, cv2.IMWRITE_TIFF_COMPRESSION_LZW, cv2.IMWRITE_TIFF_PREDICTOR, 2]
    is_encoded, data = cv2.imencode(".tif", image, options)
    if not is_encoded:
        raise RuntimeError("OpenCV could not encode a TIFF")
    return bytes(data)


def image_entry(image_id: int, name: str) -> dict[str, Any]:
    """An entry of the JSON's `images`."""
    return {
        "id": image_id,
        "width": WIDTH,
        "height": HEIGHT,
        "file_name": name,
        "original_filename": name.replace(".tif", ".png"),
        "url": "",
    }
