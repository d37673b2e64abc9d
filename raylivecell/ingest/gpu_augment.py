"""`augment` on a GPU (or any of torch's devices): the same moves of the same samples, a whole batch at a time.

The host draws the numbers and the field on its nodes, some 20 kB a sample; the device enlarges it to a map of every
pixel and resamples. Pixels differ from the CPU's by rounding: OpenCV knows 32 places between two pixels, a GPU all.
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


def moved(
    frames: Tensor,
    nodes: Tensor,
    tables: Tensor,
    config: AugmentConfig,
    size: Size | None,
    background: int = BACKGROUND,
) -> Tensor:
    """Transformed crops, uint8 (B, 3, h, w), of whole frames, uint8 (B, 3, H, W): image and two targets.

    Args:
        frames: no smaller than the crop; all tensors on one device.
        nodes: where each crop's nodes lie in its frame, float32 (B, 2, rows, columns): `augment.Warp.maps`.
        tables: the new grey level of each, uint8 (B, 256): `augment.Warp.table`.
        config: what both were drawn by.
        size: (h, w) of the crop; None: the whole frame.
        background: grey level of the set's background, outside the frame where `config.border` is constant.
    """
    height, width = frames.shape[-2:]
    maps = _enlarged(nodes, size or (height, width), elastic.node_step(config.elastic.sigma))
    # grid_sample counts from -1, the first pixel's centre, to 1, the last one's.
    x, y = (maps[:, axis] * (2 / max(length - 1, 1)) - 1 for axis, length in enumerate((width, height)))
    grid = torch.stack([x, y], dim=-1)
    padding = "reflection" if config.border == "reflect" else "zeros"
    image = F.grid_sample(frames[:, :1].float() - background, grid, "bilinear", padding, align_corners=True)
    targets = F.grid_sample(frames[:, 1:].float(), grid, "nearest", padding, align_corners=True)
    levels = (image + background).round().clamp(0, 255).long()
    recoloured = tables.gather(1, levels.flatten(1)).view_as(levels)
    return torch.cat([recoloured, targets.to(torch.uint8)], dim=1)


def batches(
    frames: Iterator[dict[str, Tensor]],
    plan: SampleSchedule,
    config: AugmentConfig,
    size: Size | None,
    device: torch.device,
    background: int = BACKGROUND,
) -> Iterator[dict[str, Tensor]]:
    """Batches of whole frames with their rows of the order, as batches of transformed crops on the device."""
    send = DeviceTransfer(device)
    for batch in frames:
        whole = _widened(send(batch["planes"]), size)
        nodes, tables = drawn(_moves(batch["rows"], plan, config, batch["planes"].shape[-2:], size, background))
        yield {"planes": moved(whole, send(nodes), send(tables), config, size, background)}


def drawn(moves: Sequence[Warp]) -> tuple[Tensor, Tensor]:
    """`nodes` and `tables` of `moved`, in this process's memory."""
    nodes, tables = (np.stack(column) for column in zip(*moves))  # the fields of Move
    return torch.from_numpy(nodes), torch.from_numpy(tables)


def _moves(
    rows: Tensor, plan: SampleSchedule, config: AugmentConfig, shape: Sequence[int], size: Size | None, background: int
) -> list[Warp]:
    wide = tuple(max(have, want) for have, want in zip(shape, size)) if size else tuple(shape)
    found = []
    for row in rows.tolist():
        rng = np.random.default_rng((plan.seed, row[EPOCH], row[SAMPLE], row[VARIANT]))
        found.append(augment.move((wide[0], wide[1]), rng, config, size, row[VARIANT] > 0, background))
    return found


def _widened(frames: Tensor, size: Size | None) -> Tensor:
    """Frames reflected at their edges to at least `size`, as `augment` widens them."""
    missing = [max(0, want - have) for want, have in zip(size or (0, 0), frames.shape[-2:])]
    if not any(missing):
        return frames
    (top, left), (bottom, right) = [m // 2 for m in missing], [m - m // 2 for m in missing]
    return F.pad(frames.float(), (left, right, top, bottom), mode="reflect").to(torch.uint8)


def _enlarged(nodes: Tensor, size: Size, step: float) -> Tensor:
    """Values (B, 2, rows, columns) on `elastic.nodes` as values on the (h, w) pixels, as `cv2.resize` enlarges."""
    if step <= 1:
        return nodes
    edge, (h, w) = elastic.margin(step), size
    whole = F.interpolate(nodes, (h + 2 * edge, w + 2 * edge), mode="bilinear", align_corners=False)
    return whole[..., edge : edge + h, edge : edge + w]
