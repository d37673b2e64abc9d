"""What `prepare` will do, before it does it: a source's annotation files and images, and the shards to draw.

Knows no Ray. Everything here is a function of the source's names and annotation files, and of what its images hold.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pydantic import Field

from raylivecell.annotations import categories, coco
from raylivecell.annotations.drawing import MAX_CELLS, TargetsConfig
from raylivecell.annotations.json_stream import CHUNK
from raylivecell.core import console, storage
from raylivecell.core.errors import UserError
from raylivecell.core.version import __version__
from raylivecell.data import cell_defects, defects, description, shards
from raylivecell.data.defects import Defect, DefectRules, Entry, ImageInfo
from raylivecell.data.image_names import ImageFolder, find_images, is_safe_name, settle
from raylivecell.data.listing import list_folder, show
from raylivecell.data.sources import find_annotations
from raylivecell.images.intensity import Intensity

CROWD_SHARE = 0.1
"""Of the annotations; COCO's own crowds are 1.2 % of its train2017."""
SHARD_PIXELS = 2**27
"""A shard is compressed in memory: its pixels take 5 bytes each before, 670 MB at most."""


class PrepareConfig(DefectRules):
    """What to read, how to draw it, and what happens to each kind of defect."""

    annotations: dict[Literal["train", "val", "test"], str] = Field(default={})
    """Annotation file of each split, as a path inside the source or a pattern (`LIVECell_single_cells/*/train.json`);
    empty: found by name."""
    images: str | None = None
    """Folder of the images inside the source; default: `images` where there is one, else the whole source."""
    categories: tuple[str, ...] = ()
    """Categories (names or ids) whose annotations are cells; default: all. Others count as background."""
    follow_links: bool = False
    """Follow links to files and folders outside the source. Without it only those to git-annex's, DVC's and Hugging
    Face's stores, whose files are named by a checksum."""
    targets: TargetsConfig = TargetsConfig()
    """How targets are drawn."""
    intensity_from: str | None = None
    """Dataset, checkpoint, run or .onnx file whose intensity rule to take: for images to score with that network.
    Default: a rule chosen from the training images."""
    shard_images: int = Field(default=64, ge=1)
    """Images a shard at most; fewer where they are large (134 million pixels a shard)."""
    overwrite: bool = False
    """Replace a dataset that OUT already holds and that was made from something else."""


@dataclass(frozen=True)
class Source:
    """A source, read."""

    uri: str
    folder: ImageFolder
    files: dict[tuple[str, str], coco.Annotations]
    """By (split, path)."""
    entries: list[Entry]
    found: list[Defect]
    left_out: dict[str, str]
    """Files that cannot be read: reason by path."""
    categories: list[dict[str, Any]] = field(default_factory=list)
    """What `categories.choose` returned."""
    candidates: set[str] = field(default_factory=set)
    """Files that a listed name may mean."""

    def payload(self, entry: Entry) -> bytes:
        """The encoded cells of `entry`: input of `coco.decode_cells`."""
        return self.files[entry.split, entry.annotation].payload(entry.image.id)

    def listed(self) -> dict[str, dict[str, int]]:
        """Images and cells that the annotation files of each split list, unusable records too."""
        counts = {split: {"images": 0, "cells": 0} for split in shards.SPLITS}
        for (split, _), read in self.files.items():
            bad = [section for section, _, _ in read.bad]
            counts[split]["images"] += len(read.images) + bad.count("images")
            counts[split]["cells"] += sum(read.counts().values()) + bad.count("annotations")
        return counts


def heading(source: str, config: PrepareConfig) -> dict[str, Any]:
    """The part of dataset.json that is known before the source is read: a record of what was asked for."""
    rules = config.model_dump(include=set(DefectRules.model_fields))
    asked = config.model_dump(include={"annotations", "images", "categories", "shard_images"}, mode="json")
    return {
        "name": "",
        "licence": "",
        "citation": "",
        "source": {"uri": source, **asked},
        "targets": config.targets.model_dump(),
        "rules": rules,
    }


def read_source(uri: str, config: PrepareConfig) -> Source:
    """Read the annotation files and resolve their images' names."""
    listing = list_folder(uri, config.follow_links)
    show(listing, uri)
    files = sorted(listing.infos)
    chosen = find_annotations(files, {str(split): path for split, path in config.annotations.items()}, uri)
    read = Source(uri, find_images(files, config.images), {}, [], [], listing.left_out)
    paths = [(split, path) for split, several in chosen.items() for path in several]
    for split, path in paths:
        filesystem, full = storage.open_uri(storage.join(uri, path))
        with filesystem.open_input_stream(full) as stream:
            size = filesystem.get_file_info(full).size or 0
            read.files[split, path] = coco.read_annotations(_Watched(stream, size, path), path)
    read.categories.extend(categories.choose(read.files.values(), config.categories))
    pending: list[tuple[str, coco.Annotations, coco.ImageEntry]] = []
    for (split, _), annotations in read.files.items():
        _check_crowds(annotations, config)
        pending += ((split, annotations, image) for image in _usable(read, split, annotations, config))
    _resolve(read, pending, config)
    return read


def _check_crowds(annotations: coco.Annotations, config: PrepareConfig) -> None:
    crowds, cells = annotations.crowds(), sum(annotations.counts().values())
    if config.crowd_region == "auto" and crowds > CROWD_SHARE * cells:
        raise UserError(
            f"{crowds} of {cells} annotations of {annotations.name} have iscrowd set, in COCO a region of many objects "
            "(CVAT sets it on each cell drawn by brush): choose --crowd-region keep (each is a cell) or drop"
        )


class _Watched:
    """A stream that shows how far its reader is."""

    def __init__(self, stream: Any, size: int, name: str) -> None:
        pieces = iter(lambda: stream.read(CHUNK), b"")
        self.pieces = console.track(pieces, f"reading {name} (4 MiB pieces)", -(-size // CHUNK))

    def read(self, size: int) -> bytes:
        """The next piece, of up to 4 MiB whatever the `size`; b"" at the end."""
        return next(self.pieces, b"")


def _usable(read: Source, split: str, annotations: coco.Annotations, config: PrepareConfig) -> list[coco.ImageEntry]:
    """Images of one annotation file whose annotations are surely theirs; notes what is wrong with its records."""

    def note(defect: str, ids: list[int | str], detail: str, name: str = annotations.name) -> None:
        read.found.append(Defect(defect, defects.rule_of(config, defect, split), name, split, ids, detail))

    gone = _break(annotations, config)
    if annotations.broken is not None:
        note("truncated_json", gone, str(annotations.broken))
    for detail, ids in _bad_records(annotations).items():
        note("bad_record", ids, detail)
    by_id: dict[int | str, list[coco.ImageEntry]] = defaultdict(list)
    for image in annotations.images:
        by_id[image.id].append(image)
    for identity, images in by_id.items():
        names = list(dict.fromkeys(image.file_name for image in images))
        if len(names) > 1:
            others = f"images: the id of {len(names)} images ({', '.join(names[:4])}): their cells cannot be separated"
            note("bad_record", [identity], others, names[0])
            read.candidates.update(p for name in names for p in read.folder.find(name, split, annotations.name).paths)
        elif len(images) > 1:
            note("bad_record", [identity], "images: listed more than once, with one id", names[0])
    counts = annotations.counts()
    if orphans := [identity for identity in counts if identity not in by_id and counts[identity]]:
        note("orphan_annotation", orphans, f"{sum(counts[one] for one in orphans)} annotations of images not listed")
    singles = (images[0] for images in by_id.values() if len({image.file_name for image in images}) == 1)
    return [image for image in singles if image.id not in gone]


def _resolve(read: Source, pending: list[tuple[str, coco.Annotations, coco.ImageEntry]], config: PrepareConfig) -> None:
    """Add an entry for each image, with the file that its name means."""
    matches = [read.folder.find(image.file_name, split, file.name) for split, file, image in pending]
    settled = settle((image.file_name, split, match) for (split, _, image), match in zip(pending, matches))
    named: dict[tuple[str, str], set[str]] = defaultdict(set)
    for (split, _, image), paths in zip(pending, settled):
        named[split, image.file_name].update(paths if len(paths) == 1 else ())
    lost = {path.rpartition("/")[2]: reason for path, reason in read.left_out.items()}
    cells = {key: file.counts() for key, file in read.files.items()}
    for (split, file, image), match, paths in zip(pending, matches, settled):
        name = image.file_name
        read.candidates.update(match.paths)
        if len(paths) > 1:
            rule = defects.rule_of(config, "ambiguous_file")
            read.found.append(Defect("ambiguous_file", rule, name, split, [image.id], ", ".join(paths)))
            paths = tuple(sorted(paths, key=lambda path: (path.count("/"), path)))[: rule == "take_first"]
            if not paths:
                continue
        if not paths and not is_safe_name(name):
            reason = "images: a file name that leads out of the image folder, where no file has its last part"
            read.found.append(Defect("bad_record", config.bad_record, name, split, [image.id], reason))
            continue
        path = paths[0] if paths else None
        kind = description.cell_type_of(name, file.category(image.id))
        if path and (not is_safe_name(name) or len(named[split, name]) > 1):  # results are written by this name
            image = replace(image, file_name=read.folder.relative(path))
        why = "" if path else _missing(read, name, match.paths, lost)
        count = cells[split, file.name].get(image.id, 0)
        read.entries.append(Entry(split, file.name, image, path, count, kind, why))


def _missing(read: Source, name: str, others: tuple[str, ...], lost: Mapping[str, str]) -> str:
    """Why there is no file `name`; `lost`: reasons by last part of files that are there and cannot be read."""
    last = name.replace("\\", "/").rpartition("/")[2]
    if last in lost:
        return lost[last]
    if others:
        return f"no file of this name; {others[0]} is that of another image"
    like = read.folder.like(name)
    return f"no file of this name; {like} has another suffix" if like else "no file of this name"


def _break(annotations: coco.Annotations, config: PrepareConfig) -> list[int | str]:
    """Ids of the image that surely lacks annotations because the file ends early; UserError where that is refused."""
    if annotations.broken is None:
        return []
    if config.truncated_json == "refuse" or not annotations.images:
        raise annotations.broken
    return [] if annotations.last_image is None else [annotations.last_image]


def _bad_records(annotations: coco.Annotations) -> dict[str, list[int | str]]:
    """Ids by section and reason."""
    reasons: dict[str, list[int | str]] = defaultdict(list)
    for section, identity, reason in annotations.bad:
        reasons[f"{section}: {reason}"].append("?" if identity is None else identity)
    return reasons


def unlisted(read: Source, config: PrepareConfig) -> list[Defect]:
    """Image files that no annotation file may mean."""
    rule = defects.rule_of(config, "unlisted_file")
    return [
        Defect("unlisted_file", rule, path.rsplit("/", 1)[-1], None, [], path)
        for path in read.folder.paths
        if path not in read.candidates
    ]


def covered_pixels(read: Source, entry: Entry) -> float:
    """Pixels that the outlines of `entry` cover, overlaps counted twice."""
    return cell_defects.covered(coco.decode_cells(read.payload(entry)))


def plan_shards(
    read: Source, kept: list[Entry], facts: dict[str, ImageInfo], out: str, config: PrepareConfig, rule: Intensity
) -> list[dict[str, Any]]:
    """One job a shard, in the order of the dataset."""
    jobs = []
    for split in shards.SPLITS:
        images = [_image_job(entry, facts, config) for entry in kept if entry.split == split]
        for number, some in enumerate(_groups(images, config.shard_images)):
            jobs.append(
                {
                    "source": read.uri,
                    "out": out,
                    "split": split,
                    "file": f"{split}/part-{number:05d}.parquet",
                    "intensity": rule.model_dump(mode="json"),
                    "border_sigma": config.targets.border_sigma,
                    "images": some,
                }
            )
    return jobs


def _groups(images: list[dict[str, Any]], most: int) -> Iterator[list[dict[str, Any]]]:
    """`images` in order, at most `most` and about `SHARD_PIXELS` together."""
    group: list[dict[str, Any]] = []
    for image in images:
        if group and (len(group) == most or sum(one["pixels"] for one in group) + image["pixels"] > SHARD_PIXELS):
            yield group
            group = []
        group.append(image)
    if group:
        yield group


def _image_job(entry: Entry, facts: dict[str, ImageInfo], config: PrepareConfig) -> dict[str, Any]:
    fact = facts[entry.path or ""]
    if entry.cells > MAX_CELLS:
        raise UserError(f"{entry.image.file_name} has {entry.cells} cells, labels hold {MAX_CELLS}; cut it into tiles")
    told = (entry.image.width or fact.width, entry.image.height or fact.height)
    scale = (fact.width / told[0], fact.height / told[1]) if config.wrong_size == "scale" else (1.0, 1.0)
    return {
        "file_name": entry.image.file_name,
        "path": entry.path,
        "split": entry.split,
        "annotation": entry.annotation,
        "id": entry.image.id,
        "cell_type": entry.cell_type,
        "sha256": fact.sha256,
        "scale": scale,
        "pixels": fact.width * fact.height,
    }


def statements(read: Source) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """`info` and `licenses` of the annotation files, the first one's first."""
    info: dict[str, Any] = {}
    for annotations in read.files.values():
        info = annotations.info | info
    return info, [licence for annotations in read.files.values() for licence in annotations.licences]


def provenance(read: Source, jobs: list[dict[str, Any]], head: dict[str, Any]) -> dict[str, Any]:
    """Annotation files with their checksums, and the fingerprint of everything that the dataset's bytes depend on."""
    files = [
        {
            "split": split,
            "file": path,
            "sha256": annotations.sha256,
            "bytes": annotations.size,
            "images": len(annotations.images),
            "cells": sum(annotations.counts().values()),
        }
        for (split, path), annotations in read.files.items()
    ]
    version = [__version__, shards.FORMAT_VERSION, str(shards.SCHEMA)]
    plan = [{key: value for key, value in job.items() if key not in ("source", "out")} for job in jobs]
    text = json.dumps([version, head["source"], head["targets"], head["rules"], files, plan], sort_keys=True)
    return {"files": files, "fingerprint": hashlib.sha256(text.encode()).hexdigest()}
