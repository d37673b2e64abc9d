"""`bench step`: a training step by each setting, beside MONAI's BasicUNet and the device's own matrix product.

On a GPU the paper's network in bfloat16, with the memory that each batch takes, up to the largest that fits; on CPUs a
small one in float32. One batch again and again: no loader, no Ray. All in turn.
"""

import gc
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from raylivecell.bench.spread import spread
from raylivecell.ingest.order import SampleSchedule
from raylivecell.network import forward
from raylivecell.network.losses import segmentation_loss
from raylivecell.network.optimizer import build_optimizer
from raylivecell.network.unet import build_model, count_parameters
from raylivecell.recipe import LoopConfig, ModelConfig, OptimizerConfig, PhaseConfig, Recipe
from raylivecell.targets.sample_planes import FOREGROUND, IMAGE
from raylivecell.training import loop

CROP = (256, 256)
# Steps between two looks at the clock, and such parts; the first is warm-up.
PART, PARTS = 4, 3
CPU_BATCHES = (1, 2, 8)
# Side of the square matrices whose product is the device's best, and how often it is formed.
SIDES, PRODUCTS = {"cuda": 8192, "cpu": 2048}, 10
LOSS_STEPS = 20
OURS, PLAIN, MONAI = "raylivecell", "plain PyTorch", "MONAI BasicUNet"
Precision = Literal["float32", "bfloat16"]


def bench_step(repeats: int = 5) -> dict[str, Any]:
    """Images/s of each way, and what share of the matrix product's speed that is.

    Args:
        repeats: how often each is measured, in turn.

    Returns:
        `device`, `parameters`, `batch`, `crop`; `gflop_an_image`: of the convolutions, forward and backward;
        `peak_tflops`: precision -> of a matrix product; `images_per_s`: way -> spread; `share_of_peak`: of that product
        in the way's precision; `ratio`; `loss_off`: the largest difference between bfloat16's losses and float32's over
        LOSS_STEPS steps, relative; on a GPU `memory_mib`: way -> the most that was allocated, and `largest_batch`.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True  # as `worker` does
    peaks: dict[Precision, float] = {one: peak_flops(device, one) for one in ("float32", "bfloat16")}
    base = recipe(device)
    usual: Precision = "bfloat16" if device.type == "cuda" else "float32"
    batches = list(_fitting(base, device)) if device.type == "cuda" else list(CPU_BATCHES)
    ways = {**_settings(base, device, usual), **_batches(base, device, usual, batches)}
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    memory: dict[str, float] = {}
    for _ in range(repeats):
        for name, (_, way) in ways.items():
            speed, memory[name] = _measured(way, device)
            speeds[name].append(speed)
    flop = flop_an_image(base, device)
    pairs = [(OURS, PLAIN), (OURS, MONAI), (OURS, f"{OURS}, channels first"), (f"{OURS}, compiled", OURS)]
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "parameters": count_parameters(build_model(base.model)),
        "batch": base.batch_size,
        "crop": list(CROP),
        "gflop_an_image": flop / 1e9,
        "peak_tflops": {one: peak / 1e12 for one, peak in peaks.items()},
        "images_per_s": {name: spread(values) for name, values in speeds.items()},
        "share_of_peak": {name: spread([flop * one / peaks[ways[name][0]] for one in speeds[name]]) for name in ways},
        "ratio": {f"{a} / {b}": spread([x / y for x, y in zip(speeds[a], speeds[b])]) for a, b in pairs},
        "loss_off": loss_off(base, device),
        **({"memory_mib": memory, "largest_batch": batches[-1]} if device.type == "cuda" else {}),
    }


Way = tuple[Precision, Callable[[], float]]
"""What gives images/s, and in which precision it computes."""


def recipe(device: torch.device) -> Recipe:
    """What is trained: the paper's network on a GPU, one of 0.49 M parameters on CPUs."""
    gpu = device.type == "cuda"
    return Recipe(
        batch_size=16 if gpu else 4,
        crop=CROP,
        phases=(PhaseConfig(steps=PARTS * PART, originals=False, augmented_copies=1),),
        model=ModelConfig(features=(64, 128, 256, 512) if gpu else (8, 16, 32, 64)),
        optimizer=OptimizerConfig(lr=1e-4),
        loop=LoopConfig(report_steps=PART),
    )


def _settings(base: Recipe, device: torch.device, usual: Precision) -> dict[str, Way]:
    """The same batch by our settings, and by the rivals."""
    other: Precision = "float32" if usual == "bfloat16" else "bfloat16"
    planes = random_planes(base.batch_size)
    repeated = itertools.repeat(planes)
    ways: dict[str, Way] = {
        OURS: (usual, lambda: ours(base, planes, device)),
        f"{OURS}, channels first": (usual, lambda: ours(base, planes, device, channels_last=False)),
        f"{OURS}, compiled": (usual, lambda: ours(base, planes, device, compile=True)),
        f"{OURS}, {other}": (other, lambda: ours(base, planes, device, precision=other)),
        PLAIN: (usual, lambda: plain(build_model(base.model).to(device), repeated, base, device, PART)),
        MONAI: (usual, lambda: plain(monai(base).to(device), repeated, base, device, PART)),
    }
    if device.type == "cpu":
        ways[f"{OURS}, one thread"] = (usual, lambda: _one_thread(lambda: ours(base, planes, device)))
        ways[f"{OURS}, {other}, compiled"] = (other, lambda: ours(base, planes, device, precision=other, compile=True))
    return ways


def _batches(base: Recipe, device: torch.device, usual: Precision, sizes: list[int]) -> dict[str, Way]:
    def way(size: int) -> Callable[[], float]:
        made = base.model_copy(update={"batch_size": size})
        return lambda: ours(made, random_planes(size), device)

    return {f"{OURS}, batch {size}": (usual, way(size)) for size in sizes}


def _fitting(base: Recipe, device: torch.device) -> Iterator[int]:
    """Doubled batch sizes, as long as a GPU's memory holds their steps."""
    for size in (2**power for power in itertools.count()):
        try:
            ours(base.model_copy(update={"batch_size": size}), random_planes(size), device)
        except torch.OutOfMemoryError:
            return
        finally:
            gc.collect()
            torch.cuda.empty_cache()
        yield size


def _measured(way: Callable[[], float], device: torch.device) -> tuple[float, float]:
    """Images/s, and the most MiB that were allocated on a GPU meanwhile."""
    if device.type == "cpu":
        return way(), 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return way(), torch.cuda.max_memory_allocated(device) / 2**20


def _one_thread(way: Callable[[], float]) -> float:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return way()
    finally:
        torch.set_num_threads(before)


def random_planes(count: int) -> Tensor:
    """A batch of samples, uint8 (B, 3, h, w)."""
    planes = torch.randint(0, 256, (count, 3, *CROP), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    planes[:, FOREGROUND] = planes[:, FOREGROUND] > 128
    return planes


def ours(base: Recipe, planes: Tensor, device: torch.device, **settings: Any) -> float:
    """Images/s of our loop on one batch again and again, with these `LoopConfig` fields."""
    how = base.loop.model_copy(update=settings)
    history = train(base.model_copy(update={"loop": how}), itertools.repeat({"planes": planes}), device)
    return speed(history, base.batch_size)


def train(recipe: Recipe, batches: Iterator[dict[str, Tensor]], device: torch.device) -> list[dict[str, Any]]:
    """Our loop in this process; its history."""
    torch.manual_seed(0)
    plan = SampleSchedule(recipe.seed, recipe.batch_size, recipe.batch_size, recipe.phases)
    training = loop.start(forward.build(recipe, device), recipe.optimizer, plan.steps)
    if recipe.loop.compile:
        training.model.compile()
    for _ in loop.run(
        training, training.model, batches, plan, recipe.loop, recipe.loss, recipe.targets, lambda network: {}
    ):
        pass
    return training.state.history


def speed(rows: list[dict[str, Any]], batch: int) -> float:
    """Images/s of a history after its first row, which is warm-up."""
    steps = rows[-1]["step"] - rows[0]["step"]
    return steps * batch / sum(row["seconds"] for row in rows[1:])


def monai(recipe: Recipe) -> nn.Module:
    """MONAI's network with the same channels at each level."""
    features = recipe.model.features
    options = {"features": [*features, 2 * features[-1], features[0]]}
    return build_model(ModelConfig(name="BasicUNet", options=options))


def plain(network: nn.Module, batches: Iterable[Tensor], recipe: Recipe, device: torch.device, part: int) -> float:
    """Images/s of the loop that one writes by hand, of `part` steps for warm-up and (PARTS - 1) times as many."""
    torch.manual_seed(0)
    optimizer, scheduler = build_optimizer(network, recipe.optimizer, PARTS * part)
    network.train()
    begin = 0.0
    for step, planes in enumerate(itertools.islice(batches, PARTS * part)):
        if step == part:
            begin = _now(device)
        planes = planes.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = network(planes[:, IMAGE, None])
        loss = segmentation_loss(logits, planes, recipe.loss, recipe.targets).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return (PARTS - 1) * part * recipe.batch_size / (_now(device) - begin)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_flops(device: torch.device, precision: Precision) -> float:
    """Operations/s of a product of two large square matrices, multiplications and additions: the best of PRODUCTS."""
    side = SIDES[device.type]
    one, two = (torch.randn(side, side, device=device, dtype=getattr(torch, precision)) for _ in range(2))
    one @ two
    seconds = []
    for _ in range(PRODUCTS):
        begin = _now(device)
        one @ two
        seconds.append(_now(device) - begin)
    return 2 * side**3 / min(seconds)


def flop_an_image(recipe: Recipe, device: torch.device) -> float:
    """Multiplications and additions of the network's convolutions for an image of CROP, forward and backward."""
    network = build_model(recipe.model).to(device)
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 1, *CROP, device=device)).sum().backward()
    return float(counter.get_total_flops())


def loss_off(base: Recipe, device: torch.device) -> float:
    """The largest difference of bfloat16's losses from float32's in LOSS_STEPS steps on one batch, relative."""
    phases = (base.phases[0].model_copy(update={"steps": LOSS_STEPS}),)
    losses = []
    for precision in ("float32", "bfloat16"):
        how = base.loop.model_copy(update={"precision": precision, "report_steps": 1})
        made = base.model_copy(update={"phases": phases, "loop": how})
        history = train(made, itertools.repeat({"planes": random_planes(base.batch_size)}), device)
        losses.append([row["loss"] for row in history])
    return max(abs(b / a - 1) for a, b in zip(*losses))
