"""Errors that crossed Ray become one line with cause and fix; bugs stay as they are."""

import errno
import os
import pickle
import traceback

import pytest
import ray
from ray.data.exceptions import RayDataUserCodeException
from ray.exceptions import ActorDiedError, NodeDiedError, OutOfDiskError, OutOfMemoryError, RayTaskError
from ray.train import ControllerError, WorkerGroupError

from raylivecell.core.errors import LONGEST, UserError
from raylivecell.inference import actors
from raylivecell.runtime import ray_errors


def crossed(error: Exception) -> Exception:
    """`error` as `ray.get` raises it, after a task has raised it."""
    text = f"Traceback (most recent call last): ...\n{type(error).__module__}.{type(error).__name__}: {error}"
    wrapped = RayTaskError("function", text, error, actor_id="1")
    return pickle.loads(pickle.dumps(wrapped)).as_instanceof_cause()


def of_data(error: Exception) -> Exception:
    """`error` as it arrives after a function of `map_batches` has raised it: as the text of a traceback."""
    try:
        try:
            raise error
        except Exception as inner:
            raise RayDataUserCodeException("UDF failed to process a data block.") from inner
    except RayDataUserCodeException as outer:
        wrapped = RayTaskError("function", traceback.format_exc(), outer)
    return pickle.loads(pickle.dumps(wrapped))


def of_constructor(error: Exception) -> Exception:
    """`error` as it arrives after an actor's constructor has raised it."""
    text = f"Traceback (most recent call last): ...\n{type(error).__module__}.{type(error).__name__}: {error}"
    return ActorDiedError(RayTaskError("function", text, error, actor_id="1"))


def killed(error: BaseException) -> Exception:
    """As Ray Train reports a worker that does not answer: its own class carries the cause in an attribute."""
    failure = RuntimeError("a worker is dead")
    failure.health_check_failure = crossed(error)  # type: ignore[attr-defined]
    return failure


WAYS = {
    "here": lambda error: error,
    "task": crossed,
    "data": of_data,
    "worker": lambda error: WorkerGroupError("failed", {0: RuntimeError("other"), 1: crossed(error)}),
    "controller": lambda error: ControllerError(crossed(error)),
    "killed worker": lambda error: WorkerGroupError("failed", {0: killed(error)}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("no such thing; make one"), "no such thing; make one"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/d/a"), "'/d/a'; free space on that disk"),
        (OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), "n" * 999), "use shorter names"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/root"), "change its permissions"),
        (MemoryError("Unable to allocate 9 TiB"), "Unable to allocate 9 TiB; lower batch_size"),
    ],
)
def test_what_the_user_can_fix(way: str, error: Exception, line: str) -> None:
    if way == "data" and isinstance(error, UserError):
        assert ray_errors.explain(of_data(KeyError("name"))) is None
    with pytest.raises(UserError) as raised, ray_errors.as_user_errors():
        raise WAYS[way](error)
    text = str(raised.value)
    assert line in text
    assert "\n" not in text
    assert "Traceback" not in text
    assert len(text) < 2 * LONGEST
    assert not isinstance(raised.value, ray.exceptions.RayError)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OutOfDiskError("Local disk is full\nThe object cannot be created."), "Local disk is full; free space there"),
        (OutOfMemoryError("Task was killed due to the node running low on memory.\nMore"), "memory; lower batch_size"),
        (ActorDiedError(), "see Ray's logs"),
        (of_constructor(UserError("no network there; train one")), "no network there; train one"),
        (NodeDiedError("node 1 died"), "node 1 died; see the logs of that node"),
    ],
)
def test_errors_of_ray(error: Exception, line: str) -> None:
    for way in ("here", "controller"):
        assert line in str(ray_errors.explain(WAYS[way](error)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bug", [KeyError("name"), ValueError("shape"), AttributeError("no x"), AssertionError()])
def test_bugs_stay_as_they_are(way: str, bug: Exception) -> None:
    error = WAYS[way](bug)
    with pytest.raises(type(error)) as raised, ray_errors.as_user_errors():
        raise error
    assert raised.value is error


def test_a_bug_in_a_constructor_is_no_user_error() -> None:
    assert ray_errors.explain(of_constructor(KeyError("name"))) is None


def test_causes_that_refer_to_each_other_end() -> None:
    one, other = ValueError(1), ValueError(2)
    one.__cause__, other.__cause__ = other, one
    assert list(ray_errors.causes(one)) == [one, other]


def test_a_new_pool_takes_the_place_of_a_dead_actor(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[int]] = []

    def rows(actor: type, arguments: dict, items: list[int], resources: object) -> object:
        given.append(items)
        yield from ({"item": item} for item in items[: 2 if len(given) < 3 else None])
        if len(given) < 3:
            raise ActorDiedError()

    monkeypatch.setattr(actors, "_rows", rows)
    found = [row["item"] for row in actors._every_row(object, {}, list(range(7)), (1, 1, 0))]
    assert (found, [len(items) for items in given]) == (list(range(7)), [7, 5, 3])
    monkeypatch.setattr(actors, "_rows", lambda *_: (_ for _ in ()).throw(ActorDiedError()))
    with pytest.raises(ActorDiedError):
        list(actors._every_row(object, {}, [1], (1, 1, 0)))
