"""`bench step`: training speed by setting, compared with MONAI's BasicUNet and the device's matrix product.

On a GPU the paper's network in bfloat16, with the memory by batch size up to the largest that fits; on CPUs a small
network in float32. One batch is repeated: no loader, no Ray. The variants run in turn.
"""

import gc
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from raylivecell.bench.figures import Figures, Options, measure_in_turn, ratios, summaries, summary
from raylivecell.ingest.order import SampleSchedule
from raylivecell.network import forward
from raylivecell.network.losses import segmentation_loss
from raylivecell.network.optimizer import build_optimizer
from raylivecell.network.unet import build_model, count_parameters
from raylivecell.recipe import LoopConfig, ModelConfig, OptimizerConfig, PhaseConfig, Recipe
from raylivecell.targets.sample_planes import FOREGROUND, IMAGE
from raylivecell.training import loop

CROP = (256, 256)
# Steps per measured interval, and intervals per run; the first is warm-up.
INTERVAL_STEPS, INTERVALS = 4, 3
CPU_BATCHES = (1, 2, 8)
MAX_GPU_BATCH = 64
"""Doubling further until 140 GB are full took over 100 s on an H200."""
# Side of the square matrices whose product measures the device's peak, and number of products.
SIDES, PRODUCTS = {"cuda": 8192, "cpu": 2048}, 10
LOSS_STEPS = 20
OURS, PLAIN, MONAI = "raylivecell", "plain PyTorch", "MONAI BasicUNet"
Precision = Literal["float32", "bfloat16"]


def bench(options: Options) -> Figures:
    """Images/s of each variant, and its fraction of the matrix product's speed.

    Args:
        options: `repeats` runs of each variant, in turn.

    Returns:
        `device`, `parameters`, `batch`, `crop`; `gflop_per_image`: convolutions, forward and backward; `peak_tflops`:
        precision -> speed of a matrix product; `images_per_s`: variant -> summary; `share_of_peak`: variant -> fraction
        of that speed in its precision; `ratio`; `loss_difference`: the largest relative difference between bfloat16's
        and float32's losses in LOSS_STEPS steps; on a GPU `memory_mib`: variant -> peak allocation, and
        `largest_batch`.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True  # as training/worker.py sets it
    precisions: tuple[Precision, ...] = ("float32", "bfloat16")
    peaks = {precision: peak_flops(device, precision) for precision in precisions}
    base = recipe(device)
    default: Precision = "bfloat16" if device.type == "cuda" else "float32"
    batches = list(_fitting_batch_sizes(base, device)) if device.type == "cuda" else list(CPU_BATCHES)
    variants = {**_setting_variants(base, device, default), **_batch_variants(base, device, default, batches)}
    memory: dict[str, float] = {}

    def measure(name: str) -> float:
        speed, memory[name] = _speed_and_memory(variants[name][1], device)
        return speed

    speeds = measure_in_turn({name: partial(measure, name) for name in variants}, options.repeats)
    flop = flop_per_image(base, device)
    pairs = [(OURS, PLAIN), (OURS, MONAI), (OURS, f"{OURS}, channels first"), (f"{OURS}, compiled", OURS)]
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "parameters": count_parameters(build_model(base.model)),
        "batch": base.batch_size,
        "crop": list(CROP),
        "gflop_per_image": flop / 1e9,
        "peak_tflops": {precision: peak / 1e12 for precision, peak in peaks.items()},
        "images_per_s": summaries(speeds),
        "share_of_peak": {
            name: summary([flop * speed / peaks[precision] for speed in speeds[name]])
            for name, (precision, _) in variants.items()
        },
        "ratio": ratios(speeds, pairs),
        "loss_difference": loss_difference(base, device),
        **({"memory_mib": memory, "largest_batch": batches[-1]} if device.type == "cuda" else {}),
    }


Variant = tuple[Precision, Callable[[], float]]
"""Precision of the computation, and the run that returns images/s."""


def recipe(device: torch.device) -> Recipe:
    """Recipe of the runs: the paper's network on a GPU, one with 0.49 M parameters on CPUs."""
    gpu = device.type == "cuda"
    return Recipe(
        batch_size=16 if gpu else 4,
        crop=CROP,
        phases=(PhaseConfig(steps=INTERVALS * INTERVAL_STEPS, originals=False, augmented_copies=1),),
        model=ModelConfig(features=(64, 128, 256, 512) if gpu else (8, 16, 32, 64)),
        optimizer=OptimizerConfig(lr=1e-4),
        loop=LoopConfig(report_steps=INTERVAL_STEPS, precision="bfloat16" if gpu else "float32"),
    )


def _setting_variants(base: Recipe, device: torch.device, default: Precision) -> dict[str, Variant]:
    """Variants on one batch: our loop with different settings, and the baselines."""
    other: Precision = "float32" if default == "bfloat16" else "bfloat16"
    planes = random_planes(base.batch_size)
    repeated = itertools.repeat(planes)

    def ours(**settings: Any) -> float:
        return loop_speed(base, planes, device, **settings)

    def plain(network: nn.Module) -> float:
        return plain_loop_speed(network.to(device), repeated, base, device, INTERVAL_STEPS)

    variants: dict[str, Variant] = {
        OURS: (default, ours),
        f"{OURS}, channels first": (default, partial(ours, channels_last=False)),
        f"{OURS}, compiled": (default, partial(ours, compile=True)),
        f"{OURS}, {other}": (other, partial(ours, precision=other)),
        PLAIN: (default, lambda: plain(build_model(base.model))),
        MONAI: (default, lambda: plain(basic_unet(base))),
    }
    if device.type == "cpu":
        variants[f"{OURS}, one thread"] = (default, lambda: _on_one_thread(ours))
        variants[f"{OURS}, {other}, compiled"] = (other, partial(ours, precision=other, compile=True))
    return variants


def _batch_variants(base: Recipe, device: torch.device, default: Precision, sizes: list[int]) -> dict[str, Variant]:
    def run(size: int) -> float:
        return loop_speed(base.model_copy(update={"batch_size": size}), random_planes(size), device)

    return {f"{OURS}, batch {size}": (default, partial(run, size)) for size in sizes}


def _fitting_batch_sizes(base: Recipe, device: torch.device) -> Iterator[int]:
    """Powers of two, up to the largest batch that fits into a GPU's memory, at most MAX_GPU_BATCH."""
    for size in itertools.takewhile(lambda size: size <= MAX_GPU_BATCH, (2**power for power in itertools.count())):
        try:
            loop_speed(base.model_copy(update={"batch_size": size}), random_planes(size), device)
        except torch.OutOfMemoryError:
            return
        finally:
            gc.collect()
            torch.cuda.empty_cache()
        yield size


def _speed_and_memory(run: Callable[[], float], device: torch.device) -> tuple[float, float]:
    """Images/s, and peak MiB allocated on a GPU (0 on CPUs)."""
    if device.type == "cpu":
        return run(), 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return run(), torch.cuda.max_memory_allocated(device) / 2**20


def _on_one_thread(run: Callable[[], float]) -> float:
    previous = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return run()
    finally:
        torch.set_num_threads(previous)


def random_planes(count: int) -> Tensor:
    """A batch of samples, uint8 (B, 3, h, w)."""
    planes = torch.randint(0, 256, (count, 3, *CROP), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    planes[:, FOREGROUND] = planes[:, FOREGROUND] > 128
    return planes


def loop_speed(base: Recipe, planes: Tensor, device: torch.device, **settings: Any) -> float:
    """Images/s of our loop on one repeated batch, with `settings` as fields of `LoopConfig`."""
    config = base.loop.model_copy(update=settings)
    history = run_loop(base.model_copy(update={"loop": config}), itertools.repeat({"planes": planes}), device)
    return history_speed(history, base.batch_size)


def run_loop(recipe: Recipe, batches: Iterator[dict[str, Tensor]], device: torch.device) -> list[dict[str, Any]]:
    """Run our loop in this process; returns its history."""
    torch.manual_seed(0)
    schedule = SampleSchedule(recipe.seed, recipe.batch_size, recipe.batch_size, recipe.phases)
    training = loop.start(forward.build(recipe, device), recipe.optimizer, schedule.steps)
    if recipe.loop.compile is True:
        training.model.compile()
    for _ in loop.run(
        training, training.model, batches, schedule, recipe.loop, recipe.loss, recipe.targets, lambda network: {}
    ):
        pass
    return training.state.history


def history_speed(rows: list[dict[str, Any]], batch: int) -> float:
    """Images/s over a history without its first row, which is warm-up."""
    steps = rows[-1]["step"] - rows[0]["step"]
    return steps * batch / sum(row["seconds"] for row in rows[1:])


def basic_unet(recipe: Recipe) -> nn.Module:
    """MONAI's BasicUNet with the same numbers of channels as the recipe's network."""
    features = recipe.model.features
    options = {"features": [*features, 2 * features[-1], features[0]]}
    return build_model(ModelConfig(name="BasicUNet", options=options))


def plain_loop_speed(
    network: nn.Module, batches: Iterable[Tensor], recipe: Recipe, device: torch.device, steps: int
) -> float:
    """Images/s of a hand-written loop: `steps` warm-up steps, then (INTERVALS - 1) * `steps` measured steps."""
    torch.manual_seed(0)
    optimizer, scheduler = build_optimizer(network, recipe.optimizer, INTERVALS * steps)
    network.train()
    begin = 0.0
    for step, planes in enumerate(itertools.islice(batches, INTERVALS * steps)):
        if step == steps:
            begin = _now(device)
        planes = planes.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = network(planes[:, IMAGE, None])
        loss = segmentation_loss(logits, planes, recipe.loss, recipe.targets).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return (INTERVALS - 1) * steps * recipe.batch_size / (_now(device) - begin)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_flops(device: torch.device, precision: Precision) -> float:
    """FLOP/s of a product of two large square matrices: the best of PRODUCTS."""
    side = SIDES[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=getattr(torch, precision)) for _ in range(2))
    a @ b
    seconds = []
    for _ in range(PRODUCTS):
        begin = _now(device)
        a @ b
        seconds.append(_now(device) - begin)
    return 2 * side**3 / min(seconds)


def flop_per_image(recipe: Recipe, device: torch.device) -> float:
    """FLOP of the network's convolutions for an image of size CROP, forward and backward."""
    network = build_model(recipe.model).to(device)
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 1, *CROP, device=device)).sum().backward()
    return float(counter.get_total_flops())


def loss_difference(base: Recipe, device: torch.device) -> float:
    """Largest relative difference between bfloat16's and float32's losses in LOSS_STEPS steps on one batch."""
    phases = (base.phases[0].model_copy(update={"steps": LOSS_STEPS}),)
    losses = []
    for precision in ("float32", "bfloat16"):
        config = base.loop.model_copy(update={"precision": precision, "report_steps": 1})
        recipe = base.model_copy(update={"phases": phases, "loop": config})
        history = run_loop(recipe, itertools.repeat({"planes": random_planes(base.batch_size)}), device)
        losses.append([row["loss"] for row in history])
    return max(abs(b / a - 1) for a, b in zip(*losses))
