"""Access to the rows of a split by index, and validation of dataset.json."""

import hashlib
import json
import pickle
from pathlib import Path

import pytest
from conftest import write_tiny_dataset
from hypothesis import given
from hypothesis import strategies as st

from raylivecell.core.errors import UserError
from raylivecell.data import shards


@given(st.lists(st.integers(0, 5), max_size=8))
def test_rows_are_in_the_order_of_the_shards(counts: list[int]) -> None:
    rows = shards.Rows.of((f"s{i}", count) for i, count in enumerate(counts))
    expected = [shards.Row(f"s{shard}", group) for shard, count in enumerate(counts) for group in range(count)]
    assert list(rows) == expected
    assert len(rows) == len(expected)
    assert rows[1:3] == expected[1:3]
    for outside in (len(rows), -1):
        with pytest.raises(IndexError, match=f"sample {outside} of {len(rows)}"):
            rows[outside]


def test_rows_of_ten_million_samples_are_pickled_without_a_copy() -> None:
    rows = shards.Rows.of((f"s3://bucket/data/train/part-{i:05d}.parquet", 64) for i in range(10**7 // 64))
    buffers: list[pickle.PickleBuffer] = []
    assert len(pickle.dumps(rows, protocol=5, buffer_callback=buffers.append)) < 1000
    assert sum(buffer.raw().nbytes for buffer in buffers) < 10 * 2**20


@pytest.mark.parametrize("sizes", [[[0, 5]], [["a", 1]], [[1]], [[1, 2**18]], [3], None, [[1.5, 2]]])
def test_impossible_image_sizes_are_refused(sizes: object, tmp_path: Path) -> None:
    data = Path(write_tiny_dataset(tmp_path, images=1))
    description = json.loads((data / "dataset.json").read_text())
    description["splits"]["train"]["sizes"] = sizes
    (data / "dataset.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match=r"dataset\.json is not what"):
        shards.image_sizes(str(data), "train")


def test_an_overwritten_shard_is_read_again(tmp_path: Path) -> None:
    """In one process, as in a notebook: `prepare --overwrite`, then training."""
    images = []
    for size in (48, 40):
        data = write_tiny_dataset(tmp_path, images=1, size=size)
        description = json.loads((tmp_path / "dataset.json").read_text())
        for split in description["splits"].values():
            for shard in split["shards"]:
                shard["sha256"] = hashlib.sha256((tmp_path / shard["file"]).read_bytes()).hexdigest()
        (tmp_path / "dataset.json").write_text(json.dumps(description))
        images.append(shards.read_row(shards.list_rows(data, "train")[0], ["image"])["image"])
    assert [image.shape for image in images] == [(48, 48), (40, 40)]
