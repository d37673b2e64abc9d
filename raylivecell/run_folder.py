"""The folder of a run or a sweep: begun with one recipe on one dataset, and gone on with only by the same.

recipe.yaml   the recipe; that it is there says that the folder is taken
data.json     `shards.provenance` of the dataset
"""

import re
from typing import Any

from raylivecell import addresses, shards, storage
from raylivecell.errors import UserError

RECIPE, DATA = "recipe.yaml", "data.json"
SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Ray Train's list of the run's checkpoints."""


def holds_run(out: str) -> bool:
    """Whether `out` holds a run."""
    return RECIPE in storage.list_names(out)


def goes_on(out: str, data: str, resume: bool) -> bool:
    """Whether a run in `out` is gone on with on the dataset at `data`.

    Raises:
        UserError: one is there that nobody asked to resume; none is there to resume; it was begun on other data.
    """
    used = holds_run(out)
    if resume and not used:
        raise UserError(f"nothing to resume at {out}; leave --resume away to start there")
    if used and not resume:
        raise UserError(f"{out} holds a run already; choose another --out, or continue it with --resume")
    if used:
        _check_snapshot(storage.join(out, SNAPSHOT))
        begun, now = storage.read_json(storage.join(out, DATA)), shards.provenance(data)
        with storage.unverified(storage.join(out, DATA), "choose another --out"):
            same, uri = begun["sha256"] == now["sha256"], begun["uri"]
        if not same:
            raise UserError(f"{out} was begun on the dataset of {uri}, which {data} is not; resume it on that")
    return used


def _check_snapshot(where: str) -> None:
    """UserError where Ray's list names a folder elsewhere: by these names it reads checkpoints and deletes old ones."""
    left: list[Any] = [storage.read_json(where)] if storage.exists(where) else []
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


def claim(out: str, data: str, recipe: str) -> None:
    """Take the folder for `recipe` (YAML) and the dataset at `data`."""
    storage.write_json(storage.join(out, DATA), shards.provenance(data))
    storage.write_bytes(storage.join(out, RECIPE), recipe.encode())
