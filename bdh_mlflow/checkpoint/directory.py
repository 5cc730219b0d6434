"""The run directory: created with the first checkpoint, locked while a process trains in it, unique even for runs started in one second.

Until then, what has to be on disk already (the journal) is in a folder under `.pending/`, which is renamed to the run directory.
"""

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path

from bdh_mlflow import host
from bdh_mlflow.checkpoint.files import FORMAT, SaveInfo, State, Throttle, not_saved, write
from bdh_mlflow.checkpoint.manifest import Provenance
from bdh_mlflow.checkpoint.saved import Checkpoint, Saved, Snapshot, file_name, list_run
from bdh_mlflow.checkpoint.snapshot import SnapshotOrigin, Taken, complete, take
from bdh_mlflow.errors import ResumeError
from bdh_mlflow.files import atomic_write, try_lock
from bdh_mlflow.text import Evaluation

PENDING = ".pending"
LOCK_S = 0.5  # a sender that checks whether this process is alive holds the lock for a moment
FUTURE = timedelta(days=1)
RUN_DIRECTORY = re.compile(r"run_\d{8}_\d{6}")


class RunDirectory:
    """The folder of one run, made with its first checkpoint and never before.

    folder: where files are now, under `.pending/` before the first checkpoint.   path: where the run directory is or will be. The folder is
    locked while this process lives, so one process trains a run at a time; the lock ends with the process, however it ends.
    """

    def __init__(self, path: Path, files: Mapping[str, bytes], *, new: bool = False, left: Path | None = None) -> None:
        """The existing run directory `path`, or one to be created there.   files: what lies in it besides checkpoints, by name.

        new: a directory of that name is another run's.   left: the folder that is to become it.

        Raises ResumeError if another process trains there, SaveError.
        """
        self.path = path
        self._files = files
        self._lock: int | None = None
        self._last_save: datetime | None = None
        try:
            if left is not None:
                self.folder = left
            elif path.is_dir() and not new:
                self.folder = path
            else:
                pending = path.parent / PENDING
                pending.mkdir(parents=True, exist_ok=True)
                self.folder = Path(tempfile.mkdtemp(prefix=f"{path.name}-", dir=pending))
                self.folder.chmod(0o777 & ~_umask())
            self._claim()
        except OSError as error:
            raise not_saved(path, error) from error

    @classmethod
    def new(cls, checkpoint_dir: Path, files: Mapping[str, bytes], started_at: datetime) -> "RunDirectory":
        """A directory to be created, named after the second in which the run started."""
        return cls(checkpoint_dir / f"run_{started_at:%Y%m%d_%H%M%S}", files, new=True)

    @classmethod
    def begun(cls, folder: Path, files: Mapping[str, bytes]) -> "RunDirectory":
        """The directory of a run that has saved nothing yet.   folder: under `.pending/`, as an earlier process has left it."""
        return cls(folder.parents[1] / folder.name.rpartition("-")[0], files, left=folder)

    @property
    def made(self) -> bool:
        """Whether the run directory exists."""
        return self.folder.parent.name != PENDING

    def save(
        self, state: State, provenance: Provenance, evaluation: Evaluation | None, throttle: Throttle = lambda worked_s: None
    ) -> Checkpoint:
        """Write `checkpoint_{step}.pt` and its manifest.   Raises SaveError; earlier checkpoints are not touched."""
        self.make()
        about = SaveInfo(provenance, evaluation, self._now())
        try:
            return write(self.path, {"format": FORMAT, **state}, about, throttle)
        except (OSError, RuntimeError) as error:
            raise not_saved(self.path / file_name(state["step"]), error) from error

    def take(self, given: Path, step: int, *, written_once: bool) -> Taken:
        """Files of another program as they are now; see `snapshot.take`.   Raises InputError, SaveError."""
        self.make()
        try:
            return take(given, self.path, step, written_once=written_once)
        except OSError as error:
            raise not_saved(given, error) from error

    def complete(
        self, taken: Taken, origin: SnapshotOrigin, metrics: Mapping[str, float], run_id: str | None, throttle: Throttle
    ) -> Snapshot:
        """Make a checkpoint of them; see `snapshot.complete`.   Raises InputError, SaveError; earlier checkpoints are not touched."""
        try:
            return complete(taken, origin, metrics, run_id, self._now(), throttle)
        except OSError as error:
            raise not_saved(taken.given, error) from error

    def _now(self) -> datetime:
        """This instant, or, where the clock was set back since the last save beside this run, one just after that.

        A save more than FUTURE ahead is of a clock that was wrong, and is not followed.
        """
        now = datetime.now().astimezone()
        if self._last_save is None:
            with contextlib.suppress(OSError):  # another run's files may go while they are looked at
                self._last_save = max((t for c in _last_saves(self.path.parent) if (t := c.saved_at) < now + FUTURE), default=None)
        if self._last_save is not None:
            now = max(now, self._last_save + timedelta(microseconds=1))
        self._last_save = now
        return now

    def make(self) -> None:
        """Create the folder with its files; if another run took the name in the same second, the next second's is taken."""
        try:
            while not self.made:
                try:
                    self.folder.rename(self.path)  # fails where a folder with anything in it has the name
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
                    started_at = datetime.strptime(self.path.name, "run_%Y%m%d_%H%M%S") + timedelta(seconds=1)
                    self.path = self.path.with_name(f"run_{started_at:%Y%m%d_%H%M%S}")
                else:
                    self.folder = self.path
                    with contextlib.suppress(OSError):
                        (self.path.parent / PENDING).rmdir()
            for name, content in self._files.items():
                file = self.path / name
                if not file.is_file() or file.read_bytes() != content:
                    atomic_write(file, content)
        except OSError as error:
            raise not_saved(self.path, error) from error

    def discard(self) -> None:
        """Remove the folder of a run that saved nothing and has nothing left to deliver."""
        if not self.made:
            shutil.rmtree(self.folder, ignore_errors=True)
            for folder in (self.folder.parent, self.path.parent):
                with contextlib.suppress(OSError):
                    folder.rmdir()

    def disown(self) -> None:
        """In a forked process: the lock is its parent's."""
        if self._lock is not None:
            host.disown(self._lock)

    def close(self) -> None:
        """Release the lock, so that another process may train here."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _claim(self) -> None:
        self._lock = os.open(self.folder, os.O_RDONLY)
        locked = try_lock(self._lock, wait_s=LOCK_S)
        if not locked:
            self.close()
        if locked is False:
            raise ResumeError(f"{self.path}: another process is training this run; stop it first")


def why_unwritable(checkpoint_dir: Path) -> str | None:
    """Why run directories cannot be created there, None if they can; creates nothing."""
    place = checkpoint_dir.absolute()
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        return f"{place} is not a folder"
    return None if os.access(place, os.W_OK | os.X_OK) else f"no permission to write in {place}"


def list_all(checkpoint_dir: Path) -> list[Path]:
    """Run directories by name."""
    return sorted(p for p in checkpoint_dir.glob("run_*") if p.is_dir() and RUN_DIRECTORY.fullmatch(p.name))


def by_last_save(checkpoint_dir: Path) -> list[Path]:
    """Run directories with a checkpoint, the one saved to last first: by instants, whatever the zone or the names of the folders."""
    return [c.path.parent for c in sorted(_last_saves(checkpoint_dir), key=lambda c: (c.saved_at, c.path), reverse=True)]


def _last_saves(checkpoint_dir: Path) -> list[Saved]:
    """The checkpoint of each run that was saved last."""
    runs = (list_run(folder).checkpoints for folder in list_all(checkpoint_dir))
    return [max(checkpoints, key=lambda c: c.saved_at) for checkpoints in runs if checkpoints]


def pending(checkpoint_dir: Path) -> list[Path]:
    """Folders of runs without a checkpoint: running, or killed with records left to deliver."""
    return sorted(p for p in (checkpoint_dir / PENDING).glob("run_*") if p.is_dir())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
