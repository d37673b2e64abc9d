"""Segment images with a trained network in this process, without a cluster: in notebooks, and in `predict`'s actors.

    model = raylivecell.load("runs/cells")
    cells = model.segment("well_A1.tif")  # or its pixels as stored, uint8 or uint16 (H, W)
    cells.labels, cells.scores

With an ONNX file it runs without torch.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from raylivecell.cells import strips, watershed
from raylivecell.cells.watershed import InstanceConfig, Maps
from raylivecell.core import storage
from raylivecell.core.errors import UserError
from raylivecell.data import shards
from raylivecell.images import formats, grey_levels, intensity, pixel_types
from raylivecell.images.intensity import LIVECELL, Frame, Grey, Intensity
from raylivecell.images.planes import EVERYTHING, Choice
from raylivecell.images.scale import Scale, areas_of, labels_back, resize_frame, scaled_shape
from raylivecell.network import windows
from raylivecell.network.averaging import averaged
from raylivecell.recipe import Targets
from raylivecell.runs import progress

ONNX = ".onnx"
MAX_SCALED_PIXELS = 2**27
"""Maximum pixels of an enlarged image: as `predict` accepts for files."""


class TooLargeError(UserError):
    """An image that would be too large after scaling. One line: the cause, then the fix."""


class Cells(NamedTuple):
    """The cells of an image (H, W)."""

    labels: watershed.Labels
    """int32 (H, W): 0 background, 1 to N."""
    scores: NDArray[np.float64]
    """(N,), 0 to 1: the mean confidence in each cell's pixels (`Target.confidence`)."""
    foreground: NDArray[np.bool_]
    """(H, W): where the foreground probability is above `InstanceConfig.threshold`; never in padding."""
    warnings: tuple[str, ...] = ()
    """Properties of the image that are unusual for this network, as "KIND: FIGURES"."""


class Segmenter:
    """A network with its thresholds, intensity rule and scale, from `load`."""

    def __init__(
        self,
        network: Callable[[NDArray[np.uint8]], Maps],
        targets: Targets,
        config: InstanceConfig,
        recipe: str,
        rule: Intensity | None = None,
        scale: Scale | None = None,
    ) -> None:
        self.network, self.targets, self.config, self.recipe = network, targets, config, recipe
        self.intensity, self.scale = rule or LIVECELL, scale or Scale()

    def segment(
        self,
        image: Grey | str | Path,
        plane: str | int | None = None,
        channel: int | None = None,
        diameter: float | None = None,
    ) -> Cells:
        """Segment a grey image of any size.

        Args:
            image: pixels as stored in the file (H, W), or the path or URI of an image file. The network's intensity
                rule converts them to its scale: do not rescale them. uint8, uint16, or a type that
                `pixel_types.to_unsigned` converts, such as float32 from 0 to 1.
            plane: in a file with several planes: number from 0, or indices of axes such as "t3_z0".
            channel: in a file with several channels: number from 0.
            diameter: typical diameter of the cells in this image, in its pixels; the image is scaled so that they are
                as large as the training cells. Default: the image is scaled like the training images. The result has
                the pixels of `image` in either case.

        Raises:
            TypeError: neither an array nor a path.
            ValueError: an array of another type or shape.
            UserError: no such file, not an image, or a diameter out of range.
        """
        choice = Choice(None if plane is None else str(plane), channel)
        return self.segment_frame(self.frame(image, choice), self.factor(diameter))

    def factor(self, diameter: float | None = None) -> float:
        """Factor from an original image to the network's pixels: `Scale.factor`; UserError if it is out of range."""
        try:
            return self.scale.factor(diameter)
        except ValueError as error:
            raise UserError(f"diameter {diameter}: {error}") from error

    def frame(self, image: Grey | str | Path, choice: Choice = EVERYTHING) -> Frame:
        """Convert the image to the network's scale."""
        if isinstance(image, str | Path):
            image = _read(str(image), choice)
        if not isinstance(image, np.ndarray):
            raise TypeError(f"image is {type(image).__name__}; give an array, uint8 or uint16 (H, W)")
        if image.ndim != 2 or not image.size:
            raise ValueError(f"image is {image.dtype} {image.shape}; give a grey image, uint8 or uint16 (H, W)")
        return intensity.to_uint8(pixel_types.to_unsigned(image), self.intensity)

    def segment_frame(self, frame: Frame, factor: float = 1.0) -> Cells:
        """Segment an image on the network's grey levels; no cells in padding, or in an unusable frame.

        Images of up to `windows.WHOLE_PIXELS` in one pass; larger ones in overlapping windows, in bounded memory.

        Args:
            frame: the image.
            factor: by which it is scaled to the network's pixels. The thresholds of `config` count these; the result
                has the pixels of `frame`.

        Raises:
            TooLargeError: it would have over `MAX_SCALED_PIXELS` pixels.
        """
        if not frame.usable:
            labels = np.zeros(frame.levels.shape, np.int32)
            return Cells(labels, np.zeros(0), labels.astype(np.bool_), frame.warnings)
        _check_size(frame.levels.shape, factor)
        scaled = resize_frame(frame, factor)
        if scaled.padding is None:
            cells = self._cells(scaled.levels)
        else:
            cells = self._cells_without_padding(scaled.levels, scaled.padding)
        fraction = float(cells.foreground.sum()) / scaled.own_pixels
        warnings = (
            *frame.warnings,
            *intensity.foreground_warning(fraction, self.intensity),
            *self.scale.warning(areas_of(cells.labels, len(cells.scores)), factor),
        )
        return _in_original_pixels(cells, frame)._replace(warnings=warnings)

    def _cells(self, image: NDArray[np.uint8]) -> Cells:
        if image.size > windows.WHOLE_PIXELS:
            return Cells(*strips.segment(self.network, image, self.targets, self.config))
        return self._cells_of_maps(self.network(image))

    def _cells_without_padding(self, image: NDArray[np.uint8], padding: NDArray[np.bool_]) -> Cells:
        """Segment an image whose padding is hidden from the network, as in `forward.maps_of_frame`."""
        window, content = grey_levels.without_padding(image, padding)
        if content.size > windows.WHOLE_PIXELS:
            return _mask_padding(_embed(self._cells(content), window, image.shape), padding, self.config.min_area)
        return self._cells_of_maps(windows.outside_padding(self.network(content), window, padding))

    def _cells_of_maps(self, maps: Maps) -> Cells:
        labels, confidence = watershed.segment_with_confidence(maps, self.targets, self.config)
        return Cells(labels, watershed.scores(labels, confidence), maps[0] > self.config.threshold)


def _embed(cells: Cells, window: tuple[slice, slice], shape: tuple[int, ...]) -> Cells:
    """Embed the cells of a window in an image of `shape`."""
    labels, foreground = np.zeros(shape, np.int32), np.zeros(shape, np.bool_)
    labels[window], foreground[window] = cells.labels, cells.foreground
    return Cells(labels, cells.scores, foreground)


def _mask_padding(cells: Cells, padding: NDArray[np.bool_], min_area: int) -> Cells:
    """Remove pixels in padding, and cells with fewer than `min_area` remaining pixels."""
    labels = np.where(padding, 0, cells.labels)
    return _renumbered(Cells(labels, cells.scores, cells.foreground & ~padding), min_area)


def _renumbered(cells: Cells, min_area: int) -> Cells:
    """Remove cells with fewer than `min_area` pixels, or without any, and number the others from 1."""
    keep = np.array([False, *(areas_of(cells.labels, len(cells.scores)) >= max(1, min_area))])
    new_labels = np.where(keep, np.cumsum(keep), 0).astype(np.int32)
    return cells._replace(labels=new_labels[cells.labels], scores=cells.scores[keep[1:]])


def _in_original_pixels(cells: Cells, frame: Frame) -> Cells:
    """Bring the cells of the scaled image back to the pixels of `frame`; cells smaller than a pixel are removed."""
    shape = frame.levels.shape
    if cells.labels.shape == shape:
        return cells
    labels, foreground = labels_back(cells.labels, shape), labels_back(cells.foreground, shape)
    if frame.padding is not None:
        return _mask_padding(Cells(labels, cells.scores, foreground), frame.padding, 1)
    return _renumbered(Cells(labels, cells.scores, foreground), 1)


def _check_size(shape: tuple[int, ...], factor: float) -> None:
    height, width = scaled_shape(shape, factor)
    if factor > 1 and height * width > MAX_SCALED_PIXELS:
        raise TooLargeError(
            f"an image of {shape[1]} x {shape[0]} pixels would be enlarged to {width} x {height}, more than "
            f"{MAX_SCALED_PIXELS}; cut it into tiles"
        )


def _read(uri: str, choice: Choice) -> Grey:
    try:
        return formats.decode(storage.read_bytes(storage.absolute(uri)), choice=choice).pixels
    except FileNotFoundError as error:
        raise UserError(f"no image file at {uri}; give the path of one, or an array") from error
    except formats.UnreadableImageError as error:
        raise UserError(f"{uri}: {error}") from error


def load(uri: str, tta: bool = False, device: str | None = None) -> Segmenter:
    """Load the network of a checkpoint, of a run (its best checkpoint), or of an ONNX file.

    Args:
        uri: a folder, or a file whose name ends in .onnx.
        tta: average eight versions of the image (`averaging.VERSIONS`), in eight times the time.
        device: torch's device; default: cuda if available. ONNX runs on the CPU.

    Raises:
        UserError: no network there, or not one written by raylivecell.
    """
    if str(uri).endswith(ONNX):
        from raylivecell.inference.onnx_model import load as load_onnx

        onnx = load_onnx(str(uri))
        network = averaged(onnx.maps) if tta else onnx.maps
        thresholds = InstanceConfig(**onnx.thresholds)
        return Segmenter(network, onnx.targets, thresholds, onnx.recipe_text, onnx.intensity, onnx.scale)
    import torch

    from raylivecell import recipe
    from raylivecell.network import forward
    from raylivecell.runs import checkpoint

    folder = progress.find(storage.absolute(uri))
    torch_device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model, settings = checkpoint.load_network(folder, torch_device)
    return Segmenter(
        lambda image: forward.maps(model, image, tta),
        settings.targets,
        checkpoint.load_instances(folder, settings.targets),
        recipe.dump(settings),
        checkpoint.load_intensity(folder),
        checkpoint.load_scale(folder),
    )


def intensity_rule(uri: str) -> Intensity:
    """Load the intensity rule of the dataset, checkpoint, run or ONNX file at `uri`; UserError for anything else."""
    return _rules_of(uri, "--intensity-from")[0]


def scale_of(uri: str) -> Scale:
    """Load the scale of the dataset, checkpoint, run or ONNX file at `uri`; UserError for anything else."""
    return _rules_of(uri, "--diameter-from")[1]


def _rules_of(uri: str, flag: str) -> tuple[Intensity, Scale]:
    uri = storage.absolute(uri).rstrip("/")
    if uri.endswith(ONNX):
        from raylivecell.inference.onnx_model import load as load_onnx

        onnx = load_onnx(uri)
        return onnx.intensity, onnx.scale
    if storage.exists(storage.join(uri, "dataset.json")):
        return shards.intensity(uri), shards.scale(uri)
    from raylivecell.runs import checkpoint  # torch

    try:
        folder = progress.find(uri)
        return checkpoint.load_intensity(folder), checkpoint.load_scale(folder)
    except UserError as error:
        raise UserError(f"{flag} {uri}: no dataset there, and {error}") from error
