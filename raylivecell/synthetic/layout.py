"""LIVECell's layout for a synthetic image: its cell line, split, name, ids, path and JSON entry."""

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from raylivecell.core import storage
from raylivecell.synthetic.cell_shapes import HEIGHT, KINDS, WIDTH, Bytes

SPLITS = ("train", "val", "test")
# Of every 18 images of a cell line, 11 are train, 2 val and 5 test (61, 11, 28 %; LIVECell: 62, 11, 27). Images 0, 1
# and 2 are in different splits, and for every n the first n images deviate from these fractions by at most 1.8 images.
_SPLIT_CYCLE = "rtrrvrtrrtrrtrvrrt"
_SPLIT_STARTS = (3, 14, 6, 5, 10, 1, 0, 11)
_LETTER_SPLIT = {"r": "train", "v": "val", "t": "test"}
_WELLS, _FIELDS, _SITES, _HOURS = 96, 2, 4, 4
# Images and annotations share one id range, as in LIVECell; the step reserves ids for an image's cells and, from +1000,
# for those of a copy.
_FIRST_ID, _ID_STEP = 90_001, 2003


@dataclass(frozen=True)
class Frame:
    """One image to draw: the input of a worker, in a few bytes."""

    out: str
    seed: int
    index: int

    @property
    def kind(self) -> int:
        """Index in `KINDS`, which alternate in an order that depends on the seed."""
        return int(np.random.default_rng((self.seed, 0)).permutation(len(KINDS))[self.index % len(KINDS)])

    @property
    def split(self) -> str:
        """`train`, `val` or `test`."""
        turn, slot = divmod(self.index, len(KINDS))
        return _LETTER_SPLIT[_SPLIT_CYCLE[(turn + _SPLIT_STARTS[slot]) % len(_SPLIT_CYCLE)]]

    @property
    def image_id(self) -> int:
        """Id in the JSON; the next ids are those of its cells."""
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
    """Name of the `number`-th image of a cell line; the seed determines the order of wells, fields, hours and sites."""
    hours = 120 // _HOURS
    count = _WELLS * _FIELDS * hours * _SITES
    # 9049 is coprime to `count`, so this visits every name once; images beyond `count` have later days.
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
