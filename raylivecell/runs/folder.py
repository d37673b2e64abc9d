"""The folder of a run or a sweep: begun with one recipe on one dataset, and gone on with only by the same.

recipe.yaml   the recipe; that it is there says that the folder is taken
data.json     `shards.provenance` of the dataset
failed.json   why the run ended early, where the user must change something: it is resumed, or started again
failed-1/ ... files of runs that failed, before another was started in the folder
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
"""What a run writes, besides its checkpoints."""


def holds_run(out: str) -> bool:
    """Whether `out` holds a run."""
    return RECIPE in storage.list_names(out)


def check_resumable(out: str, data: str, resume: bool) -> bool:
    """Whether a run in `out` is resumed, on the dataset at `data`; a run that failed is not, unless that is asked for.

    Raises:
        UserError: one is there that nobody asked to resume; none is there to resume; it was begun on other data.
    """
    used = holds_run(out)
    if used and not resume and failure(out) is not None:
        return False
    if resume and not used:
        raise UserError(f"nothing to resume at {out}; leave out --resume always to start a run there")
    if used and not resume:
        raise UserError(f"{out} holds a run already; choose another --out, or continue it with --resume always")
    if used:
        _check_snapshot(storage.join(out, SNAPSHOT))
        begun, now = storage.read_json(storage.join(out, DATA)), shards.provenance(data)
        with storage.validating(storage.join(out, DATA), "choose another --out"):
            same, uri = begun["sha256"] == now["sha256"], begun["uri"]
        if not same:
            raise UserError(f"{out} was begun on the dataset of {uri}, which {data} is not; resume it on that")
    return used


def _check_snapshot(where: str) -> None:
    """UserError where Ray's list names a folder elsewhere: by these names it reads checkpoints and deletes old ones.

    Ray writes the list in place: a kill may leave half of it. It is deleted then, and workers take the last complete
    checkpoint of the folder.
    """
    try:
        left: list[Any] = [storage.read_json(where)] if storage.exists(where) else []
    except UserError:
        if storage.read_bytes(where)[:1] not in (b"", b"{"):  # nothing that Ray began to write
            raise
        storage.delete(where)
        console.print(f"{where} was cut off by a kill; resuming from the last complete checkpoint", soft_wrap=True)
        return
    while left:
        value = left.pop()
        if isinstance(value, dict):
            name = value.get("checkpoint_dir_name")
            if name is not None and not re.fullmatch(r"checkpoint_[\w.-]+", str(name)):
                raise UserError(f"{where} names a checkpoint {str(name)[:80]!r}, outside the run; choose another --out")
            value = list(value.values())
        left += value if isinstance(value, list) else []


def ray_storage(out: str) -> dict[str, Any]:
    """The folder `out` as Ray's `RunConfig` takes it: an opened filesystem and plain paths.

    Ray would parse a path as a URI, which a name that is not ASCII ends with a traceback. The run's name is a label of
    Ray's metrics, which are ASCII: a folder of another name is the path, and the name is ".", the same folder.
    """
    name = addresses.name(out)
    filesystem, folder = storage.open_uri(addresses.parent(out) if name.isascii() else out)
    return {"name": name if name.isascii() else ".", "storage_path": folder, "storage_filesystem": filesystem}


def initialise(out: str, data: str, recipe: str) -> None:
    """Take the folder for `recipe` (YAML) and the dataset at `data`."""
    storage.write_json(storage.join(out, DATA), shards.provenance(data))
    storage.write_bytes(storage.join(out, RECIPE), recipe.encode())


class Failure(NamedTuple):
    """Why a run ended early."""

    reason: str
    saved: int
    """Steps in its last checkpoint; 0: it has none."""


def mark_failed(out: str, failed: Failure) -> None:
    """Note that the run in `out` ended early by something that the user must change."""
    storage.write_json(storage.join(out, FAILED), failed._asdict())


def failure(out: str) -> Failure | None:
    """Why the run in `out` ended early; none where it did not, or was resumed."""
    where = storage.join(out, FAILED)
    if not storage.exists(where):
        return None
    values = storage.read_json(where)
    with storage.validating(where, "choose another --out"):
        return Failure(str(values["reason"]), int(values["saved"]))


def reopen(out: str, resume: bool) -> str | None:
    """Make the folder of a failed run ready to be resumed, or else empty for a new run; what is done, in one line.

    Files of a failed run that is not resumed are moved to `failed-1/` in the folder, or the next free number.
    """
    failed = failure(out)
    if failed is None:
        return None
    if resume:
        storage.delete(storage.join(out, FAILED))
        after = f"after step {failed.saved}" if failed.saved else "from the start: it has no checkpoint"
        return f"the run at {out} failed ({failed.reason}); resuming it {after}"
    names = storage.list_names(out)
    number = next(one for one in itertools.count(1) if f"failed-{one}" not in names)
    # Last what says that the folder is taken, and by a failed run: a kill in between leaves no old files in a free one.
    written = [one for one in names if one in WRITTEN or one.startswith("checkpoint_")]
    for name in sorted(written, key=lambda one: (one == FAILED, one == RECIPE)):
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
