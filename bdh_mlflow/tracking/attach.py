"""Which MLflow run a training logs to: found or made once, and told that it trains."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from mlflow import MlflowClient
from mlflow.entities import Run, RunTag

from bdh_mlflow.redact import masked
from bdh_mlflow.tracking import store
from bdh_mlflow.tracking.mlflow_internals import set_run
from bdh_mlflow.tracking.records import RunIdentity, Segment
from bdh_mlflow.tracking.together import together


@dataclass(frozen=True)
class Attachment:
    """The run of a training.

    run: as the store had it when this process came.   continued: it is that of an earlier segment.   made_here: this process has just made
    it, so that nothing is in it which this process has not sent.   superseded: another machine has gone on with it since.   has_points: of
    earlier segments.
    """

    run: Run
    identity: RunIdentity
    continued: bool
    made_here: bool
    superseded: bool
    has_points: bool


class Attaching:
    """Finds or makes the run.   note: called with a line for the user.   at_once: requests at a time.   first: nobody has tried before."""

    def __init__(self, client: MlflowClient, note: Callable[[str], None], at_once: int, first: bool) -> None:
        self._client, self._note, self._at_once, self._untried = client, note, at_once, first

    def attach(self, segment: Segment, known: str | None, furthest: int, again: bool) -> Attachment:
        """The run to log to: the one continued, else the one `mlflow run` made, else a new one in the named experiment.

        known: the run of this journal.   furthest: number of the journal's last segment.   again: an earlier sender has done it for this
        segment. When a run is continued and `mlflow run` has made another one for this process, that one becomes its child, named
        `segment k`. Raises TrackingError if the store will not have the run.
        """
        client, number = self._client, segment.number
        run = next((run for id in (segment.continues, known) if id and (run := store.find_run(client, id))), None)
        continued, made_here = run is not None, False
        if run is None and segment.wrapper:
            run = self._wrapper_run(segment.wrapper, segment)
        if run is None:
            run, made_here = self._create(segment)
        later = store.segment_number(run)
        superseded = later > furthest  # the status of the run is the other machine's to set
        if not (made_here or superseded or (again and continued)):
            self._take_up(run, segment, continued)
        identity = self._identity(run, segment, continued, made_here)
        return Attachment(run, identity, continued, made_here, superseded, has_points=continued and max(later, number) > 1)

    def _take_up(self, run: Run, segment: Segment, continued: bool) -> None:
        """Have a run that is there already say that it trains, and since when."""
        client, run_id, wrapper = self._client, run.info.run_id, segment.wrapper
        tags = {"bdh.segment": str(segment.number), "bdh.training": segment.training}
        name = None if continued else segment.run_name
        acts: list[Callable[[], object]] = [
            lambda: set_run(client, run_id, "RUNNING", end_ms=run.info.end_time, name=name),
            lambda: client.log_batch(run_id, tags=[RunTag(k, v) for k, v in tags.items()], synchronous=True),
        ]
        if continued:
            acts.append(lambda: self.end_killed_children(run, wrapper))
        if continued and wrapper and wrapper != run_id:
            child = {"mlflow.parentRunId": run_id, "bdh.continues": run_id}
            acts += [
                lambda: client.log_batch(wrapper, tags=[RunTag(k, v) for k, v in child.items()], synchronous=True),
                lambda: set_run(client, wrapper, None, name=f"segment {segment.number}"),
            ]
        together(*acts, at_once=self._at_once)

    def _identity(self, run: Run, segment: Segment, continued: bool, made_here: bool) -> RunIdentity:
        experiment = segment.experiment if made_here else self._client.get_experiment(run.info.experiment_id).name
        named = None if continued else segment.run_name
        return RunIdentity(
            run_id=run.info.run_id,
            name=named or run.info.run_name or run.info.run_id,
            experiment_id=run.info.experiment_id,
            experiment=experiment,
            tracking_uri=masked(self._client.tracking_uri),
            artifact_uri=run.info.artifact_uri,
            continued=continued,
        )

    def _wrapper_run(self, run_id: str, segment: Segment) -> Run | None:
        """The run that `mlflow run` has made, if it is there and free; where the store answered at the start, it was refused there."""
        run = store.find_run(self._client, run_id)
        if run is not None and store.is_free(run, segment.continues, segment.training):
            return run
        self._note(f"tracking: run {run_id} of MLFLOW_RUN_ID is deleted or another training's: a new run is made")
        return None

    def _create(self, segment: Segment) -> tuple[Run, bool]:
        """A new run, or the one that an attempt without an answer has made.   Returns whether it is new."""
        client, name = self._client, segment.experiment
        experiment_id = store.make_experiment(client, name)
        untried, self._untried = self._untried, False
        if not untried:
            made = client.search_runs([experiment_id], f"tags.`bdh.training` = '{segment.training}'", max_results=1)
            if made:
                return made[0], False
        tags = {
            "mlflow.user": segment.user,
            "mlflow.source.name": segment.source,
            "bdh.training": segment.training,
            "bdh.segment": str(segment.number),
        }
        with store.allowed(f"create runs in experiment {name} of {masked(client.tracking_uri)}"):
            return client.create_run(experiment_id, run_name=segment.run_name, tags=tags, start_time=segment.started_at_ms), True

    def end_killed_children(self, run: Run, wrapper: str | None) -> None:
        """Children of earlier segments that a hard kill left RUNNING: there is one process at a time, so theirs is gone."""
        children = self._client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run.info.run_id}'")
        for child in children:
            if child.info.status == "RUNNING" and child.info.run_id != wrapper and "bdh.continues" in child.data.tags:
                set_run(self._client, child.info.run_id, "KILLED", end_ms=int(time.time() * 1000))
