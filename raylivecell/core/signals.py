"""SIGTERM, with which Slurm, Kubernetes and systemd stop a process, ends a command as Ctrl-C does."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_INTERRUPTED, EXIT_TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
# Slurm and Kubernetes kill a process 30 s after SIGTERM.
GRACE_S = 20.0
# Delay before a KeyboardInterrupt dropped by Python is raised again.
RERAISE_DELAY_S = 0.05


class Termination:
    """Whether SIGTERM was received, and whether the last line has been printed."""

    received = False
    announced = False


@contextmanager
def sigterm_as_interrupt(last_line: str) -> Iterator[Termination]:
    """Treat SIGTERM inside the block as Ctrl-C; end the process if it is still alive GRACE_S later.

    Python runs signal handlers between two bytecode instructions, so blocking C++ code, and code that drops a
    KeyboardInterrupt, could delay the end without limit.

    Args:
        last_line: printed before the process is ended after GRACE_S.
    """
    termination = Termination()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield termination
        return

    def handle(number: int, frame: FrameType | None) -> None:
        termination.received = True
        on_interrupt = signal.getsignal(signal.SIGINT)  # Ray Tune installs its own
        if not callable(on_interrupt):  # ignored, as for a shell's background jobs
            raise KeyboardInterrupt
        on_interrupt(signal.SIGINT, frame)

    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    threading.Thread(target=_end_after_sigterm, args=(receiver, termination, last_line), daemon=True).start()
    wakeup = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    previous = signal.signal(signal.SIGTERM, handle)
    try:
        with _reraising_dropped_interrupts(termination):
            yield termination
    finally:
        if not termination.received:  # otherwise keep watching: Ray shuts down after this
            signal.signal(signal.SIGTERM, previous)
            signal.set_wakeup_fd(wakeup)
            sender.close()


@contextmanager
def _reraising_dropped_interrupts(termination: Termination) -> Iterator[None]:
    """Raise a KeyboardInterrupt again if it was raised in a destructor or a weakref callback.

    Python prints and drops such an exception, and the command would continue; this happened in a sweep.
    """
    previous = sys.unraisablehook

    def hook(dropped: "sys.UnraisableHookArgs") -> None:
        if dropped.exc_type is KeyboardInterrupt:
            number = signal.SIGTERM if termination.received else signal.SIGINT
            # Delayed: the main thread is still in the destructor. A real signal also ends a wait of that thread.
            threading.Timer(RERAISE_DELAY_S, signal.pthread_kill, (threading.main_thread().ident, number)).start()
        else:
            previous(dropped)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = previous


def _end_after_sigterm(receiver: socket.socket, termination: Termination, last_line: str) -> None:
    """Read signal numbers, which Python's C handler writes without delay; end the process GRACE_S after SIGTERM."""
    while number := receiver.recv(1):
        if number[0] == signal.SIGTERM:
            threading.Event().wait(GRACE_S)
            if not termination.announced:
                print(last_line, file=sys.stderr, flush=True)
            os._exit(EXIT_TERMINATED)  # Ray's processes end with their parent
    receiver.close()


@contextmanager
def keeping_sigterm_handler() -> Iterator[None]:
    """Restore the SIGTERM handler after the block; `ray.init` replaces it with one that ends the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as end:  # from Ray's handler: SIGTERM arrived inside the block
        if end.code != signal.SIGTERM or not callable(previous):
            raise
        previous(signal.SIGTERM, None)
        raise
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)
