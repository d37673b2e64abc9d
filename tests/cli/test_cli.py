"""A user error ends a command with one line (cause and fix), exit code 2 and no files; a signal ends it in one line."""

import errno
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
import tyro
from tyro.constructors import ConstructorRegistry

from raylivecell.cli import arguments, main
from raylivecell.core.errors import UserError


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("trian", "no command 'trian'; did you mean train?"),
        ("evalaute --data D", "did you mean evaluate?"),
        ("x", "no command 'x'; the commands are synth,"),
        ("train --data D --out {tmp}/o --recipe {tmp}/none.yaml", "no recipe at {tmp}/none.yaml"),
        ("train --data D --out {tmp}/o --recipe={tmp}/none.yaml", "no recipe at {tmp}/none.yaml"),
        ("sweep --data D --out {tmp}/o --recipe={tmp}/none.yaml", "no recipe at {tmp}/none.yaml"),
        ("train --data D --out {tmp}/o --recipe a.yaml --recipe=b.yaml", "--recipe is given twice"),
        ("train --data D --out {tmp}/o --recipe", "--recipe needs a value"),
        ("train --data D --out {tmp}/o --recipe {tmp}", "is not a recipe file"),
        ("train --data D --out {tmp}/o --recipe {tmp}/binary", "is not a recipe file"),
        ("train --data {tmp}/nowhere --out {tmp}/o", "no dataset at {tmp}/nowhere"),
        ("train --data {tmp}/cut --out {tmp}/o", "dataset.json is not JSON"),
        ("train --data {tmp}/list --out {tmp}/o", "does not describe a dataset"),
        ("train --data {tmp}/nowhere --out {tmp}/o --batch-size 0", "--batch-size: Input should be greater"),
        (
            'train --data {tmp}/nowhere --out {tmp}/o --model.name UNet --model.options {{"strides":[2]}}',
            "no dataset at",
        ),
        ("train --data {tmp}/nowhere --out {tmp}/o --crop 8 8", "at least 16 x 16 pixels"),
        ("train --data {tmp}/nowhere --out {tmp}/o --workers two", "--workers two: give a number"),
        ("train --data {tmp}/nowhere --out {tmp}/o --workers 1:4 --batch-size 4", "a multiple of 12"),
        ("prepare --source {tmp} --out {tmp}/o --shard-images 0", "--shard-images: "),
        ("predict --checkpoint {tmp}/binary --images {tmp} --out {tmp}/o", "{tmp}/binary"),
        ("synth --out s3://bucket/cells", "writes to a local folder"),
        ("demo --out {tmp}/o --images 2 --recipe demo", "the demo needs 8"),
        ("sweep --data {tmp}/nowhere --out {tmp}/o", "no dataset at {tmp}/nowhere"),
        ("synth --out {tmp}/binary", "not a folder but a file: {tmp}/binary; choose another path"),
        ("demo --out {tmp}/binary", "not a folder but a file: {tmp}/binary; choose another path"),
    ],
)
def test_user_errors_are_one_line_with_exit_code_2(
    command: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "binary").write_bytes(bytes(range(128, 256)))
    for name, text in (("cut", '{"format_version": '), ("list", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "dataset.json").write_text(text)
    before = sorted(tmp_path.rglob("*"))
    words = command.format(tmp=tmp_path).split()
    started = ray.is_initialized()
    assert main.main(words) == 2
    assert ray.is_initialized() == started, "reported before Ray is started"
    line = capsys.readouterr().err.strip()
    assert message.format(tmp=tmp_path) in line
    assert line.startswith("raylivecell: ")
    assert "\n" not in line
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture
def every_command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Function that replaces the implementation of every command."""

    def replace(work: Callable[[], object]) -> None:
        for name, (what, _) in list(main.COMMANDS.items()):
            monkeypatch.setitem(main.COMMANDS, name, (what, lambda arguments: work() and 0))

    return replace


@pytest.mark.parametrize(
    ("number", "code", "line"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_ends_every_command_in_one_line(
    number: signal.Signals,
    code: int,
    line: str,
    every_command: Callable[[Callable[[], object]], None],
    unguarded_signals: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    every_command(lambda: os.kill(os.getpid(), number))
    assert main.TO_RESUME.keys() <= main.COMMANDS.keys()
    for name in main.COMMANDS:
        assert main.main([name]) == code
        output = capsys.readouterr().err
        assert output == f"raylivecell: {line}{main.TO_RESUME.get(name, '')}\n"
        assert ("--resume always" in output) == (name in ("train", "sweep"))


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_output_pipe_is_not_an_error(unbuffered: str) -> None:
    command = [sys.executable, "-m", "raylivecell", "train", "--help"]
    reading = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "env": os.environ | {"PYTHONUNBUFFERED": unbuffered},
    }
    with subprocess.Popen(command, **reading) as process:  # type: ignore[call-overload]
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == main.EXIT_READER_GONE


def test_the_sigterm_handler_is_restored_after_a_command(every_command: Callable[[Callable[[], object]], None]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    inside: list[object] = []
    every_command(lambda: inside.append(signal.getsignal(signal.SIGTERM)))
    assert main.main(["check"]) == 0
    assert signal.getsignal(signal.SIGTERM) is before
    assert inside != [before]


def test_debug_shows_the_traceback(
    every_command: Callable[[Callable[[], object]], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/disk/file")

    every_command(full)
    line = "raylivecell: [Errno 28] No space left on device: '/disk/file'; free space on that disk"
    for words in (["train"], ["train", "--debug"], ["--debug", "train"], ["--debug", "submit"]):
        assert main.main(words) == 2
        output = capsys.readouterr().err
        assert output.splitlines()[-1].startswith(line)
        assert ("Traceback" in output) == ("--debug" in words)
    monkeypatch.setenv("RAYLIVECELL_DEBUG", "1")
    assert main.main(["train"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_bug_is_not_a_user_error(every_command: Callable[[Callable[[], object]], None]) -> None:
    def bug() -> None:
        {}["name"]

    every_command(bug)
    with pytest.raises(KeyError):
        main.main(["train"])


@pytest.mark.parametrize("name", main.COMMANDS)
def test_help_does_not_contain_the_line_breaks_of_the_source(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks the texts passed to tyro, which wraps lines itself in the printed help."""
    texts: list[str] = []

    def collect(command: Callable[..., object], registry: ConstructorRegistry, **options: object) -> None:
        parser = tyro.extras.get_parser(command, registry=registry)
        groups = parser._action_groups
        texts.extend(text for text in (parser.description, *(group.description for group in groups)) if text)
        texts.extend(action.help for action in parser._actions if action.help)

    monkeypatch.setattr(tyro, "cli", collect)
    main.main([name, "--help"])
    assert len(texts) > 1
    for text in texts:
        assert not re.search(r"[^\n]\n(?!\n)", text), text


def test_a_resumed_run_uses_its_stored_recipe(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    assert arguments.recipe_file(["--out", str(run), "--resume", "always"]) is None
    (run / "recipe.yaml").write_text("seed: 3\n")
    assert arguments.recipe_file(["--out", str(run), "--resume", "always"]) == str(run / "recipe.yaml")
    assert arguments.recipe_file(["--out", str(run), "--resume=auto"]) == str(run / "recipe.yaml")
    assert arguments.recipe_file(["--out", str(run), "--resume", "never"]) is None
    assert arguments.recipe_file(["--out", str(run)]) is None
    assert arguments.recipe_file([f"--out={run}", "--resume", "always", "--recipe", "other.yaml"]) == "other.yaml"


@pytest.mark.parametrize(
    ("mode", "without_run", "with_run"), [("never", False, False), ("auto", False, True), ("always", True, True)]
)
def test_when_a_run_is_resumed(mode: arguments.Resume, without_run: bool, with_run: bool, tmp_path: Path) -> None:
    assert arguments.resumes(mode, str(tmp_path / "run")) is without_run
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("seed: 3\n")
    assert arguments.resumes(mode, str(tmp_path / "run")) is with_run


@pytest.mark.parametrize(("text", "workers"), [("1", 1), ("4", 4), ("1:4", (1, 4))])
def test_numbers_of_workers_are_parsed(text: str, workers: object) -> None:
    assert arguments.workers_in(text) == workers


@pytest.mark.parametrize("text", ["0", "4:1", "a", "1:2:3", ""])
def test_invalid_numbers_of_workers_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="give a number"):
        arguments.workers_in(text)
