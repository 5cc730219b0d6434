"""The write-ahead log of everything that is to be sent to MLflow: a line for each record, appended, never changed.

The training appends and never waits; a sender (see `delivery`) reads from the offset it has acknowledged. A record is with the operating
system when `append` returns, so a killed process loses none. A folder holds one journal: `journal.jsonl`, and beside it `journal.json`,
how far delivery has come. The folder waits under `checkpoints/.pending/` and becomes the run directory with the first checkpoint; a reader
holds the folder itself, so it does not notice the move. Knows nothing of MLflow.
"""

import bisect
import contextlib
import dataclasses
import fcntl
import json
import os
import platform
import re
import threading
import time
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter

from bdh_mlflow import host
from bdh_mlflow.files import try_lock
from bdh_mlflow.tracking.records import (
    FILES_LANE,
    POINTS_LANE,
    AnyCheckpoint,
    End,
    JournalRecord,
    Points,
    Segment,
    Text,
    from_line,
    to_line,
)

FILE_NAME = "journal.jsonl"
STATE_NAME = "journal.json"
UNTOUCHED = "{}"
"""What a new journal's state file holds until a delivery begins; it goes before the first request."""
BLOCK_BYTES = 1 << 20

_as_json = json.JSONEncoder(separators=(",", ":")).encode  # json.dumps would make an encoder for each record
_POINTS = b'{"kind":"points",'
_LOSS = b'"train/loss":'
_BESIDE = re.compile(rb'"values":{"(system|ckpt|tracker)/')  # of the machine and of ourselves: their steps come in another order


class Entry(NamedTuple):
    """A record where it stands.   end: offset of the next line.   at_ms: Unix time, ms."""

    end: int
    at_ms: int
    record: JournalRecord


class Journal:
    """The appending end.   Raises OSError if the file cannot be opened; from then on a failing disk only delays."""

    def __init__(self, folder: Path) -> None:
        self._lock = threading.Lock()
        self._file = os.open(folder / FILE_NAME, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        self._size = os.fstat(self._file).st_size
        self._unwritten = b""
        if not self._size and not (state := folder / STATE_NAME).exists():
            state.write_text(UNTOUCHED)
        if self._size and os.pread(self._file, 1, self._size - 1) != b"\n":
            self._unwritten = b"\n"  # a kill cut the last line short: it is no record
        self.records = 0
        """Records appended by this process."""
        self.append_s = 0.0
        """Seconds that all of it took."""

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self._size

    def append(self, record: JournalRecord) -> int:
        """Keep a record. It is with the operating system on return, or, while the disk is full, waits for the next call.

        Returns its time stamp, Unix time in ms.
        """
        started, at_ms = time.perf_counter(), int(time.time() * 1000)
        line = _as_json(to_line(record, at_ms)).encode() + b"\n"
        with self._lock:
            self._unwritten += line
            self._write()
            self.records += 1
            self.append_s += time.perf_counter() - started
        return at_ms

    def sync(self) -> None:
        """Put everything on the disk itself.   Raises OSError."""
        with self._lock:
            self._write()
            if self._unwritten:
                raise OSError(f"{len(self._unwritten):,} bytes cannot be written")
        os.fsync(self._file)  # not under the lock: the loop appends meanwhile

    def disown(self) -> None:
        """In a forked process: what it appends goes nowhere."""
        host.disown(self._file)

    def close(self) -> int:
        """Close the file.   Returns how many bytes could not be written."""
        with self._lock:
            self._write()
            os.close(self._file)
            self._file = -1
            return len(self._unwritten)

    def _write(self) -> None:
        try:
            written = os.write(self._file, self._unwritten) if self._unwritten else 0
            if written < len(self._unwritten):
                os.ftruncate(self._file, self._size)
                return
        except OSError:
            return
        self._size += written
        self._unwritten = b""


@dataclass
class Delivered:
    """How far delivery has come.

    run_id, tracking_uri: the MLflow run, once it is known; credentials are masked.   points, files: offsets up to which metrics, params and
    tags, or files, have been acknowledged.   segment: number of the segment delivered last.   ended: of the last one whose end the store
    knows.   lost: records refused for good.   set_aside: offsets of files that the store refused; `sync` offers them again.
    """

    run_id: str | None = None
    tracking_uri: str | None = None
    points: int = 0
    files: int = 0
    segment: int = 0
    ended: int = 0
    lost: int = 0
    set_aside: list[int] = field(default_factory=list)


_DELIVERED = TypeAdapter(Delivered)


@dataclass
class _Span:
    """The lines of one segment.   last: its last line.   losses: its last two lines with a training loss (a kill may have torn one).
    points: the same with metrics of any name but those of `_BESIDE`.
    """

    segment: Entry
    last: tuple[int, int]
    losses: list[tuple[int, int]] = field(default_factory=list)
    points: list[tuple[int, int]] = field(default_factory=list)
    end: Entry | None = None


class SegmentSpan(NamedTuple):
    """What a journal says of one segment.

    end, ended_at_ms: None if the process has not said how it ended.   last_step: updates completed when it wrote last.   last_seen_ms: when
    that was. Unix times in ms.
    """

    segment: Segment
    end: End | None
    ended_at_ms: int | None
    last_step: int
    last_seen_ms: int


class JournalIndex:
    """Where everything in a journal stands. The file is read once; afterwards only what was appended since.

    Points come by the million: their lines are counted by the first bytes and never parsed. One index may be used by several threads.
    """

    def __init__(self, file: int) -> None:
        """file: descriptor of the journal, open for reading."""
        self._file = file
        self._lock = threading.Lock()
        self._size = 0
        self._points_ends = array("q")
        self._files_starts, self._files_ends = array("q"), array("q")
        self._spans: list[_Span] = []
        self._last_checkpoint = 0
        self._last_text: dict[str, int] = {}

    def update(self) -> int:
        """Take in what was appended.   Returns the offset behind the last whole line."""
        with self._lock:
            at, rest = self._size, b""
            while block := os.pread(self._file, BLOCK_BYTES, at + len(rest)):
                *lines, rest = (rest + block).split(b"\n")
                for line in lines:
                    end = at + len(line) + 1
                    if line.endswith(b"}"):
                        self._add(line, at, end)
                    at = end
            self._size = at
            return at

    @property
    def segments(self) -> list[Segment]:
        """Every segment, oldest first."""
        with self._lock:
            return [span.segment.record for span in self._spans if isinstance(span.segment.record, Segment)]

    def last_segment(self, up_to: int) -> Segment | None:
        """The last segment that begins before an offset."""
        with self._lock:
            found = [span.segment.record for span in self._spans if span.segment.end <= up_to]
        return found[-1] if found and isinstance(found[-1], Segment) else None

    def is_last_segment(self, offset: int) -> bool:
        """Whether no segment begins behind an offset."""
        with self._lock:
            return not self._spans or self._spans[-1].segment.end <= offset

    def is_last_checkpoint(self, offset: int) -> bool:
        """Whether no checkpoint was saved behind an offset."""
        with self._lock:
            return self._last_checkpoint <= offset

    def is_replaced_later(self, artifact: str, offset: int, up_to: int) -> bool:
        """Whether a text of this name stands between two offsets."""
        with self._lock:
            return offset < self._last_text.get(artifact, 0) <= up_to

    def points_end_before(self, offset: int) -> int:
        """Where the last record of the points lane up to an offset ends; 0 if there is none."""
        with self._lock:
            at = bisect.bisect_right(self._points_ends, offset)
            return self._points_ends[at - 1] if at else 0

    def files_between(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Start and end of each record of the files lane that ends in (start, stop]."""
        with self._lock:
            first, last = (bisect.bisect_right(self._files_ends, offset) for offset in (start, stop))
            return list(zip(self._files_starts[first:last], self._files_ends[first:last], strict=True))

    def waiting(self, state: Delivered) -> int:
        """Records that are still to be delivered, and one more if the store does not know yet how the run ended."""
        with self._lock:
            lanes = (self._points_ends, state.points), (self._files_ends, state.files)
            records = sum(len(ends) - bisect.bisect_right(ends, offset) for ends, offset in lanes)
            shared = {span.segment.end for span in self._spans} | {span.end.end for span in self._spans if span.end}
            records -= sum(end > max(state.points, state.files) for end in shared)  # they stand in both lanes
        segments = self.segments
        return records + len(state.set_aside) + (not records and bool(segments) and segments[-1].number > state.ended)

    def spans(self) -> list[SegmentSpan]:
        """What is known of each segment, oldest first."""
        with self._lock:
            return [self._described(span) for span in self._spans]

    def _described(self, span: _Span) -> SegmentSpan:
        segment = span.segment.record
        assert isinstance(segment, Segment)
        last = self._entry(*span.last) or span.segment
        step = segment.first_step
        for place in reversed(span.losses or span.points):
            if entry := self._entry(*place):
                step = max(step, getattr(entry.record, "step", step))
                break
        end = span.end.record if span.end else None
        assert end is None or isinstance(end, End)
        if end is not None and end.step is not None:
            step = end.step
        return SegmentSpan(segment, end, span.end.at_ms if span.end else None, step, last.at_ms)

    def _entry(self, start: int, end: int) -> Entry | None:
        return parsed(os.pread(self._file, end - start - 1, start), end)

    def _add(self, line: bytes, start: int, end: int) -> None:
        if line.startswith(_POINTS):
            self._points_ends.append(end)
            if self._spans:
                span = self._spans[-1]
                span.last = start, end
                if _LOSS in line:
                    span.losses = [*span.losses[-1:], (start, end)]
                elif not span.losses and not _BESIDE.search(line):
                    span.points = [*span.points[-1:], (start, end)]
            return
        entry = parsed(line, end)
        if entry is None:
            return
        kind = entry.record.kind
        if kind in POINTS_LANE:
            self._points_ends.append(end)
        if kind in FILES_LANE:
            self._files_starts.append(start)
            self._files_ends.append(end)
        match entry.record:
            case Segment():
                self._spans.append(_Span(entry, (start, end)))
            case End() if self._spans:
                self._spans[-1].end = entry
            case record if isinstance(record, AnyCheckpoint):
                self._last_checkpoint = end
            case Text(artifact=artifact):
                self._last_text[artifact] = end
            case Points(values=values) if self._spans and "train/loss" in values:  # written by another program, with spaces
                self._spans[-1].losses = [*self._spans[-1].losses[-1:], (start, end)]
        if self._spans:
            self._spans[-1].last = start, end


class JournalReader:
    """The reading end: holds the folder wherever it moves. Of all readers one, who has the claim, delivers."""

    def __init__(self, folder: Path) -> None:
        """Raises FileNotFoundError if there is no journal."""
        self._path = folder
        self._folder = os.open(folder, os.O_RDONLY)
        try:
            self._file = os.open(FILE_NAME, os.O_RDWR, dir_fd=self._folder)  # some network file systems lock only what may be written
        except OSError:
            os.close(self._folder)
            raise

    @property
    def folder(self) -> Path:
        """Where the folder is now, or, where the system does not tell, was."""
        place = Path(f"/proc/self/fd/{self._folder}")
        return place.readlink() if place.exists() else self._path

    @cached_property
    def index(self) -> JournalIndex:
        """Of the journal as it stands now; `index.update` follows it."""
        index = JournalIndex(self._file)
        index.update()
        return index

    def claim(self, patience_s: float) -> bool:
        """Become the one that delivers; False if another one still does after `patience_s`."""
        return try_lock(self._file, wait_s=patience_s) is not False

    def is_training(self) -> bool:
        """Whether the process that appends is alive: it holds a lock on the folder (see `checkpoint.RunDirectory`)."""
        free = try_lock(self._folder, shared=True)
        if free is None:
            segments = self.index.segments
            return bool(segments) and segments[-1].host == platform.node() and Path(f"/proc/{segments[-1].pid}").exists()
        if free:
            fcntl.flock(self._folder, fcntl.LOCK_UN)
        return not free

    def read(self, start: int, stop: int) -> Iterator[Entry]:
        """Records between two offsets; lines that are none are skipped."""
        at, rest = start, b""
        while block := os.pread(self._file, max(0, min(BLOCK_BYTES, stop - at - len(rest))), at + len(rest)):
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                at += len(line) + 1
                if entry := parsed(line, at):
                    yield entry

    def read_files(self, start: int, stop: int) -> Iterator[Entry]:
        """Records of the files lane between two offsets; what lies between them is not read."""
        for first, end in self.index.files_between(start, stop):
            if entry := parsed(os.pread(self._file, end - first - 1, first), end):
                yield entry

    def delivered(self) -> Delivered:
        """What has been acknowledged; nothing, if the file is missing or damaged."""
        try:
            with os.fdopen(os.open(STATE_NAME, os.O_RDONLY, dir_fd=self._folder), "rb") as file:
                tree = json.load(file)
                known = {f.name: tree[f.name] for f in dataclasses.fields(Delivered) if f.name in tree}
                return _DELIVERED.validate_python(known)
        except (OSError, ValueError, TypeError, RecursionError):
            return Delivered()

    def is_first_delivery(self) -> bool:
        """Whether nothing of this journal can have been sent yet. Says so once: whoever asks is about to send."""
        try:
            with os.fdopen(os.open(STATE_NAME, os.O_RDONLY, dir_fd=self._folder), "rb") as file:
                untouched = file.read(len(UNTOUCHED) + 1) == UNTOUCHED.encode()
            if untouched:  # removed, not rewritten: that succeeds on a full disk too
                os.unlink(STATE_NAME, dir_fd=self._folder)
                os.fsync(self._folder)
        except OSError:
            return False
        return untouched

    def acknowledge(self, state: Delivered) -> None:
        """Keep `state`, atomically.   Raises OSError."""
        partial = STATE_NAME + ".partial"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        with os.fdopen(os.open(partial, flags, 0o666, dir_fd=self._folder), "w") as file:
            json.dump(dataclasses.asdict(state), file)
        os.replace(partial, STATE_NAME, src_dir_fd=self._folder, dst_dir_fd=self._folder)

    def close(self) -> None:
        """Let another one deliver."""
        os.close(self._file)
        os.close(self._folder)


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[JournalReader | None]:
    """The journal of a folder for the time of the body; None if it has none."""
    try:
        reader = JournalReader(folder)
    except OSError:
        yield None
        return
    try:
        yield reader
    finally:
        reader.close()


def delivered(folder: Path) -> Delivered | None:
    """How far delivery of a folder's journal has come; None if it has no journal."""
    with reading(folder) as reader:
        return reader.delivered() if reader else None


def of_job(folders: Iterable[Path], job: str) -> Path | None:
    """The folder in whose journal a job of a launcher has begun a segment, the one written to last; None if there is none."""
    written = []
    for folder in folders:
        with contextlib.suppress(OSError):
            written.append(((folder / FILE_NAME).stat().st_mtime_ns, folder))
    for _, folder in sorted(written, reverse=True):
        with reading(folder) as reader:
            if reader and any(segment.job == job for segment in reader.index.segments):
                return folder
    return None


def parsed(line: bytes, end: int) -> Entry | None:
    """The record in a line, None if it is none.   end: offset of the next line."""
    try:
        tree: Any = json.loads(line)
        record, at_ms = from_line(tree)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
    return Entry(end, at_ms, record)
