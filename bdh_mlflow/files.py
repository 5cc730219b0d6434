"""Small things every package needs once: a file written whole or locked, an error in a line, patience, the nearest known word."""

import contextlib
import difflib
import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from bdh_mlflow.redact import masked
from bdh_mlflow.text import printable

T = TypeVar("T")
UNLINKABLE = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES, errno.ENOSYS}
"""Why a file that can be read cannot be linked: another file system, or one without links."""
LONGEST_LINE = 1000  # characters; MLflow names the reason at the end of long sentences


class NoAnswerError(Exception):
    """Patience is over."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line without secrets."""
    text = str(error).strip() or type(error).__name__
    return masked(text.split("\n")[0])[:LONGEST_LINE]


def reason_of(error: BaseException) -> str:
    """Why something failed: what the operating system says of it, without the path, else the first line of the error."""
    return getattr(error, "strerror", None) or first_line(error)


def shown(path: str | os.PathLike[str]) -> str:
    """A path as a message shows it: from the current folder on where it is in there, else in full."""
    if "://" in (text := os.fspath(path)):
        return printable(masked(text))
    full = Path(path)
    with contextlib.suppress(ValueError, OSError):
        return printable(full.relative_to(Path.cwd()) if full != Path.cwd() else full)
    return printable(full)


def target_of(path: Path) -> Path:
    """The regular file, there or to be, that a path leads to, behind links.

    Raises OSError for a folder, and for a device or a pipe, in whose place a rename would put a file.
    """
    path = path.resolve()
    if path.is_dir():
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return path


def atomic_write(path: Path, content: bytes) -> None:
    """Write a small file whole or not at all, and sync its folder, so that renames before it are on disk too.   Raises OSError."""
    path = target_of(path)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Put what a folder lists on the disk itself.   Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def try_lock(file: int, *, shared: bool = False, wait_s: float = 0.0) -> bool | None:
    """Lock an open file or folder (flock), which ends with the descriptor or the process.   wait_s: for whoever has it now.

    Returns False if somebody else has it still, None on a file system without locks.
    """
    end = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(0.05)
        except OSError:
            return None
        else:
            return True


class Outage:
    """Says once that something does not answer, and once that it does again, for any number of threads that wait for it.

    who: that something.   note: called with a line for the user.
    """

    def __init__(self, who: str, note: Callable[[str], None]) -> None:
        self._who, self._note = who, note
        self._lock = threading.Lock()
        self._said = False

    def begins(self, error: Exception) -> None:
        """A request has failed."""
        with self._lock:
            said, self._said = self._said, True
        if not said:
            self._note(f"{self._who} does not answer ({first_line(error)}); trying again")

    def ends(self) -> None:
        """One that had failed has succeeded."""
        with self._lock:
            said, self._said = self._said, False
        if said:
            self._note(f"{self._who} answers again")


def patiently(
    act: Callable[[], T], may_pass: Callable[[Exception], bool], outage: Outage, limit_s: float, pauses_s: tuple[float, float]
) -> T:
    """What `act` gives, repeated while it fails in a way that may pass.

    limit_s: for all of it.   pauses_s: the first one, which doubles up to the last. Raises NoAnswerError from the last failure when that
    takes longer, and whatever `act` raises that will not pass.
    """
    end, pause_s, failed = time.monotonic() + limit_s, pauses_s[0], False
    while True:
        try:
            result = act()
        except Exception as error:
            if not may_pass(error):
                raise
            if time.monotonic() + pause_s > end:
                raise NoAnswerError(first_line(error)) from error
            failed = True
            outage.begins(error)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, pauses_s[1])
        else:
            if failed:
                outage.ends()
            return result


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: the nearest known one, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean `{near[0]}`?" if near else f"; known: {', '.join(known)}"
