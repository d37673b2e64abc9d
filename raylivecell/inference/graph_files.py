"""Write networks as graphs for other programs, ONNX or torch.export's .pt2, and load what was written, in memory.

A graph maps images float32 (B, 1, H, W) to maps float32 (B, C, H, W), for any B, H and W.
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

from raylivecell.core.errors import UserError
from raylivecell.inference import onnx_model

FILE = "about.json"
"""Member of a .pt2 file with the metadata."""
# Image sizes to compare a graph with its network: one divisible by 2 at every level, and one that is not.
SIZES = ((256, 320), (333, 434))
Maps = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""A graph as a function from images to maps."""


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
