"""The deployments of the service on Ray Serve.

    Api             REST; one process without work of its own
    Segmentation    decodes, finds cells, measures, encodes; `max_replicas` processes of one CPU at most
    Network         the network, on a GPU if there is one; images of equal size in one batch

An image passes from Api to Segmentation, its windows from there to Network. If a process of these two dies, its
requests are repeated in another one: segmentation has no side effects.

`build` is the entry point of a Serve config file (`import_path: raylivecell.serving.application:build`).
"""

import asyncio
import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import ray
from fastapi import FastAPI
from numpy.typing import NDArray
from ray import serve
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from raylivecell.core import storage
from raylivecell.core.errors import UserError
from raylivecell.core.version import __version__
from raylivecell.inference import segmenter
from raylivecell.network.windows import Maps
from raylivecell.runs import progress
from raylivecell.serving import api, node_metrics, page_data
from raylivecell.serving import settings as serve_settings
from raylivecell.serving.answers import Answer
from raylivecell.serving.maps_cache import MapsCache
from raylivecell.serving.page_data import Task
from raylivecell.serving.requests import Format, Options, Upload
from raylivecell.serving.settings import ServeSettings
from raylivecell.serving.uploads import Worker

NAME = "raylivecell"
TRIES = 4
"""Maximum attempts of a request whose process died."""
WAIT_S = 0.01
"""How long an image waits for others of its size."""
LOST = (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError, DeploymentUnavailableError)
REPLACED_S = 120
"""How long a request is sent again while `serve deploy` replaces the network."""
WAITING = 4
"""Requests per thread that a segmentation process accepts. Those that wait in front of it reach it only after pauses of
Serve's router, in which it has nothing to do: 16 clients got 4.4 images/s with 1, 6.1 to 6.4 with 4 (two cores)."""
THREADS = 2
"""Files that a segmentation process works on at the same time: one waits for the network while one is decoded."""


def build(arguments: ServeSettings) -> serve.Application:
    """Build the application from the arguments of a Serve config file, or from `ServeSettings`."""
    settings = ServeSettings.model_validate(arguments)
    # Resolved once: while a run continues, its best checkpoint changes, and processes start at different times.
    settings = settings.model_copy(update={"checkpoint": model_address(settings.checkpoint)})
    network = _deployment(
        Network,
        ray_actor_options={"num_cpus": settings.network_cpus, "num_gpus": settings.network_gpus},
        autoscaling_config=_scaling(settings, 2 * THREADS if settings.network_gpus else 1),
        max_ongoing_requests=2 * settings.batch_size,
    ).bind(settings)
    segmentation = _deployment(
        Segmentation,
        autoscaling_config=_scaling(settings, THREADS),
        max_ongoing_requests=WAITING * THREADS,
        graceful_shutdown_timeout_s=60,
    ).bind(settings, network)
    return _deployment(
        serve.ingress()(Api),
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=4 * settings.max_queue,
        graceful_shutdown_timeout_s=REPLACED_S + 30,
    ).bind(settings, segmentation)


def _deployment(cls: type, **options: Any) -> Any:
    return serve.deployment(name=cls.__name__, health_check_period_s=5, **options)(cls)


def _scaling(settings: ServeSettings, requests_per_process: int) -> dict[str, Any]:
    return {
        "min_replicas": settings.min_replicas,
        "max_replicas": settings.max_replicas,
        "target_ongoing_requests": requests_per_process,
        "upscale_delay_s": 5,
        "downscale_delay_s": 120,
    }


class Window(NamedTuple):
    """An image for the network."""

    image: NDArray[np.uint8]
    """(H, W)."""
    fingerprint: str
    """Of the network that is wanted."""


def own_maps(
    windows: Sequence[Window], fingerprint: str, maps: Callable[[Sequence[NDArray[np.uint8]]], list[Maps]]
) -> list[Maps | None]:
    """Maps of the windows that want the network with this fingerprint, None for the others.

    While `serve deploy` replaces the processes one by one, those of the old and of the new network run together.
    """
    own = [window.image for window in windows if window.fingerprint == fingerprint]
    results = iter(maps(own) if own else [])
    return [next(results) if window.fingerprint == fingerprint else None for window in windows]


class Network:
    """The network of the checkpoint; maps of batches."""

    def __init__(self, settings: ServeSettings) -> None:
        from raylivecell.inference import actors

        actors.use_threads(with_torch=not settings.checkpoint.endswith(segmenter.ONNX))
        self.maps_of_images = _load_network(settings.checkpoint)
        self.fingerprint = weights_hash(settings.checkpoint)
        self.maps.set_max_batch_size(settings.batch_size)  # type: ignore[attr-defined]  # added by @serve.batch

    @serve.batch(max_batch_size=8, batch_wait_timeout_s=WAIT_S)
    async def maps(self, windows: list[Window]) -> list[Maps | None]:
        """Maps of images, float32 (C, H, W) each; None for those of another network."""
        return await asyncio.to_thread(own_maps, windows, self.fingerprint, self.maps_of_images)


def _load_network(address: str) -> Callable[[Sequence[NDArray[np.uint8]]], list[Maps]]:
    """Load the network as a function of images."""
    if address.endswith(segmenter.ONNX):
        from raylivecell.inference.onnx_model import load

        onnx = load(address)
        return lambda images: [onnx.maps(image) for image in images]
    import torch

    from raylivecell.network import forward
    from raylivecell.runs import checkpoint

    network, _ = checkpoint.load_network(address, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return lambda images: forward.maps_of_images(network, images)


class Segmentation:
    """Everything except the network: a file -> its answers."""

    def __init__(self, settings: ServeSettings, network: DeploymentHandle) -> None:
        import cv2

        cv2.setNumThreads(1)
        loaded = segmenter.load(settings.checkpoint, device="cpu")
        self.facts = facts(settings.checkpoint, loaded)
        maps = network.options(method_name="maps")

        def remote_maps(image: NDArray[np.uint8]) -> Maps:
            return _repeated(lambda: _present(maps.remote(Window(image, self.facts["fingerprint"])).result()))

        cached = MapsCache(remote_maps, int(settings.cache_mib * 2**20))
        self.worker = Worker(loaded, cached, self.facts["fingerprint"])
        self.threads = ThreadPoolExecutor(THREADS)
        self.page_thread = ThreadPoolExecutor(1)  # an export that was given up must not hold up images

    async def segment(self, upload: Upload, options: Options, kind: Format) -> list[Answer]:
        """The answers of one file; a cancelled call stops before its next window or plane."""
        stop = threading.Event()
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self.threads, self.worker.segment, upload, options, kind, stop)
        except asyncio.CancelledError:
            stop.set()
            raise

    async def page(self, task: Task, body: bytes) -> bytes:
        """The answer to a request of the page."""
        return await asyncio.get_running_loop().run_in_executor(self.page_thread, page_data.answer, task, body)

    async def model(self) -> dict[str, Any]:
        """Facts about the network."""
        return self.facts


class Api:
    """The REST interface."""

    def __init__(self, settings: ServeSettings, segmentation: DeploymentHandle) -> None:
        self.settings = settings
        self.token_sha256 = serve_settings.required_hash(settings)
        self.metrics = node_metrics.Recorder()
        self.segmentation = segmentation.options(method_name="segment")
        self.model = segmentation.options(method_name="model")
        self.page = segmentation.options(method_name="page")
        self.facts: dict[str, Any] = {}

    def __serve_build_asgi_app__(self) -> FastAPI:
        async def segment(upload: Upload, options: Options, kind: Format) -> list[Answer]:
            return await _awaited(lambda: self.segmentation.remote(upload, options, kind))

        async def model() -> dict[str, Any]:
            self.facts = self.facts or await _awaited(self.model.remote)
            return self.facts

        async def page(task: Task, body: bytes) -> bytes:
            return await _awaited(lambda: self.page.remote(task, body), tries=1)

        backend = api.Backend(segment, page, model, _ready, node_metrics.scrape, self.metrics.record)
        return api.build(self.settings, self.token_sha256, backend)


async def _ready() -> None:
    """UnavailableError unless each deployment has a process that can work."""
    name = serve.get_replica_context().app_name
    status = await asyncio.to_thread(serve.status)
    for deployment, state in status.applications[name].deployments.items():
        if not any(count for kind, count in state.replica_states.items() if kind == "RUNNING"):
            raise api.UnavailableError(f"{deployment} has no running process; {state.message or 'it is starting'}")


def model_address(uri: str) -> str:
    """Address of the best checkpoint of a run, of a checkpoint, or of an .onnx file."""
    uri = storage.absolute(uri)
    return uri if uri.endswith(segmenter.ONNX) else progress.find(uri)


def weights_hash(address: str) -> str:
    """SHA-256 of the weights of a checkpoint or an .onnx file."""
    weights = address if address.endswith(segmenter.ONNX) else storage.join(address, progress.MODEL)
    return hashlib.sha256(storage.read_bytes(weights)).hexdigest()


def facts(address: str, loaded: segmenter.Segmenter) -> dict[str, Any]:
    """Content of `/model`, without paths of this machine."""
    from raylivecell.targets.registry import target

    return {
        "fingerprint": weights_hash(address),
        "targets": loaded.targets,
        "channels": list(target(loaded.targets).channels),
        "thresholds": loaded.config.model_dump(),
        "intensity": loaded.intensity.model_dump(mode="json"),
        "scale": loaded.scale.model_dump(mode="json"),
        "raylivecell": __version__,
    }


class OtherNetworkError(Exception):
    """The process that got an image has another network than the one that sent it."""


def _present(maps: Maps | None) -> Maps:
    if maps is None:
        raise OtherNetworkError
    return maps


def _repeated(call: Callable[[], Any]) -> Any:
    """The result of `call`, in a thread; again if the process that had it died."""
    for attempt in range(TRIES):
        try:
            return call()
        except LOST:
            if attempt == TRIES - 1:
                raise
            time.sleep(0.2 * 2**attempt)


async def _awaited(call: Callable[[], Any], tries: int = TRIES) -> Any:
    """The result of a call of another deployment; again if its process died. A cancelled call is cancelled there too.

    Args:
        call: sends the request.
        tries: attempts at most, if processes die.

    Raises:
        UserError: as in the process.
        UnavailableError: the queue is full, the process died at each attempt, or the network is still being replaced.
    """
    attempt, deadline = 0, time.monotonic() + REPLACED_S
    while True:
        response = call()
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise UserError(str(error.cause)) from error
            if isinstance(error.cause, LOST):
                raise api.UnavailableError("the service lost its network; repeat the request") from error
            if not isinstance(error.cause, OtherNetworkError):
                raise
            if time.monotonic() > deadline:
                raise api.UnavailableError("the network is being replaced; repeat the request later") from error
            await asyncio.sleep(1)
        except BackPressureError as error:
            raise api.UnavailableError("too many requests are waiting; repeat it in some seconds") from error
        except LOST as error:
            attempt += 1
            if attempt == tries:
                raise api.UnavailableError("the service lost the process of this request; repeat it") from error
            await asyncio.sleep(0.1 * 2**attempt)
