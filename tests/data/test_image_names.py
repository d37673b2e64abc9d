"""Matching names in annotation files with image files: the correct file or none, never the file of another image."""

import unicodedata
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylivecell.data.image_names import Match, find_images, resolve_conflicts

U = "zelle_\u00fc.png"
NFD = unicodedata.normalize("NFD", U)


def resolved(files: list[str], *names: str, split: str = "train", annotation: str = "train.json") -> list[str]:
    """Return the file of each name, "" if none, joined by | if several."""
    folder = find_images(sorted(files), None)
    claims = [(name, split, folder.find(name, split, annotation)) for name in names]
    return ["|".join(paths) for paths in resolve_conflicts(claims)]


@pytest.mark.parametrize(
    ("listed", "file"),
    [
        ("im0.png", "deep/im0.png"),
        ("im0.PNG", "im0.png"),
        (unicodedata.normalize("NFC", U), NFD),
        (NFD, U),
        ("im%200.png", "im 0.png"),
        ("im%200.png", "im%200.png"),
        ("a\\im0.png", "a/im0.png"),
        ("./a//im0.png", "a/im0.png"),
        ("..\\..\\label-studio\\upload\\4\\im0.png", "im0.png"),
        ("C:\\images\\b\\plate1\\im0.png", "plate1/im0.png"),
        ("/srv/b/im0.png", "im0.png"),
        ("https://host.org/bucket/im0.png?X-Amz-Expires=60", "im0.png"),
        ("s3://bucket/a/im0.png", "a/im0.png"),
        ("/data/local-files/?d=a/im0.png", "a/im0.png"),
        ("im0.png", ""),
        ("im0", ""),
        ("..", ""),
    ],
)
def test_a_name_matches_one_file(listed: str, file: str) -> None:
    assert resolved([file or "other.png", "z/im9.png"], listed) == [file]


@pytest.mark.parametrize(
    ("files", "names", "expected"),
    [
        # One name in two folders: ambiguous.
        (["p1/a.png", "p2/a.png"], ["a.png"], ["p1/a.png|p2/a.png"]),
        (["p1/a.png", "p2/a.png"], ["p2/a.png", "p1/a.png"], ["p2/a.png", "p1/a.png"]),
        (["a.png", "copy/a.png"], ["a.png"], ["a.png"]),
        # A missing image does not get the file of another.
        (["well0/im.png"], ["well0/im.png", "well1/im.png"], ["well0/im.png", ""]),
        (["im.png"], ["well0/im.png", "well1/im.png"], ["", ""]),
        (["im.png"], ["im.png", "im.PNG"], ["im.png", ""]),
        (["a%20b.png", "a b.png"], ["a%20b.png", "a b.png"], ["a%20b.png", "a b.png"]),
        (["im.png", "im.PNG"], ["im.Png"], ["im.PNG|im.png"]),
    ],
)
def test_two_images_never_share_a_file(files: list[str], names: list[str], expected: list[str]) -> None:
    assert resolved(files, *names) == expected


def test_folders_of_splits_and_annotation_files_resolve_ambiguity() -> None:
    files = ["images/train/000.png", "images/test/000.png", "images/train/001.png"]
    assert resolved(files, "000.png", split="train") == ["images/train/000.png"]
    assert resolved(files, "000.png", split="test") == ["images/test/000.png"]
    folder = find_images(files, None)
    claims = [(split, folder.find("001.png", split, f"{split}.json")) for split in ("train", "test")]
    assert resolve_conflicts(("001.png", split, match) for split, match in claims) == [("images/train/001.png",), ()]
    # LIVECell's train and val share a folder: a file that both list is a leak, and both get it.
    shared = find_images(["images/livecell_train_val_images/x.tif"], None)
    claims = [(split, shared.find("x.tif", split, f"{split}.json")) for split in ("train", "val")]
    assert [len(paths) for paths in resolve_conflicts(("x.tif", split, match) for split, match in claims)] == [1, 1]
    two = ["A/images/im0.png", "B/images/im0.png"]
    assert resolved(two, "im0.png", annotation="B/train.json") == ["B/images/im0.png"]


PART = st.sampled_from(["a", "B", "b", "\u00fc", "train", "test", "im 1", "im%201"])
PATH = st.lists(PART, min_size=1, max_size=3).map(lambda parts: "/".join(parts) + ".png")


@given(st.lists(PATH, min_size=1, max_size=8, unique=True), st.lists(PATH, max_size=6), st.data())
def test_a_file_matches_its_own_name_and_at_most_one_image(
    files: list[str], others: list[str], data: st.DataObject
) -> None:
    """A complete path matches its file, regardless of other names; no file matches two different names."""
    path = data.draw(st.sampled_from(files))
    names = list(dict.fromkeys([path, *others]))
    matched = resolved([*files, "images/keep"], *names)
    assert path in matched[0].split("|")
    single = [match for match in matched if match and "|" not in match]
    assert len(single) == len(set(single))


@given(PATH)
def test_percent_encoding_and_separators_do_not_matter(path: str) -> None:
    assert resolved([path], quote(path)) == resolved([path], path.replace("/", "\\")) == [path]


def test_a_weaker_match_loses() -> None:
    assert resolve_conflicts([("a", "train", Match(("x",), 2)), ("b", "train", Match(("x",), 0))]) == [(), ("x",)]
