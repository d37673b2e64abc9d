"""Commands, flags, recipes and files in the README exist, and its instructions work."""

import os
import re
from pathlib import Path

import cv2
import numpy as np
import pytest

from raylivecell.cli import main

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text()
COMMAND = re.compile(r"^raylivecell (\w+) (.*)$", flags=re.M)
LINES = COMMAND.findall(TEXT)
(NOTEBOOK,) = re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.M | re.S)
# Flags that reduce a command from minutes to seconds, appended to its line.
STEPS = "--crop 64 64 --batch-size 2 --model.features 4 8 --optimizer.warmup-steps 0 --phases.0.steps 2"
SMALLER = {
    "train": f"{STEPS} --loop.report-steps 2",
    "sweep": f"{STEPS} --loop.report-steps 1 --trials 2 --final-seeds 1",
}


@pytest.mark.parametrize(("command", "arguments"), LINES, ids=[command for command, _ in LINES])
def test_commands_and_their_flags_exist(command: str, arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    stages = arguments.split()[:1] if command == "submit" else []
    for name in [command, *stages]:
        with pytest.raises(SystemExit) as done:
            main.main([name, "--help"])
        assert done.value.code == 0
    documented = capsys.readouterr().out
    for flag in re.findall(r"--[\w.-]+", arguments):
        assert flag in documented


def test_files_mentioned_exist() -> None:
    for name in re.findall(r"jobs/\w+\.yaml", TEXT):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", TEXT):
        assert (ROOT / name).is_file(), name


def test_the_tree_lists_every_module() -> None:
    tree = TEXT.split("## The files")[1].split("## Development")[0]
    patterns = re.findall(r"[\w*]+\.py", tree)
    for path in (ROOT / "raylivecell").glob("*.py"):
        assert path.name in ("__init__.py", "__main__.py") or any(path.match(p) for p in patterns), path.name


@pytest.mark.slow
def test_the_instructions_work(ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On this machine, in the README's order; test_submit.py and test_check.py cover the cluster."""
    monkeypatch.chdir(tmp_path)
    os.symlink(ROOT / "jobs", "jobs")
    for command, arguments in COMMAND.findall(TEXT.split("## On a cluster")[0]):
        words = re.sub(r"--(trials|final-seeds) \d+", "", arguments).split()
        if command == "download":  # 3.4 GB; test_download.py has a server of its own
            command, words = "synth", [*words, "--images", "8"]
        assert main.main([command, *words, *SMALLER.get(command, "").split()]) == 0, command
    cv2.imwrite("well_A1.tif", np.random.default_rng(0).integers(100, 156, (90, 120), np.uint8))
    names = {"truth": np.zeros((90, 120), np.int32)}
    exec(NOTEBOOK, names)
    assert names["cells"].labels.shape == (90, 120)  # type: ignore[attr-defined]
    for file in ("runs/first/report.html", "runs/cells-scores/report.html", "runs/first-cells/cells.csv"):
        assert Path(file).is_file(), file
    assert {"report.html", "best.yaml"} <= set(os.listdir("runs/sweep"))
