"""The run as MLflow sees it: found or made once, then told everything by one sender behind the loop.

`attach` settles which MLflow run this training is. `MlflowTracker` takes metrics, texts and finished checkpoints without waiting; one
thread delivers them in order with an explicit run id, batched by time, and repeats what fails for a passing reason. A resumed run's
points that are on the server already are compared instead of logged twice. The loop knows none of this; it has a `Tracker`.
"""

import contextlib
import json
import os
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag, ViewType
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from bdh_mlflow import checkpoint, journal
from bdh_mlflow.checkpoint import Checkpoint
from bdh_mlflow.config import TrackingConfig
from bdh_mlflow.errors import TrackingError

GATHER_S = 1.0  # points wait this long for company: about one request a second
FIRST_RETRY_S, LAST_RETRY_S = 1.0, 30.0
PATIENCE_AT_EXIT_S = 30.0  # an unreachable server is tried for this long once training is over
HTTP_RETRIES = "3"  # MLflow's own, inside one call; its default of 7 blocks for four minutes
REPLAYED = ("train/loss", "val/loss", "optim/lr", "optim/grad_norm")
"""Metrics that a replayed step must give again to the bit."""

_PERMANENT = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "PERMISSION_DENIED", "BAD_REQUEST"}


@dataclass(frozen=True)
class RunIdentity:
    """Which MLflow run a training is.   segment: how many processes have worked on it, this one included."""

    run_id: str
    name: str
    experiment_id: str
    experiment: str
    tracking_uri: str
    artifact_uri: str
    segment: int
    continued: bool

    @property
    def page(self) -> str:
        """Address of the run's curves in the UI."""
        server = masked(self.tracking_uri) if self.on_server else "http://127.0.0.1:5000"
        return f"{server.rstrip('/')}/#/experiments/{self.experiment_id}/runs/{self.run_id}/model-metrics?workflowType=machine_learning"

    @property
    def on_server(self) -> bool:
        """Whether the tracking URI is a server, which shows the run by itself."""
        return self.tracking_uri.startswith(("http://", "https://"))


def tracking_uri(tracking: TrackingConfig) -> str:
    """The configured URI, else MLflow's own resolution (MLFLOW_TRACKING_URI, else sqlite:///mlflow.db here)."""
    inherited = mlflow.get_tracking_uri()
    if tracking.tracking_uri is None:
        return inherited
    if os.environ.get("MLFLOW_RUN_ID") and inherited != tracking.tracking_uri:
        raise TrackingError(
            f"tracking.tracking_uri is {tracking.tracking_uri}, but `mlflow run` has made its run at {masked(inherited)}. "
            f"Set MLFLOW_TRACKING_URI={tracking.tracking_uri} instead, or start with `bdh-mlflow train`"
        )
    return tracking.tracking_uri


def connect(tracking: TrackingConfig) -> MlflowClient:
    """A client of the tracking store.   Raises TrackingError if it does not answer."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", HTTP_RETRIES)
    uri = tracking_uri(tracking)
    mlflow.set_tracking_uri(uri)
    client = MlflowClient(uri)
    with reported(f"tracking store {masked(uri)} cannot be used"):
        client.search_experiments(max_results=1)
    return client


def find_run(client: MlflowClient, run_id: str) -> Run | None:
    """A run that exists and is not deleted, else None."""
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
    return run if run.info.lifecycle_stage == "active" else None


def attach(client: MlflowClient, tracking: TrackingConfig, continues: str | None) -> RunIdentity:
    """The run to log to: the one continued, else the one `mlflow run` made, else a new one in the named experiment.

    continues: id of the run being resumed; if it is not on this server a new run is begun. When it is, and `mlflow run` has made another
    one for this process, that one becomes its child, named `segment k`.
    """
    wrapper = os.environ.get("MLFLOW_RUN_ID")
    with reported(f"tracking store {masked(client.tracking_uri)} cannot be used"):
        run = find_run(client, continues) if continues else None
        continued = run is not None
        if run is None:
            run = client.get_run(wrapper) if wrapper else _create(client, tracking)
        _check_artifacts(client, run.info.artifact_uri, client.get_experiment(run.info.experiment_id).name)
        segment = int(run.data.tags.get("bdh.segment", 0)) + 1
        run_id = run.info.run_id
        if continued:
            _end_killed_segments(client, run, wrapper)
        if wrapper and wrapper != run_id:
            _make_child(client, wrapper, run_id, segment)
        if tracking.run_name and not continued:
            client.update_run(run_id, name=tracking.run_name)
        client.update_run(run_id, status="RUNNING")
        run = client.get_run(run_id)
        experiment = client.get_experiment(run.info.experiment_id)
    return RunIdentity(
        run_id=run_id,
        name=run.info.run_name or run_id,
        experiment_id=experiment.experiment_id,
        experiment=experiment.name,
        tracking_uri=client.tracking_uri,
        artifact_uri=run.info.artifact_uri,
        segment=segment,
        continued=continued,
    )


class MlflowTracker:
    """Tells an MLflow run everything, behind the loop.

    note: called with a line when delivery fails, works again, or a replayed step differs.
    run_dir: of a continued run; what its journal holds and the server lacks is delivered first.
    """

    def __init__(
        self,
        client: MlflowClient,
        identity: RunIdentity,
        *,
        mirror: bool,
        keep: int | None,
        note: Callable[[str], None],
        run_dir: Path | None = None,
    ) -> None:
        self._client = client
        self.identity = identity
        self._mirror_files = mirror
        self._keep = keep
        self._note = note
        self._queue: queue.SimpleQueue[_Op] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._closing_at = 0.0
        self._failing_since: float | None = None
        self._undelivered = 0
        self._logged = _logged_points(client, identity) if identity.continued else {}
        self._journal = journal.Journal()
        self._replay_diff = 0.0
        if identity.continued and run_dir is not None:
            self._catch_up(run_dir)
        self._sender = threading.Thread(target=self._deliver, name="tracking", daemon=True)
        self._sender.start()

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Points of several curves; those on the server already are compared with it instead."""
        new = {}
        for key, value in values.items():
            before = self._logged.get((key, step))
            if before is None:
                new[key] = value
            elif key in REPLAYED:
                self._compare(key, step, before, value)
        replayed = len(new) < len(values) and not any(key.startswith("by_tokens/") for key in values)
        if replayed and ("resume/replay_max_abs_diff", step) not in self._logged:
            new["resume/replay_max_abs_diff"] = self._replay_diff
        if new:
            record = journal.Record({key: float(value) for key, value in new.items()}, step, int(time.time() * 1000))
            with self._forgiving("the journal cannot be written"):
                self._journal.append(*record)
            self._queue.put(_points(record))

    def sample(self, text: str, step: int) -> None:
        """What the model writes, as artifact `samples/step_N.txt`."""
        self.text(text, f"samples/step_{step}.txt")

    def text(self, text: str, artifact: str) -> None:
        """A small text file among the artifacts."""
        self._queue.put(_Text(text, artifact))

    def tags(self, tags: Mapping[str, str]) -> None:
        """Tags of the run; later values replace earlier ones."""
        self._queue.put(_Tags({key: masked(value) for key, value in tags.items()}))

    def params(self, params: Mapping[str, Any]) -> None:
        """Settings, written once: what the run has already stays as it is."""
        self._queue.put(_Params({key: _as_text(value) for key, value in params.items()}))

    def dataset(self, name: str, digest: str, folder: str, profile: Mapping[str, Any], context: str) -> None:
        """The data of the run, by name and digest.   context: training or validation."""
        source = json.dumps({"uri": masked(folder)})
        data = Dataset(name=name, digest=digest, source_type="local", source=source, profile=json.dumps(profile))
        self._queue.put(_Input(DatasetInput(data, [InputTag("mlflow.data.context", context)])))

    def keep_journal_in(self, run_dir: Path) -> None:
        """Points told so far, and those to come, are on disk in the run directory from now on.   Raises OSError."""
        self._journal.keep_in(run_dir)

    def checkpoint(self, saved: Checkpoint) -> None:
        """A checkpoint that is safe on disk: mirrored, verified, and only then named the latest; then old ones go, here and there."""
        self._queue.put(_Mirror(saved))

    def close(self, status: str, tags: Mapping[str, str]) -> int:
        """Deliver what is left and set the run's status (FINISHED, FAILED, KILLED).   Returns how many records could not be delivered."""
        self.tags(tags)
        self._queue.put(_End(status))
        self._closing_at = time.monotonic()
        self._closing.set()
        self._sender.join()
        with contextlib.suppress(OSError):
            self._journal.close()
        return self._undelivered

    def _catch_up(self, run_dir: Path) -> None:
        """Deliver points that an earlier process measured and did not live to send."""
        for record in journal.read(run_dir):
            missing = {key: value for key, value in record.values.items() if (key, record.step) not in self._logged}
            if missing:
                self._queue.put(_points(record._replace(values=missing)))
                self._logged |= {(key, record.step): value for key, value in missing.items()}

    @contextlib.contextmanager
    def _forgiving(self, what: str) -> Iterator[None]:
        """Pruning is a convenience: where the store does not allow it, it is said and the rest goes on."""
        try:
            yield
        except FileNotFoundError:
            pass
        except Exception as error:  # each artifact store raises its own kinds
            self._note(f"tracking: {what}: {_line(error)}")

    def _compare(self, key: str, step: int, before: float, now: float) -> None:
        diff = abs(before - now)
        if diff > self._replay_diff:
            self._note(f"step {step}: {key} was {before!r} before the interruption and is {now!r} now")
            self._replay_diff = diff

    def _deliver(self) -> None:
        ended = False
        while not ended:
            ops = [self._queue.get()]
            self._closing.wait(GATHER_S)
            with contextlib.suppress(queue.Empty):
                while True:
                    ops.append(self._queue.get_nowait())
            for op in _merged(ops):
                self._attempt(op)
                ended = ended or isinstance(op, _End)

    def _attempt(self, op: "_Op") -> None:
        """Do it until it is done, or is refused for good, or training is over and patience with it."""
        pause_s = FIRST_RETRY_S
        while True:
            try:
                self._do(op)
            except Exception as error:  # MLflow raises its own, requests', SQLAlchemy's and OS errors; none may end the sender
                if isinstance(error, MlflowException) and error.error_code in _PERMANENT:
                    self._give_up(op, f"refused: {_line(error)}")
                    return
                now = time.monotonic()
                if self._failing_since is None:
                    self._failing_since = now
                    self._note(
                        f"tracking: {masked(self.identity.tracking_uri)} does not answer ({_line(error)}); training goes on, trying again"
                    )
                if isinstance(error, FileNotFoundError):
                    self._failing_since = None
                    self._give_up(op, _line(error))
                    return
                if self._closing.is_set() and now - self._closing_at > PATIENCE_AT_EXIT_S:
                    self._give_up(op, _line(error))
                    return
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, LAST_RETRY_S if not self._closing.is_set() else FIRST_RETRY_S)
            else:
                if self._failing_since is not None:
                    self._note("tracking: delivering again")
                    self._failing_since = None
                return

    def _give_up(self, op: "_Op", reason: str) -> None:
        self._undelivered += 1
        self._note(f"tracking: not delivered: {op.what()} ({reason})")

    def _do(self, op: "_Op") -> None:
        client, run_id = self._client, self.identity.run_id
        match op:
            case _Points(points):
                client.log_batch(run_id, metrics=points, synchronous=True)
            case _Params(params):
                known = client.get_run(run_id).data.params
                client.log_batch(run_id, params=[Param(k, v) for k, v in params.items() if k not in known], synchronous=True)
            case _Tags(tags):
                client.log_batch(run_id, tags=[RunTag(k, v) for k, v in tags.items()], synchronous=True)
            case _Text(text, artifact):
                client.log_text(run_id, text, artifact)
            case _Input(dataset):
                client.log_inputs(run_id, [dataset])
            case _Mirror(saved):
                self._mirror(saved)
            case _End(status):
                client.set_terminated(run_id, status)

    def _mirror(self, saved: Checkpoint) -> None:
        client, run_id = self._client, self.identity.run_id
        folder = saved.path.parent
        tags = {"bdh.run_dir": folder.name}
        points = []
        if self._mirror_files:
            started = time.perf_counter()
            remote = f"checkpoints/{folder.name}"
            for file in (folder / checkpoint.CONFIG_NAME, saved.path, saved.manifest_path):
                client.log_artifact(run_id, str(file), remote)
            sizes = {Path(f.path).name: f.file_size for f in client.list_artifacts(run_id, remote)}
            arrived = sizes.get(saved.path.name)
            if arrived not in (saved.manifest.bytes, None):
                raise OSError(f"{remote}/{saved.path.name} arrived with {arrived} of {saved.manifest.bytes} bytes")
            if saved.path.name not in sizes or saved.manifest_path.name not in sizes:
                raise OSError(f"{remote}/{saved.path.name} did not arrive")
            tags["bdh.latest_checkpoint"] = saved.manifest.artifact_path
            top = checkpoint.best(checkpoint.list_run(folder).checkpoints)
            if top is not None:
                tags["bdh.best_checkpoint"] = top.manifest.artifact_path
            if ("ckpt/upload_s", saved.manifest.step) not in self._logged:
                took_s = time.perf_counter() - started
                points = [Metric("ckpt/upload_s", took_s, int(time.time() * 1000), saved.manifest.step)]
        client.log_batch(run_id, metrics=points, tags=[RunTag(k, v) for k, v in tags.items()], synchronous=True)
        for old in checkpoint.superfluous(folder, self._keep, saved.manifest.step):
            if self._mirror_files:
                repository = get_artifact_repository(self.identity.artifact_uri)
                for name in (old.manifest_path.name, old.path.name):
                    with self._forgiving(f"{name} stays in the mirror"):
                        repository.delete_artifacts(f"checkpoints/{folder.name}/{name}")  # type: ignore[no-untyped-call]
            checkpoint.remove(old)


@contextlib.contextmanager
def system_metrics(run_id: str, wanted: bool) -> Iterator[None]:
    """CPU, memory, disk, network and GPU use under `system/`, sampled by MLflow's own monitor while the body runs."""
    if not wanted:
        yield
        return
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor: Any = SystemMetricsMonitor(run_id, resume_logging=True)  # type: ignore[no-untyped-call]
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()


def source_state(folder: Path) -> tuple[str | None, bool, str]:
    """Commit of the checkout that `folder` is in, whether tracked files differ from it, and that difference as a patch."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None, False, ""
    patch = _git(folder, "diff", "HEAD") or ""
    return commit.strip(), bool(patch), patch


def environment() -> str:
    """Installed packages with their versions, a line each."""
    found = {f"{d.metadata['Name']}=={d.version}" for d in metadata.distributions()}
    return "\n".join(sorted(found, key=str.lower)) + "\n"


def masked(text: str) -> str:
    """The text with the password of every URI in it replaced by stars."""
    words = []
    for word in text.split(" "):
        parts = urlsplit(word) if "://" in word and "@" in word else None
        hidden = parts.password if parts else None
        words.append(word.replace(f":{hidden}@", ":***@") if hidden else word)
    return " ".join(words)


@contextlib.contextmanager
def reported(what: str) -> Iterator[None]:
    """Errors of MLflow as one line of ours."""
    try:
        yield
    except TrackingError:
        raise
    except Exception as error:  # MLflow lets through requests', SQLAlchemy's and OS errors besides its own
        raise TrackingError(f"{what}: {_line(error)}") from error


@dataclass(frozen=True)
class _Op:
    """One thing to tell."""

    def what(self) -> str:
        return type(self).__name__.strip("_").lower()


@dataclass(frozen=True)
class _Points(_Op):
    points: tuple[Metric, ...]

    def what(self) -> str:
        return f"{len(self.points)} points"


@dataclass(frozen=True)
class _Params(_Op):
    params: dict[str, str]


@dataclass(frozen=True)
class _Tags(_Op):
    tags: dict[str, str]


@dataclass(frozen=True)
class _Text(_Op):
    text: str
    artifact: str

    def what(self) -> str:
        return self.artifact


@dataclass(frozen=True)
class _Input(_Op):
    dataset: DatasetInput


@dataclass(frozen=True)
class _Mirror(_Op):
    saved: Checkpoint

    def what(self) -> str:
        return self.saved.manifest.artifact_path


@dataclass(frozen=True)
class _End(_Op):
    status: str

    def what(self) -> str:
        return f"status {self.status}"


def _points(record: journal.Record) -> _Points:
    return _Points(tuple(Metric(key, value, record.at_ms, record.step) for key, value in record.values.items()))


def _merged(ops: Sequence[_Op]) -> list[_Op]:
    """The same in fewer requests: neighbouring points together, nothing out of order."""
    merged: list[_Op] = []
    for op in ops:
        last = merged[-1] if merged else None
        if isinstance(op, _Points) and isinstance(last, _Points):
            merged[-1] = _Points(last.points + op.points)
        else:
            merged.append(op)
    return merged


def _create(client: MlflowClient, tracking: TrackingConfig) -> Run:
    experiment = client.get_experiment_by_name(tracking.experiment)
    if experiment is None:
        experiment_id = client.create_experiment(tracking.experiment)
    elif experiment.lifecycle_stage != "active":
        raise TrackingError(
            f"experiment {tracking.experiment} is deleted; restore it (mlflow experiments restore -x {experiment.experiment_id}) "
            f"or set tracking.experiment"
        )
    else:
        experiment_id = experiment.experiment_id
        _check_artifacts(client, experiment.artifact_location, experiment.name)
    user = os.environ.get("USER") or os.environ.get("LOGNAME") or "unknown"
    return client.create_run(
        experiment_id, run_name=tracking.run_name, tags={"mlflow.user": user, "mlflow.source.name": "bdh-mlflow train"}
    )


def _check_artifacts(client: MlflowClient, artifact_uri: str, experiment: str) -> None:
    if artifact_uri.startswith("mlflow-artifacts:") and not client.tracking_uri.startswith(("http://", "https://")):
        raise TrackingError(
            f"experiment {experiment} was made by an MLflow server, which alone can store its artifacts; the tracking URI is "
            f"{masked(client.tracking_uri)}. Set MLFLOW_TRACKING_URI to the server, or name another experiment (--experiment-name bdh)"
        )


def _end_killed_segments(client: MlflowClient, run: Run, wrapper: str | None) -> None:
    """Children of earlier segments that a hard kill left RUNNING: there is one process at a time, so theirs is gone."""
    children = client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run.info.run_id}'")
    for child in children:
        if child.info.status == "RUNNING" and child.info.run_id != wrapper and "bdh.continues" in child.data.tags:
            client.set_terminated(child.info.run_id, "KILLED")


def _make_child(client: MlflowClient, wrapper: str, parent: str, segment: int) -> None:
    tags = {"mlflow.parentRunId": parent, "bdh.continues": parent}
    client.log_batch(wrapper, tags=[RunTag(k, v) for k, v in tags.items()], synchronous=True)
    client.update_run(wrapper, name=f"segment {segment}")


def _logged_points(client: MlflowClient, identity: RunIdentity) -> dict[tuple[str, int], float]:
    """Points of a continued run by metric and step; system metrics keep their own count and are left out."""
    with reported(f"run {identity.run_id} cannot be read"):
        keys = [key for key in client.get_run(identity.run_id).data.metrics if not key.startswith("system/")]
        return {(key, m.step): m.value for key in keys for m in client.get_metric_history(identity.run_id, key)}


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


def _as_text(value: object) -> str:
    return masked(value) if isinstance(value, str) else json.dumps(value)


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, encoding="utf-8", errors="replace", timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return masked(text.split("\n")[0])[:300]
