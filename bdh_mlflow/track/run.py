"""A tracked run: what a training loop calls. Each call is a line in the journal, files are copied, and the rest happens behind the loop."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import NoReturn, Self, SupportsFloat, SupportsIndex

from bdh_mlflow import checkpoint, redact
from bdh_mlflow.checkpoint import Background, RunDirectory, Snapshot, SnapshotOrigin, Taken, Throttle
from bdh_mlflow.checkpoint.manifest import is_inside
from bdh_mlflow.errors import InputError, SaveError
from bdh_mlflow.files import reason_of, shown
from bdh_mlflow.text import LoggedPoint, Sample
from bdh_mlflow.track import endings
from bdh_mlflow.track.endings import Ending
from bdh_mlflow.track.settings import Settings, checked_name, checked_step, checked_values, flat
from bdh_mlflow.track.signals import HeldSignals
from bdh_mlflow.tracking.records import RunIdentity
from bdh_mlflow.tracking.system_metrics import SystemMetrics
from bdh_mlflow.tracking.tracker import Tracker

ARTIFACTS = "artifacts"
"""Folder in the run directory with our copies of what `Run.artifact` was given."""


@dataclass(frozen=True)
class Parts:
    """What a run is made of.   resumed: the checkpoint that it goes on from.   likely_run: its MLflow run while the store does not answer.

    held: None if signals are not to be held.   system_metrics: None if machines are not sampled.
    """

    settings: Settings
    directory: RunDirectory
    tracker: Tracker
    origin: SnapshotOrigin
    resumed: Snapshot | None
    likely_run: str | None
    held: HeldSignals | None
    system_metrics: SystemMetrics | None
    note: endings.Say


class Run:
    """A run of MLflow that a loop of any kind logs to.   Made by `track.run`.

    Calls may come from any thread of the process that began it; in a process that is forked from it they are refused. Every call raises
    InputError for what it cannot take and once the run has ended. A context manager: leaving it ends the run as the body ended.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._tracker, self._origin = parts.tracker, parts.origin
        self._background = Background()
        self._last: dict[str, LoggedPoint] = {}
        self._step = self.first_step
        self._ended: str | None = None
        self._marked: Ending | None = None
        self._foreign = False
        endings.opened(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._foreign and self._ended is None:
            self._end(endings.of(error) if error is not None else self._stopped())

    def __reduce__(self) -> NoReturn:
        raise InputError("a run belongs to the process that began it: hand values to the main process, and log them there")

    @property
    def id(self) -> str | None:
        """Of the MLflow run; None until the store has answered."""
        identity = self._tracker.identity
        return identity.run_id if identity else None

    @property
    def identity(self) -> RunIdentity | None:
        """Name, experiment, store and artifacts of the MLflow run; None until the store has answered."""
        return self._tracker.identity

    @property
    def directory(self) -> Path:
        """The run directory; it is made with the first checkpoint, and until then another run may take the name."""
        return self._parts.directory.path

    def made_directory(self) -> Path:
        """The run directory, made now.   Raises SaveError."""
        self._parts.directory.make()
        return self.directory

    @property
    def resumed_from(self) -> Path | None:
        """File or folder of the checkpoint that the run goes on from, as it was given to `checkpoint`; None if it begins anew."""
        return self._parts.resumed.content if self._parts.resumed else None

    @property
    def first_step(self) -> int:
        """Its step; 0 if the run begins anew."""
        return self._parts.resumed.manifest.step if self._parts.resumed else 0

    @property
    def ended(self) -> bool:
        """Whether it takes nothing any more."""
        return self._ended is not None

    @property
    def marked(self) -> bool:
        """Whether it has been said how it ended, see `mark`."""
        return self._marked is not None

    @property
    def stop_requested(self) -> str | None:
        """Name of the signal that was to end the program, where `Settings.signals` has it held; None while there was none.

        A loop that finds one saves and leaves the `with` block. The run then ends as KILLED, and the signal is raised again, with whatever
        effect it would have had. A second signal of the same kind has its effect at once.
        """
        return self._parts.held.received if self._parts.held else None

    def metrics(self, values: Mapping[str, SupportsFloat], step: SupportsIndex) -> None:
        """Points of several metrics.   values: anything that `float` takes.   step: completed updates, or whatever the curve's axis is.

        Steps may come in any order. A resumed run keeps what it has at a step already: a replayed point is not logged twice.
        """
        at, numbers = checked_step(step), checked_values(values)
        self._check_open()
        for key in numbers.keys() - self._last.keys():
            checked_name("metric", key)
        if numbers:
            self._log(numbers, at)

    def params(self, values: Mapping[str, object]) -> None:
        """Settings of the run; mappings in it are flattened with dots. Each is written once: what the run has already stays."""
        given = flat(values)
        self._check_open()
        self._tracker.params(given)

    def tags(self, values: Mapping[str, str]) -> None:
        """Tags of the run; later values replace earlier ones."""
        given = {checked_name("tag", key): str(value) for key, value in values.items()}
        self._check_open()
        self._tracker.tags(given)

    def samples(self, samples: Iterable[Sample | tuple[str, str]], step: SupportsIndex) -> None:
        """What a language model writes: pairs of a prompt and its continuation, shown as a table of the run."""
        given, at = [Sample(*each) for each in samples], checked_step(step)
        self._check_open()
        if given:
            self._tracker.samples(given, at)

    def text(self, text: str, artifact: str) -> None:
        """A small text file among the artifacts.   artifact: its path there; a later one replaces an earlier one of the name."""
        artifact = _checked_place(artifact)
        self._check_open()
        self._tracker.text(text, artifact)

    def artifact(self, path: str | Path, folder: str = "") -> None:
        """A file, or a folder with its files, for the artifacts.   folder: where it goes among them.

        It is copied into the run directory before this returns, and uploaded behind the loop.   Raises SaveError if it cannot be copied.
        """
        given = Path(path)
        place = PurePosixPath(_checked_place(f"{folder}/{given.name}" if folder else given.name))
        self._check_open()
        beside = f"{ARTIFACTS}/{place}"
        try:
            checkpoint.copy_of(given, self._parts.directory.folder / beside)
        except OSError as error:
            raise SaveError(f"{given}: not copied: {reason_of(error)}") from error
        self._tracker.artifact(beside, str(place))

    def checkpoint(
        self, path: str | Path, step: SupportsIndex, metrics: Mapping[str, SupportsFloat] | None = None, *, written_once: bool = False
    ) -> None:
        """A file or folder of any kind that its owner has written, as the checkpoint of a step; a later one of the step replaces it.

        It is copied into the run directory before this returns; digests, manifest, mirror and retention follow behind the loop, after those
        of the checkpoint before, which this waits for.   metrics: of this checkpoint, by one of which `Settings.best` finds the best; they
        become points of the run at this step, unless the last points of their curves have these values.   written_once: nobody will write
        into these files again (to delete or replace them is no writing): they are linked at once and copied behind the loop. Raises
        SaveError, also of the checkpoint before.
        """
        began, at, numbers = time.perf_counter(), checked_step(step), checked_values(metrics or {})
        for key in numbers:
            checked_name("metric", key)
        self._check_open()
        self._background.finish()
        taken = self._parts.directory.take(Path(path), at, written_once=written_once)
        points = self._points(numbers, at)
        self._background.start(lambda throttle: self._complete(taken, points, throttle))
        self._tracker.metrics({"ckpt/blocked_ms": 1e3 * (time.perf_counter() - began)}, at)

    def wait(self, patience_s: float | None = None) -> RunIdentity | None:
        """Wait until the checkpoint at hand is written, and the store has named the run.   patience_s: for the latter; None: do not wait.

        Raises SaveError if the checkpoint could not be written.
        """
        self._check_open()
        self._background.finish()
        return self._tracker.wait(patience_s) if patience_s else self._tracker.identity

    def mark(self, status: str = "FINISHED", error: BaseException | None = None) -> None:
        """Set how the run has ended, once everything so far is delivered, and go on taking what comes after (a last evaluation, say).

        status: FINISHED, FAILED or KILLED.   error: what ended it, which then decides. The run is open until `end`.   Raises SaveError of
        the last checkpoint.
        """
        ending = endings.of(error) if error is not None else Ending(endings.checked(status), status.lower())
        self._check_open()
        self._marked = ending
        try:
            self._background.finish()
        finally:
            self._tracker.mark(ending.status, ending.tags(self._step), self._step)

    def end(self, status: str | None = None) -> None:
        """Deliver what is left and end the run.   status: FINISHED, FAILED or KILLED; if not given, as it was marked, else KILLED after a
        signal that is held, else FINISHED.   Raises SaveError of the last checkpoint.
        """
        self._check_open()
        self._end(self._marked or self._stopped() if status is None else Ending(endings.checked(status), status.lower()))

    def compare_by(self, metric: str, *, higher_is_better: bool = False) -> None:
        """From now on find the best checkpoint by a metric of theirs, instead of `Settings.best`."""
        self._origin = dataclasses.replace(self._origin, best=checked_name("metric", metric), higher_is_better=higher_is_better)

    def _end(self, ending: Ending) -> None:
        """End the run once, whatever else fails, and then raise what is to be raised."""
        parts, self._ended = self._parts, ending.status
        endings.closed(self)
        try:
            self._deliver(ending)
        finally:
            if parts.held is not None:
                parts.held.release()

    def _deliver(self, ending: Ending) -> None:
        parts, failed, in_flight = self._parts, None, ending.error is not None
        try:
            self._background.finish()
        except (SaveError, InputError) as error:
            failed = error
            ending = Ending("FAILED", type(error).__name__, str(error)) if ending.status == "FINISHED" else ending
        if parts.system_metrics is not None:
            parts.system_metrics.close()
        left = self._tracker.close(ending.status, ending.tags(self._step), self._step)
        if not left:
            parts.directory.discard()
        parts.directory.close()
        parts.note(self._last_line(ending, left))
        if failed is not None and in_flight:
            parts.note(str(failed))
        elif failed is not None:
            raise failed

    def _last_line(self, ending: Ending, left: int) -> str:
        identity, folder = self._tracker.identity, self._parts.directory.folder
        where = f"run {identity.name} ({identity.run_id})" if identity else "a run that the store has not named yet"
        line = f"track: {where}: {ending.status} after step {self._step:,}"
        if left:
            return f"{line}; {left:,} records wait in {shown(folder)}; deliver them: bdh-mlflow sync {shown(folder.parent)}"
        assert identity is not None, "nothing is left, so it was made"
        return f"{line}; {'' if identity.on_server else 'mlflow ui, then '}{identity.page}"

    def _stopped(self) -> Ending:
        return Ending("KILLED", self.stop_requested) if self.stop_requested else Ending("FINISHED", "finished")

    def _complete(self, taken: Taken, points: list[LoggedPoint], throttle: Throttle) -> None:
        """Behind the loop: journal first, then the checkpoint, then its mirror, then retention."""
        parts, began = self._parts, time.perf_counter()
        try:
            self._tracker.sync()
        except OSError as error:
            raise SaveError(f"{parts.directory.path}: the journal cannot be written: {error}") from error
        metrics = {p.key: p.value for p in points}
        saved = parts.directory.complete(taken, self._origin, metrics, self.id or parts.likely_run, throttle)
        self._tracker.metrics({"ckpt/save_s": time.perf_counter() - began}, taken.step)
        self._tracker.snapshot(saved.path, points)
        try:
            for old in checkpoint.expired(parts.directory.path, parts.settings.keep, taken.step):
                checkpoint.remove(old)
        except OSError as error:  # pruning is a convenience
            parts.note(f"{parts.directory.path}: old checkpoints cannot be removed: {error}")

    def _points(self, numbers: Mapping[str, float], step: int) -> list[LoggedPoint]:
        """Points of the run with these values: the last of their curves, where these have them, else logged at this step.

        Lightning counts the steps of a validation from 0 and those of a checkpoint from 1.
        """
        new = {key: value for key, value in numbers.items() if (last := self._last.get(key)) is None or last.value != value}
        if new:
            self._log(new, step)
        return [self._last[key] for key in numbers]

    def _log(self, numbers: Mapping[str, float], step: int) -> None:
        self._step = max(self._step, step)
        at_ms = self._tracker.metrics(numbers, step)
        self._last |= {key: LoggedPoint(key, value, step, at_ms) for key, value in numbers.items()}

    def _check_open(self) -> None:
        if self._foreign:
            raise InputError(
                f"process {os.getpid()} was forked from the one that began this run: hand values to that one, and log them there"
            )
        if self._ended is not None:
            raise InputError(f"the run has ended ({self._ended}); begin another one, or go on with it: track.run(resume={self.id!r})")

    def disown(self) -> None:
        """In a forked process: the run is its parent's."""
        self._foreign = True
        self._tracker.disown()
        self._parts.directory.disown()

    def end_at_exit(self, error: BaseException | None) -> None:
        """The program ends with the run open.   error: what ends it, if anything does."""
        if not self._foreign and self._ended is None:
            with contextlib.suppress(SaveError, InputError):
                self._end(endings.of(error) if error is not None else self._marked or self._stopped())


class NullRun:
    """A run that keeps nothing, with the methods of one: for the other processes of a group, or a trial without tracking."""

    id: str | None = None
    identity: RunIdentity | None = None
    resumed_from: Path | None = None
    directory: Path | None = None
    first_step = 0
    ended = marked = False
    stop_requested: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def metrics(self, values: Mapping[str, SupportsFloat], step: SupportsIndex) -> None:
        """Nothing."""

    def params(self, values: Mapping[str, object]) -> None:
        """Nothing."""

    def tags(self, values: Mapping[str, str]) -> None:
        """Nothing."""

    def samples(self, samples: Iterable[Sample | tuple[str, str]], step: SupportsIndex) -> None:
        """Nothing."""

    def text(self, text: str, artifact: str) -> None:
        """Nothing."""

    def artifact(self, path: str | Path, folder: str = "") -> None:
        """Nothing."""

    def checkpoint(
        self, path: str | Path, step: SupportsIndex, metrics: Mapping[str, SupportsFloat] | None = None, *, written_once: bool = False
    ) -> None:
        """Nothing."""

    def wait(self, patience_s: float | None = None) -> RunIdentity | None:
        """There is no run."""
        return None

    def made_directory(self) -> Path:
        """There is none.   Raises InputError."""
        raise InputError("track.NullRun: a run that keeps nothing has no directory")

    def mark(self, status: str = "FINISHED", error: BaseException | None = None) -> None:
        """Nothing."""

    def end(self, status: str | None = None) -> None:
        """Nothing."""

    def compare_by(self, metric: str, *, higher_is_better: bool = False) -> None:
        """Nothing."""


def _checked_place(artifact: object) -> str:
    """A path among the artifacts.   Raises InputError."""
    if not isinstance(artifact, str) or not is_inside(artifact) or redact.masked(artifact) != artifact:
        raise InputError(f"artifact {artifact!r}: accepted: a relative path with `/`, without `..`")
    return artifact
