"""What `prepare` will do, before it does it: a source's annotation files and images, and the shards to draw.

Knows no Ray. Everything here is a function of the source's names and annotation files, and of what its images hold.
"""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from raylivecell import __version__, coco, defects, description, outlines, progress, shards, storage
from raylivecell.defects import DefectRules, Entry, Facts, Found
from raylivecell.errors import UserError
from raylivecell.json_stream import CHUNK
from raylivecell.sources import ImageFolder, find_annotations, find_images, is_safe_name, list_files
from raylivecell.targets import MAX_CELLS, TargetsConfig

SHARD_PIXELS = 2**27
"""A shard is compressed in memory: its pixels take 5 bytes each before, 670 MB at most."""


class PrepareConfig(DefectRules):
    """What to read, how to draw it, and what happens to each kind of defect."""

    annotations: dict[Literal["train", "val", "test"], str] = Field(default={})
    """Annotation file of each split, as a path inside the source or a pattern (`LIVECell_single_cells/*/train.json`);
    empty: found by name."""
    images: str | None = None
    """Folder of the images inside the source; default: `images` where there is one, else the whole source."""
    targets: TargetsConfig = TargetsConfig()
    """How targets are drawn."""
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
    found: list[Found]

    def payload(self, entry: Entry) -> bytes:
        """The encoded cells of `entry`: input of `coco.decode_cells`."""
        return self.files[entry.split, entry.annotation].payload(entry.image.id)


def heading(source: str, config: PrepareConfig) -> dict[str, Any]:
    """The part of dataset.json that is known before the source is read: a record of what was asked for."""
    plain = re.sub(r"//[^/@]*@", "//", source)  # keys in a URI stay out of the record
    rules = config.model_dump(include=set(DefectRules.model_fields))
    asked = config.model_dump(include={"annotations", "images", "shard_images"})
    return {
        "name": "",
        "licence": "",
        "citation": "",
        "source": {"uri": plain, **asked},
        "targets": config.targets.model_dump(),
        "rules": rules,
    }


def read_source(uri: str, config: PrepareConfig) -> Source:
    """Read the annotation files and resolve their images' names."""
    listing = list_files(uri)
    chosen = find_annotations(listing, {str(split): path for split, path in config.annotations.items()}, uri)
    read = Source(uri, find_images(listing, config.images), {}, [], [])
    paths = [(split, path) for split, several in chosen.items() for path in several]
    for split, path in paths:
        filesystem, full = storage.open_uri(storage.join(uri, path))
        with filesystem.open_input_stream(full) as stream:
            size = filesystem.get_file_info(full).size or 0
            annotations = coco.read_annotations(_Watched(stream, size, path), path)
        read.files[split, path] = annotations
        _add(read, split, annotations, config)
    return read


class _Watched:
    """A stream that shows how far its reader is."""

    def __init__(self, stream: Any, size: int, name: str) -> None:
        pieces = iter(lambda: stream.read(CHUNK), b"")
        self.pieces = progress.track(pieces, f"reading {name} (4 MiB pieces)", -(-size // CHUNK))

    def read(self, size: int) -> bytes:
        """The next piece, of up to 4 MiB whatever the `size`; b"" at the end."""
        return next(self.pieces, b"")


def _add(read: Source, split: str, annotations: coco.Annotations, config: PrepareConfig) -> None:
    """Add one annotation file's entries and what is wrong with its records."""

    def note(defect: str, ids: list[int | str], detail: str, name: str = annotations.name) -> None:
        read.found.append(Found(defect, defects.rule_of(config, defect), name, split, ids, detail))

    gone = _break(annotations, config)
    if annotations.broken is not None:
        note("truncated_json", gone, str(annotations.broken))
    for detail, ids in _bad_records(annotations).items():
        note("bad_record", ids, detail)
    counts = annotations.counts()
    known: set[int | str] = set()
    for image in annotations.images:
        if image.id in known or not is_safe_name(image.file_name):
            reason = (
                "the id of another image" if image.id in known else "a file name that leads out of the image folder"
            )
            note("bad_record", [image.id], f"images: {reason}", image.file_name)
        elif image.id not in gone:
            paths = read.folder.find(image.file_name, split)
            if len(paths) > 1:
                note("ambiguous_file", [image.id], ", ".join(paths), image.file_name)
            path = paths[0] if len(paths) == 1 or (paths and config.ambiguous_file == "take_first") else None
            kind = description.cell_type_of(image.file_name, annotations.category(image.id))
            read.entries.append(Entry(split, annotations.name, image, path, counts.get(image.id, 0), kind))
        known.add(image.id)
    if orphans := [identity for identity in counts if identity not in known]:
        note("orphan_annotation", orphans, f"{sum(counts[one] for one in orphans)} annotations of images not listed")


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


def unlisted(read: Source, config: PrepareConfig) -> list[Found]:
    """Image files that no annotation file may mean."""
    listed = {path for entry in read.entries for path in read.folder.candidates(entry.image.file_name)}
    rule = defects.rule_of(config, "unlisted_file")
    return [
        Found("unlisted_file", rule, path.rsplit("/", 1)[-1], None, [], path)
        for path in read.folder.paths
        if path not in listed
    ]


def covered_pixels(read: Source, entry: Entry) -> float:
    """Pixels that the outlines of `entry` cover, overlaps counted twice."""
    return outlines.covered(coco.decode_cells(read.payload(entry)))


def plan_shards(
    read: Source, kept: list[Entry], facts: dict[str, Facts], out: str, config: PrepareConfig
) -> list[dict[str, Any]]:
    """One job a shard, in the order of the dataset."""
    bits = max((facts[entry.path or ""].bits for entry in kept), default=8)
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
                    "bits": bits,
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


def _image_job(entry: Entry, facts: dict[str, Facts], config: PrepareConfig) -> dict[str, Any]:
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
