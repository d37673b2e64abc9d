"""A network on whole images: the one place where pixels become logits and logits probabilities. No Ray here."""

import torch
from torch import Tensor, nn

from raylivecell.model import build_model, normalise
from raylivecell.recipe import Recipe


def build(recipe: Recipe, device: torch.device) -> nn.Module:
    """A fresh network of `recipe` on `device`, in the recipe's memory format."""
    model = build_model(recipe.model).to(device)
    return model.to(memory_format=torch.channels_last) if recipe.loop.channels_last else model


@torch.inference_mode()
def logits(network: nn.Module, images: Tensor) -> Tensor:
    """uint8 (B, H, W) -> float32 logits (B, 1, H, W), on the network's device."""
    return network(normalise(images.unsqueeze(1))).float()
