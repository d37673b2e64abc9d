"""Export a checkpoint as one file for other programs: ONNX, torch.export's .pt2, or a bioimage.io package (.zip).

The graph maps grey levels to probability maps, normalisation and sigmoid included:

    image   float32 (B, 1, H, W), grey levels 0 to 255, any B, H and W; .pt2: H and W above 2 ** number of levels
    maps    float32 (B, C, H, W), 0 to 1, channels as `Target.channels`

An .onnx or .pt2 file also contains metadata as text (`ABOUT`); `bioimageio` describes the package. Before it is saved,
the exported model is loaded and compared with the network.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raylivecell import recipe as recipes
from raylivecell.core import storage
from raylivecell.core.console import console
from raylivecell.core.errors import UserError
from raylivecell.core.version import __version__
from raylivecell.inference import graph_files, onnx_model
from raylivecell.runs import checkpoint, progress
from raylivecell.targets.registry import target

ABOUT = (
    onnx_model.MARK,
    "recipe",
    "targets",
    "channels",
    "normalisation",
    "intensity",
    "scale",
    "instances",
    "licence",
    "citation",
    "data_name",
    "data_sha256",
)
"""Keys of the metadata: version, recipe as YAML, outputs, intensity rule, scale and thresholds (JSON), provenance of
the data."""
NORMALISATION = "in the graph: asinh((image - {background}) / {scale}) of grey levels 0 to 255, see intensity"
TOLERANCE = 1e-4
PACKAGE = ".zip"


class _MapNetwork(nn.Module):
    """The network followed by a sigmoid: grey levels to maps."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        return torch.sigmoid(self.network(image))


def export(checkpoint_uri: str, out: str, authors: Sequence[str] = (), scores: str | None = None) -> dict[str, Any]:
    """Write the network of a checkpoint, or of a run's best checkpoint, to the file `out` (.onnx, .pt2 or .zip).

    Args:
        checkpoint_uri: folder of a checkpoint or a run.
        out: path or URI of the file; its suffix selects the format.
        authors: .zip only: names of people.
        scores: .zip only: folder with the metrics.json of `evaluate`; by default one in the run's folder.

    Returns:
        `file`, `bytes`, and `difference`: the largest between the file's and the network's maps, at several image
        sizes.

    Raises:
        UserError: no checkpoint; another suffix; maps that differ by 1e-4 or more (then nothing is written); for
            packages also as `bioimageio.package`.
    """
    suffix = "." + str(out).rpartition(".")[2]
    if suffix == PACKAGE:
        from raylivecell.inference import bioimageio

        package = bioimageio.package(checkpoint_uri, tuple(authors), scores)
        data, difference, notes = package.data, package.difference, package.notes
    elif suffix not in graph_files.WRITERS:
        formats = ".onnx, .pt2 (torch.export) or .zip (bioimage.io)"
        raise UserError(f"--out {out}: the suffix selects the format: {formats}")
    elif authors or scores is not None:
        raise UserError(f"--out {out}: --author and --scores apply to bioimage.io packages; give a name with .zip")
    else:
        (data, difference), notes = _single_file(checkpoint_uri, suffix), ()
    if not difference < TOLERANCE:
        raise UserError(f"{out} would differ from the network by {difference:.2g} (probability); no file written")
    storage.write_bytes(storage.absolute(out), data)
    size = f"{len(data) / 2**20:.1f} MiB"
    line = f"written: {out}, {size}; differs from the network by at most {difference:.1e}"
    for text in (line, *notes):
        console.print(text, soft_wrap=True, markup=False)
    return {"file": str(out), "bytes": len(data), "difference": difference}


def _single_file(checkpoint_uri: str, suffix: str) -> tuple[bytes, float]:
    """Content of an .onnx or .pt2 file, and the difference of its maps from the network's."""
    folder = progress.find(storage.absolute(checkpoint_uri))
    network, recipe = checkpoint.load_model(folder)
    model = _MapNetwork(network).eval()
    write, read = graph_files.WRITERS[suffix]
    with graph_files.quiet():
        data = write(model, _about(folder, recipe))
        return data, _difference(model, read(data))


def _about(folder: str, recipe: recipes.Recipe) -> dict[str, str]:
    data = checkpoint.load_data(folder)
    config, rule = checkpoint.load_instances(folder, recipe.targets), checkpoint.load_intensity(folder)
    values = (
        __version__,
        recipes.dump(recipe),
        recipe.targets,
        json.dumps(target(recipe.targets).channels),
        NORMALISATION.format(background=rule.background_level, scale=rule.scale),
        rule.model_dump_json(),
        checkpoint.load_scale(folder).model_dump_json(),
        json.dumps(config.model_dump()),
        *(data[name] for name in ("licence", "citation", "name", "sha256")),
    )
    return dict(zip(ABOUT, values, strict=True))


@torch.no_grad()
def _difference(model: nn.Module, maps: graph_files.Maps) -> float:
    """Largest difference between the maps of the network and of the file, at several sizes; NaN if any is NaN."""
    rng = np.random.default_rng(0)
    differences = []
    for size in graph_files.SIZES:
        image = np.clip(rng.normal(128, 12, (2, 1, *size)), 0, 255).round().astype(np.float32)
        expected = model(torch.from_numpy(image)).numpy()
        differences.append(np.abs(maps(image) - expected).max())
    return float(np.max(differences))  # Python's max would lose a NaN
