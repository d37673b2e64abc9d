"""`bench startup`: seconds from a command to its first optimiser step, by part, beside a plain PyTorch script's.

Each is a process of its own, as a user starts it; the set is a made one of small frames. In turn.
"""

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from raylivecell import recipe
from raylivecell.bench import prepare
from raylivecell.bench.spread import spread
from raylivecell.recipe import LoopConfig, ModelConfig, PhaseConfig, Recipe

IMAGES = 32
OURS, PLAIN = "raylivecell train", "plain PyTorch script"
RECIPE = Recipe(
    crop=(256, 256),
    phases=(PhaseConfig(steps=3, originals=False, augmented_copies=1),),
    model=ModelConfig(features=(8, 16, 32, 64)),
    loop=LoopConfig(report_steps=3),
)
TOLD = re.compile(r"first step after ([\d.]+) s: (.*)")
# What one writes by hand: the same network, frames decoded with OpenCV, a DataLoader of two processes, one step.
SCRIPT = """
import sys, glob, cv2, numpy as np, torch
from torch.utils.data import DataLoader, Dataset
from raylivecell.network.unet import build_model
from raylivecell.recipe import ModelConfig
class Frames(Dataset):
    files = sorted(glob.glob(sys.argv[1] + "/images/*.tif"))
    def __len__(self): return len(self.files)
    def __getitem__(self, i):
        image = cv2.imread(self.files[i], cv2.IMREAD_GRAYSCALE)[None, :256, :256]
        return torch.from_numpy(np.concatenate([image, image > 128]))
model = build_model(ModelConfig(features=(8, 16, 32, 64)))
optimizer = torch.optim.AdamW(model.parameters())
planes = next(iter(DataLoader(Frames(), 2, shuffle=True, num_workers=2)))
loss = torch.nn.functional.binary_cross_entropy_with_logits(model(planes[:, :1]), planes[:, 1:].float())
loss.backward()
optimizer.step()
"""


def bench_startup(repeats: int = 5) -> dict[str, Any]:
    """Seconds to the first step and its parts; of `--help` and of importing the command line.

    Args:
        repeats: how often each is started, in turn.

    Returns:
        `seconds`: what -> spread; `parts`: of our start, name -> spread; `ratio`: ours / the script's.
    """
    seconds: dict[str, list[float]] = {}
    parts: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="raylivecell-bench-") as folder:
        root = Path(folder)
        prepare.write_source(root / "source", IMAGES)
        _timed("prepare", "--source", str(root / "source"), "--out", str(root / "data"))
        (root / "recipe.yaml").write_text(recipe.dump(RECIPE))
        for repeat in range(repeats):
            first_step, named = _train(root, repeat)
            for name, value in named.items():
                parts.setdefault(name, []).append(value)
            took = {
                f"{OURS}: first step": first_step,
                f"{PLAIN}: first step": _script(root / "source"),
                "raylivecell --help": _timed("--help")[0],
                "import of the command line": _import(),
            }
            for name, value in took.items():
                seconds.setdefault(name, []).append(value)
    ours, plain = seconds[f"{OURS}: first step"], seconds[f"{PLAIN}: first step"]
    return {
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "parts": {name: spread(values) for name, values in parts.items()},
        "ratio": {f"{OURS} / {PLAIN}": spread([a / b for a, b in zip(ours, plain)])},
    }


def _timed(*words: str) -> tuple[float, str]:
    """Seconds of a command of ours, and what it printed."""
    return _process([sys.executable, "-m", "raylivecell", *words])


def _process(words: list[str]) -> tuple[float, str]:
    begin = time.perf_counter()
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words[:4])} ended with {done.returncode}: {done.stdout[-500:]}")
    return time.perf_counter() - begin, done.stdout


def _train(root: Path, number: int) -> tuple[float, dict[str, float]]:
    """Seconds to the first step, from the start of the process, and their parts in order (those of 0.05 s and more)."""
    _, told = _timed(
        "train",
        "--data",
        str(root / "data"),
        "--out",
        str(root / f"run-{number}"),
        "--recipe",
        str(root / "recipe.yaml"),
    )
    found = TOLD.search(told)
    if not found:
        raise RuntimeError(f"train told no first step: {told[-500:]}")
    named = (part.rsplit(" ", 1) for part in found[2].split(", "))
    return float(found[1]), {name: float(value) for name, value in named}


def _script(source: Path) -> float:
    return _process([sys.executable, "-c", SCRIPT, str(source)])[0]


def _import() -> float:
    """Of what `raylivecell` imports before it knows which command is meant, the interpreter's own start left out."""
    bare = _process([sys.executable, "-c", "pass"])[0]
    return _process([sys.executable, "-c", "import raylivecell.cli.main"])[0] - bare
