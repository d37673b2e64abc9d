"""Run a network from an ONNX file with onnxruntime on the CPU, without torch."""

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raylivecell.cells.watershed import InstanceConfig, Maps
from raylivecell.core import storage
from raylivecell.core.errors import UserError
from raylivecell.images.intensity import Intensity
from raylivecell.images.scale import Scale
from raylivecell.targets.registry import NAMES, Targets

INPUT, OUTPUT = "image", "maps"
MARK = "raylivecell"
"""Metadata key of raylivecell's version; `export.ABOUT` lists all keys."""
PACKAGED = "raylivecell_package"
"""Metadata key of the file in a bioimage.io package, which contains the intensity rule (`bioimageio`)."""


class OnnxModel:
    """A network loaded from an ONNX file by `load`."""

    def __init__(self, session: Any, about: dict[str, str]) -> None:
        self.session, self.about = session, about
        self.targets: Targets = next(name for name in NAMES if name == about["targets"])
        self.thresholds = InstanceConfig.model_validate_json(about["instances"]).model_dump()
        self.intensity = Intensity.model_validate_json(about["intensity"])
        self.scale = Scale.model_validate_json(about.get("scale", "{}"))  # older files have none
        self.recipe_text = about["recipe"]

    def maps(self, image: NDArray[np.uint8]) -> Maps:
        """Maps of an image, channels as `Target.channels`, float32 (C, H, W), 0 to 1.

        `image`: uint8 (H, W), on the network's scale.
        """
        return self.session.run([OUTPUT], {INPUT: image[None, None].astype(np.float32)})[0][0]


def load(uri: str) -> OnnxModel:
    """Load the network in the file at `uri`; UserError if `raylivecell export` did not write it."""
    data = _read(uri)
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError("ONNX files need onnxruntime: pip install 'raylivecell[export]'") from error
    try:
        options = onnxruntime.SessionOptions()
        # Ray sets this variable to the number of the process's CPUs; 0: all CPUs of the machine.
        options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", 0))
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own errors have no common public base
        raise UserError(f"{uri} is not an ONNX file: {str(error).splitlines()[0]}") from error
    about = session.get_modelmeta().custom_metadata_map
    if PACKAGED in about:  # the intensity rule would be applied twice
        raise UserError(f"{uri} is part of a bioimage.io package for other programs; export the checkpoint to .onnx")
    if MARK not in about:
        raise UserError(f"{uri} was not written by `raylivecell export`; export a checkpoint with it")
    with storage.validating(uri, "export the checkpoint again"):
        if about["targets"] not in NAMES:
            raise UserError(f"{uri} needs raylivecell {about[MARK]} for targets {about['targets']}; update raylivecell")
        if [tensor.name for tensor in (*session.get_inputs(), *session.get_outputs())] != [INPUT, OUTPUT]:
            raise ValueError(f"its input and output are not {INPUT} and {OUTPUT}")
        return OnnxModel(session, about)


def _read(uri: str) -> bytes:
    try:
        return storage.read_bytes(storage.absolute(uri))
    except FileNotFoundError as error:
        raise UserError(f"no model at {uri}; write one with `raylivecell export`") from error
