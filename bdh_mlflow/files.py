"""Small things that every package needs once: a file written atomically or locked, an error in one line, the nearest known word."""

import contextlib
import difflib
import fcntl
import os
import time
from collections.abc import Iterable
from pathlib import Path

from bdh_mlflow.redact import masked
from bdh_mlflow.text import printable

LONGEST_LINE = 1000  # characters; MLflow names the reason at the end of long sentences


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


def atomic_write(path: Path, content: bytes) -> None:
    """Write a small file whole or not at all, and sync its folder, so that renames before it are on disk too."""
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
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


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


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: the nearest known one, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean `{near[0]}`?" if near else f"; known: {', '.join(known)}"
