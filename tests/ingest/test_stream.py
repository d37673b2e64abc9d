"""The stream of batches: the scheduled samples, with the same pixels for any number of ranks and from any step."""

import gc
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray
from conftest import run_python, write_tiny_dataset
from hosts import wait_until

from raylivecell.core.errors import UserError
from raylivecell.data import shards
from raylivecell.ingest import blocks, dataset
from raylivecell.ingest import stream as ingest
from raylivecell.ingest.order import SampleSchedule
from raylivecell.recipe import AugmentConfig, PhaseConfig
from raylivecell.runtime import ray_internals
from raylivecell.runtime.ray_internals import blocks_ready
from raylivecell.targets import sample_planes
from raylivecell.targets.registry import Targets

PHASES = (PhaseConfig(epochs=2), PhaseConfig(epochs=3, augmented_copies=1))
Batches = tuple[np.ndarray, np.ndarray]
"""Planes (steps, b, C, h, w) and rows (steps, b, 3) of a complete stream."""


@pytest.fixture(scope="module")
def source(tiny_dataset: str) -> blocks.Source:
    rows = tuple(shards.list_rows(tiny_dataset, "train"))
    return blocks.Source(rows, SampleSchedule(7, len(rows), 4, PHASES), AugmentConfig(), (32, 40), (48, 64))


@pytest.fixture(autouse=True, scope="module")
def small_blocks() -> Iterator[None]:
    """Several blocks per run, the last one smaller."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ingest, "BLOCK_SAMPLES", 16)
        yield


def collect(source: blocks.Source, start: int = 0, rank: int = 0, ranks: int = 1) -> Batches:
    """The stream of a rank from Ray Data."""
    batches = list(ingest.Stream(source, start, rank, ranks))
    return tuple(np.stack([batch[name] for batch in batches]) for name in ("planes", "rows"))  # type: ignore[return-value]


def direct(source: blocks.Source, start: int = 0, rank: int = 0, ranks: int = 1) -> Batches:
    """The stream of a rank, computed by calling the functions of Ray Data's tasks in this process."""
    batch = source.schedule.batch_size // ranks
    shard = blocks.RankShard(start, rank, ranks, ingest.block_steps(source, batch, None))
    rows = [
        shard.block_rows(block, source.schedule)
        for block in range(-(-(source.schedule.steps - start) // shard.block_steps))
    ]
    planes = np.concatenate([blocks.load(block_rows, source) for block_rows in rows])
    return planes.reshape(-1, batch, *planes.shape[1:]), np.concatenate(rows).reshape(-1, batch, 3)


@pytest.fixture(scope="module")
def batches(source: blocks.Source) -> Batches:
    return direct(source)


def test_blocks_follow_the_schedule(source: blocks.Source, batches: Batches) -> None:
    planes, rows = batches
    assert planes.dtype == np.uint8
    assert planes.shape == (source.schedule.steps, 4, 3, 32, 40)
    np.testing.assert_array_equal(rows, [source.schedule.rows(step) for step in range(source.schedule.steps)])


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("start", [0, 11])
def test_all_ranks_together_get_the_same_batches_from_any_step(
    source: blocks.Source, batches: Batches, ranks: int, start: int
) -> None:
    rank_batches = [direct(source, start, rank, ranks) for rank in range(ranks)]
    for expected, *values in zip(batches, *rank_batches):
        np.testing.assert_array_equal(np.concatenate(values, axis=1), expected[start:])


@pytest.mark.parametrize("targets", ["foreground", "distance"])
def test_ray_data_streams_these_blocks(ray_cluster: None, source: blocks.Source, targets: Targets) -> None:
    """One of two ranks from step 5, from shards and from cached samples; no batch after the last step."""
    source = replace(source, targets=targets)
    expected = direct(source, 5, 1, 2)
    cached = dataset.cache(source.rows, 1, budget=1, cells=targets != "foreground")
    assert cached is not None
    for variant in (source, replace(source, cached=cached)):
        for values, expected_values in zip(collect(variant, 5, 1, 2), expected):
            np.testing.assert_array_equal(values, expected_values)
    assert list(ingest.Stream(source, source.schedule.steps, 0, 1)) == []


def test_concurrent_runs_share_the_object_store(tiny_dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training and validation samples share one budget, a fraction of the memory that is free when the run starts."""
    store = free = 10_000.0
    monkeypatch.setattr(dataset.ray, "available_resources", lambda: {"object_store_memory": free})
    monkeypatch.setattr(dataset.session, "task_cpus", lambda: 1.0)
    monkeypatch.setattr(
        dataset,
        "decode",
        SimpleNamespace(options=lambda num_returns: SimpleNamespace(remote=lambda read, rows, cells: rows)),
    )
    for size in (100, 160, 240, 1000):  # bytes of a sample; 12 training and 3 validation samples
        monkeypatch.setattr(dataset, "sample_bytes", lambda *_, size=size: size)
        samples = dataset.open_samples(tiny_dataset)
        cached = size * (len(samples.cached_train or ()) + len(samples.cached_val or ()))
        assert cached <= 0.3 * store
        assert (samples.cached_train is not None) == (12 * size <= 0.3 * store)
    used = 0.0
    for _ in range(4):
        used += dataset.stream_budget_bytes() + dataset.cache_budget_bytes()
        free = store - used
    assert used < store


def test_augmented_copies_differ_in_each_epoch_and_originals_are_crops(source: blocks.Source, batches: Batches) -> None:
    planes, rows = batches[0].reshape(-1, 3, 32, 40), batches[1].reshape(-1, 3)
    augmented: dict[int, list[np.ndarray]] = {}
    for crop, (_, sample, variant) in zip(planes, rows):
        if variant:
            augmented.setdefault(int(sample), []).append(crop)
        else:
            pixels = blocks.read_sample(source.rows[sample])
            windows = np.lib.stride_tricks.sliding_window_view(pixels, (32, 40), axis=(1, 2))
            assert (windows == crop[:, None, None]).all(axis=(0, 3, 4)).any()
    for copies in augmented.values():
        assert all((a != b).any() for i, a in enumerate(copies) for b in copies[:i])


def test_a_stream_closed_early_frees_its_cpus_and_its_blocks(ray_cluster: None, source: blocks.Source) -> None:
    long = replace(
        source,
        schedule=replace(source.schedule, phases=(PhaseConfig(epochs=300, originals=False, augmented_copies=1),)),
    )

    def used() -> float:
        return ray.cluster_resources()["object_store_memory"] - dataset.free_bytes()

    cpus, before = ray.cluster_resources()["CPU"], used()
    for _ in range(2):
        stream = ingest.Stream(long, 0, 0, 1)
        for _ in range(20):
            next(stream)
        stream.close()
    del stream

    def free() -> bool:
        gc.collect()  # the thread of the last stream may not have ended before `close` collected
        return ray.available_resources().get("CPU") == cpus and used() <= before

    wait_until("CPUs and blocks are free", free, 60)


def test_distance_maps_are_drawn_from_the_warped_labels(source: blocks.Source, batches: Batches) -> None:
    planes, rows = direct(replace(source, targets="distance"))
    np.testing.assert_array_equal(rows, batches[1])
    np.testing.assert_array_equal(planes[:, :, :3], batches[0], "all targets get the same pixels")
    empty = np.zeros(planes.shape[3:], np.uint8)
    for sample in planes[::5, 0]:
        labels = sample[sample_planes.FOREGROUND].astype(np.uint16)  # images of the tiny dataset have one cell
        expected = sample_planes.draw(empty, sample_planes.pack(labels, empty), "distance")
        np.testing.assert_array_equal(sample[sample_planes.MAPS], expected[sample_planes.MAPS])


def test_data_tasks_import_no_torch() -> None:
    modules = "raylivecell.ingest.execution, raylivecell.ingest.stream, raylivecell.training.ray_train"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_an_error_is_raised_by_the_first_batch(source: blocks.Source, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Iterator[None]:
        raise UserError("no shard")
        yield

    monkeypatch.setattr(ingest, "_blocks", broken)
    stream = ingest.Stream(source, 0, 0, 1)
    with pytest.raises(UserError, match="no shard"):
        next(stream)
    stream.close()


@pytest.mark.slow
def test_no_task_imports_torch(ray_cluster: None, source: blocks.Source) -> None:
    """It would cost each process 1 s and 200 MB. A separate runtime environment excludes processes of other tests."""

    @ray.remote
    def loaded() -> tuple[bool, bool]:
        return "raylivecell.ingest.blocks" in sys.modules, "torch" in sys.modules

    @ray.remote(runtime_env={"env_vars": {"ALONE": "1"}})
    def read() -> list[tuple[bool, bool]]:
        for _ in ingest.Stream(source, 0, 0, 1):
            pass
        return ray.get([loaded.remote() for _ in range(8)])

    assert {torch for decoding, torch in ray.get(read.remote()) if decoding} == {False}


def test_rays_scheduler_wait_is_restored_after_a_stream(
    ray_cluster: None, source: blocks.Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Data's settings are never changed for the process, and the throttle sees each round of the scheduler."""
    context, fields_before = ray.data.DataContext.get_current(), vars(ray.data.DataContext.get_current().copy())
    wait, name, ready = ray_internals._executor_state(), ray_internals._Wait.NAME, []
    before = getattr(wait, name)
    throttle = ray_internals._throttle()
    monkeypatch.setattr(throttle, "on_execution_step", lambda self, executor: ready.append(blocks_ready(executor)))
    stream = ingest.Stream(source, 0, 0, 1)
    next(stream)
    assert getattr(wait, name) == ray_internals.ROUND_WAITING_S
    assert ray.data.DataContext.get_current() is context
    for _ in stream:
        pass
    stream.close()
    assert getattr(wait, name) == before
    assert vars(ray.data.DataContext.get_current()) == fields_before
    assert len(ready) > 1


def test_blocks_are_bounded_in_samples_and_bytes(source: blocks.Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest, "BLOCK_SAMPLES", 256)
    assert ingest.block_steps(source, 4, None) == 256 // 4
    uncropped = replace(source, crop=None, frame=(2048, 2048), targets="distance")
    for memory in (None, 2**30, 2**27):
        steps = ingest.block_steps(uncropped, 2, memory)
        limit = min(ingest.BLOCK_BYTES, (memory or 2**40) // ingest.STREAM_BLOCKS)
        assert steps == 1 or steps * 2 * 5 * 2048**2 <= limit


STORE = 80 * 2**20
STREAM_LARGE = """
import json, pathlib, sys
import numpy as np, psutil, ray
from raylivecell.ingest import blocks
from raylivecell.ingest import dataset
from raylivecell.ingest import stream as ingest
from raylivecell.data import shards
from raylivecell.recipe import AugmentConfig
from raylivecell.ingest.order import SampleSchedule
from raylivecell.recipe import PhaseConfig

data, limit = sys.argv[1], int(sys.argv[2])
ray.init(
    address="local", num_cpus=2, object_store_memory=limit, include_dashboard=False, log_to_driver=False,
    object_spilling_directory=sys.argv[3],
)
rows = tuple(shards.list_rows(data, "train"))
cached = dataset.cache(rows, len(rows) * 3 * 600 * 600, dataset.cache_budget_bytes())
schedule = SampleSchedule(0, len(rows), 4, (PhaseConfig(epochs=1),))
source = blocks.Source(rows, schedule, AugmentConfig(), (256, 256), (600, 600), cached)
seen, peak = [], 0
for batch in ingest.Stream(source, 0, 0, 1, memory=limit // 4):
    seen += batch["rows"][:, 1].tolist()
    peak = max(peak, psutil.Process().memory_full_info().uss)
spilled = [path.name for path in pathlib.Path(sys.argv[3]).rglob("*") if path.is_file()]
print(json.dumps({"cached": cached is not None, "seen": seen, "peak": peak, "spilled": spilled}))
"""


@pytest.mark.slow
@pytest.mark.ray
def test_a_dataset_five_times_the_object_store_is_streamed(tmp_path: Path) -> None:
    images = 5 * STORE // (3 * 600 * 600)
    data = write_tiny_dataset(tmp_path, images, 600)
    done = run_python(STREAM_LARGE, data, str(STORE), str(tmp_path / "spilled"))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert not result["cached"]
    assert sorted(set(result["seen"])) == list(range(images))
    assert result["spilled"] == []
    assert result["peak"] < 5 * STORE, "the reading process has batches in memory, not the dataset"
