"""A run while it is open: which one it is, and how it ends, once, whatever ends it."""

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

from bdh_mlflow.checkpoint import RunDirectory, Snapshot, SnapshotOrigin
from bdh_mlflow.errors import InputError, SaveError
from bdh_mlflow.files import shown
from bdh_mlflow.text import LoggedPoint
from bdh_mlflow.track import endings
from bdh_mlflow.track.endings import Ending
from bdh_mlflow.track.settings import Settings
from bdh_mlflow.track.signals import HeldSignals
from bdh_mlflow.track.taking import Place, Taking
from bdh_mlflow.tracking.records import RunIdentity
from bdh_mlflow.tracking.system_metrics import SystemMetrics
from bdh_mlflow.tracking.tracker import Tracker


@dataclass(frozen=True)
class Parts:
    """What a run is made of.   resumed: the checkpoint that it goes on from.   likely_run: its MLflow run while the store does not answer.

    first_step: see `Run`.   held: None if signals are not to be held.   system_metrics: None if machines are not sampled.
    """

    settings: Settings
    directory: RunDirectory
    tracker: Tracker
    origin: SnapshotOrigin
    resumed: Snapshot | None
    first_step: int
    likely_run: str | None
    held: HeldSignals | None
    system_metrics: SystemMetrics | None
    note: endings.Say


class OpenRun:
    """What a run is besides what is logged to it; see `Run`."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._tracker = parts.tracker
        self._taking = Taking(Place(parts.directory, parts.tracker, parts.likely_run, parts.settings.keep, parts.note), parts.origin)
        self._last: dict[str, LoggedPoint] = {}
        self._params: dict[str, Any] = {}
        self._step = self.first_step
        self._ended: str | None = None
        self._marked: Ending | None = None
        self._foreign = False
        self._changing = threading.RLock()  # checkpoints are taken one at a time, and none while the run ends
        self._appending = threading.Lock()  # nothing is recorded once it has ended
        endings.opened(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end(endings.of(error) if error is not None else self._marked or self._stopped())

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
        """Updates completed before this process; 0 if the run begins anew."""
        return self._parts.first_step

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

    def wait(self, patience_s: float | None = None) -> RunIdentity | None:
        """Wait until the checkpoint at hand is written, and the store has named the run.   patience_s: for the latter; None: do not wait.

        Raises SaveError or InputError if the checkpoint could not be written, TrackingError if the store refuses the run.
        """
        with self._changing:
            self._check_open()
            self._taking.finish()
        return self._tracker.wait(patience_s) if patience_s else self._tracker.identity

    @contextlib.contextmanager
    def noting(self, which: str) -> Iterator[None]:
        """For a trainer whose training is worth more than its mirror: a checkpoint that fails is a note.   which: it is, in words."""
        try:
            yield
        except (SaveError, InputError) as error:
            self._parts.note(f"track: {which} is not tracked: {error}")

    def mark(self, status: str = "FINISHED", error: BaseException | None = None) -> None:
        """Set how the run has ended, once everything so far is delivered, and go on taking what comes after (a last evaluation, say).

        status: FINISHED, FAILED or KILLED.   error: what ended it, which then decides. The run is open until `end`.   Raises SaveError of
        the last checkpoint.
        """
        ending = endings.of(error) if error is not None else Ending(endings.checked(status), status.lower())
        with self._changing:
            self._check_open()
            try:
                self._taking.finish()
            except (SaveError, InputError) as failed:
                ending = endings.of(failed) if ending.status == "FINISHED" else ending
                raise
            finally:
                self._marked = ending
                self._tracker.mark(ending.status, ending.tags(self._step), self._step)

    def end(self, status: str | None = None) -> None:
        """Deliver what is left and end the run.   status: FINISHED, FAILED or KILLED; if not given, as it was marked, else KILLED after a
        signal that is held, else FINISHED.   Raises SaveError of the last checkpoint.
        """
        with self._changing:
            self._check_open()
            self._end(self._marked or self._stopped() if status is None else Ending(endings.checked(status), status.lower()))

    def _end(self, ending: Ending) -> None:
        """End the run once, whatever else fails, and then raise what is to be raised."""
        with self._changing:
            if self._foreign or self._ended is not None:
                return
            with self._appending:
                self._ended = ending.status
            endings.closed(self)
            try:
                self._deliver(ending)
            finally:
                if self._parts.held is not None:
                    self._parts.held.release()

    def _deliver(self, ending: Ending) -> None:
        """Wait for the checkpoint at hand, then for the delivery of what is left."""
        parts, in_flight = self._parts, ending.error is not None
        try:
            self._taking.finish()
        except BaseException as failed:
            ending = endings.of(failed) if ending.status == "FINISHED" else ending
            if not in_flight or not isinstance(failed, SaveError | InputError):
                raise
            parts.note(str(failed))  # what ends the loop is what is raised
        finally:
            try:
                if parts.system_metrics is not None:
                    parts.system_metrics.close()
            finally:
                left = self._tracker.close(ending.status, ending.tags(self._step), self._step)
                if not left:
                    parts.directory.discard()
                parts.directory.close()
                parts.note(_last_line(self._tracker.identity, ending, self._step, left, parts.directory.folder))

    def _stopped(self) -> Ending:
        return Ending("KILLED", self.stop_requested) if self.stop_requested else Ending("FINISHED", "finished")

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
        if self._parts.held is not None:
            self._parts.held.restore()
        self._tracker.disown()
        self._parts.directory.disown()

    def end_at_exit(self, error: BaseException | None) -> None:
        """The program ends with the run open.   error: what ends it, if anything does."""
        with self.noting("the last checkpoint"):
            self._end(endings.of(error) if error is not None else self._marked or self._stopped())


def _last_line(identity: RunIdentity | None, ending: Ending, step: int, left: int, folder: Path) -> str:
    """How a run has ended, where it is to be seen, and what to do with what is left.   left: records that wait in `folder`."""
    where = f"run {identity.name} ({identity.run_id})" if identity else "a run that the store has not named yet"
    line = f"track: {where}: {ending.status} after step {step:,}"
    if left or identity is None:
        return f"{line}; {left:,} records wait in {shown(folder)}; deliver them: bdh-mlflow sync {shown(folder)}"
    return f"{line}; {'' if identity.on_server else 'mlflow ui, then '}{identity.page}"
