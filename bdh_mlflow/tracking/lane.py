"""What both lanes of a delivery have in common: drain the journal in order, retry with patience, set aside what is refused, acknowledge.

A subclass says which records are its own and how a batch of them is sent (see `lanes`).
"""

import contextlib
import dataclasses
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bdh_mlflow.errors import TrackingError
from bdh_mlflow.files import first_line
from bdh_mlflow.redact import masked
from bdh_mlflow.tracking import store
from bdh_mlflow.tracking.journal import Delivered, Entry, JournalReader
from bdh_mlflow.tracking.records import (
    AnyCheckpoint,
    ArtifactSaved,
    JournalRecord,
    Note,
    OnMessage,
    Params,
    Points,
    Progress,
    Refused,
    Segment,
    Tags,
    Text,
)
from bdh_mlflow.tracking.run import RemoteRun

HICCUP_S = 5.0
"""A request that fails sooner than this, and once only, is no outage: a kept connection that the server was closing just then, say."""


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a delivery waits for what, in seconds.

    batch_interval_s: records wait this long to share a request, so about one request a second.   first_retry_s, last_retry_s: pause after
    a failure, doubled from the first to the last.   server_exit_s, database_exit_s: without any progress once training is over, for a
    server, which may be dead, and for a database opened here, which is only slow.   last_moment_s: for a lane to notice that it was given
    up.   probe_s: between two requests, at the end, that show whether the store answers.   claim_s: for another delivery of the journal to
    end; longer than the sender of a killed process lives without progress.   request_s: for one request about the run, at the end, while
    the store answers others.   dying_s: for a process that has let go of its pipe to let go of its lock; with GPUs, whose memory is given
    back in between, that is seconds.
    """

    batch_interval_s: float = 1.0
    first_retry_s: float = 1.0
    last_retry_s: float = 30.0
    server_exit_s: float = 7.0
    database_exit_s: float = 60.0
    last_moment_s: float = 0.5
    probe_s: float = 2.0
    claim_s: float = 20.0
    request_s: float = 300.0
    dying_s: float = 60.0


class Abandoned(Exception):
    """Patience is over."""


@dataclass(kw_only=True)
class Shared:
    """What both lanes work with.   state: changed under `lock` only.   run: set before the lanes start.

    orphaned: set when the process that appends, `appender`, has let go without a word.
    """

    folder: Path
    uri: str
    reader: JournalReader
    state: Delivered
    patience: Patience
    closing: threading.Event
    orphaned: threading.Event
    appender: int | None
    broken: threading.Event
    say: OnMessage
    run: RemoteRun = dataclasses.field(init=False)
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    segment: Segment | None = None


class Lane(ABC):
    """Drains its part of the journal. Subclasses say what is read, how an entry is sent, and what comes before and after."""

    name: str

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self.busy = False
        """In the middle of an attempt."""
        self.began_at = 0.0
        """When the attempt began, time.monotonic()."""
        self.failing = False
        """The attempt before failed."""
        self._told = False
        """A note says so."""
        self.progress_at = 0.0
        """When something was delivered last, time.monotonic()."""
        self.given_up = threading.Event()
        self.drained = threading.Event()

    def drain(self) -> None:
        """Deliver until the journal is closed and nothing is left, or patience is over. Raises nothing."""
        shared = self._shared
        try:
            self._begin()
            while True:
                closed, stop = shared.closing.is_set(), shared.reader.index.update()
                for batch in self._batches(stop):
                    self._deliver(batch)
                    self._acknowledge(batch[-1].end)
                if stop > self._offset:
                    self._acknowledge(stop)  # what follows is the other lane's
                if closed:
                    break
                shared.closing.wait(shared.patience.batch_interval_s)
            self._finish()
            self.drained.set()
        except Abandoned:
            self.given_up.set()
        except Exception as error:  # a fault of ours: another sender takes over from what is acknowledged
            shared.say(Note(text=f"tracking: the sender failed: {type(error).__name__}: {first_line(error)}"))
            shared.broken.set()
            self.given_up.set()

    def is_stuck(self) -> bool:
        """Whether an attempt takes so long that it is not waited for although the store answers other requests."""
        return False

    @property
    def _offset(self) -> int:
        """Up to which this lane's records are acknowledged."""
        return int(getattr(self._shared.state, self.name))

    @abstractmethod
    def _begin(self) -> None:
        """What comes before the first batch."""

    @abstractmethod
    def _finish(self) -> None:
        """What comes when the journal is closed and all is sent."""

    @abstractmethod
    def _batches(self, stop: int) -> Iterator[list[Entry]]:
        """Records of this lane up to `stop` that are not acknowledged yet, in the batches in which they are sent."""

    @abstractmethod
    def _send(self, batch: list[Entry]) -> None:
        """Send a batch; what this raises is retried or taken for a refusal."""

    @abstractmethod
    def _refused(self, entry: Entry, refusal: str) -> None:
        """The store will not have this record."""

    def _is_permanent(self, error: Exception) -> bool:
        """Whether trying again cannot help: the content is invalid.

        A store that refuses everything (a deleted run, a permission withdrawn) may be mended: for that one waits.
        """
        return store.is_invalid(error)

    def _store_name(self, error: Exception) -> str:
        """Who does not answer, when something fails."""
        return masked(self._shared.uri)

    def _deliver(self, batch: list[Entry]) -> None:
        """Send a batch, and where something in it is refused, the rest without it."""
        refusal = self.attempt(lambda: self._send(batch))
        if not refusal:
            return
        parts = batch if len(batch) > 1 else single(batch[0])
        if len(parts) > 1:
            for entry in parts:  # one of them is refused
                self._deliver([entry])
        else:
            self._refused(batch[0], refusal)

    def _acknowledge(self, end: int) -> None:
        shared, state = self._shared, self._shared.state
        with shared.lock:
            setattr(state, self.name, max(end, self._offset))
            with contextlib.suppress(OSError):  # a full disk here: the next one is written, and what is sent again is there once
                shared.reader.acknowledge(state)
        shared.say(Progress(delivered=min(state.points, state.files), lost=state.lost))

    def attempt(self, act: Callable[[], None]) -> str:
        """Do it until it is done or refused for good.   Returns the refusal, empty if done.   Raises Abandoned when patience is over."""
        shared, patience = self._shared, self._shared.patience
        pause_s = patience.first_retry_s
        while True:
            if self.given_up.is_set():  # also when it was done after all: nobody waits for the result any more
                raise Abandoned
            self.began_at, self.busy = time.monotonic(), True
            try:
                act()
            except Abandoned:
                raise
            except Exception as error:  # MLflow raises its own, requests', SQLAlchemy's and OS errors; none may end the sender
                self.busy = False
                if isinstance(error, TrackingError):
                    shared.say(Refused(reason=str(error)))
                    raise Abandoned from None
                if self._is_permanent(error):
                    return first_line(error)
                hiccup = not self.failing and time.monotonic() - self.began_at < HICCUP_S
                self.failing = True
                if not hiccup and not self._told:
                    self._told = True
                    goes_on = "training goes on, " if shared.reader.is_training() else ""
                    why = store.explained(error, shared.uri)
                    shared.say(Note(text=f"tracking: {self._store_name(error)} does not answer ({why}); {goes_on}trying again"))
                if shared.closing.is_set():
                    self.given_up.wait(min(pause_s, patience.first_retry_s))
                else:
                    shared.closing.wait(pause_s)  # at the end it is tried at once
                pause_s = min(2 * pause_s, patience.last_retry_s)
            else:
                self.busy = False
                self.progress_at = time.monotonic()
                self.failing = False
                if self._told:
                    self._told = False
                    shared.say(Note(text="tracking: delivering again"))
            if not self.failing and not self.given_up.is_set():
                return ""


def single(entry: Entry) -> list[Entry]:
    """A record that sends several things, as records of one each."""
    record = entry.record
    parts: list[JournalRecord] = [record]
    match record:
        case Points():
            parts = [dataclasses.replace(record, values={key: value}) for key, value in record.values.items()]
        case Params():
            parts = [dataclasses.replace(record, params={key: value}) for key, value in record.params.items()]
        case Tags():
            parts = [dataclasses.replace(record, tags={key: value}) for key, value in record.tags.items()]
    return [entry._replace(record=part) for part in parts]


def named(record: JournalRecord) -> str:
    """A record in a message."""
    match record:
        case Points():
            return f"{', '.join(record.values)} at step {record.step}"
        case Text():
            return record.artifact
        case ArtifactSaved():
            return record.artifact
        case Params():
            return f"params {', '.join(record.params)}"
        case Tags():
            return f"tags {', '.join(record.tags)}"
    return Path(record.path).name if isinstance(record, AnyCheckpoint) else record.kind
