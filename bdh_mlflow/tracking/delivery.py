"""Delivery of one journal to MLflow: in order, exactly once, with no limit to its patience while training goes on.

Two lanes drain one journal, so that an upload does not hold up the curves (see `lanes`): points, which are requests about the run itself,
and files. Each acknowledges by offset; what was sent but not acknowledged is sent again, which the store recognises by its time stamp.
`Delivery` starts them, and once nothing more will be appended it gives up the lane that makes no progress. Who runs a delivery, beside a
training or afterwards, is the business of `sender` and `sync`.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path

from bdh_mlflow.tracking.journal import JournalReader
from bdh_mlflow.tracking.lane import Lane, Patience, Shared
from bdh_mlflow.tracking.lanes import FilesLane, PointsLane
from bdh_mlflow.tracking.records import Alive, Finished, Message, Note, OnMessage
from bdh_mlflow.tracking.run import RemoteRun

ALIVE_INTERVAL_S = 2.0  # between two signs of life at the end


class Delivery:
    """Delivers the journal of one folder.   on_message: called with what is worth knowing, from several threads.

    appender: id of the process that appends to it, where that is another one.
    """

    def __init__(
        self, folder: Path, uri: str, on_message: OnMessage, patience: Patience | None = None, appender: int | None = None
    ) -> None:
        """Raises FileNotFoundError if the folder has no journal."""
        self._reader = JournalReader(folder)
        self._folder = folder
        self._uri = uri
        self._on_message = on_message
        self._patience = patience or Patience()
        self._closing = threading.Event()
        self._orphaned, self._appender = threading.Event(), appender
        self._broken = threading.Event()
        self._lanes: tuple[PointsLane, FilesLane] | None = None
        self.held = False
        """Whether the journal was this delivery's to deliver: no other one was at it."""

    def close(self, *, orphaned: bool = False) -> None:
        """Nothing more will be appended.   orphaned: the appender is ending, or has ended, without a word."""
        if orphaned:
            self._orphaned.set()
        self._closing.set()

    def run(self) -> int:
        """Deliver until nothing is left, or, once closed, until patience is over.   Returns how many records are left."""
        threads: list[threading.Thread] = []
        reader = self._reader
        try:
            if not reader.claim(self._patience.claim_s):
                self._say(Note(text=f"tracking: {self._folder}: another process is delivering this journal"))
                return reader.index.waiting(reader.delivered())
            self.held = True
            shared = Shared(
                folder=self._folder,
                uri=self._uri,
                reader=reader,
                state=reader.delivered(),
                patience=self._patience,
                closing=self._closing,
                orphaned=self._orphaned,
                appender=self._appender,
                broken=self._broken,
                say=self._say,
            )
            shared.run = RemoteRun(self._uri, self._say, self._closing.wait, first=reader.is_first_delivery())
            points = PointsLane(shared)
            lanes = self._lanes = points, FilesLane(shared, points)
            points.files = lanes[1]
            threads += [threading.Thread(target=lane.drain, name=lane.name, daemon=True) for lane in lanes]
            for thread in threads:
                thread.start()
            self._supervise(lanes, shared.run)
            reader.index.update()
            left = reader.index.waiting(shared.state)
            if not self._broken.is_set():
                self._say(Finished(undelivered=left, lost=shared.state.lost))
            return left
        finally:
            for thread in threads:
                thread.join(self._patience.last_moment_s)
            if not any(thread.is_alive() for thread in threads):  # one that hangs in a request must not find another file in its place
                reader.close()

    @property
    def broken(self) -> bool:
        """Whether it ended by a fault of its own, so that another one should take over."""
        return self._broken.is_set()

    def abandon(self) -> None:
        """Stop delivering, as a kill would: what is not acknowledged stays in the journal."""
        for lane in self._lanes or ():
            lane.given_up.set()
        self._closing.set()

    def _supervise(self, lanes: tuple[Lane, ...], run: RemoteRun) -> None:
        """Wait for the lanes; once closed, give up those that make no progress. Makes no request itself."""
        while not self._closing.wait(0.2):
            if self._broken.is_set():
                return
        closed_at = time.monotonic()
        patience_s = self._patience.server_exit_s if self._uri.startswith(("http://", "https://")) else self._patience.database_exit_s
        over = threading.Event()
        for lane, ask in zip(lanes, (run.probe, run.probe_files), strict=True):
            threading.Thread(target=self._probe, args=(over, lane, ask), name=f"probe of {lane.name}", daemon=True).start()
        last_sent_at = closed_at
        while not all(lane.given_up.is_set() or lane.drained.is_set() for lane in lanes):
            if time.monotonic() - last_sent_at > ALIVE_INTERVAL_S:
                last_sent_at = time.monotonic()
                self._say(Alive())
            for lane in lanes:
                if time.monotonic() - max(closed_at, lane.progress_at) > patience_s:
                    lane.given_up.set()
                lane.drained.wait(0.02)
        over.set()

    def _probe(self, over: threading.Event, lane: Lane, ask: Callable[[], None]) -> None:
        """At the end, while a request is under way: a store that answers another one is worth waiting for."""
        while not over.wait(self._patience.probe_s):
            with contextlib.suppress(Exception):  # no answer is the answer
                if lane.busy and not lane.failing:
                    ask()
                if lane.busy and not lane.failing and not lane.is_stuck():
                    lane.progress_at = time.monotonic()

    def _say(self, message: Message) -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody listens any more
            self._on_message(message)
