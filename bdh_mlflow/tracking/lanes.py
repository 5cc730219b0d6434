"""The two lanes of a delivery: each takes its records from the journal in order, retries, sets aside what is refused, and acknowledges.

The points lane finds or makes the run first; files wait until it is known. The end of a run is sent after its files, and when the process
that trained was killed, the points lane delivers what it left and marks the run KILLED. What MLflow is asked for each record
is in `run`.
"""

import errno
import functools
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from mlflow.exceptions import MlflowException

from bdh_mlflow import checkpoint
from bdh_mlflow.errors import CheckpointError
from bdh_mlflow.redact import masked
from bdh_mlflow.tracking import store
from bdh_mlflow.tracking.journal import Delivered, Entry
from bdh_mlflow.tracking.lane import Abandoned, Lane, Shared, named
from bdh_mlflow.tracking.records import (
    FILES_LANE,
    POINTS_LANE,
    AnyCheckpoint,
    ArtifactSaved,
    Attached,
    End,
    Input,
    Note,
    Params,
    Points,
    Refused,
    Segment,
    Tags,
    Text,
)

RECORDS_AT_ONCE = 500
FILES_AT_ONCE = 16
SHARED_REQUESTS = (Params, Tags, Points, End), (Input,)
NAMED_FILES = 3  # of those that were refused
REFUSED_UPLOADS = {400, 403, 404, 405, 411, 413, 415}
"""HTTP statuses after which the same upload would be refused again."""


class PointsLane(Lane):
    """The run itself: found or made, its params, tags, metrics, datasets, and how it ended.   files: the other lane, for the end."""

    name = "points"
    files: "FilesLane"

    def __init__(self, shared: Shared) -> None:
        super().__init__(shared)
        self.rejoined = threading.Event()
        """Set once it is known whether an earlier sender's run is the one to go on with."""
        self.awaiting_files = threading.Event()
        """Set when the end of the run waits for the files."""

    def _begin(self) -> None:
        """Take up the run that an earlier sender has found or made. A store that does not know it is another one: it gets everything."""
        shared, state = self._shared, self._shared.state
        self.attempt(shared.run.connect)
        segment, known = shared.reader.index.last_segment(state.points), state.run_id
        if known is not None and segment is not None:
            here = True

            def take_up() -> None:
                nonlocal here
                here = shared.run.knows(known)
                if here:
                    shared.run.attach(segment, known, self._own_number(), again=True)

            if refusal := self.attempt(take_up):
                shared.say(Refused(reason=refusal))
                raise Abandoned
            if here:
                self._attached(segment)
            else:
                vars(state).update(vars(Delivered(lost=state.lost)))
        self.rejoined.set()

    def _finish(self) -> None:
        self._mark_killed()

    def _batches(self, stop: int) -> Iterator[list[Entry]]:
        """Neighbouring params, tags and metrics share a request, and so do datasets; nothing is sent out of order."""
        batch, last = list[Entry](), None
        for entry in self._shared.reader.read(self._offset, stop):
            if entry.record.kind not in POINTS_LANE:
                continue
            sort = next((number for number, kinds in enumerate(SHARED_REQUESTS) if isinstance(entry.record, kinds)), None)
            ended = batch and isinstance(batch[-1].record, End)
            if batch and (sort is None or sort != last or ended or len(batch) >= RECORDS_AT_ONCE):
                yield batch
                batch = []
            batch.append(entry)
            last = sort
        if batch:
            yield batch

    def _send(self, batch: list[Entry]) -> None:
        shared, run, last = self._shared, self._shared.run, batch[-1]
        match last.record:
            case Segment() as segment:
                run.attach(segment, shared.state.run_id, self._own_number())
                self._attached(segment)
            case Input():
                run.inputs([entry.record for entry in batch if isinstance(entry.record, Input)])
            case Params() | Tags() | Points():
                run.log(batch)
            case End() as end:
                run.log(batch)
                if self._is_last(last):
                    self._await_files(last.end)
                if self._is_last(last):  # still: the wait may have been long
                    run.end(end.status)
                shared.state.ended = shared.state.segment

    def _refused(self, entry: Entry, refusal: str) -> None:
        shared = self._shared
        if isinstance(entry.record, Segment):
            shared.say(Refused(reason=refusal))
            raise Abandoned
        shared.state.lost += 1
        shared.say(Note(text=f"tracking: {named(entry.record)} was refused for good ({refusal})"))

    def is_stuck(self) -> bool:
        """As a request to a database is that waits for a lock; nothing but files may take so long."""
        return not self.awaiting_files.is_set() and time.monotonic() - self.began_at > self._shared.patience.request_s

    def _own_number(self) -> int:
        """The furthest segment of this journal."""
        return max(segment.number for segment in self._shared.reader.index.segments)

    def _is_last(self, end: Entry) -> bool:
        """Whether no segment has gone on after this end."""
        self._shared.reader.index.update()
        return self._shared.reader.index.is_last_segment(end.end)

    def _attached(self, segment: Segment) -> None:
        shared = self._shared
        with shared.lock:
            shared.state.run_id, shared.state.tracking_uri = shared.run.run_id, masked(shared.uri)
            shared.state.segment = segment.number
        shared.say(Attached(run=shared.run.identity))

    def _await_files(self, end: int) -> None:
        """A run ends after the files that were recorded before it, as long as there is hope for them.   end: offset of its record."""
        self.awaiting_files.set()  # so that neither waits for the other
        try:
            while not self.files.delivered(end) and not self.files.given_up.is_set():
                if self.given_up.is_set():
                    raise Abandoned
                time.sleep(0.02)
        finally:
            self.awaiting_files.clear()

    def _mark_killed(self) -> None:
        """The last segment has not said how it ended and its process is gone: it was killed."""
        shared, reader = self._shared, self._shared.reader
        reader.index.update()
        spans = reader.index.spans()
        if not spans or spans[-1].end is not None or not self._is_gone(spans[-1].segment):
            return

        def mark() -> None:
            self._await_files(reader.index.update())
            if not reader.is_training():  # still: the wait may have been long
                shared.run.mark_killed(spans[-1].last_step)
                shared.run.write_segments(reader.index.spans(), training=False)

        number = spans[-1].segment.number
        if shared.state.ended < number and not self.attempt(mark):
            shared.state.ended = number
            self._acknowledge(shared.state.points)

    def _is_gone(self, last: Segment) -> bool:
        """Whether no process trains here; the appender is waited for while it ends, until another one goes on.   last: segment."""
        shared, index = self._shared, self._shared.reader.index
        dying = shared.orphaned.is_set() and last.pid == shared.appender
        until = time.monotonic() + (shared.patience.dying_s if dying else 0.0)
        while shared.reader.is_training():
            index.update()
            if time.monotonic() >= until or index.segments[-1] != last or self.given_up.is_set():
                return False
            self.progress_at = time.monotonic()  # nobody is to lose patience meanwhile
            time.sleep(0.05)
        return True


class FilesLane(Lane):
    """Files among the artifacts: texts, segments.json, mirrored checkpoints."""

    name = "files"

    def __init__(self, shared: Shared, points: PointsLane) -> None:
        super().__init__(shared)
        self._points = points
        self._reported = set[str]()  # reasons

    def _begin(self) -> None:
        while not self._points.rejoined.wait(0.05):
            self._check()
        self._shared.segment = self._shared.reader.index.last_segment(self._offset)
        self._retry_rejected()

    def delivered(self, end: int) -> bool:
        """Whether everything of this lane up to an offset is done."""
        return self.drained.is_set() or self._offset >= end

    def _finish(self) -> None:
        self._retry_rejected()
        left = [named(entry.record) for end in self._shared.state.set_aside if (entry := self._entry_at(end))]
        if len(left) > 1:
            names = ", ".join(left[:NAMED_FILES]) + ", ..." * (len(left) > NAMED_FILES)
            self._shared.say(Note(text=f"tracking: {len(left)} files were refused and stay here: {names}"))

    def _batches(self, stop: int) -> Iterator[list[Entry]]:
        """What goes side by side: texts, and one checkpoint. A segment says how its own checkpoints are kept, so it begins a batch."""
        batch, checkpoints = list[Entry](), 0
        for entry in self._shared.reader.read_files(self._offset, stop):
            if entry.record.kind not in FILES_LANE:
                continue
            saved = isinstance(entry.record, AnyCheckpoint)
            if batch and (isinstance(entry.record, Segment) or (saved and checkpoints) or len(batch) >= FILES_AT_ONCE):
                yield batch
                batch, checkpoints = [], 0
            batch.append(entry)
            checkpoints += saved
        if batch:
            yield batch

    def _send(self, batch: list[Entry]) -> None:
        shared = self._shared
        while not shared.run.attached.wait(0.05):  # files go to a run
            self._check()
        acts, texts = list[Callable[[], object]](), list[Text]()
        for entry in batch:
            match entry.record:
                case Segment() as segment:
                    shared.segment = segment
                case Text() as text:
                    texts.append(text)
                case ArtifactSaved() as artifact:
                    acts.append(functools.partial(shared.run.artifact, shared.reader.folder / artifact.path, artifact.artifact))
                case saved if isinstance(saved, AnyCheckpoint):
                    acts.append(functools.partial(self._mirror, entry, saved))
        if any(isinstance(entry.record, Segment | End) for entry in batch):
            acts.append(self._write_segments)
        shared.run.together(*acts, *shared.run.texts(texts))

    def _refused(self, entry: Entry, refusal: str) -> None:
        """Set aside; a reason that holds for many files is told once."""
        name, state = named(entry.record), self._shared.state
        state.set_aside.append(entry.end)
        reason = re.sub(r"\d+", "", refusal)  # steps and ids are of the file, not of the reason
        if reason not in self._reported:
            self._reported.add(reason)
            self._shared.say(Note(text=f"tracking: {name} was refused and stays here, `sync` offers it again ({refusal})"))

    def _is_permanent(self, error: Exception) -> bool:
        """For files also: the server or a proxy before it will not have this upload, or there can be no such place on this machine."""
        refused = getattr(getattr(error, "response", None), "status_code", None) in REFUSED_UPLOADS
        in_the_way = isinstance(error, IsADirectoryError | FileExistsError) or getattr(error, "errno", None) == errno.ENAMETOOLONG
        nowhere = isinstance(error, OSError) and store.why_no_folder(self._shared.run.identity.artifact_uri) is not None
        return refused or in_the_way or nowhere or super()._is_permanent(error)

    def _store_name(self, error: Exception) -> str:
        """The server where nobody answers at its address, or it fails by itself; else the artifact store, which raises its own kinds."""
        said, url = str(error), str(getattr(getattr(error, "request", None), "url", ""))
        answered = getattr(error, "response", None) is not None or "error responses" in said  # MLflow's own word after a 5xx
        if answered and "/mlflow-artifacts/" in said + url:
            return f"the artifact store behind {masked(self._shared.uri)}"
        of_server = isinstance(error, MlflowException) or url.startswith(self._shared.uri.rstrip("/"))
        return super()._store_name(error) if of_server else "the artifact store"

    def _write_segments(self) -> None:
        reader = self._shared.reader
        reader.index.update()
        self._shared.run.write_segments(reader.index.spans(), training=reader.is_training())

    def _mirror(self, entry: Entry, record: AnyCheckpoint) -> None:
        shared, index, segment = self._shared, self._shared.reader.index, self._shared.segment
        keep, mirrored = (segment.keep, segment.mirror) if segment else (None, True)
        given, here = Path(record.path), shared.folder / Path(record.path).name
        path = here if here.exists() else given  # the run directory may have been moved since
        index.update()
        try:
            saved = checkpoint.describe(path)
        except CheckpointError as error:
            if keep is None and index.is_last_checkpoint(entry.end):
                shared.say(Note(text=f"tracking: {path.name} cannot be mirrored: {error}"))
            return  # else retention was quicker, or a rewind has replaced it and a later record names what is there now
        newest = not any(
            isinstance(later.record, AnyCheckpoint) for later in shared.reader.read_files(entry.end, max(entry.end, self._offset))
        )
        try:
            wait = functools.partial(self._await_points, entry)
            shared.run.checkpoint(saved, record.points, mirrored, keep, newest=newest, points_sent=wait)
        except FileNotFoundError:
            if path.exists():
                raise  # else retention came in between

    def _retry_rejected(self) -> None:
        """Files that were refused before, once each."""
        shared, index = self._shared, self._shared.reader.index
        for end in list(shared.state.set_aside):
            entry = self._entry_at(end)
            replaced = entry and isinstance(entry.record, Text) and index.is_replaced_later(entry.record.artifact, end, self._offset)
            if entry is None or replaced or not self.attempt(lambda entry=entry: self._send([entry])):  # type: ignore[misc]
                shared.state.set_aside.remove(end)
                self._acknowledge(end)

    def _entry_at(self, end: int) -> Entry | None:
        """The record of the files lane that ends at an offset."""
        return next(iter(self._shared.reader.read_files(end - 1, end)), None)

    def _check(self) -> None:
        """While files wait for the points.   Raises Abandoned if that is hopeless."""
        if self._points.given_up.is_set() or self.given_up.is_set():
            raise Abandoned
        if not self._points.failing:
            self.progress_at = self._points.progress_at

    def _await_points(self, entry: Entry) -> None:
        """An evaluation is linked as the store has it, perhaps from before an interruption: points before a checkpoint go first."""
        before, points = self._shared.reader.index.points_end_before(entry.end), self._points
        while self._shared.state.points < before and not (points.awaiting_files.is_set() or points.drained.is_set()):
            self._check()
            time.sleep(0.05)
