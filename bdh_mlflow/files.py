"""Small things that every package needs once: a file written atomically, an error in one line, the nearest known word."""

import contextlib
import difflib
import os
from collections.abc import Iterable
from pathlib import Path

from bdh_mlflow.redact import masked


def first_line(error: BaseException) -> str:
    """What an error says, in one line without secrets."""
    text = str(error).strip() or type(error).__name__
    return masked(text.split("\n")[0])[:300]


def printable(value: object) -> str:
    """Text that any terminal or log takes: bytes of a file name that are not UTF-8, and halves of surrogate pairs, are spelled out."""
    text = str(value)
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace").decode()


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


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: the nearest known one, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean `{near[0]}`?" if near else f"; known: {', '.join(known)}"
