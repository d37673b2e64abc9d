"""The REST interface without Ray: answers equal the files of `predict`; refusals; the token."""

import asyncio
import base64
import csv
import io
import json
import threading
import zipfile
import zlib
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any

import cv2
import httpx
import numpy as np
import pytest
import tifffile
from fastapi.testclient import TestClient
from in_process import MODEL, Service
from scipy import ndimage
from skimage.measure import points_in_poly

from raylivecell.inference import predict, segmenter
from raylivecell.serving import answers, api
from raylivecell.serving.answers import Answer
from raylivecell.serving.maps_cache import MapsCache
from raylivecell.serving.requests import Format, Options, Upload
from raylivecell.serving.settings import ServeSettings
from raylivecell.serving.uploads import StoppedError, Worker

TOKEN = "0123456789abcdef" * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of three kinds, one with three planes."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    pixels = [cv2.GaussianBlur(rng.integers(0, 256, (90, 120), np.uint8), (0, 0), 3) for _ in range(5)]
    tifffile.imwrite(folder / "a.tif", pixels[0])
    cv2.imwrite(str(folder / "b.png"), pixels[1])
    tifffile.imwrite(folder / "c.tif", np.stack(pixels[2:]), imagej=True, metadata={"axes": "TYX"})
    return folder


@pytest.fixture(scope="module")
def predicted(folder: Path, random_checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `predict` writes for `folder`."""
    out = tmp_path_factory.mktemp("predicted") / "out"
    with pytest.MonkeyPatch.context() as patch:
        from conftest import run_in_process

        run_in_process(patch)
        predict.predict(random_checkpoint, str(folder), str(out), write=predict.OUTPUTS)
    return out


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("labels", "labels/{}.tif"),
        ("overlay", "overlays/{}.png"),
        ("geojson", "geojson/{}.geojson"),
        ("rois", "rois/{}.zip"),
    ],
)
def test_pictures_are_the_files_of_predict(
    kind: str, path: str, folder: Path, predicted: Path, random_checkpoint: str
) -> None:
    service = Service(random_checkpoint)
    single = service.post(folder / "a.tif", format=kind)
    assert single.status_code == 200
    assert single.content == (predicted / path.format("a")).read_bytes()
    stack = service.post(folder / "a.tif", folder / "c.tif", format=kind)
    assert stack.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(stack.content)) as archive:
        suffix = path.partition("{}")[2]
        assert archive.namelist() == [name + suffix for name in ("a", "c_t0", "c_t1", "c_t2")]
        for name in archive.namelist():
            assert archive.read(name) == (predicted / path.partition("/")[0] / name).read_bytes()


def test_tables_are_the_files_of_predict(folder: Path, predicted: Path, random_checkpoint: str) -> None:
    service = Service(random_checkpoint)
    files = sorted(folder.iterdir())
    assert service.post(*files, format="csv").text == (predicted / "cells.csv").read_text()
    assert service.post(*files, format="coco").json() == json.loads((predicted / "coco.json").read_text())
    images = service.post(*files).json()["images"]
    rows = list(csv.DictReader((predicted / "images.csv").read_text().splitlines()))
    assert [image["file"] for image in images] == [row["file"] for row in rows]
    for image, row in zip(images, rows, strict=True):
        assert image["count"] == len(image["cells"]) == int(row["cells"])
        assert image["confluence"] == float(row["confluence"])
        assert image["model"] == MODEL


def test_the_json_describes_the_label_image(folder: Path, predicted: Path, random_checkpoint: str) -> None:
    image = Service(random_checkpoint).post(folder / "b.png", view=True).json()
    labels = tifffile.imread(predicted / "labels/b.tif")
    runs = np.frombuffer(base64.b64decode(image["label_runs"]), "<i4").reshape(-1, 2)
    np.testing.assert_array_equal(np.repeat(*runs.T).reshape(image["height"], image["width"]), labels)
    centres = np.stack(np.meshgrid(np.arange(120) + 0.5, np.arange(90) + 0.5), axis=-1).reshape(-1, 2)
    for cell in image["cells"]:
        mask = labels == cell["label"]
        assert cell["area_px"] == mask.sum()
        inside = points_in_poly(centres, cell["outline"]).reshape(mask.shape)  # of its largest part, with its holes
        part = ndimage.label(mask)[0]
        largest = part == np.bincount(part[mask]).argmax()
        np.testing.assert_array_equal(inside, ndimage.binary_fill_holes(largest))
    assert 0 <= min(cell["score"] for cell in image["cells"]) <= 1


def test_other_thresholds_need_no_network(folder: Path, random_checkpoint: str) -> None:
    service = Service(random_checkpoint)
    first = service.post(folder / "a.tif").json()
    assert service.images == 1
    fewer = service.post(folder / "a.tif", min_area=30, prominence=0.02).json()
    assert service.images == 1
    assert 0 < fewer["count"] < first["count"]
    assert min(cell["area_px"] for cell in fewer["cells"]) >= 30
    assert service.post(folder / "a.tif").json() == first
    averaged = service.post(folder / "a.tif", tta=True).json()
    assert service.images == 8  # the version without turn and scale is the cached one
    assert averaged["cells"] != first["cells"]


def test_the_cache_is_bounded_and_returns_what_the_network_returned() -> None:
    calls: list[int] = []

    def network(image: np.ndarray) -> np.ndarray:
        calls.append(int(image[0, 0]))
        return np.full((2, *image.shape), image[0, 0], np.float32)

    cache = MapsCache(network, max_bytes=3 * 2 * 100 * 4)
    for value in (1, 2, 3, 1, 4, 1, 2):
        assert (cache(np.full((10, 10), value, np.uint8)) == value).all()
    assert calls == [1, 2, 3, 4, 2]  # 2 was the oldest when 4 came
    cache(np.zeros((4, 25), np.uint8))
    cache(np.zeros((25, 4), np.uint8))  # the same bytes, another shape
    assert calls[-2:] == [0, 0]


def test_refusals(folder: Path, random_checkpoint: str, tmp_path: Path) -> None:
    service = Service(random_checkpoint, max_request_mib=1, max_files=2)
    text, damaged, huge = tmp_path / "notes.tif", tmp_path / "cut.png", tmp_path / "huge.png"
    text.write_text("no image")
    damaged.write_bytes((folder / "b.png").read_bytes()[:200])
    bomb = bytearray((folder / "b.png").read_bytes())
    bomb[16:24] = (20_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    huge.write_bytes(bomb)
    (tmp_path / "large.tif").write_bytes(bytes(2**20))
    expected = {
        (text,): (415, "unsupported"),
        (damaged,): (422, "damaged"),
        (huge,): (413, "pixels"),
        (tmp_path / "large.tif",): (413, "1 MiB"),
        tuple(sorted(folder.iterdir())): (413, "Too many files"),
        (): (422, "no file"),
    }
    for paths, (status, part) in expected.items():
        response = service.post(*paths)
        line = response.json()["error"]
        assert (response.status_code, part in line, "\n" in line) == (status, True, False), line
        assert str(tmp_path) not in line
    for query in ({"threshold": 2}, {"format": "svg"}, {"unknown": 1}, {"diameter": 1e-3}, {"channel": -1}):
        response = service.post(folder / "a.tif", **query)
        assert response.status_code == 422, query
        assert next(iter(query)) in response.json()["error"]
    assert service.http.get("/nowhere").status_code == 404
    assert service.http.get("/segment").json()["error"].startswith("Method Not Allowed")
    assert [status for status, _ in service.recorded][:6] == [status for status, _ in expected.values()]


def test_a_bad_file_among_good_ones(folder: Path, random_checkpoint: str, tmp_path: Path) -> None:
    service = Service(random_checkpoint)
    bad = tmp_path / "bad.tif"
    bad.write_text("no image")
    images = service.post(folder / "a.tif", bad).json()["images"]
    assert images[0]["count"] > 0
    assert (images[1]["file"], images[1]["status"]) == ("bad.tif", 415)
    with zipfile.ZipFile(io.BytesIO(service.post(folder / "a.tif", bad, format="labels").content)) as archive:
        assert archive.namelist() == ["a.tif", "errors.csv"]
    assert service.post(folder / "a.tif", bad, format="csv").status_code == 415


def test_nothing_is_written_to_disk(random_checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rollover(_: Any) -> None:
        raise AssertionError("an upload was written to a temporary file")

    monkeypatch.setattr(SpooledTemporaryFile, "rollover", rollover)
    noise = np.random.default_rng(0).integers(0, 256, (1500, 1400), np.uint8)
    tifffile.imwrite(tmp_path / "large.tif", noise)
    assert (tmp_path / "large.tif").stat().st_size > 2 * 2**20
    assert Service(random_checkpoint).post(tmp_path / "large.tif").status_code == 200


def test_names_and_formats(folder: Path, random_checkpoint: str) -> None:
    service = Service(random_checkpoint)
    data = (folder / "a.tif").read_bytes()
    raw = service.http.post("/segment", content=data, headers={"x-file-name": "../../etc/a.tif"})
    assert raw.json()["file"] == "a.tif"
    assert service.http.post("/segment", content=data).json()["file"] == "image"
    for accept, start in (
        ("image/tiff", b"II*\0"),
        ("text/html, image/png;q=0.9", b"\x89PNG"),
        ("application/geo+json", b'{"type":"FeatureCollection"'),
        ("*/*", b'{"file"'),
    ):
        assert service.post(folder / "a.tif", headers={"accept": accept}).content.startswith(start)
    planes = service.post(folder / "c.tif", plane="t1").json()
    assert planes["file"] == "c.tif#t1"
    assert service.post(folder / "c.tif", plane="z9").status_code == 415


@pytest.mark.parametrize("token", [None, TOKEN])
def test_only_the_token_or_this_machine_gets_an_answer(token: str | None, folder: Path, random_checkpoint: str) -> None:
    service = Service(random_checkpoint, token=token)
    bearer = {"authorization": f"Bearer {TOKEN}"}
    for headers, allowed in (({}, False), ({"authorization": "Bearer wrong"}, False), (bearer, True)):
        assert (service.http.get("/model", headers=headers).status_code == 200) == (allowed or token is None)
        response = service.post(folder / "a.tif", headers=headers)
        assert response.status_code == (200 if allowed or token is None else 401)
    for path in ("/healthz", "/docs", "/openapi.json"):
        assert service.http.get(path).status_code == 200
    # A page whose name was pointed at this machine, and a page of another origin.
    rebound = service.http.get("/model", headers={"host": "evil.example:8000", **bearer})
    assert rebound.status_code == (200 if token else 403)
    foreign = service.http.get("/model", headers={"origin": "http://evil.example", **bearer})
    assert foreign.status_code == 403
    assert "access-control-allow-origin" not in foreign.headers
    assert service.http.get("/model", headers={"origin": "http://[", **bearer}).status_code == 403
    own = service.http.get("/model", headers={"origin": "http://127.0.0.1:8000", **bearer})
    assert own.status_code == 200
    assert own.headers["content-security-policy"].startswith("default-src 'none'")


def test_a_full_queue_and_a_slow_answer(folder: Path, random_checkpoint: str) -> None:
    async def attempts() -> list[httpx.Response]:
        release = asyncio.Event()

        async def segment(upload: Upload, options: Options, kind: Format) -> list[Answer]:
            await release.wait()
            return [Answer(upload.name, 200, b"{}")]

        async def model() -> dict[str, Any]:
            raise api.UnavailableError("not yet")

        settings = ServeSettings(checkpoint="x", max_queue=2, max_files=2, timeout_s=3)
        backend = api.Backend(segment, model, model, model, model, lambda *_: None)  # type: ignore[arg-type]
        transport = httpx.ASGITransport(api.build(settings, None, backend))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            waiting = [asyncio.create_task(client.post("/segment", content=b"x")) for _ in range(2)]
            while len(asyncio.all_tasks()) < 5:
                await asyncio.sleep(0)
            full = await client.post("/segment", content=b"x")
            late = await waiting[0]
            release.set()
            return [full, late, await client.post("/segment", content=b"x"), await client.get("/healthz")]

    full, late, next_one, health = asyncio.run(attempts())
    assert (full.status_code, full.headers["retry-after"]) == (429, "2")
    assert (late.status_code, late.json()["error"].split(";")[0]) == (503, "not finished after 3 s")
    assert next_one.status_code == 200  # the queue is empty again
    assert (health.status_code, health.json()) == (503, {"error": "not yet"})


def test_a_request_that_was_given_up_stops_before_its_next_plane(folder: Path, random_checkpoint: str) -> None:
    loaded, stop = segmenter.load(random_checkpoint, device="cpu"), threading.Event()
    network, images = loaded.network, []

    def first_only(image: np.ndarray) -> np.ndarray:
        images.append(image)
        stop.set()
        return network(image)

    worker = Worker(loaded, first_only, MODEL)
    with pytest.raises(StoppedError):
        worker.segment(Upload("c.tif", (folder / "c.tif").read_bytes()), Options(), "json", stop)
    assert len(images) == 1


def test_one_failing_file_cancels_the_others(folder: Path, random_checkpoint: str) -> None:
    cancelled = []

    async def segment(upload: Upload, options: Options, kind: Format) -> list[Answer]:
        if upload.name == "a.tif":
            raise api.UnavailableError("lost")
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(upload.name)
            raise
        return []

    async def model() -> dict[str, Any]:
        return {}

    recorded: list[int] = []
    backend = api.Backend(segment, model, model, model, model, lambda status, *_: recorded.append(status))  # type: ignore[arg-type]
    client = TestClient(api.build(ServeSettings(checkpoint="x"), None, backend), base_url="http://127.0.0.1")
    response = client.post("/segment", files=[("file", (path.name, b"x")) for path in sorted(folder.iterdir())])
    assert (response.status_code, response.json()) == (503, {"error": "lost"})
    assert sorted(cancelled) == ["b.png", "c.tif"]
    assert recorded == [503]


def test_names_in_a_zip_differ_on_every_system() -> None:
    files = ["a.tif", "a_2.tif", "a.png", "A.tif", "well#3.tif", "c.tif#t0"]
    body, _ = answers.combine([Answer(file, 200, file.encode()) for file in files], "labels", True)
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        assert [archive.read(name).decode() for name in archive.namelist()] == files
        assert len({name.casefold() for name in archive.namelist()}) == len(files)


def test_settings_under_which_a_request_never_fits_are_refused() -> None:
    for settings in ({"max_queue": 2}, {"min_replicas": 3}):
        with pytest.raises(ValueError, match="is below"):
            ServeSettings(checkpoint="x", **settings)


def test_runs_describe_any_labels() -> None:
    labels = np.array([[0, 0, 3], [3, 1, 0]], np.int32)
    assert answers.runs(labels).tolist() == [0, 2, 3, 2, 1, 1, 0, 1]


def test_the_documentation_lists_every_option_without_another_host(random_checkpoint: str) -> None:
    service = Service(random_checkpoint)
    page = service.http.get("/docs").text
    for name in Options.model_fields:
        assert f"<code>{name}</code>" in page
    assert "https://" not in page
    assert service.http.get("/page/docs.css").headers["content-type"].startswith("text/css")
    assert "src=" not in page
    schema = service.http.get("/openapi.json").json()
    assert {"/segment", "/model", "/healthz", "/metrics"} <= set(schema["paths"])
