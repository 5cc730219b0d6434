"""The trainer's end of a sender in a process of its own (`sender` is that process). Imports nothing slow."""

import contextlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bdh_mlflow import host
from bdh_mlflow.tracking.records import Finished, OnMessage, message_from_json
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

    def _start(self, prepared: "subprocess.Popen[str] | None" = None) -> "subprocess.Popen[str]":
        process = prepared or _launch()
        assert process.stdin is not None
        with contextlib.suppress(OSError):  # it has died: the listener notices
            process.stdin.write(json.dumps({"folder": str(self._folder()), "uri": self._uri}) + "\n")  # it may hold a password
            process.stdin.flush()
        return process

    def _close_input(self) -> None:
        """A sender's standard input is closed when nothing more will be appended."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

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
                with contextlib.suppress(ValueError):  # what a library prints
                    message = message_from_json(json.loads(line))
                    if isinstance(message, Finished):
                        self._left = message.undelivered
                    if message is not None:
                        self._on_message(message)


@contextlib.contextmanager
def prepared() -> Iterator[MakeSender]:
    """A process that gets ready while the body does; it becomes the first sender that is made, or ends."""
    ready = [_launch()]

    def make(folder: Callable[[], Path], uri: str, on_message: OnMessage) -> SubprocessSender:
        return SubprocessSender(folder, uri, on_message, ready.pop() if ready else None)

    try:
        yield make
    finally:
        for process in ready:
            process.kill()
            process.communicate()


def _launch() -> "subprocess.Popen[str]":
    environment = {name: value for name, value in os.environ.items() if name != RETRIES or RETRIES_GIVEN}  # else it is our own choice
    command = host.python_module("bdh_mlflow.tracking.sender")
    return subprocess.Popen(  # in a session of its own: Ctrl-C is for the trainer
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
