"""Read a source: find its annotation files and images, and match every listed image with its file.

Works on local folders and object stores alike. Paths are relative to the source, with forward slashes.
"""

import fnmatch
import posixpath
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from raylivecell.annotations import categories, coco
from raylivecell.annotations.json_stream import CHUNK
from raylivecell.core import console, storage
from raylivecell.core.errors import UserError
from raylivecell.data import cell_defects, splitting
from raylivecell.data.config import PrepareConfig, Rules, chosen_rule, rule_of
from raylivecell.data.defects import Defect, Entry
from raylivecell.data.description import cell_type_of
from raylivecell.data.image_names import (
    SPLIT_WORDS,
    ImageFolder,
    Match,
    find_images,
    is_safe_name,
    resolve_conflicts,
    splits_of_folder,
)
from raylivecell.data.listing import Listing, list_folder, show
from raylivecell.data.paired_source import PairedSource, read_pairs
from raylivecell.data.pairing import find_format
from raylivecell.data.shards import SPLITS
from raylivecell.data.splitting import UNSPLIT
from raylivecell.images.formats import is_image_name

MAX_CROWD_FRACTION = 0.1
"""Fraction of a file's annotations above which iscrowd cannot mean a crowd; COCO's train2017 has 1.2 %."""


@dataclass(frozen=True)
class Source:
    """A source after reading its annotation files."""

    uri: str
    folder: ImageFolder
    annotations: dict[tuple[str, str], coco.Annotations]
    """Annotation files by (split, path); split `all` for files that `config.split` distributes."""
    unreadable_files: dict[str, str]
    """Reason by path."""
    categories: list[dict[str, Any]]
    """Result of `categories.choose`."""
    entries: list[Entry] = field(default_factory=list)
    defects: list[Defect] = field(default_factory=list)
    matched_paths: set[str] = field(default_factory=set)
    """Image files that match a listed name."""
    assignment: splitting.Assignment | None = None
    """Split and group of each image, if `config.split` is set."""

    def encoded_cells(self, entry: Entry) -> bytes:
        """Return the encoded cells of `entry`: input of `coco.decode_cells`."""
        split = entry.split if self.assignment is None else UNSPLIT
        return self.annotations[split, entry.annotation].payload(entry.image.id)

    def covered_pixels(self, entry: Entry) -> float:
        """Return the number of pixels that the outlines of `entry` cover, overlaps counted twice."""
        return cell_defects.covered(coco.decode_cells(self.encoded_cells(entry)))

    def has_regions(self, rules: Rules) -> bool:
        """Whether an annotation is an ignore region."""
        by_category = any(category.get("ignored") for category in self.categories)
        crowds = any(file.crowds() for file in self.annotations.values())
        return by_category or (crowds and rule_of(rules, "crowd_region") == "ignore")

    def unlisted_files(self) -> list[Defect]:
        """Return a defect for each image file that matches no listed name."""
        rule = rule_of({}, "unlisted_file")
        return [
            Defect("unlisted_file", rule, path.rsplit("/", 1)[-1], None, [], path)
            for path in self.folder.paths
            if path not in self.matched_paths
        ]

    def listed_counts(self) -> dict[str, dict[str, int]]:
        """Count the images and cells listed in the annotation files, by split, including unusable records.

        Unusable records of files without a split count as train.
        """
        counts = {split: {"images": 0, "cells": 0} for split in (*SPLITS, UNSPLIT)}
        for (split, _), file in self.annotations.items():
            bad_sections = [section for section, _, _ in file.bad]
            counts[split]["images"] += len(file.images) + bad_sections.count("images")
            counts[split]["cells"] += sum(file.counts().values()) + bad_sections.count("annotations")
        unsplit = counts.pop(UNSPLIT)
        for entry in self.entries if self.assignment else ():
            counts[entry.split]["images"] += 1
            counts[entry.split]["cells"] += entry.cells
        for kind, count in unsplit.items() if self.assignment else ():
            counts["train"][kind] += count - sum(counts[split][kind] for split in SPLITS)
        return counts

    def info_and_licences(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Return `info` (the first file has precedence) and `licenses` of the annotation files."""
        info: dict[str, Any] = {}
        for file in self.annotations.values():
            info = file.info | info
        return info, [licence for file in self.annotations.values() for licence in file.licences]

    def files(self) -> list[dict[str, Any]]:
        """Return the provenance for dataset.json: one row per annotation file."""
        return [
            {"split": split, "file": path, "sha256": file.sha256, "bytes": file.size}
            | {"images": len(file.images), "cells": sum(file.counts().values())}
            for (split, path), file in self.annotations.items()
        ]

    def empty_files(self) -> list[str]:
        """Return the annotation files that list no image."""
        return [path for (_, path), file in self.annotations.items() if not file.images]


class ListedImage(NamedTuple):
    """An image record, with the split and the annotation file that list it."""

    split: str
    file: coco.Annotations
    image: coco.ImageEntry


def read_source(uri: str, config: PrepareConfig) -> Source | PairedSource:
    """Find the format of the source at `uri`; read COCO files, or pair images with files, by name."""
    listing = list_folder(uri, config.follow_links)
    show(listing, uri)
    paths = sorted(listing.infos)
    annotation_format = find_format(paths, config.format, _has_coco(paths, config), config.images, uri)
    if annotation_format != "coco":
        return read_pairs(uri, paths, config, annotation_format)
    return _read_coco(uri, listing, config)


def _has_coco(paths: Sequence[str], config: PrepareConfig) -> bool:
    """Whether a JSON file is named after a split, or by CVAT (instances_default.json) or Roboflow."""
    jsons = [path for path in paths if path.lower().endswith(".json")]
    names = [posixpath.basename(path) for path in jsons]
    exported = any(name.startswith("instances_") or name.endswith("coco.json") for name in names)
    return bool(config.annotations) or exported or any(split_of(path) or split_of_folder(path) for path in jsons)


def _read_coco(uri: str, listing: Listing, config: PrepareConfig) -> Source:
    """Read the COCO files of the source at `uri` and match their images with files."""
    paths = sorted(listing.infos)
    chosen_files = {str(split): path for split, path in config.annotations.items()}
    annotation_paths = find_annotations(paths, chosen_files, uri, unsplit=config.split is not None)
    folder = find_images(paths, config.images)
    annotations = {
        (split, path): _read_annotations(uri, path) for split, members in annotation_paths.items() for path in members
    }
    chosen = categories.choose(annotations.values(), config.categories, config.ignore)
    source = Source(uri, folder, annotations, listing.left_out, chosen)
    images: list[ListedImage] = []
    for (split, _), file in annotations.items():
        _check_crowds(file, config.on_defect)
        images += (ListedImage(split, file, image) for image in _usable_images(source, split, file, config.on_defect))
    _match_images(source, images, config)
    if config.split is None:
        return source
    entries, assignment = splitting.with_splits(source.entries, config, folder.relative)
    defects = [replace(defect, split=None) for defect in source.defects]
    return replace(source, entries=entries, defects=defects, assignment=assignment)


def find_annotations(
    files: Sequence[str], chosen: Mapping[str, str], source: str, unsplit: bool = False
) -> dict[str, list[str]]:
    """Find the annotation files by split, in the order train, val, test; those without a split as `all`.

    Args:
        files: paths of the source.
        chosen: path or pattern such as `LIVECell_single_cells/*/train.json` by split; without it,
            `livecell_coco_{train,val,test}.json` in any folder, otherwise JSON files named after one split, otherwise
            JSON files in folders named after one split.
        source: URI, for messages.
        unsplit: whether to find the files of a source without splits.

    Raises:
        UserError: no file or several candidates for a split; files with splits if `unsplit`.
    """
    jsons = [path for path in files if path.lower().endswith(".json")]
    if chosen:
        names = (*SPLITS, UNSPLIT)
        return {split: _matching_paths(jsons, chosen[split], source) for split in names if split in chosen}
    by_split: dict[str, list[str]] = defaultdict(list)
    any_named = any(split_of(path) for path in jsons)
    if unsplit:
        return {UNSPLIT: _unsplit_paths(jsons, files, source)}
    for path in jsons:
        if split := split_of(path) if any_named else split_of_folder(path):
            by_split[split].append(path)
    annotation_paths = {}
    for split in SPLITS:
        official = [path for path in by_split[split] if posixpath.basename(path) == f"livecell_coco_{split}.json"]
        paths = official or by_split[split]
        if paths and not _one_per_folder(paths):
            raise UserError(
                f"{source} contains {len(paths)} annotation files for {split} ({', '.join(paths[:4])}, ...); "
                f"choose with --annotations {split} PATH{_per_image_hint(paths, files)}"
            )
        if paths:
            annotation_paths[split] = paths
    if not annotation_paths:
        hint = f"found {', '.join(jsons[:4])}; divide its images with --split 0.8 0.1 0.1, or " if jsons else ""
        raise UserError(
            f"no annotation JSON named after train, val or test in {source}; {hint}choose with --annotations train PATH"
            f"{_per_image_hint(jsons, files)}"
        )
    return annotation_paths


def _unsplit_paths(jsons: Sequence[str], files: Sequence[str], source: str) -> list[str]:
    """Return the annotation files of a source without splits: one, or files of one name in sibling folders."""
    if split_files := [path for path in jsons if split_of(path) or split_of_folder(path)]:
        raise UserError(
            f"{source} has splits ({', '.join(split_files[:4])}): leave out --split, or choose the file of all images "
            "with --annotations all PATH"
        )
    paths = [path for path in jsons if posixpath.basename(path).startswith("instances_")] or list(jsons)
    if not paths:
        raise UserError(f"no annotation JSON in {source}; export the annotations as COCO JSON into it")
    if not _one_per_folder(paths):
        raise UserError(
            f"{source} contains {len(paths)} JSON files ({', '.join(paths[:4])}{', ...' * (len(paths) > 4)}); "
            f"choose with --annotations all PATH{_per_image_hint(paths, files)}"
        )
    return paths


def _matching_paths(jsons: Sequence[str], pattern: str, source: str) -> list[str]:
    """Return the path equal to `pattern`, otherwise the paths that match it; UserError without a match."""
    relative = pattern.removeprefix(source.rstrip("/") + "/").removeprefix("./")
    paths = [path for path in jsons if path == relative] or [p for p in jsons if fnmatch.fnmatchcase(p, relative)]
    if not paths:
        raise UserError(f"no annotation file {pattern} in {source}; give its path inside the source")
    return paths


def split_of(path: str) -> str | None:
    """Return the only split in a file's name (`livecell_coco_train.json`, `val.json`), otherwise None."""
    words = re.findall(r"[a-z]+", posixpath.basename(path).lower())
    splits = {SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS}
    return splits.pop() if len(splits) == 1 else None


def split_of_folder(path: str) -> str | None:
    """Return the only split in the names of a file's folders (Roboflow: `valid/_annotations.coco.json`)."""
    splits = splits_of_folder(path)
    return next(iter(splits)) if len(splits) == 1 else None


def _one_per_folder(paths: Sequence[str]) -> bool:
    """Whether `paths` is one file, or files of one name in sibling folders (one per cell type)."""
    names = {posixpath.basename(path) for path in paths}
    parents = {posixpath.dirname(posixpath.dirname(path)) for path in paths}
    depths = {path.count("/") for path in paths}
    return len(paths) == 1 or len(names) == len(parents) == len(depths) == 1


def _per_image_hint(paths: Sequence[str], files: Sequence[str]) -> str:
    """Return a hint if more than half of the JSON files are named like an image."""
    stems = {posixpath.splitext(path)[0] for path in files if is_image_name(path)}
    if 2 * sum(posixpath.splitext(path)[0] in stems for path in paths) <= len(paths):
        return ""
    return " (one JSON per image, as LabelMe and others write, is not supported: export COCO)"


def _read_annotations(uri: str, path: str) -> coco.Annotations:
    """Read one annotation file, showing progress."""
    filesystem, full_path = storage.open_uri(storage.join(uri, path))
    with filesystem.open_input_stream(full_path) as stream:
        size = filesystem.get_file_info(full_path).size or 0
        return coco.read_annotations(_ProgressStream(stream, size, path), path)


class _ProgressStream:
    """A stream that shows the progress of its reader."""

    def __init__(self, stream: Any, size: int, name: str) -> None:
        chunks = iter(lambda: stream.read(CHUNK), b"")
        self.chunks = console.track(chunks, f"reading {name} (4 MiB pieces)", -(-size // CHUNK))

    def read(self, size: int) -> bytes:
        """Return the next chunk, up to 4 MiB for any `size`; b"" at the end."""
        return next(self.chunks, b"")


def _check_crowds(file: coco.Annotations, rules: Rules) -> None:
    """UserError if iscrowd is set too often for the rule `auto`."""
    crowds, cells = file.crowds(), sum(file.counts().values())
    if chosen_rule(rules, "crowd_region") == "auto" and crowds > MAX_CROWD_FRACTION * cells:
        raise UserError(
            f"{crowds} of {cells} annotations of {file.name} have iscrowd set, in COCO a region of many objects "
            "(CVAT sets it on each cell drawn by brush): choose --on-defect crowd_region=keep (each is a cell), "
            "crowd_region=ignore (pixels to leave out) or crowd_region=drop (background)"
        )


def _usable_images(source: Source, split: str, file: coco.Annotations, rules: Rules) -> Iterator[coco.ImageEntry]:
    """Yield the images of one file with unambiguous, complete annotations; record the defects of the others."""

    def report(kind: str, ids: list[int | str], detail: str, name: str = file.name) -> None:
        source.defects.append(Defect(kind, rule_of(rules, kind, split), name, split, ids, detail))

    incomplete = _incomplete_image(file, rules)
    if file.broken is not None:
        report("truncated_json", incomplete, str(file.broken))
    for detail, ids in _bad_records(file).items():
        report("bad_record", ids, detail)
    by_id: dict[int | str, list[coco.ImageEntry]] = defaultdict(list)
    for image in file.images:
        by_id[image.id].append(image)
    for image_id, images in by_id.items():
        names = list(dict.fromkeys(image.file_name for image in images))
        if len(names) > 1:
            detail = f"images: one id for {len(names)} images ({', '.join(names[:4])}): their cells cannot be separated"
            report("bad_record", [image_id], detail, names[0])
            source.matched_paths.update(p for name in names for p in source.folder.find(name, split, file.name).paths)
        elif len(images) > 1:
            report("bad_record", [image_id], "images: listed more than once with the same id", names[0])
    counts = file.counts()
    if orphans := [image_id for image_id in counts if image_id not in by_id and counts[image_id]]:
        cells = sum(counts[image_id] for image_id in orphans)
        report("orphan_annotation", orphans, f"{cells} annotations of images not listed")
    for image_id, images in by_id.items():
        if len({image.file_name for image in images}) == 1 and image_id not in incomplete:
            yield images[0]


def _incomplete_image(file: coco.Annotations, rules: Rules) -> list[int | str]:
    """Return the id of the image whose annotations are cut off in a truncated file; raise if its rule is `refuse`."""
    if file.broken is None:
        return []
    if rule_of(rules, "truncated_json") == "refuse" or not file.images:
        raise file.broken
    return [] if file.last_image is None else [file.last_image]


def _bad_records(file: coco.Annotations) -> dict[str, list[int | str]]:
    """Return the ids of unusable records by section and reason."""
    reasons: dict[str, list[int | str]] = defaultdict(list)
    for section, record_id, reason in file.bad:
        reasons[f"{section}: {reason}"].append("?" if record_id is None else record_id)
    return reasons


def _match_images(source: Source, images: Sequence[ListedImage], config: PrepareConfig) -> None:
    """Add an entry for each image, with the file that matches its name."""
    rules = config.on_defect
    matches = [source.folder.find(image.file_name, split, file.name) for split, file, image in images]
    resolved = resolve_conflicts((image.file_name, split, match) for (split, _, image), match in zip(images, matches))
    files_of_name: dict[tuple[str, str], set[str]] = defaultdict(set)
    for (split, _, image), paths in zip(images, resolved):
        files_of_name[split, image.file_name].update(paths if len(paths) == 1 else ())
    unreadable = {path.rpartition("/")[2]: reason for path, reason in source.unreadable_files.items()}
    cells = {key: file.counts() for key, file in source.annotations.items()}
    for (split, file, image), match, paths in zip(images, matches, resolved):
        name = image.file_name
        source.matched_paths.update(match.paths)
        if len(paths) > 1:
            rule = rule_of(rules, "ambiguous_file")
            source.defects.append(Defect("ambiguous_file", rule, name, split, [image.id], ", ".join(paths)))
            paths = tuple(sorted(paths, key=lambda path: (path.count("/"), path)))[: rule == "take_first"]
            if not paths:
                continue
        if not paths and not is_safe_name(name):
            reason = "images: a file name that leads out of the image folder, and no file matches its last part"
            rule = rule_of(rules, "bad_record")
            source.defects.append(Defect("bad_record", rule, name, split, [image.id], reason))
            continue
        path = paths[0] if paths else None
        cell_type = config.cell_type or cell_type_of(name, file.category(image.id))
        if path and (not is_safe_name(name) or len(files_of_name[split, name]) > 1):  # names of result files
            image = replace(image, file_name=source.folder.relative(path))
        reason = "" if path else _missing_reason(source.folder, name, match, unreadable)
        count = cells[split, file.name].get(image.id, 0)
        source.entries.append(Entry(split, file.name, image, path, count, cell_type, reason))


def _missing_reason(folder: ImageFolder, name: str, match: Match, unreadable: Mapping[str, str]) -> str:
    """Return why the file `name` is missing; `unreadable`: reasons by last part of the path."""
    last = name.replace("\\", "/").rpartition("/")[2]
    if last in unreadable:
        return unreadable[last]
    if match.paths:
        return f"no file of this name; {match.paths[0]} belongs to another image"
    similar = folder.with_other_suffix(name)
    return f"no file of this name; {similar} has another suffix" if similar else "no file of this name"
