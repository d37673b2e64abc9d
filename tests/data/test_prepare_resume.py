"""`prepare`: existing datasets, killed runs, errors in tasks, S3."""

import json
from pathlib import Path

import pytest
from conftest import S3, joined, run_apart
from prepare_source import Json, N, SourceFolder, counts, files_of

from raylivecell.core.errors import UserError
from raylivecell.data import prepare as prepare_module
from raylivecell.data import shards
from raylivecell.data.config import PrepareConfig
from raylivecell.data.prepare import prepare

pytest_plugins = ["prepare_fixtures"]


@pytest.mark.usefixtures("no_ray")
def test_another_dataset_is_not_overwritten(folder: SourceFolder, tmp_path: Path) -> None:
    out = tmp_path / "out"
    source = folder.write()
    prepare(source, str(out))
    before = files_of(out)
    with pytest.raises(UserError, match="--overwrite"):
        prepare(source, str(out), PrepareConfig(on_defect={"leak": "keep"}))
    folder.image("train", "A172_Phase_more.png")
    folder.write()
    with pytest.raises(UserError, match="--overwrite"):
        prepare(source, str(out))
    with pytest.raises(UserError, match="--strict may stop half-way"):
        prepare(source, str(out), PrepareConfig(overwrite=True), strict=True)
    assert files_of(out) == before
    assert counts(prepare(source, str(out), PrepareConfig(overwrite=True, shard_images=1)))["train"] == (3, 3 * N)
    assert counts(prepare(source, str(out), PrepareConfig(overwrite=True)))["train"] == (3, 3 * N)
    assert set(files_of(out)) == set(before)


@pytest.mark.usefixtures("no_ray")
def test_missing_shard_is_drawn_again(folder: SourceFolder, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(folder.write(), str(out))
    before = files_of(out)
    (out / "val" / "part-00000.parquet").unlink()
    prepare(folder.write(), str(out))
    assert files_of(out) == before


@pytest.mark.usefixtures("no_ray")
def test_unwritable_output_is_one_line(folder: SourceFolder, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match="Not a directory"):
        prepare(folder.write(), str(tmp_path / "file" / "out"))


@pytest.mark.ray
def test_user_error_in_a_task(ray_cluster: None) -> None:
    def fail(row: Json) -> Json:
        raise UserError(f"file {row['number']} changed; start again")

    with pytest.raises(UserError, match=r"^file 1 changed; start again$"):
        list(prepare_module._on_ray(fail, [{"number": 1}]))


KILLED_AT_EACH_WRITE = """
import json, os, signal, sys
from raylivecell.data import prepare as prepare_module
from raylivecell.runtime import session
from raylivecell.core import storage
from raylivecell.data.config import PrepareConfig

source, out = sys.argv[1:]
session.connect = lambda: None
prepare_module._on_ray = lambda function, rows: (function(json.loads(json.dumps(row))) for row in rows)
originals = {"replace": os.replace, "fsync": os.fsync, "delete": storage.delete}

def die_at(last):
    remaining = [last]
    def counted(name):
        def call(*arguments):
            remaining[0] -= 1
            if not remaining[0]: os.kill(os.getpid(), signal.SIGKILL)
            return originals[name](*arguments)
        return call
    os.replace, os.fsync, storage.delete = counted("replace"), counted("fsync"), counted("delete")

for last in range(1, 1000):
    child = os.fork()
    if not child:
        die_at(last)
        try:
            prepare_module.prepare(source, out, PrepareConfig(shard_images=2))
        finally:
            os._exit(0)
    if os.waitpid(child, 0)[1] == 0: break
print(last)
"""


def test_killed_before_each_write_ends_with_the_same_bytes(folder: SourceFolder, no_ray: None, tmp_path: Path) -> None:
    """Each run stops one write, rename or deletion later than the previous one, and starts from its files."""
    for number in range(6):
        folder.image("train", f"BV2_Phase_{number}.png")
    source, out = folder.write(), tmp_path / "out"
    prepare(source, str(tmp_path / "undisturbed"), PrepareConfig(shard_images=2))
    process = run_apart(KILLED_AT_EACH_WRITE, source, str(out))
    assert process.returncode == 0, process.stderr
    assert int(process.stdout) > 15
    assert files_of(out) == files_of(tmp_path / "undisturbed")


KILLED_WHILE_DRAWING = """
import os, signal, sys, threading, time
from pathlib import Path
from raylivecell.data.prepare import PrepareConfig, prepare

def watch():
    while len(list(Path(sys.argv[2]).glob(".prepare-*/*.json"))) < 2: time.sleep(0.002)
    os.kill(os.getpid(), signal.SIGKILL)

threading.Thread(target=watch, daemon=True).start()
prepare(sys.argv[1], sys.argv[2], PrepareConfig(shard_images=2))
"""


@pytest.mark.slow
@pytest.mark.ray
def test_killed_while_drawing_keeps_complete_shards(folder: SourceFolder, ray_cluster: None, tmp_path: Path) -> None:
    for number in range(40):
        folder.image("train", f"BV2_Phase_{number}.png")
    source, out = folder.write(), tmp_path / "out"
    prepare(source, str(tmp_path / "undisturbed"), PrepareConfig(shard_images=2))
    process = run_apart(KILLED_WHILE_DRAWING, source, str(out), env=joined())
    assert process.returncode == -9, process.stderr
    assert not (out / "dataset.json").exists()
    accounts = [json.loads(path.read_text()) for path in out.glob(".prepare-*/*.json")]
    assert len(accounts) >= 2
    ages = {account["file"]: (out / account["file"]).stat().st_mtime_ns for account in accounts}
    (out / "train" / f".part-00000.parquet.{'ab' * 16}.partial").write_bytes(b"half")
    prepare(source, str(out), PrepareConfig(shard_images=2))
    assert files_of(out) == files_of(tmp_path / "undisturbed")
    assert {file: (out / file).stat().st_mtime_ns for file in ages} == ages


ON_S3 = """
import sys
from raylivecell.data.prepare import prepare
from raylivecell.data import shards
for _ in range(2):
    prepare(*sys.argv[1:])
print(shards.read_row(shards.list_rows(sys.argv[2], "test")[0], ["labels"])["labels"].max())
"""


@pytest.mark.slow
@pytest.mark.ray
def test_from_s3_to_s3(folder: SourceFolder, ray_cluster: None, s3: S3, tmp_path: Path) -> None:
    source = folder.write()
    s3.upload(source, "source")
    process = run_apart(ON_S3, "s3://cells/source", "s3://cells/prepared", env=s3.env | joined(s3.env))
    assert process.returncode == 0, process.stderr
    assert process.stdout.split()[-1] == str(N)
    written = ["dataset.json", *(f"{split}/part-00000.parquet" for split in sorted(shards.SPLITS))]
    assert s3.names("prepared/") == [f"prepared/{name}" for name in written]
    prepare(source, str(tmp_path / "local"))
    for name in written[1:]:
        assert s3.read(f"prepared/{name}") == (tmp_path / "local" / name).read_bytes()
