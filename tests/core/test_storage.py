"""Addresses and storage: files of any name are written and read unchanged on every filesystem."""

import os
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import S3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow.fs import FileSystem

from raylivecell.cli import main
from raylivecell.core import addresses, storage
from raylivecell.core.errors import UserError
from raylivecell.data import listing
from raylivecell.runs import folder as run_folder
from raylivecell.runtime import prometheus

SPECIAL = [*" #?%+&[]=@:;,'\"\\~*\n", "\u00fc", "\u7d30", "%20", "%2F", "?x=1"]
PIECES = st.one_of(st.sampled_from([*SPECIAL, "a", "b", "."]), st.characters(exclude_categories=["C"]))
NAMES = (
    st.lists(PIECES, min_size=1, max_size=12)
    .map("".join)
    .filter(lambda name: name not in (".", "..") and "/" not in name and len(name.encode()) < 200)
)
ROOTS = st.sampled_from(["s3://cells", "s3://cells/a b", "s3://cells/50%/x", "gs://b/a%20b#c?d", "mock:///r"])
OPTIONS = st.sampled_from(["", "?region=eu-west-1", "?endpoint_override=localhost:9000&scheme=http"])


@given(ROOTS, OPTIONS, st.lists(NAMES, min_size=1, max_size=3))
def test_a_joined_name_is_parsed_as_itself(root: str, options: str, names: list[str]) -> None:
    joined = addresses.join(root + options, *names)
    before, after = addresses.split(root + options), addresses.split(joined)
    assert before is not None
    assert after is not None
    assert after.path == "/".join([*([before.path] if before.path else []), *names])
    assert after._replace(path="") == before._replace(path="")
    assert addresses.absolute(joined) == joined
    assert addresses.name(joined) == names[-1]
    assert addresses.relative(joined, root + options) == "/".join(names)
    assert addresses.parent(joined) == addresses.join(addresses.absolute(root + options), *names[:-1])


@given(st.lists(NAMES, min_size=1, max_size=6, unique=True), st.data())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_files_of_all_names_on_a_disk(tmp_path: Path, names: list[str], data: st.DataObject) -> None:
    folder = tmp_path / uuid.uuid4().hex / data.draw(NAMES)
    root = data.draw(st.sampled_from([str(folder), folder.as_uri(), f"file:{folder.as_uri()[7:]}"]))
    for name in names:
        storage.write_bytes(storage.join(root, name), name.encode())
    assert storage.list_names(root) == sorted(names) == sorted(os.listdir(folder))
    assert {name for name in names if name[0] != "."} <= listing.list_infos(root).keys() <= set(names)
    for name in names:
        assert storage.read_bytes(storage.join(storage.absolute(root), name)) == name.encode()
        assert (folder / name).read_bytes() == name.encode()


def test_files_of_all_names_in_an_object_store(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)

    @given(st.lists(NAMES.map(lambda name: name.replace("\n", "")).filter(bool), min_size=1, max_size=4, unique=True))
    @settings(max_examples=25)
    def check(names: list[str]) -> None:
        prefix = uuid.uuid4().hex
        root = f"s3://cells/{prefix}/a b%"
        for name in names:
            storage.write_bytes(storage.join(root, name), name.encode())
        assert s3.names(f"{prefix}/") == sorted(f"{prefix}/a b%/{name}" for name in names)
        assert storage.list_names(root) == sorted(names)
        assert [storage.read_bytes(storage.join(root, name)) for name in names] == [name.encode() for name in names]
        storage.move(storage.join(root, names[0]), storage.join(root, "moved", names[0]))
        assert storage.read_bytes(storage.join(root, "moved", names[0])) == names[0].encode()
        storage.delete(root)

    check()


def test_local_paths_as_users_type_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for typed, expected in {
        "a%20b#c": tmp_path / "a%20b#c",
        "~/x": tmp_path / "home" / "x",
        "~nobody-here/x": tmp_path / "~nobody-here" / "x",
        "file:///a%20b": Path("/a b"),
        "file://localhost/a": Path("/a"),
        "file:/a#b?c=d": Path("/a#b?c=d"),
        "trailing ": tmp_path / "trailing ",
        "/": Path("/"),
    }.items():
        assert storage.open_uri(typed)[1] == storage.absolute(typed) == str(expected)
        assert storage.open_uri(storage.join(typed, "n"))[1] == str(expected / "n")
    with pytest.raises(UserError, match="another machine"):
        storage.open_uri("file://server/a")
    with pytest.raises(UserError, match=r"zelle_\\xfc is not UTF-8"):
        storage.open_uri("zelle_\udcfc")


def test_a_root_is_opened_once(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    first, second = (storage.open_uri(f"s3://cells/{name}")[0] for name in "ab")
    assert first is second
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert storage.open_uri("s3://cells/a")[0] is not first


@pytest.mark.parametrize("root", ["mock:///threads", "/tmp"])
def test_threads_share_the_filesystem_of_a_root(root: str) -> None:
    barrier = threading.Barrier(16)

    def open_together(number: int) -> FileSystem:
        barrier.wait()
        return storage.open_uri(f"{root}/{number}")[0]

    with ThreadPoolExecutor(16) as threads:
        filesystems = list(threads.map(open_together, range(16)))
    assert all(filesystem is filesystems[0] for filesystem in filesystems)


SECRETS = [
    "s3://KEY:hidden@bucket/data",
    "s3://KEY:hid/den@bucket/data",
    "s3://hidden@bucket/data",
    "S3://KEY:hidden@bucket",
    "s3:/KEY:hidden@bucket/data",
    "s3://bucket/data?access_key=KEY&secret_key=hidden",
    "https://bucket.s3.amazonaws.com/data?X-Amz-Credential=KEY&X-Amz-Signature=hidden",
    "abfs://container@account.blob.core.windows.net/data?sv=1&sig=hidden",
    "abfs://container:hidden@account.dfs.core.windows.net/data",
    "gs://bucket/data?access_token=hidden",
]


@pytest.mark.parametrize(
    "command",
    [
        "prepare --source {} --out o",
        "prepare --source s --out={}",
        "train --data {} --out o",
        "sweep --data d --out {} --resume always",
        "evaluate --data d --out o --predictions {}",
        "predict --checkpoint {} --images i --out o",
        "check --data {}",
        "export --checkpoint {} --out m.onnx",
        "submit train --data {} --out s3://cells/runs",
        "submit --env STORE={} train --data s3://cells/data",
        "submit sweep --data s3://cells/data --resume always --out {}",
    ],
)
def test_a_secret_in_a_uri_is_refused_and_not_shown(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for secret in SECRETS:
        assert main.main(command.format(secret).split()) == 2
        captured = capsys.readouterr()
        assert "hid" not in captured.out + captured.err, secret
        assert "AWS_SECRET_ACCESS_KEY" in captured.err
        assert captured.err.count("\n") == 1
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("secret", SECRETS)
def test_a_uri_with_a_secret_is_never_opened(secret: str) -> None:
    for use in (storage.open_uri, storage.absolute, lambda uri: storage.join(uri, "x")):
        with pytest.raises(UserError, match="contains a password or an access key") as refused:
            use(secret)
        assert "hid" not in str(refused.value)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket/a:b@c",
        "s3://bucket/a&token=1",
        "abfs://container@account.dfs.core.windows.net/x",
        "gs://anonymous@bucket/x",
        "hdfs://user@host:9000/x@y",
        "http://head:8265",
        "s3://bucket/x?endpoint_override=localhost:9000&scheme=http",
    ],
)
def test_a_uri_without_a_secret_is_accepted(uri: str) -> None:
    addresses.check_no_secrets(uri)


def test_a_databases_password_goes_into_the_environment() -> None:
    """Ray's dashboard shows the command line of every driver."""
    with pytest.raises(UserError, match="set RAYLIVECELL_STORAGE"):
        addresses.check_arguments(["--storage", "postgresql://cells:hidden@host/db"])
    with pytest.raises(UserError, match="set MLFLOW_TRACKING_USERNAME"):
        addresses.check_arguments(["--mlflow=http://me:hidden@host"])
    addresses.check_arguments(["--storage", "postgresql+pg8000://cells@127.0.0.1:55/db", "--mlflow=http://host:5000"])
    assert addresses.redacted("cannot parse postgresql://a:hid/den@host/db") == "cannot parse postgresql://***@host/db"


def test_only_temporary_files_of_this_project_are_deleted(tmp_path: Path) -> None:
    with storage.writing(tmp_path / "a" / ("n" * 240)):
        (partial,) = (tmp_path / "a").iterdir()
    partial.write_bytes(b"half")
    (tmp_path / "a" / ("n" * 240)).unlink()
    others = [".mine.partial", "x.partial", f"{'ab' * 16}.partial", ".y.1234.partial"]
    for name in others:
        (tmp_path / "a" / name).touch()
    storage.remove_partial_files(tmp_path)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted(others)


def test_a_name_that_is_not_utf8_is_listed_with_the_rest(tmp_path: Path) -> None:
    for name in (b"good.png", b"zelle_\xfc.png", b"d\xfcr/a.png"):
        path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"12")
    infos = listing.list_infos(str(tmp_path))
    assert infos["good.png"].size == 2
    assert "".join(infos).encode()
    assert "good.png" in storage.list_names(tmp_path)


@pytest.mark.parametrize("name", ["zelle_\u00fc", "a b", "50%", "plain"])
def test_ray_gets_a_run_folder_of_any_name(tmp_path: Path, name: str) -> None:
    out = storage.join(str(tmp_path), name)
    options = run_folder.ray_storage(out)
    assert str(Path(options["storage_path"], options["name"])) == out
    assert options["name"].isascii()
    assert prometheus._label(name).isascii()
