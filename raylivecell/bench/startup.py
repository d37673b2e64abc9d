"""`bench startup`: seconds from a command to its first optimiser step, by part, compared with a plain PyTorch script.

Each runs in a separate process, as started by a user, on a synthetic dataset. They run in turn.
"""

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from raylivecell import recipe
from raylivecell.bench import prepare
from raylivecell.bench.figures import Figures, Options, ratios, summaries
from raylivecell.recipe import LoopConfig, ModelConfig, PhaseConfig, Recipe

IMAGES = 32
OURS_FIRST, PLAIN_FIRST = "raylivecell train: first step", "plain PyTorch script: first step"
RECIPE = Recipe(
    crop=(256, 256),
    phases=(PhaseConfig(steps=3, originals=False, augmented_copies=1),),
    model=ModelConfig(features=(8, 16, 32, 64)),
    loop=LoopConfig(report_steps=3),
)
FIRST_STEP = re.compile(r"first step after ([\d.]+) s: (.*)")
# A hand-written script: the same network, frames decoded with OpenCV, a DataLoader of two processes, one step.
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


def bench(options: Options) -> Figures:
    """Seconds to the first step and its parts, of `--help`, and of importing the command line.

    Args:
        options: `repeats` runs of each, in turn.

    Returns:
        `seconds`: variant -> summary; `parts`: part of our start -> summary; `ratio`: ours / the script's.
    """
    seconds: dict[str, list[float]] = {}
    parts: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="raylivecell-bench-") as folder:
        root = Path(folder)
        prepare.write_source(root / "source", IMAGES)
        _run_command("prepare", "--source", str(root / "source"), "--out", str(root / "data"))
        (root / "recipe.yaml").write_text(recipe.dump(RECIPE))
        for repeat in range(options.repeats):
            first_step, first_step_parts = _train(root, repeat)
            for name, value in first_step_parts.items():
                parts.setdefault(name, []).append(value)
            variants = {
                OURS_FIRST: first_step,
                PLAIN_FIRST: _script(root / "source"),
                "raylivecell --help": _run_command("--help")[0],
                "import of the command line": _import(),
            }
            for name, value in variants.items():
                seconds.setdefault(name, []).append(value)
    return {
        "seconds": summaries(seconds),
        "parts": summaries(parts),
        "ratio": ratios(seconds, [(OURS_FIRST, PLAIN_FIRST)]),
    }


def _run_command(*words: str) -> tuple[float, str]:
    """Seconds of one of our commands, and its output."""
    return _run([sys.executable, "-m", "raylivecell", *words])


def _run(words: list[str]) -> tuple[float, str]:
    begin = time.perf_counter()
    process = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if process.returncode:
        raise RuntimeError(f"{' '.join(words[:4])} ended with {process.returncode}: {process.stdout[-500:]}")
    return time.perf_counter() - begin, process.stdout


def _train(root: Path, number: int) -> tuple[float, dict[str, float]]:
    """Seconds from the start of the process to its first step, and its parts of at least 0.05 s in order."""
    _, output = _run_command(
        "train",
        "--data",
        str(root / "data"),
        "--out",
        str(root / f"run-{number}"),
        "--recipe",
        str(root / "recipe.yaml"),
    )
    message = FIRST_STEP.search(output)
    if not message:
        raise RuntimeError(f"no first step in the output of train: {output[-500:]}")
    parts = (part.rsplit(" ", 1) for part in message[2].split(", "))
    return float(message[1]), {name: float(value) for name, value in parts}


def _script(source: Path) -> float:
    return _run([sys.executable, "-c", SCRIPT, str(source)])[0]


def _import() -> float:
    """Seconds of the imports of `raylivecell` before it parses the command, without the interpreter's start."""
    interpreter = _run([sys.executable, "-c", "pass"])[0]
    return _run([sys.executable, "-c", "import raylivecell.cli.main"])[0] - interpreter
