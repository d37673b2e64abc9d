"""A trained network on images in this process, without a cluster: what notebooks use, and the actors of `predict`.

    model = raylivecell.load("runs/cells")
    cells = model.segment(image)          # uint8 (H, W)
    cells.labels, cells.scores

From an ONNX file it runs without torch.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from raylivecell import instances, storage, tiles
from raylivecell.fields import Targets
from raylivecell.instances import InstanceConfig, Maps

ONNX = ".onnx"


class Cells(NamedTuple):
    """What was found in an image (H, W)."""

    labels: instances.Labels
    """int32 (H, W): 0 background, 1 to N."""
    scores: NDArray[np.float64]
    """(N,), 0 to 1: each cell's mean foreground probability."""
    foreground: NDArray[np.bool_]
    """(H, W): where the foreground's probability is over `InstanceConfig.foreground`."""


class Segmenter:
    """Made by `load`."""

    def __init__(
        self, network: Callable[[NDArray[np.uint8]], Maps], targets: Targets, config: InstanceConfig, recipe: str
    ) -> None:
        self.network, self.targets, self.config, self.recipe = network, targets, config, recipe

    def segment(self, image: NDArray[np.uint8]) -> Cells:
        """The cells of a grey image, uint8 (H, W) of any size, background about 128; ValueError for anything else.

        Up to `tiles.WHOLE_PIXELS` in one piece; larger images in overlapping windows, in bounded memory.
        """
        if not isinstance(image, np.ndarray):
            raise TypeError(f"image is {type(image).__name__}; give an array, uint8 (H, W)")
        if image.ndim != 2 or image.dtype != np.uint8 or not image.size:
            raise ValueError(f"image is {image.dtype} {image.shape}; give a grey image, uint8 (H, W), scaled to 8 bits")
        if image.size > tiles.WHOLE_PIXELS:
            return Cells(*tiles.segment(self.network, image, self.targets, self.config))
        maps = self.network(image)
        labels = instances.segment(maps, self.targets, self.config)
        return Cells(labels, instances.scores(labels, maps[0]), maps[0] > self.config.foreground)


def load(uri: str, flips: bool = False, device: str | None = None) -> Segmenter:
    """The network of a checkpoint, of a run (its best checkpoint), or in an ONNX file.

    Args:
        uri: a folder, or a file whose name ends in .onnx.
        flips: average over the image and its three flips.
        device: of torch; default: cuda where there is one. ONNX runs on the CPU.

    Raises:
        UserError: nothing there, or not a network of ours.
    """
    if str(uri).endswith(ONNX):
        from raylivecell.onnx_model import load as load_onnx

        file = load_onnx(str(uri))
        network = _flipped(file.maps) if flips else file.maps
        return Segmenter(network, file.targets, InstanceConfig(**file.thresholds), file.recipe_text)
    import torch

    from raylivecell import checkpoint, recipe, segment

    folder = checkpoint.find(storage.absolute(uri))
    model, settings = segment.load(folder, torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    return Segmenter(
        lambda image: segment.maps(model, image, flips),
        settings.targets,
        checkpoint.load_instances(folder, settings.targets),
        recipe.dump(settings),
    )


def _flipped(network: Callable[[NDArray[np.uint8]], Maps]) -> Callable[[NDArray[np.uint8]], Maps]:
    def mean(image: NDArray[np.uint8]) -> Maps:
        turned = [network(np.ascontiguousarray(image[::y, ::x]))[:, ::y, ::x] for y in (1, -1) for x in (1, -1)]
        return np.mean(turned, axis=0, dtype=np.float32)

    return mean
