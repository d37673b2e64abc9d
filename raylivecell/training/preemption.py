"""Checkpoints when nodes of the run are about to be removed (spot instances, drained nodes)."""

import time

import ray.train
import ray.train.collective
from ray.train import PreemptionInfo

# Seconds between polls for preemption notices (a node has at least 30), and steps over which a step is timed.
POLL_S, TIMED_STEPS = 2.0, 5


class PreemptionCheckpoint:
    """Requests a checkpoint at each preemption notice.

    A notice is a change of the announced nodes or of their deadline: losing a second node must not cost the steps since
    the first notice. Every rank requests at the same steps, as Ray Train requires. A poll takes some milliseconds, so
    polls are POLL_S apart.
    """

    def __init__(self, start: int) -> None:
        self.start, self.started_at = start, time.monotonic()
        self.interval: int | None = None
        self.last_notice: PreemptionInfo | None = None

    def __call__(self, step: int) -> bool:
        """Whether to save a checkpoint after `step` steps; the same on every rank."""
        done = step - self.start
        if self.interval is None:
            if done < TIMED_STEPS:
                return False
            steps_per_s = done / (time.monotonic() - self.started_at)
            self.interval = ray.train.collective.broadcast_from_rank_zero(max(1, round(POLL_S * steps_per_s)))
        if done % self.interval:
            return False
        notice = ray.train.get_preemption_info()
        is_new = notice is not None and notice != self.last_notice
        self.last_notice = notice
        return is_new
