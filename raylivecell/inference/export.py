"""Export a checkpoint as one file for other programs: ONNX, or torch.export's .pt2.

The graph maps grey levels to probability maps, normalisation and sigmoid included:

    image   float32 (B, 1, H, W), grey levels 0 to 255, any B, H and W; .pt2: H and W above 2 ** number of levels
    maps    float32 (B, C, H, W), 0 to 1, channels as `Target.channels`

The file also contains metadata as text (`ABOUT`). Before it is saved, the exported model is loaded and compared with
the network.
"""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
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
FILE = "about.json"
Maps = Callable[[NDArray[np.float32]], NDArray[np.float32]]


class _MapNetwork(nn.Module):
    """The network followed by a sigmoid: grey levels to maps."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        return torch.sigmoid(self.network(image))


def export(checkpoint_uri: str, out: str) -> dict[str, Any]:
    """Write the network of a checkpoint, or of a run's best checkpoint, to the file `out` (.onnx or .pt2).

    Returns:
        `file`, `bytes`, and `difference`: the largest between the file's and the network's maps, at two image sizes.

    Raises:
        UserError: no checkpoint; another suffix; maps that differ by 1e-4 or more (then nothing is written).
    """
    suffix = "." + str(out).rpartition(".")[2]
    if suffix not in WRITERS:
        raise UserError(f"--out {out}: the suffix selects the format: .onnx, or .pt2 (torch.export)")
    folder = progress.find(storage.absolute(checkpoint_uri))
    network, recipe = checkpoint.load_model(folder)
    model = _MapNetwork(network).eval()
    write, read = WRITERS[suffix]
    with _quiet():
        data = write(model, _about(folder, recipe))
        difference = _difference(model, read(data))
    if not difference < TOLERANCE:
        raise UserError(f"{out} would differ from the network by {difference:.2g} (probability); no file written")
    storage.write_bytes(storage.absolute(out), data)
    size = f"{len(data) / 2**20:.1f} MiB"
    line = f"written: {out}, {size}; differs from the network by at most {difference:.1e}"
    console.print(line, soft_wrap=True, markup=False)
    return {"file": str(out), "bytes": len(data), "difference": difference}


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


def _example() -> tuple[Tensor]:
    return (torch.full((2, 1, 61, 75), 128.0),)


def _write_onnx(model: nn.Module, about: dict[str, str]) -> bytes:
    try:
        import onnx
        import onnxruntime  # noqa: F401  # `_read_onnx` needs it: fail before the export
        import onnxscript  # noqa: F401  # torch.onnx needs it, and reports its absence in many lines
    except ImportError as error:
        packages = "onnx, onnxscript and onnxruntime"
        raise UserError(f"writing ONNX needs {packages}: pip install 'raylivecell[export]'") from error
    buffer = io.BytesIO()
    names = {"input_names": [onnx_model.INPUT], "output_names": [onnx_model.OUTPUT]}
    torch.onnx.export(model, _example(), buffer, dynamo=True, dynamic_shapes=_shapes(), verbose=False, **names)  # type: ignore[arg-type]
    exported = onnx.load_from_string(buffer.getvalue())
    onnx.helper.set_model_props(exported, about)
    return exported.SerializeToString()


def _read_onnx(data: bytes) -> Maps:
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return lambda image: session.run([onnx_model.OUTPUT], {onnx_model.INPUT: image})[0]


def _write_pt2(model: nn.Module, about: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    program = torch.export.export(model, _example(), dynamic_shapes=_shapes())
    torch.export.save(program, buffer, extra_files={FILE: json.dumps(about)})
    return buffer.getvalue()


def _read_pt2(data: bytes) -> Maps:
    module = torch.export.load(io.BytesIO(data)).module()
    return lambda image: module(torch.from_numpy(image)).detach().numpy()


WRITERS: dict[str, tuple[Callable[[nn.Module, dict[str, str]], bytes], Callable[[bytes], Maps]]] = {
    ".onnx": (_write_onnx, _read_onnx),
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
def _quiet() -> Iterator[None]:
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
