"""Files of text in a bucket, through pyarrow's file systems: `s3://`, `gs://`, `abfs://` and whatever else pyarrow opens by a URI.

What a path on this machine can do, as far as text needs it. A store that does not answer is asked again with patience, which is said once;
one that refuses, or has no such bucket, is an error at once. Credentials come from the environment, never from a URI: that is logged.
"""

import functools
import io
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from pyarrow import fs

from bdh_mlflow import files
from bdh_mlflow.config.places import is_bucket
from bdh_mlflow.errors import DataError
from bdh_mlflow.files import first_line
from bdh_mlflow.redact import masked

START_S, READ_S = 30.0, 3600.0
"""How long a store is waited for before a training begins, and for text that a training needs next."""
FIRST_PAUSE_S, LAST_PAUSE_S = 1.0, 30.0
_FOR_GOOD = re.compile(
    r"ACCESS_DENIED|NO_SUCH|INVALID|SIGNATURE|NOT_FOUND|not found|does not exist|Unrecognized|No module|needs? ", re.IGNORECASE
)

Say = Callable[[str], None]
T = TypeVar("T")


def to_stderr(text: str) -> None:
    """Where nobody else listens."""
    print(text, file=sys.stderr, flush=True)


@functools.total_ordering
@dataclass(frozen=True)
class RemotePath:
    """A file or folder in a bucket.   root: URI of the folder that was named.   below: place in it.   bytes: size, where it is known."""

    root: str
    below: PurePosixPath = field(default_factory=PurePosixPath)
    bytes: int | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return f"{self.root}/{self.below}" if self.below.name else self.root

    def __fspath__(self) -> str:
        return str(self)

    def __lt__(self, other: "RemotePath") -> bool:
        return (self.root, self.below) < (other.root, other.below)

    @property
    def name(self) -> str:
        """The last part."""
        return self.below.name or self.root.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """Ending of the name, with its dot."""
        return PurePosixPath(self.name).suffix

    def absolute(self) -> "RemotePath":
        """Itself: a URI is a place in full."""
        return self

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """The file, fetched as a whole into one on this disk, which is gone when it is closed.   Raises OSError."""
        assert mode == "rb", "text is read as bytes"
        local = tempfile.TemporaryFile()  # noqa: SIM115 - it is closed by whoever opens this one
        with opened(self) as remote:
            shutil.copyfileobj(remote, local, 1 << 20)
        local.seek(0)
        return local  # type: ignore[return-value]  # a wrapper with all that a BufferedReader has


AnyPath = Path | RemotePath


def below(folder: AnyPath, file: AnyPath) -> PurePosixPath:
    """The place of a file below a folder."""
    if isinstance(folder, RemotePath) and isinstance(file, RemotePath):
        return file.below.relative_to(folder.below)
    assert isinstance(folder, Path), "both are of one kind"
    assert isinstance(file, Path), "both are of one kind"
    return PurePosixPath(file.relative_to(folder))


def place_of(text: str) -> AnyPath:
    """The path that a text names."""
    return RemotePath(text.rstrip("/")) if is_bucket(text) else Path(text)


@functools.cache
def _file_system(root: str) -> tuple[fs.FileSystem, str]:
    """The file system of a URI, and the path in it.   Raises whatever pyarrow does."""
    return fs.FileSystem.from_uri(root)  # type: ignore[no-any-return]


def _located(path: RemotePath) -> tuple[fs.FileSystem, str]:
    system, top = _file_system(path.root)
    return system, f"{top}/{path.below}" if path.below.name else top


def opened(path: RemotePath) -> Any:
    """The file for reading at any place, a `pyarrow.NativeFile`.   Raises OSError."""
    system, name = _located(path)
    return system.open_input_file(name)


def kind_of(path: RemotePath, say: Say = to_stderr) -> str:
    """`file`, `folder` or `nothing`.   Raises DataError where the store cannot be asked."""
    info = patiently(lambda: _info(path), path, say, START_S)
    return {fs.FileType.File: "file", fs.FileType.Directory: "folder"}.get(info.type, "nothing")


def _info(path: RemotePath) -> fs.FileInfo:
    system, name = _located(path)
    return system.get_file_info(name)


def list_files(root: RemotePath, skipped: Callable[[str], bool], say: Say = to_stderr) -> list[RemotePath]:
    """All files of a folder and its subfolders, sorted by path.   skipped: as in `folder.list_files`. Raises DataError."""

    def ask() -> list[tuple[str, int]]:
        system, name = _located(root)
        found = system.get_file_info(fs.FileSelector(name, allow_not_found=True, recursive=True))
        return [(info.path[len(name) :].lstrip("/"), info.size) for info in found if info.type == fs.FileType.File]

    found = [(root.below / name, size) for name, size in patiently(ask, root, say, START_S)]
    kept = [(below, size) for below, size in found if not any(map(skipped, below.relative_to(root.below).parts))]
    return [RemotePath(root.root, below, size) for below, size in sorted(kept)]


def upload(shards: list[Path], folder: RemotePath, unfinished: str, say: Say = to_stderr) -> None:
    """Put files into a folder, all or none; readers refuse it while the marker `unfinished` is in it.   Raises DataError."""
    system, top = _located(folder)
    marker, done = f"{top}/{unfinished}/{unfinished}", list[str]()

    def put(file: Path, name: str) -> None:
        with system.open_output_stream(name) as target, file.open("rb") as source:
            shutil.copyfileobj(source, target, 1 << 20)

    def mark() -> None:
        if "/" in top:
            system.create_dir(top, recursive=True)  # stores without folders make nothing
        with system.open_output_stream(marker) as stream:
            stream.write(b"a preparation is writing here")

    try:
        patiently(mark, folder, say, START_S)
        for file in shards:
            done.append(f"{top}/{file.name}")
            patiently(functools.partial(put, file, done[-1]), folder, say, READ_S)
    except BaseException:
        for name in done:
            _remove(system, name)
        raise
    finally:
        _remove(system, marker)


def _remove(system: fs.FileSystem, name: str) -> None:
    try:
        system.delete_file(name)
    except OSError:  # it was not made, or the store is gone: the marker says so
        return


def patiently(act: Callable[[], T], path: RemotePath, say: Say, limit_s: float) -> T:
    """The result of a request, repeated while its store does not answer.   Raises DataError when that takes longer, or it refuses."""
    try:
        return files.patiently(act, _may_pass, _outage(path.root, say), limit_s, (FIRST_PAUSE_S, LAST_PAUSE_S))
    except files.NoAnswerError as error:
        raise DataError(f"{masked(str(path))}: no answer within {limit_s:.0f} s: {error}") from None
    except Exception as error:  # pyarrow's are OSError, ValueError, ImportError and its own
        raise DataError(f"{masked(str(path))}: {_reason(error)}") from None


@functools.cache
def _outage(root: str, say: Say) -> files.Outage:
    """One for all row groups that are fetched side by side."""
    return files.Outage(f"data: {masked(root)}", say)


def _may_pass(error: Exception) -> bool:
    return isinstance(error, OSError) and not isinstance(error, FileNotFoundError) and not _FOR_GOOD.search(str(error))


def _reason(error: Exception) -> str:
    if isinstance(error, ImportError) and "huggingface" in str(error).lower():
        return "needs a package that is not installed: pip install huggingface_hub"
    return first_line(error)
