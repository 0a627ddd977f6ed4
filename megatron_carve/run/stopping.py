"""Stopping a run from outside: it finishes its step, saves, and says where it stands."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

# A launcher hands on the Ctrl-C that its processes have had already; one that comes so late is meant.
SECONDS_TO_ANOTHER = 2.0


class Stopped(SystemExit):
    """A run that was asked to stop has done so.

    Attributes:
        message: one line on where it stands.
        code: as a shell says it of the signal, 130 for SIGINT and 143 for SIGTERM.
    """

    def __init__(self, message: str, by: signal.Signals) -> None:
        super().__init__(128 + by)
        self.message = message


@contextlib.contextmanager
def interruptible(say: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """Ctrl-C inside asks Megatron to stop, as SIGTERM does, where it listens to that; a later one ends at once.

    Args:
        say: is told what the first one does.

    Yields:
        whether there has been one.
    """
    first: list[float] = []
    owner = os.getpid()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a data worker, whose end would be that of the step
            return
        if signal.getsignal(signal.SIGTERM) in (signal.SIG_DFL, signal.SIG_IGN, None):
            raise KeyboardInterrupt
        if not first:
            first.append(time.monotonic())
            say("stopping: this step is finished and saved; Ctrl-C again ends at once")
            os.kill(owner, signal.SIGTERM)
        elif time.monotonic() - first[0] > SECONDS_TO_ANOTHER:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # where Python takes no handlers
        yield lambda: False
        return
    kept = signal.signal(signal.SIGINT, interrupt)
    try:
        yield lambda: bool(first)
    finally:
        signal.signal(signal.SIGINT, kept)
