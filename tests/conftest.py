"""Fixtures and helpers: LIVECell images, one Ray per process, an S3 server, a browser."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytest
from hypothesis import HealthCheck, settings

# Delays on a busy machine must not fail tests. Everywhere else each run looks for new examples; in CI a commit must not
# fail by an example of something that it did not touch (.ci/run sets CI).
settings.register_profile(
    "patient", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=bool(os.environ.get("CI"))
)
settings.load_profile("patient")
# Ray's sockets need a short path; a separate temporary folder isolates a test run from any other Ray.
os.environ.pop("RAY_ADDRESS", None)
# Several trainings share two cores: waiting threads must yield theirs (figures in runtime/session.py).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("RAY_TMPDIR", tempfile.mkdtemp(prefix="rlc"))
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test that uses the shared Ray: streams.sh runs these in one process, in parallel with the others."""
    for item in items:
        if "ray_cluster" in getattr(item, "fixturenames", ()):
            item.add_marker("ray")


def skip_or_fail(reason: str) -> NoReturn:
    """Skip a test because a program is not installed; fail in CI, which installs all of them."""
    if os.environ.get("RAYLIVECELL_NO_SKIPS"):
        pytest.fail(reason)
    pytest.skip(reason)


SHARED = Path(os.environ.get("RAYLIVECELL_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture(scope="session")
def livecell_mini() -> Path:
    """Folder with 20 real LIVECell images."""
    folder = SHARED / "livecell-mini"
    if not folder.is_dir():
        pytest.skip(
            f"no real LIVECell images at {folder}: set RAYLIVECELL_SHARED to the folder that contains livecell-mini"
        )
    return folder


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray with four logical CPUs, shared by all tests marked `ray`."""
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        object_store_memory=400 * 1024 * 1024,
        include_dashboard=True,
        log_to_driver=False,
        logging_level="warning",
    )
    yield
    ray.shutdown()


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the actors of evaluate and predict in this process, without Ray."""
    run_in_process(monkeypatch)


def run_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the fixture `one_process`."""
    import numpy as np

    from raylivecell.inference import actors
    from raylivecell.runtime import session

    def run(
        actor: type, arguments: dict[str, Any], items: Sequence[Any], what: str, use_gpus: bool = True
    ) -> list[dict[str, Any]]:
        columns = actor(**arguments)({"item": np.array(items)})
        return [dict(zip(columns, values)) for values in zip(*columns.values(), strict=True)]

    monkeypatch.setattr(actors, "run", run)
    monkeypatch.setattr(actors, "use_threads", lambda with_torch=True: None)
    monkeypatch.setattr(session, "connect", lambda *_, **__: None)


@pytest.fixture
def unguarded_signals(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let a test send SIGTERM and SIGINT to its own process: disable the delayed exit, restore the handlers afterwards.

    SIGINT has its default handler, as in a terminal: a shell ignores it in background processes (tests/streams.sh).
    """
    from raylivecell.core import signals

    monkeypatch.setattr(signals, "_end_after_sigterm", lambda *_: None)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    signal.set_wakeup_fd(-1)


class S3(NamedTuple):
    """An S3 server (moto) on this machine."""

    env: dict[str, str]
    """Environment variables for processes that use it."""
    client: Any
    """boto3 client, to inspect the server; the bucket `cells` exists and is empty at first."""

    def upload(self, folder: str, prefix: str) -> None:
        """Upload every file in `folder` to cells/`prefix`/."""
        for path in (path for path in Path(folder).rglob("*") if path.is_file()):
            self.client.upload_file(str(path), "cells", f"{prefix}/{path.relative_to(folder)}")

    def names(self, prefix: str) -> list[str]:
        """Files under cells/`prefix`, sorted."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket="cells", Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", []) if not entry["Key"].endswith("/")]

    def read(self, name: str) -> bytes:
        return self.client.get_object(Bucket="cells", Key=name)["Body"].read()


@pytest.fixture
def s3() -> Iterator[S3]:
    """A new server for each test."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    import boto3

    host, port = server.get_host_and_port()
    env = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    env |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    client = boto3.client(
        "s3",
        endpoint_url=env["AWS_ENDPOINT_URL"],
        aws_access_key_id="key",
        aws_secret_access_key="secret",
        region_name="us-east-1",
    )
    client.create_bucket(Bucket="cells")
    yield S3(env, client)
    server.stop()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium, driven by Selenium, that logs its console and every URL it requests."""
    from selenium import webdriver

    chromium, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if not (chromium and driver):
        skip_or_fail("no Chromium with its driver: install Debian's packages chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-background-networking", "no-first-run"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


def run_python(code: str, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run `code` in a separate Python process."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=500,
        env=os.environ | (env or {}),
    )


def job_env(env: dict[str, str] | None = None) -> dict[str, str]:
    """Environment variables that make a process a job on the session's cluster (a second cluster would interfere).

    Ray's processes for that job also get the variables `env`.
    """
    import ray

    address = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    if not env:
        return address
    # As `ray job submit` sets it for a job with these variables in its runtime environment.
    return address | {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": {"env_vars": env}})}


def kill_at(run: Path, reports: int, *names: str, max_killed: int = 99) -> tuple[threading.Thread, list[int]]:
    """Start a thread that sends SIGKILL to at most `max_killed` processes of these names once `run` has `reports` rows.

    Returns:
        The thread, and the list to which it appends the process ids.
    """
    import psutil
    from hosts import wait_until

    killed: list[int] = []
    metrics = run / "metrics.jsonl"

    def kill() -> None:
        wait_until("reports", lambda: len(metrics.read_text().splitlines()) >= reports, 300, pause=0.01)
        for process in psutil.process_iter(["cmdline"]):
            if len(killed) < max_killed and any(name in " ".join(process.info["cmdline"] or []) for name in names):
                process.kill()
                killed.append(process.pid)

    thread = threading.Thread(target=kill)
    thread.start()
    return thread, killed


def write_tiny_dataset(folder: Path, images: int = 12, size: int = 48) -> str:
    """Write a prepared dataset of bright squares on a dark background: `images` for train, 3 for val, 3 for test."""
    import numpy as np

    from raylivecell.annotations import rle
    from raylivecell.core import storage
    from raylivecell.data import shards
    from raylivecell.images import intensity

    rng = np.random.default_rng(0)
    splits: dict[str, dict] = {}
    for split, count in (("train", images), ("val", 3), ("test", 3)):
        rows = []
        for i in range(count):
            labels = np.zeros((size, size), np.uint16)
            top, left = rng.integers(2, size - 22, 2)
            labels[top : top + 20, left : left + 20] = 1
            image = (100 + 80 * (labels > 0) + rng.integers(0, 20, labels.shape)).astype(np.uint8)
            name = f"A172_Phase_{split}_{i}.tif"
            border = np.zeros_like(image)
            row = {"file_name": name, "cell_type": "A172", "height": size, "width": size, "image": image}
            row |= {"labels": labels, "foreground": labels > 0, "border": border, "cells": 1}
            row["outlines"] = [mask["counts"] for mask in rle.encode(labels)]
            rows.append({**row, "source": name, "sha256": "", "padding": b"", "annotation": ""})
        file = f"{split}/part-00000.parquet"
        shards.write_shard(str(folder / file), rows)
        splits[split] = {"images": count, "cells": count, "sizes": [[size, size]]}
        splits[split]["shards"] = [{"file": file, "rows": count}]
    description = {"format_version": shards.FORMAT_VERSION, "name": "squares", "licence": "none", "splits": splits}
    description["intensity"] = intensity.LIVECELL.model_dump()
    description["scale"] = {"pixel_scale": 1.0, "diameter": 22.568, "diameters": [22.568, 22.568]}  # 2 sqrt(400 / pi)
    storage.write_json(folder / "dataset.json", description)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a dataset written by `write_tiny_dataset`."""
    return write_tiny_dataset(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of a network with random weights that segments dozens of cells."""
    import torch

    from raylivecell.cells.watershed import InstanceConfig
    from raylivecell.network.unet import build_model
    from raylivecell.recipe import ModelConfig, Recipe
    from raylivecell.runs import checkpoint
    from raylivecell.runs.progress import Progress

    torch.manual_seed(3)
    recipe = Recipe(model=ModelConfig(features=(4, 8)), targets="distance")
    folder = str(tmp_path_factory.mktemp("checkpoint"))
    checkpoint.save(folder, build_model(recipe.model, recipe.outputs), {}, Progress(), recipe)
    checkpoint.save_instances(folder, InstanceConfig(prominence=0.01, min_area=4), {})
    return folder
