"""The MLflow store of a run: which one is meant, whether it can be used, and which of its errors are permanent.

Every call names its store by a client or a URI; no process-wide tracking URI is set, and only `tracking_uri` reads it.
`connect` and `probe_store` are the only ways to a client that has been tried.
"""

import contextlib
import importlib.util
import json
import os
import re
import socket
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, Run, ViewType
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_registered_artifact_repositories
from mlflow.utils.file_utils import local_file_uri_to_path

from bdh_mlflow import checkpoint, host
from bdh_mlflow.config import TrackingConfig
from bdh_mlflow.config.places import DATABASES, scheme_of, store_uri
from bdh_mlflow.errors import BdhError, TrackingError
from bdh_mlflow.files import first_line
from bdh_mlflow.redact import masked
from bdh_mlflow.text import printable
from bdh_mlflow.tracking import database, routes
from bdh_mlflow.tracking.sender_process import RETRIES
from bdh_mlflow.tracking.status import KnownRun, StoreStatus

OLDEST_SERVER = "3.15"  # see benchmarks/versions.py
PROBE_S = 5.0  # a store that has not answered by then is unreachable: training begins without it
DATABASE_S = 60.0  # a database opened in this process may have its tables to make first
HTTP_RETRIES = "3"  # MLflow's own, inside one call; its default of 7 blocks for four minutes
ARTIFACT_PACKAGES = {
    "s3": ("boto3", "'bdh-mlflow[s3]'"),
    "r2": ("boto3", "'bdh-mlflow[s3]'"),
    "b2": ("boto3", "'bdh-mlflow[s3]'"),
    "gs": ("google.cloud.storage", "'bdh-mlflow[gcs]'"),
    "wasbs": ("azure.storage.blob", "'bdh-mlflow[azure]'"),
    "abfss": ("azure.storage.filedatalake", "'bdh-mlflow[azure]'"),
    "sftp": ("paramiko", "paramiko pysftp"),
}
"""Module that MLflow needs for the artifact stores of a scheme, and what pip calls it."""
DRIVERS = {
    "psycopg": "pip install 'bdh-mlflow[postgres]'",
    "psycopg2": "pip install 'bdh-mlflow[postgres]' and write postgresql+psycopg:// instead, or pip install psycopg2-binary",
    "MySQLdb": "pip install mysqlclient, or pip install pymysql and write mysql+pymysql:// instead",
    "pymysql": "pip install pymysql",
    "pyodbc": "pip install pyodbc",
}
"""Modules by which SQLAlchemy speaks to databases, and what brings them."""
_UNSTORABLE = re.compile(r"codec can't encode|surrogates not allowed|NUL \(0x00\)|null byte|\\u0000 cannot be converted", re.IGNORECASE)
_HALF_MADE = re.compile(r"already exists|duplicate column|Online migration expected|no such (table|column)", re.IGNORECASE)
_FOR_GOOD = re.compile(r"password|authentication|access denied|does not exist|unknown database|no module named", re.IGNORECASE)


def tracking_uri(tracking: TrackingConfig) -> str:
    """The configured URI, else MLflow's own resolution (MLFLOW_TRACKING_URI, else sqlite:///mlflow.db here), in full.

    Raises TrackingError for what is no URI of a store.
    """
    try:
        inherited = store_uri(mlflow.get_tracking_uri(), Path.cwd(), expand=False)
    except UnicodeError:
        raise TrackingError(
            f"{printable(Path.cwd())}: MLflow cannot keep a database in a folder whose name is not UTF-8; start elsewhere, or set "
            f"MLFLOW_TRACKING_URI"
        ) from None
    except ValueError as error:
        raise TrackingError(f"MLFLOW_TRACKING_URI: {error}") from None
    if tracking.tracking_uri is None:
        return inherited
    configured = store_uri(tracking.tracking_uri, Path.cwd(), expand=False)  # in full already, but for a configuration made by a program
    if os.environ.get("MLFLOW_RUN_ID") and inherited != configured:
        raise TrackingError(
            f"tracking.tracking_uri is {masked(configured)}, but `mlflow run` has made its run at {masked(inherited)}. "
            f"Set MLFLOW_TRACKING_URI={masked(configured)} instead, or start with `bdh-mlflow train`"
        )
    return configured


def connect(tracking: TrackingConfig) -> MlflowClient:
    """A client of the tracking store.   Raises TrackingError if it does not answer."""
    uri = tracking_uri(tracking)
    with reported(f"tracking store {masked(uri)} cannot be used"):
        client = client_of(uri)
        client.search_experiments(max_results=1)
    return client


def client_of(uri: str) -> MlflowClient:
    """A client of the store at a URI, with the retries inside one call bounded. A database is opened here, a server is not asked yet.

    Raises whatever MLflow does.
    """
    os.environ.setdefault(RETRIES, HTTP_RETRIES)
    routes.install()
    with database.only_opener(uri):
        try:
            return MlflowClient(uri)
        except Exception as error:  # SQLAlchemy's and alembic's pass through MLflow
            if uri.startswith("sqlite:") and _HALF_MADE.search(str(error)):
                raise TrackingError(
                    f"{masked(uri)} was left half made by a program that was stopped while it made its tables, or by two that made them at "
                    f"once ({first_line(error)}). If it holds no runs yet, remove the file; else restore it from a copy"
                ) from error
            raise


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
        try:
            database.try_database(uri)
            client = client_of(uri)
            own = wrapper_run(client, wrapper, continues) if wrapper else None
            run = find_run(client, continues) if continues else None
            if run is None and own is not None:
                check_artifacts(client, own.info.artifact_uri, own.info.experiment_id)
            elif run is None:
                experiment_of(client, tracking.experiment)
        except Exception as error:  # requests', SQLAlchemy's and OS errors pass through MLflow
            if isinstance(error, TrackingError) or is_refusal(error) or not _may_come_back(uri, error):
                raise
            return StoreStatus(uri, False, None)
    known = KnownRun(run.data.tags, segment_number(run), run.info.start_time) if run else None
    return StoreStatus(uri, True, known)


def wrapper_run(client: MlflowClient, run_id: str, continues: str | None) -> Run:
    """The run that MLFLOW_RUN_ID names.   continues: run that is resumed.   Raises TrackingError if no training can log to it."""
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise TrackingError(
            f"MLFLOW_RUN_ID names run {run_id}, which is not at {masked(client.tracking_uri)}; unset MLFLOW_RUN_ID, or set "
            f"MLFLOW_TRACKING_URI to the store that has it"
        ) from None
    if run.info.lifecycle_stage != "active":
        raise TrackingError(
            f"MLFLOW_RUN_ID names run {run_id}, which is deleted; restore it (mlflow runs restore --run-id {run_id}), or unset "
            f"MLFLOW_RUN_ID"
        )
    if not is_free(run, continues):
        way = f", or continue that one with --resume {run_id}" if "bdh.sweep" not in run.data.tags else ""
        what = "another training" if way else "a sweep"
        raise TrackingError(
            f"MLFLOW_RUN_ID names run {run_id} ({run.info.run_name}), which holds {what} already; unset MLFLOW_RUN_ID for a run of "
            f"its own{way}"
        )
    return run


def is_free(run: Run, continues: str | None, training: str | None = None) -> bool:
    """Whether a training may log to a run: it is fresh, or its own.   continues: run that is resumed.   training: id of the training."""
    tags = run.data.tags
    if run.info.run_id == continues or (training and tags.get("bdh.training") == training):
        return True
    if "bdh.continues" in tags:  # the wrapper of a segment, a child of the run that it continued
        return tags["bdh.continues"] == continues
    fresh = not {"bdh.training", "bdh.segment", "bdh.sweep"} & tags.keys()
    return fresh and all(key.startswith("system/") for key in run.data.metrics)


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


def make_experiment(client: MlflowClient, name: str) -> str:
    """Id of an experiment to make a run in, made if there is none.   Raises TrackingError if it cannot take one."""
    known = experiment_of(client, name)
    if known is None:
        try:
            with allowed(f"create experiment {name} at {masked(client.tracking_uri)}"):
                client.create_experiment(name, _artifact_location(client.tracking_uri, name))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another run was quicker
                raise
        known = experiment_of(client, name)
    if known is None:
        raise TrackingError(f"experiment {name}: was made at {masked(client.tracking_uri)} and is not there; try again")
    return known


def _artifact_location(uri: str, name: str) -> str | None:
    """Where the artifacts of a new experiment go: as MLflow decides, but where it would decode a `%` in the name of this folder."""
    here = Path.cwd()
    return (here / "mlruns" / quote(f"experiment {name}", safe=" ")).as_uri() if uri.startswith("sqlite:") and "%" in str(here) else None


def check_artifacts(client: MlflowClient, artifact_uri: str, experiment_id: str) -> None:
    """Raises TrackingError where artifacts go through a server that is not there, or to a store that cannot be reached from here."""
    scheme = urlsplit(artifact_uri).scheme
    module, package = ARTIFACT_PACKAGES.get(scheme, ("", ""))
    if module and not _is_installed(module):
        raise TrackingError(f"artifacts go to {masked(artifact_uri)}, which needs a package that is not installed: pip install {package}")
    if scheme not in get_registered_artifact_repositories():
        raise TrackingError(f"artifacts go to {masked(artifact_uri)}, and MLflow knows no artifact store of that kind here")
    if artifact_uri.startswith("mlflow-artifacts:") and not client.tracking_uri.startswith(("http://", "https://")):
        raise TrackingError(
            f"experiment {client.get_experiment(experiment_id).name} was made by an MLflow server, which alone can store its artifacts; "
            f"the tracking URI is {masked(client.tracking_uri)}. Set MLFLOW_TRACKING_URI to the server, or name another experiment "
            f"(--experiment-name bdh)"
        )


def why_no_folder(artifact_uri: str) -> str | None:
    """Why there can be no artifacts, where they go to a folder of this machine; None if they can, or go elsewhere."""
    folder = local_path(artifact_uri)
    return checkpoint.why_unwritable(folder) if folder is not None else None


def find_run(client: MlflowClient, run_id: str) -> Run | None:
    """A run that exists and is not deleted, else None."""
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
    return run if run.info.lifecycle_stage == "active" else None


def segment_number(run: Run) -> int:
    """Number of the segment that worked on a run last; 0 for a run of another program, whatever its tag says."""
    return whole_number(run.data.tags.get("bdh.segment"))


def whole_number(text: str | None) -> int:
    """The number in a tag or param; 0 for anything else, which somebody else has set."""
    return int(text) if text and text.isascii() and text.isdigit() and len(text) < 19 else 0


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


def models_of(client: MlflowClient, experiment_id: str, model_type: str, run_id: str | None, **order: Any) -> list[LoggedModel]:
    """All LoggedModels of a type in an experiment.   run_id: only those of this run.   order: `order_by` of MLflow's search."""
    wanted = f"model_type = '{model_type}'" + (f" AND source_run_id = '{run_id}'" if run_id else "")
    page = client.search_logged_models([experiment_id], wanted, **order)
    found = list(page)
    while page.token:
        page = client.search_logged_models([experiment_id], wanted, page_token=page.token, **order)
        found += page
    return found


def is_refusal(error: BaseException) -> bool:
    """Whether the store understood the request and refused it, so that the same request would be refused again."""
    codes = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "PERMISSION_DENIED", "BAD_REQUEST"}
    return isinstance(error, MlflowException) and error.error_code in codes


def is_invalid(error: BaseException) -> bool:
    """Whether the content of the request is at fault, or what it needs is not installed, so that waiting does not help.

    Not so for a deleted run, which can be restored.
    """
    if isinstance(error, MlflowException):  # of a database also for whatever is raised in between
        invalid = error.error_code == "INVALID_PARAMETER_VALUE" and "'active' state" not in str(error)
        said = str(error).partition("[SQL:")[0]  # behind it are the values of the statement
        return invalid or _UNSTORABLE.search(said) is not None
    if isinstance(error, OSError | json.JSONDecodeError):  # requests' errors are OSErrors, and an answer that is no JSON comes from a proxy
        return False
    return isinstance(error, ValueError | TypeError | ImportError | NotImplementedError)


def explained(error: BaseException, uri: str) -> str:
    """What an error says, in one line; of a server that does not know a request, with both versions."""
    said = first_line(error)
    if not uri.startswith(("http://", "https://")) or "error code 404" not in str(error) or "RESOURCE_DOES_NOT_EXIST" in str(error):
        return said
    theirs, own = server_version(uri) or "of unknown version", host.version_of("mlflow")
    return f"it runs MLflow {theirs}, which does not know what MLflow {own} asks of it here; {OLDEST_SERVER} is the oldest tried: {said}"


def server_version(uri: str) -> str | None:
    """The version of MLflow that a server runs; None if it does not say."""
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/version", timeout=PROBE_S) as answer:
            return str(answer.read(100).decode().strip())
    except Exception:  # http.client raises its own kinds besides OSError, and their texts may hold the password
        return None


@contextlib.contextmanager
def allowed(act: str) -> Iterator[None]:
    """Raises TrackingError where this user may not do what the body does.   act: in words, `create runs in ...`."""
    try:
        yield
    except MlflowException as error:
        if error.error_code not in ("PERMISSION_DENIED", "UNAUTHENTICATED"):
            raise
        raise TrackingError(f"this user may not {act}: {first_line(error)}") from error


def _may_come_back(uri: str, error: BaseException) -> bool:
    """Whether a store that failed like this may answer later; a wrong password, another server or an unreadable file will stay."""
    if uri.startswith("sqlite:"):
        return "locked" in str(error)
    if scheme_of(uri) in DATABASES:
        return not _FOR_GOOD.search(str(error))
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
        raise TrackingError(f"{what}: {first_line(error)}{_remedy(error)}") from error


def _remedy(error: BaseException) -> str:
    """What helps against an error, as the end of its message; nothing if that is not known."""
    if isinstance(error, ModuleNotFoundError) and error.name in DRIVERS:
        return f"; {DRIVERS[error.name]}"
    if getattr(error, "error_code", None) == "UNAUTHENTICATED" or "error code 401" in str(error):
        return "; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, for this server"
    return ""


def local_path(artifact_uri: str) -> Path | None:
    """The folder of an artifact store on this machine, None for any other; the only place that turns such a URI into a path."""
    if urlsplit(artifact_uri).scheme not in ("", "file"):
        return None
    return Path(local_file_uri_to_path(artifact_uri))  # type: ignore[no-untyped-call]  # as MLflow: `%2F` is decoded also without a scheme


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it would be in
        return False


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
