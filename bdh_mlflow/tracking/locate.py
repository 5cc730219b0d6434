"""One grammar for a checkpoint to continue or load, one result: a verified checkpoint on this disk.

    latest                                 the run directory saved to last, else the newest run with a mirrored checkpoint
    PATH                                   a checkpoint file, or a run directory (its newest checkpoint that verifies)
    RUN_ID, runs:/RUN_ID                   of the run's local and mirrored checkpoints the furthest that verifies
    runs:/RUN_ID/checkpoints/.../FILE.pt   that one
    any other URI MLflow downloads         mlflow-artifacts:/..., s3://..., models:/NAME/VERSION: that file, or the newest in that folder
    a file in a folder of another program's checkpoint, as a path or URI    that checkpoint
    latest:N, DIRECTORY:N, RUN_ID:N, runs:/RUN_ID:N    of that run the checkpoint of step N

What is only mirrored is downloaded into the directory it came from, under `checkpoint_dir`. Damaged files are named and skipped where
there is a choice. A file of another program with BDH weights in it is a warm start. Nothing is written unless a checkpoint is found.
"""

import contextlib
import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from bdh_mlflow import checkpoint
from bdh_mlflow.checkpoint import Checkpoint, Saved, Snapshot
from bdh_mlflow.config import TrackingConfig
from bdh_mlflow.config.places import expanded
from bdh_mlflow.errors import CheckpointError, ResumeError
from bdh_mlflow.files import shown
from bdh_mlflow.tracking import fetch
from bdh_mlflow.tracking.resolved import GRAMMAR, Located, ResolvedCheckpoint, run_of

if TYPE_CHECKING:
    from bdh_mlflow.tracking.mirrored import MirrorReader

LONGEST_NAME = 255  # bytes of each part of a path
_RUN_ID = re.compile(r"[0-9a-f]{32}")
_RUNS_URI = re.compile(r"runs:/+([^/]+)/?(.*)")
_URI = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)
_IN_SNAPSHOT = re.compile(r"((?:.*/)?checkpoints/[^/]+/checkpoint_\d+)/.+")  # of a file in the mirror
_WITH_STEP = re.compile(r"(runs:/+[^/:]+|(?![a-z][a-z0-9+.-]+:/).+):(\d+)", re.IGNORECASE)


class Locator:
    """Finds checkpoints for one command, here and in the mirror; the store is opened when it is first needed, once.

    kinds: of the checkpoints that are looked for, states of BDH or snapshots of another program's files.
    """

    def __init__(self, checkpoint_dir: Path, config: TrackingConfig, kinds: tuple[type[Saved], ...] = (Checkpoint,)) -> None:
        self._checkpoint_dir, self._config, self._kinds = checkpoint_dir, config, kinds
        self._notes: list[str] = []

    @functools.cached_property
    def mirror(self) -> "MirrorReader":
        """The reader of the mirror."""
        from bdh_mlflow.tracking.mirrored import MirrorReader  # here: a path needs none of MLflow, whose import takes a second

        return MirrorReader(self._config)

    def find(self, target: str) -> ResolvedCheckpoint:
        """The state that `target` names, verified and loaded.   Raises ResumeError or CheckpointError."""
        located = self.locate(target)
        if isinstance(located.found, Path):
            return ResolvedCheckpoint(located.found, None, checkpoint.load(located.found), located.notes)
        assert isinstance(located.found, Checkpoint), "the kind that was looked for"
        found = located.found
        return ResolvedCheckpoint(found.path, found, checkpoint.load(found.path), located.notes, located.named_run)

    def locate(self, target: str) -> Located:
        """What `target` names, verified.   Raises ResumeError or CheckpointError."""
        target = _in_full(target)
        if target.endswith(".safetensors"):
            raise ResumeError(f"{target}: an exported file holds weights alone; generate and evaluate take it. Here: {GRAMMAR}")
        self._notes = []
        found: Saved | Path
        run_id = None
        if (match := _WITH_STEP.fullmatch(target)) and not os.path.lexists(target):
            run_id, found = self._at_step(match[1], int(match[2]))
        elif target == "latest":
            found = self._latest()
        elif _RUN_ID.fullmatch(target):
            run_id, found = self.mirror.training(target).run_id, self._of_run(target)
        elif match := _RUNS_URI.fullmatch(target):
            named, path = match.groups()
            run_id = self.mirror.training(named).run_id
            found = self._at_run_path(named, path) if path else self._of_run(named)
        elif _URI.match(target):
            found = self._at_uri(target)
        else:
            found = self._at_path(Path(target))
        if isinstance(found, Path):
            if Checkpoint not in self._kinds:
                raise ResumeError(f"{target}: weights without a manifest; accepted: {GRAMMAR}")
        elif not isinstance(found, self._kinds):
            raise ResumeError(_of_other_kind(target, found))
        return Located(found, tuple(self._notes), run_id)

    def mirrored(self, run: str) -> tuple[str, list[str]]:
        """Id of the run that holds the training, and artifact paths of its mirrored checkpoints, oldest first.   run: an id or runs:/ID."""
        match = _RUNS_URI.fullmatch(run)
        run_id = self.mirror.training(match[1] if match else run).run_id
        return run_id, [path for _, path in reversed(self.mirror.checkpoints(run_id))]

    def _run_dirs(self) -> Iterator[Path]:
        """Run directories with checkpoints of these kinds, the one saved to last first."""
        for folder in checkpoint.by_last_save(self._checkpoint_dir):
            if any(isinstance(c, self._kinds) for c in checkpoint.list_run(folder).checkpoints):
                yield folder

    def _latest(self) -> Saved:
        for run_dir in self._run_dirs():
            found, skipped = checkpoint.newest(run_dir)
            self._notes += skipped
            if found:
                return found
        return self._of_run(self._newest_mirrored())

    def _newest_mirrored(self) -> str:
        """Id of the newest run with a mirrored checkpoint."""
        run_id = self.mirror.newest_run(self._kinds)
        if run_id is None:
            raise ResumeError(f"latest: no checkpoint in {self._checkpoint_dir.absolute()} and none mirrored in {self.mirror}")
        return run_id

    def _at_step(self, run: str, step: int) -> tuple[str | None, Saved | Path]:
        """The checkpoint of one step of a run, and the run's id if it is found by that."""
        if run == "latest":
            folder = next(self._run_dirs(), None)
            run = str(folder or self._newest_mirrored())
            if folder and not self._path_of(folder, step).exists():
                run = run_of(checkpoint.list_run(folder).checkpoints[-1]) or run  # the mirror may have it
        uri = _RUNS_URI.fullmatch(run)
        if uri or _RUN_ID.fullmatch(run):
            return self._at_step_of_run(uri[1] if uri else run, step)
        folder, path = Path(run), self._path_of(Path(run), step)
        if not folder.is_dir():
            why = "a file is one step already, leave the number away" if folder.is_file() else f"no such folder (looked in {Path.cwd()})"
            raise ResumeError(f"{run}: {why}; accepted: {GRAMMAR}")
        if not path.exists():
            raise _no_such_step(run, step, {c.manifest.step for c in checkpoint.list_run(folder).checkpoints})
        return None, self._at_path(path)

    def _path_of(self, run_dir: Path, step: int) -> Path:
        """Where a checkpoint of a step is, if there is one."""
        state = run_dir / checkpoint.file_name(step)
        return state.with_suffix("") if Snapshot in self._kinds and not state.exists() else state

    def _at_step_of_run(self, run_id: str, step: int) -> tuple[str, Saved | Path]:
        run_id, run_dir, _ = self.mirror.training(run_id)
        there = dict(self.mirror.checkpoints(run_id))
        if step in there:
            return run_id, self._at_run_path(run_id, there[step])
        saved = checkpoint.list_run(self._checkpoint_dir / run_dir).checkpoints if run_dir else ()
        here = {c.manifest.step: c for c in saved if run_of(c) == run_id}
        if step not in here:
            raise _no_such_step(f"run {run_id}", step, {*there, *here})
        checkpoint.verify(here[step])
        return run_id, here[step]

    def _at_path(self, path: Path) -> Saved | Path:
        if (snapshot := _snapshot_around(path)) is not None:
            return snapshot
        if path.is_dir():
            found, skipped = checkpoint.newest(path)
            self._notes += skipped
            if found:
                return found
            below = checkpoint.list_all(path)
            hint = f"; it holds run directories, name one of them ({below[-1]})" if below else ""
            raise ResumeError("\n  ".join([f"{path}: no checkpoint in this folder that verifies{hint}", *skipped]))
        if not path.is_file():
            raise ResumeError(f"{path}: no such file or folder (looked in {Path.cwd()}); accepted: {GRAMMAR}")
        if not path.with_suffix(".json").is_file() and checkpoint.published_weights(checkpoint.load(path)) is not None:
            return path
        try:
            found = checkpoint.describe(path)
            checkpoint.verify(found)
        except CheckpointError as error:
            others = [c for c in checkpoint.list_run(path.parent).checkpoints if c.path != path]
            raise CheckpointError(f"{error}" + (f". Newest complete: {others[-1].path.name}" if others else "")) from None
        return found

    def _of_run(self, run_id: str) -> Saved:
        run_id, run_dir, _ = self.mirror.training(run_id)
        local, skipped = checkpoint.newest(self._checkpoint_dir / run_dir) if run_dir else (None, [])
        self._notes += skipped
        if local is not None and run_of(local) != run_id:
            local = None
        for step, path in self.mirror.checkpoints(run_id):
            if local is not None and step <= local.manifest.step:
                break
            try:
                return self._fetch(f"runs:/{run_id}/{path}")
            except (CheckpointError, ResumeError) as error:
                self._notes.append(str(error))
        if local is None:
            where = f"neither in {shown(self._checkpoint_dir)} nor mirrored"
            raise ResumeError("\n  ".join([f"run {run_id}: no checkpoint that verifies, {where}", *self._notes]))
        return local

    def _at_run_path(self, run_id: str, path: str) -> Saved | Path:
        run_id, path = self.mirror.training(run_id).run_id, self._whole(path)
        artifact = PurePosixPath(path)
        if checkpoint.step_of(Path(artifact)) is None and artifact.suffix != ".pt":
            return self._at_uri(f"runs:/{run_id}/{path}")
        local = self._checkpoint_dir / artifact.parent.name / artifact.name
        with contextlib.suppress(CheckpointError):
            found = checkpoint.describe(local)
            if run_of(found) == run_id:
                checkpoint.verify(found)
                return found
        return self._fetch(f"runs:/{run_id}/{path}")

    def _whole(self, uri: str) -> str:
        """Of a file in a snapshot, as the page of a run names it: the snapshot, where one is looked for."""
        if Snapshot in self._kinds and checkpoint.step_of(Path(uri)) is None and (match := _IN_SNAPSHOT.fullmatch(uri)):
            return match[1]
        return uri

    def _at_uri(self, uri: str) -> Saved | Path:
        uri = self._whole(uri)
        if uri.endswith(".pt") or checkpoint.step_of(Path(uri)) is not None:
            return self._fetch(uri)
        found, skipped = fetch.newest(self.mirror, uri, self._checkpoint_dir)
        self._notes += skipped
        return found

    def _fetch(self, uri: str) -> Saved:
        return fetch.one(self.mirror, uri, self._checkpoint_dir)


def _snapshot_around(path: Path) -> Snapshot | None:
    """The snapshot whose folder, or a file in whose folder, a path names; None if it is in none.   Raises CheckpointError."""
    for folder in (path, *path.absolute().parents):
        if folder.is_dir() and checkpoint.step_of(folder) is not None and folder.with_suffix(".json").is_file():
            found = checkpoint.describe(folder)
            checkpoint.verify(found)
            return found if isinstance(found, Snapshot) else None
    return None


def _of_other_kind(target: str, found: Saved) -> str:
    """Why a checkpoint is not of the kind that was looked for."""
    if isinstance(found, Snapshot):
        return f"{target}: {found.path} holds files of another program; bdh_mlflow.track.find gives their path to that one"
    return f"{target}: {found.path} is the state of a BDH training; bdh-mlflow train --resume takes it"


def _in_full(target: str) -> str:
    """A target without the blanks around it, `~` and `${NAME}` expanded.   Raises ResumeError for text that can name nothing."""
    text = target.strip()
    if not text or "\0" in text or max(map(len, os.fsencode(text).split(b"/"))) > LONGEST_NAME:
        what = "empty text" if not text else f"{text[:40]!r}{'...' * (len(text) > 40)}"
        raise ResumeError(f"{what} names no checkpoint; accepted: {GRAMMAR}")
    try:
        return expanded(text, Path.cwd())
    except ValueError as error:
        raise ResumeError(f"{text}: {error}") from None


def _no_such_step(run: str, step: int, steps: set[int]) -> ResumeError:
    return ResumeError(f"{run}: no checkpoint of step {step}; it has {', '.join(map(str, sorted(steps))) or 'none'}")
