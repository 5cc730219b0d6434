"""One sender a run: it reads the journal and has MLflow told, in order, with no end to its patience while training goes on.

`python -m bdh_mlflow.delivery FOLDER` is the sender beside a training; `bdh-mlflow sync` is the same sender afterwards. Two lanes drain one
journal, so that an upload does not hold up the curves: points (the run itself, params, tags, metrics, status) and files (texts,
checkpoints). Each acknowledges by offset; what was sent but not acknowledged is sent again, which the store recognises by its time stamp.
What MLflow is told for each record is in `remote`. When the trainer is gone without a word, the sender delivers what it left and ends the
run for it.
"""

import contextlib
import platform
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bdh_mlflow import checkpoint
from bdh_mlflow.errors import CheckpointError, TrackingError
from bdh_mlflow.files import first_line
from bdh_mlflow.redact import masked
from bdh_mlflow.tracking import records, store
from bdh_mlflow.tracking.journal import Delivered, Ledger, Record
from bdh_mlflow.tracking.run import RemoteRun, segments_of

BATCH_INTERVAL_S = 1.0  # records wait this long for company: about one request a second
FIRST_RETRY_S, LAST_RETRY_S = 1.0, 30.0
PATIENCE_AT_EXIT_S = 7.0  # without any progress, once training is over; for servers, which may be dead
DATABASE_PATIENCE_S = 60.0  # for a database opened here, which is only slow
LAST_MOMENT_S = 0.5  # for a lane to notice that it was given up
PROBE_S = 2.0  # between two questions, at the end, whether the store is alive
CLAIM_S = 20.0  # longer than the sender of a killed process lives without progress
RECORDS_AT_ONCE = 500
POINTS, FILES = "points", "files"
KINDS = {POINTS: {"segment", "params", "tags", "points", "input", "end"}, FILES: {"segment", "text", "checkpoint", "end"}}
MERGED = {"params": "params", "tags": "tags", "points": "values"}
"""Kinds that go into one request together, and the field that holds what each tells."""
REFUSED_UPLOADS = {400, 403, 404, 405, 411, 413, 415}


class _Abandoned(Exception):
    """Patience is over."""


class _Lane:
    """How one lane is doing.   busy: in the middle of an attempt.   failing: the attempt before failed."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.busy = False
        self.failing = False
        self.progress_at = 0.0
        self.given_up = threading.Event()
        self.drained = threading.Event()


class Sender:
    """Delivers the journal of one folder.   heard: called with what is worth knowing, as a dict of plain values."""

    def __init__(self, folder: Path, uri: str, heard: records.OnMessage) -> None:
        self._ledger = Ledger(folder)
        self._folder = folder
        self._uri = uri
        self._heard = heard
        self._state = Delivered()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._broken = threading.Event()
        self._lanes = {name: _Lane(name) for name in (POINTS, FILES)}
        self._options: dict[str, Any] = {}
        self._rejoined = threading.Event()
        self._files_awaited = threading.Event()
        self.held = False
        """Whether the journal was this sender's to deliver."""

    def close(self) -> None:
        """Nothing more will be appended."""
        self._closing.set()

    def run(self) -> int:
        """Deliver until nothing is left, or, once closed, until patience is over.   Returns how many records are left."""
        threads: list[threading.Thread] = []
        try:
            if not self._ledger.claim(CLAIM_S):
                self._say(note=f"tracking: {self._folder}: another process is delivering this journal")
                self._state = self._ledger.delivered()
                return waiting(self._ledger, self._state)
            self.held = True
            self._state = self._ledger.delivered()
            self._remote = RemoteRun(self._uri, self._ledger, self._state, self._say, self._closing.wait)
            threads += [threading.Thread(target=self._drain, args=(lane,), name=lane.name, daemon=True) for lane in self._lanes.values()]
            for thread in threads:
                thread.start()
            self._supervise()
            left = waiting(self._ledger, self._state)
            if not self._broken.is_set():
                self._say(undelivered=left, lost=self._state.lost)
            return left
        finally:
            for thread in threads:
                thread.join(LAST_MOMENT_S)
            if not any(thread.is_alive() for thread in threads):  # one that hangs in a request must not find another file in its place
                self._ledger.close()

    @property
    def broken(self) -> bool:
        """Whether it ended by a fault of its own, so that another one should take over."""
        return self._broken.is_set()

    def _supervise(self) -> None:
        """Wait for the lanes; once closed, give up those that make no progress. Never speaks to the network itself."""
        while not self._closing.wait(0.2):
            if self._broken.is_set():
                return
        closed_at = time.monotonic()
        patience_s = PATIENCE_AT_EXIT_S if self._uri.startswith(("http://", "https://")) else DATABASE_PATIENCE_S
        over = threading.Event()
        threading.Thread(target=self._probe, args=(over,), name="probe", daemon=True).start()
        lanes = self._lanes.values()
        spoke_at = closed_at
        while not all(lane.given_up.is_set() or lane.drained.is_set() for lane in lanes):
            if time.monotonic() - spoke_at > PROBE_S:
                spoke_at = time.monotonic()
                self._say(alive=True)
            for lane in lanes:
                if time.monotonic() - max(closed_at, lane.progress_at) > patience_s:
                    lane.given_up.set()
                lane.drained.wait(0.02)
        over.set()

    def _probe(self, over: threading.Event) -> None:
        """At the end, while something is under way: is there anybody to wait for?"""
        while not over.wait(PROBE_S):
            with contextlib.suppress(Exception):  # no answer is the answer
                self._remote.probe()
                for lane in self._lanes.values():
                    if lane.busy and not lane.failing:
                        lane.progress_at = time.monotonic()

    def _drain(self, lane: _Lane) -> None:
        try:
            if lane.name == POINTS:
                self._rejoin(lane)
                self._rejoined.set()
            else:
                while not self._rejoined.wait(0.05):
                    self._check(lane)
                self._options = self._last_segment(self._state.files) or {}
                self._offer_again(lane)
            while True:
                closed, stop = self._closing.is_set(), self._ledger.size()
                for batch in _batches(self._new_records(lane, stop)):
                    self._send(lane, batch)
                    self._acknowledge(lane, batch[-1].end)
                if stop > getattr(self._state, lane.name):
                    self._acknowledge(lane, stop)  # what follows is the other lane's
                if closed:
                    break
                self._closing.wait(BATCH_INTERVAL_S)
            if lane.name == FILES:
                self._offer_again(lane)
            else:
                self._end_for_the_dead(lane)
            lane.drained.set()
        except _Abandoned:
            lane.given_up.set()
        except Exception as error:  # a fault of ours: another sender takes over from what is acknowledged
            self._say(note=f"tracking: the sender failed: {type(error).__name__}: {first_line(error)}")
            self._broken.set()
            lane.given_up.set()

    def _new_records(self, lane: _Lane, stop: int) -> Iterator[Record]:
        """Records of this lane up to `stop` that are not acknowledged yet."""
        for record in self._ledger.read(getattr(self._state, lane.name), stop):
            if record.kind in KINDS[lane.name]:
                yield record

    def _send(self, lane: _Lane, batch: list[Record]) -> None:
        """Tell, and where something is refused, tell the rest without it."""
        refusal = self._attempt(lane, lambda: self._tell(lane, batch))
        if not refusal:
            return
        if lane.name == POINTS and batch[0].kind == "segment":
            self._say(refused=refusal)
            raise _Abandoned
        parts = batch if len(batch) > 1 else _single(batch[0])
        if len(parts) > 1:
            for record in parts:  # one of them spoils it
                self._send(lane, [record])
        elif lane.name == FILES:
            self._state.set_aside.append(batch[0].end)
            self._say(note=f"tracking: {_named(batch[0])} was refused and stays here, `sync` offers it again ({refusal})")
        else:
            self._state.lost += 1
            self._say(note=f"tracking: {_named(batch[0])} was refused for good ({refusal})")

    def _acknowledge(self, lane: _Lane, end: int) -> None:
        with self._lock:
            setattr(self._state, lane.name, max(end, getattr(self._state, lane.name)))
            with contextlib.suppress(OSError):  # a full disk here: the next one is written, and what is sent again is there once
                self._ledger.acknowledge(self._state)
        self._say(delivered=min(self._state.points, self._state.files), lost=self._state.lost)

    def _attempt(self, lane: _Lane, act: Callable[[], None]) -> str:
        """Do it until it is done or refused for good.   Returns the refusal, empty if done.   Raises _Abandoned when patience is over."""
        pause_s = FIRST_RETRY_S
        while True:
            lane.busy = True
            try:
                act()
            except _Abandoned:
                raise
            except Exception as error:  # MLflow raises its own, requests', SQLAlchemy's and OS errors; none may end the sender
                lane.busy = False
                if isinstance(error, TrackingError):
                    self._say(refused=str(error))
                    raise _Abandoned from None
                if is_permanent(lane, error):
                    return first_line(error)
                if not lane.failing:
                    lane.failing = True
                    whose = masked(self._uri) if lane.name == POINTS else "the artifact store"
                    self._say(note=f"tracking: {whose} does not answer ({first_line(error)}); training goes on, trying again")
                if self._closing.is_set():
                    lane.given_up.wait(min(pause_s, FIRST_RETRY_S))
                else:
                    self._closing.wait(pause_s)  # at the end it is tried at once
                pause_s = min(2 * pause_s, LAST_RETRY_S)
            else:
                lane.busy = False
                lane.progress_at = time.monotonic()
                if lane.failing:
                    lane.failing = False
                    self._say(note="tracking: delivering again")
            if lane.given_up.is_set():  # also when it was done after all: nobody waits for the word any more
                raise _Abandoned
            if not lane.failing:
                return ""

    def _tell(self, lane: _Lane, batch: list[Record]) -> None:
        record, remote = batch[0], self._remote
        if lane.name == FILES:
            self._await_run(lane)
        match record.kind:
            case "segment" if lane.name == POINTS:
                remote.attach(record.fields, self._state.run_id)
                self._attached(record.fields)
            case "segment":
                self._options = record.fields
                remote.write_segments(max(record.end, self._state.files), self._training())
            case "params" | "tags" | "points":
                remote.log(batch)
            case "input":
                remote.input(record)
            case "text":
                remote.text(record)
            case "checkpoint":
                self._await_points(lane, record)
                self._mirror(record)
            case "end" if lane.name == POINTS:
                if self._is_last(record):
                    self._await_files(lane)
                remote.log([record])
                if self._is_last(record):  # still: the wait may have been long
                    remote.end(record.fields["status"])
                self._state.ended = self._state.segment
            case "end":
                remote.write_segments(max(record.end, self._state.files), self._training())

    def _is_last(self, end: Record) -> bool:
        """Whether nobody has gone on after this end."""
        return not any(r.kind == "segment" for r in self._ledger.read(end.end))

    def _rejoin(self, lane: _Lane) -> None:
        """Take the run up that an earlier sender has found or made. A store that does not know it is another one: it is told everything."""
        self._attempt(lane, self._remote.connect)
        segment, known = self._last_segment(self._state.points), self._state.run_id
        if known is None or segment is None:
            return
        here = True

        def take_up() -> None:
            nonlocal here
            here = self._remote.knows(known)
            if here:
                self._remote.attach(segment, known, again=True)

        refusal = self._attempt(lane, take_up)
        if refusal:
            self._say(refused=refusal)
            raise _Abandoned
        if here:
            self._attached(segment)
        else:
            fresh = Delivered(lost=self._state.lost)
            vars(self._state).update(vars(fresh))

    def _attached(self, segment: dict[str, Any]) -> None:
        with self._lock:
            self._state.run_id, self._state.tracking_uri = self._remote.run_id, masked(self._uri)
            self._state.segment = segment["number"]

    def _last_segment(self, up_to: int) -> dict[str, Any] | None:
        last = None
        for record in self._ledger.read(0, up_to):
            if record.kind == "segment":
                last = record.fields
        return last

    def _mirror(self, record: Record) -> None:
        told, here = Path(record.fields["path"]), self._folder / Path(record.fields["path"]).name
        path = here if here.is_file() else told  # the run directory may have been moved since
        try:
            saved = checkpoint.describe(path)
        except CheckpointError as error:
            if self._options.get("keep") is None and not any(r.kind == "checkpoint" for r in self._ledger.read(record.end)):
                self._say(note=f"tracking: {path.name} cannot be mirrored: {error}")
            return  # else retention was quicker, or a rewind has replaced it and a later record speaks of what is there now
        newest = not any(r.kind == "checkpoint" for r in self._ledger.read(record.end, self._state.files))
        options = self._options
        try:
            self._remote.checkpoint(saved, record.fields["evaluation"], options.get("mirror", True), options.get("keep"), newest=newest)
        except FileNotFoundError:
            if path.is_file():
                raise  # else retention came in between

    def _offer_again(self, lane: _Lane) -> None:
        """Files that were refused before, once each."""
        for end in list(self._state.set_aside):
            record = next((r for r in self._ledger.read(0, end) if r.end == end), None)
            if record is None or self._told_again(record) or not self._attempt(lane, lambda record=record: self._tell(lane, [record])):  # type: ignore[misc]
                self._state.set_aside.remove(end)
                self._acknowledge(lane, end)

    def _told_again(self, record: Record) -> bool:
        """Whether a text has been replaced by a later one of its name."""
        artifact = record.fields.get("artifact")
        later = self._ledger.read(record.end, self._state.files)
        return artifact is not None and any(r.fields.get("artifact") == artifact for r in later)

    def _end_for_the_dead(self, lane: _Lane) -> None:
        """The last segment has not said how it ended and its process is gone: it was killed."""
        rows = list(segments_of(self._ledger.read(0)))
        if not rows or rows[-1]["reason"] is not None or self._training():
            return

        def end() -> None:
            self._await_files(lane)
            if not self._training():  # still: the wait may have been long
                self._remote.end_for_the_dead(rows[-1]["last_step"])
                self._remote.write_segments(self._ledger.size(), False)

        if self._state.ended < rows[-1]["segment"] and not self._attempt(lane, end):
            self._state.ended = rows[-1]["segment"]
            self._acknowledge(lane, self._state.points)

    def _training(self) -> bool:
        return training(self._ledger)

    def _await_run(self, lane: _Lane) -> None:
        """Files go to a run; until there is one they wait."""
        while not self._remote.attached.wait(0.05):
            self._check(lane)

    def _check(self, lane: _Lane) -> None:
        """While the files wait for the points.   Raises _Abandoned if that is hopeless."""
        points = self._lanes[POINTS]
        if points.given_up.is_set() or lane.given_up.is_set():
            raise _Abandoned
        if not points.failing:
            lane.progress_at = points.progress_at

    def _await_points(self, lane: _Lane, record: Record) -> None:
        """An evaluation is linked as the store has it, perhaps from before an interruption: points told before a checkpoint go first."""
        if record.fields["evaluation"] is None:
            return
        before = [r.end for r in self._ledger.read(self._state.points, record.end) if r.kind in KINDS[POINTS]]
        drained = self._lanes[POINTS].drained
        while before and self._state.points < before[-1] and not (self._files_awaited.is_set() or drained.is_set()):
            self._check(lane)
            time.sleep(0.05)

    def _await_files(self, lane: _Lane) -> None:
        """A run ends after its files, as long as there is hope for them."""
        self._files_awaited.set()  # so that neither waits for the other
        files = self._lanes[FILES]
        while not files.drained.wait(0.02) and not files.given_up.is_set():
            if lane.given_up.is_set():
                raise _Abandoned

    def _say(self, **words: Any) -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody listens any more
            self._heard(words)


def waiting(ledger: Ledger, state: Delivered) -> int:
    """Records that are still to be delivered, and one more if the store does not know yet how the run ended."""
    records = sum(
        (record.kind in KINDS[POINTS] and record.end > state.points) or (record.kind in KINDS[FILES] and record.end > state.files)
        for record in ledger.read(min(state.points, state.files))
    )
    segments = [record.fields["number"] for record in ledger.read(0) if record.kind == "segment"]
    return records + len(state.set_aside) + (not records and bool(segments) and segments[-1] > state.ended)


def training(ledger: Ledger) -> bool:
    """Whether the process that appends to a journal is alive."""
    alive = ledger.training()
    if alive is None:  # a file system without locks
        rows = [record.fields for record in ledger.read(0) if record.kind == "segment"]
        return bool(rows) and rows[-1]["host"] == platform.node() and Path(f"/proc/{rows[-1]['pid']}").exists()
    return alive


def _batches(records: Iterator[Record]) -> Iterator[list[Record]]:
    """Neighbours that go into one request together; nothing out of order."""
    batch: list[Record] = []
    for record in records:
        if batch and (record.kind not in MERGED or batch[-1].kind not in MERGED or len(batch) >= RECORDS_AT_ONCE):
            yield batch
            batch = []
        batch.append(record)
    if batch:
        yield batch


def _single(record: Record) -> list[Record]:
    """A record that tells several things, as records that tell one each."""
    field = MERGED.get(record.kind)
    if field is None:
        return [record]
    return [record._replace(fields={**record.fields, field: {key: value}}) for key, value in record.fields[field].items()]


def _named(record: Record) -> str:
    fields = record.fields
    match record.kind:
        case "points":
            return f"{', '.join(fields['values'])} at step {fields['step']}"
        case "text":
            return str(fields["artifact"])
        case "checkpoint":
            return Path(fields["path"]).name
        case "params" | "tags":
            return f"{record.kind} {', '.join(fields[record.kind])}"
    return record.kind


def is_permanent(lane: _Lane, error: Exception) -> bool:
    """Whether trying again cannot help: what is told is not valid, or, for files, the server or a proxy before it will not have it.

    A store that refuses everything (a deleted run, a permission withdrawn) may be mended: for that one waits.
    """
    status = getattr(getattr(error, "response", None), "status_code", None)
    return store.invalid(error) or (lane.name == FILES and status in REFUSED_UPLOADS)
