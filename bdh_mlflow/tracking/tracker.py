"""What a run tells, and to whom: a journal on disk at once, an MLflow store in its own time.

`Tracker` is what the loop and its builder talk to. Every call appends to the journal and returns; one sender (`delivery`), a process of its
own so that it takes neither the interpreter lock nor the loop's time, reads the journal and delivers it. Around that: which store is meant,
whether it can be used, and the few questions others ask of it.
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from bdh_mlflow.errors import SaveError, TrackingError
from bdh_mlflow.redact import masked
from bdh_mlflow.text import Evaluation, Sample
from bdh_mlflow.tracking.journal import Journal
from bdh_mlflow.tracking.records import OnMessage, RunIdentity
from bdh_mlflow.tracking.sender import SubprocessSender

ATTACH_S = 15.0  # for a store that does answer: the sender starts and makes the run
SELF_S = 1.0  # least time between two points about tracking itself
REPLAYED = ("train/loss", "val/loss", "optim/lr", "optim/grad_norm")
"""Metrics that a replayed step must give again to the bit."""


class SenderHandle(Protocol):
    """Where a sender runs."""

    def close(self) -> int | None:
        """Nothing more will be told: deliver, and return how many records could not be; None if nobody knows."""


class Tracker:
    """Tells a run everything, behind the loop. No call waits for anybody or raises; making one raises SaveError.

    folder: tells where the journal is at that moment.   uri: of the store.   segment: what the sender must know to find or make the run.
    note: called with a line when delivery fails, works again, or a replayed step differs.
    """

    def __init__(self, folder: Callable[[], Path], uri: str, segment: Mapping[str, Any], note: Callable[[str], None]) -> None:
        self._note = note
        try:
            self._journal = Journal(folder())
        except OSError as error:
            raise SaveError(f"{folder()}: the journal cannot be written: {error.strerror}") from error
        self._identity: RunIdentity | None = None
        self._refusal: str | None = None
        self._known = threading.Event()
        self._waited = False
        self._delivered = 0
        self._lost = 0
        self._about_self = (time.monotonic(), 0, 0.0)
        self._journal.append("segment", **segment)
        self._host: SenderHandle = HOST(folder, uri, self._heard)

    @property
    def identity(self) -> RunIdentity | None:
        """The run, as soon as the store has said which it is."""
        return self._identity

    def wait(self, patience_s: float) -> RunIdentity | None:
        """The run's identity, or None if the store has not told it by then.   Raises TrackingError if it refuses the run for good."""
        self._known.wait(patience_s)
        self._waited = True
        if self._refusal:
            raise TrackingError(self._refusal)
        return self._identity

    def metrics(self, values: Mapping[str, float], step: int) -> int:
        """Points of several curves.   Returns their time stamp, Unix time in ms."""
        given = {key: float(value) for key, value in values.items()}
        at_ms = self._journal.append("points", values=given, step=step)
        now = time.monotonic()
        before, records, append_s = self._about_self
        if now - before > SELF_S and not next(iter(values)).startswith("system/"):
            mean_us = 1e6 * (self._journal.append_s - append_s) / max(1, self._journal.records - records)
            self._about_self = (now, self._journal.records, self._journal.append_s)
            own = {
                "tracker/enqueue_us": mean_us,
                "tracker/backlog": max(0, self._journal.size - self._delivered),
                "tracker/lost": self._lost,
            }
            self._journal.append("points", values=own, step=step)
        return at_ms

    def samples(self, samples: Sequence[Sample], step: int) -> None:
        """What the model writes, as artifact `samples/step_N.txt` and as rows of the run's table of samples."""
        rows = [{"step": step, "prompt": masked(sample.prompt), "written": masked(sample.written)} for sample in samples]
        self._journal.append("text", artifact=f"samples/step_{step}.txt", text=masked("\n".join(map(str, samples))), rows=rows)

    def text(self, text: str, artifact: str) -> None:
        """A small text file among the artifacts."""
        self._journal.append("text", artifact=artifact, text=masked(text))

    def tags(self, tags: Mapping[str, str]) -> None:
        """Tags of the run; later values replace earlier ones."""
        self._journal.append("tags", tags={key: masked(value) for key, value in tags.items()})

    def params(self, params: Mapping[str, Any]) -> None:
        """Settings, written once: what the run has already stays as it is."""
        self._journal.append("params", params={key: _as_text(value) for key, value in params.items()})

    def dataset(self, name: str, digest: str, folder: str, profile: Mapping[str, Any], context: str) -> None:
        """The data of the run, by name and digest.   context: training or validation."""
        source = json.dumps({"uri": masked(folder)})
        self._journal.append("input", name=name, digest=digest, source=source, profile=json.dumps(profile), context=context)

    def sync(self) -> None:
        """Everything told so far is on the disk itself.   Raises OSError."""
        self._journal.sync()

    def checkpoint(self, path: Path, evaluation: Evaluation | None) -> None:
        """A checkpoint that is safe on disk: mirrored, verified, and only then named the latest."""
        told = None
        if evaluation is not None:
            values = {"val/loss": evaluation.loss, "val/bpb": evaluation.bits_per_byte}
            told = {"step": evaluation.step, "at_ms": evaluation.logged_at_ms, "values": values}
        self._journal.append("checkpoint", path=str(path.absolute()), evaluation=told)

    def close(self, status: str, tags: Mapping[str, str], step: int | None) -> int:
        """Deliver what is left and set the run's status (FINISHED, FAILED, KILLED).   Returns how many records still wait."""
        self._journal.append("end", status=status, tags={key: masked(value) for key, value in tags.items()}, step=step)
        unwritten = self._journal.close()
        if unwritten:
            self._note(f"tracking: lost: {unwritten:,} bytes of the journal could not be written to disk")
        left = self._host.close()
        return max(1, self._journal.records) if left is None else left

    def _heard(self, said: dict[str, Any]) -> None:
        """What the sender has to say."""
        if "note" in said:
            self._note(said["note"])
        if "attached" in said:
            self._identity = RunIdentity(**said["attached"])
            self._known.set()
        if "refused" in said:
            self._refusal = said["refused"]
            if self._known.is_set() or self._waited:  # too late to end the training for it
                self._note(f"tracking: {self._refusal}; training goes on, everything is kept for `bdh-mlflow sync`")
            self._known.set()
        self._delivered = said.get("delivered", self._delivered)
        self._lost = said.get("lost", self._lost)


MakeSender = Callable[[Callable[[], Path], str, OnMessage], SenderHandle]
HOST: MakeSender = SubprocessSender
"""Where senders run."""


@contextlib.contextmanager
def hosted_by(host: MakeSender) -> Iterator[None]:
    """Senders that begin in the body run there."""
    global HOST
    before, HOST = HOST, host
    try:
        yield
    finally:
        HOST = before


def _as_text(value: object) -> str:
    return masked(value) if isinstance(value, str) else json.dumps(value)
