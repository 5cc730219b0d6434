"""Where a delivery runs beside a training run: in a process of its own (see `sender_process`), or in a thread of this one.

This module is the process. It takes neither the interpreter lock nor the loop's time, outlives a killed training, delivers what that one
left and ends the run for it. A first line of its standard input may ask for a first request to the store, the next says what to deliver and
where to; it reports by messages (see `records`), a line of JSON each.
"""

import contextlib
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bdh_mlflow import host
from bdh_mlflow.config import TrackingConfig
from bdh_mlflow.errors import TrackingError
from bdh_mlflow.tracking import store
from bdh_mlflow.tracking.delivery import Delivery
from bdh_mlflow.tracking.lane import Patience
from bdh_mlflow.tracking.records import Message, OnMessage, Probed, Refused, message_to_json
from bdh_mlflow.tracking.sender_process import RETRIES, RETRIES_GIVEN


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

    def disown(self) -> None:
        """In a forked process, which has none of the threads, there is nothing to give up."""

    def _run(self) -> None:
        self._left = self.delivery.run()


def _task() -> dict[str, Any]:
    task = sys.stdin.readline()
    if not task:
        os._exit(0)  # made ready for nothing
    given = json.loads(task)
    assert isinstance(given, dict)
    return given


def _probed(tracking: TrackingConfig, continues: str | None) -> Message:
    try:
        return Probed(status=store.probe_store(tracking, continues))
    except TrackingError as error:
        return Refused(reason=str(error))


def main() -> None:
    """The process beside a training run.

    Its standard input is closed when nothing more will be appended, after a last line that says so, or when nobody is left to append.
    """
    for number in host.ENDING_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # it ends when the training has, by itself
    for name, level in (("alembic", logging.WARNING), ("mlflow.store.db.utils", logging.WARNING), ("urllib3", logging.ERROR)):
        logging.getLogger(name).setLevel(level)  # attempts that fail are reported by us, once
    messages = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    sys.stdout = sys.stderr
    writing = threading.Lock()

    def report(message: Message) -> None:
        with writing:
            messages.write(json.dumps(message_to_json(message)) + "\n")
            messages.flush()

    given = _task()
    if "probe" in given:
        report(_probed(TrackingConfig(**given["probe"]), given["continues"]))
        given = _task()
    if not RETRIES_GIVEN:
        os.environ[RETRIES] = "0"  # patience is the sender's own, and MLflow would make a run twice whose answer is lost
    host.loaded()
    with contextlib.suppress(OSError):
        os.nice(5)
    os.environ["MLFLOW_TRACKING_URI"] = given["uri"]
    appender = given.get("pid")  # a trainer of before an upgrade tells none
    try:
        delivery = Delivery(Path(given["folder"]), given["uri"], report, appender=appender)
    except FileNotFoundError:  # the folder became the run directory in the meantime: the next sender is started with its new path
        os._exit(1)

    def wait_for_the_end() -> None:
        delivery.close(orphaned=not sys.stdin.read())

    threading.Thread(target=wait_for_the_end, name="standard input", daemon=True).start()
    delivery.run()
    os._exit(1 if delivery.broken else 0)  # a lane that was given up may hang in a request for minutes


if __name__ == "__main__":
    main()
