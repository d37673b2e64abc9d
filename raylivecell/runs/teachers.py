"""The teacher of a network: the network whose maps it learned (`train --teacher`). Imports no torch.

RUN/teacher/model.safetensors   copy of the teacher, so that a restarted run does not need the original; also its
                                recipe.yaml and intensity.json
RUN/teacher/teacher.json        its origin
CHECKPOINT/teacher.json         the same
"""

from collections.abc import Mapping

from pydantic import Field

from raylivecell.core import settings, storage
from raylivecell.core.errors import UserError
from raylivecell.runs.parents import MAX_DATASETS, DataRecord, Origin, Record, Text, attribution

TEACHER = "teacher.json"
FOLDER = "teacher"
"""Folder of the teacher in a run."""


class Teacher(Origin):
    """A checkpoint whose maps a network learned."""

    teacher: Text
    """URI given to --teacher."""
    network: Text
    """Description of the network."""
    datasets: tuple[DataRecord, ...] = Field(min_length=1, max_length=MAX_DATASETS)
    """Its training data, then those of the networks that it started or learned from."""


class _File(Record):
    teacher: Teacher


def read(folder: str) -> Teacher | None:
    """The teacher in the folder of a checkpoint, or RUN/teacher; None if it has none.

    Raises:
        UserError: the file is invalid.
    """
    uri = storage.join(folder, TEACHER)
    try:
        values = storage.read_json(uri)
    except FileNotFoundError:
        return None
    return settings.validate(_File, values, uri).teacher


def write(folder: str, teacher: Teacher | None) -> None:
    """Write the teacher's origin into the folder of a checkpoint; nothing without a teacher."""
    if teacher is not None:
        storage.write_json(storage.join(folder, TEACHER), _File(teacher=teacher).model_dump(mode="json"))


def of_run(out: str) -> Teacher | None:
    """The teacher of the run in the folder `out`."""
    return read(storage.join(out, FOLDER))


def store(out: str, files: Mapping[str, bytes], teacher: Teacher | None) -> None:
    """Copy a teacher's files and its origin into the folder of a new run.

    Without a teacher, delete that of a start that was killed before the run was marked as started.
    """
    folder = storage.join(out, FOLDER)
    storage.delete(folder)
    for name, content in files.items():
        storage.write_bytes(storage.join(folder, name), content)
    write(folder, teacher)


def check_same(out: str, stored: Teacher | None, teacher: str | None) -> None:
    """Check that the run `out` with the teacher `stored`, which is resumed, learns from `teacher`, if that is given.

    Raises:
        UserError: it does not.
    """
    origin = stored.teacher if stored else "no teacher"
    if teacher is not None and origin != storage.absolute(teacher):
        raise UserError(
            f"the run at {out} learns from {origin}, not from {teacher}; leave out --teacher to resume it, or choose "
            "another --out"
        )


def describe(teacher: Teacher) -> str:
    """Describe a teacher in one line."""
    return (
        f"learns from {teacher.checkpoint} ({teacher.network}, weights {teacher.sha256[:12]}, step {teacher.step:,}, "
        f"trained on {attribution(teacher.datasets)})"
    )
