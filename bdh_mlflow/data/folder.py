"""What lies in a folder and the folders below it: every file once, and what cannot be read by name instead of not at all.

Links to folders are followed. A folder that is reached twice is read once, under its own name rather than a link's, because text read
twice would be training and validation text at once; a link to a folder above itself leads nowhere new.
"""

import contextlib
import difflib
import errno
import itertools
import os
import re
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from bdh_mlflow.data import remote
from bdh_mlflow.data.remote import AnyPath, RemotePath
from bdh_mlflow.errors import DataError
from bdh_mlflow.files import reason_of, shown
from bdh_mlflow.text import printable

SUGGESTED, REFUSED = 0.6, 0.75  # likeness of two names, of 1: to ask "did you mean", and to take one for a misspelling of the other
SUGGESTIONS, MOST_FOLDERS = 3, 1000  # names that are looked into, and folders below each

OF_THE_FILE_SYSTEM = "lost+found"
"""Lies at the root of a disk, and only root may look into it: neither data nor a reason to call a folder filled."""


class Listing(NamedTuple):
    """files: regular files, sorted by path.   unreadable: everything else that is no folder, or one that cannot be listed: path, reason."""

    files: Sequence[AnyPath]
    unreadable: list[tuple[Path, str]]


def list_files(root: AnyPath, skipped: Callable[[str], bool], say: remote.Say = remote.to_stderr) -> Listing:
    """All files of a folder and its subfolders.   skipped: which names, of files or of folders with all they hold, are left out.

    say: called with a line for the user while a bucket does not answer. Raises DataError if the folder itself cannot be reached.
    """
    if isinstance(root, RemotePath):
        return Listing(remote.list_files(root, skipped, say), [])
    files: list[Path] = []
    unreadable: list[tuple[Path, str]] = []
    try:
        seen = {_identity(folder) for folder in root.resolve().parents}
    except OSError as error:
        raise DataError(f"{shown(root)}: cannot be read: {reason_of(error)}") from None
    folders: list[Path] = [root]
    links: list[Path] = []
    while folders or links:
        folder = folders.pop() if folders else links.pop(links.index(min(links)))
        try:
            if (identity := _identity(folder)) in seen:
                continue
            seen.add(identity)
            entries = list(folder.iterdir())
        except OSError as error:
            unreadable.append((folder, f"cannot be read: {reason_of(error)}"))
            continue
        for path in (entry for entry in entries if entry.name != OF_THE_FILE_SYSTEM and not skipped(entry.name)):
            found = kind_of(path)
            if found == "folder":
                (links if path.is_symlink() else folders).append(path)
            elif found == "file":
                files.append(path)
            elif found != "nothing":  # that has gone meanwhile
                unreadable.append((path, found))
    return Listing(sorted(files), sorted(unreadable))


def kind_of(path: AnyPath) -> str:
    """`file`, `folder`, `nothing`, or in words what else lies there; links are followed.   Raises DataError for an impossible path."""
    if isinstance(path, RemotePath):
        return remote.kind_of(path)
    try:
        mode = path.stat().st_mode
    except ValueError:
        raise DataError(f"{str(path)!r}: not a path, as it holds a NUL byte") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise DataError(f"{shown(path)}: the name is too long for this file system") from None
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return f"cannot be looked at: {reason_of(error)}"
        with contextlib.suppress(OSError):  # it may go while it is looked at
            return f"a link to {printable(path.readlink())}, which does not exist or leads back to itself"
        return "nothing"
    if stat.S_ISREG(mode):
        return "file"
    if stat.S_ISDIR(mode):
        return "folder"
    return "a named pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"


def held(folder: Path) -> list[str]:
    """Names of all that lies in a folder, sorted.   Raises DataError for one that cannot be listed."""
    try:
        return sorted(entry.name for entry in folder.iterdir() if entry.name != OF_THE_FILE_SYSTEM)
    except OSError as error:
        raise DataError(f"{shown(folder)}: cannot be read: {reason_of(error)}") from None


def nearest_folder(missing: Path, likeness: float = SUGGESTED) -> Path | None:
    """A folder with parquet files that a missing one may be a misspelling of: the first part of the path that is missing is spelled alike.

    Names that differ in digits only are no misspellings of each other.
    """
    wrong, below = missing, Path()
    while not wrong.parent.is_dir():
        if wrong == wrong.parent:
            return None
        wrong, below = wrong.parent, Path(wrong.name) / below
    name = wrong.name
    try:
        beside = [
            p for p in sorted(wrong.parent.iterdir()) if not p.name.startswith(".") and re.sub(r"\d", "", p.name) != re.sub(r"\d", "", name)
        ]
    except OSError:
        return None
    alike = {p.name.casefold(): p for p in beside}  # by name first: beside it may lie a whole server of data
    found = difflib.get_close_matches(name.casefold(), alike, n=SUGGESTIONS, cutoff=likeness)
    return next((alike[each] / below for each in found if _holds_parquet(alike[each] / below)), None)


def is_parquet(name: str) -> bool:
    """Whether a file of this name is read as parquet."""
    return name.lower().endswith(".parquet")


def _holds_parquet(folder: Path) -> bool:
    walked = itertools.islice(os.walk(folder), MOST_FOLDERS)
    return any(is_parquet(name) for _, _, names in walked for name in names)


def _identity(folder: Path) -> tuple[int, int]:
    found = folder.stat()
    return found.st_dev, found.st_ino
