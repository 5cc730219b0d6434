"""Files that another program wrote, taken as a checkpoint: as they are at one moment, whatever happens to them afterwards.

`take` is what a training loop waits for: it copies the files into the run directory, which on file systems that clone costs no time (XFS,
btrfs). Of files that nobody will write into again it only links them, and `complete` copies behind the loop; deleting or replacing them is
harmless meanwhile, because a link holds the bytes. Every file of a snapshot is our own in the end: the mirror links to it, and a program
that writes into its files once more must change neither. `complete` also digests and syncs the files, and writes the manifest last.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from bdh_mlflow.checkpoint.files import PIECE_BYTES, Throttle
from bdh_mlflow.checkpoint.manifest import FileRecord, SnapshotManifest
from bdh_mlflow.checkpoint.saved import PARTIAL, Snapshot
from bdh_mlflow.errors import InputError
from bdh_mlflow.files import UNLINKABLE, atomic_write, sync_folder
from bdh_mlflow.text import is_storable

_IN_URI = re.compile(r"#|%[0-9A-Fa-f]{2}")
"""What MLflow reads as part of a URI when it fetches a file."""


@dataclass(frozen=True)
class SnapshotOrigin:
    """What manifests say of where snapshots come from, the same for every one of a process; see `CommonManifest` and `SnapshotManifest`."""

    segment: int
    git_commit: str | None
    git_dirty: bool | None
    versions: dict[str, str]
    best: str | None
    higher_is_better: bool


@dataclass(frozen=True)
class _TakenFile:
    """A file in the snapshot's folder.   linked: size and time of change (ns) of the owner's file that it still is, None for a copy."""

    name: str
    linked: tuple[int, int] | None


@dataclass(frozen=True)
class Taken:
    """A snapshot without digests and manifest.   folder: where its files are, `checkpoint_N.partial`.   given: what its owner named."""

    step: int
    given: Path
    is_folder: bool
    folder: Path
    files: tuple[_TakenFile, ...]


def take(given: Path, run_dir: Path, step: int, *, written_once: bool) -> Taken:
    """The files of `given` as they are now.   written_once: nobody will write into them again.

    Raises InputError for what is no checkpoint: a path that is not there, an empty folder, anything but files and folders; OSError.
    """
    given, files, is_folder = _listed(given, run_dir, "with the checkpoint alone")
    folder = run_dir / f"checkpoint_{step}{PARTIAL}"
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)
    folder.mkdir()
    try:
        taken = tuple(_taken(path, folder, name, written_once) for name, path in files)
    except FileNotFoundError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise InputError(
            f"{given}: {error.filename} vanished while the checkpoint was taken; delete files after `checkpoint` has returned"
        ) from None
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return Taken(step, given, is_folder, folder, taken)


def complete(
    taken: Taken, origin: SnapshotOrigin, metrics: Mapping[str, float], run_id: str | None, saved_at: datetime, throttle: Throttle
) -> Snapshot:
    """Make a checkpoint of it.   metrics: of this checkpoint, of which finite ones are kept.   throttle: called between pieces.

    Raises OSError, and InputError where a linked file was written into meanwhile; then nothing of it is left.
    """
    target = taken.folder.with_suffix("")
    try:
        records = tuple(_completed(taken, file, throttle) for file in taken.files)
        for folder in {taken.folder, *((taken.folder / file.name).parent for file in taken.files)}:
            sync_folder(folder)
    except BaseException:
        shutil.rmtree(taken.folder, ignore_errors=True)
        raise
    manifest = SnapshotManifest(
        step=taken.step,
        files=records,
        run_dir=target.parent.name,
        artifact_path=f"checkpoints/{target.parent.name}/{target.name}",
        saved_at=saved_at.isoformat(timespec="microseconds"),
        mlflow_run_id=run_id,
        segment=origin.segment,
        git_commit=origin.git_commit,
        git_dirty=origin.git_dirty,
        versions=origin.versions,
        name=taken.given.name,
        is_folder=taken.is_folder,
        metrics={key: value for key, value in metrics.items() if math.isfinite(value)},
        best=origin.best,
        higher_is_better=origin.higher_is_better,
    )
    snapshot = Snapshot(target, manifest)
    snapshot.manifest_path.unlink(missing_ok=True)  # of the same step before: never beside other files than its own
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(target)
    try:
        taken.folder.rename(target)
        atomic_write(snapshot.manifest_path, json.dumps(manifest.to_json(), indent=1, allow_nan=False).encode())
    except BaseException:
        for folder in (taken.folder, target):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return snapshot


def copy_of(given: Path, target: Path, beside: Path) -> None:
    """A copy of a file, or of a folder with all its files, at a place where there is nothing yet, or older files of it.

    beside: folder on the same file system, in which the copy is made before it takes its place. Raises InputError for what is neither,
    OSError.
    """
    _, files, is_folder = _listed(given, beside, "without it")
    made = beside / f".{uuid.uuid4().hex}{PARTIAL}"
    made.mkdir()
    try:
        for number, (_, path) in enumerate(files):
            _copy(path, made / str(number))
        for number, (name, _) in enumerate(files):
            file = target / name if is_folder else target
            file.parent.mkdir(parents=True, exist_ok=True)
            (made / str(number)).replace(file)  # never into one that may be under way
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _listed(given: Path, run_dir: Path, better: str) -> tuple[Path, list[tuple[str, Path]], bool]:
    """What is given, under a name of its own; its files; whether it is a folder.

    better: which folder to name instead of one that holds the run directory.   Raises InputError for what cannot be kept.
    """
    if given.name in ("", ".."):
        given = given.resolve()
    files, is_folder = list(_files_of(given)), given.is_dir()
    if not is_storable(given.name):
        raise InputError(f"{str(given)!a}: not every artifact store gives back a folder of such a name; rename it")
    if is_folder and run_dir.resolve().is_relative_to(given.resolve()):
        raise InputError(f"{given}: holds the run directory {run_dir} itself; name a folder {better}")
    return given, files, is_folder


def _files_of(given: Path) -> Iterator[tuple[str, Path]]:
    """Names, with `/`, and paths of the files of a file or folder; links are followed, but not round in a circle."""
    if not given.exists():
        raise InputError(f"{given}: no such file or folder (looked in {Path.cwd()})")
    if not given.is_dir():
        yield _checked(given.name, given), given
        return
    found = list(_files_below(given, frozenset()))
    if not found:
        raise InputError(f"{given}: an empty folder, which is no checkpoint")
    for path in found:
        yield _checked(path.relative_to(given).as_posix(), path), path


def _files_below(folder: Path, above: frozenset[Path]) -> Iterator[Path]:
    """above: the folders that lead to this one, behind links."""
    real = folder.resolve()
    if real in above:
        return
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from _files_below(path, above | {real})
        else:
            yield path


def _checked(name: str, path: Path) -> str:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise InputError(f"{path}: a link that leads nowhere") from None
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: not a regular file, which alone can be kept")
    if not is_storable(name) or _IN_URI.search(name):
        raise InputError(f"{str(path)!a}: not every artifact store gives back a file of such a name; rename it")
    return name


def _taken(path: Path, folder: Path, name: str, written_once: bool) -> _TakenFile:
    place = folder / name
    place.parent.mkdir(parents=True, exist_ok=True)
    if written_once:
        try:
            os.link(path.resolve(), place)
        except OSError as error:
            if error.errno not in UNLINKABLE:
                raise
        else:
            now = place.stat()
            return _TakenFile(name, (now.st_size, now.st_mtime_ns))
    _copy(path, place)
    return _TakenFile(name, None)


def _copy(source: Path, target: Path) -> None:
    """Copy a file within the kernel, which clones it where the file system can."""
    with source.open("rb") as read, target.open("wb") as write:
        with contextlib.suppress(OSError, AttributeError):  # other file systems, other systems: what is left is copied as usual
            while os.copy_file_range(read.fileno(), write.fileno(), 1 << 30):
                pass
        at = os.fstat(write.fileno()).st_size
        read.seek(at)
        write.seek(at)
        shutil.copyfileobj(read, write, 1 << 20)


def _completed(taken: Taken, file: _TakenFile, throttle: Throttle) -> FileRecord:
    """Digest and sync a file; a link becomes a copy meanwhile."""
    place = taken.folder / file.name
    digest, size = hashlib.sha256(), 0
    with place.open("rb") as read, _replacement(place) if file.linked else contextlib.nullcontext() as write:
        while True:
            began = time.perf_counter()
            piece = read.read(PIECE_BYTES)
            if not piece:
                break
            digest.update(piece)
            size += len(piece)
            if write is not None:
                write.write(piece)
            throttle(time.perf_counter() - began)
        if write is not None:
            write.flush()
        os.fsync((read if write is None else write).fileno())
        after = os.fstat(read.fileno())
    if file.linked and ((after.st_size, after.st_mtime_ns) != file.linked or size != after.st_size):
        raise InputError(
            f"{taken.given}: {file.name} was written into before it was copied, so step {taken.step} is no checkpoint; "
            f"give each checkpoint files of its own, or leave `written_once` out"
        )
    return FileRecord(file.name, size, digest.hexdigest())


def _replacement(link: Path) -> BinaryIO:
    """A file in the place of a link, open for writing; who has the link open still reads what it led to."""
    link.unlink()
    return link.open("xb")
