"""Training on Ray: one and two workers agree, a killed run resumes with equal results, user errors are reported."""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from conftest import job_env, kill_at, run_python, write_tiny_dataset
from hosts import wait_until
from ray.train import UserCallback

from raylivecell.core.errors import UserError
from raylivecell.data import shards
from raylivecell.inference.evaluate import evaluate
from raylivecell.ingest import blocks, dataset
from raylivecell.network import forward
from raylivecell.recipe import LoopConfig, ModelConfig, OptimizerConfig, PhaseConfig, Recipe
from raylivecell.runs import checkpoint, folder, parents, progress
from raylivecell.runtime import session
from raylivecell.training import gloo, loop, preflight, ray_train
from raylivecell.training.job import TrainJob
from raylivecell.training.ranks import RankContext
from raylivecell.training.train import train
from raylivecell.training.validation import Validation

RECIPE = Recipe(
    batch_size=4,
    crop=(32, 40),
    phases=(PhaseConfig(steps=10), PhaseConfig(steps=10, augmented_copies=1)),
    model=ModelConfig(features=(4, 8), norm="group"),
    optimizer=OptimizerConfig(lr=1e-2, ema_decay=0.9),
    loop=LoopConfig(report_steps=1, precision="float32"),
)


def history(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, torch.Tensor]:
    last = max(path for path in run.glob("checkpoint_*") if path.is_dir())
    values, state = checkpoint.load_training(str(last))
    assert state.step == 20
    return {**values["model"], **{f"average {name}": value for name, value in values["average"].items()}}


@pytest.fixture(scope="module")
def one_worker(tiny_dataset: str, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "one"
    train(tiny_dataset, str(run), RECIPE, workers=1)
    return run


def plain_loop(data: str, recipe: Recipe) -> loop.TrainState:
    """Train the recipe with only the loop, in this process, on samples read by the functions of Ray Data's tasks."""
    rows, val = (tuple(shards.list_rows(data, split)) for split in ("train", "val"))
    cells = recipe.targets != "foreground"
    job = TrainJob(recipe, "", dataset.Samples(rows, val, (48, 48), cells=cells), stream_memory=0)
    schedule, cpu = job.schedule(), torch.device("cpu")
    source = blocks.Source(rows, schedule, recipe.augment, recipe.crop, (48, 48), targets=recipe.targets)
    batches = ({"planes": torch.from_numpy(blocks.load(schedule.rows(step), source))} for step in range(schedule.steps))
    scores = Validation(job.samples, RankContext(0, 1, cpu, 1), recipe.targets).scores
    torch.manual_seed(recipe.seed)
    training = loop.start(forward.build(recipe, cpu), recipe.optimizer, schedule.steps)
    config = recipe.loop, recipe.loss, recipe.targets
    for _ in loop.run(training, training.model, batches, schedule, *config, validate=scores):
        pass
    return training


def check_folder(run: Path) -> None:
    """Check the files of a finished run."""
    rows = history(run)
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert (run / "report.html").stat().st_size > 10_000
    assert list((run / "tensorboard").iterdir())
    assert (run / "recipe.yaml").exists()
    checkpoints = [path for path in run.glob("checkpoint_*") if path.is_dir()]
    assert 1 <= len(checkpoints) <= 3, "the best, the last, and one whose report was interrupted by the kill"
    _, state = checkpoint.load_training(progress.find(str(run)))
    assert state.score() == max(row["val_msa"] for row in rows)


def test_two_workers_with_one_killed_equal_the_plain_loop(tiny_dataset: str, ray_cluster: None, tmp_path: Path) -> None:
    """An instance recipe with averaged weights: equal history and weights, no step repeated or skipped."""
    # Adam divides by the gradient's size, so rounding decides over the few weights whose gradients are as small:
    # reversing the images of each batch, in one process without Ray, changes one by up to 3e-4, and most by less than
    # 1e-7. In float64 all agree to 4e-16. A skipped step changes all weights by about the learning rate.
    slow = OptimizerConfig(lr=2e-3, ema_decay=0.9)
    recipe, run = RECIPE.model_copy(update={"targets": "distance", "optimizer": slow}), tmp_path / "two \u00fc"
    thread, killed = kill_at(run, 4, "RayTrainWorker", max_killed=1)
    train(tiny_dataset, str(run), recipe, workers=2)
    thread.join()
    assert killed
    assert checkpoint.load_scale(progress.find(str(run))) == shards.scale(tiny_dataset)
    expected_run = plain_loop(tiny_dataset, recipe)
    for row, expected_row in zip(history(run), expected_run.state.history, strict=True):
        for name in ("loss", "bce", "dice_loss", "aux_loss"):
            assert row[name] == pytest.approx(expected_row[name], abs=1e-5), (row["step"], name)
        for name in ("val_dice", "val_iou", "val_mean_image_dice", "val_msa"):  # single pixels at the threshold
            assert row[name] == pytest.approx(expected_row[name], abs=0.05 if name == "val_msa" else 2e-3), name
    assert expected_run.state.history[-1]["loss"] < expected_run.state.history[0]["loss"]
    assert expected_run.average is not None
    expected = {f"average {name}": value for name, value in expected_run.average.state_dict().items()}
    expected |= expected_run.model.state_dict()
    difference = torch.cat([(value - expected[name]).abs().flatten() for name, value in weights(run).items()])
    assert difference.quantile(0.98) < 1e-5
    assert difference.max() < slow.lr
    check_folder(run)


@pytest.mark.slow
def test_evaluate_reproduces_the_scores_that_two_workers_with_batchnorm_reported(
    tiny_dataset: str, ray_cluster: None, tmp_path: Path
) -> None:
    """Each rank's BatchNorm statistics differ: all ranks must validate the network that is saved."""
    run = tmp_path / "batchnorm"
    fields = {"model": ModelConfig(features=(4, 8)), "phases": (PhaseConfig(steps=6),), "loop": LoopConfig()}
    fields["targets"] = "distance"
    last = train(tiny_dataset, str(run), RECIPE.model_copy(update=fields), workers=2)
    scores = evaluate(str(run), tiny_dataset, "val", str(run / "scores"))
    for name in ("dice", "iou", "mean_image_dice", "msa"):
        assert scores[name] == pytest.approx(last[f"val_{name}"], abs=1e-6)


DRIVER = """
import sys
from raylivecell import recipe
from raylivecell.training import train
train.train(sys.argv[1], sys.argv[2], recipe.load(sys.argv[3]), workers=1)
"""


@pytest.mark.slow
def test_a_killed_run_resumed_ends_with_the_same_weights(tiny_dataset: str, one_worker: Path, tmp_path: Path) -> None:
    run = tmp_path / "killed"
    command = [sys.executable, "-c", DRIVER, tiny_dataset, str(run), str(one_worker / "recipe.yaml")]
    driver = subprocess.Popen(command, env=os.environ | job_env())
    wait_until("reports", lambda: driver.poll() is not None or len(history(run)) >= 7, 300, pause=0.01)
    assert driver.poll() is None, "the run ended before it was killed"
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    # A kill while Ray writes its snapshot can truncate it (observed once).
    (run / folder.SNAPSHOT).write_text((run / folder.SNAPSHOT).read_text()[:20])
    with pytest.raises(UserError, match="already contains a run"):
        train(tiny_dataset, str(run), RECIPE)
    with pytest.raises(UserError, match=r"another recipe \(batch_size\)"):
        train(tiny_dataset, str(run), RECIPE.model_copy(update={"batch_size": 2}), resume=True)
    with pytest.raises(UserError, match=f"started on another dataset, {tiny_dataset}"):
        train(write_tiny_dataset(tmp_path / "other", 11), str(run), RECIPE, resume=True)
    train(tiny_dataset, str(run), RECIPE, resume=True)
    assert len(history(run)) == 20
    for name, value in weights(one_worker).items():
        assert torch.equal(value, weights(run)[name]), name


@pytest.mark.slow
def test_a_fine_tuned_run_restarts_without_its_parent(tiny_dataset: str, one_worker: Path, tmp_path: Path) -> None:
    """Other targets than the parent's. Killed before its first checkpoint: it starts from its copy of the weights."""
    parent, run = tmp_path / "parent", tmp_path / "run"
    shutil.copytree(one_worker, parent)
    fields = {"targets": "distance", "phases": (PhaseConfig(steps=3),), "seed": 5}
    recipe = RECIPE.model_copy(update=fields)
    train(tiny_dataset, str(run), recipe, start_from=str(parent))
    (origin,) = parents.read(progress.find(str(run)))
    assert (origin.start_from, origin.new_layers, origin.data.name) == (str(parent), ("head",), "squares")
    assert origin.checkpoint in (run / "report.html").read_text()
    before = checkpoint.load_model(str(run))[0].state_dict()
    name = "contracting.0.0.weight"
    moved = (before[name] - checkpoint.load_model(str(parent))[0].state_dict()[name]).abs().max()
    assert 0 < moved < 0.05, "three steps of Adam change a weight by at most 0.03"
    shutil.rmtree(parent)
    for path in run.glob("checkpoint_*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=f"started from {parent}, not from elsewhere"):
        train(tiny_dataset, str(run), recipe, resume=True, start_from="elsewhere")
    train(tiny_dataset, str(run), recipe, resume=True, start_from=str(parent))
    after = checkpoint.load_model(str(run))[0].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert parents.read(progress.find(str(run))) == (origin,)


def test_a_non_finite_loss_names_the_images_of_its_batch(tiny_dataset: str, ray_cluster: None, tmp_path: Path) -> None:
    recipe = RECIPE.model_copy(update={"optimizer": OptimizerConfig(lr=1e30)})
    with pytest.raises(UserError, match=r"NaN or infinite at step \d+, in the batch of A172_Phase_train_\d+.tif"):
        train(tiny_dataset, str(tmp_path / "bad"), recipe)


def test_a_shard_truncated_during_training_is_named(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Truncated after the dataset is opened and before its images are read; the samples are not cached."""
    data, fit = write_tiny_dataset(tmp_path / "data"), ray_train.fit
    (shard,) = (tmp_path / "data" / "train").glob("*.parquet")

    def truncate_then_fit(run: Any) -> Any:
        shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
        return fit(run)

    monkeypatch.setattr(dataset, "CACHE_SHARE", 0)
    monkeypatch.setattr(ray_train, "fit", truncate_then_fit)
    with pytest.raises(
        UserError, match=rf"cannot read shard {re.escape(str(shard))}: .*run `raylivecell prepare` again"
    ):
        train(data, str(tmp_path / "run"), RECIPE, workers=1, retries=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": "nowhere"}, "no dataset at"),
        ({"workers": 3}, "a batch of 4 cannot be divided equally among 3 workers"),
        ({"workers": 8, "recipe": RECIPE.model_copy(update={"batch_size": 8})}, "would leave no CPU for Ray Data"),
        ({"resume": True}, "no run to resume"),
    ],
)
def test_user_errors_are_reported_before_anything_is_written(
    tiny_dataset: str, ray_cluster: None, tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train(**{"data": tiny_dataset, "out": str(tmp_path / "run"), "recipe": RECIPE, **arguments})
    assert not (tmp_path / "run").exists()


def test_workers_leave_a_cpu_for_ray_data(ray_cluster: None) -> None:
    total = ray.cluster_resources()["CPU"]
    for workers in range(1, 2 * int(total - 1) + 1):
        assert preflight.worker_cpus(workers) * workers <= total - 1


def process_info_callback(file: Path) -> UserCallback:
    """A callback that writes the controller's process id, and whether that process has loaded torch."""

    class ProcessInfo(UserCallback):  # sent by value: workers cannot import this file
        def after_report(self, run_context: Any, metrics: Any, checkpoint: Any) -> None:
            file.write_text(json.dumps([os.getpid(), "torch" in sys.modules]))

    return ProcessInfo()


@pytest.mark.slow
def test_ray_train_controller_loads_no_torch(tiny_dataset: str, ray_cluster: None, tmp_path: Path) -> None:
    """Importing torch would delay the workers by 1.7 s. Run within an event loop, as in a notebook."""
    recipe = RECIPE.model_copy(update={"phases": (PhaseConfig(steps=1),)})
    job = TrainJob(recipe, str(tmp_path / "run"), dataset.open_samples(tiny_dataset), stream_memory=2**27)
    handler = signal.getsignal(signal.SIGINT)

    async def notebook() -> None:
        ray_train.fit(ray_train.trainer(job, 1, 0.5, 0, 0, [process_info_callback(tmp_path / "info.json")]))

    asyncio.run(notebook())
    pid, loaded = json.loads((tmp_path / "info.json").read_text())
    assert pid != os.getpid()
    assert not loaded
    assert signal.getsignal(signal.SIGINT) is handler, "the caller's Ctrl-C handler is restored after a run"


def test_the_driver_does_not_import_torch_before_its_report() -> None:
    """The import would add 1.1 s to every start."""
    modules = "training.train", "training.ray_train", "training.job", "ingest.dataset", "recipe"
    imports = ", ".join(f"raylivecell.{module}" for module in modules)
    process = run_python(f"import sys, {imports}; sys.exit('torch' in sys.modules)")
    assert process.returncode == 0, process.stderr


def test_started_here_is_true_only_in_the_process_that_started_ray(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not session.started_here(), "the tests started Ray, not `connect`"
    monkeypatch.setattr(session, "_started_here", True)
    assert session.started_here()
    assert not ray.get(ray.remote(session.started_here).remote()), "a worker process did not start Ray"


def test_gloo_uses_the_network_interface_of_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gloo.interface("127.0.0.1") == "lo" or os.name != "posix"
    assert gloo.interface("203.0.113.7") is None, "an address reserved for documentation (RFC 5737)"
    monkeypatch.setattr(gloo.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    for before, after in (("", gloo.interface("127.0.0.1")), ("ib0", "ib0")):
        monkeypatch.setenv(gloo.VARIABLE, before)
        if not before:
            monkeypatch.delenv(gloo.VARIABLE)
        gloo.set_interface()
        assert os.environ[gloo.VARIABLE] == after


def test_images_of_several_sizes_need_a_crop(tiny_dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    preflight.samples_fit(tiny_dataset, Recipe(crop=None))
    monkeypatch.setattr(preflight.shards, "image_sizes", lambda data, split: {(48, 48), (48, 64)})
    preflight.samples_fit(tiny_dataset, Recipe(crop=(32, 32)))
    with pytest.raises(UserError, match="images of 2 sizes"):
        preflight.samples_fit(tiny_dataset, Recipe(crop=None))
