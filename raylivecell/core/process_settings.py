"""Process-wide settings, changed inside a `with` block and restored after it, so that a notebook is not affected.

A setting that must outlast the call is changed only in processes that this package starts (tasks, actors, training
workers), never in the caller's.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

# Ray's own variable: with "0" when Ray is imported, a local Ray listens on 127.0.0.1, as on macOS; on Linux the
# default is all interfaces.
LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


@contextmanager
def environment(**defaults: str) -> Iterator[None]:
    """Set environment variables inside the block, for child processes too; variables set by the user are kept."""
    added = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def replaced_environment(**values: str) -> Iterator[None]:
    """Set environment variables inside the block, also those set by the user."""
    previous = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in previous.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def log_levels(levels: Mapping[str, int]) -> Iterator[None]:
    """Set the levels of loggers, name -> level, inside the block."""
    previous = {name: logging.getLogger(name).level for name in levels}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    try:
        yield
    finally:
        for name, level in previous.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def without_errors_of(logger: str) -> Iterator[None]:
    """Drop this logger's records of level ERROR and above inside the block."""

    def below_error(record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR

    logging.getLogger(logger).addFilter(below_error)
    try:
        yield
    finally:
        logging.getLogger(logger).removeFilter(below_error)


@contextmanager
def opencv_threads(count: int) -> Iterator[None]:
    """Run OpenCV with `count` threads inside the block."""
    import cv2  # 0.2 s, not needed by most commands

    previous = cv2.getNumThreads()
    cv2.setNumThreads(count)
    try:
        yield
    finally:
        cv2.setNumThreads(previous)
