"""Output that ends no training: where it cannot be written, it is given up and the training goes on."""

import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

import click
from rich.console import Console

PASSING = {errno.EAGAIN, errno.EINTR, errno.ENOSPC, errno.EDQUOT, errno.ENOBUFS}
"""Errors of writing after which the next text may go through again."""


class Unfailing(io.TextIOBase):
    """A stream whose writing never raises.

    After a failure that stays (a closed pipe, a terminal that is gone) nothing is written any more; a full disk or a slow reader costs the
    text at hand.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._broken = False
        self._behind = False  # text waits in a buffer that could not be written

    def write(self, text: str) -> int:
        """Write what can be written; a character that the encoding does not have as its code."""
        self._try(lambda: self._stream.write(text), text)
        return len(text)

    def flush(self) -> None:
        """Hand on what was written."""
        self._try(self._stream.flush)

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return not self._broken and self._stream.isatty()

    def fileno(self) -> int:
        """The descriptor of the stream below.   Raises OSError if it has none."""
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Of the stream below."""
        return self._stream.encoding

    def settle(self) -> None:
        """Throw away what could not be written: what waits in a buffer would make the interpreter end with code 120."""
        self.flush()
        if self._broken or self._behind:
            with suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)

    def _try(self, act: Callable[[], Any], text: str = "") -> None:
        if self._broken:
            return
        try:
            act()
            self._behind = False
        except UnicodeEncodeError:
            codes = text.encode(self.encoding, "backslashreplace").decode(self.encoding)
            self._try(lambda: self._stream.write(codes))
        except OSError as error:
            self._broken = error.errno not in PASSING
            self._behind = True
        except ValueError:  # closed
            self._broken = True


@contextmanager
def unfailing_output() -> Iterator[None]:
    """In the body, whatever this process prints cannot end it."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (Unfailing(stream) if stream is not None else Unfailing(io.StringIO()) for stream in before)  # None: `>&-`
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, Unfailing):
                stream.settle()
        sys.stdout, sys.stderr = before


class TrainingCommand(click.Command):
    """A command that trains: whatever becomes of its output, it goes on."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run it with output that never raises."""
        with unfailing_output():
            return super().invoke(ctx)


def console_on(stream: TextIO) -> Console:
    """A console on a stream; a file is no terminal, also where FORCE_COLOR is set."""
    return Console(file=stream, force_terminal=stream.isatty())
