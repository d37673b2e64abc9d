"""No untrusted file executes code when a command reads it; each is refused in one line."""

import io
import json
import pickle
import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import run_python, write_tiny_dataset
from hostile import pickled, refused, torch_saved
from PIL import Image

from raylivecell.core.errors import UserError
from raylivecell.data import draw, plan, prepare, shards
from raylivecell.images import intensity
from raylivecell.inference import results
from raylivecell.network.unet import build_model
from raylivecell.recipe import ModelConfig, Recipe
from raylivecell.runs import checkpoint, progress
from raylivecell.runs import folder as run_folder
from raylivecell.sweep import final_seeds, study
from raylivecell.sweep.space import Dimension, SweepConfig
from raylivecell.training import loop

RECIPE = Recipe(model=ModelConfig(features=(4,)), crop=(16, 16))
SEARCH = SweepConfig(space={"optimizer.lr": Dimension(low=1e-4, high=1e-2, log=True)})


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "ran"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A run folder with one checkpoint."""
    training = loop.start(build_model(RECIPE.model), RECIPE.optimizer, 10)
    state = progress.Progress(3, [{"step": 3, "val_mean_image_dice": 0.5}])
    folder = tmp_path / "run" / progress.name(3)
    checkpoint.save(str(folder), training.network(), training.state_dict(), state, RECIPE, {"name": "squares"})
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return Path(write_tiny_dataset(tmp_path / "data", images=1))


def test_loading_the_pickles_runs_code(marker: Path) -> None:
    """Precondition of the other tests: these contents do execute code when unpickled."""
    for load in (
        lambda: pickle.loads(pickled(marker)),
        lambda: torch.load(io.BytesIO(torch_saved(marker)), weights_only=False),
    ):
        load()
        marker.unlink()


@pytest.mark.parametrize("hostile", [pickled, torch_saved])
@pytest.mark.parametrize("name", ["model.safetensors", "recipe.yaml", "data.json", "instances.json"])
def test_a_malicious_checkpoint_is_refused(
    hostile: Callable[[Path], bytes], name: str, model: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / name).write_bytes(hostile(marker))
    assert name in refused(capsys, f"export --checkpoint {model} --out {marker}.onnx")
    assert not marker.exists()


@pytest.mark.parametrize("hostile", [pickled, torch_saved])
def test_a_malicious_training_state_is_refused(hostile: Callable[[Path], bytes], model: Path, marker: Path) -> None:
    for name in ("training.pt", "state.json"):
        original = (model / name).read_bytes()
        (model / name).write_bytes(hostile(marker))
        with pytest.raises(UserError, match=name):
            checkpoint.load_training(str(model))
        (model / name).write_bytes(original)
    assert not marker.exists()


@pytest.mark.parametrize("text", ["[]", "{}", '{"thresholds": {"threshold": "x"}}', '{"thresholds": {"a": 1}}', "7"])
def test_invalid_thresholds_are_refused(text: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / "instances.json").write_text(text)
    assert "instances.json" in refused(capsys, f"export --checkpoint {model} --out {model}.onnx")


@pytest.mark.parametrize("text", ["[]", '{"step": -1}', '{"history": 3}', '{"history": [3]}', '{"speed": 3}', "7"])
def test_an_invalid_state_is_refused(text: str, model: Path) -> None:
    (model / "state.json").write_text(text)
    with pytest.raises(UserError, match=r"state\.json is not what"):
        progress.load_state(str(model))


@pytest.mark.parametrize(
    "text",
    [
        "seed: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [MARKER]]",
        "!!python/object/new:pathlib.Path [MARKER]",
        "seed: !!python/name:os.system",
        "seed: !!python/module:os",
    ],
)
@pytest.mark.parametrize("command", ["train", "sweep"])
def test_a_recipe_with_python_tags_is_refused(
    text: str, command: str, tmp_path: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.yaml").write_text(text.replace("MARKER", str(marker)))
    message = refused(capsys, f"{command} --data d --out {tmp_path}/o --recipe {tmp_path}/r.yaml")
    assert "r.yaml: not YAML: could not determine a constructor" in message
    assert not marker.exists()
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("name", ["../../precious", "/precious", "checkpoint_1/../../precious", "..", 3])
def test_a_malicious_list_of_checkpoints_is_refused(name: str | int, data: Path, tmp_path: Path, marker: Path) -> None:
    """Ray deletes listed folders, so their names must be plain."""
    run_folder.initialise(out := str(tmp_path / "run"), str(data), "")
    assert run_folder.check_resumable(out, str(data), resume=True)
    snapshot = tmp_path / "run" / run_folder.SNAPSHOT
    snapshot.write_text(json.dumps({"checkpoint_results": [{"checkpoint_dir_name": "checkpoint_2026-01-01_1.5"}]}))
    assert run_folder.check_resumable(out, str(data), resume=True)
    for text in (json.dumps({"checkpoint_results": [{"checkpoint_dir_name": name}]}).encode(), pickled(marker)):
        snapshot.write_bytes(text)
        with pytest.raises(UserError, match=run_folder.SNAPSHOT):
            run_folder.check_resumable(out, str(data), resume=True)
    assert not marker.exists()


@pytest.mark.parametrize("hostile", [pickled, torch_saved])
@pytest.mark.parametrize("name", ["dataset.json", "test/part-00000.parquet", "results.json"])
def test_a_malicious_dataset_or_results_file_is_refused(
    hostile: Callable[[Path], bytes], name: str, data: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "results.json").write_text("[]")
    (data / name).write_bytes(hostile(marker))
    message = refused(capsys, f"evaluate --predictions {data}/results.json --data {data} --out {data}/o")
    assert name in message
    assert not marker.exists()


READ_SHARDS = """
import sys
import pyarrow.parquet
import ray.data._internal.object_extensions.arrow
import ray.data._internal.tensor_extensions.arrow
from raylivecell.data import shards
from raylivecell.core.errors import UserError

for path in sys.argv[1:]:
    try:
        shards.read_row(shards.Row(path, 0), ["image"])
        print("read", path)
    except UserError as error:
        print("raylivecell:", error)
if len(sys.argv) == 2:
    pyarrow.parquet.ParquetFile(sys.argv[1]).read().to_pydict()
"""
# Ray Data registers extension types with pyarrow. The values of the first are pickles, loaded on access; the metadata
# of the second was a pickle until Ray 2.54. The third is pyarrow's own, not registered since 14: a column of bytes.
EXTENSIONS = {"ray.data.arrow_pickled_object": b"", "ray.data.arrow_tensor": None, "arrow.py_extension_type": None}


def write_shard_of_pickles(name: str, data: Path, marker: Path) -> str:
    """Write a shard whose images are a column of the extension type `name`; return its path."""
    table, tensor = pq.read_table(data / "test/part-00000.parquet"), name.endswith("tensor")
    content = EXTENSIONS[name]
    metadata = {"ARROW:extension:name": name.encode()}
    metadata["ARROW:extension:metadata"] = pickled(marker) if content is None else content
    kind = pa.list_(pa.int64()) if tensor else pa.binary()
    values = pa.array([[1] if tensor else pickled(marker)] * len(table), kind)
    table = table.drop_columns("image").append_column(pa.field("image", kind, metadata=metadata), values)
    pq.write_table(table, data / f"{name}.parquet", row_group_size=1)
    return str(data / f"{name}.parquet")


def test_shards_with_pickles_are_refused(data: Path, marker: Path) -> None:
    paths = [write_shard_of_pickles(name, data, marker) for name in EXTENSIONS]
    process = run_python(READ_SHARDS, *paths)
    for path, line in zip(paths, process.stdout.splitlines(), strict=True):
        assert line.startswith("raylivecell: ")
        assert path in line
    assert not marker.exists()
    run_python(READ_SHARDS, paths[0])  # plain pyarrow does execute them
    assert marker.exists()


def test_pandas_metadata_is_not_loaded(data: Path, marker: Path) -> None:
    shard = data / "test/part-00000.parquet"
    table = pq.read_table(shard)
    table = table.replace_schema_metadata({"pandas": pickled(marker), "pickle": pickled(marker)})
    pq.write_table(table, shard, row_group_size=1, use_dictionary=False)
    row = shards.read_row(shards.list_rows(str(data), "test")[0], ["image"])
    assert row["image"].shape == (48, 48)
    assert not marker.exists()


COLUMNS = ("trial_user_attributes.value_json", "trial_params.distribution_json")


@pytest.mark.parametrize("column", ["", *COLUMNS])
def test_a_study_with_pickles_is_refused(column: str, tmp_path: Path, marker: Path) -> None:
    """A pickle in place of the database, or of a value in it."""
    url = f"sqlite:///{tmp_path}/study.db"
    if column:
        trial = (new_study := study.open_study(url, "s", RECIPE, SEARCH, resume=False)).ask()
        trial.suggest_float("optimizer.lr", 1e-4, 1e-2)
        trial.set_user_attr("steps", 3)
        new_study.tell(trial, 0.5)
        table, name = column.split(".")
        with sqlite3.connect(tmp_path / "study.db") as database:
            assert database.execute(f"update {table} set {name} = ?", (pickled(marker),)).rowcount
    else:
        (tmp_path / "study.db").write_bytes(pickled(marker))
    with pytest.raises(UserError, match="cannot open Optuna's storage"):
        study.open_study(url, "s", RECIPE, SEARCH, resume=True)
    assert not marker.exists()


def test_a_redis_storage_is_refused() -> None:
    with pytest.raises(UserError, match="pickles in Redis"):
        study.open_study("redis://127.0.0.1:1/0", "s", RECIPE, SEARCH, resume=False)


def test_a_malicious_final_run_is_refused(tmp_path: Path, marker: Path) -> None:
    folder = tmp_path / "final" / "start-seed1"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_bytes(pickled(marker))
    (folder / "recipe.yaml").write_text("seed: 1\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl is not what raylivecell writes"):
        final_seeds.scores(str(tmp_path), ["start"], samples=8)
    assert not marker.exists()


@pytest.mark.parametrize("model_name", ["m.onnx", "m.pt2"])
def test_a_malicious_exported_network_is_refused(
    model_name: str, tmp_path: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files of torch.export may contain pickles: the package opens none, except those that it has just written."""
    Image.new("L", (32, 32)).save(tmp_path / "x.png")
    for data in (pickled(marker), torch_saved(marker)):
        (tmp_path / model_name).write_bytes(data)
        message = refused(
            capsys, f"predict --checkpoint {tmp_path}/{model_name} --images {tmp_path} --out {tmp_path}/o"
        )
        assert ("is not an ONNX file" if model_name == "m.onnx" else "no checkpoint at") in message
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["part", "images.csv", "predict.json"])
def test_malicious_outputs_of_predict_are_refused(
    kind: str, model: Path, tmp_path: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, out = tmp_path / "images" / "x.png", tmp_path / "out"
    image.parent.mkdir()
    Image.fromarray(np.full((32, 32), 128, np.uint8)).save(image)
    command = f"predict --checkpoint {model} --images {image.parent} --out {out}"
    key = results.version("x.png", "x", image.stat().st_size, image.stat().st_mtime_ns)
    path = {"part": out / ".parts" / f"{key}.json"}.get(kind, out / kind)
    path.parent.mkdir(parents=True)
    path.write_bytes(pickled(marker))
    if kind == "predict.json":
        assert "predict.json is not JSON" in refused(capsys, command)
    else:
        # `predict` reads these only in a folder that it has written.
        with pytest.raises(UserError, match=path.name):
            results.merge(str(out), {"x.png": key}, ()) if kind == "part" else results.is_complete(
                str(out), {"x.png": key}
            )
    assert not marker.exists()


@pytest.mark.parametrize("name", ["train.json", "x.png"])
def test_a_malicious_source_is_refused(
    name: str, tmp_path: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    Image.new("L", (32, 32)).save(source / "x.png")
    (source / name).write_bytes(pickled(marker))
    if name == "x.png":
        assert "not a known image format" in str(draw.examine(str(source / name)).error)
    else:
        assert "train.json" in refused(capsys, f"prepare --source {source} --out {tmp_path}/o")
    assert not marker.exists()


def test_malicious_outputs_of_prepare_are_refused(
    tmp_path: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    shard = plan.ShardPlan("train", "account.parquet", ())
    task = plan.ShardTask(shard, str(source), str(out), str(out), intensity.LIVECELL, 5.0, {})
    assert task.account_uri == str(out / "account.json")
    for name in ("dataset.json", "account.json"):
        (out / name).write_bytes(pickled(marker))
    assert "dataset.json is not JSON" in refused(capsys, f"prepare --source {source} --out {out}")
    with pytest.raises(UserError, match=r"account\.json is not JSON"):
        prepare._finished(task)
    (out / "download.json").write_bytes(pickled(marker))
    assert "download.json is not JSON" in refused(capsys, f"download --out {out}")
    assert not marker.exists()
