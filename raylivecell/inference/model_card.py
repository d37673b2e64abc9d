"""Description of an exported network for the BioImage Model Zoo: rdf.yaml and README.md.

rdf.yaml follows https://bioimage-io.github.io/spec-bioimage-io, format 0.5.4: files of this format are also read by
programs that do not know the current one. Nothing in it refers to this machine: no paths, no user, no host.
"""

import hashlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import pydantic
import yaml

from raylivecell import recipe as recipes
from raylivecell.cells.watershed import InstanceConfig
from raylivecell.core import storage
from raylivecell.core.errors import UserError
from raylivecell.core.version import __version__
from raylivecell.images.intensity import Intensity
from raylivecell.network import windows
from raylivecell.reports import page
from raylivecell.runs import checkpoint, parents, progress, teachers
from raylivecell.runs.parents import DataRecord, Parent
from raylivecell.runs.teachers import Teacher
from raylivecell.targets.registry import target

FORMAT = "0.5.4"
RDF, README, COVER, SAMPLE = "rdf.yaml", "README.md", "cover.png", "sample_input.tif"
ONNX, TORCHSCRIPT = "weights.onnx", "weights.pt"
TEST_INPUT, TEST_OUTPUT = "test_input.npy", "test_output.npy"
NOT_STATED = "not stated"
METRICS = "metrics.json"
SCORES = ("mean_image_dice", "dice", "iou", "msa", "ap", "ap50", "ap75")
"""Scores of metrics.json in the package, each with its 95 % interval."""
LICENCES = ("MIT", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "GPL-3.0-only", "ODbL-1.0", "PDDL-1.0")
"""SPDX identifiers that are recognised, in addition to those of Creative Commons."""
UNET = {
    "text": "Ronneberger, O., Fischer, P. & Brox, T. U-Net: Convolutional Networks for Biomedical Image Segmentation. "
    "MICCAI 2015, LNCS 9351, 234-241.",
    "doi": "10.1007/978-3-319-24574-4_28",
}
CHANNELS = {
    "foreground": "probability that the pixel belongs to a cell",
    "boundary": "probability that the pixel is on the boundary of a cell",
    "centre_distance": "distance to the centre of the cell, divided by the largest in the cell; valid inside cells",
    "boundary_distance": "distance to the boundary of the cell, divided by the largest in the cell; valid inside cells",
}
PHASE_CONTRAST = ("LIVECell", "raylivecell synthetic")
"""Prefixes of the names of datasets that are known to be phase-contrast images."""


class Card(NamedTuple):
    """Facts about a checkpoint that are described in its package."""

    recipe: recipes.Recipe
    rule: Intensity
    thresholds: InstanceConfig
    data: DataRecord
    """Its training data."""
    parents: tuple[Parent, ...]
    """Networks from which its training started."""
    teacher: Teacher | None
    """The network whose maps it learned."""
    fingerprint: str
    """SHA-256 of the checkpoint's weights."""
    authors: tuple[str, ...]
    validation: Mapping[str, Any]
    """Scores on validation images at the checkpoint's step; empty if it has no report."""
    test: Mapping[str, Any] | None
    """Scores from metrics.json."""

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the output channels."""
        return target(self.recipe.targets).channels

    @property
    def datasets(self) -> tuple[DataRecord, ...]:
        """The training data, and that behind its parents and its teacher, without repetition."""
        of_teacher = self.teacher.datasets if self.teacher else ()
        return tuple(dict.fromkeys((self.data, *parents.datasets(self.parents), *of_teacher)))

    @property
    def licence(self) -> str | None:
        """SPDX identifier of the licence of all training data, which the weights follow.

        None if a licence is not recognised, or if they differ: which one applies is then for the author to decide.
        """
        licences = {spdx(data.licence) for data in self.datasets}
        return licences.pop() if len(licences) == 1 else None

    @property
    def cite(self) -> list[dict[str, str]]:
        """Works to cite: those of the training data that have a DOI or a link, and the U-Net."""
        entries = [entry for data in self.datasets for entry in citation(data.citation)]
        if "unet" in self.recipe.model.name.lower():
            entries.append(UNET)
        return list({entry.get("doi", entry.get("url")): entry for entry in entries}.values())

    @property
    def urls(self) -> tuple[str, ...]:
        """Links in rdf.yaml."""
        return tuple(entry["url"] for entry in self.cite if "url" in entry)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a publication needs and the checkpoint does not state, each with the fix."""
        notes = [] if self.authors else ["author not stated: give --author NAME"]
        if self.licence is None:
            stated = "; ".join(f"{data.name}: {data.licence}" for data in self.datasets)
            notes.append(
                f"no single SPDX licence follows from the training data ({stated}): add `license:` to {RDF} before you "
                "publish"
            )
        return tuple(notes)

    def rdf(self, hashes: Mapping[str, str], opset: int, pytorch: str, min_side: int) -> bytes:
        """Return rdf.yaml.

        Args:
            hashes: SHA-256 of the package's other files by name.
            opset: version of ONNX's operators.
            pytorch: version of PyTorch.
            min_side: smallest height and width of an image.
        """
        values: dict[str, Any] = {
            "format_version": FORMAT,
            "type": "model",
            "name": _plain_name(f"Cells in {self.data.name} ({self.recipe.model.name}, {self.recipe.targets})"),
            "description": self._description(),
            "authors": [{"name": name} for name in self.authors or (NOT_STATED,)],
            **({"license": self.licence} if self.licence else {}),
            "cite": self.cite,
            "documentation": README,
            "covers": [COVER],
            "tags": self._tags(),
            "inputs": [self._input(hashes, min_side)],
            "outputs": [self._output(hashes)],
            "weights": self._weights(hashes, opset, pytorch),
            "training_data": self._training_data(),
            "config": {"bioimageio": {"nickname": f"raylivecell-{self.fingerprint[:8]}"}, "raylivecell": self.facts()},
        }
        return yaml.safe_dump(values, sort_keys=False, width=120).encode()

    def facts(self) -> dict[str, Any]:
        """Return what raylivecell knows about the network, as YAML values."""
        return {
            "version": __version__,
            "fingerprint": self.fingerprint,
            "targets": self.recipe.targets,
            "channels": list(self.channels),
            "thresholds": self.thresholds.model_dump(),
            "intensity": self.rule.model_dump(mode="json"),
            "data": self.data.model_dump(),
            "parents": [
                parent.model_dump(mode="json", include={"sha256", "step", "targets", "data"}) for parent in self.parents
            ],
            "teacher": self.teacher and self.teacher.model_dump(mode="json", exclude={"teacher", "checkpoint"}),
            "scores": {"validation": dict(self.validation), "evaluate": self.test and dict(self.test)},
            "recipe": self.recipe.model_dump(mode="json"),
        }

    def readme(self) -> str:
        """Return README.md."""
        kind = target(self.recipe.targets)
        return page.ENVIRONMENT.get_template("bioimageio.md.j2").render(
            card=self,
            channels=[(name, CHANNELS.get(name, name)) for name in self.channels],
            height=kind.height_expression,
            overlap=round(windows.OVERLAP * windows.WINDOW),
            window=windows.WINDOW,
            names=SCORES,
            version=__version__,
            weights=ONNX,
        )

    def _description(self) -> str:
        channels = ", ".join(name.replace("_", " ") for name in self.channels)
        source = f"{self.recipe.model.name} trained by raylivecell {__version__} on {self.data.name}"
        return f"Segments cells in grey images. Output: maps ({channels}) for a watershed, see {README}. {source}."[
            :500
        ]

    def _tags(self) -> list[str]:
        network = "unet" if "unet" in self.recipe.model.name.lower() else self.recipe.model.name.lower()
        task = ["semantic-segmentation"] if len(self.channels) == 1 else ["instance-segmentation"]
        modality = ["transmission-light-microscopy", "phase-contrast"]
        tags = modality if self.data.name.startswith(PHASE_CONTRAST) else []
        return ["2d", "cells", *task, *tags, network, "pytorch", "onnx", "raylivecell"]

    def _input(self, hashes: Mapping[str, str], min_side: int) -> dict[str, Any]:
        sizes = [{"type": "space", "id": axis, "size": {"min": min_side, "step": 1}} for axis in "yx"]
        return {
            "id": "image",
            "description": f"grey values of {self.rule.depth}-bit files as stored: do not rescale them",
            "axes": [
                {"type": "batch"},
                {"type": "channel", "channel_names": ["grey"]},
                *sizes,
            ],
            "data": {"type": "float32", "range": [0, 2**self.rule.depth - 1]},
            "test_tensor": {"source": TEST_INPUT, "sha256": hashes[TEST_INPUT]},
            "sample_tensor": {"source": SAMPLE, "sha256": hashes[SAMPLE]},
        }

    def _output(self, hashes: Mapping[str, str]) -> dict[str, Any]:
        sizes = [{"type": "space", "id": axis, "size": {"tensor_id": "image", "axis_id": axis}} for axis in "yx"]
        return {
            "id": "maps",
            "description": "0 to 1",
            "axes": [{"type": "batch"}, {"type": "channel", "channel_names": list(self.channels)}, *sizes],
            "data": {"type": "float32", "range": [0, 1]},
            "test_tensor": {"source": TEST_OUTPUT, "sha256": hashes[TEST_OUTPUT]},
        }

    def _weights(self, hashes: Mapping[str, str], opset: int, pytorch: str) -> dict[str, Any]:
        comment = "Intensity rule, normalisation and sigmoid are part of the graph."
        onnx = {"source": ONNX, "sha256": hashes[ONNX], "opset_version": opset, "comment": comment}
        if TORCHSCRIPT not in hashes:
            return {"onnx": onnx}
        script = {"source": TORCHSCRIPT, "sha256": hashes[TORCHSCRIPT], "pytorch_version": pytorch, "comment": comment}
        return {"onnx": onnx, "torchscript": {**script, "parent": "onnx"}}

    def _training_data(self) -> dict[str, Any]:
        texts = [f"{data.name}, licence: {data.licence}. {data.citation}" for data in self.datasets]
        return {
            "type": "dataset",
            "format_version": "0.3.0",
            "name": _plain_name(f"{self.data.name} dataset"),
            "description": " The training used a network trained on ".join(texts)[:1000],
            **({"license": self.licence} if self.licence else {}),
            "cite": [entry for entry in self.cite if entry is not UNET],
            "config": {"raylivecell": {"sha256": self.data.sha256}},
        }


def describe(uri: str, folder: str, authors: tuple[str, ...], scores: str | None) -> Card:
    """Collect the facts about the checkpoint in `folder`.

    Args:
        uri: the run, or the checkpoint itself.
        folder: URI of the checkpoint.
        authors: names of people.
        scores: URI of a metrics.json or its folder; None: look in the folders in `uri`.

    Raises:
        UserError: an invalid name; no metrics.json at `scores`, or that of another network or other thresholds.
    """
    for name in authors:
        if not name.strip() or re.search(r"[/\\\n]", name):
            raise UserError(f"--author {name!r}: give the name of a person, without slashes")
    recipe, state = recipes.load(storage.join(folder, progress.RECIPE)), progress.load_state(folder)
    row = state.history[-1] if state.reported() else {}
    card = Card(
        recipe,
        checkpoint.load_intensity(folder),
        checkpoint.load_instances(folder, recipe.targets),
        DataRecord.of(checkpoint.own_data(folder)),
        parents.read(folder),
        teachers.read(folder),
        hashlib.sha256(storage.read_bytes(storage.join(folder, progress.MODEL))).hexdigest(),
        authors,
        {name: value for name, value in row.items() if name == "step" or name.startswith("val_")},
        None,
    )
    return card._replace(test=_test_scores(card, uri, scores))


def _test_scores(card: Card, uri: str, scores: str | None) -> dict[str, Any] | None:
    if scores is not None:
        file = scores if scores.endswith(".json") else storage.join(scores, METRICS)
        if not storage.exists(file):
            raise UserError(f"no {METRICS} at {scores}; give the --out folder of `raylivecell evaluate`")
        metrics = _read_metrics(card, file)
        if metrics is None:
            raise UserError(f"{file} was measured with another network or other thresholds; evaluate this checkpoint")
        return metrics
    names = [name for name in storage.list_names(uri) if not name.startswith(progress.FOLDER)]
    files = [storage.join(uri, name, METRICS) for name in names]
    found_metrics = [_read_metrics(card, file) for file in files if storage.exists(file)]
    usable = [metrics for metrics in found_metrics if metrics is not None]
    return max(usable, key=lambda metrics: (metrics["split"] == "test", metrics["date"]), default=None)


def _read_metrics(card: Card, file: str) -> dict[str, Any] | None:
    """Scores in a metrics.json of `evaluate`; None if they are those of another network or of other thresholds."""
    values = storage.read_json(file)
    with storage.validating(file, "run `raylivecell evaluate` again"):
        if values.get("checkpoint", {}).get("sha256") != card.fingerprint:
            return None
        if InstanceConfig.model_validate(values["thresholds"]) != card.thresholds:
            return None
        return {
            "split": str(values["split"]),
            "images": int(values["images"]),
            "data": {name: str(values["data"][name]) for name in ("name", "sha256")},
            "tta": bool(values["tta"]),
            "date": str(values["date"]),
            **{name: None if values[name] is None else float(values[name]) for name in SCORES},
            "intervals": {name: _interval(values["intervals"].get(name)) for name in SCORES},
        }


def _interval(bounds: Any) -> list[float] | None:
    return None if bounds is None else [float(bound) for bound in bounds]


def spdx(licence: str) -> str | None:
    """SPDX identifier of a licence: Creative Commons by name or URL, and LICENCES; None for any other text.

    >>> spdx("CC BY-NC 4.0"), spdx("https://creativecommons.org/publicdomain/zero/1.0/"), spdx("not stated")
    ('CC-BY-NC-4.0', 'CC0-1.0', None)
    """
    text = licence.strip()
    if text in LICENCES:
        return text
    text = re.sub(r"https?://(www\.)?creativecommons\.org/(licenses|publicdomain)/", "cc ", text.lower())
    text = text.replace("zero", "0").replace("creative commons", "cc").replace("attribution", "by")
    text = text.replace("noncommercial", "nc").replace("sharealike", "sa").replace("noderivatives", "nd")
    text = re.sub(r"\b(international|universal|licen[cs]e|public domain dedication)\b|(legalcode|deed)\S*", " ", text)
    words = re.sub(r"[^a-z0-9.]+", " ", text).split()
    words = ["cc", "0", *words[1:]] if words[:1] == ["cc0"] else words
    words = [*words, "1.0"] if words == ["cc", "0"] else words
    if words[:1] == ["by"] or words[:1] == ["0"]:
        words = ["cc", *words]
    name = "-".join(words)
    if re.fullmatch(r"cc-0-1\.0", name):
        return "CC0-1.0"
    return name.upper() if re.fullmatch(r"cc-by(-nc)?(-sa|-nd)?-[1-4]\.[05]", name) else None


def citation(text: str) -> list[dict[str, str]]:
    """Entries of `cite` with the DOIs or else the link in `text`; empty without either: the specification needs one."""
    dois = re.findall(r"\b10\.\d{4,9}/[^\s\"<>]+", text)
    if dois:
        return [{"text": text, "doi": doi.rstrip(".,;)")} for doi in dict.fromkeys(dois)]
    for url in re.findall(r"https?://[^\s\"<>]+", text):
        try:
            return [{"text": text, "url": str(pydantic.HttpUrl(url.rstrip(".,;)")))}]
        except ValueError:
            continue
    return []


def _plain_name(name: str) -> str:
    """Restrict a name to the characters and the length that the specification allows."""
    return re.sub(r"[^A-Za-z0-9_+\-() ]+", " ", name).strip()[:64]
