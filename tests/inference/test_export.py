"""`export`: exported files compute the same maps at any size and contain metadata; ONNX runs without torch."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raylivecell import recipe
from raylivecell.cells.watershed import InstanceConfig
from raylivecell.core.errors import UserError
from raylivecell.inference import export, graph_files, onnx_model, segmenter
from raylivecell.network import forward
from raylivecell.network.unet import build_model
from raylivecell.runs import checkpoint
from raylivecell.runs.progress import Progress

DATA = {"name": "disks", "licence": "CC0", "citation": "nobody", "sha256": "ab" * 32, "uri": "x"}


def save(folder: Path, **fields: Any) -> str:
    """A checkpoint with random weights and non-default BatchNorm statistics."""
    torch.manual_seed(1)
    parsed = recipe.parse({"crop": [64, 64], **fields}, "test")
    network = build_model(parsed.model, parsed.outputs)
    for module in network.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            torch.nn.init.normal_(module.running_mean, std=0.3)  # type: ignore[arg-type]
    checkpoint.save(str(folder), network, {}, Progress(), parsed, DATA)
    checkpoint.save_instances(str(folder), InstanceConfig(threshold=0.2, prominence=0.01, min_area=1), {})
    return str(folder)


@pytest.mark.parametrize(
    ("suffix", "targets", "model"),
    [
        (".onnx", "distance", {"features": [4, 8, 8], "norm": "group"}),
        pytest.param(".pt2", "distance", {"features": [4, 8, 8], "norm": "group"}, marks=pytest.mark.slow),
        pytest.param(".onnx", "boundary", {"features": [4, 8], "norm": "batch"}, marks=pytest.mark.slow),
        (".pt2", "foreground", {"features": [4, 8], "norm": "sync_batch"}),
        (".onnx", "distance", {"name": "SegResNet", "options": {"blocks_down": [1, 1], "blocks_up": [1]}}),
        (".pt2", "boundary", {"name": "BasicUNet", "options": {"features": [4, 4, 4, 8, 8, 4]}}),
    ],
)
def test_an_exported_file_computes_the_maps_of_the_network_at_any_size(
    tmp_path: Path, suffix: str, targets: str, model: dict[str, Any]
) -> None:
    saved, file = save(tmp_path / "run", targets=targets, model=model), tmp_path / f"model{suffix}"
    summary = export.export(saved, str(file))
    assert summary["bytes"] == file.stat().st_size
    assert summary["difference"] < 1e-4
    maps = graph_files.WRITERS[suffix][1](file.read_bytes())
    network = checkpoint.load_model(saved)[0]
    for size in ((64, 64), (57, 90), (16, 23)):
        image = np.random.default_rng(0).integers(90, 170, size).astype(np.uint8)
        expected = forward.maps(network, image)
        exported_maps = maps(image[None, None].astype(np.float32))[0]
        assert exported_maps.shape == (len(expected), *size)
        np.testing.assert_allclose(exported_maps, expected, atol=1e-4)
    batch = np.random.default_rng(0).uniform(90, 170, (3, 1, 33, 20)).astype(np.float32)
    np.testing.assert_allclose(maps(batch)[2:], maps(batch[2:]), atol=1e-4)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A checkpoint, and its ONNX file."""
    folder = tmp_path_factory.mktemp("export")
    saved = save(folder / "run", targets="distance", model={"features": [4, 8], "norm": "group"})
    export.export(saved, str(folder / "model.onnx"))
    return saved, str(folder / "model.onnx")


def test_exported_files_contain_the_metadata(exported: tuple[str, str], tmp_path: Path) -> None:
    saved, file = exported
    model = onnx_model.load(file)
    assert model.targets == "distance"
    assert model.thresholds == InstanceConfig(threshold=0.2, prominence=0.01, min_area=1).model_dump()
    assert recipe.parse(recipe.yaml.safe_load(model.recipe_text), "inside") == checkpoint.load_model(saved)[1]
    provenance = [model.about[name] for name in ("licence", "citation", "data_name", "data_sha256")]
    assert provenance == ["CC0", "nobody", "disks", "ab" * 32]
    assert json.loads(model.about["channels"]) == ["foreground", "centre_distance", "boundary_distance"]
    export.export(saved, str(tmp_path / "model.pt2"))
    metadata = {graph_files.FILE: ""}
    torch.export.load(tmp_path / "model.pt2", extra_files=metadata)
    assert json.loads(metadata[graph_files.FILE]) == model.about


def test_onnx_without_torch_finds_the_same_cells(exported: tuple[str, str]) -> None:
    saved, file = exported
    code = (
        "import sys, numpy as np\n"
        "import raylivecell\n"
        "image = np.random.default_rng(0).integers(90, 170, (61, 75)).astype(np.uint8)\n"
        "cells = raylivecell.load(sys.argv[1], tta=True).segment(image)\n"
        "assert 'torch' not in sys.modules and 'ray' not in sys.modules\n"
        "np.save(sys.argv[2], cells.labels)\n"
    )
    target = Path(file).with_suffix(".npy")
    subprocess.run([sys.executable, "-c", code, file, str(target)], check=True)
    image = np.random.default_rng(0).integers(90, 170, (61, 75)).astype(np.uint8)
    expected = segmenter.load(saved, tta=True, device="cpu").segment(image).labels
    assert expected.max() > 1
    assert (np.load(target) == expected).mean() > 0.99, "maps agree to 1e-6: ties may differ"


@pytest.mark.parametrize(("error", "message"), [(2e-4, r"0\.0002"), (float("nan"), "nan")])
def test_a_file_that_differs_from_the_network_is_not_written(
    exported: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: float, message: str
) -> None:
    read = graph_files.WRITERS[".onnx"][1]
    data = Path(exported[1]).read_bytes()
    writers = {".pt2": (lambda *_: data, lambda data: lambda image: read(data)(image) + np.float32(error))}
    monkeypatch.setattr(graph_files, "WRITERS", writers)
    with pytest.raises(UserError, match=f"would differ from the network by {message}"):
        export.export(exported[0], str(tmp_path / "model.pt2"))
    assert not list(tmp_path.iterdir())


def test_user_errors_are_reported(exported: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\.onnx, \.pt2 .* or \.zip"):
        export.export(exported[0], str(tmp_path / "model.pth"))
    with pytest.raises(UserError, match="no checkpoint"):
        export.export(str(tmp_path), str(tmp_path / "model.onnx"))
    with pytest.raises(UserError, match="no model at"):
        onnx_model.load(str(tmp_path / "none.onnx"))
    (tmp_path / "text.onnx").write_text("not a network")
    with pytest.raises(UserError, match="is not an ONNX file"):
        onnx_model.load(str(tmp_path / "text.onnx"))


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_reported_with_the_install_command(
    exported: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match=r"onnxruntime: pip install 'raylivecell\[export\]'"):
        export.export(exported[0], str(tmp_path / "model.onnx"))
    assert not list(tmp_path.iterdir())
    if missing == "onnxruntime":
        with pytest.raises(UserError, match=r"onnxruntime: pip install 'raylivecell\[export\]'"):
            onnx_model.load(exported[1])


def test_a_copied_checkpoint_keeps_provenance_and_thresholds(exported: tuple[str, str], tmp_path: Path) -> None:
    copied = str(tmp_path / "copy")
    checkpoint.copy(exported[0], copied)
    assert checkpoint.load_data(copied) == DATA
    assert checkpoint.load_instances(copied, "distance").threshold == 0.2


def test_missing_provenance_is_exported_as_not_stated(exported: tuple[str, str], tmp_path: Path) -> None:
    bare = str(tmp_path / "bare")
    checkpoint.copy(exported[0], bare)
    (tmp_path / "bare" / checkpoint.DATA).unlink()
    assert checkpoint.load_data(bare) == dict.fromkeys(("name", "licence", "citation", "sha256"), "not stated")
    about = export._about(bare, checkpoint.load_model(bare)[1])
    assert [about[name] for name in ("licence", "data_sha256")] == ["not stated", "not stated"]
    checkpoint.copy(bare, str(tmp_path / "second"))
    assert not (tmp_path / "second" / checkpoint.DATA).exists()


def test_onnx_files_of_other_programs_or_versions_are_rejected(exported: tuple[str, str], tmp_path: Path) -> None:
    import onnx

    model = onnx.load(exported[1])
    del model.metadata_props[:]
    onnx.save(model, str(tmp_path / "other.onnx"))
    about = {"raylivecell": "9", "targets": "flows", "instances": "{}", "recipe": ""}
    onnx.helper.set_model_props(model, about)
    onnx.save(model, str(tmp_path / "later.onnx"))
    with pytest.raises(UserError, match="needs raylivecell 9 for targets flows"):
        onnx_model.load(str(tmp_path / "later.onnx"))
    with pytest.raises(UserError, match="not written by `raylivecell export`"):
        onnx_model.load(str(tmp_path / "other.onnx"))
