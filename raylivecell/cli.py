"""The command line: which commands there are, and how each one's mistakes are told."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro

from raylivecell import __version__, addresses, commands
from raylivecell.errors import UserError


def _typed(function: Callable[..., Any]) -> Callable[[Sequence[str]], int | None]:
    return lambda arguments: tyro.cli(function, prog=f"raylivecell {function.__name__}", args=arguments)


COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], int | None]]] = {
    "synth": ("write a LIVECell-shaped dataset of synthetic images", _typed(commands.synth)),
    "download": ("fetch LIVECell, resumable and checked", commands.download),
    "prepare": ("validate images and annotations, write Parquet shards", commands.prepare),
    "check": ("find what would fail or hang, before anything is spent", commands.check),
    "train": ("train a recipe on a prepared dataset", commands.train),
    "sweep": ("search for a better recipe", commands.sweep),
    "evaluate": ("score a checkpoint on whole images", _typed(commands.evaluate)),
    "predict": ("segment a folder of images", _typed(commands.predict)),
    "export": ("write a checkpoint as ONNX or torch.export", _typed(commands.export)),
    "submit": ("run a stage as a job of a Ray cluster", commands.submit),
    "bench": ("measure a part beside its rivals", _typed(commands.bench)),
    "demo": ("the whole way on cells drawn here, in minutes", _typed(commands.demo)),
}
# After Ctrl-C.
GOES_ON = dict.fromkeys(("train", "sweep"), "; go on with --resume")
GOES_ON |= dict.fromkeys(("synth", "download", "prepare", "predict"), "; the same command goes on")


def usage() -> str:
    """What `raylivecell --help` prints."""
    lines = [f"  {name:<10}{what}" for name, (what, _) in COMMANDS.items()]
    head = f"raylivecell {__version__}: segment living cells with a U-Net trained on Ray"
    return "\n".join([head, "", "commands:", *lines, "", "`raylivecell COMMAND --help` documents a command."])


def _field_error(error: ValueError) -> str | None:
    """What a flag's value was refused for, in one line; none for any other error."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return None
    first = error.errors()[0]
    flag = ".".join(str(part) for part in first["loc"]).replace("_", "-")
    message = first["msg"].removeprefix("Value error, ")
    return f"{'--' + flag + ': ' if flag else ''}{message} (got {first['input']!r})"[:300]


def _line(error: Exception) -> str:
    """An error in one line; where a folder was to be and a file is, that file."""
    if isinstance(error, NotADirectoryError | FileExistsError) and error.filename:
        path = Path(error.filename)
        if file := next((one for one in (path, *path.parents) if one.is_file()), None):
            return f"a file lies where a folder is needed: {file}"
    return " ".join(str(error).split())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit code: 0 done, 2 a mistake that the user can mend, a submitted job's own."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(__version__)
        return 0
    try:
        if arguments[0] not in COMMANDS:
            raise UserError(f"no command {arguments[0]!r}; the commands are {', '.join(COMMANDS)}")
        addresses.check_arguments(arguments[1:])
        return COMMANDS[arguments[0]][1](arguments[1:]) or 0
    except (UserError, OSError) as error:  # a path, a disk, a network: the error names it
        print(f"raylivecell: {addresses.redacted(_line(error))}", file=sys.stderr)
        return 2
    except ValueError as error:
        told = _field_error(error)
        if told is None:
            raise
        print(f"raylivecell: {told}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"raylivecell: interrupted{GOES_ON.get(arguments[0], '')}", file=sys.stderr)
        return 130
