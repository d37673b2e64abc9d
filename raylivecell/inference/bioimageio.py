"""Export a checkpoint as a bioimage.io model package: one .zip for the BioImage Model Zoo and programs that read it.

    rdf.yaml            description by version 0.5 of the model specification, see `model_card`
    weights.onnx        float32 (B, 1, H, W), grey values as stored -> maps float32 (B, C, H, W), 0 to 1
    weights.pt          the same as TorchScript, for the U-Net only: MONAI's networks cannot be traced for every size
    README.md           what the network needs, and how to get cells from its maps
    test_input.npy, test_output.npy, sample_input.tif, cover.png

Unlike in an exported .onnx, the intensity rule is part of the graph, because other programs cannot read the rule. The
test image is synthetic: images of the training data may have a licence that forbids copies. The package has no time
stamps: two runs of the command give equal bytes. Nothing is sent or fetched.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pydantic
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raylivecell import recipe as recipes
from raylivecell.cells import watershed
from raylivecell.core import storage
from raylivecell.core.errors import UserError
from raylivecell.images import grey_levels, intensity
from raylivecell.images.grey_levels import Grey
from raylivecell.images.intensity import Intensity
from raylivecell.inference import graph_files, model_card, onnx_model, torchscript
from raylivecell.network import forward
from raylivecell.reports import overlay
from raylivecell.runs import checkpoint, progress
from raylivecell.synthetic import layout, writer

MIN_SIDE = 32
"""Smallest height and width of an image that the package states, for networks of up to four levels."""
TEST_SIDE = 256
TEST_FRAME = (0, 3)
"""Seed and index of the synthetic test image: round cells, most of which do not touch."""


class _StoredImageNetwork(nn.Module):
    """Intensity rule, network and sigmoid: stored grey values to maps."""

    table: Tensor

    def __init__(self, network: nn.Module, rule: Intensity) -> None:
        super().__init__()
        self.network = network
        # A table instead of the formula: float32 would round some quotients to another level than `intensity.apply`.
        values = np.arange(2**rule.depth, dtype=_dtype(rule))
        self.register_buffer("table", torch.from_numpy(intensity.apply(values, rule).astype(np.float32))[:, None])

    def forward(self, image: Tensor) -> Tensor:
        index = image.round().clamp(0, len(self.table) - 1).long()
        levels = nn.functional.embedding(index, self.table)[..., 0]  # ONNX's Gather; indexing would be a GatherND
        return torch.sigmoid(self.network(levels))


class Package(NamedTuple):
    """A package in memory."""

    data: bytes
    difference: float
    """Largest difference of the file's maps from the network's."""
    notes: tuple[str, ...]
    """What is missing for a publication."""


def package(checkpoint_uri: str, authors: tuple[str, ...] = (), scores: str | None = None) -> Package:
    """Package the network of a checkpoint, or of a run's best checkpoint; the package is validated and run.

    Args:
        checkpoint_uri: folder of a checkpoint or a run.
        authors: names; without any, "not stated".
        scores: folder with the metrics.json of `evaluate`; default: those of this checkpoint in the run's subfolders.

    Raises:
        UserError: no checkpoint; a rule that the graph cannot contain; metrics of another checkpoint; bioimageio.spec
            is not installed, or refuses the package.
    """
    try:
        import bioimageio.spec  # noqa: F401  # fail before the export
    except ImportError as error:
        raise UserError("a bioimage.io package needs bioimageio.spec: pip install 'raylivecell[export]'") from error
    uri = storage.absolute(checkpoint_uri)
    folder = progress.find(uri)
    network, recipe = checkpoint.load_model(folder)
    rule = checkpoint.load_intensity(folder)
    if rule.rule == "percentile":
        raise UserError(
            "intensity rule percentile depends on each image's statistics and cannot be part of the graph: export to "
            ".onnx, which `raylivecell predict` runs with the rule, or train on data prepared with --intensity robust"
        )
    if (pixel_scale := checkpoint.load_scale(folder).pixel_scale) != 1:
        raise UserError(
            f"pixel scale {pixel_scale:g} cannot be part of the graph, and other programs would not scale the images: "
            "export to .onnx, which `raylivecell predict` runs with it, or train on data prepared without --pixel-scale"
            " and --diameter-from"
        )
    card = model_card.describe(uri, folder, authors, scores)
    model = _StoredImageNetwork(network, rule).eval()
    with graph_files.quiet():
        weights = {model_card.ONNX: graph_files.onnx_file(model, {onnx_model.PACKAGED: json.dumps(card.facts())})}
        runs = [graph_files.onnx_maps(weights[model_card.ONNX])]
        if recipe.model.name == "unet":
            weights[model_card.TORCHSCRIPT] = torchscript.write(model, *graph_files.example())
            runs.append(torchscript.maps(weights[model_card.TORCHSCRIPT]))
        difference = float(np.max([_difference(network, rule, run, min_side(recipe)) for run in runs]))
    data = _zip(_files(network, recipe, rule, card, weights))
    _validate(data, card.urls)
    return Package(data, difference, card.notes)


def min_side(recipe: recipes.Recipe) -> int:
    """Smallest height and width that the package states; the U-Net needs 2 to the number of its levels."""
    levels = len(recipe.model.features) if recipe.model.name == "unet" else 0
    return max(MIN_SIDE, 2 ** (levels + 1))


def maps(network: nn.Module, pixels: Grey, rule: Intensity) -> NDArray[np.float32]:
    """Maps of a stored image (H, W) within the training range by raylivecell's own path, float32 (C, H, W)."""
    return forward.maps(network, intensity.apply(pixels, rule))


@torch.no_grad()
def _difference(network: nn.Module, rule: Intensity, run: graph_files.Maps, side: int) -> float:
    """Largest difference of the file's maps from `maps`, over several sizes; NaN if any is NaN."""
    rng, differences = np.random.default_rng(0), []
    for size in ((side, side), (side + 1, 2 * side + 3), *graph_files.SIZES):
        pixels = rng.normal(rule.background, max(rule.spread, 4.0) / 4, (2, *size))
        pixels = pixels.round().clip(0, 2**rule.depth - 1).astype(_dtype(rule))
        outputs = run(pixels[:, None].astype(np.float32))
        differences += [np.abs(output - maps(network, image, rule)).max() for output, image in zip(outputs, pixels)]
    return float(np.max(differences))


def _files(
    network: nn.Module, recipe: recipes.Recipe, rule: Intensity, card: model_card.Card, weights: dict[str, bytes]
) -> dict[str, bytes]:
    import onnx

    pixels = _test_image(rule, max(TEST_SIDE, min_side(recipe)))
    output = maps(network, pixels, rule)
    files = {
        **weights,
        model_card.TEST_INPUT: _npy(pixels[None, None].astype(np.float32)),
        model_card.TEST_OUTPUT: _npy(output[None]),
        model_card.SAMPLE: layout.encode_tiff(pixels),
        model_card.COVER: _cover(intensity.apply(pixels, rule), output, recipe, card),
        model_card.README: card.readme().encode(),
    }
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    opset = next(
        entry.version for entry in onnx.load_from_string(weights[model_card.ONNX]).opset_import if entry.domain == ""
    )
    return {model_card.RDF: card.rdf(hashes, opset, torch.__version__.partition("+")[0], min_side(recipe)), **files}


def _test_image(rule: Intensity, side: int) -> Grey:
    """A synthetic image (side, side) with the depth, background and spread of the training images."""
    levels = writer.draw_frame(*TEST_FRAME)[0]
    levels = np.pad(levels, [(0, max(0, side - length)) for length in levels.shape], mode="reflect")[:side, :side]
    contrast = rule.spread / max(grey_levels.measure(levels).spread, 1.0)
    values = rule.background + (levels.astype(np.float64) - 128) * contrast
    return values.round().clip(0, 2**rule.depth - 1).astype(_dtype(rule))


def _cover(
    levels: NDArray[np.uint8], output: NDArray[np.float32], recipe: recipes.Recipe, card: model_card.Card
) -> bytes:
    """PNG, twice as wide as high: the test image, and the same with the outlines of its cells."""
    labels = watershed.segment(output, recipe.targets, card.thresholds)
    grey = np.repeat(levels[..., None], 3, axis=2)
    return overlay.png(np.hstack([grey, overlay.outlined(levels, labels)]))


def _npy(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _zip(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            member = zipfile.ZipInfo(name, torchscript.EPOCH)
            member.compress_type, member.create_system, member.external_attr = zipfile.ZIP_DEFLATED, 3, 0o644 << 16
            archive.writestr(member, content)
    return buffer.getvalue()


def _validate(data: bytes, urls: tuple[str, ...]) -> None:
    """Check the package with bioimageio.spec, contents of files included.

    `urls`: links in the description, which would be requested if they were not listed.
    """
    from bioimageio import spec

    hashes: dict[str, Any] = dict.fromkeys(urls)
    context = spec.ValidationContext(perform_io_checks=True, log_warnings=False, progressbar=False, disable_cache=True)
    with zipfile.ZipFile(io.BytesIO(data)) as archive, context:
        description = spec.load_description(archive, perform_io_checks=True, known_files=hashes)
        if isinstance(description, spec.InvalidDescr):
            reason = " ".join(str(description.get_reason()).split())[:300].strip(": ")
            versions = f"bioimageio.spec {spec.__version__} with pydantic {pydantic.VERSION}"
            hint = "pip install --upgrade bioimageio.spec pydantic"
            raise UserError(f"{versions} refuses the package: {reason}; no file written; try {hint}")


def _dtype(rule: Intensity) -> Any:
    return np.uint16 if rule.depth == 16 else np.uint8
