"""The folder of a run or a sweep: started with one recipe on one dataset, and resumed only with the same.

recipe.yaml   the recipe; its presence marks the folder as in use
data.json     `shards.provenance` of the dataset
failed.json   why the run ended early, if the user must change something before resuming or restarting it
failed-1/ ... files of failed runs, moved there when another was started in the folder
"""

import itertools
import re
from typing import Any, NamedTuple

from raylivecell.core import addresses, storage
from raylivecell.core.console import console
from raylivecell.core.errors import UserError
from raylivecell.data import shards

RECIPE, DATA, FAILED = "recipe.yaml", "data.json", "failed.json"
SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Ray Train's list of the run's checkpoints."""
WRITTEN = (RECIPE, DATA, FAILED, SNAPSHOT, "metrics.jsonl", "report.html", "tensorboard")
"""Files of a run, besides its checkpoints."""


def holds_run(out: str) -> bool:
    """Whether `out` holds a run."""
    return RECIPE in storage.list_names(out)


def check_resumable(out: str, data: str, resume: bool) -> bool:
    """Whether to resume a run in `out` on the dataset at `data`; a failed run only if `resume`.

    Raises:
        UserError: `out` holds a run and not `resume`; `resume` and no run; the run was started on other data.
    """
    in_use = holds_run(out)
    if in_use and not resume and failure(out) is not None:
        return False
    if resume and not in_use:
        raise UserError(f"nothing to resume at {out}; leave out --resume always to start a run there")
    if in_use and not resume:
        raise UserError(f"{out} holds a run already; choose another --out, or continue it with --resume always")
    if in_use:
        _check_snapshot(storage.join(out, SNAPSHOT))
        old, new = storage.read_json(storage.join(out, DATA)), shards.provenance(data)
        with storage.validating(storage.join(out, DATA), "choose another --out"):
            same, uri = old["sha256"] == new["sha256"], old["uri"]
        if not same:
            raise UserError(f"{out} was started on the dataset at {uri}, and {data} is another; resume it on the first")
    return in_use


def _check_snapshot(uri: str) -> None:
    """Check that Ray's list names checkpoints in the run folder only: Ray reads and deletes the folders it names.

    Ray writes the list in place: a kill may truncate it. It is then deleted, and workers resume from the last complete
    checkpoint in the folder.
    """
    try:
        stack: list[Any] = [storage.read_json(uri)] if storage.exists(uri) else []
    except UserError:
        if storage.read_bytes(uri)[:1] not in (b"", b"{"):  # not a truncated list of Ray's
            raise
        storage.delete(uri)
        console.print(f"{uri} was truncated by a kill; resuming from the last complete checkpoint", soft_wrap=True)
        return
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            name = value.get("checkpoint_dir_name")
            if name is not None and not re.fullmatch(r"checkpoint_[\w.-]+", str(name)):
                raise UserError(f"{uri} names a checkpoint {str(name)[:80]!r}, outside the run; choose another --out")
            value = list(value.values())
        stack += value if isinstance(value, list) else []


def ray_storage(out: str) -> dict[str, Any]:
    """Arguments of Ray's `RunConfig` for the folder `out`: an opened filesystem and plain paths.

    Ray would parse a path as a URI, which fails with a traceback for names that are not ASCII. The run's name becomes a
    label of Ray's metrics, which must be ASCII: for other names the folder is the path, and the run's name is ".".
    """
    name = addresses.name(out)
    filesystem, folder = storage.open_uri(addresses.parent(out) if name.isascii() else out)
    return {"name": name if name.isascii() else ".", "storage_path": folder, "storage_filesystem": filesystem}


def initialise(out: str, data: str, recipe: str) -> None:
    """Mark the folder as in use by `recipe` (YAML) and the dataset at `data`."""
    storage.write_json(storage.join(out, DATA), shards.provenance(data))
    storage.write_bytes(storage.join(out, RECIPE), recipe.encode())


class Failure(NamedTuple):
    """Why a run ended early."""

    reason: str
    saved: int
    """Steps in its last checkpoint; 0: no checkpoint."""


def mark_failed(out: str, failed: Failure) -> None:
    """Record that the run in `out` ended early because of something that the user must change."""
    storage.write_json(storage.join(out, FAILED), failed._asdict())


def failure(out: str) -> Failure | None:
    """Why the run in `out` ended early; None if it did not, or was resumed."""
    uri = storage.join(out, FAILED)
    if not storage.exists(uri):
        return None
    values = storage.read_json(uri)
    with storage.validating(uri, "choose another --out"):
        return Failure(str(values["reason"]), int(values["saved"]))


def reopen(out: str, resume: bool) -> str | None:
    """Prepare the folder of a failed run to be resumed, or clear it for a new run; returns a line about it, if failed.

    Without `resume` the files of the failed run are moved to `failed-1/` in the folder, or the next free number.
    """
    failed = failure(out)
    if failed is None:
        return None
    if resume:
        storage.delete(storage.join(out, FAILED))
        after = f"after step {failed.saved}" if failed.saved else "from the start: it has no checkpoint"
        return f"the run at {out} failed ({failed.reason}); resuming it {after}"
    names = storage.list_names(out)
    number = next(number for number in itertools.count(1) if f"failed-{number}" not in names)
    # The markers of a folder in use and of a failed run last: a kill in between leaves no old files in a free folder.
    written = [name for name in names if name in WRITTEN or name.startswith("checkpoint_")]
    for name in sorted(written, key=lambda name: (name == FAILED, name == RECIPE)):
        _move(storage.join(out, name), storage.join(out, f"failed-{number}", name))
    return f"the run at {out} failed ({failed.reason}); starting again, its files are kept in failed-{number}"


def _move(source: str, target: str) -> None:
    """Move a file, or the files in a folder: object stores have no folders to move."""
    names = storage.list_names(source)
    for name in names:
        _move(storage.join(source, name), storage.join(target, name))
    if names:
        storage.delete(source)
    elif storage.exists(source):
        storage.move(source, target)
