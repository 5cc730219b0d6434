"""The MLflow run that training logs to: found or made once, then given what the journal holds, each call one request or a few.

`attach` decides which MLflow run the training is. Calls raise whatever MLflow does and may be repeated; who calls, when and how often is
the business of `lanes`.
"""

import functools
import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from bdh_mlflow.checkpoint import Saved
from bdh_mlflow.errors import TrackingError
from bdh_mlflow.text import LoggedPoint
from bdh_mlflow.tracking import segments, store
from bdh_mlflow.tracking.artifacts import Artifacts
from bdh_mlflow.tracking.attach import Attaching, Attachment
from bdh_mlflow.tracking.journal import Entry, SegmentSpan
from bdh_mlflow.tracking.mirror import Mirror
from bdh_mlflow.tracking.mlflow_internals import set_run
from bdh_mlflow.tracking.records import Input, Note, OnMessage, Params, Points, RunIdentity, Segment, Text
from bdh_mlflow.tracking.replay import Replay, points_of
from bdh_mlflow.tracking.run_store import RunStore
from bdh_mlflow.tracking.samples import SampleTable
from bdh_mlflow.tracking.together import AT_ONCE


class RemoteRun:
    """One run in one store.   say: called with messages for the training.   throttle: see `Mirror`.   first: nobody has tried before."""

    def __init__(self, uri: str, say: OnMessage, throttle: Callable[[float], object], *, first: bool = False) -> None:
        self._uri, self._say, self._throttle, self._first = uri, say, throttle, first
        self._at_once = AT_ONCE if uri.startswith(("http://", "https://")) else 1  # a database has one writer
        self._client: MlflowClient
        self._attaching: Attaching
        self._attachment: Attachment
        self._store: RunStore
        self._mirror: Mirror
        self._samples: SampleTable
        self._replay: Replay | None = None
        self._evaluations: dict[str, dict[int, Metric]] = {}
        self._other_segments: Any = None
        self._furthest = 0
        self.attached = threading.Event()
        """Set when it is known which run this is."""

    @property
    def identity(self) -> RunIdentity:
        """The run, once attached."""
        return self._attachment.identity

    @property
    def run_id(self) -> str:
        """Id of the run, once attached."""
        return self.identity.run_id

    def connect(self) -> None:
        """Open the store: for a database that takes as long as its server does not answer."""
        self._client = store.client_of(self._uri)
        self._attaching = Attaching(self._client, self._note, self._at_once, self._first)

    def knows(self, run_id: str) -> bool:
        """Whether the store has the run.   Raises TrackingError if it is deleted."""
        try:
            stage = self._client.get_run(run_id).info.lifecycle_stage
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise
        if stage != "active":
            raise TrackingError(f"run {run_id} is deleted; restore it (mlflow runs restore --run-id {run_id})")
        return True

    def probe(self) -> None:
        """Any small request, to see whether the store answers."""
        self._client.search_experiments(max_results=1)

    def probe_files(self) -> None:
        """Any small requests, to see whether both stores answer: a mirrored checkpoint needs the two."""
        self.attached.wait()
        self.together(self.probe, self._store.artifacts.sizes)

    def attach(self, segment: Segment, known: str | None, furthest: int, *, again: bool = False) -> None:
        """Find or make the run of a segment; see `Attaching.attach`."""
        found = self._attachment = self._attaching.attach(segment, known, furthest, again)
        self._furthest = furthest
        artifacts = Artifacts(found.identity.artifact_uri, self._uri)
        if (folder := artifacts.folder) is not None and found.continued and not folder.exists():
            self._note(f"tracking: artifacts of this run go to {folder}, which is not there any more, and is made again")
        if (server := artifacts.server) is not None:
            server.note = self._note
        self._store = RunStore(self._client, found.identity, artifacts, self._at_once)
        self._mirror = Mirror(self._store, self._note, self._throttle, made_here=found.made_here)
        self._samples = SampleTable(self._store, found.run, empty=found.made_here)
        self._replay = Replay(self._logged if found.has_points else None, segment.audit, self._note)
        self._evaluations = {}
        self._other_segments = None
        self.attached.set()

    def together(self, *acts: Callable[[], object]) -> None:
        """Independent requests; see `RunStore.together`."""
        self._store.together(*acts)

    def log(self, batch: list[Entry]) -> None:
        """Neighbouring metrics, params and tags in one request."""
        assert self._replay is not None, "attached first"
        metrics: list[Metric] = []
        params: dict[str, str] = {}
        tags: dict[str, str] = {}
        for entry in batch:
            match entry.record:
                case Points() as points:
                    metrics += self._replay.new_points(points, entry.at_ms)
                case Params() as given:
                    params |= given.params
                case other:
                    tags |= getattr(other, "tags", {})
        if self._attachment.superseded:
            tags = {}
        there = self._attachment.run.data.params  # `mlflow run` logs some in its own spelling
        params = {key: value for key, value in params.items() if key not in there}
        if metrics or params or tags:
            self._client.log_batch(
                self.run_id, metrics, [Param(k, v) for k, v in params.items()], [RunTag(k, v) for k, v in tags.items()], synchronous=True
            )

    def inputs(self, records: Iterable[Input]) -> None:
        """Datasets."""
        data = [(Dataset(r.name, r.digest, _source_type(r.source), r.source, profile=r.profile), r.context) for r in records]
        self._client.log_inputs(self.run_id, [DatasetInput(each, [InputTag("mlflow.data.context", context)]) for each, context in data])
        for each, context in data:
            if context == "validation":
                self._mirror.validation = each.name, each.digest

    def texts(self, records: list[Text]) -> list[Callable[[], object]]:
        """How small text files get among the artifacts, of one name the last, and their rows into the table of samples."""
        last = {record.artifact: record.text for record in records}
        acts: list[Callable[[], object]] = [functools.partial(self._store.artifacts.put_text, text, path) for path, text in last.items()]
        if rows := [row for record in records for row in record.rows]:
            acts.append(lambda: self._samples.add(rows))
        return acts

    def checkpoint(
        self,
        saved: Saved,
        evaluation: Sequence[LoggedPoint],
        mirror: bool,
        keep: int | None,
        *,
        newest: bool,
        points_sent: Callable[[], None],
    ) -> None:
        """Mirror a checkpoint.   evaluation: of its step.   mirror: False only tags the run directory.   keep, newest: see `Mirror.store`.
        points_sent: waits."""
        if not mirror:
            self._client.set_tag(self.run_id, "bdh.run_dir", saved.path.parent.name)
            return

        def points() -> list[Metric]:
            finite = [p for p in evaluation if math.isfinite(p.value)]
            if finite:
                points_sent()
            return [self._as_logged(point) for point in finite]

        self._mirror.store(saved, keep, points, newest=newest and not self._attachment.superseded)

    def _as_logged(self, point: LoggedPoint) -> Metric:
        """A point as the store has it: a replayed evaluation has another time stamp."""
        if point.key not in self._evaluations:
            history = self._client.get_metric_history(self.run_id, point.key) if self._attachment.has_points else ()
            self._evaluations[point.key] = {m.step: m for m in history}
        return self._evaluations[point.key].get(point.step) or Metric(point.key, point.value, point.at_ms, point.step)

    def artifact(self, given: Path, artifact: str) -> None:
        """Upload a file, or the files of a folder.   artifact: the file's or folder's place among the artifacts."""
        if not given.exists():
            raise ValueError(f"{given} is not there any more")  # waiting would not bring it back
        place = PurePosixPath(artifact)
        files = [(file, place / file.relative_to(given)) for file in sorted(given.rglob("*")) if file.is_file()]
        for file, target in files if given.is_dir() else [(given, place)]:
            self._store.artifacts.put(file, "" if target.parent == PurePosixPath() else str(target.parent))

    def end(self, status: str) -> None:
        """Set the run's status, which is not this process's to set if another one has gone on with the run."""
        if status != "FINISHED" and store.segment_number(self._client.get_run(self.run_id)) > self._furthest:
            return
        if not self._attachment.superseded:
            set_run(self._client, self.run_id, status, end_ms=int(time.time() * 1000))

    def mark_killed(self, last_step: int) -> None:
        """Set status and reason of a run whose last process was killed, once."""
        run = self._client.get_run(self.run_id)
        if self._attachment.superseded:
            return
        self._attaching.end_killed_children(run, None)
        if (run.info.status, run.data.tags.get("bdh.stop_reason")) == ("KILLED", "killed"):
            return
        tags = {"bdh.stop_reason": "killed", "bdh.stop_step": str(last_step)}
        self._client.log_batch(self.run_id, tags=[RunTag(k, v) for k, v in tags.items()], synchronous=True)
        self.end("KILLED")

    def write_segments(self, spans: Iterable[SegmentSpan], *, training: bool) -> None:
        """Write `segments.json`.   spans: of this journal.   training: whether the last of them is alive."""
        spans = list(spans)
        elsewhere = len(spans) < max((span.segment.number for span in spans), default=0) or self._attachment.superseded
        if elsewhere and self._other_segments is None:
            self._other_segments = self._store.json(segments.FILE_NAME)
        table = segments.table(spans, self._other_segments if elsewhere else None, training)
        self._store.artifacts.put_text(json.dumps(table, indent=1), segments.FILE_NAME)

    def _logged(self) -> dict[tuple[str, int], Metric]:
        return points_of(self._client, self._client.get_run(self.run_id), self._at_once)

    def _note(self, text: str) -> None:
        self._say(Note(text=text))


def _source_type(source: str) -> str:
    """What MLflow calls the kind of place that a dataset comes from.   source: as in `Input`."""
    scheme, found, _ = str(json.loads(source).get("uri", "")).partition("://")
    return scheme if found else "local"
