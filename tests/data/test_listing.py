"""Listing image folders: hidden files, links of git-annex and DVC, names that are not UTF-8."""

import hashlib
import os
from pathlib import Path

import pytest

from raylivecell.core.errors import UserError
from raylivecell.data.listing import list_folder, show
from raylivecell.data.sources import find_annotations


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    folder.mkdir()
    for name in ("a.png", "train.json"):
        (folder / name).write_bytes(name.encode())
    return folder


def store(root: Path, kind: str, data: bytes) -> Path:
    """Write `data` to a content store with the file name that git-annex, DVC or the Hugging Face cache uses."""
    sha, md5 = hashlib.sha256(data).hexdigest(), hashlib.md5(data, usedforsecurity=False).hexdigest()
    key = f"SHA256E-s{len(data)}--{sha}.png"
    names = {
        "annex": f".git/annex/objects/Wx/9z/{key}/{key}",
        "dvc": f"files/md5/{md5[:2]}/{md5[2:]}",
        "hub": f"blobs/{sha}",
    }
    path = root / names[kind]
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("kind", ["annex", "dvc", "hub"])
@pytest.mark.parametrize("inside", [True, False])
def test_links_to_content_stores_are_followed(
    kind: str, inside: bool, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = store(folder if inside and kind == "annex" else tmp_path / "cache", kind, b"pixels")
    (folder / "b.png").symlink_to(os.path.relpath(target, folder))
    (folder / "gone.png").symlink_to(target.with_name("e" * 40))
    (folder / "notes.txt").symlink_to("/etc/hostname")  # never read
    listing = list_folder(str(folder))
    assert {path: info.size for path, info in listing.infos.items()} == {"a.png": 5, "b.png": 6, "train.json": 10}
    assert list(listing.left_out) == ["gone.png"]
    show(listing, str(folder))
    lines = capsys.readouterr().err.splitlines()
    assert "gone.png (a link to a missing file" in lines[0]
    assert len(lines) == 1 + len(listing.followed)


def test_other_links_are_followed_only_with_follow_links(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere" / "deep" / "x.png").write_bytes(b"")
    (tmp_path / "elsewhere" / "again").symlink_to("..")
    (folder / "more").symlink_to("../elsewhere")
    (folder / "twice").symlink_to("../elsewhere/deep")
    (folder / "circle").symlink_to(".")
    (folder / "one.png").symlink_to("../elsewhere/deep/x.png")
    with pytest.raises(UserError, match="--follow-links"):
        list_folder(str(folder))
    listing = list_folder(str(folder), follow_links=True)
    deep = [path for path in listing.infos if path.endswith("x.png")]
    assert sorted(set(listing.infos) - set(deep)) == ["a.png", "one.png", "train.json"]
    assert len(deep) == 1
    (folder / "zero.png").symlink_to("/dev/zero")
    with pytest.raises(UserError, match="not a file; delete it"):
        list_folder(str(folder), follow_links=True)


@pytest.mark.parametrize(
    "hidden", ["._train.json", ".ipynb_checkpoints/a.png", "__MACOSX/a.png", "x/@eaDir/a.png", ".git/b.png"]
)
def test_hidden_files_are_skipped(hidden: str, folder: Path) -> None:
    (folder / hidden).parent.mkdir(parents=True, exist_ok=True)
    (folder / hidden).write_bytes(b"")
    assert sorted(list_folder(str(folder)).infos) == ["a.png", "train.json"]


def test_names_that_are_not_utf8_are_skipped_with_a_message(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (b"zelle_\xfc.png", b"notes_\xfc.txt"):
        (Path(os.fsdecode(bytes(folder) + b"/" + name))).write_bytes(b"")
    listing = list_folder(str(folder))
    assert sorted(listing.infos) == ["a.png", "train.json"]
    show(listing, str(folder))
    assert "zelle_\\xfc.png (its name is not UTF-8" in capsys.readouterr().err
    assert len(listing.left_out) == 1


def test_annotation_files_by_name_or_by_folder() -> None:
    roboflow = [f"{split}/_annotations.coco.json" for split in ("test", "train", "valid")]
    annotation_files = find_annotations([*roboflow, "train/a.png"], {}, "set")
    assert annotation_files == {"train": roboflow[1:2], "val": roboflow[2:], "test": roboflow[:1]}
    assert find_annotations(["A/test.json", "B/test.json"], {}, "set") == {"test": ["A/test.json", "B/test.json"]}
    with pytest.raises(UserError, match="2 annotation files for test"):
        find_annotations(["test.json", "A/test.json"], {}, "set")
    with pytest.raises(UserError, match="one JSON per image, as LabelMe"):
        find_annotations(["train/a.json", "train/b.json", "train/a.png", "train/b.png"], {}, "set")
    with pytest.raises(UserError, match=r"found instances_default\.json; divide its images with --split"):
        find_annotations(["instances_default.json", "im.png"], {}, "set")


def test_annotation_files_of_a_source_without_splits() -> None:
    def find(*files: str, chosen: str = "") -> list[str]:
        annotation_files = find_annotations(files, {"all": chosen} if chosen else {}, "set", unsplit=True)
        assert list(annotation_files) == ["all"]
        return annotation_files["all"]

    assert find("im.png", "_annotations.coco.json") == ["_annotations.coco.json"]
    assert find("a/instances_default.json", "a/captions_default.json") == ["a/instances_default.json"]
    assert find("B3/annotations.json", "A1/annotations.json") == ["B3/annotations.json", "A1/annotations.json"]
    assert find("a.json", "test/b.json", chosen="test/*.json") == ["test/b.json"]
    with pytest.raises(UserError, match=r"2 JSON files .*; choose with --annotations all PATH"):
        find("a.json", "b.json")
    with pytest.raises(UserError, match="one JSON per image, as LabelMe"):
        find("a.json", "b.json", "a.png", "b.png")
    with pytest.raises(UserError, match=r"has splits \(valid/x.json\): leave out --split"):
        find("valid/x.json", "x.json")
    with pytest.raises(UserError, match="no annotation JSON in set"):
        find("a.png")
