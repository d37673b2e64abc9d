"""What tests share: where real data lies, and one Ray for the whole run."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Ray's sockets want a short path; its own temporary folder keeps a test run apart from any other Ray.
os.environ.pop("RAY_ADDRESS", None)
os.environ.setdefault("RAY_TMPDIR", tempfile.mkdtemp(prefix="rlc"))
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")

SHARED = Path(os.environ.get("RAYLIVECELL_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture(scope="session")
def livecell_mini() -> Path:
    """The folder of 20 real LIVECell images."""
    folder = SHARED / "livecell-mini"
    if not folder.is_dir():
        pytest.skip(f"no real LIVECell images at {folder}: set RAYLIVECELL_SHARED to the folder that holds livecell-mini")
    return folder


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray of four logical CPUs for every test marked `ray`."""
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
