"""The service's interface with deployments that run in the test's process, without Ray."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import numpy as np
from fastapi.testclient import TestClient

from raylivecell.cells import watershed
from raylivecell.inference import segmenter
from raylivecell.network.windows import Network
from raylivecell.serving import api, application, page_data
from raylivecell.serving.answers import Answer
from raylivecell.serving.maps_cache import MapsCache
from raylivecell.serving.page_data import Task
from raylivecell.serving.requests import Format, Options, Upload
from raylivecell.serving.settings import ServeSettings, token_hash
from raylivecell.serving.uploads import Worker

MODEL = "0123456789abcdef" * 4


class Service:
    """An application whose deployments run in this process."""

    def __init__(self, checkpoint: str, network: Network | None = None, **settings: Any) -> None:
        loaded = segmenter.load(checkpoint, device="cpu")
        self.images = 0
        maps = network or loaded.network
        if network:  # the thresholds of the random network would split its cells
            loaded.config = watershed.default(loaded.targets)

        def counted(image: np.ndarray) -> np.ndarray:
            self.images += 1
            return maps(image)

        worker = Worker(loaded, MapsCache(counted, 2**20), MODEL)
        self.recorded: list[tuple[int, int]] = []

        self.gate = threading.Event()
        """Answers of /segment wait until it is set."""
        self.gate.set()

        async def segment(upload: Upload, options: Options, kind: Format) -> list[Answer]:
            while not self.gate.is_set():
                await asyncio.sleep(0.01)
            return worker.segment(upload, options, kind, threading.Event())

        async def page(task: Task, body: bytes) -> bytes:
            return page_data.answer(task, body)

        async def model() -> dict[str, Any]:
            return {**application.facts(checkpoint, loaded), "fingerprint": MODEL}

        async def ready() -> None:
            await model()

        async def metrics() -> str:
            return "# none\n"

        def record(status: int, images: int, seconds: float) -> None:
            assert seconds >= 0
            self.recorded.append((status, images))

        token = settings.pop("token", None)
        config = ServeSettings(checkpoint=checkpoint, **settings)
        backend = api.Backend(segment, page, model, ready, metrics, record)
        self.application = api.build(config, token and token_hash(token), backend)
        self.http = TestClient(self.application, base_url="http://127.0.0.1:8000")

    def post(self, *paths: Path, headers: dict[str, str] | None = None, **query: Any) -> Any:
        files = [("file", (path.name, path.read_bytes())) for path in paths]
        return self.http.post("/segment", files=files, params=query, headers=headers)
