"""Sources with annotation files per image: label images, masks of single cells, ImageJ ROIs, GeoJSON.

1. `read_pairs`       pair images and annotation files by name (`pairing`); reads no file
2. `examine`          a Ray Data task: read annotation files, count their cells, find their defects
3. `complete`         entries of the images whose annotation files can be used
4. `read_cells`       read the files again when the image is drawn; they must not have changed
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from raylivecell.annotations import image_files
from raylivecell.annotations.coco import CellRecord, ImageEntry
from raylivecell.annotations.drawing import MAX_CELLS
from raylivecell.annotations.errors import AnnotationError
from raylivecell.core import console, storage
from raylivecell.core.errors import UserError
from raylivecell.data import cell_defects, splitting
from raylivecell.data.config import PrepareConfig, Rules, rule_of
from raylivecell.data.defects import Defect, Entry, ImageInfo
from raylivecell.data.description import cell_type_of
from raylivecell.data.image_names import splits_of_folder
from raylivecell.data.pairing import Pair, Pairing, check_ignore, find_pairs, find_unlabelled, short_name
from raylivecell.data.shards import SPLITS, UNLABELLED
from raylivecell.images.planes import Place

PAIRS_PER_TASK = 32
"""Images whose annotation files one task reads: about 1 s of work."""
MAX_FILE_BYTES = 2**30
"""Maximum bytes of an annotation file: 8192 x 8192 labels of 64 bits have 0.5e9."""
LAYOUTS = {
    "labels": "label images: images/NAME.tif with masks/NAME.png, or NAME.tif with NAME_masks.png",
    "rois": "ImageJ ROIs: images/NAME.tif with rois/NAME.zip, or NAME.tif with NAME.zip",
    "geojson": "GeoJSON: NAME.tif with NAME.geojson",
}

IGNORABLE = {"labels": "the label", "rois": "a ROI of the name", "geojson": "an object of the class"}
"""What --ignore selects, by format."""
HINTS = {
    "binary_mask": "; --on-defect binary_mask=components: each piece is a cell",
    "background_label": "; --on-defect background_label=background, or =keep if it is a cell",
}
"""What to do about kinds of defects whose rule is `refuse`."""


@dataclass(frozen=True)
class AnnotationInfo:
    """Content of the annotation files of one image; `error` is the reason if they cannot be used."""

    error: str = ""
    sha256: str = ""
    bytes: int = 0
    cells: int = 0
    regions: tuple[str, ...] = ()
    """Names of its ignore regions (`CellRecord.region`)."""
    covered: float = 0.0
    """Pixels in cells and ignore regions, overlaps counted twice."""
    shape: tuple[int, int] | None = None
    """(H, W) of the label image; None for outlines."""
    defects: dict[str, tuple[str, list[int | str]]] = field(default_factory=dict)


@dataclass
class PairedSource:
    """A source with annotation files per image; `complete` fills in what needs their content."""

    uri: str
    format: str
    pairs: dict[str, Pair]
    """Pair by file name of the entry."""
    entries: list[Entry]
    """Images to use; before `complete`, all with annotation files."""
    config: PrepareConfig
    defects: list[Defect] = field(default_factory=list)
    infos: dict[str, AnnotationInfo] = field(default_factory=dict)
    """By file name of the entry."""
    categories: list[dict[str, Any]] = field(default_factory=list)
    """Empty: these formats have no categories."""
    listed: list[Entry] = field(default_factory=list)
    """All images with annotation files, also if these cannot be used."""
    unsplit: frozenset[str] = frozenset()
    """File names of the images that are not in a folder named after a split."""
    assignment: splitting.Assignment | None = None
    """Split and group of these images, if `config.split` is set."""

    def encoded_cells(self, entry: Entry) -> bytes:
        """Return b"": the cells are read from the annotation files when the image is drawn."""
        return b""

    def covered_pixels(self, entry: Entry) -> float:
        """Return the number of pixels in the cells of `entry`, overlaps counted twice."""
        return self.infos[entry.image.file_name].covered

    def has_regions(self, rules: Rules) -> bool:
        """Whether an annotation is an ignore region; `rules` do not matter: these formats have no crowds."""
        return any(info.regions for info in self.infos.values())

    def unlisted_files(self) -> list[Defect]:
        """Return []: images without annotation files are `unpaired_file`."""
        return []

    def listed_counts(self) -> dict[str, dict[str, int]]:
        """Count the images with annotation files, and their cells, by split."""
        counts = {split: {"images": 0, "cells": 0} for split in SPLITS}
        for entry in self.listed:
            counts[entry.split]["images"] += 1
            counts[entry.split]["cells"] += entry.cells
        return counts

    def info_and_licences(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Return empty `info` and `licenses`: these formats have none."""
        return {}, []

    def files(self) -> list[dict[str, Any]]:
        """Return the provenance for dataset.json: one row per split, with one checksum over its annotation files."""
        rows = []
        for split in SPLITS:
            names = sorted(entry.image.file_name for entry in self.listed if entry.split == split)
            digest = hashlib.sha256()
            for name in names:
                digest.update(f"{self.infos[name].sha256} {name}\n".encode() if name in self.infos else b"")
            infos = [self.infos[name] for name in names if name in self.infos]
            if names:
                rows.append(
                    {
                        "split": split,
                        "format": self.format,
                        "files": sum(len(self.pairs[name].annotations) for name in names),
                        "sha256": digest.hexdigest(),
                        "bytes": sum(info.bytes for info in infos),
                        "images": len(names),
                        "cells": sum(info.cells for info in infos),
                    }
                )
        return rows

    def empty_files(self) -> list[str]:
        """Return []: an annotation file belongs to its image."""
        return []

    def requests(self, images: Mapping[str, ImageInfo]) -> list[dict[str, Any]]:
        """Return rows for `examine`: the annotation files of all readable images.

        Args:
            images: content of the image files by path.
        """
        items: list[dict[str, Any]] = [
            {"name": entry.image.file_name, "pair": asdict(self.pairs[entry.image.file_name])}
            | {"shape": [images[entry.path or ""].height, images[entry.path or ""].width]}
            | {"place": images[entry.path or ""].place}
            for entry in self.entries
            if not images[entry.path or ""].error
        ]
        return [
            {"source": self.uri, "rules": self.config.rules(), "ignore": self.config.ignore}
            | {"items": items[first : first + PAIRS_PER_TASK]}
            for first in range(0, len(items), PAIRS_PER_TASK)
        ]

    def complete(self, infos: Mapping[str, AnnotationInfo], images: Mapping[str, ImageInfo]) -> None:
        """Use the content of the annotation files: count cells, report defects, assign images to splits.

        Args:
            infos: results of `examine` by file name of the entry.
            images: content of the image files by path.

        Raises:
            UserError: no annotation file can be used; label images of another size with the rule `keep`; a name in
                `config.ignore` that occurs in no image.
        """
        self.infos = dict(infos)
        reasons = [f"{self.pairs[name].annotations[0]}: {info.error}" for name, info in infos.items() if info.error]
        if reasons and len(reasons) == len(infos):
            raise UserError(f"no annotation file of {self.uri} can be used: {reasons[0]}")
        occurring = {name.casefold() for info in infos.values() for name in info.regions}
        if unused := [name for name in self.config.ignore if name.casefold() not in occurring]:
            raise UserError(f"--ignore {unused[0]}: no image has {IGNORABLE[self.format]} {unused[0]}; leave it out")
        self._warn_of_other_backgrounds()
        self.listed = self._with_splits([self._completed(entry) for entry in self.entries])
        self.entries = []
        for entry in self.listed:
            info = infos.get(entry.image.file_name, AnnotationInfo())
            defects = list(self._defects(entry, info))
            self.defects += defects
            if not any(defect.rule in ("drop", "refuse") for defect in defects):
                self.entries.append(entry)
            image = images[entry.path or ""]
            if info.shape not in (None, (image.height, image.width)) and not image.error:
                self._refuse_keep(entry)

    def _warn_of_other_backgrounds(self) -> None:
        """Print images whose background may be a cell: background_label=background found none, as in most others."""
        if rule_of(self.config.on_defect, "background_label") != "background":
            return
        others = [name for name, info in self.infos.items() if info.cells and "background_label" not in info.defects]
        if others and len(others) < len(self.infos):
            console.console.print(
                f"background_label=background: no such label in {len(others)} of {len(self.infos)} images "
                f"({', '.join(others[:4])}): all their labels are cells; check them",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )

    def _completed(self, entry: Entry) -> Entry:
        info = self.infos.get(entry.image.file_name)
        if info is None:
            return entry
        height, width = info.shape or (None, None)
        return replace(entry, cells=info.cells, image=replace(entry.image, height=height, width=width))

    def _with_splits(self, entries: list[Entry]) -> list[Entry]:
        """Assign the images outside folders named after splits by `config.split`; without it they are in train."""
        unsplit = [entry for entry in entries if entry.image.file_name in self.unsplit]
        if self.config.split is None:
            if unsplit and self.format != UNLABELLED:
                fix = "divide them with --split 0.8 0.1 0.1" if len(unsplit) == len(entries) else "move them into one"
                console.console.print(
                    f"{len(unsplit)} images are in no folder named after a split: they are in train; {fix}",
                    markup=False,
                    highlight=False,
                    soft_wrap=True,
                )
            return entries
        assigned, self.assignment = splitting.with_splits(
            entries, self.config, lambda path: short_name(path, self.config.images)
        )
        return assigned

    def _defects(self, entry: Entry, info: AnnotationInfo) -> Iterator[Defect]:
        """Yield the defects of the annotation files of one image."""
        name, rules = entry.image.file_name, self.config.on_defect
        defects = {"unreadable_annotation": (info.error, [])} if info.error else info.defects
        for kind, (detail, ids) in defects.items():
            rule = rule_of(rules, kind, entry.split)
            hint = HINTS.get(kind, "") if rule == "refuse" else ""
            yield Defect(kind, rule, name, entry.split, list(ids), f"{detail}{hint}")

    def _refuse_keep(self, entry: Entry) -> None:
        if rule_of(self.config.on_defect, "wrong_size") == "keep":
            raise UserError(
                f"{entry.annotation} has another size than {entry.path}, so that wrong_size=keep cannot place its "
                "cells; use --on-defect wrong_size=scale or wrong_size=drop"
            )


def read_pairs(uri: str, paths: Sequence[str], config: PrepareConfig, annotation_format: str) -> PairedSource:
    """Pair the images and annotation files in `paths` of the source at `uri`; UserError without a pair.

    All images are in train unless they are in folders named after splits.
    """
    if config.categories or config.annotations:
        setting = "categories" if config.categories else "annotations"
        raise UserError(f"--{setting} is for COCO files: leave it out with --format {annotation_format}")
    if annotation_format == UNLABELLED:
        pairing = find_unlabelled(paths, config.images, uri)
    else:
        pairing = find_pairs(paths, annotation_format, config.images)
    check_ignore(pairing, annotation_format, config.ignore)
    rules = config.on_defect
    defects = [
        *(_unpaired(path, "no annotation file of this name", config) for path in pairing.images),
        *(_unpaired(path, "no image of this name", config) for path in pairing.annotations),
    ]
    pairs = list(pairing.pairs)
    for images, annotations in pairing.ambiguous:
        rule = rule_of(rules, "ambiguous_file")
        files = images if len(images) > 1 else annotations
        split = _split_of(images[0])
        defects.append(Defect("ambiguous_file", rule, images[0], split, [], ", ".join(files)))
        if rule == "take_first":
            pairs.append(Pair(_first(images), (_first(annotations),), False))
    if not pairs:
        raise UserError(_no_pairs(uri, annotation_format, pairing))
    in_splits = [pair.image for pair in pairs if _split_of(pair.image)]
    if config.split is not None and in_splits:
        examples = ", ".join(in_splits[:2]) + ", ..." * (len(in_splits) > 2)
        raise UserError(
            f"{uri} has splits ({examples}): leave out --split, or move these images out of the folders named after "
            "splits"
        )
    pairs.sort(key=lambda pair: pair.image)
    names = [short_name(pair.image, config.images) for pair in pairs]
    if len(set(names)) < len(names):
        names = [pair.image for pair in pairs]
    entries = [_entry(name, pair, config) for name, pair in zip(names, pairs)]
    unsplit = frozenset(name for name, pair in zip(names, pairs) if _split_of(pair.image) is None)
    return PairedSource(uri, annotation_format, dict(zip(names, pairs)), entries, config, defects, unsplit=unsplit)


def _unpaired(path: str, reason: str, config: PrepareConfig) -> Defect:
    return Defect("unpaired_file", rule_of(config.on_defect, "unpaired_file"), path, _split_of(path), [], reason)


def _split_of(path: str) -> str | None:
    splits = splits_of_folder(path)
    return next(iter(splits)) if len(splits) == 1 else None


def _first(paths: Sequence[str]) -> str:
    """Return the file in the fewest folders, then the first by name."""
    return min(paths, key=lambda path: (path.count("/"), path))


def _entry(name: str, pair: Pair, config: PrepareConfig) -> Entry:
    annotation = pair.annotations[0] if pair.annotations else ""
    annotation = annotation.rpartition("/")[0] if pair.cell_masks else annotation
    cell_type = config.cell_type or cell_type_of(name, "")
    split = _split_of(pair.image) or SPLITS[0]
    return Entry(split, annotation, ImageEntry(name, name, None, None), pair.image, 0, cell_type)


def _no_pairs(uri: str, annotation_format: str, pairing: Pairing) -> str:
    if pairing.ambiguous:
        images, annotations = pairing.ambiguous[0]
        number = len(pairing.ambiguous)
        return (
            f"no pair of image and annotation file in {uri}: {number} defect{'s' * (number > 1)} (ambiguous_file "
            f"{number}: {', '.join((*images, *annotations)[:4])}); leave one image and one annotation file of each "
            "name, or --on-defect ambiguous_file=take_first"
        )
    counts = f"{len(pairing.images)} images and {len(pairing.annotations)} annotation files"
    examples = ", ".join([*pairing.images[:2], *pairing.annotations[:2]])
    listing = f" ({examples})" if examples else ""
    return (
        f"no pair of image and annotation file in {uri}: {counts}{listing}; expected {LAYOUTS[annotation_format]}; "
        "if the folder of the images has another name, set --images FOLDER"
    )


def examine(row: dict[str, Any]) -> dict[str, Any]:
    """Read the annotation files of `PairedSource.requests`; return `infos`: fields of `AnnotationInfo` by name."""
    infos = {}
    for item in row["items"]:
        info = AnnotationInfo()
        try:
            files = _read_files(row["source"], item["pair"]["annotations"])
            info = replace(info, sha256=_sha256(files), bytes=sum(len(data) for _, data in files))
            place = item["place"] and Place(*item["place"])
            cell_masks, shape = item["pair"]["cell_masks"], tuple(item["shape"])
            annotation = image_files.read(files, cell_masks, shape, row["rules"], place, row["ignore"])
        except AnnotationError as error:
            info = replace(info, error=str(error))
        else:
            info = replace(
                info,
                cells=sum(not record.region for record in annotation.cells),
                regions=tuple(sorted({record.region for record in annotation.cells} - {""})),
                covered=cell_defects.covered(annotation.cells),
                shape=annotation.shape,
                defects=annotation.defects,
            )
        infos[item["name"]] = asdict(info)
    return {"infos": infos}


def to_info(fields: Mapping[str, Any]) -> AnnotationInfo:
    """Restore a result of `examine` after a JSON round trip."""
    defects = {kind: (detail, ids) for kind, (detail, ids) in fields["defects"].items()}
    shape, regions = fields["shape"] and tuple(fields["shape"]), tuple(fields["regions"])
    return AnnotationInfo(**{**fields, "shape": shape, "regions": regions, "defects": defects})


def read_cells(
    source: str, pair: Pair, sha256: str, shape: tuple[int, int], rules: Mapping[str, str], ignore: Sequence[str]
) -> list[CellRecord]:
    """Return the cells and ignore regions of one image (H, W), as `image_files.read`.

    Raises:
        UserError: its annotation files changed since they were examined.
    """
    files = _read_files(source, pair.annotations)
    if _sha256(files) != sha256:
        place = storage.join(source, pair.annotations[0])
        raise UserError(f"{place} changed while it was being prepared; run `raylivecell prepare` again")
    return image_files.read(files, pair.cell_masks, shape, rules, ignore=ignore).cells


def _read_files(source: str, paths: Sequence[str]) -> list[tuple[str, bytes]]:
    """Return (path, content) of annotation files; AnnotationError if they are too large or too many."""
    if len(paths) > MAX_CELLS:
        raise AnnotationError(f"{len(paths)} masks, more than {MAX_CELLS} cells; cut the image into tiles")
    total = 0
    for path in paths:
        filesystem, full_path = storage.open_uri(storage.join(source, path))
        total += filesystem.get_file_info(full_path).size or 0
    if total > MAX_FILE_BYTES:
        raise AnnotationError(f"{total} bytes, more than {MAX_FILE_BYTES}; compress it or cut the image into tiles")
    return [(path, storage.read_bytes(storage.join(source, path))) for path in paths]


def _sha256(files: Sequence[tuple[str, bytes]]) -> str:
    """Return the checksum of a file, or of the checksums of several."""
    checksums = [hashlib.sha256(data).hexdigest() for _, data in files]
    return checksums[0] if len(checksums) == 1 else hashlib.sha256("\n".join(checksums).encode()).hexdigest()
