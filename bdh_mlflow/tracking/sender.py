"""What a run tells, and to whom: a journal on disk at once, an MLflow store in its own time.

`Tracker` is what the loop and its builder talk to. Every call appends to the journal and returns; one sender (`delivery`), a process of its
own so that it takes neither the interpreter lock nor the loop's time, reads the journal and delivers it. Around that: which store is meant,
whether it can be used, and the few questions others ask of it.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bdh_mlflow.tracking import records
from bdh_mlflow.tracking.delivery import Sender
from bdh_mlflow.tracking.records import OnMessage
from bdh_mlflow.tracking.store import RETRIES, RETRIES_GIVEN

SENDER_SILENCE_LIMIT_S = 45.0  # of silence, at the end: no sender is silent for so long
FIRST_RESTART_S, LAST_RESTART_S = 2.0, 60.0


class SubprocessSender:
    """A sender in a process of its own. It outlives a killed trainer, delivers what that one left, and ends the run for it.

    A sender that dies itself is replaced.
    """

    def __init__(self, folder: Callable[[], Path], uri: str, heard: OnMessage) -> None:
        self._folder, self._uri, self._heard = folder, uri, heard
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._left: int | None = None
        self._heard_at = time.monotonic()
        self._process = self._start()
        self._listener = threading.Thread(target=self._listen, name="sender's words", daemon=True)
        self._listener.start()

    def close(self) -> int | None:
        """Wait for the sender, which gives up by itself when the store does not answer."""
        with self._lock:
            self._closed.set()
            self._nothing_more()
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
        command = [sys.executable, "-m", "bdh_mlflow.tracking.sender", str(self._folder())]
        return subprocess.Popen(  # in a session of its own: Ctrl-C is for the trainer
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )

    def _nothing_more(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def _listen(self) -> None:
        pause_s, last_try = FIRST_RESTART_S, False
        while True:
            self._hear()
            if self._left is not None or last_try:
                return
            last_try = self._closed.wait(pause_s)  # it died before its last word
            pause_s = min(2 * pause_s, LAST_RESTART_S)
            with self._lock:
                self._process.wait()
                self._process = self._start()
                last_try = last_try or self._closed.is_set()
                if last_try:
                    self._nothing_more()

    def _hear(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._heard_at = time.monotonic()
            with contextlib.suppress(ValueError):
                said = json.loads(line)
                if isinstance(said, dict):  # what a library prints is not for us
                    self._left = said.get("undelivered", self._left)
                    self._heard(said)


@dataclass
class ThreadSender:
    """A sender in this process: for programs that train many small runs, where a process each would cost more than it spares."""

    folder: Callable[[], Path]
    uri: str
    heard: records.OnMessage

    def __post_init__(self) -> None:
        self._sender = Sender(self.folder(), self.uri, self.heard)
        self._left: int | None = None
        self._thread = threading.Thread(target=self._run, name="sender", daemon=True)
        self._thread.start()

    def close(self) -> int | None:
        """Deliver what is left."""
        self._sender.close()
        self._thread.join()
        return self._left

    def _run(self) -> None:
        self._left = self._sender.run()


def main() -> None:
    """The sender beside a training. Its standard input is closed when nothing more will be appended, or nobody is left to append it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends when the trainer has, by itself
    for name, level in (("alembic", logging.WARNING), ("mlflow.store.db.utils", logging.WARNING), ("urllib3", logging.ERROR)):
        logging.getLogger(name).setLevel(level)  # attempts that fail are reported by us, once
    with contextlib.suppress(OSError):
        os.nice(5)
    words = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    sys.stdout = sys.stderr
    talk = threading.Lock()

    def heard(said: dict[str, Any]) -> None:
        with talk:
            words.write(json.dumps(said) + "\n")
            words.flush()

    try:
        sender = Sender(Path(sys.argv[1]), os.environ["MLFLOW_TRACKING_URI"], heard)
    except FileNotFoundError:  # the folder became the run directory in the meantime: the next sender is told where it is
        os._exit(1)

    def listen() -> None:
        sys.stdin.read()
        sender.close()

    threading.Thread(target=listen, name="listener", daemon=True).start()
    sender.run()
    os._exit(1 if sender.broken else 0)  # a lane that was given up may hang in a request for minutes


if __name__ == "__main__":
    main()
