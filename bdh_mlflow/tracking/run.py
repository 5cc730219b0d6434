"""The run as MLflow has it: found or made once, then told what a journal says, each call one request or a few.

`attach` settles which MLflow run this training is. Points that a resumed training measures again are compared with those the store has
instead of being logged twice. Calls raise whatever MLflow does and may be repeated; who calls, when and how often is `delivery`'s business.
"""

import contextlib
import itertools
import json
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS

from bdh_mlflow.checkpoint import Checkpoint
from bdh_mlflow.errors import TrackingError
from bdh_mlflow.redact import masked
from bdh_mlflow.tracking import store
from bdh_mlflow.tracking.journal import Delivered, Ledger, Record
from bdh_mlflow.tracking.mirror import Mirror
from bdh_mlflow.tracking.records import RunIdentity

SEGMENTS = "segments.json"
SAMPLES = "samples.json"
AUDIT = "resume/replay_max_abs_diff"
SHARED_STEPS = ("by_tokens/", "tracker/", "ckpt/")  # curves whose points say nothing of whether a step was replayed

Point = tuple[str, int]


class RemoteRun:
    """One run in one store.

    state: what earlier senders have acknowledged.   say: called with what is worth knowing.   rest: see `Mirror`.
    """

    def __init__(self, uri: str, ledger: Ledger, state: Delivered, say: Callable[..., None], rest: Callable[[float], object]) -> None:
        self._uri, self._ledger, self._state, self._say, self._rest = uri, ledger, state, say, rest
        self._client: MlflowClient
        self._segment: dict[str, Any] = {}
        self._superseded = False
        self._logged: dict[Point, tuple[float, int]] | None = None
        self._replay_diff = 0.0
        self._identity: RunIdentity | None = None
        self._mirror: Mirror | None = None
        self.attached = threading.Event()
        """Set when it is known which run this is."""

    @property
    def run_id(self) -> str:
        """Id of the run, once attached."""
        assert self._identity is not None, "attached first"
        return self._identity.run_id

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
        """Ask for anything, to see whether the store answers."""
        self._client.search_experiments(max_results=1)

    def attach(self, segment: dict[str, Any], known: str | None, *, again: bool = False) -> None:
        """The run to log to: the one continued, else the one `mlflow run` made, else a new one in the named experiment.

        segment: what the trainer said of itself.   known: the run of this journal.   again: an earlier sender has done it for this segment.
        When a run is continued and `mlflow run` has made another one for this process, that one becomes its child, named `segment k`.
        Raises TrackingError if the store will not have the run.
        """
        client, wrapper, number = self._client, segment["wrapper"], segment["number"]
        run = next((run for id in (segment["continues"], known) if id and (run := store.find_run(client, id))), None)
        continued = run is not None
        if run is None:
            run = (store.find_run(client, wrapper) if wrapper else None) or self._create(segment)
        run_id, later = run.info.run_id, int(run.data.tags.get("bdh.segment", 0))
        own = max(r.fields["number"] for r in self._ledger.read(0) if r.kind == "segment")
        self._superseded = later > own  # another machine has gone on since: how the run stands is its to say
        if not self._superseded and not (again and continued):
            if continued:
                self._end_killed_children(run, wrapper)
            if wrapper and wrapper != run_id:
                tags = {"mlflow.parentRunId": run_id, "bdh.continues": run_id}
                client.log_batch(wrapper, tags=[RunTag(k, v) for k, v in tags.items()], synchronous=True)
                client.update_run(wrapper, name=f"segment {number}")
            if segment["run_name"] and not continued:
                client.update_run(run_id, name=segment["run_name"])
            client.update_run(run_id, status="RUNNING")
            client.log_batch(run_id, tags=[RunTag("bdh.segment", str(number))], synchronous=True)
        self._segment = segment
        self._logged = None if continued and max(later, number) > 1 else {}
        self._replay_diff = 0.0
        self._identify(run_id, continued)

    def log(self, batch: list[Record]) -> None:
        """Neighbouring metrics, params and tags in one request."""
        metrics: list[Metric] = []
        params: dict[str, str] = {}
        tags: dict[str, str] = {}
        for record in batch:
            params |= record.fields.get("params", {})
            tags |= record.fields.get("tags", {})
            if record.kind == "points":
                metrics += self._metrics(record)
        if self._superseded:
            tags = {}
        if params:
            known = self._client.get_run(self.run_id).data.params  # written once; `mlflow run` has logged some in its own spelling
            params = {key: value for key, value in params.items() if key not in known}
        if metrics or params or tags:
            given = [Param(k, v) for k, v in params.items()], [RunTag(k, v) for k, v in tags.items()]
            self._client.log_batch(self.run_id, metrics, *given, synchronous=True)

    def input(self, record: Record) -> None:
        """A dataset."""
        told = record.fields
        data = Dataset(name=told["name"], digest=told["digest"], source_type="local", source=told["source"], profile=told["profile"])
        self._client.log_inputs(self.run_id, [DatasetInput(data, [InputTag("mlflow.data.context", told["context"])])])

    def text(self, record: Record) -> None:
        """A small text file among the artifacts, and its rows in the table of samples if it has some."""
        self._client.log_text(self.run_id, record.fields["text"], record.fields["artifact"])
        told = record.fields
        rows = [told["row"]] if told.get("row") else told.get("rows")  # a journal of before has one row a step
        if rows:
            self._add_samples(rows)

    def _add_samples(self, new: list[dict[str, Any]]) -> None:
        """The rows of a step in a table that the UI shows, in the form of `MlflowClient.log_table`, which would append them twice."""
        columns, step = list(new[0]), new[0]["step"]
        rows: list[dict[str, Any]] = []
        table = self._table(SAMPLES)
        with contextlib.suppress(ValueError, KeyError, TypeError):  # none, or somebody else's: begun anew
            there = [dict(zip(table["columns"], values, strict=True)) for values in table["data"]]
            rows = [{key: old[key] for key in columns} for old in there if old["step"] != step]
        ordered = [[row[key] for key in columns] for row in sorted([*rows, *new], key=lambda row: row["step"])]
        self._client.log_text(self.run_id, json.dumps({"columns": columns, "data": ordered}), SAMPLES)
        told = json.loads(self._client.get_run(self.run_id).data.tags.get(MLFLOW_LOGGED_ARTIFACTS, "[]"))
        entry = {"path": SAMPLES, "type": "table"}
        if entry not in told:
            self._client.set_tag(self.run_id, MLFLOW_LOGGED_ARTIFACTS, json.dumps([*told, entry]))

    def checkpoint(self, saved: Checkpoint, evaluation: dict[str, Any] | None, mirror: bool, keep: int | None, *, newest: bool) -> None:
        """Mirror a checkpoint.

        evaluation: values of the validation curves at its step, with their time stamp.   newest: no later one is mirrored already.
        """
        if not mirror or self._mirror is None:
            self._client.set_tag(self.run_id, "bdh.run_dir", saved.path.parent.name)
            return
        found: list[Metric] = []
        if evaluation is not None:
            for key, value in evaluation["values"].items():
                there = [m for m in self._client.get_metric_history(self.run_id, key) if m.step == saved.manifest.step]
                told = Metric(key, value, evaluation["at_ms"], saved.manifest.step)
                found += (there or [told])[:1]  # as the store has it: a replayed evaluation has another time stamp
        self._mirror.store(saved, keep, found, newest=newest and not self._superseded)

    def end(self, status: str) -> None:
        """Set the run's status."""
        if not self._superseded:
            self._client.set_terminated(self.run_id, status)

    def end_for_the_dead(self, last_step: int) -> None:
        """The last segment was killed: say so, once."""
        run = self._client.get_run(self.run_id)
        if self._superseded:
            return
        self._end_killed_children(run, None)
        if (run.info.status, run.data.tags.get("bdh.stop_reason")) == ("KILLED", "killed"):
            return
        tags = {"bdh.stop_reason": "killed", "bdh.stop_step": str(last_step)}
        self._client.log_batch(self.run_id, tags=[RunTag(k, v) for k, v in tags.items()], synchronous=True)
        self._client.set_terminated(self.run_id, "KILLED")

    def write_segments(self, up_to: int, training: bool) -> None:
        """`segments.json`: every process that has worked on the run; those on other machines from the file that is there.

        up_to: offset in the journal.   training: whether the last of them is alive.
        """
        rows = {row["segment"]: row for row in segments_of(self._ledger.read(0, up_to))}
        last = max(rows, default=0)
        if len(rows) < last or self._superseded:
            written = self._table(SEGMENTS)
            with contextlib.suppress(KeyError, TypeError):  # none, or somebody else's
                for row in written:
                    rows.setdefault(row["segment"], row)
        ordered = [rows[number] for number in sorted(rows)]
        for before, row in itertools.pairwise(ordered):
            ended = before["ended_at_ms"] or before["last_seen_ms"]
            row["downtime_s"] = round(max(0, row["started_at_ms"] - ended) / 1000, 1)
            before["reason"] = before["reason"] or "killed"
        if ordered and ordered[-1]["reason"] is None and not training:
            ordered[-1]["reason"] = "killed"
        self._client.log_text(self.run_id, json.dumps(ordered, indent=1), SEGMENTS)

    def _table(self, name: str) -> Any:
        """What a JSON file at the top of the run's artifacts holds; None if there is no such file, or it is something else."""
        if not any(f.path == name for f in self._client.list_artifacts(self.run_id)):
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
        self._mirror = Mirror(self._client, self._identity, lambda text: self._say(note=text), self._rest)
        self.attached.set()
        self._say(attached=vars(self._identity))

    def _create(self, segment: dict[str, Any]) -> Run:
        """A new run, or the one that an attempt without an answer has made."""
        client, name, training = self._client, segment["experiment"], segment["training"]
        experiment_id = store.experiment_of(client, name)
        if experiment_id is None:
            try:
                experiment_id = client.create_experiment(name)
            except MlflowException as error:  # another run was quicker
                if error.error_code != "RESOURCE_ALREADY_EXISTS" or (experiment_id := store.experiment_of(client, name)) is None:
                    raise
        made = client.search_runs([experiment_id], f"tags.`bdh.training` = '{training}'", max_results=1)
        if made:
            return made[0]
        tags = {"mlflow.user": segment["user"], "mlflow.source.name": "bdh-mlflow train", "bdh.training": training}
        return client.create_run(experiment_id, run_name=segment["run_name"], tags=tags, start_time=segment["started_at_ms"])

    def _end_killed_children(self, run: Run, wrapper: str | None) -> None:
        """Children of earlier segments that a hard kill left RUNNING: there is one process at a time, so theirs is gone."""
        children = self._client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run.info.run_id}'")
        for child in children:
            if child.info.status == "RUNNING" and child.info.run_id != wrapper and "bdh.continues" in child.data.tags:
                self._client.set_terminated(child.info.run_id, "KILLED")

    def _metrics(self, record: Record) -> Iterable[Metric]:
        """Points to log; those of a replayed step are compared with the ones the store has."""
        values, step = record.fields["values"], record.fields["step"]
        if self._logged is None:
            self._logged = _points_of(self._client, self._client.get_run(self.run_id))
        logged, new, replayed = self._logged, {}, False
        for key, value in values.items():
            before = logged.get((key, step))
            if before is None:
                new[key] = value
            elif before[1] != record.at_ms:
                replayed = replayed or not key.startswith(SHARED_STEPS)
                if key in self._segment["audit"]:
                    self._compare(key, step, before[0], value)
        audit = AUDIT, step
        if replayed and (audit not in logged or logged[audit][1] == record.at_ms):
            logged.setdefault(audit, (self._replay_diff, record.at_ms))
            new[AUDIT] = logged[audit][0]  # as it was said first: the value is part of what makes a point another one
        return [Metric(key, value, record.at_ms, step) for key, value in new.items()]

    def _compare(self, key: str, step: int, before: float, now: float) -> None:
        diff = abs(before - now)
        if diff > self._replay_diff:
            self._say(note=f"step {step}: {key} was {before!r} before the interruption and is {now!r} now")
            self._replay_diff = diff


def segments_of(records: Iterable[Record]) -> Iterator[dict[str, Any]]:
    """A row for each process in a journal: where it ran, from which step to which, how it ended (reason None: it has not said)."""
    row: dict[str, Any] | None = None
    for record in records:
        if record.kind == "segment":
            if row:
                yield row
            told = record.fields
            row = {
                "segment": told["number"],
                **{key: told[key] for key in ("host", "pid", "device", "versions", "started_at_ms", "first_step")},
                "last_step": told["first_step"],
                "ended_at_ms": None,
                "last_seen_ms": record.at_ms,
                "reason": None,
                "downtime_s": 0.0,
                "mlflow_run": told["wrapper"],
            }
        elif row:
            row["last_seen_ms"] = record.at_ms
            if record.kind == "points" and "train/loss" in record.fields["values"]:
                row["last_step"] = max(row["last_step"], record.fields["step"])
            elif record.kind == "end":
                row["ended_at_ms"] = record.at_ms
                row["reason"] = record.fields["tags"].get("bdh.stop_reason", record.fields["status"])
                row["last_step"] = record.fields["step"] if record.fields["step"] is not None else row["last_step"]
    if row:
        yield row


def _points_of(client: MlflowClient, run: Run) -> dict[Point, tuple[float, int]]:
    """Points of a run by metric and step, with their time stamps; system metrics are counted on, not replayed."""
    keys = [key for key in run.data.metrics if not key.startswith("system/")]
    return {(key, m.step): (m.value, m.timestamp) for key in keys for m in client.get_metric_history(run.info.run_id, key)}
