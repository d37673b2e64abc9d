"""`bench augment`: milliseconds per image on one core: our kernel, the direct form and MONAI's transforms.

All transform the same uint8 frame and two uint8 target planes, deform and rotate every time, and return uint8. They
alternate sample by sample, so that a drift of the machine's speed affects all. The measure is the thread's CPU time, on
which other programs have little influence; nothing here waits.
"""

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import cv2
import numpy as np
import torch

from raylivecell.bench.figures import Figures, Options, ratios, summaries
from raylivecell.ingest import augment, elastic
from raylivecell.ingest.augment import Size
from raylivecell.recipe import AugmentConfig

OURS, DIRECT, MONAI = "raylivecell", "direct form", "MONAI Rand2DElastic + RandRotate"
FIELD, FIELD_DIRECT = "field alone", "field alone, direct form"
CROP = (333, 434)


def bench(options: Options, size: Size = (520, 704), sigma: float = 10.0, alpha: float = 200.0) -> Figures:
    """Milliseconds per image of each variant, and their ratios to ours.

    Args:
        options: `repeats` runs of each variant, in turn, after one warm-up run.
        size: height and width of the frame.
        sigma: smoothness of the elastic field, pixels.
        alpha: strength of the elastic field along x and y.

    Returns:
        `milliseconds`: variant -> summary; `ratio`: "VARIANT / OURS" -> summary of the ratios within a repeat.
    """
    variants = _variants(size, sigma, alpha)
    times: dict[str, list[float]] = {name: [] for name in variants}
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        stack.callback(cv2.setNumThreads, cv2.getNumThreads())
        torch.set_num_threads(1)
        cv2.setNumThreads(1)
        for repeat in range(options.repeats + 1):
            for name, variant in variants.items():
                begin = time.thread_time()
                variant(np.random.default_rng((0, repeat)))
                times[name].append(1000 * (time.thread_time() - begin))
    times = {name: values[1:] for name, values in times.items()}
    return {
        "size": list(size),
        "sigma": sigma,
        "alpha": alpha,
        "repeats": options.repeats,
        "milliseconds": summaries(times),
        "ratio": ratios(times, [(DIRECT, OURS), (MONAI, OURS), (FIELD_DIRECT, FIELD)]),
    }


def augment_direct(
    image: np.ndarray, targets: np.ndarray, rng: np.random.Generator, config: AugmentConfig
) -> tuple[np.ndarray, np.ndarray]:
    """The direct form of `augment`: noise blurred at full resolution, separate passes for deformation and rotation."""
    draws = augment.RandomParameters.draw(rng)
    height, width = image.shape
    if draws.elastic < config.elastic.p:
        dx, dy = elastic.field_direct(rng, (height, width), config.elastic.sigma)
        x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
        maps = (x + dx * config.elastic.alpha_x, y + dy * config.elastic.alpha_y)
        image = augment.remap(image, maps, cv2.INTER_LINEAR, config.border, augment.BACKGROUND)
        targets = augment.remap(targets, maps, cv2.INTER_NEAREST, config.border, 0)
    if draws.rotation < config.rotation.p:
        matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), draws.degrees(config), 1)
        border = cv2.BORDER_REFLECT_101
        image = cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=border)
        targets = cv2.warpAffine(targets, matrix, (width, height), flags=cv2.INTER_NEAREST, borderMode=border)
    flips = draws.flips(config)
    image, targets = augment.flip(image, flips), augment.flip(targets, flips)
    recoloured = augment.recolour(np.ascontiguousarray(image), draws, config, augment.BACKGROUND)
    return recoloured, np.ascontiguousarray(targets)


def _variants(size: Size, sigma: float, alpha: float) -> dict[str, Callable[[np.random.Generator], Any]]:
    """Name -> function of a random generator."""
    planes = np.random.default_rng(0).integers(0, 256, (3, *size), np.uint8)
    image, targets = planes[0], np.ascontiguousarray(planes[1:].transpose(1, 2, 0))
    config = AugmentConfig.model_validate({"elastic": {"alpha_x": alpha, "alpha_y": alpha, "sigma": sigma}})
    everything = config.model_copy(update={"scale": 0.4, "gamma": 0.5, "blur": 1.5, "noise": 8.0, "shading": 10.0})
    crop = (min(CROP[0], size[0]), min(CROP[1], size[1]))
    out, cropped = np.empty_like(planes), np.empty((3, *crop), np.uint8)
    monai = _monai(planes, sigma, alpha, config.rotation.degrees)
    return {
        OURS: lambda rng: augment.augment(image, targets, rng, config),
        DIRECT: lambda rng: augment_direct(image, targets, rng, config),
        MONAI: monai,
        "raylivecell, planes into a batch": lambda rng: augment.augment_planes(planes, rng, config, out=out),
        f"raylivecell, crop {crop[0]}x{crop[1]}": lambda rng: augment.augment_planes(
            planes, rng, config, crop, cropped
        ),
        f"raylivecell, crop {crop[0]}x{crop[1]}, zoom, gamma, blur, noise, uneven background": (
            lambda rng: augment.augment_planes(planes, rng, everything, crop, cropped)
        ),
        FIELD: lambda rng: elastic.field(rng, size, sigma),
        FIELD_DIRECT: lambda rng: elastic.field_direct(rng, size, sigma),
    }


def _monai(planes: np.ndarray, sigma: float, alpha: float, degrees: float) -> Callable[[np.random.Generator], Any]:
    """MONAI's two transforms at the same strength: linear for the image, nearest for the targets."""
    from monai.transforms import Rand2DElasticd, RandRotated

    keys, mode = ("image", "targets"), ("bilinear", "nearest")
    deform = Rand2DElasticd(
        keys,
        spacing=(2 * sigma, 2 * sigma),  # its noise is on a grid; a field with this sigma is correlated over 2 sigma
        magnitude_range=(0.163 * alpha / sigma,) * 2,
        prob=1,
        mode=mode,
        padding_mode="reflection",
    )
    angle = math.radians(degrees)
    rotate = RandRotated(keys, range_x=angle, prob=1, mode=mode, padding_mode="reflection")

    def transform(rng: np.random.Generator) -> list[np.ndarray]:
        seed = int(rng.integers(2**31))
        deform.set_random_state(seed)
        rotate.set_random_state(seed)
        warped: Any = rotate(deform({"image": planes[:1], "targets": planes[1:]}))  # type: ignore[arg-type]
        return [warped[key].numpy().astype(np.uint8) for key in keys]

    return transform
