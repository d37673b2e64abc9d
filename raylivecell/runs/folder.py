"""The folder of a run or a sweep: started with one recipe on one dataset, and resumed only with these.

recipe.yaml   the recipe; its presence marks the folder as in use
data.json     `combined.provenance` of the dataset
parent/       weights of the network from which the training started, if any (runs/parents.py)
teacher/      the network whose maps the training learns, if any (runs/teachers.py)
failed.json   why the run ended early, if the user must change something before resuming or restarting it
failed-1/ ... files of failed runs, moved there when a new run started in the folder
"""

import itertools
import re
from typing import Any, NamedTuple

from raylivecell.core import addresses, storage
from raylivecell.core.console import console
from raylivecell.core.errors import UserError
from raylivecell.data import combined
from raylivecell.data.combined import Data
from raylivecell.runs import parents, teachers

RECIPE, DATA, FAILED = "recipe.yaml", "data.json", "failed.json"
SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Ray Train's list of the run's checkpoints."""
WRITTEN = (
    *(RECIPE, DATA, FAILED, SNAPSHOT, "metrics.jsonl", "report.html", "tensorboard", parents.FOLDER, teachers.FOLDER),
)
"""Files of a run, besides its checkpoints."""


def holds_run(out: str) -> bool:
    """Whether the folder `out` contains a run."""
    return RECIPE in storage.list_names(out)


def check_resumable(out: str, data: Data, resume: bool) -> bool:
    """Whether to resume the run in `out`; False for a new run, and for a failed one without `resume`.

    Raises:
        UserError: `out` contains a run, without `resume`; no run to resume; a run on a dataset other than `data`.
    """
    in_use = holds_run(out)
    if in_use and not resume and failure(out) is not None:
        return False
    if resume and not in_use:
        raise UserError(f"no run to resume at {out}; omit --resume always to start one there")
    if in_use and not resume:
        raise UserError(f"{out} already contains a run; choose another --out, or resume it with --resume always")
    if in_use:
        _check_snapshot(storage.join(out, SNAPSHOT))
        old, new = storage.read_json(storage.join(out, DATA)), combined.provenance(data)
        with storage.validating(storage.join(out, DATA), "choose another --out"):
            same, uri = old["sha256"] == new["sha256"], old["uri"]
        if not same:
            weights = " or with other --data-weights" if "," in f"{data}{uri}" else ""
            raise UserError(f"{out} was started on another dataset, {uri}, not {data}{weights}; resume it on the first")
    return in_use


def _check_snapshot(uri: str) -> None:
    """Check that Ray's list refers to checkpoints in the run folder only: Ray reads and deletes the listed folders.

    Ray writes the list in place, so a kill may truncate it. A truncated list is deleted, and workers resume from the
    latest complete checkpoint in the folder.
    """
    try:
        stack: list[Any] = [storage.read_json(uri)] if storage.exists(uri) else []
    except UserError:
        if storage.read_bytes(uri)[:1] not in (b"", b"{"):  # not Ray's list, truncated
            raise
        storage.delete(uri)
        console.print(f"{uri} was truncated by a kill; resuming from the latest complete checkpoint", soft_wrap=True)
        return
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            name = value.get("checkpoint_dir_name")
            if name is not None and not re.fullmatch(r"checkpoint_[\w.-]+", str(name)):
                raise UserError(f"{uri} lists a checkpoint outside the run, {str(name)[:80]!r}; choose another --out")
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


def initialise(out: str, data: Data, recipe: str) -> None:
    """Mark the folder as in use by `recipe` (YAML) and the dataset at `data`."""
    storage.write_json(storage.join(out, DATA), combined.provenance(data))
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
    """Prepare the folder of a failed run for resuming or for a new run; returns a message, None if no run failed.

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
    # recipe.yaml and failed.json last: if killed in between, the folder is still marked as in use by a failed run.
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
