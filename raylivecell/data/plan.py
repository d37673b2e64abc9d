"""Plan of a dataset before it is drawn: the images of each shard, and the head of dataset.json.

The plan depends only on the settings, the annotation files and the image files.
"""

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from raylivecell.annotations.coco import decode_cells
from raylivecell.annotations.drawing import MAX_CELLS
from raylivecell.core import storage
from raylivecell.core.errors import UserError
from raylivecell.core.version import __version__
from raylivecell.data import cell_defects, description, shards, splitting
from raylivecell.data.config import PrepareConfig, rule_of
from raylivecell.data.defects import Entry, ImageInfo, listed_size
from raylivecell.data.paired_source import PairedSource, read_cells
from raylivecell.data.pairing import Pair
from raylivecell.data.sources import Source
from raylivecell.images.intensity import Intensity
from raylivecell.images.planes import EVERYTHING, Choice
from raylivecell.images.scale import MAX_SCALE, MIN_SCALE, Scale, diameter_of, scaled_shape

RECORDED = {
    *("format", "annotations", "split", "group_by", "images", "categories", "cell_type", "shard_images"),
}
"""Settings in `source` of dataset.json."""
SHARD_PIXELS = 2**27
"""Maximum pixels per shard: a shard is compressed in memory from 5 bytes per pixel, so 670 MB."""


@dataclass(frozen=True)
class ImagePlan:
    """One image to draw."""

    file_name: str
    path: str
    """Relative to the source."""
    split: str
    annotation: str
    """The annotation file, relative to the source."""
    id: int | str
    """Image id in the annotation file."""
    cell_type: str
    sha256: str
    """Of the image file when it was examined."""
    scale: tuple[float, float]
    """Factors on x and y of the outlines, to the pixels of the prepared image."""
    pixels: int
    """Of the prepared image."""
    pair: Pair | None = None
    """Annotation files of the image, in formats with files per image."""
    annotation_sha256: str = ""
    """Of these files when they were examined."""
    pixel_scale: float = 1.0
    """Factor from the image file to the prepared image."""

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "ImagePlan":
        """Restore a plan from the result of `asdict`, also after a JSON round trip."""
        pair = row["pair"] and Pair(row["pair"]["image"], tuple(row["pair"]["annotations"]), row["pair"]["cell_masks"])
        return cls(**{**row, "pair": pair})


@dataclass(frozen=True)
class ShardPlan:
    """One shard and its images in order."""

    split: str
    file: str
    """Relative to the dataset."""
    images: tuple[ImagePlan, ...]


@dataclass(frozen=True)
class ShardTask:
    """Input for drawing one shard."""

    plan: ShardPlan
    source: str
    """URI."""
    out: str
    """URI of the dataset."""
    work: str
    """URI of the working folder."""
    intensity: Intensity
    border_sigma: float
    """Width of the border map in pixels."""
    rules: dict[str, str]
    """Rule by kind of defect."""
    cell_bytes: tuple[int, ...] = ()
    """Length of each image's encoded cells in `cells_uri`."""
    choice: Choice = EVERYTHING
    """Plane and channel of image files with several."""
    ignore: tuple[str, ...] = ()
    """`PrepareConfig.ignore`."""
    has_regions: bool = False
    """Whether the dataset has ignore regions."""

    @property
    def shard_uri(self) -> str:
        """The shard to write."""
        return storage.join(self.out, self.plan.file)

    @property
    def cells_uri(self) -> str:
        """File with the encoded cells of all images, concatenated."""
        return storage.join(self.work, f"{self._name}.cells")

    @property
    def account_uri(self) -> str:
        """Account of the shard (checksum, statistics, defects), written after it."""
        return storage.join(self.work, f"{self._name}.json")

    @property
    def _name(self) -> str:
        return self.plan.file.replace("/", "-").removesuffix(".parquet")

    def to_row(self) -> dict[str, Any]:
        """Return the task as plain types, for Ray Data."""
        return asdict(self) | {"intensity": self.intensity.model_dump(mode="json")}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "ShardTask":
        """Restore a task from the result of `to_row`, also after a JSON round trip."""
        images = tuple(ImagePlan.from_row(image) for image in row["plan"]["images"])
        plan = ShardPlan(row["plan"]["split"], row["plan"]["file"], images)
        return cls(
            **{
                **row,
                "plan": plan,
                "intensity": Intensity.model_validate(row["intensity"]),
                "choice": Choice(*row["choice"]),
                "ignore": tuple(row["ignore"]),
            }
        )


def requested_settings(source: str, config: PrepareConfig) -> dict[str, Any]:
    """Return the settings that dataset.json records; a dataset with other settings is not overwritten silently."""
    fields = config.model_dump(include=RECORDED, mode="json")
    # Only if chosen: the settings of earlier datasets lack them.
    chosen = {name: value for name, value in config.choice._asdict().items() if value is not None}
    chosen |= {"ignore": list(config.ignore)} if config.ignore else {}
    return {
        "source": {"uri": source, **fields, **chosen, **config.legal},
        "targets": config.targets.model_dump(),
        "rules": config.rules(),
    }


def plan_shards(
    source: Source | PairedSource,
    entries: Sequence[Entry],
    infos: Mapping[str, ImageInfo],
    config: PrepareConfig,
    pixel_scale: float = 1.0,
) -> list[ShardPlan]:
    """Distribute the images, scaled by `pixel_scale`, over shards, in the order of the dataset."""
    plans = []
    for split in shards.SPLITS:
        own = [entry for entry in entries if entry.split == split]
        images = [_plan_image(source, entry, infos[entry.path or ""], config, pixel_scale) for entry in own]
        for number, group in enumerate(_groups(images, config.shard_images)):
            plans.append(ShardPlan(split, f"{split}/part-{number:05d}.parquet", tuple(group)))
    return plans


def _plan_image(
    source: Source | PairedSource, entry: Entry, info: ImageInfo, config: PrepareConfig, pixel_scale: float
) -> ImagePlan:
    if entry.cells > MAX_CELLS:
        raise UserError(f"{entry.image.file_name} has {entry.cells} cells, more than {MAX_CELLS}; cut it into tiles")
    height, width = scaled_shape((info.height, info.width), pixel_scale)
    if pixel_scale > 1 and height * width > SHARD_PIXELS:
        raise UserError(
            f"{entry.image.file_name} would have {width} x {height} pixels, more than {SHARD_PIXELS}; "
            f"cut it into tiles, or give a smaller --pixel-scale than {pixel_scale:.3g}"
        )
    to_file = outline_scale(entry, info, config)
    pair = source.pairs[entry.image.file_name] if isinstance(source, PairedSource) else None
    sha256 = source.infos[entry.image.file_name].sha256 if isinstance(source, PairedSource) else ""
    return ImagePlan(
        file_name=entry.image.file_name,
        path=entry.path or "",
        split=entry.split,
        annotation=entry.annotation,
        id=entry.image.id,
        cell_type=entry.cell_type,
        sha256=info.sha256,
        scale=(to_file[0] * (width / info.width), to_file[1] * (height / info.height)),
        pixels=width * height,
        pair=pair,
        annotation_sha256=sha256,
        pixel_scale=pixel_scale,
    )


def outline_scale(entry: Entry, info: ImageInfo, config: PrepareConfig) -> tuple[float, float]:
    """Return the factors on x and y from the outlines to the pixels of the image file."""
    width, height = listed_size(entry, info)
    scaled = rule_of(config.on_defect, "wrong_size") == "scale"
    return (info.width / width, info.height / height) if scaled else (1.0, 1.0)


def pixel_scale_to(
    target: Scale,
    source: Source | PairedSource,
    entries: Sequence[Entry],
    infos: Mapping[str, ImageInfo],
    config: PrepareConfig,
) -> float:
    """Return the factor that gives the training cells the median diameter of those of `target`.

    The diameters are those of the outlines; without a training split, of all entries.
    """
    uri = config.diameter_from
    if target.diameter is None:
        raise UserError(
            f"--diameter-from {uri}: no cell size there: written by an older raylivecell, or without cells; "
            "give --pixel-scale instead"
        )
    areas: list[float] = []
    train = [entry for entry in entries if entry.split == "train"]
    for entry in train or entries:
        info = infos[entry.path or ""]
        x, y = outline_scale(entry, info, config)
        if isinstance(source, PairedSource):
            name = entry.image.file_name
            pair, sha256, shape = source.pairs[name], source.infos[name].sha256, (info.height, info.width)
            records = read_cells(source.uri, pair, sha256, shape, config.rules(), config.ignore)
        else:
            records = decode_cells(source.encoded_cells(entry))
        areas += [x * y * area for area in cell_defects.areas(records)]
    if not areas:
        raise UserError(f"--diameter-from {uri}: the source has no cell to measure; give --pixel-scale instead")
    own = float(np.median(diameter_of(areas)))
    factor = round(target.diameter / own, 4)
    if not MIN_SCALE <= factor <= MAX_SCALE:
        raise UserError(
            f"--diameter-from {uri}: its cells measure {target.diameter:.1f} px, those of the source {own:.1f} px; "
            f"the factor {factor:.3g} is not between {MIN_SCALE:.3g} and {MAX_SCALE:g}; give --pixel-scale instead"
        )
    return factor


def _groups(images: Sequence[ImagePlan], max_images: int) -> Iterator[list[ImagePlan]]:
    """Yield `images` in order, in groups of at most `max_images` and about `SHARD_PIXELS`."""
    group: list[ImagePlan] = []
    for image in images:
        if group and (len(group) == max_images or sum(i.pixels for i in group) + image.pixels > SHARD_PIXELS):
            yield group
            group = []
        group.append(image)
    if group:
        yield group


def shard_tasks(
    source: Source | PairedSource,
    out: str,
    work: str,
    rule: Intensity,
    plans: Sequence[ShardPlan],
    config: PrepareConfig,
) -> list[ShardTask]:
    """One task for each shard of the dataset at `out`, with the working folder `work`."""
    task = functools.partial(
        ShardTask,
        source=source.uri,
        out=out,
        work=work,
        intensity=rule,
        border_sigma=config.targets.border_sigma,
        rules=config.rules(),
        choice=config.choice,
        ignore=config.ignore,
        has_regions=source.has_regions(config.on_defect),
    )
    return [task(shard) for shard in plans]


def dataset_head(
    settings: Mapping[str, Any],
    source: Source | PairedSource,
    plans: Sequence[ShardPlan],
    intensity: Intensity,
    pixel_scale: float,
    config: PrepareConfig,
) -> dict[str, Any]:
    """Return the part of dataset.json that is known before drawing: licence, provenance, settings and fingerprint.

    The bytes of the dataset depend only on what the fingerprint covers. Name, licence and citation in `config` have
    precedence over the source's.
    """
    files = source.files()
    rule = intensity.model_dump(mode="json")
    version = [__version__, shards.FORMAT_VERSION, str(shards.SCHEMA)]
    version += [str(shards.IGNORE)] if source.has_regions(config.on_defect) else []
    text = json.dumps([version, settings, files, rule, [asdict(plan) for plan in plans]], sort_keys=True)
    provenance: dict[str, Any] = {"files": files, "fingerprint": hashlib.sha256(text.encode()).hexdigest()}
    if source.assignment is not None:
        provenance["groups"] = splitting.describe(source.assignment)
    return {
        **description.legal(*source.info_and_licences()),
        **config.legal,
        **settings,
        "source": settings["source"] | provenance,
        "categories": source.categories,
        "intensity": rule,
        "scale": {"pixel_scale": pixel_scale},
    }
