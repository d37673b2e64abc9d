"""A checkpoint: a folder of plain files, readable without running anything that a stranger wrote.

    model.safetensors   the weights to use (averaged ones, where the recipe asks for them)
    training.pt         optimiser, schedule, raw weights, RNG: tensors and primitives, opened with weights_only=True
    state.json          steps done, best score so far, the history of metrics
    recipe.yaml         the recipe
    data.json           name, licence, citation and fingerprint of the data that it was trained on
    intensity.json      how stored images become the grey levels that it was trained on
    instances.json      thresholds that make cells of its maps, where `evaluate --calibrate` has chosen them

A run folder holds `checkpoint_*` folders; the best of them is the one whose state.json has the highest score.
"""

import io
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from raylivecell import recipe as recipes
from raylivecell.cells import watershed
from raylivecell.cells.watershed import InstanceConfig
from raylivecell.core import settings, storage
from raylivecell.core.errors import UserError
from raylivecell.images.intensity import LIVECELL, Intensity
from raylivecell.network.forward import to_device
from raylivecell.network.unet import build_model
from raylivecell.recipe import Targets
from raylivecell.runs.progress import MODEL, RECIPE, STATE, Progress, find, load_state, missing

TRAINING, INSTANCES, DATA, INTENSITY = "training.pt", "instances.json", "data.json", "intensity.json"


def save(
    folder: str,
    model: nn.Module,
    training: dict[str, Any],
    state: Progress,
    recipe: recipes.Recipe,
    data: Mapping[str, Any] | None = None,
    rule: Intensity | None = None,
) -> None:
    """Write a checkpoint into `folder` (a URI).

    Args:
        folder: URI.
        model: the network to keep.
        training: `loop.Training.state_dict`.
        state: how far it has come.
        recipe: of the run.
        data: `shards.provenance` of the dataset.
        rule: `shards.intensity` of the dataset; default: LIVECell's.
    """
    state_dict = model.state_dict()
    weights = {name: state_dict[name].detach().cpu().contiguous() for name in _tensor_names(model)}
    storage.write_bytes(storage.join(folder, MODEL), safetensors.torch.save(weights))
    buffer = io.BytesIO()
    torch.save(training, buffer)
    storage.write_bytes(storage.join(folder, TRAINING), buffer.getvalue())
    storage.write_json(storage.join(folder, STATE), asdict(state))
    if data:
        storage.write_json(storage.join(folder, DATA), dict(data))
    storage.write_json(storage.join(folder, INTENSITY), (rule or LIVECELL).model_dump())
    storage.write_bytes(storage.join(folder, RECIPE), recipes.dump(recipe).encode())


def _tensor_names(model: nn.Module) -> list[str]:
    """Names of the network's tensors in its state_dict, one for each: MONAI's DynUNet has two for the same module."""
    state_dict = model.state_dict()
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]  # without duplicates
    return [name for name in names if name in state_dict]  # without buffers that are not kept


def copy(folder: str, target: str) -> None:
    """Copy a checkpoint's files; the one that makes it whole comes last."""
    there = [file for file in (DATA, INSTANCES) if storage.exists(storage.join(folder, file))]
    for file in (*there, INTENSITY, MODEL, TRAINING, STATE, RECIPE):
        storage.write_bytes(storage.join(target, file), _read(folder, file))


def load_training(folder: str) -> tuple[dict[str, Any], Progress]:
    """What `save` was given as `training` (on the CPU) and `state`."""
    data = io.BytesIO(_read(folder, TRAINING))
    try:
        with zipfile.ZipFile(data) as members:  # torch would also take its older forms, and unpack a zip bomb
            if any(member.file_size > member.compress_size for member in members.infolist()):
                raise UserError(f"{folder}/{TRAINING} is compressed, as no checkpoint's is; resume from another one")
        data.seek(0)
        training = torch.load(data, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(f"{folder}/{TRAINING} is not a checkpoint's; resume from another one") from error
    return training, load_state(folder)


def load_model(uri: str) -> tuple[nn.Module, recipes.Recipe]:
    """The network of the checkpoint or run at `uri`, in evaluation mode on the CPU, and its recipe."""
    folder = find(uri)
    recipe, rule = recipes.load(storage.join(folder, RECIPE)), load_intensity(folder)
    try:
        weights = safetensors.torch.load(_read(folder, MODEL))
        with torch.device("meta"):  # a stranger's recipe may ask for terabytes: the memory taken is the file's
            model = build_model(recipe.model, recipe.outputs, rule)
        if weights.keys() != set(names := _tensor_names(model)):
            other = sorted(weights.keys() ^ set(names))
            raise KeyError(f"{len(other)} tensors are missing or not the network's: {', '.join(other[:3])}")
        model.load_state_dict(weights, assign=True, strict=False)  # second names of shared tensors are not in the file
    except (safetensors.SafetensorError, RuntimeError, KeyError) as error:
        raise UserError(
            f"{folder}/{MODEL} does not hold this recipe's weights: {str(error).splitlines()[0]}"
        ) from error
    return model.float().eval(), recipe


def load_network(uri: str, device: torch.device) -> tuple[nn.Module, recipes.Recipe]:
    """`load_model` on `device`, in the recipe's memory format: ready to predict with."""
    model, recipe = load_model(uri)
    return to_device(model, recipe, device), recipe


def save_instances(folder: str, config: InstanceConfig, told: dict[str, Any]) -> None:
    """Keep the thresholds that make cells of the network's maps, and what is `told` of how they were found."""
    storage.write_json(storage.join(folder, INSTANCES), {"thresholds": config.model_dump(), **told})


def load_instances(folder: str, targets: Targets) -> InstanceConfig:
    """What `save_instances` kept, or the values to begin with."""
    try:
        values = storage.read_json(storage.join(folder, INSTANCES))
    except FileNotFoundError:
        return watershed.default(targets)
    with storage.validating(storage.join(folder, INSTANCES), "delete it and choose thresholds anew with --calibrate"):
        thresholds = values["thresholds"]
    return settings.validate(InstanceConfig, thresholds, storage.join(folder, INSTANCES))


def load_intensity(folder: str) -> Intensity:
    """What `save` was given as `rule`; UserError where the folder holds none."""
    place = storage.join(folder, INTENSITY)
    try:
        values = storage.read_json(place)
    except FileNotFoundError as error:
        raise UserError(
            f"checkpoint {folder} has no {INTENSITY}: an older raylivecell wrote it; prepare the data and train again"
        ) from error
    with storage.validating(place, "use another checkpoint"):
        return Intensity.model_validate(values)


def load_data(folder: str) -> dict[str, Any]:
    """What `save` was given as `data`; "not stated" for what it was not."""
    try:
        told = storage.read_json(storage.join(folder, DATA))
    except FileNotFoundError:
        told = {}
    with storage.validating(storage.join(folder, DATA), "use another checkpoint"):
        stated = {name: str(value) for name, value in told.items()}
    return dict.fromkeys(("name", "licence", "citation", "sha256"), "not stated") | stated


def _read(folder: str, name: str) -> bytes:
    try:
        return storage.read_bytes(storage.join(folder, name))
    except FileNotFoundError as error:
        raise missing(folder, name) from error
