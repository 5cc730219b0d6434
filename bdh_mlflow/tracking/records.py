"""What stands in a journal and what a sender reports: one frozen dataclass for each kind, with its form as JSON.

A journal record is what a training run wants MLflow to have (`JournalRecord`); a message is what the sender says to the training
(`Message`). Each is written with its `kind` and the version of the format, `v`. A reader keeps kinds and fields it does not know
(`Unknown`, `unknown_fields`) and skips them, so a journal of a newer version can still be delivered by an older one. What an older
reader would misread must therefore get a new kind: `v` tells which version wrote a record, and is not compared. Version 1, journals up
to commit a152983, had no `v`; it is read as well. Knows nothing of MLflow or of files.
"""

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from bdh_mlflow.text import Evaluation, LoggedPoint
from bdh_mlflow.tracking.status import KnownRun, StoreStatus

FORMAT = 2
JOB = "bdh.job"
"""Tag of a run: the launcher's job that worked on it last."""
_ENVELOPE = {"kind", "v", "at_ms"}
_NUMBERS = (float, int)


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """Something that travels as a JSON object with its `kind`.   unknown_fields: fields of a newer version, kept as they came."""

    kind: ClassVar[str]
    unknown_fields: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def to_json(self) -> dict[str, Any]:
        """Plain values under the names of the fields."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "unknown_fields"}
        return {**own, **self.unknown_fields}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`.   Raises TypeError or KeyError where a field is missing or of another type."""
        fields = _types(cls)  # type: ignore[arg-type]
        for name, kinds in fields.items():
            if name in tree and not any(_is(tree[name], kind) for kind in kinds):
                raise TypeError(f"{cls.kind}.{name}: {type(tree[name]).__name__}")
        own = {name: value for name, value in tree.items() if name in fields}
        rest = {name: value for name, value in tree.items() if name not in fields and name not in _ENVELOPE}
        return cls(**own, unknown_fields=rest)


@functools.cache
def _types(kind: type[_Kind]) -> dict[str, tuple[Any, ...]]:
    """Fields of a kind and the types that their values may have."""
    hints = {name: hint for name, hint in typing.get_type_hints(kind).items() if name not in ("kind", "unknown_fields")}
    return {name: typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,) for name, hint in hints.items()}


def _is(value: Any, kind: Any) -> bool:
    """Whether a value is of a type; of lists and mappings also what is in them."""
    if kind is float:
        return isinstance(value, int | float)
    origin, args = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin is Any:
        return True
    if not isinstance(value, origin):
        return False
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return all(_is(each, args[-1]) for each in inside)


# ---- journal records -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Segment(_Kind):
    """A process begins to work on the run, alone or as rank 0: what is needed to find or make the run, and what segments.json says of it.

    number: of the segment, from 1.   training: 32 hex digits that all segments of a training run share.   continues: MLflow run that is
    resumed.   wrapper: run that `mlflow run` made for this process.   tracking_uri: credentials masked.   mirror: whether checkpoints are
    mirrored.   keep: newest checkpoints that retention keeps.   audit: metrics that a replayed step must give again to the bit.
    first_step: updates completed before this process.   processes: that train together, on `hosts`, this one being rank 0.   threads: of
    each, 0 if not known.   reduction: in which order gradients are summed.   job: of the launcher that restarts processes.   source: the
    program, as MLflow shows it.
    """

    kind = "segment"
    number: int
    training: str
    continues: str | None
    wrapper: str | None
    experiment: str
    run_name: str | None
    user: str
    tracking_uri: str
    mirror: bool
    keep: int | None
    audit: list[str]
    host: str
    pid: int
    device: str
    versions: dict[str, str]
    started_at_ms: int
    first_step: int
    processes: int = 1
    hosts: list[str] = field(default_factory=list)
    threads: int = 0
    reduction: str = ""
    job: str | None = None
    source: str = "bdh-mlflow train"


@dataclass(frozen=True, kw_only=True)
class Points(_Kind):
    """A point of each of several metrics."""

    kind = "points"
    values: dict[str, float]
    step: int

    def to_json(self) -> dict[str, Any]:
        """Written out, because the training loop waits for it."""
        return {"values": self.values, "step": self.step, **self.unknown_fields}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`; written out, because points come by the million."""
        values, step = tree["values"], tree["step"]
        is_usual = type(step) is int and type(values) is dict and len(tree.keys() - _ENVELOPE) == 2  # no unknown fields
        if is_usual and all(type(value) in _NUMBERS for value in values.values()):
            return cls(values=values, step=step)
        return super().from_json(tree)


@dataclass(frozen=True, kw_only=True)
class Params(_Kind):
    """Settings of the run; MLflow takes each once."""

    kind = "params"
    params: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Tags(_Kind):
    """Tags of the run; later values replace earlier ones."""

    kind = "tags"
    tags: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Input(_Kind):
    """A dataset of the run.   source, profile: JSON, as MLflow stores them.   context: training or validation."""

    kind = "input"
    name: str
    digest: str
    source: str
    profile: str
    context: str


@dataclass(frozen=True, kw_only=True)
class Text(_Kind):
    """A small text file among the artifacts.   rows: what it adds to the table of samples, step, prompt and written text each."""

    kind = "text"
    artifact: str
    text: str
    rows: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Self:
        """A journal from before there were several samples a step has one `row`."""
        row = tree.get("row")
        return super().from_json({**{k: v for k, v in tree.items() if k != "row"}, **({"rows": [row]} if row else {})})


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved(_Kind):
    """A checkpoint that is safe on disk.   path: absolute.   evaluation: of its step, if there was one."""

    kind = "checkpoint"
    path: str
    evaluation: Evaluation | None

    def to_json(self) -> dict[str, Any]:
        """The evaluation as its points and their time stamp."""
        e = self.evaluation
        points = e and {"val/loss": e.loss, "val/bpb": e.bits_per_byte}
        values = e and {"step": e.step, "at_ms": e.logged_at_ms, "bytes_per_token": e.bytes_per_token, "values": points}
        return {"path": self.path, "evaluation": values, **self.unknown_fields}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`."""
        e = tree["evaluation"]
        each = e and float(e.get("bytes_per_token", 1.0))  # before there were vocabularies a token was a byte
        evaluation = e and Evaluation(int(e["step"]), float(e["values"]["val/loss"]), int(e["at_ms"]), each)
        return super().from_json({**tree, "evaluation": evaluation or None})

    @property
    def points(self) -> tuple[LoggedPoint, ...]:
        """Those of the evaluation."""
        return self.evaluation.points if self.evaluation else ()


@dataclass(frozen=True, kw_only=True)
class SnapshotSaved(_Kind):
    """A snapshot that is safe on disk.   path: absolute.   points: its metrics among those of the run; in JSON a list of values each."""

    kind = "snapshot"
    path: str
    points: tuple[LoggedPoint, ...]

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`."""
        points = (LoggedPoint(str(key), float(value), int(step), int(at_ms)) for key, value, step, at_ms in tree["points"])
        return super().from_json({**tree, "points": tuple(points)})


@dataclass(frozen=True, kw_only=True)
class ArtifactSaved(_Kind):
    """A file or folder for the run's artifacts.   path: of our copy, relative to the journal's folder.   artifact: where it goes."""

    kind = "artifact"
    path: str
    artifact: str


@dataclass(frozen=True, kw_only=True)
class End(_Kind):
    """The process has ended the run.   status: FINISHED, FAILED or KILLED.   step: completed updates; None if training had not begun."""

    kind = "end"
    status: str
    tags: dict[str, str]
    step: int | None


@dataclass(frozen=True, kw_only=True)
class Unknown:
    """A record of a kind that this version does not know; it stays in the journal and is not delivered."""

    kind: str
    fields: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """As it came."""
        return dict(self.fields)


AnyCheckpoint = CheckpointSaved | SnapshotSaved
_Known = Segment | Points | Params | Tags | Input | Text | CheckpointSaved | SnapshotSaved | ArtifactSaved | End
JournalRecord = _Known | Unknown

_RECORDS: dict[str, type[_Known]] = {
    known.kind: known for known in (Segment, Points, Params, Tags, Input, Text, CheckpointSaved, SnapshotSaved, ArtifactSaved, End)
}
POINTS_LANE = frozenset(r.kind for r in (Segment, Params, Tags, Points, Input, End))
"""Kinds of record that become requests about the run itself."""
FILES_LANE = frozenset(r.kind for r in (Segment, Text, CheckpointSaved, SnapshotSaved, ArtifactSaved, End))
"""Kinds of record that become files among the artifacts."""


def to_line(record: JournalRecord, at_ms: int) -> dict[str, Any]:
    """What stands in a line of a journal.   at_ms: Unix time, ms. `kind` comes first: an index reads it without parsing the line."""
    return {"kind": record.kind, "v": FORMAT, "at_ms": at_ms, **record.to_json()}


def from_line(tree: Mapping[str, Any]) -> tuple[JournalRecord, int]:
    """A record and its time stamp.   Raises KeyError or TypeError for what is no record."""
    kind, at_ms = tree["kind"], tree["at_ms"]
    if not isinstance(kind, str) or not isinstance(at_ms, int):
        raise TypeError("kind or time stamp of another type")
    known = _RECORDS.get(kind)
    if known is None:
        return Unknown(kind=kind, fields={k: v for k, v in tree.items() if k not in _ENVELOPE}), at_ms
    return known.from_json(tree), at_ms


# ---- messages of a sender --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """The MLflow run that training logs to.   tracking_uri: credentials masked.   continued: it existed before this process."""

    run_id: str
    name: str
    experiment_id: str
    experiment: str
    tracking_uri: str
    artifact_uri: str
    continued: bool

    @property
    def page(self) -> str:
        """Address of the run's curves in the UI."""
        server = self.tracking_uri if self.on_server else "http://127.0.0.1:5000"
        return f"{server.rstrip('/')}/#/experiments/{self.experiment_id}/runs/{self.run_id}/model-metrics?workflowType=machine_learning"

    @property
    def on_server(self) -> bool:
        """Whether the tracking URI is a server, which shows the run by itself."""
        return self.tracking_uri.startswith(("http://", "https://"))


@dataclass(frozen=True, kw_only=True)
class Note(_Kind):
    """A line for the user."""

    kind = "note"
    text: str


@dataclass(frozen=True, kw_only=True)
class Attached(_Kind):
    """The run is known."""

    kind = "attached"
    run: RunIdentity

    def to_json(self) -> dict[str, Any]:
        """The identity as an object."""
        return {"run": vars(self.run), **self.unknown_fields}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`."""
        return super().from_json({**tree, "run": RunIdentity(**tree["run"])})


@dataclass(frozen=True, kw_only=True)
class Probed(_Kind):
    """What the first request to the store has found; said before there is a journal."""

    kind = "probed"
    status: StoreStatus

    def to_json(self) -> dict[str, Any]:
        """The status as an object."""
        return {"status": dataclasses.asdict(self.status), **self.unknown_fields}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`."""
        status = dict(tree["status"])
        status["run"] = KnownRun(**status["run"]) if status["run"] else None
        return super().from_json({**tree, "status": StoreStatus(**status)})


@dataclass(frozen=True, kw_only=True)
class Refused(_Kind):
    """The store will not have the run, and waiting would not change that."""

    kind = "refused"
    reason: str


@dataclass(frozen=True, kw_only=True)
class Progress(_Kind):
    """How far delivery has come.   delivered: offset in the journal, in bytes.   lost: records refused for good."""

    kind = "progress"
    delivered: int
    lost: int


@dataclass(frozen=True, kw_only=True)
class Alive(_Kind):
    """The sender is still at work."""

    kind = "alive"


@dataclass(frozen=True, kw_only=True)
class Finished(_Kind):
    """The sender's last message.   undelivered: records that still wait in the journal.   lost: records refused for good."""

    kind = "finished"
    undelivered: int
    lost: int


Message = Note | Probed | Attached | Refused | Progress | Alive | Finished
OnMessage = Callable[[Message], None]

_MESSAGES: dict[str, type[Message]] = {known.kind: known for known in (Note, Probed, Attached, Refused, Progress, Alive, Finished)}


def message_to_json(message: Message) -> dict[str, Any]:
    """What goes through the pipe, a line each."""
    return {"kind": message.kind, "v": FORMAT, **message.to_json()}


def message_from_json(tree: object) -> Message | None:
    """A message; None for whatever else a library prints."""
    known = _MESSAGES.get(str(tree.get("kind"))) if isinstance(tree, Mapping) else None
    if known is None or not isinstance(tree, Mapping):
        return None
    try:
        return known.from_json(tree)
    except (TypeError, KeyError):
        return None
