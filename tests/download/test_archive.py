"""Unpacking images.zip, checking zip and JSON files: malicious, oversized, truncated and damaged ones are refused."""

import io
import json
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from download_server import TRAIN, Server, annotations, assert_unpublished, cut, make_zip

from raylivecell.core.errors import UserError
from raylivecell.data import image_names, listing, sources
from raylivecell.download import archive
from raylivecell.download.fetch import DamagedFileError
from raylivecell.download.livecell import download

pytest_plugins = ("download_server",)

IMAGES = [
    "images/livecell_train_val_images/A172/A172_Phase_C7_1_00d00h00m_1.tif",
    "images/livecell_train_val_images/BV2/BV2_Phase_C4_1_00d00h00m_1.tif",
    "images/livecell_test_images/A172_Phase_C7_1_00d04h00m_1.tif",
]


def test_images_and_annotations_for_prepare(server: Server, tmp_path: Path) -> None:
    for split in ("val", "test"):
        server.files[TRAIN.replace("train", split)] = annotations(3)
    others = ["__MACOSX/images/livecell_test_images/._a.tif", "images/.DS_Store", "README.md"]
    server.files["images.zip"] = make_zip([*IMAGES, *others])
    server.script = [cut(200)]
    download(tmp_path, base_url=server.url + "/")
    files = sorted(listing.list_infos(str(tmp_path)))
    assert sorted(IMAGES) == sorted(image_names.find_images(files, None).paths)
    by_split = sources.find_annotations(files, {}, str(tmp_path))
    assert by_split == {split: [TRAIN.replace("train", split)] for split in ("train", "val", "test")}
    assert all((tmp_path / name).read_bytes() == (name * 50).encode() for name in IMAGES)
    assert files == sorted([*IMAGES, "images.zip", "download.json", *(paths[0] for paths in by_split.values())])


def test_missing_or_damaged_images_are_unpacked_again(server: Server, tmp_path: Path) -> None:
    server.files["images.zip"] = make_zip(IMAGES)
    download(tmp_path, ("images",), server.url)
    (tmp_path / IMAGES[0]).unlink()
    (tmp_path / IMAGES[1]).write_bytes(b"0" * (tmp_path / IMAGES[1]).stat().st_size)
    (tmp_path / "images" / "mine.tif").write_bytes(b"mine")
    assert archive.unpack(tmp_path / "images.zip", tmp_path) == (2, 1)
    assert archive.unpack(tmp_path / "images.zip", tmp_path) == (0, 3)
    assert all((tmp_path / name).read_bytes() == (name * 50).encode() for name in IMAGES)
    assert (tmp_path / "images" / "mine.tif").read_bytes() == b"mine"


def test_interrupted_unpacking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No folder `images` until it is complete; the next run does not write the same images again."""
    (tmp_path / "images.zip").write_bytes(make_zip(IMAGES))
    read, members = zipfile.ZipFile.read, []

    def interrupted_read(packed: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
        members.append(member)
        if len(members) == 3:
            raise KeyboardInterrupt
        return read(packed, member)

    monkeypatch.setattr(zipfile.ZipFile, "read", interrupted_read)
    with pytest.raises(KeyboardInterrupt):
        archive.unpack(tmp_path / "images.zip", tmp_path)
    assert not (tmp_path / "images").exists()
    assert archive.unpack(tmp_path / "images.zip", tmp_path) == (1, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "images.zip"]


def add_link(packed: zipfile.ZipFile) -> None:
    member = zipfile.ZipInfo("images/livecell_test_images/link.tif")
    member.external_attr = (stat.S_IFLNK | 0o777) << 16
    packed.writestr(member, "/etc/passwd")


def add(name: str) -> Callable[[zipfile.ZipFile], None]:
    return lambda packed: packed.writestr(name, b"malicious")


@pytest.mark.parametrize(
    ("add_member", "message"),
    [
        (add("../evil.tif"), "leaves the folder"),
        (add("images/livecell_test_images/../../../evil.tif"), "leaves the folder"),
        (add("/evil.tif"), "leaves the folder"),
        (add("C:/evil.tif"), "leaves the folder"),
        (add("images\\..\\..\\evil.tif"), "leaves the folder"),
        (add("other/livecell_test_images/" + Path(IMAGES[2]).name), "two members would be"),
        (add_link, "is a link or device"),
    ],
)
def test_malicious_zips_are_refused(
    add_member: Callable[[zipfile.ZipFile], None], message: str, server: Server, tmp_path: Path
) -> None:
    server.files["images.zip"] = make_zip(IMAGES, add_member)
    with pytest.raises(UserError, match=message):
        download(tmp_path / "out", ("images",), server.url)
    assert_unpublished(tmp_path)
    assert not (tmp_path / "out" / "images").exists()


@pytest.mark.parametrize(("limit", "value"), [("MAX_BYTES", 1000), ("MAX_MEMBERS", 2), ("MAX_MEMBER_BYTES", 100)])
def test_zip_bombs_are_refused(limit: str, value: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "images.zip"
    path.write_bytes(make_zip(IMAGES))
    archive.check_zip(path)
    monkeypatch.setattr(archive, limit, value)
    for use in (archive.check_zip, lambda path: archive.unpack(path, tmp_path)):
        with pytest.raises(UserError, match="more than"):
            use(path)
    assert [path.name for path in tmp_path.iterdir()] == ["images.zip"]


def test_damaged_zips_are_refused(tmp_path: Path) -> None:
    """Truncated anywhere; one bit flipped in any byte of a member."""
    path, body = tmp_path / "images.zip", make_zip(IMAGES)
    for end in (*range(0, len(body), 11), len(body) - 1):
        path.write_bytes(body[:end])
        with pytest.raises(DamagedFileError):
            archive.check_zip(path)
    with zipfile.ZipFile(io.BytesIO(body)) as packed:
        member = packed.infolist()[1]
        start = member.header_offset + 30 + len(member.filename)
    detected = 0
    for at in range(start, start + member.compress_size):
        path.write_bytes(body[:at] + bytes([body[at] ^ 16]) + body[at + 1 :])
        try:
            archive.check_zip(path)
        except DamagedFileError:
            detected += 1
        else:  # deflate has unused bits
            with zipfile.ZipFile(path) as packed:
                assert packed.read(IMAGES[1]) == (IMAGES[1] * 50).encode()
    assert detected >= member.compress_size - 2
    path.write_bytes(make_zip(["a.txt"]))
    with pytest.raises(UserError, match="it is not LIVECell's"):
        archive.check_zip(path)


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1 << 22])
def test_json_truncated_anywhere_is_refused(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "BLOCK", block)
    tricky = {"a": [{"b": 'q"}\\'}, "\\\\", '\\"', "{[", "]}"], 'k"\\': {"": []}, "\u00e9": "\u00e9\n"}
    path, body = tmp_path / "a.json", json.dumps(tricky).encode()
    path.write_bytes(b"\n " + body + b" \n\n")
    archive.check_json(path)
    for end in range(len(body)):
        path.write_bytes(body[:end] + b"\n" * (end % 2))
        with pytest.raises(DamagedFileError):
            archive.check_json(path)
    for wrong in (b"<html></html>", b"[]", b"{}]", b"null", b'{}"a}'):
        path.write_bytes(wrong)
        with pytest.raises(DamagedFileError):
            archive.check_json(path)
