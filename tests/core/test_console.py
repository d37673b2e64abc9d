"""Progress on standard error; plain lines if it is not a terminal."""

import pytest

from raylivecell.core import console


@pytest.fixture
def plain_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not console.console.is_terminal
    monkeypatch.setattr(console, "PLAIN_EVERY_S", -1.0)


def test_track_prints_a_line_per_item(plain_at_once: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(console.track("ab", "reading [x]", 2)) == ["a", "b"]
    assert capsys.readouterr().err == "reading [x]: 1/2\nreading [x]: 2/2\n"


def test_total_and_text_may_change(plain_at_once: None, capsys: pytest.CaptureFixture[str]) -> None:
    with console.ProgressBar("a.zip", unit=" bytes") as bar:
        bar.update(3)
        bar.update(5, total=9)
        bar.update(9, text="a.zip, again")
    assert capsys.readouterr().err == "a.zip: 3/? bytes\na.zip: 5/9 bytes\na.zip, again: 9/9 bytes\n"


def test_lines_are_seconds_apart(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(console.track(range(1000), "reading", 1000)) == list(range(1000))
    assert capsys.readouterr().err == ""
