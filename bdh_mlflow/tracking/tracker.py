"""What a training loop talks to: every call is one line in the journal and returns; a sender delivers behind the loop.

`Tracker` keeps the journal and one sender for it, which is handed in (`sender` has two kinds). `NullTracker` has the same methods and
keeps nothing. Knows nothing of MLflow.
"""

import dataclasses
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bdh_mlflow.config.settings import LONGEST_TAG
from bdh_mlflow.errors import SaveError, TrackingError
from bdh_mlflow.files import reason_of
from bdh_mlflow.redact import masked
from bdh_mlflow.text import Evaluation, LoggedPoint, Sample, shortened, storable
from bdh_mlflow.tracking.journal import Journal
from bdh_mlflow.tracking.records import (
    ArtifactSaved,
    Attached,
    CheckpointSaved,
    End,
    Input,
    Message,
    Note,
    OnMessage,
    Params,
    Points,
    Progress,
    Refused,
    RunIdentity,
    Segment,
    SnapshotSaved,
    Tags,
    Text,
)

ATTACH_S = 15.0  # for a store that does answer: the sender starts and makes the run
SELF_INTERVAL_S = 1.0  # least time between two points about tracking itself
REPLAYED = ("train/loss", "val/loss", "optim/lr", "optim/grad_norm")
"""Metrics that a replayed step must give again to the bit."""


class SenderHandle(Protocol):
    """A running sender."""

    def close(self) -> int | None:
        """Nothing more will be appended: deliver.   Returns how many records could not be sent; None if nobody knows."""

    def disown(self) -> None:
        """In a forked process: this one is its parent's."""


MakeSender = Callable[[Callable[[], Path], str, OnMessage], SenderHandle]
"""Starts a sender.   Arguments: where the journal is at that moment, the URI of the store, what to call with its messages."""


@dataclass(frozen=True, kw_only=True)
class DatasetFacts:
    """A dataset as a run lists it.   folder: where it is.   profile: counts, plain values.   context: training or validation."""

    name: str
    digest: str
    folder: str
    profile: Mapping[str, Any]
    context: str


class Tracker:
    """Records everything about a run, behind the loop. No call waits or raises; making one raises SaveError.

    folder: tells where the journal is at that moment.   uri: of the store.   segment: this process.   note: called with a line for the
    user: delivery fails, works again, or a replayed step differs.   make_sender: starts the sender.
    """

    def __init__(
        self, folder: Callable[[], Path], uri: str, segment: Segment, note: Callable[[str], None], make_sender: MakeSender
    ) -> None:
        self._note = note
        try:
            self._journal = Journal(folder())
        except OSError as error:
            raise SaveError(f"{folder()}: the journal cannot be written: {reason_of(error)}") from error
        self._identity: RunIdentity | None = None
        self._refusal: str | None = None
        self._known = threading.Event()
        self._waited = False
        self._delivered = 0
        self._lost = 0
        self._about_self = (time.monotonic(), 0, 0.0)
        user, host, device = map(_outgoing, (segment.user, segment.host, segment.device))
        self._journal.append(dataclasses.replace(segment, user=user, host=host, device=device))
        self.sender = make_sender(folder, uri, self._on_message)
        """The sender of this run."""

    @property
    def identity(self) -> RunIdentity | None:
        """The run, as soon as the sender has found or made it."""
        return self._identity

    def wait(self, patience_s: float) -> RunIdentity | None:
        """The run's identity, None if it is not known by then.   Raises TrackingError if the store refuses the run for good."""
        self._known.wait(patience_s)
        self._waited = True
        if self._refusal:
            raise TrackingError(self._refusal)
        return self._identity

    def metrics(self, values: Mapping[str, float], step: int) -> int:
        """Points of several metrics.   Returns their time stamp, Unix time in ms."""
        at_ms = self._journal.append(Points(values={key: float(value) for key, value in values.items()}, step=step))
        now = time.monotonic()
        before, records, append_s = self._about_self
        if now - before > SELF_INTERVAL_S and not next(iter(values)).startswith("system/"):
            mean_us = 1e6 * (self._journal.append_s - append_s) / max(1, self._journal.records - records)
            self._about_self = (now, self._journal.records, self._journal.append_s)
            own = {
                "tracker/enqueue_us": mean_us,
                "tracker/backlog": max(0, self._journal.size - self._delivered),
                "tracker/lost": self._lost,
            }
            self._journal.append(Points(values=own, step=step))
        return at_ms

    def samples(self, samples: Sequence[Sample], step: int) -> None:
        """What the model writes, as artifact `samples/step_N.txt` and as rows of the run's table of samples."""
        rows = [{"step": step, "prompt": _outgoing(sample.prompt), "written": _outgoing(sample.written)} for sample in samples]
        self._journal.append(Text(artifact=f"samples/step_{step}.txt", text=_outgoing("\n".join(map(str, samples))), rows=rows))

    def text(self, text: str, artifact: str) -> None:
        """A small text file among the artifacts."""
        self._journal.append(Text(artifact=artifact, text=_outgoing(text)))

    def tags(self, tags: Mapping[str, str]) -> None:
        """Tags of the run; later values replace earlier ones."""
        self._journal.append(Tags(tags=_outgoing_tags(tags)))

    def params(self, params: Mapping[str, Any]) -> None:
        """Settings, written once: what the run has already stays as it is."""
        self._journal.append(Params(params={key: _as_text(value) for key, value in params.items()}))

    def dataset(self, data: DatasetFacts) -> None:
        """A dataset of the run, by name and digest."""
        source = json.dumps({"uri": _outgoing(data.folder)})
        self._journal.append(
            Input(name=_outgoing(data.name), digest=data.digest, source=source, profile=json.dumps(data.profile), context=data.context)
        )

    def sync(self) -> None:
        """Put everything recorded so far on the disk itself.   Raises OSError."""
        self._journal.sync()

    def checkpoint(self, path: Path, evaluation: Evaluation | None) -> None:
        """A checkpoint that is safe on disk: it is mirrored, verified, and only then tagged as the latest.   evaluation: of its step."""
        self._journal.append(CheckpointSaved(path=str(path.absolute()), evaluation=evaluation))

    def snapshot(self, path: Path, points: Sequence[LoggedPoint]) -> None:
        """The same of files that another program wrote.   points: of their metrics among those of the run."""
        self._journal.append(SnapshotSaved(path=str(path.absolute()), points=tuple(points)))

    def artifact(self, path: str, artifact: str) -> None:
        """A file or folder for the artifacts.   path: of a copy beside the journal.   artifact: where it goes."""
        self._journal.append(ArtifactSaved(path=path, artifact=artifact))

    def mark(self, status: str, tags: Mapping[str, str], step: int | None) -> None:
        """How the run has ended, once everything recorded so far is sent; what is recorded later is sent as well."""
        self._journal.append(End(status=status, tags=_outgoing_tags(tags), step=step))

    def disown(self) -> None:
        """In a forked process: the run is its parent's."""
        self._journal.disown()
        self.sender.disown()

    def close(self, status: str, tags: Mapping[str, str], step: int | None) -> int:
        """Deliver what is left and set the run's status (FINISHED, FAILED, KILLED).   Returns how many records still wait."""
        self.mark(status, tags, step)
        unwritten = self._journal.close()
        if unwritten:
            self._note(f"tracking: lost: {unwritten:,} bytes of the journal could not be written to disk")
        left = self.sender.close()
        return max(1, self._journal.records) if left is None else left

    def _on_message(self, message: Message) -> None:
        match message:
            case Note(text=text):
                self._note(text)
            case Attached(run=run):
                self._identity = run
                self._known.set()
            case Refused(reason=reason):
                self._refusal = reason
                if self._known.is_set() or self._waited:  # too late to end the training for it
                    self._note(f"tracking: {reason}; training goes on, everything is kept for `bdh-mlflow sync`")
                self._known.set()
            case Progress(delivered=delivered, lost=lost):
                self._delivered, self._lost = delivered, lost


class NullTracker:
    """A tracker that keeps nothing."""

    identity: RunIdentity | None = None

    def wait(self, patience_s: float) -> RunIdentity | None:
        """There is no run."""
        return None

    def metrics(self, values: Mapping[str, float], step: int) -> int:
        """Nothing but the time stamp."""
        return int(time.time() * 1000)

    def samples(self, samples: Sequence[Sample], step: int) -> None:
        """Nothing."""

    def text(self, text: str, artifact: str) -> None:
        """Nothing."""

    def tags(self, tags: Mapping[str, str]) -> None:
        """Nothing."""

    def params(self, params: Mapping[str, Any]) -> None:
        """Nothing."""

    def dataset(self, data: DatasetFacts) -> None:
        """Nothing."""

    def sync(self) -> None:
        """Nothing."""

    def checkpoint(self, path: Path, evaluation: Evaluation | None) -> None:
        """Nothing."""

    def snapshot(self, path: Path, points: Sequence[LoggedPoint]) -> None:
        """Nothing."""

    def artifact(self, path: str, artifact: str) -> None:
        """Nothing."""

    def mark(self, status: str, tags: Mapping[str, str], step: int | None) -> None:
        """Nothing."""

    def disown(self) -> None:
        """Nothing."""

    def close(self, status: str, tags: Mapping[str, str], step: int | None) -> int:
        """Nothing is left."""
        return 0


def _outgoing(text: str) -> str:
    """Text as it leaves the process: without secrets, and as every store takes it; one record that none takes would be retried for ever."""
    return storable(masked(text))


def _outgoing_tags(tags: Mapping[str, str]) -> dict[str, str]:
    return {key: shortened(_outgoing(value), LONGEST_TAG) for key, value in tags.items()}


def _as_text(value: object) -> str:
    return _outgoing(value) if isinstance(value, str) else json.dumps(value)
