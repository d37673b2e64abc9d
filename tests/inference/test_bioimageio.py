"""`export --out FILE.zip`: bioimageio.spec accepts the package, bioimageio.core computes raylivecell's maps with it."""

import io
import json
import platform
import re
import socket
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from conftest import skip_or_fail

from raylivecell import recipe
from raylivecell.cells import watershed
from raylivecell.cells.watershed import InstanceConfig
from raylivecell.cli import commands
from raylivecell.cli.arguments import call
from raylivecell.core import storage
from raylivecell.core.errors import UserError
from raylivecell.data import shards
from raylivecell.images import intensity
from raylivecell.images.intensity import LIVECELL, Intensity
from raylivecell.inference import (
    bioimageio,
    evaluate,
    export,
    graph_files,
    model_card,
    onnx_model,
    segmenter,
    torchscript,
)
from raylivecell.network import forward
from raylivecell.network.unet import build_model
from raylivecell.runs import checkpoint, parents
from raylivecell.runs.progress import Progress
from raylivecell.synthetic import writer
from raylivecell.targets.registry import NAMES, target

DATA = {
    "uri": "/secret/place",
    "name": "LIVECell",
    "licence": "CC BY-NC 4.0",
    "citation": "Edlund, C. et al. (2021). https://doi.org/10.1038/s41592-021-01249-6",
    "sha256": "ab" * 32,
}
ROW = {"epoch": 1, "step": 7, "loss": 0.4, "val_msa": 0.25, "val_mean_image_dice": 0.75, "images_per_s": 3.0}
DEEP = Intensity(
    depth=16, low=812.7, high=5230.3, background=2401.2, backgrounds=(2200.0, 2600.0), medians=(2200.0, 2600.0),
    spread=900.0, spreads=(500.0, 1500.0),
)  # fmt: skip
"""A rule whose quotients float32 would round to other levels."""


def save(folder: Path, rule: Intensity = LIVECELL, data: dict[str, str] = DATA, **fields: Any) -> str:
    """A run with one checkpoint: random weights, a report, thresholds."""
    torch.manual_seed(1)
    fields = {"targets": "distance", "model": {"features": [4, 8], "norm": "group"}, **fields}
    parsed = recipe.parse({"crop": [64, 64], **fields}, "test")
    network = build_model(parsed.model, parsed.outputs, rule)
    saved = str(folder / "checkpoint_1")
    checkpoint.save(saved, network, {}, Progress(7, [ROW]), parsed, data, rule)
    checkpoint.save_instances(saved, InstanceConfig(threshold=0.45, prominence=0.01, min_area=4), {})
    return str(folder)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Fail a test in which a connection was attempted, even if the error was handled."""
    attempts: list[Any] = []

    def refuse(*arguments: Any, **_: Any) -> Any:
        attempts.append(arguments)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    yield attempts
    assert not attempts


@pytest.fixture(scope="module", params=[LIVECELL, DEEP], ids=["8 bit", "16 bit"])
def packaged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Intensity]:
    """A run, its package, and its rule."""
    folder = tmp_path_factory.mktemp("package")
    run = save(folder / "run", request.param)
    export.export(run, str(folder / "model.zip"), ["Ada L.", "Grace H."])
    return run, folder / "model.zip", request.param


def stored_image(rule: Intensity, size: tuple[int, int], seed: int = 0) -> Any:
    """Noise around the background of `rule`, with values at both ends of its depth."""
    values = np.random.default_rng(seed).normal(rule.background, rule.spread / 4, size)
    values[:2], values[-2:] = 0, 2**rule.depth - 1
    return values.round().clip(0, 2**rule.depth - 1).astype(np.uint16 if rule.depth == 16 else np.uint8)


@pytest.mark.slow
def test_bioimageio_core_reproduces_the_maps_of_raylivecell(packaged: tuple[str, Path, Intensity]) -> None:
    try:
        from bioimageio import core
    except ImportError:
        skip_or_fail("bioimageio.core is not installed: pip install 'raylivecell[dev]'")
    run, file, rule = packaged
    summary = core.test_model(str(file))
    assert summary.status == "passed", summary.format()
    model = core.load_model_description(str(file), perform_io_checks=False)
    mine = segmenter.load(run, device="cpu")
    pipelines = [core.create_prediction_pipeline(model, weight_format=name) for name in ("onnx", "torchscript")]
    for size in ((256, 256), (97, 140), (32, 33)):
        image = stored_image(rule, size)
        frame = mine.frame(image)
        assert (frame.gain, frame.padding) == (1.0, None)
        for pipeline in pipelines:
            sample = core.predict(model=pipeline, inputs={"image": image[None, None]})
            output = sample.members["maps"].data.transpose("batch", "channel", "y", "x").values[0]
            np.testing.assert_allclose(output, mine.network(frame.levels), atol=1e-4)


class _ShownLevels(torch.nn.Module):
    """A network whose maps, times 256, are its input levels plus 0.5."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.logit((image + 0.5) / 256)


@pytest.mark.parametrize("rule", [LIVECELL, DEEP], ids=["8 bit", "16 bit"])
def test_the_graph_gives_every_stored_value_the_level_of_the_rule(rule: Intensity) -> None:
    values = np.arange(2**rule.depth, dtype=np.uint16 if rule.depth == 16 else np.uint8).reshape(-1, 64)
    with graph_files.quiet():
        run = graph_files.onnx_maps(
            graph_files.onnx_file(bioimageio._StoredImageNetwork(_ShownLevels(), rule).eval(), {})
        )
    levels = np.floor(256 * run(values[None, None].astype(np.float32))[0, 0])
    np.testing.assert_array_equal(levels, intensity.apply(values, rule))
    outside = np.array([[-5.0, 1e9, 0.4, 1.4]], np.float32)
    expected = intensity.apply(np.array([[0, 2**rule.depth - 1, 0, 1]], values.dtype), rule)
    np.testing.assert_array_equal(np.floor(256 * run(outside[None, None])[0, 0]), expected)


def test_the_package_describes_the_network_and_nothing_of_this_machine(
    packaged: tuple[str, Path, Intensity], tmp_path: Path
) -> None:
    from bioimageio import spec

    run, file, rule = packaged
    with zipfile.ZipFile(file) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
        assert {member.date_time for member in archive.infolist()} == {torchscript.EPOCH}
    rdf = yaml.safe_load(files["rdf.yaml"])
    assert [author["name"] for author in rdf["authors"]] == ["Ada L.", "Grace H."]
    assert rdf["license"] == "CC-BY-NC-4.0"
    assert [entry["doi"] for entry in rdf["cite"]] == ["10.1038/s41592-021-01249-6", "10.1007/978-3-319-24574-4_28"]
    assert rdf["outputs"][0]["axes"][1]["channel_names"] == list(target("distance").channels)
    facts = rdf["config"]["raylivecell"]
    assert facts["scores"]["validation"] == {"step": 7, "val_msa": 0.25, "val_mean_image_dice": 0.75}
    assert recipe.parse(facts["recipe"], "rdf") == checkpoint.load_model(run)[1]
    assert Intensity.model_validate(facts["intensity"]) == rule
    assert InstanceConfig.model_validate(facts["thresholds"]) == checkpoint.load_instances(
        f"{run}/checkpoint_1", "distance"
    )
    cover = cv2.imdecode(np.frombuffer(files["cover.png"], np.uint8), cv2.IMREAD_COLOR)
    assert cover.shape == (256, 512, 3)
    coloured = np.ptp(cover, axis=2) > 0
    assert coloured[:, 256:].any()
    assert not coloured[:, :256].any()
    assert len(files["cover.png"]) < 500_000
    sample = cv2.imdecode(np.frombuffer(files["sample_input.tif"], np.uint8), cv2.IMREAD_UNCHANGED)
    (tmp_path / "test_input.npy").write_bytes(files["test_input.npy"])
    np.testing.assert_array_equal(np.load(tmp_path / "test_input.npy")[0, 0], sample)
    assert segmenter.load(run).frame(sample).gain == 1.0, "the test image is outside the training range"
    for name in ("rdf.yaml", "README.md", "weights.onnx", "weights.pt"):
        for private in (b"/secret", str(tmp_path.parent).encode(), b"site-packages", str(Path.home()).encode() + b"/"):
            assert private not in files[name], name
    host = platform.node()
    assert len(host) < 6 or not any(host.encode() in files[name] for name in ("rdf.yaml", "README.md", "weights.onnx"))
    if rule == LIVECELL:
        again = bioimageio.package(run, ("Ada L.", "Grace H."))
        with zipfile.ZipFile(io.BytesIO(again.data)) as archive:
            assert {name for name in files if archive.read(name) != files[name]} == {"weights.pt", "rdf.yaml"}
        assert again.notes == ()
    description = spec.load_model_description(str(file), perform_io_checks=False)
    assert description.training_data.name == "LIVECell dataset"


@pytest.mark.parametrize(
    "targets", [pytest.param(name, marks=[pytest.mark.slow] if name != "distance" else []) for name in NAMES]
)
def test_the_snippet_of_the_readme_finds_the_cells_of_the_watershed(
    targets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On perfect maps. The snippet runs as it is in README.md, in the unpacked package."""
    run = save(tmp_path / "run", targets=targets)
    config = watershed.default(targets)
    checkpoint.save_instances(f"{run}/checkpoint_1", config, {})
    package = bioimageio.package(run)
    with zipfile.ZipFile(io.BytesIO(package.data)) as archive:
        archive.extractall(tmp_path / "model")
    snippet = re.search(r"```python\n(.*?)```", (tmp_path / "model/README.md").read_text(), re.DOTALL)[1]
    monkeypatch.chdir(tmp_path / "model")
    scope: dict[str, Any] = {}
    exec(snippet, scope)
    network = checkpoint.load_model(run)[0]
    levels = intensity.apply(scope["image"], LIVECELL)
    np.testing.assert_allclose(scope["maps"], forward.maps(network, levels), atol=1e-4)
    assert scope["labels"].shape == levels.shape
    truth = writer.draw_labels(0, 3)[1]
    perfect = np.zeros((len(target(targets).channels), *truth.shape), np.uint8)
    perfect[0] = 255 * (truth > 0)
    target(targets).draw(truth, perfect[1:])
    maps = perfect.astype(np.float32) / 255
    expected = watershed.segment(maps, targets, config)
    scope["maps"] = maps
    exec("cell =" + snippet.partition("\ncell =")[2], scope)
    labels = scope["labels"]
    assert abs(len(np.unique(labels)) - 1 - expected.max()) <= 0.03 * expected.max()
    best = [np.bincount(expected[labels == label]).max() / (labels == label).sum() for label in np.unique(labels)[1:]]
    assert np.median(best) > 0.99


def test_scores_of_evaluate_are_included_if_they_are_of_this_network(
    one_process: None, tmp_path: Path, no_network: list[Any]
) -> None:
    run = save(tmp_path / "run")
    data = _dataset(tmp_path / "data")
    result = evaluate.evaluate(run, data, "test", f"{run}/scores")
    card = model_card.describe(run, f"{run}/checkpoint_1", (), None)
    assert card.test is not None
    assert {name: card.test[name] for name in ("images", "msa", "ap50")} == {
        name: result[name] for name in ("images", "msa", "ap50")
    }
    assert f"| `msa` | {result['msa']:.4f} |" in card.readme()
    assert str(tmp_path) not in json.dumps(card.facts())
    other = save(tmp_path / "other", model={"features": [4, 4], "norm": "group"})
    assert model_card.describe(other, f"{other}/checkpoint_1", (), None).test is None
    with pytest.raises(UserError, match="measured with another network"):
        model_card.describe(other, f"{other}/checkpoint_1", (), f"{run}/scores")
    assert model_card.describe(run, f"{run}/checkpoint_1", (), f"{run}/scores/metrics.json").test == card.test
    checkpoint.save_instances(f"{run}/checkpoint_1", InstanceConfig(threshold=0.6), {})
    assert model_card.describe(run, f"{run}/checkpoint_1", (), None).test is None
    with pytest.raises(UserError, match=r"no metrics\.json at"):
        model_card.describe(run, f"{run}/checkpoint_1", (), str(tmp_path))


def _dataset(folder: Path) -> str:
    """Two synthetic test images."""
    rows = []
    for index in range(2):
        image, labels = (array[:128, :160] for array in writer.draw_labels(0, index))
        labels = np.unique(labels, return_inverse=True)[1].reshape(labels.shape).astype(np.uint16)
        outlines = [rle["counts"] for rle in evaluate.encode(labels.astype(np.int32))]
        names = {
            "file_name": f"{index}.tif",
            "cell_type": "A",
            "source": "s",
            "sha256": "0",
            "annotation": f"a#{index}",
        }
        pixels = {"image": image, "labels": labels, "foreground": labels > 0, "border": image * 0}
        size = {"height": 128, "width": 160, "cells": len(outlines)}
        rows.append({**names, **pixels, **size, "outlines": outlines, "annotation": f"a#{index}"})
    shards.write_shard(str(folder / "test/part-0.parquet"), rows)
    empty: dict[str, Any] = {"images": 0, "sizes": [], "shards": []}
    part = {"images": 2, "sizes": [(128, 160)], "shards": [{"file": "test/part-0.parquet", "rows": 2}]}
    about = {"format_version": shards.FORMAT_VERSION, "name": "cells", "intensity": LIVECELL.model_dump()}
    storage.write_json(str(folder / "dataset.json"), {**about, "splits": {"train": empty, "val": empty, "test": part}})
    return str(folder)


@pytest.mark.parametrize(
    ("licence", "identifier"),
    [
        ("CC BY-NC 4.0", "CC-BY-NC-4.0"),
        ("cc-by-4.0", "CC-BY-4.0"),
        ("CC0", "CC0-1.0"),
        ("CC0 1.0 Universal", "CC0-1.0"),
        ("Creative Commons Attribution-ShareAlike 4.0 International", "CC-BY-SA-4.0"),
        ("Attribution-NonCommercial-ShareAlike 2.0 Generic", None),
        ("http://creativecommons.org/licenses/by-nc-nd/4.0/", "CC-BY-NC-ND-4.0"),
        ("https://creativecommons.org/publicdomain/zero/1.0/legalcode.en", "CC0-1.0"),
        ("Apache-2.0", "Apache-2.0"),
        ("Attribution-NonCommercial License", None),
        ("CC BY 4.0; CC BY-NC 4.0", None),
        ("not stated", None),
        ("ask me", None),
        ("", None),
    ],
)
def test_licences_are_recognised_or_omitted_but_never_guessed(licence: str, identifier: str | None) -> None:
    assert model_card.spdx(licence) == identifier


def test_a_dataset_without_licence_doi_or_plain_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Links in the citation are not requested; what a publication lacks is printed."""
    data = {
        "name": "my/cells: \u00e9",
        "licence": "ask me",
        "citation": "Lab, https://example.org/cells.",
        "sha256": "c",
    }
    run = save(tmp_path / "run", data=data, targets="foreground")
    export.export(run, str(tmp_path / "model.zip"))
    printed = "".join(capsys.readouterr())
    assert "author not stated: give --author NAME" in printed
    assert "(my/cells: \u00e9: ask me): add `license:`" in printed
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        rdf = yaml.safe_load(archive.read("rdf.yaml"))
    assert rdf["authors"] == [{"name": "not stated"}]
    assert "license" not in rdf
    assert rdf["cite"][0]["url"] == "https://example.org/cells"


def test_a_fine_tuned_network_states_the_data_of_its_parents(tmp_path: Path) -> None:
    run = save(tmp_path / "run", data={"name": "mine", "licence": "CC BY 4.0", "citation": "me", "sha256": "c" * 64})
    folder = f"{run}/checkpoint_1"
    data = parents.DataRecord.of(DATA)
    places = {"start_from": "/secret/run", "checkpoint": "/secret/run/checkpoint_2"}
    parent = parents.Parent(**places, sha256="d" * 64, step=9, targets="distance", data=data, loaded=1.0)
    parents.write(folder, [parent])
    card = model_card.describe(run, folder, (), None)
    assert card.licence is None
    assert "(mine: CC BY 4.0; LIVECell: CC BY-NC 4.0)" in card.notes[1]
    assert [entry["doi"] for entry in card.cite] == ["10.1038/s41592-021-01249-6", "10.1007/978-3-319-24574-4_28"]
    assert card.facts()["parents"][0]["data"]["name"] == "LIVECell"
    texts = card.readme() + json.dumps(card.facts())
    assert "CC BY-NC 4.0" in card.readme()
    assert "/secret" not in texts
    checkpoint.save_instances(folder, InstanceConfig(), {})
    storage.write_json(f"{folder}/{checkpoint.DATA}", DATA)
    assert model_card.describe(run, folder, (), None).licence == "CC-BY-NC-4.0"


def test_the_flag_author_may_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(export, "export", lambda *values: calls.append(values))
    call(commands.export, "export", ["--checkpoint", "run", "--out", "a.zip", "--author", "A B", "--author", "C"])
    assert calls == [("run", "a.zip", ("A B", "C"), None)]


def test_user_errors_are_reported_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = save(tmp_path / "run")
    file = str(tmp_path / "model.zip")
    with pytest.raises(UserError, match="without slashes"):
        export.export(run, file, ["A/B"])
    with pytest.raises(UserError, match=r"apply to bioimage\.io packages"):
        export.export(run, str(tmp_path / "model.onnx"), ["A"])
    with pytest.raises(UserError, match="no checkpoint"):
        export.export(str(tmp_path / "data"), file)
    with pytest.raises(UserError, match="percentile depends on each image"):
        export.export(save(tmp_path / "percentile", Intensity(rule="percentile", spread=80)), file)
    storage.write_json(f"{run}/checkpoint_1/{checkpoint.SCALE}", {"pixel_scale": 0.5})
    with pytest.raises(UserError, match=r"pixel scale 0\.5 cannot be part"):
        export.export(run, file)
    storage.write_json(f"{run}/checkpoint_1/{checkpoint.SCALE}", {"pixel_scale": 1.0, "diameter": 17.5})
    monkeypatch.setattr(model_card, "FORMAT", "0.5.4.x")
    with pytest.raises(UserError, match=r"bioimageio\.spec .* refuses the package: .*pip install"):
        export.export(run, file)
    monkeypatch.setitem(sys.modules, "bioimageio.spec", None)
    with pytest.raises(UserError, match=r"pip install 'raylivecell\[export\]'"):
        export.export(run, file)
    assert not Path(file).exists()


@pytest.mark.slow
def test_a_package_of_a_monai_network_has_onnx_weights_only(tmp_path: Path) -> None:
    model = {"name": "SegResNet", "options": {"blocks_down": [1, 1], "blocks_up": [1]}}
    package = bioimageio.package(save(tmp_path / "run", model=model))
    assert package.difference < export.TOLERANCE
    with zipfile.ZipFile(io.BytesIO(package.data)) as archive:
        assert "weights.pt" not in archive.namelist()
        assert list(yaml.safe_load(archive.read("rdf.yaml"))["weights"]) == ["onnx"]


def test_the_tensors_in_a_torchscript_file_are_aligned(packaged: tuple[str, Path, Intensity]) -> None:
    with zipfile.ZipFile(packaged[1]) as archive:
        data = archive.read("weights.pt")
    with zipfile.ZipFile(io.BytesIO(data)) as script:
        for member in script.infolist():
            name_length, extra_length = (
                int.from_bytes(data[member.header_offset + i :][:2], "little") for i in (26, 28)
            )
            assert (member.header_offset + 30 + name_length + extra_length) % torchscript.ALIGNMENT == 0
            assert member.compress_type == zipfile.ZIP_STORED


def test_the_network_of_a_package_is_not_run_with_the_rule_applied_twice(
    packaged: tuple[str, Path, Intensity], tmp_path: Path
) -> None:
    with zipfile.ZipFile(packaged[1]) as archive:
        archive.extract("weights.onnx", tmp_path)
    with pytest.raises(UserError, match=r"part of a bioimage\.io package"):
        onnx_model.load(str(tmp_path / "weights.onnx"))
