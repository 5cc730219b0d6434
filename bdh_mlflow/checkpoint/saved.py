"""Checkpoints that are on disk: described by their manifests, listed, verified, pruned. Their contents are never opened.

The manifest `checkpoint_N.json` is the commit record: files without a matching one are no checkpoint. It lies beside the state of a BDH
training, `checkpoint_N.pt`, or beside a folder `checkpoint_N` with files that another program wrote.
"""

import contextlib
import hashlib
import json
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from bdh_mlflow.checkpoint.manifest import CommonManifest, FileRecord, Manifest, SnapshotManifest, manifest_of
from bdh_mlflow.errors import CheckpointError
from bdh_mlflow.files import first_line, reason_of

CONFIG_NAME = "config.yaml"
PARTIAL = ".partial"
_NAME = re.compile(r"checkpoint_(\d+)(\.pt)?")


class StoredFile(NamedTuple):
    """A file of a checkpoint.   path: where it is now.   name: in the run directory, with `/`.   said: what the manifest says of it."""

    path: Path
    name: str
    said: FileRecord


@dataclass(frozen=True)
class Saved(ABC):
    """A complete checkpoint on disk.   path: of the file or folder `checkpoint_N...`, whatever that is named now."""

    path: Path
    manifest: CommonManifest

    @property
    @abstractmethod
    def files(self) -> list[StoredFile]:
        """Its files."""

    @property
    def beside(self) -> tuple[str, ...]:
        """Names of files in the run directory that belong to all its checkpoints."""
        return ()

    @property
    def tokenizer(self) -> FileRecord | None:
        """The one of these that says what tokens are."""
        return None

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
class Checkpoint(Saved):
    """The state of a BDH training.   path: of its first file."""

    manifest: Manifest

    @property
    def files(self) -> list[StoredFile]:
        """Its files, `checkpoint_N.pt` first."""
        first, *others = self.manifest.files
        return [StoredFile(self.path, first.name, first), *(StoredFile(self.path.with_name(f.name), f.name, f) for f in others)]

    @property
    def beside(self) -> tuple[str, ...]:
        """The configuration and, where tokens are not bytes, the tokenizer."""
        return (CONFIG_NAME, *([self.tokenizer.name] if self.tokenizer else []))

    @property
    def tokenizer(self) -> FileRecord | None:
        """The file that says what tokens are."""
        return self.manifest.tokenizer


@dataclass(frozen=True)
class Snapshot(Saved):
    """Files that another program wrote.   path: of the folder that holds them."""

    manifest: SnapshotManifest

    @property
    def files(self) -> list[StoredFile]:
        """Its files."""
        folder = f"checkpoint_{self.manifest.step}"
        return [StoredFile(self.path / f.name, f"{folder}/{f.name}", f) for f in self.manifest.files]

    @property
    def content(self) -> Path:
        """What its owner gave: the file under its own name, or the folder."""
        return self.path if self.manifest.is_folder else self.path / self.manifest.name


@dataclass(frozen=True)
class Listing:
    """Checkpoints of one run directory by step, and files that are not (path, reason)."""

    checkpoints: tuple[Saved, ...]
    rejected: tuple[tuple[Path, str], ...]


def file_name(step: int) -> str:
    """Name of the state after `step` updates."""
    return f"checkpoint_{step}.pt"


def step_of(path: Path) -> int | None:
    """Step in the name of a checkpoint, None for another file or folder."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def list_run(run_dir: Path) -> Listing:
    """Checkpoints of a run directory, by manifest and size; contents are not read (see `verify`)."""
    checkpoints, rejected = [], []
    for path in run_dir.glob("checkpoint_*"):
        if path.suffix == PARTIAL and step_of(path.with_suffix("")) is not None:
            rejected.append((path, "the save was interrupted"))
        elif step_of(path) is not None:
            try:
                checkpoints.append(describe(path))
            except CheckpointError as error:
                rejected.append((path, str(error).partition(": ")[2]))
    return Listing(tuple(sorted(checkpoints, key=lambda c: c.manifest.step)), tuple(sorted(rejected)))


def describe(path: Path) -> Saved:
    """A checkpoint by its manifest.   Raises CheckpointError if there is none or the size of a file is another."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such file")
    manifest = read_manifest(path)
    found = Snapshot(path, manifest) if isinstance(manifest, SnapshotManifest) else Checkpoint(path, manifest)
    if path.is_dir() is isinstance(found, Checkpoint):
        what = "a folder" if path.is_dir() else "a file"
        raise CheckpointError(f"{path}: not a checkpoint ({found.manifest_path.name} is not of {what})")
    for file, _, said in found.files:
        try:
            size = file.stat().st_size
        except OSError as error:  # retention of its own process was quicker
            raise CheckpointError(f"{file}: {reason_of(error)}") from None
        if size != said.bytes:
            raise CheckpointError(f"{file}: damaged ({size:,} bytes, its manifest says {said.bytes:,})")
    return found


def read_manifest(path: Path) -> Manifest | SnapshotManifest:
    """What the manifest beside a checkpoint, which need not be there, says of it.   Raises CheckpointError if there is none."""
    manifest_path = path.with_suffix(".json")
    if not manifest_path.is_file():
        raise CheckpointError(f"{path}: not a checkpoint (no manifest {manifest_path.name} beside it: the save was interrupted)")
    try:
        manifest = manifest_of(json.loads(manifest_path.read_text(encoding="utf-8")))
    except ValidationError as error:
        wrong = ", ".join(".".join(map(str, each["loc"])) for each in error.errors()) or "no fields"
        raise CheckpointError(f"{path}: not a checkpoint ({manifest_path.name} is not a manifest: missing or invalid: {wrong})") from None
    except (ValueError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path}: not a checkpoint ({manifest_path.name} is not a manifest: {first_line(error)})") from None
    if step_of(path) not in (None, manifest.step):
        raise CheckpointError(f"{path}: not a checkpoint ({manifest_path.name} is of step {manifest.step})")
    return manifest


def verify(checkpoint: Saved) -> None:
    """Read all its files and compare their digests.   Raises CheckpointError if one is another."""
    for file, _, said in checkpoint.files:
        digest = file_digest(file)
        if digest != said.sha256:
            raise CheckpointError(f"{file}: damaged (sha256 {digest[:12]}..., its manifest says {said.sha256[:12]}...)")


def newest(run_dir: Path) -> tuple[Saved | None, list[str]]:
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


def best(checkpoints: Sequence[Saved]) -> Saved | None:
    """The checkpoint with the best score of those that compare with the newest, if any has one; of equal ones the first."""
    newest_first = sorted(checkpoints, key=lambda c: c.manifest.step, reverse=True)
    by = next((c.manifest.compared_by for c in newest_first if c.manifest.score is not None), None)
    scored = [(c.manifest.score, c.manifest.step, c) for c in checkpoints if c.manifest.score is not None and c.manifest.compared_by == by]
    return min(scored, key=lambda each: each[:2])[2] if scored else None


def expired(run_dir: Path, keep: int | None, up_to: int) -> list[Saved]:
    """Checkpoints that retention gives up: of those up to step `up_to`, all but the newest `keep` and the best."""
    if keep is None:
        return []
    checkpoints = tuple(c for c in list_run(run_dir).checkpoints if c.manifest.step <= up_to)
    own = {None, *(c.manifest.mlflow_run_id for c in checkpoints[-1:])}
    checkpoints = tuple(c for c in checkpoints if c.manifest.mlflow_run_id in own)  # files of other runs are not ours to delete
    kept = {c.path for c in checkpoints[-keep:]}
    top = best(checkpoints)
    return [c for c in checkpoints if c.path not in kept and c != top]


def remove(checkpoint: Saved) -> None:
    """Delete a checkpoint, its manifest first, so that it never looks like a whole one without being it.   Raises OSError."""
    checkpoint.manifest_path.unlink(missing_ok=True)
    if isinstance(checkpoint, Snapshot):
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(checkpoint.path)
    else:
        for file, _, _ in checkpoint.files:
            file.unlink(missing_ok=True)


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
