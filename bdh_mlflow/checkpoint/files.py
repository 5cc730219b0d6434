"""Checkpoint files: a step is on disk completely, or it is not a checkpoint.

A step is written to `checkpoint_500.pt.partial`, synced and renamed; then its manifest `checkpoint_500.json` (bytes, sha256, step) the
same way. The manifest is the commit record: a file without a matching one is never listed, so a kill during a save costs that save alone.
Files are opened with `weights_only=True`: tensors and plain values, never code. Knows nothing of MLflow; `tracking` mirrors finished files.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pickle
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, cast

from pydantic import ValidationError

from bdh_mlflow.checkpoint.manifest import FileRecord, Manifest, Provenance
from bdh_mlflow.errors import CheckpointError, SaveError
from bdh_mlflow.files import atomic_write, first_line, reason_of
from bdh_mlflow.text import Evaluation

if TYPE_CHECKING:  # imported in the functions that open a file: listing and mirroring do without
    import torch

FORMAT = 3
CONFIG_NAME = "config.yaml"
PIECE_BYTES = 2**18
_FILE = re.compile(r"checkpoint_(\d+)\.pt")

State = dict[str, Any]
Throttle = Callable[[float], object]
"""Called after each piece of a file with the seconds that writing it took; may wait, to leave the machine to the training."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk.   path: of its first file, whatever that is named now."""

    path: Path
    manifest: Manifest

    @property
    def files(self) -> list[tuple[Path, FileRecord]]:
        """Where its files are, and what the manifest says of each."""
        first, *others = self.manifest.files
        return [(self.path, first), *((self.path.with_name(file.name), file) for file in others)]

    @property
    def manifest_path(self) -> Path:
        """The file that says what it should be, written last."""
        return self.path.with_suffix(".json")

    @property
    def saved_at(self) -> datetime:
        """The instant when it was saved, as its manifest says, else as the file system does."""
        if (instant := self.manifest.instant) is not None:
            return instant
        try:
            return datetime.fromtimestamp(self.manifest_path.stat().st_mtime, UTC)
        except OSError:  # gone meanwhile
            return datetime.fromtimestamp(0, UTC)


@dataclass(frozen=True)
class Listing:
    """Checkpoints of one run directory by step, and files that are not (path, reason)."""

    checkpoints: tuple[Checkpoint, ...]
    rejected: tuple[tuple[Path, str], ...]


def file_name(step: int) -> str:
    """Name of the checkpoint after `step` updates."""
    return f"checkpoint_{step}.pt"


def step_of(path: Path) -> int | None:
    """Step in a checkpoint's file name, None for another kind of file."""
    match = _FILE.fullmatch(path.name)
    return int(match[1]) if match else None


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


def describe(path: Path) -> Checkpoint:
    """A checkpoint by its manifest.   Raises CheckpointError if there is none or the file's size is another."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    manifest_path = path.with_suffix(".json")
    if not manifest_path.is_file():
        raise CheckpointError(f"{path}: not a checkpoint (no manifest {manifest_path.name} beside it: the save was interrupted)")
    try:
        manifest = Manifest.from_json(json.loads(manifest_path.read_text(encoding="utf-8")))
    except ValidationError as error:
        wrong = ", ".join(".".join(map(str, each["loc"])) for each in error.errors()) or "no fields"
        raise CheckpointError(f"{path}: not a checkpoint ({manifest_path.name} is not a manifest: missing or invalid: {wrong})") from None
    except (ValueError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path}: not a checkpoint ({manifest_path.name} is not a manifest: {first_line(error)})") from None
    if step_of(path) not in (None, manifest.step):
        raise CheckpointError(f"{path}: not a checkpoint ({manifest_path.name} is of step {manifest.step})")
    found = Checkpoint(path, manifest)
    for file, said in found.files:
        try:
            size = file.stat().st_size
        except OSError as error:  # retention of its own process was quicker
            raise CheckpointError(f"{file}: {reason_of(error)}") from None
        if size != said.bytes:
            raise CheckpointError(f"{file}: damaged ({size:,} bytes, its manifest says {said.bytes:,})")
    return found


def verify(checkpoint: Checkpoint) -> None:
    """Read all its files and compare their digests.   Raises CheckpointError if one is another."""
    for file, said in checkpoint.files:
        digest = file_digest(file)
        if digest != said.sha256:
            raise CheckpointError(f"{file}: damaged (sha256 {digest[:12]}..., its manifest says {said.sha256[:12]}...)")


def newest(run_dir: Path) -> tuple[Checkpoint | None, list[str]]:
    """The intact checkpoint of the highest step, and why each later file was skipped."""
    listing = list_run(run_dir)
    skipped = [f"{path}: {reason}" for path, reason in listing.rejected]
    for checkpoint in reversed(listing.checkpoints):
        try:
            verify(checkpoint)
        except CheckpointError as error:
            skipped.append(str(error))
        else:
            return checkpoint, skipped
    return None, skipped


def best(checkpoints: tuple[Checkpoint, ...]) -> Checkpoint | None:
    """The checkpoint of lowest validation loss, if any has a finite one; of equal ones the first."""
    evaluated = [(c.manifest.val_loss, c.manifest.step, c) for c in checkpoints if c.manifest.is_evaluated]
    return min(evaluated, key=lambda each: each[:2])[2] if evaluated else None


def expired(run_dir: Path, keep: int | None, up_to: int) -> list[Checkpoint]:
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
    for file, _ in checkpoint.files:
        file.unlink(missing_ok=True)


def load(path: Path) -> State:
    """Tensors and plain values of a file, on the CPU.   Raises CheckpointError for anything that holds code or is no torch file."""
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"(?:Unsupported (?:global|class|operand)|GLOBAL)[: ]+(\S+)", str(error))
        what = f" ({wanted[1]})" if wanted else ""
        raise CheckpointError(f"{path}: refused: it holds Python objects{what}, not only tensors and plain values") from None
    except Exception as error:  # damaged bytes make torch's unpickler raise whatever it runs into
        reason = str(error).split("\n")[0] or "it is empty or cut short"
        raise CheckpointError(f"{path}: not a checkpoint: {reason}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: not a checkpoint: holds a {type(state).__name__}, not a dict")
    if isinstance(number := state.get("format"), int) and number > FORMAT:
        raise CheckpointError(f"{path}: its format is {number}, of a later version of bdh-mlflow; this one reads up to {FORMAT}: upgrade")
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


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def not_saved(path: Path, error: Exception) -> SaveError:
    """The error of a file that could not be written."""
    return SaveError(f"{path}: not saved: {reason_of(error)}. Earlier checkpoints are untouched")


class _Pieces:
    """A file for torch.save: written and digested piece by piece, with a call of `throttle` after each."""

    def __init__(self, file: BinaryIO, throttle: Throttle) -> None:
        self._file = file
        self._throttle = throttle
        self.digest = hashlib.sha256()

    def write(self, content: bytes) -> int:
        whole = memoryview(content).cast("B")
        for start in range(0, len(whole), PIECE_BYTES):
            began = time.perf_counter()
            piece = whole[start : start + PIECE_BYTES]
            self.digest.update(piece)
            self._file.write(piece)
            self._throttle(time.perf_counter() - began)
        return len(whole)

    def flush(self) -> None:
        self._file.flush()


def _canonical(tree: Any) -> Any:
    """The same values, so that equal states are equal files: pickle refers back to a text only where it is the same object."""
    if isinstance(tree, Mapping):
        return {_canonical(key): _canonical(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(map(_canonical, tree))
    return sys.intern(tree) if type(tree) is str else tree


@dataclass(frozen=True)
class SaveInfo:
    """What a manifest says besides the state.   saved_at: later than that of every checkpoint before."""

    provenance: Provenance
    evaluation: Evaluation | None
    saved_at: datetime


def write(run_dir: Path, state: State, about: SaveInfo, throttle: Throttle) -> Checkpoint:
    """Write a state and then its manifest into a run directory.   Raises OSError or RuntimeError; then neither is there."""
    import torch

    path = run_dir / file_name(state["step"])
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            pieces = _Pieces(file, throttle)
            torch.save(_canonical(state), cast("IO[bytes]", pieces))
            file.flush()
            os.fsync(file.fileno())
        manifest = Manifest(
            step=state["step"],
            tokens_seen=state["tokens_seen"],
            files=(FileRecord(path.name, partial.stat().st_size, pieces.digest.hexdigest()),),
            loss=state["loss"],
            val_loss=about.evaluation.loss if about.evaluation else None,
            val_bpb=about.evaluation.bits_per_byte if about.evaluation else None,
            run_dir=run_dir.name,
            artifact_path=f"checkpoints/{run_dir.name}/{path.name}",
            saved_at=about.saved_at.isoformat(timespec="microseconds"),
            **{field.name: getattr(about.provenance, field.name) for field in dataclasses.fields(about.provenance)},
        )
        checkpoint = Checkpoint(path, manifest)
        # A file of that name from before a rewind: its manifest must never stand beside the new bytes, nor the new manifest beside the old.
        checkpoint.manifest_path.unlink(missing_ok=True)
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    atomic_write(checkpoint.manifest_path, json.dumps(dataclasses.asdict(manifest), indent=1, allow_nan=False).encode())
    return checkpoint
