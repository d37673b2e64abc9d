"""Start a training from the weights of another network: load every layer whose shapes fit, keep the others random.

1. `open_parent`  reads a checkpoint, compares its layers with the new network, records its origin (in the driver)
2. `load`         copies the weights that fit into the new network (in each worker)

The new network normalises intensities by its own dataset's rule: `unet.Normalise` has no weights to load.
"""

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from raylivecell import recipe as recipes
from raylivecell.core import storage
from raylivecell.core.errors import UserError
from raylivecell.images.scale import FAR_DIAMETER, Scale
from raylivecell.network.unet import build_model
from raylivecell.runs import checkpoint, parents, progress
from raylivecell.runs.parents import DataRecord, Parent


class Fit(NamedTuple):
    """The tensors of a parent that fit a network."""

    tensors: dict[str, Tensor]
    """Weights and buffers to load, by name."""
    new_layers: tuple[str, ...]
    """Layers of the network that keep their initial weights."""
    fraction: float
    """Loaded fraction of the network's weights."""
    convolutions: int
    """Loaded layers with more than a vector of weights."""


def fit(weights: Mapping[str, Tensor], model: nn.Module) -> Fit:
    """Compare a parent's `weights` with `model`, by name and shape.

    A layer fits if all its parameters do. Buffers are loaded with their layer where the parent has them: a layer of
    BatchNorm that starts from GroupNorm keeps its initial running statistics.
    """
    state, names = model.state_dict(), checkpoint.tensor_names(model)
    parameters = {name for name, _ in model.named_parameters()}
    layers: dict[str, list[str]] = {}
    for name in names:
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    tensors: dict[str, Tensor] = {}
    new_layers, convolutions = [], 0
    for layer, members in layers.items():
        fitting = [name for name in members if name in weights and weights[name].shape == state[name].shape]
        if parameters.intersection(members) <= set(fitting):
            tensors |= {name: weights[name] for name in fitting}
            convolutions += any(state[name].ndim > 1 for name in fitting)
        else:
            new_layers.append(layer)
    total = sum(state[name].numel() for name in names if name in parameters)
    loaded = sum(weight.numel() for name, weight in tensors.items() if name in parameters)
    return Fit(tensors, tuple(new_layers), loaded / max(total, 1), convolutions)


def load(model: nn.Module, run: str) -> None:
    """Load the weights that the run in the folder `run` starts from (`parents.store`) into `model`, where they fit.

    Raises:
        UserError: they are missing, or not those of the recorded parent.
    """
    folder = storage.join(run, parents.FOLDER)
    content = checkpoint.read_file(folder, progress.MODEL)
    if hashlib.sha256(content).hexdigest() != parents.of_run(run)[0].sha256:
        raise UserError(f"{folder}/{progress.MODEL} is not the file that the run started from; start a new run")
    model.load_state_dict(fit(safetensors.torch.load(content), model).tensors, strict=False)


class Opened(NamedTuple):
    """A parent that fits."""

    chain: tuple[Parent, ...]
    """The parent, and its parents."""
    weights: bytes
    """Content of its model.safetensors."""
    lines: tuple[str, ...]
    """Description and warnings, to print."""


def open_parent(uri: str, recipe: recipes.Recipe, scale: Scale | None = None) -> Opened:
    """Read the checkpoint or run at `uri` as the parent of a network of `recipe`; writes nothing, executes no code.

    Args:
        uri: of a checkpoint or run.
        recipe: of the new network.
        scale: of its dataset, to warn about cells of another size than the parent's; None: not compared.

    Raises:
        UserError: no checkpoint there, an invalid one, or none of its layers fits.
    """
    uri = storage.absolute(uri)
    folder = progress.find(uri)
    parent_model, parent_recipe = checkpoint.load_model(folder)
    content = checkpoint.read_file(folder, progress.MODEL)
    with torch.device("meta"):  # shapes only
        model = build_model(recipe.model, recipe.outputs)
        same_targets = build_model(recipe.model, parent_recipe.outputs)
    fitting = fit(parent_model.state_dict(), model)
    if not fitting.convolutions:
        raise UserError(
            f"--start-from {uri}: no layer of its network ({parent_recipe.network}) fits this recipe's "
            f"({recipe.network}); leave out --model.* and the recipe's model section to use the parent's network"
        )
    old_chain = parents.read(folder)
    if len(old_chain) >= parents.MAX_PARENTS:
        raise UserError(f"--start-from {uri}: it has {len(old_chain)} parents already; train a network from scratch")
    parent = Parent(
        start_from=uri,
        checkpoint=folder,
        sha256=hashlib.sha256(content).hexdigest(),
        step=progress.load_state(folder).step,
        targets=parent_recipe.targets,
        data=DataRecord.of(checkpoint.own_data(folder)),
        teacher_data=checkpoint.teacher_data(folder),
        loaded=fitting.fraction,
        new_layers=fitting.new_layers,
    )
    lines = [parents.describe(parent)]
    outputs = _outputs(model, same_targets)
    if unexpected := [layer for layer in fitting.new_layers if layer not in outputs]:
        lines.append(
            f"warning: only {100 * fitting.fraction:.3g} % of the weights fit, because the networks differ "
            f"({parent_recipe.network}; {recipe.network}): {len(unexpected)} layers besides the output start from "
            f"random weights ({parents.shorten(unexpected)}); leave out --model.* and the recipe's model section to "
            "use the parent's network"
        )
    if scale is not None:
        lines += _scale_warning(uri, checkpoint.load_scale(folder), scale)
    return Opened((parent, *old_chain), content, tuple(lines))


def _scale_warning(uri: str, trained: Scale, scale: Scale) -> list[str]:
    """Warn if the parent's training cells differ in size, in its pixels, from those of the new dataset."""
    # A parent, or a dataset, of unknown cell size is not far.
    ratio = trained.diameter / scale.diameter if trained.diameter and scale.diameter else 1.0
    if scale.fits(trained) and 1 / FAR_DIAMETER <= ratio <= FAR_DIAMETER:
        return []
    return [
        f"warning: the parent was trained on {trained}, this dataset has {scale}; to start from cells of the parent's "
        f"size, prepare it with `raylivecell prepare {trained.prepare_flag(uri)}`"
    ]


def _outputs(model: nn.Module, same_targets: nn.Module) -> set[str]:
    """Layers that differ only because the targets do: the head."""
    shapes, other = model.state_dict(), same_targets.state_dict()
    return {name.rpartition(".")[0] for name in shapes if name not in other or shapes[name].shape != other[name].shape}
