"""Export a checkpoint as one file for other programs: ONNX, torch.export's .pt2, or a bioimage.io package (.zip).

The graph maps grey levels to probability maps, normalisation and sigmoid included:

    image   float32 (B, 1, H, W), grey levels 0 to 255, any B, H and W; .pt2: H and W above 2 ** number of levels
    maps    float32 (B, C, H, W), 0 to 1, channels as `Target.channels`

An .onnx or .pt2 file also contains metadata as text (`ABOUT`); `bioimageio` describes the package. Before it is saved,
the exported model is loaded and compared with the network.
"""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raylivecell import recipe as recipes
from raylivecell.core import storage
from raylivecell.core.console import console
from raylivecell.core.errors import UserError
from raylivecell.core.version import __version__
from raylivecell.inference import onnx_model
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
# Image sizes of the comparison: one divisible by 2 at every level, and one that is not.
SIZES = ((256, 320), (333, 434))
FILE, PACKAGE = "about.json", ".zip"
Maps = Callable[[NDArray[np.float32]], NDArray[np.float32]]


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
        from raylivecell.inference import bioimageio  # imports this module

        package = bioimageio.package(checkpoint_uri, tuple(authors), scores)
        data, difference, notes = package.data, package.difference, package.notes
    elif suffix not in WRITERS:
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
    write, read = WRITERS[suffix]
    with quiet():
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


def _shapes() -> dict[str, dict[int, Any]]:
    dynamic = torch.export.Dim.DYNAMIC
    return {"image": {0: dynamic, 2: dynamic, 3: dynamic}}


def example() -> tuple[Tensor]:
    """Images of an odd size, so that no exporter takes a special case for the rule."""
    return (torch.full((2, 1, 61, 75), 128.0),)


def onnx_file(model: nn.Module, about: dict[str, str]) -> bytes:
    """Export `model`, images float32 (B, 1, H, W) to maps float32 (B, C, H, W), to ONNX for any B, H and W.

    Args:
        model: in evaluation mode.
        about: the file's metadata.

    Raises:
        UserError: onnx, onnxscript or onnxruntime is not installed.
    """
    try:
        import onnx
        import onnxruntime  # noqa: F401  # `onnx_maps` needs it: fail before the export
        import onnxscript  # noqa: F401  # torch.onnx needs it, and reports its absence in many lines
    except ImportError as error:
        packages = "onnx, onnxscript and onnxruntime"
        raise UserError(f"writing ONNX needs {packages}: pip install 'raylivecell[export]'") from error
    buffer = io.BytesIO()
    names = {"input_names": [onnx_model.INPUT], "output_names": [onnx_model.OUTPUT]}
    torch.onnx.export(model, example(), buffer, dynamo=True, dynamic_shapes=_shapes(), verbose=False, **names)  # type: ignore[arg-type]
    exported = onnx.load_from_string(buffer.getvalue())
    # torch records where in this machine's files each operator comes from.
    for entry in (exported.graph, *exported.graph.node, *exported.graph.value_info, *exported.graph.initializer):
        entry.ClearField("metadata_props")
        entry.ClearField("doc_string")
    onnx.helper.set_model_props(exported, about)
    return exported.SerializeToString(deterministic=True)


def onnx_maps(data: bytes) -> Maps:
    """Load the ONNX file `data`: a function from images float32 (B, 1, H, W) to maps float32 (B, C, H, W)."""
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return lambda image: session.run([onnx_model.OUTPUT], {onnx_model.INPUT: image})[0]


def _write_pt2(model: nn.Module, about: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    program = torch.export.export(model, example(), dynamic_shapes=_shapes())
    torch.export.save(program, buffer, extra_files={FILE: json.dumps(about)})
    return buffer.getvalue()


def _read_pt2(data: bytes) -> Maps:
    module = torch.export.load(io.BytesIO(data)).module()
    return lambda image: module(torch.from_numpy(image)).detach().numpy()


WRITERS: dict[str, tuple[Callable[[nn.Module, dict[str, str]], bytes], Callable[[bytes], Maps]]] = {
    ".onnx": (onnx_file, onnx_maps),
    ".pt2": (_write_pt2, _read_pt2),
}


@torch.no_grad()
def _difference(model: nn.Module, maps: Maps) -> float:
    """Largest difference between the maps of the network and of the file, over SIZES; NaN if any is NaN."""
    rng = np.random.default_rng(0)
    differences = []
    for size in SIZES:
        image = np.clip(rng.normal(128, 12, (2, 1, *size)), 0, 255).round().astype(np.float32)
        expected = model(torch.from_numpy(image)).numpy()
        differences.append(np.abs(maps(image) - expected).max())
    return float(np.max(differences))  # Python's max would lose a NaN


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the notes that torch's exporters print; errors are still raised."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
