"""One sender a run: it reads the journal and has MLflow told, in order, with no end to its patience while training goes on.

`python -m bdh_mlflow.delivery FOLDER` is the sender beside a training; `bdh-mlflow sync` is the same sender afterwards. Two lanes drain one
journal, so that an upload does not hold up the curves: points (the run itself, params, tags, metrics, status) and files (texts,
checkpoints). Each acknowledges by offset; what was sent but not acknowledged is sent again, which the store recognises by its time stamp.
What MLflow is told for each record is in `remote`. When the trainer is gone without a word, the sender delivers what it left and ends the
run for it.
"""

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from bdh_mlflow import checkpoint
from bdh_mlflow.errors import TrackingError
from bdh_mlflow.redact import masked
from bdh_mlflow.tracking import journal, records, store
from bdh_mlflow.tracking.delivery import Sender, training, waiting
from bdh_mlflow.tracking.journal import Delivered, Ledger


class SyncResult(NamedTuple):
    """What `sync` has done, in words, and how many records are left."""

    words: str
    left: int


def sync(folder: Path, uri: str | None, heard: records.OnMessage) -> SyncResult:
    """Deliver what an ended training has left.   uri: None for where it meant to.   Raises TrackingError where that cannot be said."""
    ledger = Ledger(folder)
    try:
        before = waiting(ledger, ledger.delivered())
        rows = [r.fields for r in ledger.read(0) if r.kind == "segment"]
        if training(ledger):
            return SyncResult("its training is running, and delivers by itself", 0)
    finally:
        ledger.close()
    if not rows:
        return SyncResult("an empty journal", 0)

    def listen(said: dict[str, Any]) -> None:
        heard({"note": f"tracking: {said['refused']}"} if "refused" in said else said)

    os.environ.setdefault(store.RETRIES, "0")  # as beside a training
    sender = Sender(folder, _address(rows[-1]["tracking_uri"], uri), listen)
    sender.close()
    left = sender.run()
    done = journal.delivered(folder) or Delivered()
    if sender.held and not left and folder.resolve().parent.name == checkpoint.PENDING and not list(folder.glob("checkpoint_*")):
        shutil.rmtree(folder, ignore_errors=True)  # it never saved a checkpoint, and has nothing more to tell
        with contextlib.suppress(OSError):
            folder.parent.rmdir()
    run = f"MLflow run {done.run_id}" if done.run_id else "no MLflow run yet"
    return SyncResult(f"{before - left} records delivered, {left} left, {done.lost} refused for good; {run}", left)


def _address(meant: str, given: str | None) -> str:
    """Where to deliver: what is given, else where the training meant to; its credentials come from the environment."""
    if given:
        return given
    here = os.environ.get("MLFLOW_TRACKING_URI", "")
    if masked(here) == meant:
        return here
    if "***" in meant:
        raise TrackingError(f"the run was to go to {meant}: set MLFLOW_TRACKING_URI to that with its credentials, or give --tracking-uri")
    return meant
