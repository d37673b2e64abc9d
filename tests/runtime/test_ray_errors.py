"""User errors raised in Ray's processes become one line with cause and fix; bugs are raised unchanged."""

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


def from_task(error: Exception) -> Exception:
    """`error` raised in a task, as `ray.get` raises it."""
    text = f"Traceback (most recent call last): ...\n{type(error).__module__}.{type(error).__name__}: {error}"
    wrapped = RayTaskError("function", text, error, actor_id="1")
    return pickle.loads(pickle.dumps(wrapped)).as_instanceof_cause()


def from_data(error: Exception) -> Exception:
    """`error` raised in a function of `map_batches`; it arrives as the text of a traceback."""
    try:
        try:
            raise error
        except Exception as inner:
            raise RayDataUserCodeException("UDF failed to process a data block.") from inner
    except RayDataUserCodeException as outer:
        wrapped = RayTaskError("function", traceback.format_exc(), outer)
    return pickle.loads(pickle.dumps(wrapped))


def from_constructor(error: Exception) -> Exception:
    """`error` raised in an actor's constructor, as the caller receives it."""
    text = f"Traceback (most recent call last): ...\n{type(error).__module__}.{type(error).__name__}: {error}"
    return ActorDiedError(RayTaskError("function", text, error, actor_id="1"))


def from_killed_worker(error: BaseException) -> Exception:
    """Error for a worker that does not respond: Ray Train's class stores the cause in an attribute."""
    failure = RuntimeError("a worker is dead")
    failure.health_check_failure = from_task(error)  # type: ignore[attr-defined]
    return failure


ROUTES = {
    "here": lambda error: error,
    "task": from_task,
    "data": from_data,
    "worker": lambda error: WorkerGroupError("failed", {0: RuntimeError("other"), 1: from_task(error)}),
    "controller": lambda error: ControllerError(from_task(error)),
    "killed worker": lambda error: WorkerGroupError("failed", {0: from_killed_worker(error)}),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("no such file; create one"), "no such file; create one"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/d/a"), "'/d/a'; free space on that disk"),
        (OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), "n" * 999), "use shorter names"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/root"), "change its permissions"),
        (MemoryError("Unable to allocate 9 TiB"), "Unable to allocate 9 TiB; lower batch_size"),
    ],
)
def test_errors_that_the_user_can_fix(route: str, error: Exception, line: str) -> None:
    if route == "data" and isinstance(error, UserError):
        assert ray_errors.explain(from_data(KeyError("name"))) is None
    with pytest.raises(UserError) as raised, ray_errors.as_user_errors():
        raise ROUTES[route](error)
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
        (from_constructor(UserError("no network there; train one")), "no network there; train one"),
        (NodeDiedError("node 1 died"), "node 1 died; see the logs of that node"),
    ],
)
def test_errors_of_ray(error: Exception, line: str) -> None:
    for route in ("here", "controller"):
        assert line in str(ray_errors.explain(ROUTES[route](error)))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("bug", [KeyError("name"), ValueError("shape"), AttributeError("no x"), AssertionError()])
def test_bugs_are_raised_unchanged(route: str, bug: Exception) -> None:
    error = ROUTES[route](bug)
    with pytest.raises(type(error)) as raised, ray_errors.as_user_errors():
        raise error
    assert raised.value is error


def test_a_bug_in_a_constructor_is_not_a_user_error() -> None:
    assert ray_errors.explain(from_constructor(KeyError("name"))) is None


def test_cyclic_causes_end() -> None:
    first, second = ValueError(1), ValueError(2)
    first.__cause__, second.__cause__ = second, first
    assert list(ray_errors.causes(first)) == [first, second]


def test_a_new_pool_replaces_a_dead_actor(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[int]] = []

    def rows(actor: type, arguments: dict, items: list[int], resources: object) -> object:
        calls.append(items)
        yield from ({"item": item} for item in items[: 2 if len(calls) < 3 else None])
        if len(calls) < 3:
            raise ActorDiedError()

    monkeypatch.setattr(actors, "_rows", rows)
    rows_read = [row["item"] for row in actors._every_row(object, {}, list(range(7)), (1, 1, 0))]
    assert (rows_read, [len(items) for items in calls]) == (list(range(7)), [7, 5, 3])
    monkeypatch.setattr(actors, "_rows", lambda *_: (_ for _ in ()).throw(ActorDiedError()))
    with pytest.raises(ActorDiedError):
        list(actors._every_row(object, {}, [1], (1, 1, 0)))
