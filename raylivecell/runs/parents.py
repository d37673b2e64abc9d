"""The parents of a fine-tuned network: the checkpoints from which its training started. Imports no torch.

    RUN/parent/model.safetensors   copy of the parent's weights, so that a restarted run does not need the parent
    RUN/parent/parents.json        the chain of parents
    CHECKPOINT/parents.json        the same

The chain begins with the parent and ends with a network that was trained from random weights.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from raylivecell.core import settings, storage
from raylivecell.core.errors import UserError
from raylivecell.runs.progress import MODEL
from raylivecell.targets.registry import Targets

PARENTS = "parents.json"
FOLDER = "parent"
"""Folder of the parent's weights in a run."""
MAX_PARENTS = 100
"""Maximum length of a chain."""
MAX_DATASETS = 1000
"""Maximum number of datasets behind a teacher."""


Text = Annotated[str, AfterValidator(lambda text: text[:10_000])]
"""Text of a file that is not trusted: the first 10,000 characters."""


class Record(BaseModel):
    """Part of a JSON file that is not trusted: no other fields are accepted."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DataRecord(Record):
    """Name, licence, citation and SHA-256 of a dataset."""

    name: Text
    licence: Text
    citation: Text
    sha256: Text

    @classmethod
    def of(cls, data: Mapping[str, str]) -> "DataRecord":
        """Build from `checkpoint.own_data`."""
        return cls(**{name: data[name] for name in cls.model_fields})


class Origin(Record):
    """A checkpoint that a training uses."""

    checkpoint: Text
    """Its URI: of a run, its best checkpoint."""
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """SHA-256 of its model.safetensors."""
    step: int = Field(ge=0)
    """Steps of its training."""


class Parent(Origin):
    """A checkpoint from which a training started."""

    start_from: Text
    """URI given to --start-from."""
    targets: Targets
    data: DataRecord
    """Its training data."""
    teacher_data: tuple[DataRecord, ...] = Field((), max_length=MAX_DATASETS)
    """Training data behind its teacher (runs/teachers.py), if it had one."""
    loaded: float = Field(ge=0, le=1)
    """Fraction of the child's weights that were loaded from it."""
    new_layers: tuple[Text, ...] = ()
    """Layers of the child that started from random weights."""


class _Chain(Record):
    parents: tuple[Parent, ...] = Field(max_length=MAX_PARENTS)


def read(folder: str) -> tuple[Parent, ...]:
    """The chain of parents in the folder of a checkpoint, or RUN/parent; empty if it has none.

    Raises:
        UserError: the file is not a valid chain.
    """
    uri = storage.join(folder, PARENTS)
    try:
        values = storage.read_json(uri)
    except FileNotFoundError:
        return ()
    return settings.validate(_Chain, values, uri).parents


def write(folder: str, chain: Sequence[Parent]) -> None:
    """Write the chain into the folder of a checkpoint; nothing if it is empty."""
    if chain:
        storage.write_json(storage.join(folder, PARENTS), _Chain(parents=tuple(chain)).model_dump(mode="json"))


def of_run(out: str) -> tuple[Parent, ...]:
    """The chain of parents of the run in the folder `out`."""
    return read(storage.join(out, FOLDER))


def check_same(out: str, chain: Sequence[Parent], start_from: str | None) -> None:
    """Check that the run `out` with this chain, which is resumed, started from `start_from`, if that is given.

    Raises:
        UserError: it did not.
    """
    origin = chain[0].start_from if chain else "random weights"
    if start_from is not None and origin != storage.absolute(start_from):
        raise UserError(
            f"the run at {out} started from {origin}, not from {start_from}; leave out --start-from to resume it, or "
            "choose another --out"
        )


def store(out: str, weights: bytes, chain: Sequence[Parent]) -> None:
    """Copy a parent's weights, the content of its model.safetensors, and the chain into the folder of a new run.

    Without a chain, delete those of a start that was killed before the run was marked as started.
    """
    folder = storage.join(out, FOLDER)
    storage.delete(folder)
    if chain:
        storage.write_bytes(storage.join(folder, MODEL), weights)
        write(folder, chain)


def datasets(chain: Sequence[Parent]) -> tuple[DataRecord, ...]:
    """The training data of the parents and behind their teachers, without repetition."""
    return tuple(dict.fromkeys(data for parent in chain for data in (parent.data, *parent.teacher_data)))


def attribution(records: Iterable[DataRecord]) -> str:
    """The licences of datasets in one line: `LIVECell (CC BY-NC 4.0)`."""
    return "; ".join(dict.fromkeys(f"{data.name} ({data.licence})" for data in records))


def describe(parent: Parent) -> str:
    """Describe a parent in one line."""
    new = f"; new layers: {shorten(parent.new_layers)}" if parent.new_layers else ""
    return (
        f"started from {parent.checkpoint} (weights {parent.sha256[:12]}, step {parent.step:,}, trained on "
        f"{parent.data.name}, licence {parent.data.licence}); {100 * parent.loaded:.4g} % of the weights fit{new}"
    )


def shorten(names: Sequence[str], shown: int = 5) -> str:
    """List the first names, and the number of the others."""
    others = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + others
