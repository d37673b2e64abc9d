"""Settings of the whole process, changed inside a `with` block and restored after it: a notebook keeps its own.

Where a setting must outlast the call, it is made in a process that this package starts (a task, an actor, a training
worker), never in the caller's.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

# Ray's own variable that keeps a Ray started here on 127.0.0.1, if it is "0" when Ray is imported, as on macOS; on
# Linux it would listen on all interfaces.
LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


@contextmanager
def environment(**defaults: str) -> Iterator[None]:
    """Environment variables for code, and processes started, inside the block; what the user has set is kept."""
    added = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def replaced_environment(**values: str) -> Iterator[None]:
    """Environment variables at these values inside the block, also those that the user has set."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def log_levels(levels: Mapping[str, int]) -> Iterator[None]:
    """Loggers at these levels, name -> level, inside the block."""
    before = {name: logging.getLogger(name).level for name in levels}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def without_errors_of(logger: str) -> Iterator[None]:
    """Records of this logger only below the level ERROR inside the block."""

    def below_error(record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR

    logging.getLogger(logger).addFilter(below_error)
    try:
        yield
    finally:
        logging.getLogger(logger).removeFilter(below_error)


@contextmanager
def opencv_threads(count: int) -> Iterator[None]:
    """OpenCV with `count` threads inside the block."""
    import cv2  # 0.2 s, which the command line needs not

    before = cv2.getNumThreads()
    cv2.setNumThreads(count)
    try:
        yield
    finally:
        cv2.setNumThreads(before)
