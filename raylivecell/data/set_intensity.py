"""The intensity rule of a set that is being prepared, and which of its images are unusual for it."""

from collections.abc import Mapping, Sequence

from raylivecell.data.defects import Defect, DefectRules, Entry, ImageInfo, found_in
from raylivecell.images import intensity
from raylivecell.images.grey_levels import Measures
from raylivecell.images.intensity import Intensity


def rule_of_set(entries: Sequence[Entry], facts: Mapping[str, ImageInfo]) -> Intensity:
    """The rule chosen from the training images; from all where there are none."""
    train = [entry for entry in entries if entry.split == "train"]
    return intensity.choose([_measures(entry, facts) for entry in train or entries])


def judge_levels(
    entries: Sequence[Entry], facts: Mapping[str, ImageInfo], rule: Intensity, rules: DefectRules
) -> tuple[list[Entry], list[Defect]]:
    """The entries that hold a picture, and every image that holds none or is unusual for its set."""
    kept, found = [], []
    for entry in entries:
        fit = intensity.fit(_measures(entry, facts), rule)
        if fit.usable:
            kept.append(entry)
        unusual = [text for text in fit.warnings if not text.startswith("padding")]
        if unusual:
            defect = "odd_intensity" if fit.usable else "no_picture"
            found.append(found_in(entry, defect, rules, "; ".join(unusual)))
    return kept, found


def _measures(entry: Entry, facts: Mapping[str, ImageInfo]) -> Measures:
    return Measures(*facts[entry.path or ""].measures)
