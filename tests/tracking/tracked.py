"""A tracker beside a run directory, as a training run has them, for tests of what arrives in MLflow."""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bdh_mlflow.checkpoint import Checkpoint, Provenance, RunDirectory
from bdh_mlflow.text import Evaluation, bits_per_byte
from bdh_mlflow.tracking import journal
from bdh_mlflow.tracking.journal import Entry
from bdh_mlflow.tracking.lane import Patience
from bdh_mlflow.tracking.records import OnMessage, Segment
from bdh_mlflow.tracking.sender import ThreadSender
from bdh_mlflow.tracking.sender_process import SubprocessSender
from bdh_mlflow.tracking.tracker import REPLAYED, Tracker
from tests.checkpoint.test_files import AT, state

PROVENANCE = Provenance(None, 1, None, False, "c", "d", {})
# The last for a machine with other work; a test of giving up gives less.
HURRY = Patience(batch_interval_s=0.01, first_retry_s=0.01, last_retry_s=0.02, database_exit_s=20.0)


def segment(**fields: Any) -> Segment:
    usual = Segment(
        number=1,
        training="t" * 32,
        continues=None,
        wrapper=os.environ.get("MLFLOW_RUN_ID"),
        experiment="bdh",
        run_name=None,
        user="me",
        tracking_uri=os.environ.get("MLFLOW_TRACKING_URI", "http://127.0.0.1:1"),
        mirror=True,
        keep=None,
        audit=list(REPLAYED),
        host="h",
        pid=1,
        device="cpu",
        versions={},
        started_at_ms=int(time.time() * 1000),
        first_step=0,
    )
    return replace(usual, **fields)


def entries(folder: Path) -> list[Entry]:
    """Everything in a folder's journal."""
    with journal.reading(folder) as reader:
        return list(reader.read(0, reader.index.update())) if reader else []


def quiet(text: str) -> None:
    """Nobody reads it."""


class TrackedRun:
    """A tracker with its notes, in a run directory to be.   path: of the run directory that another one has left.   process: of its own."""

    def __init__(
        self,
        folder: Path,
        uri: str | None = None,
        path: Path | None = None,
        patience: Patience = HURRY,
        *,
        process: bool = False,
        **fields: Any,
    ) -> None:
        self.notes: list[str] = []
        files = {"config.yaml": b"seed: 1\n"}
        self.directory = RunDirectory(path, files) if path else RunDirectory.new(folder / "checkpoints", files, AT)

        def start(folder: Callable[[], Path], uri: str, on_message: OnMessage) -> ThreadSender | SubprocessSender:
            if process:
                return SubprocessSender(folder, uri, on_message)
            self.sender = ThreadSender(folder, uri, on_message, patience)
            return self.sender

        uri = uri or os.environ["MLFLOW_TRACKING_URI"]
        self.tracker = Tracker(lambda: self.directory.folder, uri, segment(**fields), self.notes.append, start)

    @property
    def run_id(self) -> str:
        identity = self.tracker.wait(10)
        assert identity is not None
        return identity.run_id

    def save(self, step: int, val_loss: float | None = None) -> Checkpoint:
        evaluation = self.evaluate(step, val_loss) if val_loss is not None else None
        saved = self.directory.save(state(step), PROVENANCE, evaluation)
        self.tracker.checkpoint(saved.path, evaluation)
        return saved

    def evaluate(self, step: int, loss: float) -> Evaluation:
        """Points of the validation curves, as the trainer logs them."""
        at_ms = self.tracker.metrics({"val/loss": loss, "val/bpb": bits_per_byte(loss, 1.0)}, step)
        return Evaluation(step, loss, at_ms)

    def losses(self, *steps: int, of: Callable[[int], float] = float) -> None:
        for step in steps:
            self.tracker.metrics({"train/loss": of(step)}, step)

    def close(self, status: str = "FINISHED", **tags: str) -> int:
        left = self.tracker.close(status, {"bdh.stop_reason": status.lower(), **tags}, None)
        self.directory.close()
        return left

    def silence(self) -> None:
        """From now on everything is journalled and nothing delivered."""
        self.sender.delivery.abandon()

    def kill(self) -> None:
        """As a SIGKILL of trainer and sender leaves it: no record of the end, and nothing delivered any more."""
        self.silence()
        self.directory.close()
        self.sender.close()
