"""Signals that would end a program, held until its run has ended, and then raised again."""

import contextlib
import signal
import threading
from types import FrameType
from typing import Any

from bdh_mlflow.errors import InputError
from bdh_mlflow.host import ENDING_SIGNALS

_holding: list["HeldSignals"] = []
_masks: list[set[Any]] = []


class HeldSignals:
    """Holds signals from now on.   received: name of the first one, None until there is one.

    A second one of the same kind, and all after `release`, have the effect that they would have had. Another kind has none: Ctrl-C under
    `mlflow run` arrives as SIGINT and then as SIGTERM.
    """

    def __init__(self) -> None:
        """Raises InputError outside of the main thread, which alone may handle signals, and while another one holds them."""
        if threading.current_thread() is not threading.main_thread():
            raise InputError("track.Settings: signals=True: begin the run in the main thread, which alone may handle signals")
        if _holding:
            raise InputError("track.Settings: signals=True: another open run of this process holds them already; leave it out here")
        _holding.append(self)
        self.received: str | None = None
        self._first: int | None = None
        self._released = False
        self._before: dict[int, Any] = {}
        for number in ENDING_SIGNALS:
            before = signal.getsignal(number)
            if before is not None and before is not signal.SIG_IGN:  # not Python's, or nohup's
                with contextlib.suppress(OSError):  # a sandbox may forbid some
                    signal.signal(number, self._handle)
                    self._before[number] = before

    def restore(self) -> None:
        """Handle nothing any more; also in a forked process, which signals are to end."""
        if self in _holding:
            _holding.remove(self)
        self._released = True
        if threading.current_thread() is not threading.main_thread():
            return  # which alone may: it does so with the next signal
        while self._before:
            number, handler = self._before.popitem()
            if signal.getsignal(number) == self._handle:  # else somebody else's by now
                signal.signal(number, handler)

    def release(self) -> None:
        """Raise again what was received."""
        first, self._first = self._first, None
        self.restore()
        if first is not None:
            signal.raise_signal(first)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._released:
            self.restore()
            signal.raise_signal(number)
        elif self._first is None and self.received is None:
            self._first, self.received = number, signal.Signals(number).name
        elif number == self._first:
            self.release()


def before_fork() -> None:
    """Block signals while they are held, until the new process has given up to hold them: one that comes in between would be lost."""
    if _holding:
        _masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS))


def after_fork() -> None:
    """In both processes: as before."""
    if _masks:
        signal.pthread_sigmask(signal.SIG_SETMASK, _masks.pop())
