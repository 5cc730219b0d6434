"""What a run tells, and to whom: a journal on disk at once, an MLflow store in its own time.

`Tracker` is what the loop and its builder talk to. Every call appends to the journal and returns; one sender (`delivery`), a process of its
own so that it takes neither the interpreter lock nor the loop's time, reads the journal and delivers it. Around that: which store is meant,
whether it can be used, and the few questions others ask of it.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Run, ViewType
from mlflow.exceptions import MlflowException

from bdh_mlflow.config import TrackingConfig
from bdh_mlflow.errors import BdhError, SaveError, TrackingError
from bdh_mlflow.journal import Journal, masked
from bdh_mlflow.tokenizer import Sample

DOOR_S = 5.0  # a store that has not answered by then is unreachable: training begins without it
DATABASE_S = 60.0  # a database opened in this process may have its tables to make first
ATTACH_S = 15.0  # for a store that does answer: the sender starts and makes the run
LAST_WORD_S = 45.0  # of silence, at the end: no sender is silent for so long
FIRST_RESTART_S, LAST_RESTART_S = 2.0, 60.0
SELF_S = 1.0  # least time between two points about tracking itself
HTTP_RETRIES = "3"  # MLflow's own, inside one call; its default of 7 blocks for four minutes
RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
_RETRIES_GIVEN = RETRIES in os.environ
REPLAYED = ("train/loss", "val/loss", "optim/lr", "optim/grad_norm")
"""Metrics that a replayed step must give again to the bit."""


@dataclass(frozen=True)
class RunIdentity:
    """Which MLflow run a training is.   tracking_uri: credentials masked.   continued: it existed before this process."""

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


@dataclass(frozen=True)
class Door:
    """What the store said when it was asked first.   reachable: it answered.   run: the one to be continued, if it is there."""

    tracking_uri: str
    reachable: bool
    run: Run | None


class Host(Protocol):
    """Where a sender runs."""

    def close(self) -> int | None:
        """Nothing more will be told: deliver, and return how many records could not be; None if nobody knows."""


Heard = Callable[[dict[str, Any]], None]


class InProcess:
    """A sender in a process of its own. It outlives a killed trainer, delivers what that one left, and ends the run for it.

    A sender that dies itself is replaced.
    """

    def __init__(self, folder: Callable[[], Path], uri: str, heard: Heard) -> None:
        self._folder, self._uri, self._heard = folder, uri, heard
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._left: int | None = None
        self._heard_at = time.monotonic()
        self._process = self._start()
        self._listener = threading.Thread(target=self._listen, name="sender's words", daemon=True)
        self._listener.start()

    def close(self) -> int | None:
        """Wait for the sender, which gives up by itself when the store does not answer."""
        with self._lock:
            self._closed.set()
            self._nothing_more()
        self._heard_at = time.monotonic()
        while self._listener.is_alive():
            self._listener.join(0.1)
            if time.monotonic() - self._heard_at > LAST_WORD_S:
                self._process.kill()
                self._heard_at = time.monotonic()
        self._process.wait()
        return self._left

    def _start(self) -> subprocess.Popen[str]:
        environment = {**os.environ, "MLFLOW_TRACKING_URI": self._uri}  # not an argument: it may hold a password
        if not _RETRIES_GIVEN:
            environment[RETRIES] = "0"  # patience is the sender's own, and MLflow would make a run twice whose answer is lost
        command = [sys.executable, "-m", "bdh_mlflow.delivery", str(self._folder())]
        return subprocess.Popen(  # in a session of its own: Ctrl-C is for the trainer
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )

    def _nothing_more(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def _listen(self) -> None:
        pause_s, last_try = FIRST_RESTART_S, False
        while True:
            self._hear()
            if self._left is not None or last_try:
                return
            last_try = self._closed.wait(pause_s)  # it died before its last word
            pause_s = min(2 * pause_s, LAST_RESTART_S)
            with self._lock:
                self._process.wait()
                self._process = self._start()
                last_try = last_try or self._closed.is_set()
                if last_try:
                    self._nothing_more()

    def _hear(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._heard_at = time.monotonic()
            with contextlib.suppress(ValueError):
                said = json.loads(line)
                if isinstance(said, dict):  # what a library prints is not for us
                    self._left = said.get("undelivered", self._left)
                    self._heard(said)


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
        self._evaluation: dict[str, Any] = {}
        self._lost = 0
        self._about_self = (time.monotonic(), 0, 0.0)
        self._journal.append("segment", **segment)
        self._host: Host = HOST(folder, uri, self._heard)

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

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Points of several curves."""
        given = {key: float(value) for key, value in values.items()}
        at_ms = self._journal.append("points", values=given, step=step)
        if "val/loss" in given:
            self._evaluation = {
                "step": step,
                "at_ms": at_ms,
                "values": {key: given[key] for key in ("val/loss", "val/bpb") if key in given},
            }
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

    def checkpoint(self, path: Path, step: int) -> None:
        """A checkpoint that is safe on disk: mirrored, verified, and only then named the latest."""
        evaluation = self._evaluation if self._evaluation.get("step") == step else None
        self._journal.append("checkpoint", path=str(path.absolute()), evaluation=evaluation)

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


MakeHost = Callable[[Callable[[], Path], str, Heard], Host]
HOST: MakeHost = InProcess
"""Where senders run."""


@contextlib.contextmanager
def hosted_by(host: MakeHost) -> Iterator[None]:
    """Senders that begin in the body run there."""
    global HOST
    before, HOST = HOST, host
    try:
        yield
    finally:
        HOST = before


def tracking_uri(tracking: TrackingConfig) -> str:
    """The configured URI, else MLflow's own resolution (MLFLOW_TRACKING_URI, else sqlite:///mlflow.db here), which is made absolute."""
    inherited = mlflow.get_tracking_uri()
    if tracking.tracking_uri is None:
        path = inherited.removeprefix("sqlite:///")
        return f"sqlite:///{Path(path).absolute()}" if path != inherited and not path.startswith("/") else inherited
    if os.environ.get("MLFLOW_RUN_ID") and inherited != tracking.tracking_uri:
        raise TrackingError(
            f"tracking.tracking_uri is {masked(tracking.tracking_uri)}, but `mlflow run` has made its run at {masked(inherited)}. "
            f"Set MLFLOW_TRACKING_URI={masked(tracking.tracking_uri)} instead, or start with `bdh-mlflow train`"
        )
    return tracking.tracking_uri


def connect(tracking: TrackingConfig) -> MlflowClient:
    """A client of the tracking store.   Raises TrackingError if it does not answer."""
    client = client_of(tracking_uri(tracking))
    with reported(f"tracking store {masked(client.tracking_uri)} cannot be used"):
        client.search_experiments(max_results=1)
    return client


def client_of(uri: str) -> MlflowClient:
    """A client, with patience inside one call bounded; nothing is asked yet."""
    os.environ.setdefault(RETRIES, HTTP_RETRIES)
    mlflow.set_tracking_uri(uri)
    return MlflowClient(uri)


def knock(tracking: TrackingConfig, continues: str | None) -> Door:
    """Ask the store, for a few seconds, whether the run can be made there. Writes nothing.

    continues: id of the run being resumed.   Raises TrackingError for what waiting would not mend.
    """
    uri = tracking_uri(tracking)
    answers: list[Door | TrackingError] = []

    def ask() -> None:
        try:
            answers.append(_ask(uri, tracking, continues))
        except TrackingError as error:
            answers.append(error)

    asking = threading.Thread(target=ask, name="knocking", daemon=True)
    asking.start()
    asking.join(DOOR_S if uri.startswith(("http://", "https://")) else DATABASE_S)
    if answers and isinstance(answers[0], TrackingError):
        raise answers[0]
    return answers[0] if answers and isinstance(answers[0], Door) else Door(uri, False, None)


def _ask(uri: str, tracking: TrackingConfig, continues: str | None) -> Door:
    wrapper = os.environ.get("MLFLOW_RUN_ID")
    with reported(f"tracking store {masked(uri)} cannot be used"):
        client = client_of(uri)
        try:
            run = find_run(client, continues) if continues else None
            if run is None and wrapper:
                check_artifacts(client, (own := client.get_run(wrapper)).info.artifact_uri, own.info.experiment_id)
            elif run is None:
                experiment_of(client, tracking.experiment)
        except Exception as error:  # requests', SQLAlchemy's and OS errors pass through MLflow
            if isinstance(error, TrackingError) or refused(error) or not _may_come_back(uri, error):
                raise
            return Door(uri, False, None)
    return Door(uri, True, run)


def experiment_of(client: MlflowClient, name: str) -> str | None:
    """Id of an experiment to make a run in, None if there is none yet.   Raises TrackingError if it cannot take one."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        return None
    if experiment.lifecycle_stage != "active":
        raise TrackingError(
            f"experiment {name} is deleted; restore it (mlflow experiments restore -x {experiment.experiment_id}) "
            f"or set tracking.experiment"
        )
    check_artifacts(client, experiment.artifact_location, experiment.experiment_id)
    return str(experiment.experiment_id)


def check_artifacts(client: MlflowClient, artifact_uri: str, experiment_id: str) -> None:
    """Raises TrackingError where artifacts go through a server that is not there."""
    if artifact_uri.startswith("mlflow-artifacts:") and not client.tracking_uri.startswith(("http://", "https://")):
        raise TrackingError(
            f"experiment {client.get_experiment(experiment_id).name} was made by an MLflow server, which alone can store its artifacts; "
            f"the tracking URI is {masked(client.tracking_uri)}. Set MLFLOW_TRACKING_URI to the server, or name another experiment "
            f"(--experiment-name bdh)"
        )


def find_run(client: MlflowClient, run_id: str) -> Run | None:
    """A run that exists and is not deleted, else None."""
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
    return run if run.info.lifecycle_stage == "active" else None


def runs_of(client: MlflowClient, experiment: str) -> list[Run]:
    """Trainings in an experiment that have a mirrored checkpoint, newest first."""
    wrapper = os.environ.get("MLFLOW_RUN_ID")
    if wrapper:  # under `mlflow run` its experiment is the one that is meant
        ids = [client.get_run(wrapper).info.experiment_id]
    else:
        found = client.get_experiment_by_name(experiment)
        ids = [found.experiment_id] if found else []
    if not ids:
        return []
    runs = client.search_runs(ids, run_view_type=ViewType.ACTIVE_ONLY, order_by=["attributes.start_time DESC"])
    return [run for run in runs if "bdh.latest_checkpoint" in run.data.tags]


def small_artifact(client: MlflowClient, run_id: str, path: str) -> bytes:
    """What a file among a run's artifacts holds, to the byte."""
    with tempfile.TemporaryDirectory(prefix="artifact-") as folder:
        return Path(client.download_artifacts(run_id, path, folder)).read_bytes()


def refused(error: BaseException) -> bool:
    """Whether the store has understood and said no, so that asking again is of no use."""
    codes = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "PERMISSION_DENIED", "BAD_REQUEST"}
    return isinstance(error, MlflowException) and error.error_code in codes


def invalid(error: BaseException) -> bool:
    """Whether what was told is itself at fault; a run that is deleted is not, it can be restored."""
    return isinstance(error, MlflowException) and error.error_code == "INVALID_PARAMETER_VALUE" and "'active' state" not in str(error)


def _may_come_back(uri: str, error: BaseException) -> bool:
    """Whether a store that failed so may answer later; a wrong password, another web server or a file that cannot be opened will not."""
    if uri.startswith("sqlite:"):
        return "locked" in str(error)
    status = re.search(r"error code (\d{3})", str(error))
    return not (status and status[1].startswith("4") and status[1] not in ("408", "429"))


@contextlib.contextmanager
def reported(what: str) -> Iterator[None]:
    """Errors of MLflow as one line of ours."""
    try:
        yield
    except BdhError:
        raise
    except Exception as error:  # MLflow lets through requests', SQLAlchemy's and OS errors besides its own
        raise TrackingError(f"{what}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """What an error says, in one line without secrets."""
    text = str(error).strip() or type(error).__name__
    return masked(text.split("\n")[0])[:300]


def _as_text(value: object) -> str:
    return masked(value) if isinstance(value, str) else json.dumps(value)
