"""The dataset on disk: `URI/{train,val,test}/*.parquet` and `URI/dataset.json`.

One row is one image. Pixel columns are raw bytes, compressed by Parquet with zstd: decoding 520 x 704 pixels takes 3 ms
from PNG, under 1 ms from zstd. Every row is a separate row group, so that single samples can be read in any order, as
the permutation of an epoch requires, from any store.
"""

import functools
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raylivecell.annotations import rle
from raylivecell.core import storage
from raylivecell.core.errors import UserError
from raylivecell.images import intensity as rules
from raylivecell.images.intensity import Intensity, to_uint8
from raylivecell.images.scale import Scale

SPLITS = ("train", "val", "test")
UNLABELLED = "images"
"""Format of a source without annotations."""
FORMAT_VERSION = 4
MAX_ROWS = 2**20
"""Maximum rows per shard; `prepare` writes 64."""
MAX_ROW_BYTES = 2**31
"""Maximum decompressed bytes of a row; 8192 x 8192 pixels have 0.4e9."""
MAX_SIDE = 2**17
"""Maximum height or width of an image in pixels."""
AGAIN = "run `raylivecell prepare` again"

SCHEMA = pa.schema(
    [
        ("file_name", pa.string()),  # as in the annotation JSON
        ("cell_type", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("image", pa.binary()),  # uint8 (H, W), row-major
        ("labels", pa.binary()),  # uint16 little-endian (H, W): 0 background, 1..cells
        ("foreground", pa.binary()),  # uint8 (H, W): 1 in a cell
        ("border", pa.binary()),  # uint8 (H, W): round(255 exp(-(d1 + d2)^2 / (2 sigma^2)))
        ("cells", pa.int32()),
        ("outlines", pa.list_(pa.binary())),  # complete mask of each label, in order: COCO's RLE counts
        ("source", pa.string()),  # provenance: path of the image under --source, and #PLANE if its file has several
        ("sha256", pa.string()),  # of the image file's bytes
        ("padding", pa.binary()),  # padding of the image: COCO's RLE counts; empty without padding
        ("annotation", pa.string()),  # provenance: JSON file, and image id in that file
    ]
)
SCALED_SCHEMA = pa.unify_schemas(
    [SCHEMA, pa.schema([("original_height", pa.int32()), ("original_width", pa.int32())])]  # of the image file
)
"""Of a dataset whose images are scaled (`Scale.pixel_scale`)."""
IGNORE = pa.field("ignore", pa.binary())
"""Additional column of a partly annotated dataset: the pixels without annotation, in no cell. COCO's RLE counts; empty
if the image is completely annotated."""
Sample = dict[str, Any]
"""One row of `SCHEMA`; pixel columns as arrays (H, W)."""
MASKS = {"padding", IGNORE.name}
"""Columns of one mask for the image, as COCO's RLE counts."""
PIXEL_DTYPES = {"image": "<u1", "labels": "<u2", "foreground": "<u1", "border": "<u1"}


@dataclass(frozen=True)
class Row:
    """Location of a sample: URI of the shard and row group in it."""

    shard: str
    group: int
    version: str = ""
    """Identifies the content of the shard, which may be overwritten."""
    rule: Intensity | None = None
    """Converts the image when it is read; None: the image is used as stored."""


@dataclass(frozen=True, eq=False)
class Rows(Sequence[Row]):
    """All samples of a split in the fixed order of the dataset: index = sample id. As small as the list of shards.

    Stored as arrays, which each data task reads from the object store without a copy; 156,250 strings took 265 ms.
    """

    shards: NDArray[np.bytes_]
    """URIs in UTF-8."""
    ends: NDArray[np.int64]
    """Cumulative number of samples, including each shard."""
    versions: NDArray[np.bytes_]
    """`Row.version` of each shard."""
    rules: tuple[tuple[int, Intensity | None], ...] = ()
    """`Row.rule` of the samples up to each index; empty: None for all."""

    @classmethod
    def of(cls, shards: Iterable[tuple[str, int]], versions: Iterable[str] | None = None) -> "Rows":
        """Build from the URI, number of samples and version of each shard."""
        pairs = list(shards)
        uris = np.array([uri.encode() for uri, _ in pairs], np.bytes_)
        encoded_versions = np.array([version.encode() for version in versions or [""] * len(pairs)], np.bytes_)
        return cls(uris, np.cumsum([count for _, count in pairs], dtype=np.int64), encoded_versions)

    @classmethod
    def join(cls, parts: Sequence["Rows"], rules: Sequence[Intensity | None]) -> "Rows":
        """Join the samples of several datasets; `rules` has the `Row.rule` of each."""
        ends = np.cumsum([len(part) for part in parts], dtype=np.int64).tolist()
        starts = [0, *ends[:-1]]
        return cls(
            np.concatenate([part.shards for part in parts]),
            np.concatenate([part.ends + start for part, start in zip(parts, starts)]),
            np.concatenate([part.versions for part in parts]),
            tuple(zip(ends, rules, strict=True)) if any(rules) else (),
        )

    def __len__(self) -> int:
        return int(self.ends[-1]) if self.ends.size else 0

    @overload
    def __getitem__(self, sample: int) -> Row: ...
    @overload
    def __getitem__(self, sample: slice) -> list[Row]: ...
    def __getitem__(self, sample: int | slice) -> Row | list[Row]:
        if isinstance(sample, slice):
            return [self[i] for i in range(*sample.indices(len(self)))]
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        shard = int(np.searchsorted(self.ends, sample, side="right"))
        group = int(sample - (self.ends[shard - 1] if shard else 0))
        rule = next((rule for end, rule in self.rules if sample < end), None)
        return Row(self.shards[shard].decode(), group, self.versions[shard].decode(), rule)


def write_shard(uri: str, rows: Iterable[Sample], scaled: bool = False, ignore: bool = False) -> dict[str, Any]:
    """Write `rows` as one Parquet file at `uri`, atomically; equal rows give equal bytes.

    Rows are compressed one at a time. Without rows, no file is written.

    Args:
        uri: of the file.
        rows: of `SCHEMA`; of `SCALED_SCHEMA` if `scaled`; with the column IGNORE if `ignore`.
        scaled: whether the images are scaled.
        ignore: whether the dataset is partly annotated.

    Returns:
        `rows`, `bytes` and `sha256` of the file.
    """
    sink, count = pa.BufferOutputStream(), 0
    schema = SCALED_SCHEMA if scaled else SCHEMA
    schema = schema.append(IGNORE) if ignore else schema
    options = {"compression": "zstd", "use_dictionary": False, "write_statistics": False}
    with pq.ParquetWriter(sink, schema, **options) as writer:
        for row in rows:
            values = {k: v.astype(PIXEL_DTYPES[k]).tobytes() if k in PIXEL_DTYPES else v for k, v in row.items()}
            writer.write_table(pa.Table.from_pylist([values], schema=schema), row_group_size=1)
            count += 1
    data = sink.getvalue().to_pybytes()
    if count:
        storage.write_bytes(uri, data)
    return {"rows": count, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def load_description(data: str) -> dict[str, Any]:
    """Return dataset.json of the dataset at `data`; UserError if it is missing, invalid or of another version."""
    try:
        description = storage.read_json(storage.join(data, "dataset.json"))
    except FileNotFoundError as error:
        raise UserError(
            f"no dataset at {data}: dataset.json is missing; create one with `raylivecell prepare`"
        ) from error
    if not isinstance(description, dict):
        raise UserError(f"{data}/dataset.json does not describe a dataset; run `raylivecell prepare` again")
    if description.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"dataset at {data} has format {description.get('format_version')}, this version reads {FORMAT_VERSION}; "
            "run `raylivecell prepare` again"
        )
    with storage.validating(storage.join(data, "dataset.json"), AGAIN):
        _check_splits(description["splits"])
        Intensity.model_validate(description["intensity"])
        Scale.model_validate(description.get("scale", {}))
    return description


def _check_splits(splits: Any) -> None:
    """ValueError unless all shards are inside the dataset, with valid row counts and image sizes."""
    for split in SPLITS:
        for shard in splits[split]["shards"]:
            if not re.fullmatch(rf"{split}/[\w.-]+\.parquet", shard["file"]):
                raise ValueError(f"shard {shard['file']!r} is outside {split}/")
            if type(shard["rows"]) is not int or not 0 <= shard["rows"] <= MAX_ROWS:
                raise ValueError(f"shard {shard['file']} of {shard['rows']!r} rows")
        for size in splits[split]["sizes"]:
            if len(size) != 2 or any(type(side) is not int or not 0 < side <= MAX_SIDE for side in size):
                raise ValueError(f"images of size {size!r} in {split}")


def labelled(data: str) -> bool:
    """Whether the dataset at `data` has annotations, and not only images (`prepare --format images`)."""
    source = load_description(data).get("source", {})
    return not (isinstance(source, dict) and source.get("format") == UNLABELLED)


def intensity(data: str) -> Intensity:
    """Return the intensity rule of the dataset at `data`."""
    return Intensity.model_validate(load_description(data)["intensity"])  # checked


def scale(data: str) -> Scale:
    """Return the scale of the dataset at `data`; of unknown cell size if it was written by an older version."""
    return Scale.model_validate(load_description(data).get("scale", {}))  # checked


def conversion(data: str, target: Intensity) -> Intensity | None:
    """Rule that converts the images of the dataset at `data` to `target` as `predict` would; None if it is their rule.

    Raises:
        ValueError: they cannot be converted (`images.intensity.conversion`), or `target` measures percentiles, which
            `predict` does before images are scaled, and these are scaled.
    """
    rule = rules.conversion(intensity(data), target)
    if rule is not None and rule.rule == "percentile" and scale(data).pixel_scale != 1:
        raise ValueError("its images were scaled before their percentiles could be measured")
    return rule


def provenance(data: str) -> dict[str, Any]:
    """Return `uri`, `name`, `licence`, `citation` and `sha256` (of dataset.json, so of all shards) of a dataset."""
    description = load_description(data)
    sha256 = hashlib.sha256(storage.read_bytes(storage.join(data, "dataset.json"))).hexdigest()
    texts = {name: str(description.get(name) or "not stated") for name in ("name", "licence", "citation")}
    return {"uri": data, **texts, "sha256": sha256}


def image_sizes(data: str, split: str) -> set[tuple[int, int]]:
    """Return all (height, width) of a split from dataset.json, without opening a shard."""
    return {(height, width) for height, width in load_description(data)["splits"][split]["sizes"]}


def list_rows(data: str, split: str) -> Rows:
    """Return the location of every sample of a split."""
    shards = load_description(data)["splits"][split]["shards"]  # checked: [{"file": "train/...", "rows": 64}, ...]
    versions = [str(shard.get("sha256", ""))[:16] for shard in shards]
    return Rows.of(((storage.join(data, shard["file"]), shard["rows"]) for shard in shards), versions)


def read_row(row: Row, columns: Sequence[str]) -> Sample:
    """Read `columns` of one sample: pixel columns as read-only arrays (H, W), the others as Python values.

    The image is converted by the row's rule, if it has one. `padding` and `ignore` are bool (H, W), or None without
    padding or ignore region. `height` and `width` are always included.

    Raises:
        UserError: a damaged shard, or an image that is unusable by the row's rule: it would be constant, with cells.
    """
    convert = row.rule is not None and "image" in columns
    names = list(dict.fromkeys(["height", "width", *columns, *(["source", "padding"] if convert else [])]))
    frame = None
    file = _open(row.shard, row.version)
    stored = file.schema_arrow.names
    try:
        _check_size(file.metadata.row_group(row.group))
        present = [name for name in names if name != IGNORE.name or name in stored]
        values = file.read_row_group(row.group, columns=present).to_pydict()
        sample: Sample = {name: values[name][0] if name in values else None for name in names}
        shape = (sample["height"], sample["width"])
        for name in PIXEL_DTYPES.keys() & sample.keys():
            sample[name] = np.frombuffer(sample[name], PIXEL_DTYPES[name]).reshape(shape)
        for name in MASKS & sample.keys():
            counts = sample[name]
            sample[name] = rle.decode({"size": list(shape), "counts": counts}) != 0 if counts else None
        if convert and row.rule is not None:
            frame = to_uint8(sample["image"], row.rule, sample["padding"])
    except (OSError, pa.ArrowException, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise UserError(f"cannot read row {row.group} of shard {row.shard}: {_line(error)}; {AGAIN}") from error
    if frame is not None:
        if not frame.usable:
            raise UserError(
                f"image {sample['source']} of {row.shard} does not fit the first dataset's intensities "
                f"({frame.warnings[0]}); prepare its dataset again with `raylivecell prepare --intensity-from FIRST`, "
                "where FIRST is the first --data"
            )
        sample["image"] = frame.levels
    return sample


@functools.lru_cache(maxsize=128)  # each file retains the bytes of its last row
def _open(shard: str, version: str) -> pq.ParquetFile:
    """Open a shard. Its footer is read once per process and version, because a dataset may be overwritten."""
    filesystem, path = storage.open_uri(shard)
    try:
        # Read adjacent columns together: two requests per row instead of five, and a quarter of the time on a disk.
        file = pq.ParquetFile(filesystem.open_input_file(path), pre_buffer=True)
    except (OSError, pa.ArrowException, ValueError) as error:
        raise UserError(f"cannot read shard {shard}: {_line(error)}; {AGAIN}") from error
    # Columns of other types are never read: values of Ray's extension types would be unpickled.
    schema = file.schema_arrow
    for field in (*SCHEMA, *([IGNORE] if IGNORE.name in schema.names else [])):
        if field.name not in schema.names or schema.field(field.name).type != field.type:
            raise UserError(f"shard {shard} has no column {field.name} of type {field.type}; {AGAIN}")
    return file


def _check_size(group: pq.RowGroupMetaData) -> None:
    """ValueError for a row that would exhaust memory: zstd expands kB to gigabytes, a dictionary page to terabytes."""
    if group.total_byte_size > MAX_ROW_BYTES:
        raise ValueError(f"{group.total_byte_size} bytes, more than {MAX_ROW_BYTES}")
    if any(group.column(i).has_dictionary_page for i in range(group.num_columns)):
        raise ValueError("a column with a dictionary, which `prepare` does not write")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
