"""Each notice that a node goes away gives a checkpoint, at the same step on every rank."""

from typing import Any

import pytest
from ray.train import PreemptionInfo

from raylivecell.training import worker


def test_every_notice_gives_one_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    first = PreemptionInfo(deadline_ms=1000, preempted_node_to_ranks={"a": [0]})
    both = PreemptionInfo(deadline_ms=1000, preempted_node_to_ranks={"a": [0], "b": [1]})
    sooner = PreemptionInfo(deadline_ms=500, preempted_node_to_ranks={"a": [0], "b": [1]})
    notices: dict[int, Any] = dict.fromkeys(range(10, 30), first)
    notices |= dict.fromkeys(range(30, 40), both) | dict.fromkeys(range(40, 50), sooner)
    notices |= dict.fromkeys(range(60, 70), sooner)  # taken back, and given again
    now = [0]
    monkeypatch.setattr(worker.ray.train, "get_preemption_info", lambda: notices.get(now[0]))
    monkeypatch.setattr(worker.ray.train.collective, "broadcast_from_rank_zero", lambda every: every)
    monkeypatch.setattr(worker, "ASK_S", 0.0)  # at every step
    saves = worker.PreemptionCheckpoint(start=0)
    saved = []
    for now[0] in range(1, 80):
        if saves(now[0]):
            saved.append(now[0])
    assert saved == [10, 30, 40, 60]
