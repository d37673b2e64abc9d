"""Every target kind has one module and is in the registry."""

import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np

from raylivecell import targets
from raylivecell.recipe import Recipe
from raylivecell.targets.registry import NAMES, target

SHARED = {"__init__", "base", "dice", "masked", "registry", "sample_planes"}


def test_the_registry_lists_every_module_of_a_kind() -> None:
    modules = {path.stem for path in Path(*targets.__path__).glob("*.py")}
    assert modules - SHARED == {*NAMES}
    assert get_args(Recipe.model_fields["targets"].annotation) == NAMES


def test_every_kind_predicts_the_foreground_first() -> None:
    maps = np.full((3, 5, 7), 0.75, np.float32)
    for name in NAMES:
        kind = target(name)
        assert kind.channels[0] == "foreground"
        assert Recipe(targets=name).outputs == len(kind.channels)
        height = kind.height(maps[: len(kind.channels)], np.ones((5, 7), bool))
        assert (height.dtype, height.shape) == (np.float32, (5, 7))


def test_reading_a_recipe_and_drawing_maps_import_no_torch() -> None:
    code = (
        "import sys\n"
        "from raylivecell import recipe\n"
        "assert 'cv2' not in sys.modules\n"
        "from raylivecell.targets.registry import NAMES, target\n"
        "[target(name) for name in NAMES]\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
