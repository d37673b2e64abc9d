"""Where a synthetic frame stands in LIVECell's layout: its kind, split, name, ids, place and entry in the JSON."""

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from raylivecell.core import storage
from raylivecell.synthetic.cell_shapes import HEIGHT, KINDS, WIDTH, Bytes

SPLITS = ("train", "val", "test")
# Dealt so that each kind gets 11 train, 2 val and 5 test of every 18 frames (61, 11, 28 %; LIVECell: 62, 11, 27), that
# frames 0, 1 and 2 are one of each, and that no first n frames are more than 1.8 frames off those shares.
_DEAL = "rtrrvrtrrtrrtrvrrt"
_DEAL_STARTS = (3, 14, 6, 5, 10, 1, 0, 11)
_LETTER_SPLIT = {"r": "train", "v": "val", "t": "test"}
_WELLS, _FIELDS, _PLACES, _HOURS = 96, 2, 4, 4
# One number space for images and annotations, as LIVECell's; the gap holds a frame's cells and, from +1000, a copy's.
_FIRST_ID, _ID_STEP = 90_001, 2003


@dataclass(frozen=True)
class Frame:
    """One frame to be drawn: everything a worker needs, a few bytes to send."""

    out: str
    seed: int
    index: int

    @property
    def kind(self) -> int:
        """Its place in `KINDS`; the turns' order is the seed's."""
        return int(np.random.default_rng((self.seed, 0)).permutation(len(KINDS))[self.index % len(KINDS)])

    @property
    def split(self) -> str:
        """`train`, `val` or `test`."""
        turn, slot = divmod(self.index, len(KINDS))
        return _LETTER_SPLIT[_DEAL[(turn + _DEAL_STARTS[slot]) % len(_DEAL)]]

    @property
    def image_id(self) -> int:
        """The id in the JSON; its cells take the ids that follow."""
        return _FIRST_ID + _ID_STEP * self.index

    @property
    def file_name(self) -> str:
        """`<Type>_Phase_<well>_<field>_<time>_<place>.tif`, unique in a dataset."""
        return file_name(self.seed, self.kind, self.index // len(KINDS))

    @property
    def path(self) -> str:
        """Where its TIFF lies."""
        return image_path(self.out, self.split, self.file_name)


def file_name(seed: int, kind: int, number: int) -> str:
    """The name of the `number`-th frame of a kind: wells, fields, hours and places in an order drawn from the seed."""
    hours = 120 // _HOURS
    count = _WELLS * _FIELDS * hours * _PLACES
    # 9049 is prime to `count`, so this visits every name once; frames beyond `count` go on to later days.
    code = (number * 9049 + kind * 2311 + seed % count) % count
    code, place = divmod(code, _PLACES)
    code, field = divmod(code, _FIELDS)
    well, hour = divmod(code, hours)
    day, hour = divmod(hour * _HOURS, 24)
    row, column = divmod(well, 12)
    day += 5 * (number // count)
    return (
        f"{KINDS[kind].name}_Phase_{'ABCDEFGH'[row]}{column + 1}_{field + 1}_{day:02d}d{hour:02d}h00m_{place + 1}.tif"
    )


def image_path(out: str, split: str, name: str) -> str:
    """Where LIVECell's layout keeps an image of `split`."""
    return storage.join(out, "images", f"livecell_{'test' if split == 'test' else 'train_val'}_images", name)


def json_path(out: str, split: str) -> str:
    """Where LIVECell's layout keeps the annotations of `split`."""
    return storage.join(out, "annotations", "LIVECell", f"livecell_coco_{split}.json")


def encode_tiff(image: Bytes) -> bytes:
    """`image` as a TIFF file, LZW with horizontal differencing as LIVECell's."""
    options = [cv2.IMWRITE_TIFF_COMPRESSION, cv2.IMWRITE_TIFF_COMPRESSION_LZW, cv2.IMWRITE_TIFF_PREDICTOR, 2]
    done, data = cv2.imencode(".tif", image, options)
    if not done:
        raise RuntimeError("OpenCV could not encode a TIFF")
    return bytes(data)


def image_entry(image_id: int, name: str) -> dict[str, Any]:
    """An element of the JSON's `images`."""
    return {
        "id": image_id,
        "width": WIDTH,
        "height": HEIGHT,
        "file_name": name,
        "original_filename": name.replace(".tif", ".png"),
        "url": "",
    }
