"""Text of any source to parquet shards that training reads.

All or nothing: shards are written to a hidden folder and moved into place when they are complete. That folder is beside the target, or
inside it if the target was there before: a mount point or a current folder cannot be replaced, and its owner and mode stay. Where the
result would go is checked before anything is read. Knows nothing of training.
"""

import contextlib
import errno
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from bdh_mlflow.data import remote, sources
from bdh_mlflow.data.folder import held, kind_of, list_files
from bdh_mlflow.data.parquet import UNFINISHED
from bdh_mlflow.data.remote import AnyPath, RemotePath
from bdh_mlflow.errors import DataError
from bdh_mlflow.files import reason_of, shown
from bdh_mlflow.text import printable

ROW_GROUP_BYTES = 4 * 2**20  # of text: small enough to keep several in memory, large enough to shuffle within
SHARD_BYTES = 256 * 2**20  # of text in a prepared file
PREFIX_LETTERS = 50  # of the target's name in that of the hidden folder, which must not become too long for a file system


@dataclass(frozen=True)
class Prepared:
    """What `prepare` wrote, and which files it skipped (name, reason).   bytes: of text."""

    folder: AnyPath
    documents: int
    bytes: int
    files: int
    skipped: tuple[tuple[str, str], ...]


def prepare(source: str, folder: AnyPath, column: str, on_progress: Callable[[int, int], None] = lambda documents, size: None) -> Prepared:
    """Turn text into parquet shards in `folder`, which is missing or empty; all or nothing.

    source: `python-stdlib`, or a file or folder, see `sources.documents`. jsonl, json and parquet are read from their field or column
    `column`. Raises DataError; then nothing is written.
    """
    _check_column(column)
    if isinstance(folder, RemotePath):
        return _to_bucket(source, folder, column, on_progress)
    there = _check_target(folder)
    skipped: list[tuple[str, str]] = []
    documents = sources.documents(source, column, skipped)
    with _reported(folder), _unfinished(folder, there) as partial:
        count, size, files = _write_shards(documents, partial, column, on_progress)
        if not count:
            raise DataError(f"{printable(source)}: no text found{sources.listed(skipped)}")
        if there:
            _move_all(partial, folder)
        else:
            partial.chmod(0o755)
            partial.replace(folder)
    return Prepared(folder, count, size, files, tuple(skipped))


def _to_bucket(source: str, folder: RemotePath, column: str, on_progress: Callable[[int, int], None]) -> Prepared:
    """The same into a bucket, by way of this disk: a bucket can rename nothing, so whole files are uploaded under a marker."""
    if found := list_files(folder, lambda name: False).files:
        raise DataError(f"{shown(folder)}: not empty (it holds {printable(found[0].name)}); give another folder or remove it first")
    skipped: list[tuple[str, str]] = []
    documents = sources.documents(source, column, skipped)
    with tempfile.TemporaryDirectory(prefix="prepare-") as name:
        count, size, files = _write_shards(documents, Path(name), column, on_progress)
        if not count:
            raise DataError(f"{printable(source)}: no text found{sources.listed(skipped)}")
        remote.upload(sorted(Path(name).iterdir()), folder, UNFINISHED)
    return Prepared(folder, count, size, files, tuple(skipped))


def _check_column(column: str) -> None:
    if not column or printable(column) != column or "\0" in column:
        raise DataError(f"column {printable(column)!r}: not a name for a column; accepted: text that is not empty, as in --column text")


def _check_target(folder: Path) -> bool:
    """Whether the target is there, an empty folder.   Raises DataError for one that cannot become the result."""
    found = kind_of(folder)
    if found == "nothing":
        return False
    if found != "folder":
        raise DataError(f"{shown(folder)}: {'a file' if found == 'file' else found}, not a folder; give another name or remove it first")
    there = held(folder)
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
def _unfinished(folder: Path, there: bool) -> Iterator[Path]:
    """The hidden folder for shards; afterwards it is gone, and so are the folders above it that were made and are empty.

    there: whether the target is there already.
    """
    made = [] if there else [above for above in folder.parents if not above.exists()]
    partial: Path | None = None  # ours, once it is made
    try:
        if there:
            (folder / UNFINISHED).mkdir()
            partial = folder / UNFINISHED
        else:
            folder.parent.mkdir(parents=True, exist_ok=True)
            kind_of(folder)  # a name that is too long is only noticed in a folder that exists
            partial = Path(tempfile.mkdtemp(prefix=f".{folder.name[:PREFIX_LETTERS]}.", suffix=".partial", dir=folder.parent))
        yield partial
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        for above in made:
            with contextlib.suppress(OSError):  # not empty: the result, or someone else's
                above.rmdir()


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


def _write_shards(documents: Iterable[str], folder: Path, column: str, on_progress: Callable[[int, int], None]) -> tuple[int, int, int]:
    """Write documents to parquet files.   Returns how many documents, bytes of text and files there are."""
    schema = pa.schema([(column, pa.string())])
    count = size = files = 0
    groups = _row_groups(documents)
    for first in groups:
        shard_size = 0
        with (  # opened by Python, as pyarrow takes no file name that is not UTF-8
            (folder / f"part-{files:05d}.parquet").open("wb") as file,
            pq.ParquetWriter(file, schema, compression="zstd") as shard,
        ):
            for group in itertools.chain([first], groups):
                shard.write_table(pa.table({column: group}, schema), row_group_size=len(group))
                group_size = sum(len(d.encode()) for d in group)
                count, size, shard_size = count + len(group), size + group_size, shard_size + group_size
                on_progress(count, size)
                if shard_size >= SHARD_BYTES:
                    break
        files += 1
    return count, size, files


def _row_groups(documents: Iterable[str]) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for document in documents:
        group.append(document)
        size += len(document.encode())
        if size >= ROW_GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group
