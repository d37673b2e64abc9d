"""Small files that expand to gigabytes and paths that leave a folder are refused; nothing is written outside --out."""

import json
from pathlib import Path

import pytest
from conftest import S3, run_python, write_tiny_dataset
from hostile import refused
from PIL import Image

from raylivecell.core.errors import UserError
from raylivecell.data import image_names, listing, shards

REFUSED = {
    "images": {
        "png of 100,000 x 100,000": "more than",
        "png with a gigabyte too much": "",
        "png with zTXt": "",
        "png with iTXt": "",
        "png with iCCP": "",
        "tiff of 100,000 x 100,000": "more than",
        "tiff with a tile of a gigabyte": "more than",
        "bmp of 100,000 x 100,000": "more than",
        "postscript": "PostScript file",
        "tiff directories in a cycle": "cycle",
        "tiff of 100,000 directories": "over 10000 images",
        "tiff tag of four billion values": "values",
        "tiff with 4000 tags": "contains 2 images",
        "tiff with a long ome description": "read",
        "tiff with a long imagej description": "read",
        "tiff with a jpeg of 65,500 x 65,500": "JPEG strip or tile of 65500",
        "tiff with an lzma dictionary of a gigabyte": "emory",
    },
    "label_bombs": {
        "png of 100,000 x 100,000": "more than",
        "tiff of 100,000 x 100,000": "more than",
        "tiff with a tile of a gigabyte": "more than",
        "npy with a large shape": "more than",
        "npy with a negative shape": "damaged",
        "npy with a deep shape": "damaged",
        "labels in two parts": "read",
    },
    "annotations": {
        "a deep record": "cannot be read",
        "a deep start": "is not a COCO file",
        "deep info": "cannot be read",
        "a long number": "cannot be read",
        "a wide mask": "0 [] ['",
        "a long run": "nor integers",
        "a run without end": "0 [] ['",
        "a far polygon": "0 [] ['",
        "a large polygon": "['",
    },
    "results": {
        "deep": "is not JSON",
        "a deep record": "is not JSON",
        "wide": "its mask is",
        "a long number": "is not JSON",
        "a long run": "neither polygons",
        "two halves": "does not fill",
        "a run without end": "does not fill",
    },
    "recipes": {
        "laughs": "alias *a0",
        "merges": "alias *a",
        "deep": "recursion",
        "a long number": "digits",
        "many levels": "at most 12",
    },
    "datasets": {
        "deep": "is not JSON",
        "a long number": "is not JSON",
        "deep splits": "is not JSON",
        "endless rows": "rows",
        "many rows": "rows",
        "a terabyte of one outline": "dictionary",
        "a row of zeros": "more than",
        "a high image": "cannot reshape",
    },
    "checkpoints": {
        "a packed gigabyte": "is compressed",
        "a deep state": "is not JSON",
        "a long step": "is not JSON",
        "a network of terabytes": "does not contain this recipe's weights",
        "a wide tensor": "does not contain",
        "a long header": "does not contain",
    },
    "unguarded": {"tiff with a tile of a gigabyte": "MemoryError"},
}


@pytest.fixture(scope="module")
def messages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """The message for each bomb, by kind and name."""
    script = Path(__file__).with_name("bombs.py")
    process = run_python(
        f"import runpy, sys; runpy.run_path({str(script)!r}, run_name='__main__')",
        str(tmp_path_factory.mktemp("bombs")),
    )
    assert process.returncode == 0, process.stderr[-2000:]
    return json.loads(process.stdout)


@pytest.mark.parametrize("kind", REFUSED)
def test_bombs_are_refused_in_bounded_memory(kind: str, messages: dict[str, dict[str, str]]) -> None:
    assert messages[kind].keys() == REFUSED[kind].keys()
    for name, part in REFUSED[kind].items():
        assert part in messages[kind][name], f"{name}: {messages[kind][name]}"


@pytest.mark.parametrize(
    "name", ["../x.png", "/etc/x.png", "a/../../x.png", "..", "\\x.png", "c:x.png", "~/x.png", "x\0.png"]
)
def test_names_that_leave_the_folder_are_unsafe(name: str) -> None:
    assert not image_names.is_safe_name(name)


@pytest.mark.parametrize("name", ["x.png", "a/b/x..y.png", "..x.png", "a~/x.png"])
def test_names_inside_the_folder_are_safe(name: str) -> None:
    assert image_names.is_safe_name(name)


LINKS = {
    "to a file elsewhere": ("x.png", "../elsewhere/secret.png"),
    "to a folder elsewhere": ("more", "../elsewhere"),
    "in a cycle": ("again", "."),
    "to a device": ("x.png", "/dev/zero"),
    "to a device, as JSON": ("train.json", "/dev/zero"),
    "to labels elsewhere": ("x_masks.npy", "../elsewhere/secret.png"),
}


@pytest.mark.parametrize("kind", LINKS)
@pytest.mark.parametrize("command", ["predict --checkpoint m.onnx --images", "prepare --source"])
def test_links_out_of_the_folder_are_refused(
    kind: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    link, target = LINKS[kind]
    for path in ("elsewhere/secret.png", "images/a.png"):
        (tmp_path / path).parent.mkdir()
        Image.new("L", (32, 32)).save(tmp_path / path)
    (tmp_path / "m.onnx").write_bytes(b"")
    (tmp_path / "images" / link).symlink_to(target)
    message = refused(
        capsys, command.replace("m.onnx", f"{tmp_path}/m.onnx"), tmp_path / "images", "--out", tmp_path / "o"
    )
    assert f"images/{link} is a link to" in message
    assert not (tmp_path / "o").exists()


def test_links_inside_the_folder_are_followed(tmp_path: Path) -> None:
    """Links inside the folder, and a folder that is itself a link."""
    (tmp_path / "images" / "a").mkdir(parents=True)
    Image.new("L", (32, 32)).save(tmp_path / "images" / "a" / "x.png")
    (tmp_path / "images" / "y.png").symlink_to("a/x.png")
    (tmp_path / "link").symlink_to("images")
    assert sorted(listing.list_infos(str(tmp_path / "link"))) == ["a/x.png", "y.png"]


@pytest.mark.parametrize("key", ["in/../../out.png", "in/a/../../../out.png", "in/.."])
def test_object_store_keys_that_leave_the_folder_are_refused(key: str, s3: S3) -> None:
    """Keys are arbitrary text: appended to a local --out they could lead out of it."""
    s3.client.put_object(Bucket="cells", Key="in/a.png", Body=b"")
    s3.client.put_object(Bucket="cells", Key=key, Body=b"")
    process = run_python("from raylivecell.data import listing; print(listing.list_infos('s3://cells/in'))", env=s3.env)
    assert "a path out of the folder" in process.stderr, process.stdout


@pytest.mark.parametrize(
    "file", ["../x.parquet", "/etc/x.parquet", "train/../../x.parquet", "val/x.parquet", "train/x", 3]
)
def test_shards_outside_their_folder_are_refused(file: str | int, tmp_path: Path) -> None:
    data = Path(write_tiny_dataset(tmp_path, images=1))
    description = json.loads((data / "dataset.json").read_text())
    description["splits"]["train"]["shards"][0]["file"] = file
    (data / "dataset.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match=r"dataset\.json is not what"):
        shards.list_rows(str(data), "train")
