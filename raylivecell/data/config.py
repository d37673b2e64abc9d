"""Settings of `prepare`: what to read, how to draw it, and the rule for each kind of defect."""

import difflib
from collections.abc import Mapping
from typing import Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from raylivecell.annotations.drawing import TargetsConfig
from raylivecell.core.settings import StrictModel
from raylivecell.images.intensity import Kind
from raylivecell.images.planes import Choice
from raylivecell.images.scale import MAX_SCALE, MIN_SCALE

Rules = Mapping[str, str]
"""Rule by kind of defect; missing kinds have their default rule."""


class DefectKind(NamedTuple):
    """A kind of defect and its rules."""

    rules: tuple[str, ...]
    """Allowed rules, the default first; a kind with one rule offers no choice."""
    description: str
    in_training: str = "drop"
    """Meaning of `keep_in_test` in train and val."""
    in_test: str = ""
    """Rule in test, for kinds without a choice that test treats differently."""


DEFECT_KINDS: dict[str, DefectKind] = {
    "truncated_json": DefectKind(
        ("refuse", "keep_complete_records"),
        "A truncated or invalid annotation file. keep_complete_records: use all records before the error, except the "
        "image whose annotations are cut off.",
    ),
    "bad_record": DefectKind(
        ("drop", "refuse"),
        "A record with missing or ill-typed fields, or a file name that leads out of the image folder.",
    ),
    "orphan_annotation": DefectKind(("drop",), "An annotation whose image is not listed."),
    "unpaired_file": DefectKind(
        ("drop", "refuse"),
        "An image without an annotation file of its name, or the opposite, in formats with files per image.",
    ),
    "unreadable_annotation": DefectKind(
        ("drop", "refuse"),
        "An annotation file that cannot be used, with its image: damaged, in colour, several pages, a pickle, labels "
        "that are negative or not integers.",
    ),
    "float_labels": DefectKind(("convert", "drop"), "A label image of floats that are all integers."),
    "background_label": DefectKind(
        ("refuse", "drop", "background", "keep"),
        "A label (or the mask of a cell) that covers more than half of the image and touches all four edges, or that "
        "separates all other labels from 0: the background, an inverted mask, or outlines such as VOC's 255. "
        "background: it is background, and 0 too; without another label, 0 is the cells (an inverted mask). keep: it "
        "is a cell.",
    ),
    "binary_mask": DefectKind(
        ("refuse", "components", "one_cell", "drop"),
        "A label image whose values are not cells: one value in several pieces, or values (or masks of single cells) "
        "with on average 5 pieces or more. components: each piece, connected by sides or corners, is a cell; cells "
        "that touch become one. "
        "one_cell: each value is a cell.",
    ),
    "label_in_pieces": DefectKind(
        ("keep", "largest", "split"),
        "A label in several pieces. keep: they are one cell; largest: only the largest piece is the cell; split: each "
        "piece is a cell.",
    ),
    "duplicate_entry": DefectKind(
        ("keep_most_cells", "keep_first"),
        "An image file listed twice in a split under different ids: which entry to keep.",
    ),
    "ambiguous_file": DefectKind(
        ("drop", "take_first"),
        "A file name that matches several files, even with folders named after splits. take_first: use the file in the "
        "fewest folders, then the first by name, which may be the wrong image.",
    ),
    "missing_file": DefectKind(("drop", "refuse"), "A listed image without a file."),
    "unlisted_file": DefectKind(("left out",), "An image file that no annotation file lists."),
    "unreadable_image": DefectKind(
        ("drop", "refuse"), "A file without an image, or with several planes or channels and no --plane or --channel."
    ),
    "colour_image": DefectKind(("convert", "drop"), "A colour file. convert: to luma (0.299 R + 0.587 G + 0.114 B)."),
    "sixteen_bit_image": DefectKind(
        ("scale", "drop"),
        "A 16-bit file. scale: to 8 bits by the intensity rule of the dataset (`intensity` in dataset.json).",
    ),
    "wrong_size": DefectKind(
        ("drop", "keep", "scale"),
        "A file whose size differs from the JSON or the label image. keep: use the outlines as they are; scale: scale "
        "outlines or label image to the file; a pixel belongs to a cell of a label image if half of it is covered.",
    ),
    "no_annotations": DefectKind(
        ("keep_in_test", "drop", "keep"),
        "A listed image without annotations; if kept, all of it is background. keep_in_test: drop in train and val, "
        "because the published test set includes such images.",
    ),
    "few_annotations": DefectKind(
        ("keep_in_test", "drop", "keep"),
        "Fewer annotations than 20 % of the median of the cell type, covering under 20 % of the pixels that look like "
        "cells (local standard deviation over 4 grey levels). If kept, it teaches that cells are background.",
    ),
    "leak": DefectKind(
        ("keep_test_first", "keep"),
        "The same file or pixels in two splits. keep_test_first: keep the image in test, otherwise in val.",
    ),
    "identical_pixels": DefectKind(
        ("keep_in_test", "keep_most_cells", "keep"),
        "Two files of one split with the same pixels. keep_in_test: keep both in test, the one with most cells in "
        "train and val.",
        in_training="keep_most_cells",
    ),
    "no_picture": DefectKind(("drop",), "A constant or saturated image, or one far too dark for its dataset."),
    "odd_intensity": DefectKind(("scale to the dataset",), "Background or spread far from the training images'."),
    "crowd_region": DefectKind(
        ("auto", "ignore", "drop", "keep"),
        "An annotation with iscrowd set: in COCO a region of many objects, in CVAT each cell drawn by brush. ignore: "
        "its pixels are left out, as with --ignore. drop: they are background. keep: use it as one cell. auto: ignore, "
        "but stop if over 10 % of a file's annotations have it.",
    ),
    "degenerate_polygon": DefectKind(
        ("drop",), "An outline with under 3 corners, no area or a non-finite value, or an RLE of the wrong size."
    ),
    "out_of_bounds": DefectKind(
        ("clip", "drop"), "An outline that leaves the image by more than a pixel. clip: cut it at the edge."
    ),
    # COCO unites the parts of a cell: a part inside another is not a hole.
    "inner_outline": DefectKind(("fill",), "A part of a cell inside another part of it."),
    "doubled_contour": DefectKind(
        ("keep_in_test", "keep_first", "keep"),
        "Two outlines of one image with an intersection over union of at least 0.8. keep_in_test: keep both in test, "
        "the first in train and val.",
        in_training="keep_first",
    ),
    # In test the part of its outline inside the image is still scored.
    "hidden_cell": DefectKind(
        ("drop",),
        "A cell without visible pixels: outside the image, or completely under smaller cells.",
        in_test="keep for scoring",
    ),
}
"""All kinds, in the order of the report."""
FRAMES = "frames"
"""Value of `group_by` that cuts series into ranges of frames."""

SPLIT_TOLERANCE = 0.011
"""Maximum difference of the sum of the fractions from 1: 0.33 0.33 0.33 is accepted."""


def chosen_rule(rules: Rules, kind: str) -> str:
    """Return the rule for `kind`: from `rules`, otherwise the default."""
    return rules.get(kind, DEFECT_KINDS[kind].rules[0])


def rule_of(rules: Rules, kind: str, split: str | None = None) -> str:
    """Return the rule for `kind` in `split`, with `keep_in_test` and `auto` resolved."""
    rule = chosen_rule(rules, kind)
    if rule == "keep_in_test":
        return "keep" if split == "test" else DEFECT_KINDS[kind].in_training
    if split == "test" and DEFECT_KINDS[kind].in_test:
        return DEFECT_KINDS[kind].in_test
    return "ignore" if rule == "auto" else rule


def _choices() -> dict[str, DefectKind]:
    """Return the kinds that have more than one rule."""
    return {name: kind for name, kind in DEFECT_KINDS.items() if len(kind.rules) > 1}


def _on_defect_help() -> str:
    lines = [
        "Rule for a kind of defect, KIND=RULE; repeatable. All defects are listed in dataset.json, also those of "
        "kinds without a choice, such as unlisted_file. Kinds:"
    ]
    for name, kind in _choices().items():
        default, *others = kind.rules
        lines += ["", f"{name}={default} (default), {', '.join(others)}: {kind.description}"]
    return "\n".join(lines)


class PrepareConfig(StrictModel):
    """What to read, how to draw it, and the rule for each kind of defect."""

    on_defect: dict[str, str] = Field(default={}, description=_on_defect_help())
    format: Literal["auto", "coco", "labels", "rois", "geojson", "images"] = "auto"
    """Format of the annotations. coco: JSON files for many images; labels: label images (TIFF, PNG, NPY) in `masks`
    next to `images`, or NAME_masks.png next to NAME.tif, or one mask per cell (ID/images/ID.png, ID/masks/*.png); rois:
    ImageJ ROIs (rois/NAME.zip or NAME.zip); geojson: QuPath's NAME.geojson. images: no annotations; all images are for
    training with a teacher (`train --teacher`). auto: COCO JSON if there is some, otherwise the only other format with
    annotations."""
    cell_type: str | None = None
    """Cell type of all images. Default: the part of the name before `_Phase_`, otherwise the category of most
    annotations."""
    name: str | None = None
    """Name of the dataset, for reports and exported networks. Default: `description` in the annotation files."""
    licence: str | None = None
    """Licence of the images, which networks trained on them follow: an SPDX identifier such as CC-BY-4.0, or a text.
    Default: that of the annotation files."""
    citation: str | None = None
    """How to cite the dataset. Default: contributor, year and URL in the annotation files."""
    annotations: dict[Literal["train", "val", "test", "all"], str] = Field(default={})
    """Annotation file of each split: a path inside the source or a pattern (`LIVECell_single_cells/*/train.json`);
    with --split, the file of all images: `all PATH`. Default: detected from file and folder names."""
    split: tuple[float, float, float] | None = None
    """Fractions of the images for train, val and test, such as 0.8 0.1 0.1, for a source without splits. Groups of
    images (--group-by) are never divided. Images without annotations are dropped, unless the rule is
    no_annotations=keep."""
    group_by: str | None = None
    """Regular expression that finds the group of an image in its path inside the image folder: its captures, otherwise
    the entire match. Default: the path without site, time and frame number, so that `A172_Phase_A7_1_01d08h00m_2.tif`
    is in group `A172_Phase_A7` (the well), and `set18.tif` in group `set`. `frames`: cut each such series into ranges
    of frames, for sources with few series; neighbouring frames are similar, so scores are too high. `.*`: each image is
    a group of its own."""
    images: str | None = None
    """Folder of the images inside the source. Default: `images` if it exists, otherwise the entire source; in formats
    with files per image, all folders that are not named after annotations."""
    plane: str | None = None
    """Plane of the files that contain several (time, depth, pages): its number from 0 (3), or indices of axes (z2,
    t3_z2). Without it, such a file is an unreadable_image, since annotations belong to one plane."""
    channel: int | None = Field(default=None, ge=0)
    """Channel of the files that contain several, from 0."""
    categories: tuple[str, ...] = ()
    """Categories (names or ids) whose annotations are cells; all others are background. Default: all are cells."""
    ignore: tuple[str, ...] = ()
    """Ignore regions: pixels without annotation, which training and scores leave out. Values of label images (255),
    categories of COCO files (names or ids), names of ImageJ ROIs, or classes in GeoJSON (QuPath's `Ignore*` always is
    one). Pixels of annotated cells stay cells."""
    follow_links: bool = False
    """Follow links to files and folders outside the source. Without it, only links into the stores of git-annex, DVC
    and Hugging Face are followed, whose files are named by a checksum."""
    targets: TargetsConfig = TargetsConfig()
    """How targets are drawn."""
    intensity: Kind | None = None
    """How grey levels are brought to 8 bits. robust (default): one map for all images, computed from the training
    images; as_is: 8 bits as stored, 16 bits by their bit depth; percentile: each image by its own background and
    percentiles, for images of several microscopes."""
    intensity_from: str | None = None
    """Dataset, checkpoint, run or .onnx file whose intensity rule to use, for images to score with that network.
    Default: the rule of --intensity."""
    pixel_scale: float = Field(default=1.0, ge=MIN_SCALE, le=MAX_SCALE)
    """Factor by which images and outlines are scaled: 0.5 halves width and height. Networks trained on the dataset
    scale images by it too, and return results in the pixels of the original images."""
    diameter_from: str | None = None
    """Dataset, checkpoint, run or .onnx file whose cell size to use: the factor gives the training cells (or all cells,
    without a training split) the median diameter of its training cells."""
    shard_images: int = Field(default=64, ge=1)
    """Maximum images per shard; fewer if they are large (134 million pixels per shard)."""
    overwrite: bool = False
    """Replace a dataset in OUT that was created from another source or with other settings."""

    @field_validator("split")
    @classmethod
    def _check_split(cls, split: tuple[float, float, float] | None) -> tuple[float, float, float] | None:
        """ValueError unless the fractions are at least 0, have a sum of 1 within rounding, and train has some."""
        if split is None:
            return None
        text = " ".join(f"{fraction:g}" for fraction in split)
        if not all(0 <= fraction <= 1 for fraction in split) or abs(sum(split) - 1) > SPLIT_TOLERANCE:
            raise ValueError(f"{text}: give the fractions of train, val and test, with a sum of 1, such as 0.8 0.1 0.1")
        if not split[0]:
            raise ValueError(f"{text}: the fraction of train must be above 0")
        return split

    @field_validator("on_defect")
    @classmethod
    def _check_rules(cls, on_defect: dict[str, str]) -> dict[str, str]:
        """ValueError for an unknown kind or rule; it suggests the nearest one and lists the allowed rules."""
        kinds = _choices()
        for name, rule in on_defect.items():
            if name not in kinds:
                nearest = difflib.get_close_matches(name, kinds, n=1, cutoff=0)[0]
                raise ValueError(f"unknown kind {name!r}; did you mean {nearest}={'|'.join(kinds[nearest].rules)}?")
            allowed = ", ".join(kinds[name].rules)
            if not rule:
                raise ValueError(f"{name} needs a rule: {name}=RULE, one of {allowed}")
            if rule not in kinds[name].rules:
                nearest = difflib.get_close_matches(rule, kinds[name].rules, n=1, cutoff=0)[0]
                raise ValueError(f"unknown rule {name}={rule}; did you mean {nearest}? Rules: {allowed}")
        return on_defect

    @property
    def legal(self) -> dict[str, str]:
        """Name, licence and citation, as far as they are given."""
        return self.model_dump(include={"name", "licence", "citation"}, exclude_none=True)

    @property
    def choice(self) -> Choice:
        """Planes and channel to read."""
        return Choice(self.plane, self.channel)

    @model_validator(mode="after")
    def _check_sources(self) -> "PrepareConfig":
        if self.intensity and self.intensity_from:
            raise ValueError("--intensity-from gives the rule; leave out --intensity")
        if self.pixel_scale != 1 and self.diameter_from:
            raise ValueError("--diameter-from gives the factor; leave out --pixel-scale")
        for flag, value in {
            "--split": self.split,
            "--ignore": self.ignore,
            "--diameter-from": self.diameter_from,
        }.items():
            if value and self.format == "images":
                hint = "; give --pixel-scale" if flag == "--diameter-from" else ""
                raise ValueError(f"{flag} is for annotated images: leave it out with --format images{hint}")
        return self

    def rules(self) -> dict[str, str]:
        """Return the rule for every kind that offers a choice."""
        return {name: chosen_rule(self.on_defect, name) for name in _choices()}
