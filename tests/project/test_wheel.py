"""The wheel without a checkout: it contains the recipes, and the demo runs from any folder."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = "import raylivecell, sys; print(raylivecell.__file__); from raylivecell.cli.main import main; sys.exit(main())"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder that contains only the unpacked wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "raylivecell", source / "raylivecell", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([*command, "--wheel-dir", str(folder), str(source)], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(installed: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the wheel's `raylivecell WORDS` in `folder`, with the dependencies of this environment."""
    environment = os.environ | {"PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, "-c", CODE, *words], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_the_wheel_is_the_package_with_its_recipes_and_templates(installed: Path, tmp_path: Path) -> None:
    def files(folder: Path) -> set[Path]:
        return {path.relative_to(folder) for suffix in ("*.py", "*.yaml", "*.j2") for path in folder.rglob(suffix)}

    assert files(installed / "raylivecell") == files(ROOT / "raylivecell")
    done = run(installed, tmp_path, "recipes", "demo")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(installed)), "this checkout was imported, not the wheel"
    assert "Dice" in done.stdout


@pytest.mark.slow
@pytest.mark.ray
def test_the_demo_of_the_wheel_runs_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    """With a twentieth of the steps of the demo's recipe, to save minutes."""
    listed = run(installed, tmp_path, "recipes", "demo")
    recipe = listed.stdout.split("\n", 1)[1]  # the first line is the package's path
    short = re.sub(r"steps: (\d+)", lambda match: f"steps: {int(match[1]) // 20}", recipe)
    assert "warmup_steps: 1\n" in short, "the recipe is the demo's"
    (tmp_path / "short.yaml").write_text(short)
    done = run(installed, tmp_path, "demo", "--images", "8", "--recipe", "./short.yaml")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.startswith(str(installed)), "this checkout was imported, not the wheel"
    scores = json.loads((tmp_path / "demo" / "scores" / "metrics.json").read_text())
    assert scores["images"] > 0
    assert (tmp_path / "demo" / "run" / "report.html").is_file()
    assert (tmp_path / "demo" / "found" / "cells.csv").is_file()
