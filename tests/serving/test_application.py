"""What the deployments do when a process dies or has another network, without Ray's processes."""

import asyncio
from typing import Any

import numpy as np
import pytest
import ray

from raylivecell.core.errors import UserError
from raylivecell.serving import api, application
from raylivecell.serving.application import OtherNetworkError, Window


def test_a_batch_with_images_for_two_networks_is_answered_for_the_own_one() -> None:
    windows = [Window(np.full((2, 2), value, np.uint8), name) for value, name in enumerate("abba")]
    maps = application.own_maps(windows, "a", lambda images: [image[None].astype(np.float32) for image in images])
    assert [None if m is None else int(m[0, 0, 0]) for m in maps] == [0, None, None, 3]
    assert application.own_maps(windows, "c", lambda images: 1 / 0) == [None] * 4  # type: ignore[arg-type, return-value]


def answers(outcomes: list[Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """What `_awaited` makes of successive outcomes of a call; waiting takes no time."""
    calls = iter(outcomes)
    clock = [0.0]

    async def sleep(seconds: float) -> None:
        clock[0] += seconds

    async def call() -> Any:
        outcome = next(calls)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(asyncio, "sleep", sleep)
    monkeypatch.setattr(application.time, "monotonic", lambda: clock[0])
    return asyncio.run(application._awaited(call))


def in_process(error: Exception) -> Exception:
    return ray.exceptions.RayTaskError("segment", "traceback", error)


def test_calls_are_repeated_where_that_can_help(monkeypatch: pytest.MonkeyPatch) -> None:
    died = ray.exceptions.ActorDiedError()
    assert answers([died, died, "maps"], monkeypatch) == "maps"
    with pytest.raises(api.UnavailableError, match="lost the process"):
        answers([died] * application.TRIES, monkeypatch)
    replaced = in_process(OtherNetworkError())
    assert answers([replaced] * 20 + ["maps"], monkeypatch) == "maps"
    with pytest.raises(api.UnavailableError, match="is being replaced"):
        answers([replaced] * 200, monkeypatch)
    with pytest.raises(UserError, match="no such channel"):
        answers([in_process(UserError("no such channel"))], monkeypatch)
    with pytest.raises(ray.exceptions.RayTaskError):
        answers([in_process(ZeroDivisionError()), "maps"], monkeypatch)
