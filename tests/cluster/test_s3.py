"""All stages as jobs on a cluster, with data, run, scores and masks at s3:// URIs and nothing on a local disk."""

import csv
import json
import subprocess
from pathlib import Path

import cv2
import numpy as np
import optuna
import pytest
from conftest import S3, job_env, run_python

JOB = """
from raylivecell.cli import main as cli
at = "s3://cells/"
fields = "--batch-size 4 --crop 32 40 --model.features 4 8 --loop.report-steps 4".split()
train = ["train", "--data", at + "data", "--out", at + "runs/one", *fields, "--recipe", RECIPE]
assert cli.main(train) == 0
assert cli.main(train) == 2, "a folder in use is refused"
assert cli.main([*train, "--resume", "always"]) == 0
assert cli.main(["evaluate", "--checkpoint", at + "runs/one", "--data", at + "data", "--out", at + "scores"]) == 0
predict = ["predict", "--checkpoint", at + "runs/one", "--images", at + "images", "--out", at + "cells"]
assert cli.main(predict) == 0
from raylivecell.core import storage
storage.write_bytes(at + "images/z.png", b"no image")
assert cli.main(predict) == 0
"""
SWEEP = """
from raylivecell.cli import main as cli
at = "s3://cells/"
sweep = ["sweep", "--data", at + "data", "--out", at + "runs/sweep", "--recipe", RECIPE, "--retries", "0"]
assert cli.main([*sweep, "--trials", "2"]) == 0
assert cli.main([*sweep, "--trials", "3", "--resume", "always"]) == 0
"""
RECIPE = "phases: [{steps: 8}]\n"
KINDS = {"labels": ".tif", "masks": ".png", "overlays": ".png"}
SMALL = "batch_size: 4\ncrop: [32, 40]\nmodel: {features: [4, 8]}\nloop: {report_steps: 2}\n"


def run_job(code: str, recipe: Path, s3: S3) -> subprocess.CompletedProcess[str]:
    """Run `code` as a job on the session's cluster."""
    done = run_python(code.replace("RECIPE", repr(str(recipe))), env=s3.env | job_env(s3.env))
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
@pytest.mark.ray
def test_train_evaluate_and_predict(tiny_dataset: str, ray_cluster: None, s3: S3, tmp_path_factory) -> None:
    images = tmp_path_factory.mktemp("images")
    for name in ("a.png", "deep/b.png"):
        (images / name).parent.mkdir(exist_ok=True)
        cv2.imwrite(str(images / name), np.random.default_rng(0).integers(90, 200, (40, 56), np.uint8))
    (images / "recipe.yaml").write_text(RECIPE)
    s3.upload(tiny_dataset, "data")
    s3.upload(str(images), "images")
    done = run_job(JOB, images / "recipe.yaml", s3)
    assert "already contains a run" in done.stderr
    runs = s3.names("runs/one/")
    for name in ("recipe.yaml", "metrics.jsonl", "report.html", "model.safetensors", "training.pt"):
        assert any(key.endswith("/" + name) for key in runs), (name, runs)
    assert [json.loads(line)["step"] for line in s3.read("runs/one/metrics.jsonl").splitlines()] == [4, 8]
    scores = json.loads(s3.read("scores/metrics.json"))
    assert scores["images"] == 3
    pictures = [f"{kind}/{name}" for kind, end in KINDS.items() for name in (f"a{end}", f"deep/b{end}")]
    tables = ["cells.csv", "coco.json", "images.csv", "predict.json", "recipe.yaml"]
    assert s3.names("cells/") == sorted(f"cells/{name}" for name in [*pictures, *tables])
    rows = list(csv.DictReader(s3.read("cells/images.csv").decode().splitlines()))
    assert [row["file"] for row in rows] == ["a.png", "deep/b.png", "z.png"]
    assert not any(row["error"] for row in rows[:2])
    assert rows[2]["error"]


@pytest.mark.slow
@pytest.mark.ray
def test_sweep(tiny_dataset: str, ray_cluster: None, s3: S3, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE + SMALL)
    s3.upload(tiny_dataset, "data")
    run_job(SWEEP, tmp_path / "recipe.yaml", s3)
    names = s3.names("runs/sweep/")
    for name in ("study.db", "best.yaml", "trials.csv", "report.html", "checkpoint_best/model.safetensors"):
        assert f"runs/sweep/{name}" in names
    assert len([name for name in names if "/trials/" in name and name.endswith("model.safetensors")]) == 3
    assert s3.read("runs/sweep/trials.csv").decode().count("\n") == 4
    (tmp_path / "study.db").write_bytes(s3.read("runs/sweep/study.db"))
    study = optuna.load_study(study_name="s3://cells/runs/sweep", storage=f"sqlite:///{tmp_path}/study.db")
    assert [trial.state.is_finished() for trial in study.trials] == [True] * 3
