"""Checkpoints: a file is either a whole step or it is not a checkpoint.

A step is written to `checkpoint_500.pt.partial`, synced and renamed; then its manifest `checkpoint_500.json` (bytes, sha256, step) the
same way. The manifest is the commit: readers list only files it vouches for, so a kill during a save costs that save alone. Files are
opened with `weights_only=True`: tensors and plain values, never code. Knows nothing of MLflow; `tracking` mirrors finished files.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import pickle
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, cast

from bdh_mlflow.errors import CheckpointError, ResumeError, SaveError

if TYPE_CHECKING:  # imported where a file is opened: who only lists and sends files is spared it
    import torch

FORMAT = 1
CONFIG_NAME = "config.yaml"
PENDING = ".pending"
LOCK_ATTEMPTS = 10
WRITER_NICENESS = 10
PIECE_BYTES = 2**18
REST = 3  # seconds that a writer beside the loop rests for each second of writing: the two share caches, memory and cores
RUN_DIRECTORY = re.compile(r"run_\d{8}_\d{6}")
_FILE = re.compile(r"checkpoint_(\d+)\.pt")

State = dict[str, Any]
Rest = Callable[[float], object]
"""What a writer does after a piece that took it so many seconds."""


@dataclass(frozen=True)
class Provenance:
    """The part of a manifest that is the same for every checkpoint of a process."""

    mlflow_run_id: str | None
    segment: int
    git_commit: str | None
    git_dirty: bool
    config_digest: str
    data_digest: str
    versions: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Manifest(Provenance):
    """What is known of a checkpoint without opening it."""

    step: int
    tokens_seen: int
    bytes: int
    sha256: str
    loss: float | None
    val_loss: float | None
    run_dir: str
    artifact_path: str
    saved_at: str


@dataclass(frozen=True)
class Checkpoint:
    """A whole step on disk."""

    path: Path
    manifest: Manifest

    @property
    def manifest_path(self) -> Path:
        """The file that vouches for it."""
        return self.path.with_suffix(".json")


@dataclass(frozen=True)
class Listing:
    """Checkpoints of one run directory by step, and files that are not (path, reason)."""

    checkpoints: tuple[Checkpoint, ...]
    rejected: tuple[tuple[Path, str], ...]


class RunDirectory:
    """The folder of one run, made with its first checkpoint and never before.

    Until then what must be on disk already (the journal) is in a folder under `.pending/`, which becomes the run directory. Either is
    locked while this process lives: one process trains a run at a time, and a kill lets go of it.
    """

    def __init__(self, path: Path, config_yaml: str, *, new: bool = False) -> None:
        """The run directory `path`, or one to be there.   new: a directory that has the name is another run's.

        Raises ResumeError if another process trains there, SaveError.
        """
        self.path = path
        self._config_yaml = config_yaml
        self._lock: int | None = None
        try:
            if path.is_dir() and not new:
                self.folder = path
            else:
                pending = path.parent / PENDING
                pending.mkdir(parents=True, exist_ok=True)
                self.folder = Path(tempfile.mkdtemp(prefix=f"{path.name}-", dir=pending))
                self.folder.chmod(0o777 & ~_umask())
            self._claim()
        except OSError as error:
            raise _not_saved(path, error) from error

    @classmethod
    def new(cls, checkpoint_dir: Path, config_yaml: str, started_at: datetime) -> "RunDirectory":
        """A directory to be, named after the second in which the run started."""
        return cls(checkpoint_dir / f"run_{started_at:%Y%m%d_%H%M%S}", config_yaml, new=True)

    @property
    def made(self) -> bool:
        """Whether the run directory exists."""
        return self.folder.parent.name != PENDING

    def save(self, state: State, provenance: Provenance, val_loss: float | None, rest: Rest = lambda worked_s: None) -> Checkpoint:
        """Write `checkpoint_{step}.pt` and its manifest.   Raises SaveError; earlier checkpoints are not touched."""
        self.make()
        try:
            return _write(self.path, {"format": FORMAT, **state}, provenance, val_loss, rest)
        except (OSError, RuntimeError) as error:
            raise _not_saved(self.path / file_name(state["step"]), error) from error

    def make(self) -> None:
        """Create the folder with its config.yaml; if another run took the name in the same second, the next second's is taken."""
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
            config = self.path / CONFIG_NAME
            if not config.is_file() or config.read_text(encoding="utf-8") != self._config_yaml:
                _replace(config, self._config_yaml.encode())
        except OSError as error:
            raise _not_saved(self.path, error) from error

    def discard(self) -> None:
        """Nothing was saved and nothing is left to tell: leave no trace."""
        if not self.made:
            shutil.rmtree(self.folder, ignore_errors=True)
            for folder in (self.folder.parent, self.path.parent):
                with contextlib.suppress(OSError):
                    folder.rmdir()

    def close(self) -> None:
        """Let another process train here."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _claim(self) -> None:
        self._lock = os.open(self.folder, os.O_RDONLY)
        for attempt in range(LOCK_ATTEMPTS):
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if attempt < LOCK_ATTEMPTS - 1:  # a sender that asks whether we are alive holds it for a moment
                    time.sleep(0.05)
                    continue
                self.close()
                raise ResumeError(f"{self.path}: another process is training this run; stop it first") from None
            except OSError:  # a file system without locks
                self.close()
            return


class BackgroundWriter:
    """Writes states behind the caller, one at a time, and not faster than the loop beside it can bear.

    write: what is done with a state and its val loss, with the rest to take between pieces; its errors are raised by the next call here.
    `save` waits for the one before it and then only for a copy, so there are never more than two states in memory, the living one and its
    copy.
    """

    def __init__(self, write: Callable[[State, float | None, Rest], None]) -> None:
        self._write = write
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._awaited = threading.Event()

    def save(self, state: State, val_loss: float | None) -> None:
        """Copy `state` and return.   Raises the SaveError of the write before, if that failed."""
        self.finish()
        copy = _copied(state)
        self._awaited.clear()
        self._thread = threading.Thread(target=self._run, args=(copy, val_loss), name="checkpoint")
        self._thread.start()

    def check(self) -> None:
        """Raises the error of a write that failed, once."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def finish(self) -> None:
        """Wait until everything is written.   Raises the error of a write that failed."""
        if self._thread is not None:
            self._awaited.set()  # nobody is held up by rests
            self._thread.join()
            self._thread = None
        self.check()

    def _run(self, state: State, val_loss: float | None) -> None:
        if sys.platform == "linux":  # where a thread has a niceness of its own; the loop comes first
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), WRITER_NICENESS)
        try:
            self._write(state, val_loss, lambda worked_s: self._awaited.wait(REST * worked_s))
        except Exception as error:  # whatever it is, it is raised where somebody listens
            self._error = error


def file_name(step: int) -> str:
    """Name of the checkpoint after `step` updates."""
    return f"checkpoint_{step}.pt"


def step_of(path: Path) -> int | None:
    """Step in a checkpoint's file name, None for another kind of file."""
    match = _FILE.fullmatch(path.name)
    return int(match[1]) if match else None


def unwritable(checkpoint_dir: Path) -> str | None:
    """Why run directories cannot be created there, None if they can; creates nothing."""
    place = checkpoint_dir.absolute()
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        return f"{place} is not a folder"
    return None if os.access(place, os.W_OK | os.X_OK) else f"no permission to write in {place}"


def list_run(run_dir: Path) -> Listing:
    """Checkpoints of a run directory, by manifest and size; contents are not read (see `verify`)."""
    checkpoints, rejected = [], []
    for path in run_dir.glob("checkpoint_*.pt*"):
        if path.suffix == ".partial":
            rejected.append((path, "the save was interrupted"))
        elif step_of(path) is not None:
            try:
                checkpoints.append(describe(path))
            except CheckpointError as error:
                rejected.append((path, str(error).partition(": ")[2]))
    return Listing(tuple(sorted(checkpoints, key=lambda c: c.manifest.step)), tuple(sorted(rejected)))


def list_all(checkpoint_dir: Path) -> list[Path]:
    """Run directories, oldest first."""
    return sorted(p for p in checkpoint_dir.glob("run_*") if p.is_dir() and RUN_DIRECTORY.fullmatch(p.name))


def describe(path: Path) -> Checkpoint:
    """A checkpoint by its manifest.   Raises CheckpointError if there is none or the file's size is another."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    manifest_path = path.with_suffix(".json")
    if not manifest_path.is_file():
        raise CheckpointError(f"{path}: not a checkpoint (no manifest {manifest_path.name} beside it: the save was interrupted)")
    try:
        manifest = Manifest(**json.loads(manifest_path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, OSError) as error:
        raise CheckpointError(f"{path}: not a checkpoint ({manifest_path.name} is not a manifest: {error})") from None
    size = path.stat().st_size
    if size != manifest.bytes:
        raise CheckpointError(f"{path}: damaged ({size:,} bytes, its manifest says {manifest.bytes:,})")
    return Checkpoint(path, manifest)


def verify(checkpoint: Checkpoint) -> None:
    """Read the whole file and compare its digest.   Raises CheckpointError if it is another."""
    digest = file_digest(checkpoint.path)
    if digest != checkpoint.manifest.sha256:
        raise CheckpointError(
            f"{checkpoint.path}: damaged (sha256 {digest[:12]}..., its manifest says {checkpoint.manifest.sha256[:12]}...)"
        )


def newest(run_dir: Path) -> tuple[Checkpoint | None, list[str]]:
    """The furthest checkpoint that verifies, and what was passed over for it, in words."""
    listing = list_run(run_dir)
    passed_over = [f"{path}: {reason}" for path, reason in listing.rejected]
    for checkpoint in reversed(listing.checkpoints):
        try:
            verify(checkpoint)
        except CheckpointError as error:
            passed_over.append(str(error))
        else:
            return checkpoint, passed_over
    return None, passed_over


def best(checkpoints: tuple[Checkpoint, ...]) -> Checkpoint | None:
    """The checkpoint of lowest validation loss, if any was evaluated."""
    evaluated = [(c.manifest.val_loss, c.manifest.step, c) for c in checkpoints if c.manifest.val_loss is not None]
    return min(evaluated)[2] if evaluated else None


def superfluous(run_dir: Path, keep: int | None, up_to: int) -> list[Checkpoint]:
    """Checkpoints that retention gives up: of those up to step `up_to`, all but the newest `keep` and the best."""
    if keep is None:
        return []
    checkpoints = tuple(c for c in list_run(run_dir).checkpoints if c.manifest.step <= up_to)
    own = {None, *(c.manifest.mlflow_run_id for c in checkpoints[-1:])}
    checkpoints = tuple(c for c in checkpoints if c.manifest.mlflow_run_id in own)  # files of other runs are not ours to delete
    kept = {c.path for c in checkpoints[-keep:]}
    top = best(checkpoints)
    return [c for c in checkpoints if c.path not in kept and c != top]


def remove(checkpoint: Checkpoint) -> None:
    """Delete a checkpoint, its manifest first, so that it never looks like a whole one without being it."""
    checkpoint.manifest_path.unlink(missing_ok=True)
    checkpoint.path.unlink(missing_ok=True)


def load(path: Path) -> State:
    """Tensors and plain values of a file, on the CPU.   Raises CheckpointError for anything that holds code or is no torch file."""
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"(?:Unsupported (?:global|class|operand)|GLOBAL)[: ]+(\S+)", str(error))
        what = f" ({wanted[1]})" if wanted else ""
        raise CheckpointError(f"{path}: refused: it holds Python objects{what}, not only tensors and plain values") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).split("\n")[0] or "it is empty or cut short"
        raise CheckpointError(f"{path}: not a checkpoint: {reason}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: not a checkpoint: holds a {type(state).__name__}, not a dict")
    return state


def published_weights(state: Mapping[str, Any]) -> "dict[str, torch.Tensor] | None":
    """Model weights in a file of another program: a bare state dict, or one under `model_state_dict` or `model`; None if ours or none."""
    import torch

    if "format" in state:
        return None
    for weights in (state.get("model_state_dict"), state.get("model"), state):
        if isinstance(weights, Mapping):
            bare = {str(key).removeprefix("_orig_mod."): value for key, value in weights.items()}
            if "encoder" in bare and "lm_head" in bare:
                return {key: value for key, value in bare.items() if isinstance(value, torch.Tensor)}
    return None


def pending(checkpoint_dir: Path) -> list[Path]:
    """Folders of runs that have not saved a checkpoint: they train, or were killed and have something left to tell."""
    return sorted(p for p in (checkpoint_dir / PENDING).glob("run_*") if p.is_dir())


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _copied(state: Any) -> Any:
    """The same nested state in memory of its own, on the CPU."""
    import torch

    if isinstance(state, torch.Tensor):
        return state.detach().clone() if state.device.type == "cpu" else state.detach().to("cpu")
    if isinstance(state, Mapping):
        return {key: _copied(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_copied(value) for value in state)
    return state


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _not_saved(path: Path, error: Exception) -> SaveError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).split("\n")[0]
    return SaveError(f"{path}: not saved: {reason}. Earlier checkpoints are untouched")


class _Pieces:
    """A file for torch.save: written and digested piece by piece, with a rest after each."""

    def __init__(self, file: BinaryIO, rest: Rest) -> None:
        self._file = file
        self._rest = rest
        self.digest = hashlib.sha256()

    def write(self, content: bytes) -> int:
        whole = memoryview(content).cast("B")
        for start in range(0, len(whole), PIECE_BYTES):
            began = time.perf_counter()
            piece = whole[start : start + PIECE_BYTES]
            self.digest.update(piece)
            self._file.write(piece)
            self._rest(time.perf_counter() - began)
        return len(whole)

    def flush(self) -> None:
        self._file.flush()


def _write(run_dir: Path, state: State, provenance: Provenance, val_loss: float | None, rest: Rest) -> Checkpoint:
    import torch

    path = run_dir / file_name(state["step"])
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            pieces = _Pieces(file, rest)
            torch.save(state, cast("IO[bytes]", pieces))
            file.flush()
            os.fsync(file.fileno())
        manifest = Manifest(
            step=state["step"],
            tokens_seen=state["tokens_seen"],
            bytes=partial.stat().st_size,
            sha256=pieces.digest.hexdigest(),
            loss=state["loss"],
            val_loss=val_loss,
            run_dir=run_dir.name,
            artifact_path=f"checkpoints/{run_dir.name}/{path.name}",
            saved_at=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            **dataclasses.asdict(provenance),
        )
        checkpoint = Checkpoint(path, manifest)
        # A file of that name from before a rewind: its manifest must not vouch for the new bytes, nor the other way round.
        checkpoint.manifest_path.unlink(missing_ok=True)
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    _replace(checkpoint.manifest_path, json.dumps(dataclasses.asdict(manifest), indent=1).encode())
    return checkpoint


def _replace(path: Path, content: bytes) -> None:
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
