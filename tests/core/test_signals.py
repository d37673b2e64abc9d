"""SIGTERM ends the process even if the main thread does not respond."""

import signal
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from raylivecell.core import signals

DEAF_PROCESS = """
import sys, time
from raylivecell.core import signals

signals.GRACE_S = 0.1
with signals.sigterm_as_interrupt("terminated; resume"):
    while True:
        try:
            print("ready", flush=True)
            time.sleep(60)
        except KeyboardInterrupt:
            pass
"""


def test_a_process_that_drops_interrupts_ends() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", DEAF_PROCESS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[1] == "terminated; resume\n"
    assert process.returncode == 143


def test_an_ignored_ctrl_c_does_not_ignore_sigterm(unguarded_signals: None) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a shell's background jobs
    try:
        with signals.sigterm_as_interrupt("") as termination, pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        assert termination.received
    finally:
        signal.signal(signal.SIGINT, before)


def _delete_and_wait(create: Callable[[], object]) -> None:
    create()
    threading.Event().wait(60)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_in_a_destructor_is_not_lost(number: signal.Signals, unguarded_signals: None) -> None:
    """Python drops exceptions raised in `__del__`."""

    class Deleted:
        def __del__(self) -> None:
            signal.raise_signal(number)

    with signals.sigterm_as_interrupt("") as termination, pytest.raises(KeyboardInterrupt):
        _delete_and_wait(Deleted)
    assert termination.received == (number == signal.SIGTERM)


def test_only_the_main_thread_sets_handlers() -> None:
    received: list[bool] = []

    def run() -> None:
        with signals.sigterm_as_interrupt("") as termination, signals.keeping_sigterm_handler():
            received.append(termination.received)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert received == [False]
    assert signal.getsignal(signal.SIGTERM) is before
