"""`augment` on a GPU (or any torch device): the same warps of the same samples, a batch at a time.

The host draws the random numbers and the field at its control points, about 20 kB per sample; the device interpolates
the map to every pixel and resamples. Pixels differ from the CPU's by rounding: OpenCV interpolates at 32 positions
between two pixels, a GPU continuously.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from raylivecell.ingest import augment, elastic
from raylivecell.ingest.augment import BACKGROUND, Size, Warp
from raylivecell.ingest.order import EPOCH, SAMPLE, VARIANT, SampleSchedule
from raylivecell.network.transfer import DeviceTransfer
from raylivecell.recipe import AugmentConfig
from raylivecell.targets.sample_planes import IMAGE, MASKS


def apply_warp(
    frames: Tensor,
    points: Tensor,
    tables: Tensor,
    config: AugmentConfig,
    size: Size | None,
    background: int = BACKGROUND,
) -> Tensor:
    """Transformed crops, uint8 (B, 3, h, w), of complete samples, uint8 (B, 3, H, W), as `sample_planes.STORED`.

    Args:
        frames: no smaller than the crop; all tensors on one device.
        points: source of each crop's control points, float32 (B, 2, rows, columns): `augment.Warp.maps`.
        tables: new value of each grey level, uint8 (B, 256): `augment.Warp.table`.
        config: the configuration from which both were drawn.
        size: (h, w) of the crop; None: the complete image.
        background: background grey level of the dataset, outside the image if `config.border` is constant.
    """
    height, width = frames.shape[-2:]
    maps = _interpolate(points, size or (height, width), elastic.control_step(config.elastic.sigma))
    # grid_sample's coordinates run from -1, the centre of the first pixel, to 1, that of the last.
    x, y = (maps[:, axis] * (2 / max(length - 1, 1)) - 1 for axis, length in enumerate((width, height)))
    grid = torch.stack([x, y], dim=-1)
    padding = "reflection" if config.border == "reflect" else "zeros"
    offsets = frames[:, IMAGE, None].float() - background  # zero padding is then the background level
    image = F.grid_sample(offsets, grid, "bilinear", padding, align_corners=True)
    masks = F.grid_sample(frames[:, MASKS].float(), grid, "nearest", padding, align_corners=True)
    levels = (image + background).round().clamp(0, 255).long()
    recoloured = tables.gather(1, levels.flatten(1)).view_as(levels)
    return torch.cat([recoloured, masks.to(torch.uint8)], dim=1)


def batches(
    frames: Iterator[dict[str, Tensor]],
    schedule: SampleSchedule,
    config: AugmentConfig,
    size: Size | None,
    device: torch.device,
    background: int = BACKGROUND,
) -> Iterator[dict[str, Tensor]]:
    """Batches of complete samples with their rows of the schedule -> batches of transformed crops on the device."""
    send = DeviceTransfer(device)
    for batch in frames:
        padded = _pad(send(batch["planes"]), size)
        points, tables = stack_warps(
            _warps(batch["rows"], schedule, config, batch["planes"].shape[-2:], size, background)
        )
        yield {"planes": apply_warp(padded, send(points), send(tables), config, size, background)}


def stack_warps(warps: Sequence[Warp]) -> tuple[Tensor, Tensor]:
    """Stack warps as `points` and `tables` of `apply_warp`, in host memory."""
    points, tables = (np.stack(column) for column in zip(*warps))
    return torch.from_numpy(points), torch.from_numpy(tables)


def _warps(
    rows: Tensor,
    schedule: SampleSchedule,
    config: AugmentConfig,
    shape: Sequence[int],
    size: Size | None,
    background: int,
) -> list[Warp]:
    height, width = (max(length, minimum) for length, minimum in zip(shape, size or (0, 0)))
    warps = []
    for row in rows.tolist():
        rng = np.random.default_rng((schedule.seed, row[EPOCH], row[SAMPLE], row[VARIANT]))
        warps.append(augment.warp_of((height, width), rng, config, size, row[VARIANT] > 0, background))
    return warps


def _pad(frames: Tensor, size: Size | None) -> Tensor:
    """Pad samples by reflection to at least `size`, as in `augment`."""
    missing = [max(0, minimum - length) for minimum, length in zip(size or (0, 0), frames.shape[-2:])]
    if not any(missing):
        return frames
    (top, left), (bottom, right) = [m // 2 for m in missing], [m - m // 2 for m in missing]
    return F.pad(frames.float(), (left, right, top, bottom), mode="reflect").to(torch.uint8)


def _interpolate(points: Tensor, size: Size, step: float) -> Tensor:
    """Values (B, 2, rows, columns) at `elastic.control_points` -> at (h, w) pixels, interpolated as by `cv2.resize`."""
    if step <= 1:
        return points
    edge, (h, w) = elastic.padding(step), size
    maps = F.interpolate(points, (h + 2 * edge, w + 2 * edge), mode="bilinear", align_corners=False)
    return maps[..., edge : edge + h, edge : edge + w]
