"""The trainer's end of a sender in a process of its own (`sender` is that process). Imports nothing slow.

The process can be started before there is anything to send (`prepared`). While a training loads torch, data and network it loads MLflow,
and then makes the first request to the store for the training, which so needs no MLflow of its own.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bdh_mlflow import host
from bdh_mlflow.config import TrackingConfig
from bdh_mlflow.errors import TrackingError
from bdh_mlflow.tracking.records import Finished, Message, OnMessage, Probed, Refused, message_from_json
from bdh_mlflow.tracking.status import StoreStatus
from bdh_mlflow.tracking.tracker import MakeSender

SENDER_SILENCE_LIMIT_S = 45.0  # at the end: a sender that works is never silent for so long
FIRST_RESTART_S, LAST_RESTART_S = 2.0, 60.0
RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
RETRIES_GIVEN = RETRIES in os.environ


class SubprocessSender:
    """A sender in a process of its own; one that dies is replaced.

    folder: tells where the journal is at that moment.   uri: of the store.   on_message: called in a thread of this process.   prepared: a
    process that waits for its task.
    """

    def __init__(
        self, folder: Callable[[], Path], uri: str, on_message: OnMessage, prepared: "subprocess.Popen[str] | None" = None
    ) -> None:
        self._folder, self._uri, self._on_message = folder, uri, on_message
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._left: int | None = None
        self._heard_at = time.monotonic()
        self._process = self._start(prepared)
        self._listener = threading.Thread(target=self._listen, name="sender's messages", daemon=True)
        self._listener.start()

    def close(self) -> int | None:
        """Nothing more will be appended: wait until all is delivered or the sender's patience is over.

        Returns how many records are left, None if the sender died without saying.
        """
        with self._lock:
            self._closed.set()
            self._close_input()
        self._heard_at = time.monotonic()
        while self._listener.is_alive():
            self._listener.join(0.1)
            if time.monotonic() - self._heard_at > SENDER_SILENCE_LIMIT_S:
                self._process.kill()
                self._heard_at = time.monotonic()
        self._process.wait()
        return self._left

    def disown(self) -> None:
        """In a forked process, which else would keep the sender from noticing that its trainer is gone."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None and not stream.closed:
                host.disown(stream.fileno())

    def _start(self, prepared: "subprocess.Popen[str] | None" = None) -> "subprocess.Popen[str]":
        process = prepared or _launch()
        assert process.stdin is not None
        with contextlib.suppress(OSError):  # it has died: the listener notices
            task = {"folder": str(self._folder()), "uri": self._uri, "pid": os.getpid()}
            process.stdin.write(json.dumps(task) + "\n")  # not on the command line: it may hold a password
            process.stdin.flush()
        return process

    def _close_input(self) -> None:
        """A sender's standard input is closed when nothing more will be appended; a last line tells that from the end of this process."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError), self._process.stdin as pipe:  # it has died, or was closed before
            pipe.write("closed\n")

    def _listen(self) -> None:
        pause_s, last_try = FIRST_RESTART_S, False
        while True:
            self._receive()
            if self._left is not None or last_try:
                return
            last_try = self._closed.wait(pause_s)  # it died before its last message
            pause_s = min(2 * pause_s, LAST_RESTART_S)
            with self._lock:
                self._process.wait()
                self._process = self._start()
                last_try = last_try or self._closed.is_set()
                if last_try:
                    self._close_input()

    def _receive(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._heard_at = time.monotonic()
                message = _message(line)
                if isinstance(message, Finished):
                    self._left = message.undelivered
                if message is not None:
                    self._on_message(message)


class Prepared:
    """Makes senders, the first of them from a process that is getting ready and makes the first request to the store.

    without: variables of the environment that it is not to see.
    """

    def __init__(self, without: tuple[str, ...] = ()) -> None:
        self._ready: subprocess.Popen[str] | None = _launch(without)

    def __call__(self, folder: Callable[[], Path], uri: str, on_message: OnMessage) -> SubprocessSender:
        """Start a sender; see `MakeSender`."""
        ready, self._ready = self._ready, None
        return SubprocessSender(folder, uri, on_message, ready)

    def probe(self, tracking: TrackingConfig, continues: str | None) -> StoreStatus:
        """As `store.probe_store`, by the process.   Raises TrackingError for what waiting would not mend."""
        if self._ready is not None:
            assert self._ready.stdin is not None
            assert self._ready.stdout is not None
            with contextlib.suppress(OSError):  # it has died
                self._ready.stdin.write(json.dumps({"probe": dataclasses.asdict(tracking), "continues": continues}) + "\n")
                self._ready.stdin.flush()
                while line := self._ready.stdout.readline():
                    match _message(line):
                        case Probed(status=status):
                            return status
                        case Refused(reason=reason):
                            raise TrackingError(reason)
            self.discard()
        return _probed_here(tracking, continues)

    def discard(self) -> None:
        """End the process that nobody has made a sender of."""
        ready, self._ready = self._ready, None
        if ready is not None:
            ready.kill()
            ready.communicate()


@contextlib.contextmanager
def prepared(without: tuple[str, ...] = ()) -> Iterator[Prepared]:
    """A process that gets ready while the body does; it becomes the first sender that is made, or ends.   without: see `Prepared`."""
    senders = Prepared(without)
    try:
        yield senders
    finally:
        senders.discard()


def probe_by(make_sender: MakeSender, tracking: TrackingConfig, continues: str | None) -> StoreStatus:
    """The first request to the store: by the process that will send, where one is prepared, else here."""
    return make_sender.probe(tracking, continues) if isinstance(make_sender, Prepared) else _probed_here(tracking, continues)


def _message(line: str) -> Message | None:
    """None for what a library prints."""
    try:
        return message_from_json(json.loads(line))
    except ValueError:
        return None


def _probed_here(tracking: TrackingConfig, continues: str | None) -> StoreStatus:
    from bdh_mlflow.tracking import store  # here: it imports MLflow

    return store.probe_store(tracking, continues)


def _launch(without: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
    hidden = without if RETRIES_GIVEN else (*without, RETRIES)  # else that is our own choice
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    command = host.python_module("bdh_mlflow.tracking.sender")
    return subprocess.Popen(  # in a session of its own: Ctrl-C is for the trainer
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
