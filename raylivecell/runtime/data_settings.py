"""Ray Data's settings for the datasets of one call; the process's DataContext and logging are restored after it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray.data import DataContext

from raylivecell.core.process_settings import log_levels
from raylivecell.runtime import ray_internals

# Without a free CPU, Ray Data would wait for 30 minutes before it fails.
NO_PROGRESS_TIMEOUT_S = 300


@contextmanager
def data_settings(**values: Any) -> Iterator[None]:
    """Create datasets inside the block with these fields of DataContext; a dataset keeps its own copy of them.

    Ray Data's progress bars are off (we show our own), and it fails after NO_PROGRESS_TIMEOUT_S without progress.
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
    """Ray Data executions inside the block log warnings and errors only: no execution plans, no notice of our bars."""
    with log_levels({"ray.data": logging.WARNING, ray_internals.PROGRESS_LOGGER: logging.ERROR}):
        yield
