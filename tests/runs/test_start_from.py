"""Fine-tuning: which layers of a parent are loaded, the chain of parents, and what a hostile parent can do."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from raylivecell.cli import arguments, check
from raylivecell.core.errors import UserError
from raylivecell.images.intensity import LIVECELL, Intensity
from raylivecell.images.scale import Scale
from raylivecell.network.unet import build_model, count_parameters
from raylivecell.recipe import ModelConfig, Norm, Recipe, dump
from raylivecell.runs import checkpoint, folder, parents, progress, start_from
from raylivecell.targets.registry import NAMES, Targets
from raylivecell.training import loop

DATA = {"name": "squares", "licence": "CC BY-NC 4.0", "citation": "Nobody 2026", "sha256": "ab" * 32, "uri": "x"}


def recipe_of(features: tuple[int, ...] = (4, 8), norm: Norm = "group", targets: Targets = "foreground") -> Recipe:
    return Recipe(model=ModelConfig(features=features, norm=norm), targets=targets, crop=(32, 32))


def save(
    target: Path,
    recipe: Recipe,
    chain: tuple[parents.Parent, ...] = (),
    seed: int = 1,
    scale: Scale | None = None,
) -> nn.Module:
    """Write a checkpoint with random weights and running statistics."""
    torch.manual_seed(seed)
    model = build_model(recipe.model, recipe.outputs)
    model(255 * torch.rand(2, 1, 32, 32))  # moves the running statistics of BatchNorm
    parents.write(str(target), chain)
    training = loop.start(model, recipe.optimizer, 10).state_dict()
    checkpoint.save(str(target), model, training, progress.Progress(7), recipe, DATA, scale=scale)
    return model


def child_of(parent: nn.Module, recipe: Recipe) -> tuple[nn.Module, start_from.Fit, dict[str, torch.Tensor]]:
    """A new network with the parent's weights, what fitted, and its weights before."""
    torch.manual_seed(2)
    child = build_model(recipe.model, recipe.outputs)
    before = {name: value.clone() for name, value in child.state_dict().items()}
    fitting = start_from.fit(parent.state_dict(), child)
    child.load_state_dict(fitting.tensors, strict=False)
    return child, fitting, before


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_equal_networks_are_loaded_completely(tmp_path: Path, norm: Norm) -> None:
    recipe = recipe_of(norm=norm)
    parent = save(tmp_path, recipe)
    child, fitting, _ = child_of(parent, recipe)
    assert (fitting.fraction, fitting.new_layers) == (1.0, ())
    image = 255 * torch.rand(1, 1, 32, 32)
    assert torch.equal(child.eval()(image), parent.eval()(image)), "running statistics are loaded too"
    # As a worker does, from the copy in the run's folder.
    torch.manual_seed(3)
    loaded, run = build_model(recipe.model, recipe.outputs), tmp_path / "run"
    opened = start_from.open_parent(str(tmp_path), recipe)
    parents.store(str(run), opened.weights, opened.chain)
    start_from.load(loaded, str(run))
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), parent.state_dict().values()))
    (run / "parent" / "model.safetensors").write_bytes(opened.weights[:-1])
    with pytest.raises(UserError, match="is not the file that the run started from"):
        start_from.load(loaded, str(run))


@pytest.mark.parametrize("old", NAMES)
@pytest.mark.parametrize("new", NAMES)
def test_other_targets_get_a_new_head(tmp_path: Path, old: Targets, new: Targets) -> None:
    parent, recipe = save(tmp_path, recipe_of(targets=old)), recipe_of(targets=new)
    child, fitting, before = child_of(parent, recipe)
    same_head = recipe_of(targets=old).outputs == recipe.outputs
    assert fitting.new_layers == (() if same_head else ("head",))
    weights, parent_weights = child.state_dict(), parent.state_dict()
    for name, value in weights.items():
        source = parent_weights if same_head or not name.startswith("head.") else before
        assert torch.equal(value, source[name]), name
    loaded = count_parameters(child) - (0 if same_head else sum(p.numel() for p in child.head.parameters()))
    assert fitting.fraction == pytest.approx(loaded / count_parameters(child))
    assert len(start_from.open_parent(str(tmp_path), recipe).lines) == 1, "a new head is no reason to warn"


def test_a_deeper_network_loads_the_layers_that_fit_and_warns(tmp_path: Path) -> None:
    parent = save(tmp_path, recipe_of((4, 8)))
    child, fitting, before = child_of(parent, recipe_of((4, 8, 16)))
    assert 0 < fitting.fraction < 0.5
    assert "contracting.2.0" in fitting.new_layers
    assert "contracting.1.3" not in fitting.new_layers
    for name, value in child.state_dict().items():
        source = before if name.rpartition(".")[0] in fitting.new_layers else parent.state_dict()
        assert torch.equal(value, source[name]), name
    warning = start_from.open_parent(str(tmp_path), recipe_of((4, 8, 16))).lines[1]
    assert warning.startswith("warning: only ")
    assert "features 4-8, norm group, 1 outputs; unet, features 4-8-16" in warning
    assert "bottleneck.0" in warning


def test_batchnorm_from_groupnorm_keeps_its_initial_statistics(tmp_path: Path) -> None:
    parent = save(tmp_path, recipe_of(norm="group"))
    child, fitting, before = child_of(parent, recipe_of(norm="batch"))
    assert (fitting.fraction, fitting.new_layers) == (1.0, ())
    name = "contracting.0.1.running_var"
    assert torch.equal(child.state_dict()[name], before[name])
    reverse = child_of(save(tmp_path / "batch", recipe_of(norm="batch")), recipe_of(norm="group"))[1]
    assert not [name for name in reverse.tensors if "running" in name]


@pytest.mark.parametrize("recipe", [recipe_of((5, 10)), Recipe(model=ModelConfig(name="BasicUNet"))])
def test_a_parent_of_which_nothing_fits_is_refused(tmp_path: Path, recipe: Recipe) -> None:
    save(tmp_path, recipe_of((4, 8)))
    with pytest.raises(UserError, match=r"no layer of its network \(unet, features 4-8, .*\) fits .* --model") as error:
        start_from.open_parent(str(tmp_path), recipe)
    assert "\n" not in str(error.value)


def test_the_chain_records_every_parent_and_its_licence(tmp_path: Path) -> None:
    """Parent -> child -> grandchild, the child as a run with its best checkpoint."""
    save(tmp_path / "first", recipe_of())
    child = start_from.open_parent(str(tmp_path / "first"), recipe_of())
    best = tmp_path / "run" / "checkpoint_000007"
    save(best, recipe_of(), child.chain, seed=2)
    opened = start_from.open_parent(str(tmp_path / "run"), recipe_of(targets="distance"))
    assert [parent.checkpoint for parent in opened.chain] == [str(best), str(tmp_path / "first")]
    newest = opened.chain[0]
    assert newest.start_from == str(tmp_path / "run")
    assert newest.sha256 == hashlib.sha256((best / "model.safetensors").read_bytes()).hexdigest()
    assert (newest.step, newest.targets, newest.new_layers) == (7, "foreground", ("head",))
    assert "licence CC BY-NC 4.0" in opened.lines[0]
    out = str(tmp_path / "third")
    parents.store(out, opened.weights, opened.chain)
    assert parents.of_run(out) == opened.chain
    assert (tmp_path / "third" / "parent" / "model.safetensors").read_bytes() == opened.weights
    parents.store(out, b"", ())
    assert parents.of_run(out) == (), "the copy of a start that was killed is deleted"
    checkpoint.copy(str(best), str(tmp_path / "copy"))
    data = checkpoint.load_data(str(tmp_path / "copy"))
    assert data["licence"] == "CC BY-NC 4.0; started from networks trained on squares (CC BY-NC 4.0)"
    assert newest.data.licence == "CC BY-NC 4.0", "the parents' licences are in the chain once"


def test_the_intensity_normalisation_is_that_of_the_new_data(tmp_path: Path) -> None:
    save(tmp_path, recipe_of())
    rule = Intensity(depth=16, low=0, high=65536, background=32000, spread=20000)
    child, opened = build_model(recipe_of().model, 1, rule), start_from.open_parent(str(tmp_path), recipe_of())
    parents.store(str(tmp_path / "run"), opened.weights, opened.chain)
    start_from.load(child, str(tmp_path / "run"))
    assert (child.normalise.background, child.normalise.scale) == (rule.background_level, rule.scale)
    assert rule.background_level != LIVECELL.background_level


@pytest.mark.parametrize(
    ("parent", "dataset", "warns"),
    [
        (Scale(diameter=20.0), Scale(diameter=39.0), False),
        (Scale(diameter=20.0), Scale(diameter=41.0), True),
        (Scale(diameter=41.0), Scale(diameter=20.0), True),
        (Scale(pixel_scale=0.5, diameter=20.0), Scale(diameter=21.0), False),
        (Scale(pixel_scale=0.5, diameter=20.0), Scale(diameter=30.0), True),
        (Scale(pixel_scale=0.5), Scale(diameter=30.0), True),
        (Scale(), Scale(diameter=30.0), False),
    ],
)
def test_cells_of_another_size_than_the_parents_are_warned_about(
    tmp_path: Path, parent: Scale, dataset: Scale, warns: bool
) -> None:
    save(tmp_path, recipe_of(), scale=parent)
    assert len(start_from.open_parent(str(tmp_path), recipe_of()).lines) == 1
    _, *warnings = start_from.open_parent(str(tmp_path), recipe_of(), dataset).lines
    finding = check.parent(str(tmp_path), recipe_of(), dataset)
    assert finding.level == ("warn" if warns else "pass")
    assert len(warnings) == warns
    for line in warnings:
        flag = f"--diameter-from {tmp_path}" if parent.diameter else "--pixel-scale 0.5"
        assert line == (
            f"warning: the parent was trained on {parent}, this dataset has {dataset}; to start from cells of the "
            f"parent's size, prepare it with `raylivecell prepare {flag}`"
        )
        assert finding.message == line.removeprefix("warning: ")


def test_a_parent_with_invalid_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint at"):
        start_from.open_parent(str(tmp_path), recipe_of())
    save(tmp_path, recipe_of())
    for chain in ({"parents": [{"sha256": 3}]}, {"parents": "x"}, [], {"parents": [], "more": 1}):
        (tmp_path / "parents.json").write_text(json.dumps(chain))
        with pytest.raises(UserError, match=r"parents\.json: "):
            start_from.open_parent(str(tmp_path), recipe_of())
    (tmp_path / "parents.json").unlink()
    (tmp_path / "recipe.yaml").write_text(dump(recipe_of((2**40, 2**40))))
    with pytest.raises(UserError, match="does not contain this recipe's weights"):
        start_from.open_parent(str(tmp_path), recipe_of())


def test_the_network_and_targets_of_the_parent_are_the_defaults(tmp_path: Path) -> None:
    parent, out = str(tmp_path / "parent"), tmp_path / "out"
    save(tmp_path / "parent", recipe_of((4, 8, 16), targets="boundary"))
    base = arguments.base_recipe(["--start-from", parent])
    assert (base.model, base.targets) == (recipe_of((4, 8, 16)).model, "boundary")
    assert base == arguments.base_recipe(["--start_from", parent, "--recipe", "finetune", "--out", str(out)])
    stated = arguments.base_recipe(["--start-from", parent, "--recipe", "cells-small"])
    assert stated == arguments.base_recipe(["--recipe", "cells-small"]), "a stated network is used"
    with pytest.raises(UserError, match="recipe finetune has no network: give --start-from"):
        arguments.base_recipe(["--recipe", "finetune"])
    # Resumed: the parent is no longer needed, and the recipe may be given again.
    chain = start_from.open_parent(parent, base).chain
    parents.store(str(out), b"weights", chain)
    (out / folder.RECIPE).write_text(dump(base))
    resume = ["--out", str(out), "--resume", "auto"]
    (tmp_path / "parent").rename(tmp_path / "gone")
    for flags in ([], ["--recipe", "finetune"], ["--recipe", "finetune", "--start-from", parent]):
        assert arguments.base_recipe([*resume, *flags]) == base
    parents.check_same(str(out), chain, parent)
    parents.check_same(str(out), chain, None)
    for other, origin in ((chain, parent), ((), "random weights")):
        with pytest.raises(UserError, match=f"started from {origin}, not from elsewhere; leave out --start-from"):
            parents.check_same(str(out), other, "elsewhere")
