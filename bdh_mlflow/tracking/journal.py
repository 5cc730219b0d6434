"""What is to be told, on disk before anyone is told: a line per record, appended, never changed.

The trainer appends and never waits; whoever delivers (see `delivery`) reads on from the offset it has acknowledged. A record is with the
operating system when `append` returns, so a killed process loses none. A folder holds one journal: `journal.jsonl`, and beside it
`journal.json`, what has been delivered. The folder waits under `checkpoints/.pending/` and becomes the run directory with the first
checkpoint; readers hold the folder itself, so they do not notice the move. Knows nothing of MLflow, and is told no secrets: see `masked`.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

FILE_NAME = "journal.jsonl"
STATE_NAME = "journal.json"
BLOCK_BYTES = 1 << 20

_as_json = json.JSONEncoder(separators=(",", ":")).encode  # json.dumps would make an encoder for each record


class Record(NamedTuple):
    """One thing told.   end: offset of the next record in the file.   at_ms: Unix time."""

    end: int
    kind: str
    at_ms: int
    fields: dict[str, Any]


class Journal:
    """The appending end.   Raises OSError if the file cannot be opened; from then on a failing disk only delays."""

    def __init__(self, folder: Path) -> None:
        self._lock = threading.Lock()
        self._file = os.open(folder / FILE_NAME, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        self._size = os.fstat(self._file).st_size
        self._unwritten = b""
        if self._size and os.pread(self._file, 1, self._size - 1) != b"\n":
            self._unwritten = b"\n"  # the last line was cut short by a kill: it is no record
        self.records = 0
        """Records appended by this process."""
        self.append_s = 0.0
        """Time all of it took."""

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self._size

    def append(self, kind: str, /, **fields: Any) -> int:
        """Keep a record. It is with the operating system on return, or, while the disk is full, waits for the next call.

        Returns its time stamp, Unix time in ms.
        """
        started, at_ms = time.perf_counter(), int(time.time() * 1000)
        line = _as_json({"kind": kind, "at_ms": at_ms, **fields}).encode() + b"\n"
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

    def close(self) -> int:
        """Let go of the file.   Returns how many bytes could not be written."""
        with self._lock:
            self._write()
            os.close(self._file)
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
    tags, or files, have been acknowledged.   set_aside: offsets of files that the store refused; `sync` offers them again.
    lost: records refused for good.   segment: number of the segment delivered last.   ended: of the last one whose end the store knows.
    """

    run_id: str | None = None
    tracking_uri: str | None = None
    points: int = 0
    files: int = 0
    segment: int = 0
    ended: int = 0
    lost: int = 0
    set_aside: list[int] = field(default_factory=list)


class Ledger:
    """The reading end: holds the folder wherever it moves, and is the only one that delivers from it."""

    def __init__(self, folder: Path) -> None:
        """Raises FileNotFoundError if there is no journal."""
        self._folder = os.open(folder, os.O_RDONLY)
        try:
            self._file = os.open(FILE_NAME, os.O_RDWR, dir_fd=self._folder)  # some network file systems lock only what may be written
        except OSError:
            os.close(self._folder)
            raise

    def claim(self, patience_s: float) -> bool:
        """Become the one that delivers; False if another one still does after `patience_s`."""
        end = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > end:
                    return False
                time.sleep(0.1)
            except OSError:  # a file system without locks
                return True
            else:
                return True

    def training(self) -> bool | None:
        """Whether the process that appends is alive: it holds a lock on the folder (see `checkpoint.RunDirectory`). None: no locks here."""
        try:
            fcntl.flock(self._folder, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return None
        fcntl.flock(self._folder, fcntl.LOCK_UN)
        return False

    def size(self) -> int:
        """Bytes of whole lines so far."""
        end = os.fstat(self._file).st_size
        while end:
            start = max(0, end - BLOCK_BYTES)
            newline = os.pread(self._file, end - start, start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            end = start
        return 0

    def read(self, start: int, stop: int | None = None) -> Iterator[Record]:
        """Whole records from offset `start` on; lines that are none are passed over."""
        at, rest, end = start, b"", start
        while block := os.pread(self._file, BLOCK_BYTES if stop is None else max(0, min(BLOCK_BYTES, stop - at)), at):
            at += len(block)
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                end += len(line) + 1
                with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                    tree = json.loads(line)
                    yield Record(end, tree.pop("kind"), tree.pop("at_ms"), tree)

    def delivered(self) -> Delivered:
        """What has been acknowledged; nothing, if there is no word of it."""
        try:
            with os.fdopen(os.open(STATE_NAME, os.O_RDONLY, dir_fd=self._folder), "rb") as file:
                return Delivered(**json.load(file))
        except (OSError, ValueError, TypeError):
            return Delivered()

    def acknowledge(self, state: Delivered) -> None:
        """Remember `state`, whole or not at all."""
        partial = STATE_NAME + ".partial"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        with os.fdopen(os.open(partial, flags, 0o666, dir_fd=self._folder), "w") as file:
            json.dump(dataclasses.asdict(state), file)
        os.replace(partial, STATE_NAME, src_dir_fd=self._folder, dst_dir_fd=self._folder)

    def close(self) -> None:
        """Let another one deliver."""
        os.close(self._file)
        os.close(self._folder)


def delivered(folder: Path) -> Delivered | None:
    """How far delivery of a folder's journal has come; None if it has no journal."""
    try:
        ledger = Ledger(folder)
    except OSError:
        return None
    try:
        return ledger.delivered()
    finally:
        ledger.close()


def read(folder: Path) -> Iterator[Record]:
    """All records of a folder, oldest first; none if it has no journal."""
    try:
        ledger = Ledger(folder)
    except OSError:
        return
    try:
        yield from ledger.read(0)
    finally:
        ledger.close()
