"""Sources for the tests of `prepare`, and readers of its output."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from raylivecell.data import shards

HEIGHT, WIDTH = 48, 64
Json = dict[str, Any]


def square(x: float, y: float, side: float = 6) -> list[float]:
    return [x, y, x + side, y, x + side, y + side, x, y + side]


SQUARES = [square(4, 4), square(20, 4), square(40, 30), square(10, 30), square(25, 20), square(52, 6)]
N = len(SQUARES)


def pixels(seed: int, outlines: Sequence[list[float]] = SQUARES) -> np.ndarray:
    """Return uint8 (48, 64): grey 128 with noise, and a rough patch in the box of each outline."""
    rng = np.random.default_rng(seed)
    image = rng.integers(127, 130, (HEIGHT, WIDTH)).astype(np.uint8)
    for outline in outlines:
        x, y = np.clip(np.array(outline).reshape(-1, 2).astype(int), 0, (WIDTH, HEIGHT)).T
        window = image[y.min() : y.max(), x.min() : x.max()]
        window[:] = rng.integers(60, 200, window.shape)
    return image


class SourceFolder:
    """A source under construction: images and one JSON per split, in LIVECell's layout."""

    def __init__(self, root: Path) -> None:
        self.root, self.splits, self.number = root, dict[str, Json](), 0

    def file(self, name: str, image: np.ndarray, folder: str = "livecell_train_val_images") -> None:
        path = self.root / "images" / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), image)

    def entry(self, split: str, name: str, outlines: Sequence[Any] = SQUARES, **more: Any) -> int:
        data = self.splits.setdefault(split, {"info": {"description": "tests"}, "images": [], "annotations": []})
        self.number += 1
        image_id = 1000 * self.number
        data["images"].append({"id": image_id, "file_name": name, "width": WIDTH, "height": HEIGHT} | more)
        for number, outline in enumerate(outlines, image_id + 1):
            parts = outline if isinstance(outline, dict) else [outline]
            data["annotations"].append({"id": number, "image_id": image_id, "category_id": 1, "segmentation": parts})
        return image_id

    def image(self, split: str, name: str, outlines: Sequence[Any] = SQUARES, **more: Any) -> int:
        folder = "livecell_test_images" if split == "test" else "livecell_train_val_images"
        self.file(name, pixels(self.number), folder)
        return self.entry(split, name, outlines, **more)

    def write(self) -> str:
        for split, data in self.splits.items():
            path = self.root / "annotations" / "LIVECell" / f"livecell_coco_{split}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(data))
        return str(self.root)


def files_of(out: Path) -> dict[str, str]:
    """Return the checksum of every file under `out`, including hidden ones."""
    files = (path for path in out.rglob("*") if path.is_file())
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rows_of(out: Path | str, split: str) -> dict[str, Json]:
    columns = shards.SCHEMA.names
    rows = [shards.read_row(row, columns) for row in shards.list_rows(str(out), split)]
    return {row["file_name"]: row for row in rows}


def masks_of(row: Json) -> np.ndarray:
    """Decode the outlines of a row: bool (cells, H, W)."""
    assert len(row["outlines"]) == row["cells"]
    size = [row["height"], row["width"]]
    masks = [coco_mask.decode({"size": size, "counts": counts}) for counts in row["outlines"]]
    return np.array(masks, bool).reshape(-1, *size)


def defects_of(description: Json, defect: str) -> list[Json]:
    return [record for record in description["defects"]["found"] if record["defect"] == defect]


def counts(description: Json) -> dict[str, tuple[int, int]]:
    return {split: (totals["images"], totals["cells"]) for split, totals in description["splits"].items()}
