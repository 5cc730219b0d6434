"""Databases that MLflow opens in this process: one opener at a time, and why one can never be opened."""

import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from bdh_mlflow import checkpoint
from bdh_mlflow.config.places import DATABASES, scheme_of
from bdh_mlflow.errors import TrackingError
from bdh_mlflow.files import try_lock

OPENING_S = 60.0  # longest wait for another process that opens the same database


def database_file(uri: str) -> Path | None:
    """The file of an SQLite database, None for any other store."""
    return Path(unquote(uri.partition(":///")[2].partition("?")[0])) if scheme_of(uri) == "sqlite" else None


@contextlib.contextmanager
def only_opener(uri: str) -> Iterator[None]:
    """MLflow makes the tables of a new database when it is opened, and two processes at once leave it half made: one opens at a time.

    For an SQLite file the lock is a hidden file beside it that is gone once the tables are there, for a database server a file of this
    machine. (A lock of the database file itself would end SQLite's own locks when it is closed.) Raises OSError if another process has it
    for OPENING_S.
    """
    place, database = _lock_place(uri), database_file(uri)
    try:
        lock = os.open(place, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600) if place is not None else None
    except OSError:  # no permission: opening says so
        lock = None
    try:
        if lock is not None and try_lock(lock, wait_s=OPENING_S) is False:
            raise OSError(f"database is locked: another process has been opening it for {OPENING_S:.0f} s")
        yield
        if lock is not None and place is not None and database is not None:
            place.unlink(missing_ok=True)  # whoever waits for it finds a database that is made
    finally:
        if lock is not None:
            os.close(lock)


def _lock_place(uri: str) -> Path | None:
    """The file to lock; None where nothing is to be made."""
    if (database := database_file(uri)) is not None:
        place = database.with_name(f".{database.name}.opening")
        with contextlib.suppress(OSError):
            if database.stat().st_size and not place.exists():
                return None
            return place
        with contextlib.suppress(OSError):
            database.parent.mkdir(parents=True, exist_ok=True)  # as MLflow does
        return place
    if scheme_of(uri) not in DATABASES:
        return None
    where = re.sub(r"//[^/@]*@", "//", uri).partition("?")[0]  # nothing that a password could be guessed from
    return Path(tempfile.gettempdir()) / f"bdh-mlflow-{os.getuid()}-{hashlib.sha256(where.encode()).hexdigest()[:16]}.lock"


def try_database(uri: str) -> None:
    """Connect to a database once: MLflow would repeat it for minutes, also with a wrong password or a file that cannot be written.

    Raises TrackingError or SQLAlchemy's errors.
    """
    if (file := database_file(uri)) is not None:
        if reason := _why_no_database(file):
            raise TrackingError(f"tracking store {uri} cannot be used: {reason}")
        return
    if scheme_of(uri) not in DATABASES:
        return
    import sqlalchemy

    engine = sqlalchemy.create_engine(uri)
    try:
        engine.connect().close()
    finally:
        engine.dispose()


def _why_no_database(file: Path) -> str | None:
    """Why an SQLite database cannot be opened for writing, None if it can."""
    here = str(Path.cwd())
    if not file.exists():
        if "'" in here and '"' in here:  # MLflow writes the folder of artifacts into SQL as Python spells it
            return f"MLflow cannot make a database in {here}, as its name holds both kinds of quotes; start in another folder"
        return checkpoint.why_unwritable(file.parent)
    if not file.is_file():
        return f"{file} is no file"
    return None if os.access(file, os.R_OK | os.W_OK) else f"no permission to write {file}"
