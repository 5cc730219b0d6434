"""Where a delivery runs beside a training run: in a process of its own, or in a thread of this one.

This module with a folder as its argument is the process. It takes neither the interpreter lock nor the loop's time, outlives a killed
training, delivers what that one left and ends the run for it. It reports by messages (see `records`), a line of JSON each.
"""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from bdh_mlflow import host
from bdh_mlflow.host import ENDING_SIGNALS
from bdh_mlflow.tracking.delivery import Delivery
from bdh_mlflow.tracking.lane import Patience
from bdh_mlflow.tracking.records import Finished, Message, OnMessage, message_from_json, message_to_json
from bdh_mlflow.tracking.store import RETRIES, RETRIES_GIVEN

SENDER_SILENCE_LIMIT_S = 45.0  # at the end: a sender that works is never silent for so long
FIRST_RESTART_S, LAST_RESTART_S = 2.0, 60.0


class SubprocessSender:
    """A sender in a process of its own; one that dies is replaced.

    folder: tells where the journal is at that moment.   uri: of the store.   on_message: called in a thread of this process.
    """

    def __init__(self, folder: Callable[[], Path], uri: str, on_message: OnMessage) -> None:
        self._folder, self._uri, self._on_message = folder, uri, on_message
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._left: int | None = None
        self._heard_at = time.monotonic()
        self._process = self._start()
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

    def _start(self) -> subprocess.Popen[str]:
        environment = {**os.environ, "MLFLOW_TRACKING_URI": self._uri}  # not an argument: it may hold a password
        if not RETRIES_GIVEN:
            environment[RETRIES] = "0"  # patience is the sender's own, and MLflow would make a run twice whose answer is lost
        command = host.python_module("bdh_mlflow.tracking.sender", str(self._folder()))
        return subprocess.Popen(  # in a session of its own: Ctrl-C is for the trainer
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )

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


class ThreadSender:
    """A sender in this process: for programs that train many small runs, where a process each would cost more than it saves."""

    def __init__(self, folder: Callable[[], Path], uri: str, on_message: OnMessage, patience: Patience | None = None) -> None:
        self.delivery = Delivery(folder(), uri, on_message, patience)
        self._left: int | None = None
        self._thread = threading.Thread(target=self._run, name="sender", daemon=True)
        self._thread.start()

    def close(self) -> int | None:
        """Nothing more will be appended: deliver what is left.   Returns how many records are left."""
        self.delivery.close()
        self._thread.join()
        return self._left

    def _run(self) -> None:
        self._left = self.delivery.run()


def main() -> None:
    """The process beside a training run. Its standard input is closed when nothing more will be appended, or nobody is left to append."""
    for number in ENDING_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # it ends when the training has, by itself
    for name, level in (("alembic", logging.WARNING), ("mlflow.store.db.utils", logging.WARNING), ("urllib3", logging.ERROR)):
        logging.getLogger(name).setLevel(level)  # attempts that fail are reported by us, once
    with contextlib.suppress(OSError):
        os.nice(5)
    messages = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    sys.stdout = sys.stderr
    writing = threading.Lock()

    def report(message: Message) -> None:
        with writing:
            messages.write(json.dumps(message_to_json(message)) + "\n")
            messages.flush()

    try:
        delivery = Delivery(Path(sys.argv[1]), os.environ["MLFLOW_TRACKING_URI"], report)
    except FileNotFoundError:  # the folder became the run directory in the meantime: the next sender is started with its new path
        os._exit(1)

    def wait_for_the_end() -> None:
        sys.stdin.read()
        delivery.close()

    threading.Thread(target=wait_for_the_end, name="standard input", daemon=True).start()
    delivery.run()
    os._exit(1 if delivery.broken else 0)  # a lane that was given up may hang in a request for minutes


if __name__ == "__main__":
    main()
