"""The stream of batches: the plan's samples, the same pixels for any number of ranks and from any step on."""

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
from conftest import run_apart, write_tiny_dataset
from hosts import until

from raylivecell.core.errors import UserError
from raylivecell.data import shards
from raylivecell.ingest import blocks, dataset, target_maps
from raylivecell.ingest import stream as ingest
from raylivecell.ingest.order import SampleSchedule
from raylivecell.recipe import AugmentConfig, PhaseConfig, Targets
from raylivecell.runtime import ray_internals
from raylivecell.runtime.ray_internals import blocks_ready

PHASES = (PhaseConfig(epochs=2), PhaseConfig(epochs=3, augmented_copies=1))
Batches = tuple[np.ndarray, np.ndarray]
"""Planes (steps, b, C, h, w) and rows (steps, b, 3) of a whole stream."""


@pytest.fixture(scope="module")
def source(tiny_dataset: str) -> blocks.Source:
    rows = tuple(shards.list_rows(tiny_dataset, "train"))
    return blocks.Source(rows, SampleSchedule(7, len(rows), 4, PHASES), AugmentConfig(), (32, 40), (48, 64))


@pytest.fixture(autouse=True, scope="module")
def small_blocks() -> Iterator[None]:
    """Several in a run, the last one smaller."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ingest, "BLOCK_SAMPLES", 16)
        yield


def collect(source: blocks.Source, start: int = 0, rank: int = 0, ranks: int = 1) -> Batches:
    """The stream of a rank, by Ray Data."""
    batches = list(ingest.Stream(source, start, rank, ranks))
    return tuple(np.stack([batch[name] for batch in batches]) for name in ("planes", "rows"))  # type: ignore[return-value]


def direct(source: blocks.Source, start: int = 0, rank: int = 0, ranks: int = 1) -> Batches:
    """The stream of a rank, block after block as Ray Data's tasks make them, in this process."""
    batch = source.plan.batch_size // ranks
    share = blocks.RankShard(start, rank, ranks, ingest.block_steps(source, batch, None))
    rows = [
        share.block_rows(block, source.plan) for block in range(-(-(source.plan.steps - start) // share.block_steps))
    ]
    planes = np.concatenate([blocks.load(one, source) for one in rows])
    return planes.reshape(-1, batch, *planes.shape[1:]), np.concatenate(rows).reshape(-1, batch, 3)


@pytest.fixture(scope="module")
def whole(source: blocks.Source) -> Batches:
    return direct(source)


def test_the_blocks_are_the_plan(source: blocks.Source, whole: Batches) -> None:
    planes, rows = whole
    assert planes.dtype == np.uint8
    assert planes.shape == (source.plan.steps, 4, 3, 32, 40)
    np.testing.assert_array_equal(rows, [source.plan.rows(step) for step in range(source.plan.steps)])


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("start", [0, 11])
def test_ranks_together_see_what_one_sees_from_any_step_on(
    source: blocks.Source, whole: Batches, ranks: int, start: int
) -> None:
    parts = [direct(source, start, rank, ranks) for rank in range(ranks)]
    for place in range(2):
        np.testing.assert_array_equal(np.concatenate([part[place] for part in parts], axis=1), whole[place][start:])


@pytest.mark.parametrize("targets", ["foreground", "distance"])
def test_ray_data_streams_these_blocks(ray_cluster: None, source: blocks.Source, targets: Targets) -> None:
    """A rank of two from a step on, read from the shards and from samples kept decoded; nothing after the last step."""
    source = replace(source, targets=targets)
    expected = direct(source, 5, 1, 2)
    kept = dataset.cache(source.rows, 1, budget=1, cells=targets != "foreground")
    assert kept is not None
    for given in (source, replace(source, kept=kept)):
        for values, right in zip(collect(given, 5, 1, 2), expected):
            np.testing.assert_array_equal(values, right)
    assert list(ingest.Stream(source, source.plan.steps, 0, 1)) == []


def test_runs_at_the_same_time_share_the_object_store(tiny_dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training and validation samples have one budget, and each run only what is free when it starts."""
    store = free = 10_000.0
    monkeypatch.setattr(dataset.ray, "available_resources", lambda: {"object_store_memory": free})
    monkeypatch.setattr(dataset.session, "task_cpus", lambda: 1.0)
    monkeypatch.setattr(
        dataset,
        "decode",
        SimpleNamespace(options=lambda num_returns: SimpleNamespace(remote=lambda read, rows, cells: rows)),
    )
    for size in (100, 160, 240, 1000):  # bytes of a sample: 12 to train on, 3 to validate
        monkeypatch.setattr(dataset, "sample_bytes", lambda *_, size=size: size)
        samples = dataset.open_samples(tiny_dataset)
        cached = size * (len(samples.kept_train or ()) + len(samples.kept_val or ()))
        assert cached <= 0.3 * store
        assert (samples.kept_train is not None) == (12 * size <= 0.3 * store)
    taken = 0.0
    for _ in range(4):
        taken += dataset.stream_budget_bytes() + dataset.cache_budget_bytes()
        free = store - taken
    assert taken < store


def test_transformed_copies_differ_each_epoch_and_plain_ones_are_crops(source: blocks.Source, whole: Batches) -> None:
    planes, rows = whole[0].reshape(-1, 3, 32, 40), whole[1].reshape(-1, 3)
    seen: dict[int, list[np.ndarray]] = {}
    for plane, (_, sample, variant) in zip(planes, rows):
        if variant:
            seen.setdefault(int(sample), []).append(plane)
        else:
            pixels = blocks.read_sample(source.rows[sample])
            windows = np.lib.stride_tricks.sliding_window_view(pixels, (32, 40), axis=(1, 2))
            assert (windows == plane[:, None, None]).all(axis=(0, 3, 4)).any()
    for copies in seen.values():
        assert all((a != b).any() for i, a in enumerate(copies) for b in copies[:i])


def test_a_stream_closed_early_frees_its_cpus_and_its_blocks(ray_cluster: None, source: blocks.Source) -> None:
    long = replace(
        source, plan=replace(source.plan, phases=(PhaseConfig(epochs=300, originals=False, augmented_copies=1),))
    )

    def taken() -> float:
        return ray.cluster_resources()["object_store_memory"] - dataset.free_bytes()

    whole, before = ray.cluster_resources()["CPU"], taken()
    for _ in range(2):
        batches = ingest.Stream(long, 0, 0, 1)
        for _ in range(20):
            next(batches)
        batches.close()
    del batches

    def free() -> bool:
        gc.collect()  # the last stream's thread may have been ending while `close` collected
        return ray.available_resources().get("CPU") == whole and taken() <= before

    until("CPUs and blocks are free", free, 60)


def test_fields_are_drawn_from_the_warped_labels(source: blocks.Source, whole: Batches) -> None:
    planes, rows = direct(replace(source, targets="distance"))
    np.testing.assert_array_equal(rows, whole[1])
    np.testing.assert_array_equal(planes[:, :, :3], whole[0], "the same pixels are trained on")
    nothing = np.zeros(planes.shape[3:], np.uint8)
    for image in planes[::5, 0]:
        one_cell = image[1].astype(np.uint16)  # of the tiny set each image has one, but for its mirror image
        drawn = target_maps.draw_target_maps(nothing, target_maps.pack(one_cell, nothing), "distance")
        np.testing.assert_array_equal(image[3:], drawn[3:])


def test_data_tasks_need_no_torch() -> None:
    modules = "raylivecell.ingest.execution, raylivecell.ingest.stream, raylivecell.training.ray_train"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_an_error_is_raised_by_the_first_batch(source: blocks.Source, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Iterator[None]:
        raise UserError("no shard")
        yield

    monkeypatch.setattr(ingest, "_blocks", broken)
    batches = ingest.Stream(source, 0, 0, 1)
    with pytest.raises(UserError, match="no shard"):
        next(batches)
    batches.close()


@pytest.mark.slow
def test_no_task_loads_torch(ray_cluster: None, source: blocks.Source) -> None:
    """A second to its start, and 200 MB, of each data process. Its own environment: no process of another test's."""

    @ray.remote
    def loaded() -> tuple[bool, bool]:
        return "raylivecell.ingest.blocks" in sys.modules, "torch" in sys.modules

    @ray.remote(runtime_env={"env_vars": {"ALONE": "1"}})
    def read() -> list[tuple[bool, bool]]:
        for _ in ingest.Stream(source, 0, 0, 1):
            pass
        return ray.get([loaded.remote() for _ in range(8)])

    assert {torch for decoding, torch in ray.get(read.remote()) if decoding} == {False}


def test_the_pace_is_rays_own_again_after_a_stream(
    ray_cluster: None, source: blocks.Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And Ray Data's settings are the process's own at any time; each round of the scheduler can be paced."""
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
    whole = replace(source, crop=None, frame=(2048, 2048), targets="distance")
    for memory in (None, 2**30, 2**27):
        steps = ingest.block_steps(whole, 2, memory)
        room = min(ingest.BLOCK_BYTES, (memory or 2**40) // ingest.STREAM_BLOCKS)
        assert steps == 1 or steps * 2 * 5 * 2048**2 <= room


STORE = 80 * 2**20
STREAM_LARGE = """
import json, pathlib, sys
import numpy as np, psutil, ray
from raylivecell.ingest import blocks
from raylivecell.ingest import dataset
from raylivecell.ingest import stream as ingest
from raylivecell.data import shards
from raylivecell.recipe import AugmentConfig
from raylivecell.ingest.order import Plan
from raylivecell.recipe import PhaseConfig

data, limit = sys.argv[1], int(sys.argv[2])
ray.init(
    address="local", num_cpus=2, object_store_memory=limit, include_dashboard=False, log_to_driver=False,
    object_spilling_directory=sys.argv[3],
)
rows = tuple(shards.list_rows(data, "train"))
kept = dataset.cache(rows, len(rows) * 3 * 600 * 600, dataset.cache_budget_bytes())
plan = Plan(0, len(rows), 4, (PhaseConfig(epochs=1),))
source = blocks.Source(rows, plan, AugmentConfig(), (256, 256), (600, 600), kept)
seen, peak = [], 0
for batch in ingest.Stream(source, 0, 0, 1, memory=limit // 4):
    seen += batch["rows"][:, 1].tolist()
    peak = max(peak, psutil.Process().memory_full_info().uss)
spilled = [path.name for path in pathlib.Path(sys.argv[3]).rglob("*") if path.is_file()]
print(json.dumps({"kept": kept is not None, "seen": seen, "peak": peak, "spilled": spilled}))
"""


@pytest.mark.slow
@pytest.mark.ray
def test_a_set_five_times_the_object_store_streams(tmp_path: Path) -> None:
    images = 5 * STORE // (3 * 600 * 600)
    data = write_tiny_dataset(tmp_path, images, 600)
    done = run_apart(STREAM_LARGE, data, str(STORE), str(tmp_path / "spilled"))
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert not told["kept"]
    assert sorted(set(told["seen"])) == list(range(images))
    assert told["spilled"] == []
    assert told["peak"] < 5 * STORE, "the reading process holds batches, not the set"
