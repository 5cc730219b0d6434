"""Delivery after a training run has ended: what waits in its journal is sent by the same code as beside it."""

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from bdh_mlflow import checkpoint
from bdh_mlflow.config.places import store_uri
from bdh_mlflow.errors import TrackingError
from bdh_mlflow.redact import masked
from bdh_mlflow.tracking import journal
from bdh_mlflow.tracking.delivery import Delivery
from bdh_mlflow.tracking.journal import Delivered, JournalReader
from bdh_mlflow.tracking.lane import Patience
from bdh_mlflow.tracking.records import Message, Note, Refused
from bdh_mlflow.tracking.sender_process import RETRIES


class SyncResult(NamedTuple):
    """What `sync` has done, in words, and how many records are left."""

    words: str
    left: int


def folders_with_journal(checkpoint_dir: Path) -> list[Path]:
    """Folders under the checkpoint directory that hold a journal, those without a checkpoint first."""
    return [f for f in (*checkpoint.pending(checkpoint_dir), *checkpoint.list_all(checkpoint_dir)) if (f / journal.FILE_NAME).is_file()]


def sync(folder: Path, uri: str | None, note: Callable[[str], None], patience: Patience | None = None) -> SyncResult:
    """Deliver what an ended training has left.

    uri: None for the store that the training named.   note: called with lines for the user. Raises TrackingError where the store cannot
    be named, ValueError where `uri` is none, FileNotFoundError where there is no journal.
    """
    reader = JournalReader(folder)
    try:
        before, segments = reader.index.waiting(reader.delivered()), reader.index.segments
        if reader.is_training():
            return SyncResult("its training is running, and delivers by itself", 0)
    finally:
        reader.close()
    if not segments:
        return SyncResult("an empty journal", 0)

    def show(message: Message) -> None:
        match message:
            case Note(text=text):
                note(text)
            case Refused(reason=reason):
                note(f"tracking: {reason}")

    address, done = _address(segments[-1].tracking_uri, uri), journal.delivered(folder) or Delivered()
    left, held = before, True
    if before or done.tracking_uri != masked(address):  # another store gets everything
        os.environ.setdefault(RETRIES, "0")  # as beside a training run
        delivery = Delivery(folder, address, show, patience)
        delivery.close()
        left, held = delivery.run(), delivery.held
        done = journal.delivered(folder) or Delivered()
    else:
        with journal.reading(folder) as last:
            held = last is not None and last.claim(0)  # a sender that is about to end may still have it
    if held and not left and folder.resolve().parent.name == checkpoint.PENDING and not list(folder.glob("checkpoint_*")):
        shutil.rmtree(folder, ignore_errors=True)  # it never saved a checkpoint, and has nothing left to deliver
        with contextlib.suppress(OSError):
            folder.parent.rmdir()
    run = f"MLflow run {done.run_id}" if done.run_id else "no MLflow run yet"
    return SyncResult(f"{before - left} records delivered, {left} left, {done.lost} refused for good; {run}", left)


def _address(named: str, given: str | None) -> str:
    """Where to deliver: the given URI, else the one the training named; its credentials come from the environment."""
    if given:
        return store_uri(given, Path.cwd())
    here = os.environ.get("MLFLOW_TRACKING_URI", "")
    if masked(here) == named:
        return here
    if "***" in named:
        raise TrackingError(f"the run was to go to {named}: set MLFLOW_TRACKING_URI to that with its credentials, or give --tracking-uri")
    if named.startswith("sqlite:") and ":////" not in named:  # of version 0.2.0: relative to where the training was started
        raise TrackingError(f"the run was to go to {named}, in the folder where it was trained: give --tracking-uri with the full path")
    return named
