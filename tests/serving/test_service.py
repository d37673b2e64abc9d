"""`raylivecell serve` with real deployments: load, killed processes, hostile files, token, listening addresses."""

import itertools
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import grpc
import httpx
import numpy as np
import psutil
import pytest
import tifffile
from conftest import run_in_process
from hosts import wait_until
from ray.serve.generated import serve_pb2, serve_pb2_grpc

from raylivecell.inference import predict
from raylivecell.serving.settings import TOKEN_VARIABLE

TOKEN = "0123456789abcdef" * 4
CLIENTS, REQUESTS = 16, 200
pytestmark = [pytest.mark.slow, pytest.mark.ray]


class Running(NamedTuple):
    """A service that runs in another process."""

    url: str
    process: subprocess.Popen[str]

    def client(self, token: str | None = TOKEN) -> httpx.Client:
        return httpx.Client(
            base_url=self.url, timeout=300, headers={"authorization": f"Bearer {token}"} if token else {}
        )

    def replicas(self, name: str) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if f"ServeReplica:raylivecell:{name}" in " ".join(_command(child))]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.fixture(scope="module")
def service(random_checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A service with two processes of each kind."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log"
    command = [sys.executable, "-m", "raylivecell", "serve", "--checkpoint", random_checkpoint, "--port", str(port)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {TOKEN_VARIABLE: TOKEN}
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--replicas", "2"], stdout=output, stderr=output, text=True, env=environment
        )
        try:
            wait_until("ready", lambda: "ready after" in log.read_text() or process.poll() is not None, 180)
            assert process.poll() is None, log.read_text()
            yield Running(f"http://127.0.0.1:{port}", process)
        finally:
            process.terminate()
            code = process.wait(60)
    assert code == 143
    assert log.read_text().splitlines()[-1] == "raylivecell: terminated"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, random_checkpoint: str) -> dict[Path, bytes]:
    """Image files of two sizes, and the label image that `predict` writes of each."""
    folder, out = tmp_path_factory.mktemp("images"), tmp_path_factory.mktemp("labels") / "out"
    rng = np.random.default_rng(0)
    for i in range(12):
        noise = rng.integers(0, 256, (90 + 30 * (i % 2), 120), np.uint8)
        tifffile.imwrite(folder / f"{i:02}.tif", cv2.GaussianBlur(noise, (0, 0), 3))
    with pytest.MonkeyPatch.context() as patch:
        run_in_process(patch)
        predict.predict(random_checkpoint, str(folder), str(out), write=("labels",))
    return {path: (out / "labels" / path.name).read_bytes() for path in sorted(folder.iterdir())}


def responses(
    service: Running, images: dict[Path, bytes], victim: psutil.Process | None = None
) -> list[tuple[Path, httpx.Response]]:
    """Answers to `REQUESTS` requests of `CLIENTS` clients; after a quarter of the answers `victim` is killed."""
    paths = [list(images)[i % len(images)] for i in range(REQUESTS)]
    answered = itertools.count(1)
    with service.client() as client, ThreadPoolExecutor(CLIENTS) as pool:

        def post(path: Path) -> tuple[Path, httpx.Response]:
            response = client.post("/segment?format=labels", files={"file": (path.name, path.read_bytes())})
            if next(answered) == REQUESTS // 4 and victim:
                victim.kill()
            return path, response

        return list(pool.map(post, paths))


def test_every_answer_under_load_is_that_of_predict(service: Running, images: dict[Path, bytes]) -> None:
    for path, response in responses(service, images):
        assert response.status_code == 200, response.text
        assert response.content == images[path]
    with service.client() as client:
        counts = client.get("/metrics").text
        wait_until("metrics", lambda: "ray_raylivecell_serve_images_total" in client.get("/metrics").text, 60)
    assert "ray_serve" in counts


@pytest.mark.parametrize("name", ["Network", "Segmentation"])
def test_a_killed_process_loses_no_request(service: Running, images: dict[Path, bytes], name: str) -> None:
    before = service.replicas(name)
    assert len(before) == 2
    for path, response in responses(service, images, before[0]):
        assert response.status_code == 200, response.text
        assert response.content == images[path]
    assert not before[0].is_running() or before[0].status() == psutil.STATUS_ZOMBIE
    wait_until("a new process", lambda: len(service.replicas(name)) == 2, 120)


def test_hostile_files_are_refused(service: Running, images: dict[Path, bytes]) -> None:
    import image_bombs

    pickle = b"\x80\x04\x95\x1b\0\0\0\0\0\0\0\x8c\x02os\x94\x8c\x06system\x94\x93\x94\x8c\x02id\x94\x85\x94R\x94."
    hostile = [*image_bombs.images(), ("pickle", pickle), ("empty", b""), ("a/../../etc/passwd", b"text")]
    processes = service.replicas("Segmentation")
    refused = []
    with service.client() as client:
        for name, data in hostile:
            response = client.post("/segment", files={"file": (name, data)})
            assert f"{os.sep}tmp" not in response.text
            if response.status_code != 200:  # a long description is ignored
                assert response.status_code in (413, 415, 422), (name, response.text)
                assert "\n" not in response.json()["error"]
                refused.append(name)
        path, expected = next(iter(images.items()))
        assert client.post("/segment?format=labels", content=path.read_bytes()).content == expected
    assert {"pickle", "empty", "png of 100,000 x 100,000", "postscript", "tiff directories in a cycle"} <= set(refused)
    assert all(process.is_running() for process in processes)
    assert max(process.memory_info().rss for process in processes) < 2**30


def test_only_the_token_gets_an_answer(service: Running) -> None:
    for token, status in ((None, 401), ("wrong", 401), (TOKEN, 200)):
        with service.client(token) as client:
            assert client.get("/model").status_code == status


class Touch:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_ports_beyond_loopback_require_rays_token_before_they_unpickle(service: Running, tmp_path: Path) -> None:
    """Ray 2.60: each replica's port for calls of other deployments is on all interfaces."""
    names = ("Api", "Network", "Segmentation")

    def replicas() -> list[int]:
        return [replica.pid for name in names for replica in service.replicas(name)]

    def others() -> list[Any]:
        processes = {child.pid for child in psutil.Process(service.process.pid).children(True)}
        return [
            port
            for port in psutil.net_connections("inet")
            if port.status == psutil.CONN_LISTEN
            and port.pid in processes | {service.process.pid}
            and port.laddr.ip.removeprefix("::ffff:") != "127.0.0.1"
        ]

    # A process that replaces a killed one does not listen at once.
    wait_until("ports", lambda: sorted(port.pid for port in others()) == sorted(replicas()), 60)
    ports = others()
    assert len(ports) == 5
    marker = tmp_path / "executed"
    request = serve_pb2.ASGIRequest(pickled_request_metadata=pickle.dumps(Touch(marker)))
    for port in ports:
        with grpc.insecure_channel(f"127.0.0.1:{port.laddr.port}") as channel:
            stub = serve_pb2_grpc.ASGIServiceStub(channel)
            for metadata in ([], [("authorization", f"Bearer {TOKEN}")]):
                with pytest.raises(grpc.RpcError) as refused:
                    stub.HandleRequest(request, timeout=30, metadata=metadata)
                assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
    assert not marker.exists()


def test_the_model_and_its_errors(service: Running, random_checkpoint: str) -> None:
    with service.client() as client:
        facts = client.get("/model").json()
        assert client.get("/healthz").text == "ok\n"
    assert random_checkpoint not in str(facts)
    assert len(facts["fingerprint"]) == 64
    port = service.url.rpartition(":")[2]
    for flags, line in (
        (["--port", port], "choose another --port"),
        (["--host", "0.0.0.0"], "set RAYLIVECELL_SERVE_TOKEN"),
        (["--replicas", "0"], "--replicas 0: give a number (2), or MIN:MAX"),
    ):
        command = [sys.executable, "-m", "raylivecell", "serve", "--checkpoint", random_checkpoint, *flags]
        environment = {name: value for name, value in os.environ.items() if name != TOKEN_VARIABLE}
        ended = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
        assert ended.returncode == 2
        assert line in ended.stderr.splitlines()[-1]
