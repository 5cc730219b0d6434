"""The MLflow run that training logs to: found or made once, then given what the journal holds, each call one request or a few.

`attach` decides which MLflow run the training is. Calls raise whatever MLflow does and may be repeated; who calls, when and how often is
the business of `lanes`.
"""

import contextlib
import json
import math
import threading
from collections.abc import Callable, Iterable
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS

from bdh_mlflow.checkpoint import Checkpoint
from bdh_mlflow.errors import TrackingError
from bdh_mlflow.redact import masked
from bdh_mlflow.text import Evaluation
from bdh_mlflow.tracking import segments, store
from bdh_mlflow.tracking.journal import Entry, SegmentSpan
from bdh_mlflow.tracking.mirror import Mirror
from bdh_mlflow.tracking.records import Input, Note, OnMessage, Params, Points, RunIdentity, Segment, Text
from bdh_mlflow.tracking.replay import Replay, points_of

SAMPLES = "samples.json"


class RemoteRun:
    """One run in one store.   say: called with messages for the training.   throttle: see `Mirror`."""

    def __init__(self, uri: str, say: OnMessage, throttle: Callable[[float], object]) -> None:
        self._uri, self._say, self._throttle = uri, say, throttle
        self._client: MlflowClient
        self._superseded = False
        self._replay: Replay | None = None
        self._identity: RunIdentity | None = None
        self._mirror: Mirror | None = None
        self.attached = threading.Event()
        """Set when it is known which run this is."""

    @property
    def identity(self) -> RunIdentity:
        """The run, once attached."""
        assert self._identity is not None, "attached first"
        return self._identity

    @property
    def run_id(self) -> str:
        """Id of the run, once attached."""
        return self.identity.run_id

    def connect(self) -> None:
        """Open the store: for a database that takes as long as its server does not answer."""
        self._client = store.client_of(self._uri)

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

    def attach(self, segment: Segment, known: str | None, furthest: int, *, again: bool = False) -> None:
        """The run to log to: the one continued, else the one `mlflow run` made, else a new one in the named experiment.

        known: the run of this journal.   furthest: number of the journal's last segment.   again: an earlier sender has done it for this
        segment. When a run is continued and `mlflow run` has made another one for this process, that one becomes its child, named
        `segment k`. Raises TrackingError if the store will not have the run.
        """
        client, wrapper, number = self._client, segment.wrapper, segment.number
        run = next((run for id in (segment.continues, known) if id and (run := store.find_run(client, id))), None)
        continued = run is not None
        if run is None and wrapper:
            run = self._wrapper_run(wrapper, segment)
        if run is None:
            run = self._create(segment)
        run_id, later = run.info.run_id, segment_number(run)
        self._superseded = later > furthest  # another machine has gone on since: the status of the run is its to set
        if not self._superseded and not (again and continued):
            if continued:
                self._end_killed_children(run, wrapper)
            if continued and wrapper and wrapper != run_id:
                child = {"mlflow.parentRunId": run_id, "bdh.continues": run_id}
                client.log_batch(wrapper, tags=[RunTag(k, v) for k, v in child.items()], synchronous=True)
                client.update_run(wrapper, name=f"segment {number}")
            if segment.run_name and not continued:
                client.update_run(run_id, name=segment.run_name)
            client.update_run(run_id, status="RUNNING")
            tags = {"bdh.segment": str(number), "bdh.training": segment.training}
            client.log_batch(run_id, tags=[RunTag(k, v) for k, v in tags.items()], synchronous=True)
        has_points = continued and max(later, number) > 1
        load = (lambda: points_of(client, client.get_run(run_id))) if has_points else None
        self._replay = Replay(load, segment.audit, lambda text: self._say(Note(text=text)))
        self._identify(run_id, continued)

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
        if self._superseded:
            tags = {}
        if params:
            known = self._client.get_run(self.run_id).data.params  # written once; `mlflow run` has logged some in its own spelling
            params = {key: value for key, value in params.items() if key not in known}
        if metrics or params or tags:
            self._client.log_batch(
                self.run_id, metrics, [Param(k, v) for k, v in params.items()], [RunTag(k, v) for k, v in tags.items()], synchronous=True
            )

    def input(self, record: Input) -> None:
        """A dataset."""
        data = Dataset(name=record.name, digest=record.digest, source_type="local", source=record.source, profile=record.profile)
        self._client.log_inputs(self.run_id, [DatasetInput(data, [InputTag("mlflow.data.context", record.context)])])

    def text(self, record: Text) -> None:
        """A small text file among the artifacts, and its rows in the table of samples if it has some."""
        self._client.log_text(self.run_id, record.text, record.artifact)
        if record.rows:
            self._add_samples(record.rows)

    def checkpoint(self, saved: Checkpoint, evaluation: Evaluation | None, mirror: bool, keep: int | None, *, newest: bool) -> None:
        """Mirror a checkpoint.   mirror: False only tags the run directory.   keep, newest: see `Mirror.store`."""
        if not mirror or self._mirror is None:
            self._client.set_tag(self.run_id, "bdh.run_dir", saved.path.parent.name)
            return
        points: list[Metric] = []
        if evaluation is not None and math.isfinite(evaluation.loss):
            for key, value in (("val/loss", evaluation.loss), ("val/bpb", evaluation.bits_per_byte)):
                there = [m for m in self._client.get_metric_history(self.run_id, key) if m.step == evaluation.step]
                logged = Metric(key, value, evaluation.logged_at_ms, evaluation.step)
                points += (there or [logged])[:1]  # as the store has it: a replayed evaluation has another time stamp
        self._mirror.store(saved, keep, points, newest=newest and not self._superseded)

    def end(self, status: str) -> None:
        """Set the run's status."""
        if not self._superseded:
            self._client.set_terminated(self.run_id, status)

    def mark_killed(self, last_step: int) -> None:
        """Set status and reason of a run whose last process was killed, once."""
        run = self._client.get_run(self.run_id)
        if self._superseded:
            return
        self._end_killed_children(run, None)
        if (run.info.status, run.data.tags.get("bdh.stop_reason")) == ("KILLED", "killed"):
            return
        tags = {"bdh.stop_reason": "killed", "bdh.stop_step": str(last_step)}
        self._client.log_batch(self.run_id, tags=[RunTag(k, v) for k, v in tags.items()], synchronous=True)
        self._client.set_terminated(self.run_id, "KILLED")

    def write_segments(self, spans: Iterable[SegmentSpan], *, training: bool) -> None:
        """Write `segments.json`.   spans: of this journal.   training: whether the last of them is alive."""
        spans = list(spans)
        elsewhere = len(spans) < max((span.segment.number for span in spans), default=0) or self._superseded
        written = self._json(segments.FILE_NAME) if elsewhere else None
        self._client.log_text(self.run_id, json.dumps(segments.table(spans, written, training), indent=1), segments.FILE_NAME)

    def _add_samples(self, new: list[dict[str, Any]]) -> None:
        """The rows of a step in a table that the UI shows, in the form of `MlflowClient.log_table`, which would append them twice."""
        columns, step = list(new[0]), new[0]["step"]
        rows: list[dict[str, Any]] = []
        table = self._json(SAMPLES)
        with contextlib.suppress(ValueError, KeyError, TypeError):  # none, or somebody else's: begun anew
            there = [dict(zip(table["columns"], values, strict=True)) for values in table["data"]]
            rows = [{key: old[key] for key in columns} for old in there if isinstance(old["step"], int) and old["step"] != step]
        ordered = [[row[key] for key in columns] for row in sorted([*rows, *new], key=lambda row: row["step"])]
        self._client.log_text(self.run_id, json.dumps({"columns": columns, "data": ordered}), SAMPLES)
        listed: list[Any] = []
        with contextlib.suppress(ValueError, TypeError):  # somebody else's tag: begun anew
            listed = [*json.loads(self._client.get_run(self.run_id).data.tags.get(MLFLOW_LOGGED_ARTIFACTS, "[]"))]
        entry = {"path": SAMPLES, "type": "table"}
        if entry not in listed:
            self._client.set_tag(self.run_id, MLFLOW_LOGGED_ARTIFACTS, json.dumps([*listed, entry]))

    def _json(self, name: str) -> Any:
        """What a JSON file at the top of the run's artifacts holds; None if there is no such file, or it is something else."""
        if not any(f.path == name and not f.is_dir for f in self._client.list_artifacts(self.run_id)):
            return None
        content = store.small_artifact(self._client, self.run_id, name)
        try:
            return json.loads(content)
        except ValueError:
            return None

    def _identify(self, run_id: str, continued: bool) -> None:
        run = self._client.get_run(run_id)
        experiment = self._client.get_experiment(run.info.experiment_id)
        self._identity = RunIdentity(
            run_id=run_id,
            name=run.info.run_name or run_id,
            experiment_id=experiment.experiment_id,
            experiment=experiment.name,
            tracking_uri=masked(self._uri),
            artifact_uri=run.info.artifact_uri,
            continued=continued,
        )
        folder = store.local_path(run.info.artifact_uri)
        if continued and folder is not None and not folder.exists():
            self._say(Note(text=f"tracking: artifacts of this run go to {folder}, which is not there any more, and is made again"))
        self._mirror = Mirror(self._client, self._identity, lambda text: self._say(Note(text=text)), self._throttle)
        self.attached.set()

    def _wrapper_run(self, run_id: str, segment: Segment) -> Run | None:
        """The run that `mlflow run` has made, if it is there and free; where the store answered at the start, it was refused there."""
        run = store.find_run(self._client, run_id)
        if run is not None and store.is_free(run, segment.continues, segment.training):
            return run
        self._say(Note(text=f"tracking: run {run_id} of MLFLOW_RUN_ID is deleted or another training's: a new run is made"))
        return None

    def _create(self, segment: Segment) -> Run:
        """A new run, or the one that an attempt without an answer has made."""
        client, name = self._client, segment.experiment
        experiment_id = store.make_experiment(client, name)
        made = client.search_runs([experiment_id], f"tags.`bdh.training` = '{segment.training}'", max_results=1)
        if made:
            return made[0]
        tags = {"mlflow.user": segment.user, "mlflow.source.name": "bdh-mlflow train", "bdh.training": segment.training}
        with store.allowed(f"create runs in experiment {name} of {masked(self._uri)}"):
            return client.create_run(experiment_id, run_name=segment.run_name, tags=tags, start_time=segment.started_at_ms)

    def _end_killed_children(self, run: Run, wrapper: str | None) -> None:
        """Children of earlier segments that a hard kill left RUNNING: there is one process at a time, so theirs is gone."""
        children = self._client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run.info.run_id}'")
        for child in children:
            if child.info.status == "RUNNING" and child.info.run_id != wrapper and "bdh.continues" in child.data.tags:
                self._client.set_terminated(child.info.run_id, "KILLED")


def segment_number(run: Run) -> int:
    """Number of the segment that worked on a run last; 0 for a run of another program, whatever its tag says."""
    return store.whole_number(run.data.tags.get("bdh.segment"))
