"""All uses of private names of Ray, with the reason, the measured gain and the effect without it.

No other file may use `ray._private`, `ray.*._internal`, `ray._common` or an attribute of Ray with a leading
underscore. Private names may change in any release of Ray. If one is missing, the program works without it, only
slower, and logs one warning. tests/runtime/test_ray_internals.py has a test for each entry, which fails on such a
release.

| entry | reason | gain | without it |
|---|---|---|---|
| `scheduler_pace` | Ray Data's scheduler never sleeps | training on 2 cores twice as fast | half the speed |
| `data_parallel_trainer` | the public trainer imports torch | 1.7 s of a run's start | TorchTrainer, the same results |
| `PROGRESS_LOGGER` | a warning about progress bars | one line of output less | the warning is shown |
| `EXECUTION_LOGGER` | an error that is also raised | one line of output less | the error is shown twice |
"""

import functools
import importlib
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LOG = logging.getLogger(__name__)

# Minimum time between two rounds of Ray Data's scheduler, seconds: with and without blocks ready to be read.
ROUND_READY_S, ROUND_WAITING_S = 0.05, 0.02

PROGRESS_LOGGER = "ray.data._internal.progress"
"""Ray Data's logger that warns at each execution that its progress bars are off."""

EXECUTION_LOGGER = "ray.data._internal.execution.streaming_executor_state"
"""Ray Data's logger of task errors that end an execution and are also raised."""


@functools.cache
def _warn_missing(entry: str, consequence: str) -> None:
    """Log once that an entry does not work with this release of Ray."""
    import ray

    LOG.warning(
        "raylivecell.runtime.ray_internals.%s does not work with Ray %s: %s", entry, ray.__version__, consequence
    )


def _executor_state() -> Any:
    """Module of Ray Data with the constant for the longest wait of a scheduler round."""
    return importlib.import_module("ray.data._internal.execution.streaming_executor_state")


def _callback_base() -> type:
    """Base class of `DataContext.custom_execution_callback_classes`."""
    module = importlib.import_module("ray.data._internal.execution.execution_callback")
    base: type = module.ExecutionCallback
    return base


def blocks_ready(executor: Any) -> bool:
    """Whether an execution has blocks ready to be read."""
    return bool(executor._output_node[1].output_queue)


class SchedulerThrottle:
    """Callback of Ray Data that lets the scheduler of one execution sleep between two rounds."""

    def __init__(self) -> None:
        self.last = 0.0

    def on_execution_step(self, executor: Any) -> None:
        """Sleep for the rest of the round."""
        try:
            pause = ROUND_READY_S if blocks_ready(executor) else ROUND_WAITING_S
        except (AttributeError, IndexError, TypeError):
            _warn_missing("scheduler_pace", "all rounds have one length; data may arrive more slowly")
            pause = ROUND_WAITING_S
        time.sleep(max(0.0, self.last + pause - time.monotonic()))
        self.last = time.monotonic()


class _Wait:
    """Shortens the scheduler's longest wait while at least one stream is open in this process."""

    NAME = "WAIT_FOR_TASK_COMPLETION_TIMEOUT_S"

    def __init__(self) -> None:
        self.lock, self.open, self.previous = threading.Lock(), 0, 0.0

    @contextmanager
    def shortened(self) -> Iterator[None]:
        state = _executor_state()
        with self.lock:
            if self.open == 0:
                self.previous = getattr(state, self.NAME)
                setattr(state, self.NAME, ROUND_WAITING_S)
            self.open += 1
        try:
            yield
        finally:
            with self.lock:
                self.open -= 1
                if self.open == 0:
                    setattr(state, self.NAME, self.previous)


_wait = _Wait()


@functools.cache
def _throttle() -> type:
    """SchedulerThrottle as a subclass of Ray Data's callback class."""
    return type("SchedulerThrottle", (SchedulerThrottle, _callback_base()), {})


@contextmanager
def scheduler_pace() -> Iterator[list[Any]]:
    """Slow down Ray Data's scheduler, a thread of the reading process, while a stream is open.

    Yields the value for `DataContext.custom_execution_callback_classes`; restores Ray's wait at the end.

    Reason (Ray 2.60): once all its tasks have ended, the scheduler loops without a pause, with the GIL for 84 % of the
    time; training on two cores ran at half its speed. While tasks run, a round waits for all of them, for up to 0.1 s,
    and a finished task is replaced two rounds later: with tasks of 0.2 s, half of the cores' time was idle. Without it
    (an empty list): slower, with the same batches.
    """
    try:
        throttle, wait = _throttle(), _wait.shortened()
        wait.__enter__()
    except (ImportError, AttributeError):
        _warn_missing("scheduler_pace", "training may run at half its speed")
        yield []
        return
    try:
        yield [throttle]
    finally:
        wait.__exit__(None, None, None)


def data_parallel_trainer() -> Any:
    """Constructor of a trainer of Ray Train: (training function, *, backend_config, scaling_config, ...) -> trainer.

    Reason (Ray 2.60): the public `ray.train.torch.TorchTrainer` imports torch into the driver and into Ray Train's
    controller before any worker starts: 1.7 s of each start. Its base class does not, but its path is not part of Ray's
    public API (`ray.train.v2`; the class at `ray.train.data_parallel_trainer` is still that of version 1).
    Without it: TorchTrainer, with the same results.
    """
    try:
        return importlib.import_module("ray.train.v2.api.data_parallel_trainer").DataParallelTrainer
    except (ImportError, AttributeError):
        _warn_missing("data_parallel_trainer", "a run starts about 2 s later")
        return _torch_trainer


def _torch_trainer(function: Any, *, backend_config: Any, **options: Any) -> Any:
    from ray.train.torch import TorchConfig, TorchTrainer

    # TorchTrainer creates the process group itself: with gloo, unless the configuration sets another backend.
    config = backend_config if isinstance(backend_config, TorchConfig) else TorchConfig(backend="gloo")
    return TorchTrainer(function, torch_config=config, **options)
