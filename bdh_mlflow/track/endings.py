"""How runs end: as the code that began them says, else with the program, as it ends."""

import atexit
import contextlib
import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from bdh_mlflow.errors import InputError
from bdh_mlflow.track.signals import after_fork, before_fork

Say = Callable[[str], None]
"""Called with a line for the user."""
STATUSES = ("FINISHED", "FAILED", "KILLED")


class EndsAtExit(Protocol):
    """What is done with a run that its program leaves open."""

    def end_at_exit(self, error: BaseException | None) -> None:
        """The program ends.   error: what ends it, if anything does."""

    def disown(self) -> None:
        """In a forked process: the run is its parent's."""


@dataclass(frozen=True)
class Ending:
    """How a run ends.   reason: in a word.   error: what it says, where an error ends it."""

    status: str
    reason: str
    error: str | None = None

    def tags(self, step: int) -> dict[str, str]:
        """Tags of the run.   step: the last one."""
        message = {"bdh.stop_message": self.error[:500] or self.reason} if self.error is not None else {}
        return {"bdh.stop_reason": self.reason, "bdh.stop_step": str(step), **message}


def of(error: BaseException) -> Ending:
    """How an error that leaves the loop ends the run."""
    if isinstance(error, KeyboardInterrupt):
        return Ending("KILLED", "SIGINT", str(error))
    name = type(error).__name__
    if name == "SIGTERMException":  # Lightning's, which is a SystemExit without a code
        return Ending("KILLED", "SIGTERM", str(error))
    if (isinstance(error, SystemExit) and error.code in (None, 0)) or isinstance(error, GeneratorExit):
        return Ending("FINISHED", "finished")
    return Ending("FAILED", name, str(error))


def checked(status: str) -> str:
    """A status that MLflow knows for a run that has ended.   Raises InputError."""
    if status not in STATUSES:
        raise InputError(f"status {status!r}: accepted: {', '.join(STATUSES)}")
    return status


_open: list[EndsAtExit] = []
_error: list[BaseException] = []


def opened(run: EndsAtExit) -> None:
    """From now on a run is ended with the program at the latest."""
    _open.append(run)
    _error.clear()  # the program has gone on
    _install()


def closed(run: EndsAtExit) -> None:
    """It has ended."""
    _open.remove(run)


@functools.cache
def _install() -> None:
    """Once for the process: remember what ends it, and be there when it ends or forks."""
    before = sys.excepthook

    def remember(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        _error.append(error)
        before(kind, error, trace)

    sys.excepthook = remember
    atexit.register(_end_all)
    os.register_at_fork(before=before_fork, after_in_parent=after_fork, after_in_child=_disown_all)


def _end_all() -> None:
    for run in list(_open):
        run.end_at_exit(_error[-1] if _error else None)


def _disown_all() -> None:
    for run in list(_open):
        with contextlib.suppress(Exception):  # the child has its own work to do
            run.disown()
    after_fork()
