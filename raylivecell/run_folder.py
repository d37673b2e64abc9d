"""The folder of a run or a sweep: begun with one recipe on one dataset, and gone on with only by the same.

recipe.yaml   the recipe; that it is there says that the folder is taken
data.json     `shards.provenance` of the dataset
"""

from raylivecell import shards, storage
from raylivecell.errors import UserError

RECIPE, DATA = "recipe.yaml", "data.json"


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
        begun, now = storage.read_json(storage.join(out, DATA)), shards.provenance(data)
        with storage.unverified(storage.join(out, DATA), "choose another --out"):
            same, uri = begun["sha256"] == now["sha256"], begun["uri"]
        if not same:
            raise UserError(f"{out} was begun on the dataset of {uri}, which {data} is not; resume it on that")
    return used


def claim(out: str, data: str, recipe: str) -> None:
    """Take the folder for `recipe` (YAML) and the dataset at `data`."""
    storage.write_json(storage.join(out, DATA), shards.provenance(data))
    storage.write_bytes(storage.join(out, RECIPE), recipe.encode())
