"""The intensity rule of a set that is being prepared, and which of its images are unusual for it."""

from collections.abc import Mapping, Sequence

from raylivecell.core import storage
from raylivecell.core.errors import UserError
from raylivecell.data import shards
from raylivecell.data.defects import DefectRules, Entry, Facts, Found, found_in
from raylivecell.data.plan import PrepareConfig
from raylivecell.images import intensity
from raylivecell.images.grey_levels import Measures
from raylivecell.images.intensity import Intensity
from raylivecell.runs import progress


def rule_of_set(entries: Sequence[Entry], facts: Mapping[str, Facts], config: PrepareConfig) -> Intensity:
    """The rule of `config.intensity_from`; else one chosen from the training images (or all)."""
    if config.intensity_from:
        return read_rule(config.intensity_from)
    train = [entry for entry in entries if entry.split == "train"]
    return intensity.choose([_measures(entry, facts) for entry in train or entries])


def read_rule(uri: str) -> Intensity:
    """The rule of the dataset, checkpoint, run or ONNX file at `uri`; UserError where there is none."""
    uri = storage.absolute(uri).rstrip("/")
    if uri.endswith(".onnx"):
        from raylivecell.inference import onnx_model

        return onnx_model.load(uri).intensity
    if storage.exists(storage.join(uri, "dataset.json")):
        return shards.intensity(uri)
    from raylivecell.runs import checkpoint  # torch

    try:
        return checkpoint.load_intensity(progress.find(uri))
    except UserError as error:
        raise UserError(f"--intensity-from {uri}: no dataset there, and {error}") from error


def judge_levels(
    entries: Sequence[Entry], facts: Mapping[str, Facts], rule: Intensity, rules: DefectRules
) -> tuple[list[Entry], list[Found]]:
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


def _measures(entry: Entry, facts: Mapping[str, Facts]) -> Measures:
    return Measures(*facts[entry.path or ""].measures)
