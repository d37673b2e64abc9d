"""The command line: commands, exit codes, and errors in one line."""

import difflib
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from raylivecell.cli import commands, recipe_commands
from raylivecell.cli.arguments import call
from raylivecell.core import addresses
from raylivecell.core.errors import UserError, os_error_line
from raylivecell.core.process_settings import LOOPBACK_ONLY, environment
from raylivecell.core.signals import EXIT_INTERRUPTED, EXIT_TERMINATED, Termination, sigterm_as_interrupt
from raylivecell.core.version import __version__


def _typed(function: Callable[..., Any]) -> Callable[[Sequence[str]], int | None]:
    return lambda arguments: call(function, function.__name__, arguments)


COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], int | None]]] = {
    "synth": ("write a LIVECell-shaped dataset of synthetic images", _typed(commands.synth)),
    "download": ("download LIVECell, resumable and verified", commands.download),
    "prepare": ("validate images and annotations, write Parquet shards", commands.prepare),
    "check": ("find what would fail or hang before a run starts", recipe_commands.check),
    "train": ("train a recipe on a prepared dataset", recipe_commands.train),
    "sweep": ("search for a better recipe", recipe_commands.sweep),
    "evaluate": ("score a checkpoint on complete images", _typed(commands.evaluate)),
    "predict": ("segment a folder of images", _typed(commands.predict)),
    "export": ("export a checkpoint as an ONNX or torch.export file", _typed(commands.export)),
    "serve": ("segment images over HTTP, with Ray Serve", _typed(commands.serve)),
    "submit": ("run a stage as a job on a Ray cluster", commands.submit),
    "recipes": ("list the shipped recipes", _typed(commands.recipes)),
    "bench": ("measure one part against its baselines", _typed(commands.bench)),
    "demo": ("run every stage on synthetic cells, in minutes", _typed(commands.demo)),
}
# How to continue after Ctrl-C or SIGTERM.
TO_RESUME = dict.fromkeys(("train", "sweep"), "; resume with --resume always")
TO_RESUME |= dict.fromkeys(("synth", "download", "prepare", "predict"), "; run the same command again to resume")
EXIT_USER_ERROR = 2
EXIT_READER_GONE = 141  # 128 + SIGPIPE
DEBUG_FLAG, DEBUG_VARIABLE = "--debug", "RAYLIVECELL_DEBUG"


def usage() -> str:
    """Text of `raylivecell --help`."""
    lines = [f"  {name:<10}{summary}" for name, (summary, _) in COMMANDS.items()]
    head = f"raylivecell {__version__}: segment living cells with a U-Net trained on Ray"
    notes = [
        "`raylivecell COMMAND --help` lists its flags.",
        f"`raylivecell {DEBUG_FLAG} COMMAND ...`, or {DEBUG_VARIABLE}=1, shows the traceback of an error.",
    ]
    return "\n".join([head, "", "commands:", *lines, "", *notes])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit code: 0 success; 2 an error the user can fix; 130 after Ctrl-C; 141 if the reader of standard output
        has gone; 143 after SIGTERM; of `check`, 1 if a finding has the level fail; of `submit`, that of the job.
    """
    arguments, debug = _without_debug(list(sys.argv[1:] if arguments is None else arguments))
    name = arguments[0] if arguments else ""
    resume = TO_RESUME.get(name, "")
    # Ray reads the variable when a command imports it. If Ray joins a cluster, other machines must be able to reach it.
    loopback = {LOOPBACK_ONLY: "0"} if os.environ.get("RAY_ADDRESS", "local") in ("", "local") else {}
    with sigterm_as_interrupt(f"raylivecell: terminated{resume}") as termination, environment(**loopback):
        try:
            code = _run(name, arguments)
        except BaseException as error:
            if isinstance(error, BrokenPipeError) and _reader_is_gone():
                return EXIT_READER_GONE
            line, code = _end(error, termination, resume)
            if debug:
                traceback.print_exception(error)
            print(f"raylivecell: {addresses.redacted(line)}", file=sys.stderr, flush=True)
            termination.announced = True
        return EXIT_TERMINATED if termination.received else code


def _without_debug(arguments: list[str]) -> tuple[list[str], bool]:
    """Remove --debug; also return whether it or its variable is set. The flags of a submitted stage are unchanged."""
    debug = os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0")
    if arguments[:1] == [DEBUG_FLAG]:
        arguments, debug = arguments[1:], True
    if DEBUG_FLAG not in arguments:
        return arguments, debug
    own_count = len(arguments)
    if arguments[0] == "submit":  # its own flags end where the stage begins
        own_count = next((i for i, word in enumerate(arguments) if i and word in COMMANDS), own_count)
    if DEBUG_FLAG not in arguments[:own_count]:
        return arguments, debug
    return [word for word in arguments[:own_count] if word != DEBUG_FLAG] + arguments[own_count:], True


def _run(name: str, arguments: Sequence[str]) -> int:
    """Run the command `name` and return its exit code."""
    if name in ("", "-h", "--help"):
        print(usage())
        return 0 if name else EXIT_USER_ERROR
    if name == "--version":
        print(__version__)
        return 0
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, 1)
        fix = f"did you mean {nearest[0]}?" if nearest else f"the commands are {', '.join(COMMANDS)}"
        raise UserError(f"no command {name!r}; {fix}")
    addresses.check_arguments(arguments[1:])
    return COMMANDS[name][1](arguments[1:]) or 0


def _reader_is_gone() -> bool:
    """Whether the reader of standard output has gone (`| head`); if so, redirect it to /dev/null."""
    watch = select.poll()
    watch.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in watch.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise Python prints an error when it exits
    return True


def _end(error: BaseException, termination: Termination, resume: str) -> tuple[str, int]:
    """Last line and exit code of a command that raised `error`; raise it again if it is a bug."""
    if isinstance(error, SystemExit) and error.code != signal.SIGTERM:  # from the parser; Ray's handler exits with 15
        raise error
    if termination.received or isinstance(error, SystemExit):
        return f"terminated{resume}", EXIT_TERMINATED
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted{resume}", EXIT_INTERRUPTED
    if isinstance(error, Exception) and (line := _user_error(error)):
        return line, EXIT_USER_ERROR
    raise error


def _user_error(error: Exception) -> str | None:
    """Cause and fix of an error in one line; None if it is a bug."""
    if isinstance(error, NotADirectoryError | FileExistsError) and error.filename:
        path = Path(error.filename)
        if file := next((parent for parent in (path, *path.parents) if parent.is_file()), None):
            return f"not a folder but a file: {file}; choose another path"
    if "pydantic" in sys.modules and (line := _field_error(error)):
        return line
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    if "ray" not in sys.modules:
        return os_error_line(error) if isinstance(error, OSError) else None
    from raylivecell.runtime.ray_errors import explain

    explanation = explain(error)
    return " ".join(str(explanation).split()) if explanation else None


def _field_error(error: Exception) -> str | None:
    """Reason why the value of a flag is invalid, in one line; None for any other error."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return None
    first = error.errors()[0]
    flag = ".".join(str(part) for part in first["loc"]).replace("_", "-")
    message = first["msg"].removeprefix("Value error, ")
    return f"{'--' + flag + ': ' if flag else ''}{message} (got {first['input']!r})"[:300]
