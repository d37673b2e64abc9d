"""`check`: each check passes on a sound setup and reports the problem of a broken one."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raylivecell import recipe
from raylivecell.cli import check, main, probe
from raylivecell.cli.check import Finding
from raylivecell.cli.probe import Node
from raylivecell.data import shards

GIB = 2**30
VERSIONS = (("python", "3.11.7"), ("ray", "2.60.0"), ("raylivecell", "0.1.0"), ("torch", "2.13.0"))


def node(address: str = "10.0.0.1", resources: dict[str, float] | None = None, **facts: Any) -> Node:
    resources = {"CPU": 8.0, "object_store_memory": 4.0 * GIB} | (resources or {})
    return Node(address, resources, **({"versions": VERSIONS, "shared_memory": 8 * GIB} | facts))


def test_a_sound_cluster_passes() -> None:
    nodes = [node(), node("10.0.0.2", {"GPU": 4.0}, gpus=4)]
    findings = [check.cluster(nodes), check.versions(nodes), check.clocks(nodes), check.shared_memory(nodes)]
    findings += [check.gpus(nodes, 4), check.shared_storage(nodes, "s3://cells/run"), check.token("token", 401)]
    assert {finding.level for finding in findings} == {"pass"}
    assert findings[0].message == "2 nodes, 16 CPUs, 4 GPUs"


@pytest.mark.parametrize(
    ("run_check", "level", "message"),
    [
        (
            lambda: check.cluster([node(), node("10.0.0.9", no_answer="no process")]),
            "fail",
            "no answer from 10.0.0.9 (no",
        ),
        (
            lambda: check.versions([node(), node("10.0.0.9", versions=(*VERSIONS[:3], ("torch", "2.12.0"))), node()]),
            "fail",
            "10.0.0.9 has torch 2.12.0, unlike the other nodes",
        ),
        (lambda: check.clocks([node(), node("10.0.0.9", clock_s=-3)]), "warn", "10.0.0.9 is 3 s off"),
        (lambda: check.clocks([node(), node("10.0.0.9", clock_s=900)]), "fail", "10.0.0.9 is 900 s off"),
        (
            lambda: check.shared_memory([node(), node("10.0.0.9", shared_memory=2**26)]),
            "warn",
            "10.0.0.9 has 0.1 GiB for a store of 4.0",
        ),
        (lambda: check.gpus([node("10.0.0.9", {"GPU": 4.0}, gpus=0)], 1), "fail", "10.0.0.9: Ray has 4, torch finds 0"),
        (lambda: check.gpus([node("10.0.0.9", {"GPU": 1.0}, gpus=1)], 2), "fail", "1 for 2 workers"),
        (
            lambda: check.shared_storage([node(), node("10.0.0.9", storage_error="denied")], "s3://cells/run"),
            "fail",
            "s3://cells/run from 10.0.0.9: denied",
        ),
        (lambda: check.token("disabled", 200), "warn", "answers calls without one (RAY_AUTH_MODE=disabled, HTTP 200)"),
        (lambda: check.token(None, None), "warn", "no dashboard to call"),
    ],
)
def test_a_problem_of_the_cluster_is_reported(run_check: Callable[[], Finding], level: str, message: str) -> None:
    finding = run_check()
    assert finding.level == level
    assert message in finding.message
    assert finding.hint


@pytest.mark.parametrize(("offset", "reported"), [(0.0, 0.0), (5.0, 4.5), (-5.0, -4.5), (0.3, 0.0)])
def test_latency_is_subtracted_from_a_clock_offset(offset: float, reported: float) -> None:
    """The call takes 1 s: the clock is read after 0.5 s."""
    now = iter([100.0, 101.0])
    assert probe.clock_offset(lambda: 100.5 + offset, lambda: next(now)) == pytest.approx(reported)


def damaged_copy(dataset: str, folder: Path, damage: str) -> str:
    copy = shutil.copytree(dataset, folder / "copy")
    (shard,) = (copy / "train").glob("*.parquet")
    if damage == "missing":
        shard.unlink()
    elif damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif damage == "another":
        shutil.copy(copy / "val" / "part-00000.parquet", shard)
    return str(copy)


@pytest.mark.parametrize(
    ("damage", "level", "message"),
    [
        ("none", "pass", "18 images, every shard complete"),
        ("missing", "fail", "train/part-00000.parquet is missing"),
        ("truncated", "fail", "train/part-00000.parquet"),
        ("another", "fail", "train/part-00000.parquet has 3 rows, not 12"),
    ],
)
def test_bad_shards_are_reported(tiny_dataset: str, tmp_path: Path, damage: str, level: str, message: str) -> None:
    data = damaged_copy(tiny_dataset, tmp_path, damage)
    finding = check.dataset(data, shards.load_description(data))
    assert (finding.level, message in finding.message) == (level, True), finding


def test_a_shard_of_another_size_is_reported(tiny_dataset: str) -> None:
    description = shards.load_description(tiny_dataset)
    description["splits"]["val"]["shards"][0]["bytes"] = 7
    assert "val/part-00000.parquet has" in check.dataset(tiny_dataset, description).message


def test_a_folder_with_a_run_is_reported(tmp_path: Path) -> None:
    assert check.run_name(str(tmp_path)).level == "pass"
    (tmp_path / "recipe.yaml").write_text("seed: 0\n")
    assert check.run_name(str(tmp_path)).level == "fail"


SUBJECTS = ["dataset", "run name", "Ray", "versions", "clocks", "shared memory", "GPUs", "shared storage", "token"]
SUBJECTS += ["State API", "CPUs for data", "hardware", "object store", "network", "samples", "labels", "batch"]
SUBJECTS += ["trial batch"]
SMALL = recipe.Recipe(batch_size=4, crop=(48, 48), model=recipe.Recipe().model.model_copy(update={"features": (4, 8)}))


def test_all_findings_on_a_real_cluster(
    ray_cluster: None, tiny_dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    words = ["check", "--data", tiny_dataset, "--recipe", "small", "--out", str(out), "--workers", "2"]
    words += ["--crop", "48", "48"]
    assert main.main(words) == 0
    output = capsys.readouterr().out
    assert "fail" not in output
    for number, subject in enumerate(SUBJECTS, 1):
        assert f"{number:>2} pass  {subject}: " in output
    assert not list(tmp_path.iterdir()), "check leaves nothing behind"
    out.mkdir()
    assert main.main(words) == 0
    assert list(tmp_path.iterdir()) == [out], "check keeps a folder that already existed"
    capsys.readouterr()
    bad = ["check", "--data", tiny_dataset, "--recipe", "small", "--out", "/proc/none", "--workers", "40"]
    assert main.main([*bad, "--batch-size", "4"]) == 1
    output = capsys.readouterr().out
    for subject in ("shared storage", "CPUs for data", "batch"):
        assert f"fail  {subject}: " in output
    assert main.main(["check", "--data", str(tmp_path / "none"), "--recipe", "small"]) == 1
    assert "fail  dataset: no dataset at" in capsys.readouterr().out


def test_a_node_that_cannot_read_the_drivers_file_is_reported(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a path that exists only on the disk of the driver's machine."""
    monkeypatch.setattr(probe.storage, "write_bytes", lambda *_: None)
    (node,) = probe.collect(str(tmp_path))
    assert "No such file" in node.storage_error


def test_a_batch_too_large_for_a_worker_is_reported(ray_cluster: None, tiny_dataset: str) -> None:
    large = SMALL.model_copy(update={"batch_size": 10**7, "crop": (512, 512)})
    request = check.CheckRequest(tiny_dataset, None, large, 1)
    finding = check.trial_batch(request)
    assert finding.level == "fail"
    assert "lower batch_size" in finding.hint
    assert check.trial_batch(request._replace(recipe=SMALL)).level == "pass"


def test_data_larger_than_the_object_store_is_reported(
    ray_cluster: None, tiny_dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    request, description = check.CheckRequest(tiny_dataset, None, SMALL, 1), shards.load_description(tiny_dataset)
    assert check.object_store(description, request).level == "pass"
    description["splits"]["train"]["images"] = 10**9
    assert check.object_store(description, request).level == "warn"
