"""The MLflow store of a run: which one is meant, whether it can be used, and which of its errors are permanent.

Every call names its store by a client or a URI; no process-wide tracking URI is set, and only `tracking_uri` reads it.
`connect` and `probe_store` are the only ways to a client that has been tried.
"""

import contextlib
import os
import re
import socket
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Run, ViewType
from mlflow.exceptions import MlflowException

from bdh_mlflow.config import TrackingConfig
from bdh_mlflow.errors import BdhError, TrackingError
from bdh_mlflow.files import first_line
from bdh_mlflow.redact import masked

PROBE_S = 5.0  # a store that has not answered by then is unreachable: training begins without it
DATABASE_S = 60.0  # a database opened in this process may have its tables to make first
HTTP_RETRIES = "3"  # MLflow's own, inside one call; its default of 7 blocks for four minutes
RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
RETRIES_GIVEN = RETRIES in os.environ


@dataclass(frozen=True)
class StoreStatus:
    """Result of the first request to a store.   reachable: it answered.   run: the one to be continued, if the store has it."""

    tracking_uri: str
    reachable: bool
    run: Run | None


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
    uri = tracking_uri(tracking)
    with reported(f"tracking store {masked(uri)} cannot be used"):
        client = client_of(uri)
        client.search_experiments(max_results=1)
    return client


def client_of(uri: str) -> MlflowClient:
    """A client of the store at a URI, with the retries inside one call bounded. A database is opened here, a server is not asked yet."""
    os.environ.setdefault(RETRIES, HTTP_RETRIES)
    return MlflowClient(uri)


def probe_store(tracking: TrackingConfig, continues: str | None) -> StoreStatus:
    """Find out, within a few seconds, whether the run can be made in this store. Writes nothing.

    continues: id of the run being resumed.   Raises TrackingError for what waiting would not mend.
    """
    uri = tracking_uri(tracking)
    answers: list[StoreStatus | TrackingError] = []

    def probe() -> None:
        try:
            answers.append(_status(uri, tracking, continues))
        except TrackingError as error:
            answers.append(error)

    probing = threading.Thread(target=probe, name="store probe", daemon=True)
    probing.start()
    probing.join(PROBE_S if uri.startswith(("http://", "https://")) else DATABASE_S)
    if answers and isinstance(answers[0], TrackingError):
        raise answers[0]
    return answers[0] if answers and isinstance(answers[0], StoreStatus) else StoreStatus(uri, False, None)


def _status(uri: str, tracking: TrackingConfig, continues: str | None) -> StoreStatus:
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
            if isinstance(error, TrackingError) or is_refusal(error) or not _may_come_back(uri, error):
                raise
            return StoreStatus(uri, False, None)
    return StoreStatus(uri, True, run)


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
    """The bytes of a file among a run's artifacts."""
    with tempfile.TemporaryDirectory(prefix="artifact-") as folder:
        return Path(client.download_artifacts(run_id, path, folder)).read_bytes()


def is_refusal(error: BaseException) -> bool:
    """Whether the store understood the request and refused it, so that the same request would be refused again."""
    codes = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "PERMISSION_DENIED", "BAD_REQUEST"}
    return isinstance(error, MlflowException) and error.error_code in codes


def is_invalid(error: BaseException) -> bool:
    """Whether the content of the request is at fault; not so for a deleted run, which can be restored."""
    return isinstance(error, MlflowException) and error.error_code == "INVALID_PARAMETER_VALUE" and "'active' state" not in str(error)


def _may_come_back(uri: str, error: BaseException) -> bool:
    """Whether a store that failed like this may answer later; a wrong password, another server or an unreadable file will stay."""
    if uri.startswith("sqlite:"):
        return "locked" in str(error)
    status = re.search(r"error code (\d{3})", str(error))
    return not (status and status[1].startswith("4") and status[1] not in ("408", "429"))


@contextlib.contextmanager
def reported(what: str) -> Iterator[None]:
    """Turn whatever MLflow raises in the body into a TrackingError of one line that begins with `what`."""
    try:
        yield
    except BdhError:
        raise
    except Exception as error:  # MLflow lets through requests', SQLAlchemy's and OS errors besides its own
        raise TrackingError(f"{what}: {first_line(error)}") from error


def local_path(artifact_uri: str) -> Path | None:
    """The folder of an artifact store on this machine, None for any other."""
    parts = urlsplit(artifact_uri)
    if parts.scheme == "file":
        return Path(unquote(parts.path))
    return Path(artifact_uri) if parts.scheme == "" else None


def on_this_machine(uri: str) -> bool:
    """Whether the server at an address runs on this machine: packets to it would come from the address they go to."""
    parts = urlsplit(uri)
    try:
        found = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)
    except OSError:
        return False
    for family, kind, _, _, address in found:
        with contextlib.suppress(OSError), socket.socket(family, kind) as probe:  # a name may have an address of a family that is off
            probe.connect(address)  # of a datagram socket: nothing is sent
            return bool(probe.getsockname()[0] == address[0])
    return False
