"""Imports and calls do not change a notebook's process: environment, warnings, logging, threads, Ray Data."""

import copy
import json
import logging
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
from conftest import run_python

import raylivecell
from raylivecell.core import process_settings


def test_settings_are_restored_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEPT", "mine")
    monkeypatch.delenv("ADDED", raising=False)
    before = dict(os.environ), logging.getLogger("one").level

    def fail() -> None:
        with process_settings.environment(KEPT="ours", ADDED="ours"), process_settings.log_levels({"one": 50}):
            assert (os.environ["KEPT"], os.environ["ADDED"]) == ("mine", "ours")
            assert logging.getLogger("one").level == logging.CRITICAL
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (dict(os.environ), logging.getLogger("one").level) == before


IMPORTS = """
import contextlib, importlib, json, logging, os, pathlib, signal, sys, warnings

def state():
    import cv2, torch
    return {
        "environment": dict(os.environ),
        "filters": warnings.filters[:],
        "levels": [logging.root.level, *(logging.getLogger(name).level for name in loggers)],
        "handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "threads": (cv2.getNumThreads(), torch.get_num_threads()),
    }

for name in json.loads(pathlib.Path(sys.argv[2]).read_text()) if len(sys.argv) > 2 else ():
    with contextlib.suppress(Exception):  # a submodule that only its parent can load
        importlib.import_module(name)
loggers = list(logging.root.manager.loggerDict)
before = state()
package = pathlib.Path(sys.argv[1])
for path in sorted(package.rglob("*.py")):
    if path.stem != "__main__":
        importlib.import_module(".".join(path.relative_to(package.parent).with_suffix("").parts))
if len(sys.argv) == 2:
    print(json.dumps([name for name in sys.modules if name.partition(".")[0] not in ("raylivecell", "__main__")]))
else:
    after = state()
    for name, value in before.items():
        new = set(after[name].items()) - set(value.items()) if name == "environment" else after[name]
        assert after[name] == value, (name, new)
"""


def test_importing_every_module_changes_nothing(tmp_path: Path) -> None:
    """Third-party libraries may change it: a first process lists them, and they are imported first."""
    package, libraries = str(Path(raylivecell.__file__).parent), tmp_path / "libraries.json"
    libraries.write_text(run_python(IMPORTS, package).stdout.splitlines()[-1])
    done = run_python(IMPORTS, package, str(libraries))
    assert done.returncode == 0, done.stderr[-3000:]


def snapshot() -> dict[str, Any]:
    import cv2
    import sympy  # noqa: F401  # imported lazily by torch; it adds a warnings filter
    import torch
    from ray.data import DataContext

    names = ("", "ray", "ray.data", "ray.train", "ray.tune", "optuna", "torch")
    # torch sets such variables when its compiler is first loaded.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCHINDUCTOR_")}
    return {
        "environment": environment,
        "filters": list(warnings.filters),
        "levels": {name: logging.getLogger(name).level for name in names},
        "context": copy.deepcopy(vars(DataContext.get_current())),
        "same context": id(DataContext.get_current()),
        "threads": (cv2.getNumThreads(), torch.get_num_threads()),
        "SIGINT": signal.getsignal(signal.SIGINT),
    }


def test_calls_from_a_notebook_change_nothing(tiny_dataset: str, ray_cluster: None, tmp_path: Path) -> None:
    from raylivecell.data import prepare
    from raylivecell.inference import predict
    from raylivecell.recipe import ModelConfig, PhaseConfig, Recipe
    from raylivecell.synthetic import writer
    from raylivecell.training.train import train

    recipe = Recipe(batch_size=2, crop=(32, 32), phases=(PhaseConfig(steps=2),), model=ModelConfig(features=(4, 8)))
    before = snapshot()
    writer.write_dataset(tmp_path / "drawn", 4, 0)
    prepare.prepare(str(tmp_path / "drawn"), str(tmp_path / "prepared"))
    train(tiny_dataset, str(tmp_path / "run"), recipe)
    model = raylivecell.load(str(tmp_path / "run"))
    image = next((tmp_path / "drawn" / "images").rglob("*.tif"))
    predict.predict(str(tmp_path / "run"), str(image), str(tmp_path / "cells"), ("labels",))
    assert model is not None
    after = snapshot()
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert after[name] == value, name
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 2
