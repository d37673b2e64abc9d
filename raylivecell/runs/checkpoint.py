"""A checkpoint: a folder of plain files. Loading an untrusted checkpoint executes no code.

    model.safetensors   the weights to use (averaged, if the recipe says so)
    training.pt         optimiser, schedule, raw weights, RNG: tensors and primitives, opened with weights_only=True
    state.json          steps done, the history of metrics
    recipe.yaml         the recipe
    data.json           name, licence, citation and SHA-256 of the training data
    intensity.json      rule from stored pixel values to the grey levels of training
    scale.json          pixel size and cell size of training
    instances.json      watershed thresholds, if `evaluate --calibrate` has tuned them
    parents.json        the checkpoints from which the training started (runs/parents.py)
    teacher.json        the network whose maps it learned (runs/teachers.py)

A run folder holds `checkpoint_*` folders; the best is the one whose state.json has the highest score.
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
from raylivecell.images.scale import Scale
from raylivecell.network.forward import to_device
from raylivecell.network.unet import build_model
from raylivecell.recipe import Targets
from raylivecell.runs import parents, teachers
from raylivecell.runs.parents import PARENTS, DataRecord
from raylivecell.runs.progress import MODEL, RECIPE, STATE, Progress, find, load_state, missing
from raylivecell.runs.teachers import TEACHER

TRAINING, INSTANCES, DATA, INTENSITY = "training.pt", "instances.json", "data.json", "intensity.json"
SCALE = "scale.json"


def save(
    folder: str,
    model: nn.Module,
    training: dict[str, Any],
    state: Progress,
    recipe: recipes.Recipe,
    data: Mapping[str, Any] | None = None,
    rule: Intensity | None = None,
    scale: Scale | None = None,
) -> None:
    """Write a checkpoint into `folder` (a URI).

    Args:
        folder: URI.
        model: the network whose weights are used.
        training: `loop.TrainState.state_dict`.
        state: steps done and history.
        recipe: the run's recipe.
        data: `combined.provenance` of the data.
        rule: `shards.intensity` of the dataset; default: LIVECell's.
        scale: `shards.scale` of the dataset; default: images as stored, cells of unknown size.
    """
    state_dict = model.state_dict()
    weights = {name: state_dict[name].detach().cpu().contiguous() for name in tensor_names(model)}
    storage.write_bytes(storage.join(folder, MODEL), safetensors.torch.save(weights))
    buffer = io.BytesIO()
    torch.save(training, buffer)
    storage.write_bytes(storage.join(folder, TRAINING), buffer.getvalue())
    storage.write_json(storage.join(folder, STATE), asdict(state))
    if data:
        storage.write_json(storage.join(folder, DATA), dict(data))
    storage.write_json(storage.join(folder, INTENSITY), (rule or LIVECELL).model_dump())
    storage.write_json(storage.join(folder, SCALE), (scale or Scale()).model_dump())
    storage.write_bytes(storage.join(folder, RECIPE), recipes.dump(recipe).encode())


def tensor_names(model: nn.Module) -> list[str]:
    """One state_dict name per tensor: MONAI's DynUNet registers some modules under two names."""
    state_dict = model.state_dict()
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]  # without duplicates
    return [name for name in names if name in state_dict]  # without non-persistent buffers


def copy(folder: str, target: str) -> None:
    """Copy a checkpoint's files; recipe.yaml, which marks it as complete, last."""
    names = (DATA, INSTANCES, SCALE, PARENTS, TEACHER)
    optional = [file for file in names if storage.exists(storage.join(folder, file))]
    for file in (*optional, INTENSITY, MODEL, TRAINING, STATE, RECIPE):
        storage.write_bytes(storage.join(target, file), read_file(folder, file))


def load_training(folder: str) -> tuple[dict[str, Any], Progress]:
    """The `training` (on the CPU) and `state` passed to `save`."""
    data = io.BytesIO(read_file(folder, TRAINING))
    try:
        with zipfile.ZipFile(data) as members:  # torch.load also reads older formats and unpacks zip bombs
            if any(member.file_size > member.compress_size for member in members.infolist()):
                raise UserError(f"{folder}/{TRAINING} is compressed; checkpoints never are: resume from another one")
        data.seek(0)
        training = torch.load(data, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(f"{folder}/{TRAINING} is not a valid training state; resume from another one") from error
    return training, load_state(folder)


def load_model(uri: str) -> tuple[nn.Module, recipes.Recipe]:
    """The network of the checkpoint or run at `uri`, in evaluation mode on the CPU, and its recipe."""
    folder = find(uri)
    recipe, rule = recipes.load(storage.join(folder, RECIPE)), load_intensity(folder)
    try:
        weights = safetensors.torch.load(read_file(folder, MODEL))
        with torch.device("meta"):  # an untrusted recipe may ask for terabytes: allocate the size of the file only
            model = build_model(recipe.model, recipe.outputs, rule)
        if weights.keys() != set(names := tensor_names(model)):
            mismatched = sorted(weights.keys() ^ set(names))
            raise KeyError(f"{len(mismatched)} tensors are missing or unexpected: {', '.join(mismatched[:3])}")
        model.load_state_dict(weights, assign=True, strict=False)  # the file lacks second names of shared tensors
    except (safetensors.SafetensorError, RuntimeError, KeyError) as error:
        raise UserError(
            f"{folder}/{MODEL} does not contain this recipe's weights: {str(error).splitlines()[0]}"
        ) from error
    return model.float().eval(), recipe


def load_network(uri: str, device: torch.device) -> tuple[nn.Module, recipes.Recipe]:
    """`load_model` on `device`, in the recipe's memory format."""
    model, recipe = load_model(uri)
    return to_device(model, recipe, device), recipe


def save_instances(folder: str, config: InstanceConfig, calibration: dict[str, Any]) -> None:
    """Save the watershed thresholds, and `calibration`: how they were tuned."""
    storage.write_json(storage.join(folder, INSTANCES), {"thresholds": config.model_dump(), **calibration})


def load_instances(folder: str, targets: Targets) -> InstanceConfig:
    """The thresholds saved by `save_instances`, else the defaults."""
    try:
        values = storage.read_json(storage.join(folder, INSTANCES))
    except FileNotFoundError:
        return watershed.default(targets)
    with storage.validating(storage.join(folder, INSTANCES), "delete it and run --calibrate again"):
        thresholds = values["thresholds"]
    return settings.validate(InstanceConfig, thresholds, storage.join(folder, INSTANCES))


def load_intensity(folder: str) -> Intensity:
    """The `rule` passed to `save`; UserError if the folder has no intensity.json."""
    uri = storage.join(folder, INTENSITY)
    try:
        values = storage.read_json(uri)
    except FileNotFoundError as error:
        raise UserError(
            f"checkpoint {folder} has no {INTENSITY}: written by an older raylivecell; prepare the data and train again"
        ) from error
    with storage.validating(uri, "use another checkpoint"):
        return Intensity.model_validate(values)


def load_scale(folder: str) -> Scale:
    """The `scale` passed to `save`; of unknown cell size if the folder has no scale.json (an older version)."""
    uri = storage.join(folder, SCALE)
    try:
        values = storage.read_json(uri)
    except FileNotFoundError:
        return Scale()
    with storage.validating(uri, "use another checkpoint"):
        return Scale.model_validate(values)


def load_data(folder: str) -> dict[str, str]:
    """`own_data`, with the licences and citations of the data behind the parents and the teacher."""
    values, of_parents, of_teacher = own_data(folder), parents.datasets(parents.read(folder)), teacher_data(folder)
    licence = values["licence"]
    if of_parents:
        licence += f"; started from networks trained on {parents.attribution(of_parents)}"
    if of_teacher:
        licence += f"; learned from a network trained on {parents.attribution(of_teacher)}"
    citations = dict.fromkeys([values["citation"], *(data.citation for data in (*of_parents, *of_teacher))])
    return values | {"licence": licence, "citation": " ".join(citations)}


def teacher_data(folder: str) -> tuple[DataRecord, ...]:
    """The data behind the teacher of a checkpoint; empty without a teacher."""
    teacher = teachers.read(folder)
    return teacher.datasets if teacher else ()


def own_data(folder: str) -> dict[str, str]:
    """The `data` passed to `save`; "not stated" for missing values."""
    try:
        values = storage.read_json(storage.join(folder, DATA))
    except FileNotFoundError:
        values = {}
    with storage.validating(storage.join(folder, DATA), "use another checkpoint"):
        stated = {name: str(value) for name, value in values.items() if not isinstance(value, list)}
    return dict.fromkeys(("name", "licence", "citation", "sha256"), "not stated") | stated


def read_file(folder: str, name: str) -> bytes:
    """Read a file of a checkpoint; UserError if it is missing."""
    try:
        return storage.read_bytes(storage.join(folder, name))
    except FileNotFoundError as error:
        raise missing(folder, name) from error
