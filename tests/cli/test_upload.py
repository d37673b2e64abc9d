"""Files uploaded with a job, by the rules of git and Ray."""

import os
from pathlib import Path

from raylivecell.cli import upload


def test_each_folder_has_its_rules_and_links_are_followed_once(tmp_path: Path) -> None:
    for name in ("jobs/a.py", "jobs/b.log", "jobs/deep/c.log", "big/x.bin", "keep/x.bin", "y.tmp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(10))
    (tmp_path / ".gitignore").write_text("# not needed by jobs\n\nbig/\n*.tmp  \n[z-a]\n")
    (tmp_path / "jobs" / ".gitignore").write_bytes(b"/b.log\n\xff\n")
    (tmp_path / ".rayignore").write_text("keep\n")
    os.symlink(tmp_path, tmp_path / "jobs" / "loop")
    os.symlink(tmp_path / "nowhere", tmp_path / "broken")
    sizes = upload.sizes(tmp_path, ["*.parquet"])
    assert set(sizes) == {".gitignore", ".rayignore", "jobs/.gitignore", "jobs/a.py", "jobs/deep/c.log"}
    assert sizes["jobs/a.py"] == 10
