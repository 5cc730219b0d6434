"""Text of any source to parquet shards that training reads.

All or nothing: `shards` are written to a hidden folder and moved into place when they are complete. That folder is beside the target, or
inside it if the target was there before: a mount point or a current folder cannot be replaced, and its owner and mode stay. Where the
result would go is checked before anything is read. Knows nothing of training.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bdh_mlflow.data import remote, shards, sources
from bdh_mlflow.data.folder import held, kind_of, list_files
from bdh_mlflow.data.parquet import UNFINISHED
from bdh_mlflow.data.remote import AnyPath, RemotePath
from bdh_mlflow.data.shards import CutShortError, Layout, Tokenizing, Written
from bdh_mlflow.errors import DataError
from bdh_mlflow.files import reason_of, shown, try_lock
from bdh_mlflow.text import printable

PREFIX_LETTERS = 50  # of the target's name in that of the hidden folder, which must not become too long for a file system


OnProgress = Callable[[Written, float], None]
"""What is called with what is written so far, and the share of the source that is read."""


@dataclass(frozen=True)
class Prepared:
    """What `prepare` wrote, and which files it skipped (name, reason)."""

    folder: AnyPath
    written: Written
    skipped: tuple[tuple[str, str], ...]


def prepare(
    source: str,
    folder: AnyPath,
    column: str,
    on_progress: OnProgress = lambda written, share: None,
    tokenizing: Tokenizing | None = None,
) -> Prepared:
    """Turn text into parquet shards in `folder`, which is missing or empty; all or nothing.

    source: `python-stdlib`, or a file or folder, see `sources.documents`. jsonl, json and parquet are read from their field or column
    `column`.   tokenizing: puts tokens beside the text; then a preparation that was killed goes on where its last file ended, unless the
    target is in a bucket. Raises DataError; then nothing is written.
    """
    _check_column(column)
    layout, resumable = Layout(column, tokenizing, source), tokenizing is not None
    if isinstance(folder, RemotePath):
        return _to_bucket(layout, folder, on_progress)
    there = _check_target(folder, resumable)
    work = _Work(layout, on_progress)
    with _reported(folder), _unfinished(folder, there, resumable) as partial:
        done = work.into(partial)
        if there:
            _move_all(partial, folder)
        else:
            partial.chmod(0o755)
            partial.replace(folder)
    return Prepared(folder, done, tuple(work.skipped))


class _Work:
    """A source and what is to be made of it."""

    def __init__(self, layout: Layout, on_progress: OnProgress) -> None:
        self._layout, self._on_progress = layout, on_progress
        self.skipped: list[tuple[str, str]] = []
        self._meter = sources.Meter()
        self._documents = sources.documents(layout.source, layout.column, self.skipped, self._meter)

    def into(self, folder: Path) -> Written:
        """Write the files.   Raises DataError where there is no text."""
        done = shards.write(self._documents, folder, self._layout, lambda written: self._on_progress(written, self._meter.share))
        if not done.documents:
            raise DataError(f"{printable(self._layout.source)}: no text found{sources.listed(self.skipped)}")
        return done


def _to_bucket(layout: Layout, folder: RemotePath, on_progress: OnProgress) -> Prepared:
    """The same into a bucket, by way of this disk: a bucket can rename nothing, so whole files are uploaded under a marker."""
    if found := list_files(folder, lambda name: False).files:
        raise DataError(f"{shown(folder)}: not empty (it holds {printable(found[0].name)}); give another folder or remove it first")
    work = _Work(layout, on_progress)
    with tempfile.TemporaryDirectory(prefix="prepare-") as name:
        done = work.into(Path(name))
        remote.upload(sorted(Path(name).iterdir()), folder, UNFINISHED)
    return Prepared(folder, done, tuple(work.skipped))


def _check_column(column: str) -> None:
    if not column or printable(column) != column or "\0" in column:
        raise DataError(f"column {printable(column)!r}: not a name for a column; accepted: text that is not empty, as in --column text")


def _check_target(folder: Path, resumable: bool) -> bool:
    """Whether the target is there, an empty folder.   resumable: or one with the beginning of this preparation.

    Raises DataError for one that cannot become the result.
    """
    found = kind_of(folder)
    if found == "nothing":
        return False
    if found != "folder":
        raise DataError(f"{shown(folder)}: {'a file' if found == 'file' else found}, not a folder; give another name or remove it first")
    there = held(folder)
    if resumable and there == [UNFINISHED]:
        return True
    if UNFINISHED in there:
        raise DataError(f"{shown(folder)}: holds {UNFINISHED}: another preparation is writing here, or one was killed; then remove it")
    if there:
        raise DataError(f"{shown(folder)}: not empty (it holds {printable(there[0])}); give another folder or remove it first")
    return True


@contextlib.contextmanager
def _reported(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{shown(folder)}: cannot be written: {reason_of(error)}") from None


@contextlib.contextmanager
def _unfinished(folder: Path, there: bool, resumable: bool) -> Iterator[Path]:
    """The hidden folder for shards; afterwards it is gone, and so are the folders above it that were made and are empty.

    there: whether the target is there already.   resumable: it has a name by which it is found again, and stays where the process is ended
    or the disk fails. Raises DataError while another process writes there.
    """
    made = [] if there else [above for above in folder.parents if not above.exists()]
    partial: Path | None = None  # ours, once it is made
    with contextlib.ExitStack() as held_open:
        try:
            partial = _made(folder, there, resumable)
            lock = os.open(partial, os.O_RDONLY)
            held_open.callback(os.close, lock)
            if try_lock(lock) is False:
                other, partial = partial, None
                raise DataError(f"{shown(folder)}: another preparation is writing here ({shown(other)})")
            yield partial
        except (KeyboardInterrupt, SystemExit, OSError, CutShortError):
            if resumable and partial is not None and any(partial.iterdir()):
                partial = None
            raise
        finally:
            if partial is not None:
                shutil.rmtree(partial, ignore_errors=True)
            for above in made:
                with contextlib.suppress(OSError):  # not empty: the result, or someone else's
                    above.rmdir()


def _made(folder: Path, there: bool, resumable: bool) -> Path:
    """The hidden folder, made unless it is there to go on with."""
    if there:
        (folder / UNFINISHED).mkdir(exist_ok=resumable)
        return folder / UNFINISHED
    folder.parent.mkdir(parents=True, exist_ok=True)
    kind_of(folder)  # a name that is too long is only noticed in a folder that exists
    prefix = f".{folder.name[:PREFIX_LETTERS]}."
    if not resumable:
        return Path(tempfile.mkdtemp(prefix=prefix, suffix=".partial", dir=folder.parent))
    partial = folder.parent / f"{prefix}{hashlib.sha256(os.fsencode(folder.name)).hexdigest()[:8]}.partial"
    partial.mkdir(exist_ok=True)
    return partial


def _move_all(partial: Path, folder: Path) -> None:
    """Move shards up into their folder, all or none; readers refuse the folder as long as `partial` is in it."""
    moved: list[Path] = []
    try:
        for shard in sorted(partial.iterdir()):
            target = folder / shard.name
            if os.path.lexists(target):
                raise FileExistsError(errno.EEXIST, f"{shown(target)} has come in between")
            shard.rename(target)
            moved.append(target)
    except BaseException:
        for target in moved:
            target.unlink(missing_ok=True)
        raise
