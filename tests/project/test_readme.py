"""Documents: the commands, flags, recipes, packages and files they mention exist; the README's instructions work."""

import os
import re
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from raylivecell import recipe
from raylivecell.cli import main

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted(ROOT.glob("docs/*.md"))]
DOCUMENTS += sorted(ROOT.glob("cluster/*/*.md"))
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


@pytest.mark.parametrize("document", DOCUMENTS, ids=[str(path.relative_to(ROOT)) for path in DOCUMENTS])
def test_links_and_recipes_of_documents_exist(document: Path) -> None:
    text = document.read_text()
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert "://" in link or (document.parent / link).exists(), link
    for name in re.findall(r"--recipe ([a-z-]+)\b(?![./])", text):
        assert name in recipe.shipped(), name


def test_the_readme_lists_every_package_in_the_order_of_imports() -> None:
    tree = TEXT.split("## Packages")[1].split("jobs/")[0]
    listed = re.findall(r"^  (\w+)(?:/|\.py) ", tree, flags=re.M)
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    assert listed == config["contracts"][0]["layers"][::-1]


def test_the_results_table_is_short() -> None:
    rows = [line for line in TEXT.split("## Results")[1].split("## Packages")[0].splitlines() if line.startswith("|")]
    assert len(rows) <= 20 + 4, (
        "two tables, each with a heading and a line; further figures belong in docs/benchmarks.md"
    )


def write_own_cells() -> None:
    """Write ten wells with label images as `my-cells`, and two of their images as `new-images`."""
    rng = np.random.default_rng(0)
    for folder in ("my-cells/images", "my-cells/masks", "new-images"):
        Path(folder).mkdir(parents=True)
    for well in range(10):
        labels = np.zeros((160, 170), np.uint8)
        for cell in range(9):
            centre = 30 + cell % 3 * 52 + int(rng.integers(-8, 8)), 28 + cell // 3 * 50 + int(rng.integers(-8, 8))
            cv2.circle(labels, centre, int(rng.integers(10, 15)), cell + 1, -1)
        image = (110 + 60 * (labels > 0) + rng.integers(0, 20, labels.shape)).astype(np.uint8)
        cv2.imwrite(f"my-cells/images/A{well}_t01.tif", image)
        cv2.imwrite(f"my-cells/masks/A{well}_t01.png", labels)
        if well < 2:
            cv2.imwrite(f"new-images/A{well}_t02.tif", image)


@pytest.mark.slow
def test_the_instructions_work(ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run on this machine in the README's order; test_submit.py and test_check.py cover the cluster."""
    monkeypatch.chdir(tmp_path)
    write_own_cells()
    for command, arguments in COMMAND.findall(TEXT.split("## On a cluster")[0]):
        words = re.sub(r"--(trials|final-seeds) \d+", "", arguments).split()
        if command == "download":  # 3.4 GB; tests/download uses a local server
            command, words = "synth", [*words, "--images", "8"]
        assert main.main([command, *words, *SMALLER.get(command, "").split()]) == 0, command
    cv2.imwrite("well_A1.tif", np.random.default_rng(0).integers(100, 156, (90, 120), np.uint8))
    names = {"truth": np.zeros((90, 120), np.int32)}
    exec(NOTEBOOK, names)
    assert names["cells"].labels.shape == (90, 120)  # type: ignore[attr-defined]
    for file in (
        "runs/first/report.html",
        "runs/cells-scores/report.html",
        "runs/first-cells/cells.csv",
        "new-cells/rois/A1_t02.zip",
    ):
        assert Path(file).is_file(), file
    assert {"report.html", "best.yaml"} <= set(os.listdir("runs/sweep"))
