"""`check`: each finding passes where it should, and fails where it should."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from raylivecell import recipe
from raylivecell.cli import check, main, probe
from raylivecell.cli.probe import Node
from raylivecell.data import shards

GIB = 2**30
VERSIONS = (("python", "3.11.7"), ("ray", "2.60.0"), ("raylivecell", "0.1.0"), ("torch", "2.13.0"))


def node(address: str = "10.0.0.1", resources: dict[str, float] | None = None, **told: Any) -> Node:
    resources = {"CPU": 8.0, "object_store_memory": 4.0 * GIB} | (resources or {})
    return Node(address, resources, **({"versions": VERSIONS, "shared_memory": 8 * GIB} | told))


def test_a_sound_cluster_passes() -> None:
    nodes = [node(), node("10.0.0.2", {"GPU": 4.0}, gpus=4)]
    found = [check.cluster(nodes), check.versions(nodes), check.clocks(nodes), check.shared_memory(nodes)]
    found += [check.gpus(nodes, 4), check.shared_storage(nodes, "s3://cells/run"), check.token("token", 401)]
    assert {one.level for one in found} == {"pass"}
    assert found[0].told == "2 nodes, 16 CPUs, 4 GPUs"


BAD = node("10.0.0.9", {"GPU": 4.0}, gpus=4)


@pytest.mark.parametrize(
    ("finding", "level", "told"),
    [
        (lambda: check.cluster([node(), node("10.0.0.9", silent="no process")]), "fail", "no answer from 10.0.0.9 (no"),
        (
            lambda: check.versions([node(), node("10.0.0.9", versions=(*VERSIONS[:3], ("torch", "2.12.0"))), node()]),
            "fail",
            "10.0.0.9 has torch 2.12.0, others not",
        ),
        (lambda: check.clocks([node(), node("10.0.0.9", clock_s=-3)]), "warn", "10.0.0.9 is 3 s off"),
        (lambda: check.clocks([node(), node("10.0.0.9", clock_s=900)]), "fail", "10.0.0.9 is 900 s off"),
        (
            lambda: check.shared_memory([node(), node("10.0.0.9", shared_memory=2**26)]),
            "warn",
            "10.0.0.9 has 0.1 GiB for a store of 4.0",
        ),
        (lambda: check.gpus([node("10.0.0.9", {"GPU": 4.0}, gpus=0)], 1), "fail", "10.0.0.9: Ray has 4, torch sees 0"),
        (lambda: check.gpus([node("10.0.0.9", {"GPU": 1.0}, gpus=1)], 2), "fail", "1 for 2 workers"),
        (
            lambda: check.shared_storage([node(), node("10.0.0.9", storage_error="denied")], "s3://cells/run"),
            "fail",
            "s3://cells/run from 10.0.0.9: denied",
        ),
        (lambda: check.token("disabled", 200), "warn", "answers calls without one (RAY_AUTH_MODE=disabled, HTTP 200)"),
        (lambda: check.token(None, None), "warn", "no dashboard to ask"),
    ],
)
def test_what_is_wrong_is_found(finding: Any, level: str, told: str) -> None:
    found = finding()
    assert found.level == level
    assert told in found.told
    assert found.hint


@pytest.mark.parametrize(("ahead", "told"), [(0.0, 0.0), (5.0, 4.5), (-5.0, -4.5), (0.3, 0.0)])
def test_a_clock_is_off_by_what_its_answers_way_cannot_explain(ahead: float, told: float) -> None:
    """The way there and back takes 1 s in all: 0.5 s before the clock is read, 0.5 after."""
    now = iter([100.0, 101.0])
    assert probe.ahead(lambda: 100.5 + ahead, lambda: next(now)) == pytest.approx(told)


def damaged(tiny: str, folder: Path, how: str) -> str:
    copy = shutil.copytree(tiny, folder / "copy")
    (shard,) = (copy / "train").glob("*.parquet")
    if how == "missing":
        shard.unlink()
    elif how == "truncated":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif how == "another":
        shutil.copy(copy / "val" / "part-00000.parquet", shard)
    return str(copy)


@pytest.mark.parametrize(
    ("how", "level", "told"),
    [
        ("whole", "pass", "18 images, every shard whole"),
        ("missing", "fail", "train/part-00000.parquet is missing"),
        ("truncated", "fail", "train/part-00000.parquet"),
        ("another", "fail", "train/part-00000.parquet has 3 rows, not 12"),
    ],
)
def test_a_dataset_is_whole_or_its_bad_shards_are_named(
    tiny_dataset: str, tmp_path: Path, how: str, level: str, told: str
) -> None:
    data = damaged(tiny_dataset, tmp_path, how)
    found = check.dataset(data, shards.load_description(data))
    assert (found.level, told in found.told) == (level, True), found


def test_a_length_that_is_not_the_written_one_is_found(tiny_dataset: str) -> None:
    description = shards.load_description(tiny_dataset)
    description["splits"]["val"]["shards"][0]["bytes"] = 7
    assert "val/part-00000.parquet has" in check.dataset(tiny_dataset, description).told


def test_a_folder_with_a_run_is_found(tmp_path: Path) -> None:
    assert check.run_name(str(tmp_path)).level == "pass"
    (tmp_path / "recipe.yaml").write_text("seed: 0\n")
    assert check.run_name(str(tmp_path)).level == "fail"


EVERYTHING = ["dataset", "run name", "Ray", "versions", "clocks", "shared memory", "GPUs", "shared storage", "token"]
EVERYTHING += ["State API", "CPUs for data", "hardware", "object store", "network", "samples", "batch", "trial batch"]
SMALL = recipe.Recipe(batch_size=4, crop=(48, 48), model=recipe.Recipe().model.model_copy(update={"features": (4, 8)}))


def test_everything_on_a_real_cluster(
    ray_cluster: None, tiny_dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    words = ["check", "--data", tiny_dataset, "--recipe", "small", "--out", str(out), "--workers", "2"]
    words += ["--crop", "48", "48"]
    assert main.main(words) == 0
    told = capsys.readouterr().out
    assert "fail" not in told
    for number, what in enumerate(EVERYTHING, 1):
        assert f"{number:>2} pass  {what}: " in told
    assert not list(tmp_path.iterdir()), "nothing is left behind"
    out.mkdir()
    assert main.main(words) == 0
    assert list(tmp_path.iterdir()) == [out], "nor is what was there taken away"
    capsys.readouterr()
    bad = ["check", "--data", tiny_dataset, "--recipe", "small", "--out", "/proc/none", "--workers", "40"]
    assert main.main([*bad, "--batch-size", "4"]) == 1
    told = capsys.readouterr().out
    for what in ("shared storage", "CPUs for data", "batch"):
        assert f"fail  {what}: " in told
    assert main.main(["check", "--data", str(tmp_path / "none"), "--recipe", "small"]) == 1
    assert "fail  dataset: no dataset at" in capsys.readouterr().out


def test_what_a_driver_writes_and_a_node_cannot_read_is_found(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path that is another disk on the driver's machine."""
    monkeypatch.setattr(probe.storage, "write_bytes", lambda *_: None)
    (found,) = probe.nodes(str(tmp_path))
    assert "No such file" in found.storage_error


def test_a_batch_that_no_worker_can_hold_is_found(ray_cluster: None, tiny_dataset: str) -> None:
    plan = check.CheckRequest(tiny_dataset, None, SMALL.model_copy(update={"batch_size": 10**7, "crop": (512, 512)}), 1)
    found = check.trial_batch(plan)
    assert found.level == "fail"
    assert "lower batch_size" in found.hint
    assert check.trial_batch(plan._replace(recipe=SMALL)).level == "pass"


def test_data_that_does_not_fit_into_memory_is_found(
    ray_cluster: None, tiny_dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, description = check.CheckRequest(tiny_dataset, None, SMALL, 1), shards.load_description(tiny_dataset)
    assert check.object_store(description, plan).level == "pass"
    description["splits"]["train"]["images"] = 10**9
    assert check.object_store(description, plan).level == "warn"
