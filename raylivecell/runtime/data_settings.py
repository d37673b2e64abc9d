"""Ray Data's settings for the datasets of one call; DataContext and logging of the process are restored after it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray.data import DataContext

from raylivecell.core.process_settings import log_levels
from raylivecell.runtime import ray_internals

# By default Ray Data fails only after 30 minutes without a free CPU.
NO_PROGRESS_TIMEOUT_S = 300


@contextmanager
def data_settings(**values: Any) -> Iterator[None]:
    """Set these fields of DataContext for datasets created inside the block; each dataset keeps its own copy.

    Ray Data's progress bars are off, because this project shows its own; it fails after NO_PROGRESS_TIMEOUT_S without
    progress.
    """
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = NO_PROGRESS_TIMEOUT_S
    for name, value in values.items():
        setattr(context, name, value)
    with DataContext.current(context):
        yield


@contextmanager
def quiet_data() -> Iterator[None]:
    """Let Ray Data log only warnings and errors inside the block: no execution plans, no notice about progress bars."""
    with log_levels({"ray.data": logging.WARNING, ray_internals.PROGRESS_LOGGER: logging.ERROR}):
        yield
