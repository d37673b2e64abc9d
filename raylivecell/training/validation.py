"""Validation scores: each rank scores its share of the validation images; counts are summed over ranks."""

import torch
from torch import nn

from raylivecell.cells import watershed
from raylivecell.ingest.dataset import Samples
from raylivecell.network.forward import logits_of_picture
from raylivecell.recipe import Targets
from raylivecell.scoring import instance_scores, pixel_scores
from raylivecell.training.ranks import RankContext, broadcast_buffers, sum_over_ranks


class Validation:
    """Scores a network on uncropped validation images; every image is scored by exactly one rank."""

    def __init__(self, samples: Samples, context: RankContext, targets: Targets) -> None:
        self.samples, self.device, self.targets = samples, context.device, targets
        self.indices = range(context.rank, len(samples.val), context.ranks)

    def scores(self, network: nn.Module) -> dict[str, float]:
        """`val_dice`, `val_iou` (over all pixels) and `val_mean_image_dice`; {} without validation images.

        For instance recipes `val_msa` too: the mean of the images' mSA.
        """
        network.eval()
        broadcast_buffers(network)
        rows = [self._image_row(network, index) for index in self.indices]
        table = torch.tensor(rows, dtype=torch.float64, device=self.device).reshape(len(rows), 7)
        *counts, dice, msa, images = sum_over_ranks(table.sum(0)).tolist()
        if not images:
            return {}
        scores = {
            "val_dice": pixel_scores.dice(counts),
            "val_iou": pixel_scores.iou(counts),
            "val_mean_image_dice": dice / images,
        }
        return scores if self.targets == "foreground" else scores | {"val_msa": msa / images}

    def _image_row(self, network: nn.Module, index: int) -> list[float]:
        """Row for one image: four pixel counts, Dice, mSA (0 for targets: foreground), 1 (to count images)."""
        sample = self.samples.val_sample(index)
        logits = logits_of_picture(network, sample.image, sample.padding)
        foreground = torch.from_numpy(sample.truth != 0).to(self.device)
        ignored = None if sample.ignored is None else torch.from_numpy(sample.ignored).to(self.device)[None]
        counts = pixel_scores.pixel_counts(logits[None], foreground[None], ignored)[0].tolist()
        msa = 0.0
        if self.targets != "foreground":
            maps = torch.sigmoid(logits).cpu().numpy()
            cells = watershed.segment(maps, self.targets, watershed.default(self.targets))
            labels = instance_scores.without_ignored(cells, sample.ignored)
            msa = float(instance_scores.segmentation_accuracy(instance_scores.overlaps(labels, sample.truth)).mean())
        return [*counts, pixel_scores.dice(counts), msa, 1]
