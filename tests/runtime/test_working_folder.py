"""A command run in a folder of downloaded files executes none of them; SIGTERM leaves no process behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest
from conftest import write_tiny_dataset
from hosts import wait_until

from raylivecell.runtime import session

ROOT = Path(__file__).parents[2]
MODULES = ("statistics", "random", "numpy", "pickle", "yaml", "ray", "torch", "typing", "json", "logging", "psutil")
RECIPE = """
phases: [{steps: STEPS}]
crop: [32, 32]
model: {features: [4]}
loop: {precision: float32, report_steps: 2}
"""


def command(*words: str, folder: Path) -> subprocess.Popen[str]:
    """Start the installed script `raylivecell WORDS` in `folder`."""
    script = Path(sys.executable).with_name("raylivecell")
    env = os.environ | {"HOME": "/proc/no-home", "TMPDIR": str(folder / ("long" * 20)), "PYTHONPATH": str(ROOT)}
    Path(env["TMPDIR"]).mkdir(exist_ok=True)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([script, *words], cwd=folder, env=env, start_new_session=True, **pipes)


def run(*words: str, folder: Path) -> str:
    """Run the command and return its output; raise AssertionError if it fails."""
    process = command(*words, folder=folder)
    text = process.communicate(timeout=400)[0]
    assert process.returncode == 0, text
    return text


def test_ray_starts_in_an_empty_private_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    search_path = os.pathsep.join(["", ".", "modules", "/elsewhere", str(tmp_path)])
    monkeypatch.setenv("PYTHONPATH", search_path)
    with session._away_from_working_folder():
        assert Path.cwd() != tmp_path
        assert list(Path.cwd().iterdir()) == []
        assert os.environ["PYTHONPATH"] == f"{tmp_path}/modules{os.pathsep}/elsewhere"
    assert Path.cwd() == tmp_path
    assert os.environ["PYTHONPATH"] == search_path
    monkeypatch.chdir(ROOT)  # a checkout contains this package
    with session._away_from_working_folder():
        assert Path.cwd() == ROOT


@pytest.mark.ray
@pytest.mark.slow
def test_downloaded_modules_are_not_executed(tmp_path: Path) -> None:
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    data = write_tiny_dataset(tmp_path / "data")
    (tmp_path / "quick.yaml").write_text(RECIPE.replace("STEPS", "2"))
    (tmp_path / "long.yaml").write_text(RECIPE.replace("STEPS", "1000000"))
    cv2.imwrite(str(downloads / "cells.png"), np.full((64, 64), 120, np.uint8))
    marks = tmp_path / "marks"
    marks.mkdir()
    for name in MODULES:
        code = f"open({str(marks / name)!r}, 'w').close()\nraise SystemExit('executed')\n"
        (downloads / f"{name}.py").write_text(code)
    run("train", "--data", data, "--out", "../run", "--recipe", "../quick.yaml", folder=downloads)
    text = run("predict", "--checkpoint", "../run", "--images", ".", "--out", "../found", folder=downloads)
    assert "core_worker.cc" not in text
    assert "1 of 1 images segmented" in text
    training = command("train", "--data", data, "--out", "../more", "--recipe", "../long.yaml", folder=downloads)
    wait_until("training", lambda: (tmp_path / "more" / "metrics.jsonl").exists(), 200)
    started = psutil.Process(training.pid).children(recursive=True)
    training.send_signal(signal.SIGTERM)
    text = training.communicate(timeout=60)[0]
    assert training.returncode == 143, text
    assert text.splitlines()[-1] == "raylivecell: terminated; resume with --resume always"
    assert "Traceback" not in text
    assert psutil.wait_procs(started, timeout=30)[1] == []
    assert sorted(marks.iterdir()) == []
