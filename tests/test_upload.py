"""What would be uploaded with a job: the files that git and Ray would take."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylivecell import upload

NAMES = st.sampled_from(["a", "b", "ab", "a.b", "a-b", "[a]", ".a"])
PATHS = st.lists(NAMES, min_size=1, max_size=4).map("/".join)
PART = st.lists(st.sampled_from(["a", "b", ".", "-", "*", "?", "[ab]", "[!a]", "\\*", "\\["]), min_size=1, max_size=3)
PATTERN = st.builds(
    lambda negated, start, parts, end: negated + start + "/".join(parts) + end,
    st.sampled_from(["", "", "", "!"]),
    st.sampled_from(["", "", "/"]),
    st.lists(st.one_of(PART.map("".join), st.just("**")), min_size=1, max_size=3),
    st.sampled_from(["", "", "/"]),
).filter(lambda pattern: not pattern.endswith("**/"))  # here git and pathspec differ


@given(st.lists(PATTERN, max_size=4), st.lists(PATHS, max_size=8))
def test_patterns_are_read_as_git_reads_them(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], paths: list[str]
) -> None:
    pathspec = pytest.importorskip("pathspec", reason="mypy brings it")
    folder = tmp_path_factory.mktemp("tree")
    for path in paths:
        if all(not (folder / parent).is_file() for parent in Path(path).parents) and not (folder / path).exists():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(path)
    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    git = pathspec.GitIgnoreSpec.from_lines(lines)
    expected = {file for file in files if not git.match_file(file)}
    assert set(upload.sizes(folder, lines)) == expected


def test_each_folder_has_its_rules_and_links_are_followed_once(tmp_path: Path) -> None:
    for name in ("jobs/a.py", "jobs/b.log", "jobs/deep/c.log", "big/x.bin", "keep/x.bin", "y.tmp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(10))
    (tmp_path / ".gitignore").write_text("# what no job needs\n\nbig/\n*.tmp  \n[z-a]\n")
    (tmp_path / "jobs" / ".gitignore").write_bytes(b"/b.log\n\xff\n")
    (tmp_path / ".rayignore").write_text("keep\n")
    os.symlink(tmp_path, tmp_path / "jobs" / "loop")
    os.symlink(tmp_path / "nowhere", tmp_path / "broken")
    sizes = upload.sizes(tmp_path, ["*.parquet"])
    assert set(sizes) == {".gitignore", ".rayignore", "jobs/.gitignore", "jobs/a.py", "jobs/deep/c.log"}
    assert sizes["jobs/a.py"] == 10
