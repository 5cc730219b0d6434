"""Downloads checkpoints out of the mirror and puts them where their runs left them.

Several processes may want the same one at once, and others may be reading it: one downloads, and what is intact is left as it is.
"""

import contextlib
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from bdh_mlflow import checkpoint
from bdh_mlflow.checkpoint import CommonManifest, Saved
from bdh_mlflow.errors import CheckpointError, ResumeError
from bdh_mlflow.files import reason_of, try_lock
from bdh_mlflow.tracking.resolved import run_of

if TYPE_CHECKING:
    from bdh_mlflow.tracking.mirrored import MirrorReader


def one(mirror: "MirrorReader", uri: str, checkpoint_dir: Path) -> Saved:
    """The checkpoint that an artifact URI names, verified.   Raises ResumeError or CheckpointError, and then nothing is left of it."""
    mirror.client  # noqa: B018 - a store that does not answer is named before anything is made on disk
    name = PurePosixPath(uri).name
    with _download_folder(checkpoint_dir) as folder:
        with contextlib.suppress(ResumeError, CheckpointError):
            said = checkpoint.read_manifest(mirror.download(uri.removesuffix(".pt") + ".json", folder).with_name(name))
            if (intact := _intact(checkpoint_dir / said.run_dir / name, said)) is not None:
                return intact
        found = checkpoint.describe(mirror.download(uri, folder))
        checkpoint.verify(found)
        if found.tokenizer is not None:
            with contextlib.suppress(ResumeError):  # missing, it is asked for when text is read
                mirror.download(f"{uri.rpartition('/')[0]}/{found.tokenizer.name}", folder)
        return _put_in_place(found, checkpoint_dir)


def newest(mirror: "MirrorReader", uri: str, checkpoint_dir: Path) -> tuple[Saved, list[str]]:
    """The newest checkpoint in the folder that an artifact URI names, and why later files in it were skipped.   Raises as `one` does."""
    mirror.client  # noqa: B018
    with _download_folder(checkpoint_dir) as folder:
        root = mirror.download(uri, folder)
        skipped: list[str] = []
        candidates = []
        for run_dir in sorted({p.parent for p in root.rglob("checkpoint_*") if checkpoint.step_of(p) is not None}):
            found, reasons = checkpoint.newest(run_dir)
            skipped += reasons
            candidates += [(found.manifest.step, found)] if found else []
        if not candidates:
            raise ResumeError("\n  ".join([f"{uri}: no checkpoint that verifies in it", *skipped]))
        return _put_in_place(max(candidates, key=lambda c: c[0])[1], checkpoint_dir), skipped


def _put_in_place(found: Saved, checkpoint_dir: Path) -> Saved:
    """Move a downloaded checkpoint to where its run left it.   Raises ResumeError where another run has that name."""
    run_dir = checkpoint_dir / found.manifest.run_dir
    for known in checkpoint.list_run(run_dir).checkpoints:
        other = run_of(known)
        if None not in (other, found.manifest.mlflow_run_id) and other != found.manifest.mlflow_run_id:
            raise ResumeError(f"{run_dir}: holds checkpoints of another run ({other}); name another folder for checkpoints")
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / found.path.name
    if (intact := _intact(path, found.manifest)) is not None:
        return intact
    path.with_suffix(".json").unlink(missing_ok=True)
    if path.is_dir():  # a damaged snapshot
        shutil.rmtree(path)
    found.path.replace(path)
    found.manifest_path.replace(path.with_suffix(".json"))
    if found.tokenizer is not None and (fetched := found.path.with_name(found.tokenizer.name)).is_file():
        fetched.replace(run_dir / found.tokenizer.name)
    return checkpoint.describe(path)


def _intact(path: Path, said: CommonManifest) -> Saved | None:
    """The checkpoint at a path if it is the one that a manifest describes: others may be reading it, so it is left as it is."""
    with contextlib.suppress(CheckpointError):
        found = checkpoint.describe(path)
        if found.manifest == said:
            checkpoint.verify(found)
            return found
    return None


@contextlib.contextmanager
def _download_folder(directory: Path) -> Iterator[Path]:
    """A folder on the file system of the checkpoints that is gone afterwards, with whatever was made for it and left empty.

    One process at a time has one, so that of several that want the same checkpoint (those of a group) one downloads it.
    """
    made = [p for p in (directory, *directory.parents) if not p.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _turn(directory), tempfile.TemporaryDirectory(prefix=".download-", dir=directory) as folder:
            yield Path(folder)
    except OSError as error:
        raise ResumeError(f"{directory}: cannot be written: {reason_of(error)}") from None
    finally:
        for folder_made in made:
            with contextlib.suppress(OSError):
                folder_made.rmdir()


@contextlib.contextmanager
def _turn(directory: Path) -> Iterator[None]:
    """Waits until no other process downloads into a directory."""
    lock = os.open(directory, os.O_RDONLY)
    try:
        try_lock(lock, wait_s=math.inf)
        yield
    finally:
        os.close(lock)
