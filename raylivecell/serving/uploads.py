"""Segment the planes of an uploaded file as `predict` does, without Ray."""

import threading
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from raylivecell.cells.watershed import InstanceConfig
from raylivecell.core.errors import TooManyPixelsError, UnsupportedImageError
from raylivecell.images import planes
from raylivecell.images.formats import ImageFile, UnreadableImageError
from raylivecell.images.planes import Choice
from raylivecell.inference.image_file import MAX_PIXELS
from raylivecell.inference.segmenter import Segmenter, TooLargeError
from raylivecell.network.averaging import averaged
from raylivecell.network.windows import Maps, Network
from raylivecell.serving import answers
from raylivecell.serving.answers import Answer, Segmented
from raylivecell.serving.requests import Format, Options, Upload

MAX_PLANES = 1_000
MAX_ANSWER_BYTES = 2**29
"""Of all planes of a file: the answers are in memory until the last one is ready."""


class StoppedError(Exception):
    """The request has been given up: its client has gone, or its time is over."""


class Worker:
    """A segmenter whose network may run elsewhere."""

    def __init__(self, segmenter: Segmenter, network: Network, model: str) -> None:
        self.segmenter, self.network, self.model = segmenter, network, model

    def segment(self, upload: Upload, options: Options, kind: Format, stop: threading.Event) -> list[Answer]:
        """Segment each chosen plane of a file: one answer per plane, with its cells or the reason why there are none.

        Args:
            upload: the file.
            options: query of the request.
            kind: format of the answers.
            stop: set by another thread when the answers are no longer needed.

        Raises:
            UserError: options that do not fit the network.
            StoppedError: `stop` was set.
        """
        segmenter = self._with(options, stop)
        factor = segmenter.factor(options.diameter)
        try:
            file = ImageFile(upload.data)
            chosen = list(_planes(file, upload.name, options))
        except UnreadableImageError as error:
            return [_failed(upload.name, error)]
        results: list[Answer] = []
        for name, choice in chosen:
            results.append(self._answer(segmenter, file, name, choice, factor, options, kind))
            if sum(len(answer.body) for answer in results) > MAX_ANSWER_BYTES:
                line = f"the answers exceed {MAX_ANSWER_BYTES >> 20} MiB; choose planes with ?plane="
                return [_failed(upload.name, TooManyPixelsError(line))]
        return results

    def _answer(
        self,
        segmenter: Segmenter,
        file: ImageFile,
        name: str,
        choice: Choice,
        factor: float,
        options: Options,
        kind: Format,
    ) -> Answer:
        try:
            frame = segmenter.frame(file.decode(choice, MAX_PIXELS).pixels)
            cells = segmenter.segment_frame(frame, factor)
        except (UnreadableImageError, TooLargeError) as error:
            return _failed(name, error)._replace(planes=sorted(file.names))
        view = answers.View(sorted(file.names)) if options.view else None
        return answers.encode(Segmented(name, frame, cells), kind, self.model, view)

    def _with(self, options: Options, stop: threading.Event) -> Segmenter:
        """The segmenter with the thresholds and the network of a request."""
        original = self.segmenter

        def until_stopped(image: NDArray[np.uint8]) -> Maps:
            if stop.is_set():
                raise StoppedError
            return self.network(image)

        network = averaged(until_stopped) if options.tta else until_stopped
        config = InstanceConfig.model_validate({**original.config.model_dump(), **options.thresholds()})
        return Segmenter(network, original.targets, config, original.recipe, original.intensity, original.scale)


def _planes(file: ImageFile, name: str, options: Options) -> Iterator[tuple[str, Choice]]:
    """Address and choice of each plane of a file that the request asks for, in the order of its axes."""
    numbers = file.select(Choice(options.plane, options.channel))
    if len(numbers) > MAX_PLANES:
        raise TooManyPixelsError(f"{len(numbers)} planes; choose one with ?plane=, or send {MAX_PLANES} at most")
    for plane in sorted(file.names[number] for number in numbers):
        yield planes.address(name, plane), Choice(plane or None, options.channel)


def _failed(name: str, error: Exception) -> Answer:
    """The answer for an image without result: its HTTP status and one line."""
    line = " ".join(str(error).split()).replace("--channel", "channel").replace("--plane", "plane")
    if isinstance(error, TooLargeError | TooManyPixelsError):
        status = 413
    else:
        status = 415 if isinstance(error, UnsupportedImageError) else 422
    return Answer(name, status, line.encode())
