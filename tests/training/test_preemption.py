"""Each preemption notice requests one checkpoint, at the same step on every rank."""

from typing import Any

import pytest
from ray.train import PreemptionInfo

from raylivecell.training import preemption


def test_each_new_notice_requests_one_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    first = PreemptionInfo(deadline_ms=1000, preempted_node_to_ranks={"a": [0]})
    both = PreemptionInfo(deadline_ms=1000, preempted_node_to_ranks={"a": [0], "b": [1]})
    sooner = PreemptionInfo(deadline_ms=500, preempted_node_to_ranks={"a": [0], "b": [1]})
    notices: dict[int, Any] = dict.fromkeys(range(10, 30), first)
    notices |= dict.fromkeys(range(30, 40), both) | dict.fromkeys(range(40, 50), sooner)
    notices |= dict.fromkeys(range(60, 70), sooner)  # withdrawn, then repeated
    now = [0]
    monkeypatch.setattr(preemption.ray.train, "get_preemption_info", lambda: notices.get(now[0]))
    monkeypatch.setattr(preemption.ray.train.collective, "broadcast_from_rank_zero", lambda interval: interval)
    monkeypatch.setattr(preemption, "POLL_S", 0.0)  # poll at every step
    checkpoint_requested = preemption.PreemptionCheckpoint(start=0)
    saved = []
    for now[0] in range(1, 80):
        if checkpoint_requested(now[0]):
            saved.append(now[0])
    assert saved == [10, 30, 40, 60]
