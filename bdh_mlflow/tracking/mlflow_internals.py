"""Everything this package uses of MLflow beyond its documented interface, so that an update of MLflow is checked in one place.

Each function has a test that fails when MLflow changes what it relies on (tests/tracking/test_mlflow_internals.py).
"""

import contextlib
import functools
import os
import socket
import urllib.request
from collections.abc import Iterator, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import urlsplit

import requests
from mlflow import MlflowClient
from mlflow.entities import RunStatus
from mlflow.entities.multipart_upload import MultipartUploadPart
from mlflow.environment_variables import MLFLOW_S3_IGNORE_TLS, MLFLOW_TRACKING_URI
from mlflow.exceptions import MlflowException, _UnsupportedMultipartUploadException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import _artifact_repository_registry
from mlflow.store.artifact.mlflow_artifacts_repo import MlflowArtifactsRepository
from mlflow.utils import validation
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.file_utils import read_chunk, remove_on_error
from mlflow.utils.request_utils import augmented_raise_for_status
from mlflow.utils.rest_utils import http_request
from mlflow.utils.server_info import SERVER_INFO_ENDPOINT
from mlflow.utils.validation import _validate_model_name

from bdh_mlflow.files import first_line
from bdh_mlflow.tracking.together import together

REQUESTS = 8  # at a time; most of each is waiting for the server
SIGNED_TIMEOUT_S = 3.0, 60.0  # to connect to the store behind a server, and for its next bytes


def set_run(client: MlflowClient, run_id: str, status: str | None, *, end_ms: int | None = None, name: str | None = None) -> None:
    """Set status, end and name of a run in one request; None leaves a value as it is.

    `MlflowClient.update_run` and `set_terminated` ask for the run before, the one to keep what they do not set, the other for a line that
    it prints.
    """
    code = RunStatus.from_string(status) if status is not None else None
    client._tracking_client.store.update_run_info(run_id, code, end_ms, name)


def fetch_file(repository: ArtifactRepository, path: str, target: Path) -> None:
    """Download one file in one request; `download_artifacts` would ask first whether it is a folder.   path: of the artifact."""
    repository._download_file(path, str(target))  # type: ignore[no-untyped-call]


class ServerRepository(MlflowArtifactsRepository):
    """Artifacts behind an MLflow server, with each way to move a file by itself: through the server, or by addresses that it signs.

    Of MLflow's class (3.15 to 3.18) this uses the addresses, the credentials and the upload in parts, and decides nothing: who derives
    from it overrides `log_artifact` and `_download_file`, through which all of MLflow's own code goes.
    """

    @property
    def server(self) -> str:
        """Address of the server."""
        return str(self.artifact_uri).partition("/api/2.0/mlflow-artifacts/artifacts")[0]

    def put(self, path: str, file: IO[bytes]) -> None:
        """Upload through the server in one request.   path: of the artifact.   Raises what requests does, with the server's answer."""
        kind = {"Content-Type": "application/octet-stream"}
        answer = http_request(self._host_creds, f"/{path}", "PUT", data=file, extra_headers=kind)  # type: ignore[no-untyped-call]
        augmented_raise_for_status(answer)  # type: ignore[no-untyped-call]

    def get(self, path: str, target: Path) -> None:
        """Download through the server in one request.   Raises what requests does, with the server's answer."""
        answer = http_request(self._host_creds, f"/{path}", "GET", stream=True)  # type: ignore[no-untyped-call]
        augmented_raise_for_status(answer)  # type: ignore[no-untyped-call]
        _write(answer, target)

    def put_signed(self, file: Path, folder: str | None) -> None:
        """Upload in parts to addresses that the server signs.   Raises NotImplementedError where its store has none."""
        try:
            self._try_multipart_upload(str(file), folder)  # type: ignore[no-untyped-call]
        except _UnsupportedMultipartUploadException as error:
            raise NotImplementedError(str(error)) from None

    def get_signed(self, path: str, target: Path) -> None:
        """Download from an address that the server signs."""
        signed = self._get_presigned_download_url(path)  # type: ignore[no-untyped-call]
        _check_reachable(signed.url)
        answer = requests.get(signed.url, headers=signed.headers, stream=True, timeout=SIGNED_TIMEOUT_S, verify=_verifies_tls())
        augmented_raise_for_status(answer)  # type: ignore[no-untyped-call]
        _write(answer, target)

    def info(self) -> dict[str, Any]:
        """What the server says it can do; nothing for one that does not say it.   Raises whatever requests does."""
        answer = http_request(get_default_host_creds(self.server), SERVER_INFO_ENDPOINT, "GET")  # type: ignore[no-untyped-call]
        found = answer.json() if answer.status_code == HTTPStatus.OK else {}
        return found if isinstance(found, dict) else {}

    def create_multipart_upload(self, local_file: str, num_parts: int = 1, artifact_path: str | None = None) -> Any:
        """As MLflow's, for an empty file too, and only where the store that is to get the parts can be reached from here."""
        made = super().create_multipart_upload(local_file, max(1, num_parts), artifact_path)  # type: ignore[no-untyped-call]
        try:
            _check_reachable(made.credentials[0].url)
        except OSError:
            with contextlib.suppress(Exception):  # what was begun costs nothing
                self.abort_multipart_upload(local_file, made.upload_id, artifact_path)  # type: ignore[no-untyped-call]
            raise
        return made

    @staticmethod
    def _upload_part(credential: Any, local_file: str, size: int, start_byte: int) -> MultipartUploadPart:
        """As MLflow's, with a limit to waiting."""
        data = read_chunk(Path(local_file), size, start_byte)
        answer = requests.put(credential.url, data=data, headers=credential.headers, timeout=SIGNED_TIMEOUT_S, verify=_verifies_tls())
        augmented_raise_for_status(answer)  # type: ignore[no-untyped-call]
        return MultipartUploadPart(part_number=credential.part_number, etag=answer.headers.get("ETag", ""), url=credential.url)


def chosen_by_user(variable: Any) -> Any:
    """The value of one of MLflow's environment variables; None where it is not set."""
    return variable.get() if variable.is_set() else None


def use_for_servers(repository: type[ServerRepository]) -> None:
    """Have all of MLflow in this process move artifacts of MLflow servers by this class."""
    _artifact_repository_registry.register("mlflow-artifacts", repository)  # type: ignore[no-untyped-call]


def _write(answer: requests.Response, target: Path) -> None:
    with remove_on_error(target), target.open("wb") as file:
        for block in answer.iter_content(chunk_size=1 << 20):
            file.write(block)


def _check_reachable(url: str) -> None:
    """Raises OSError if nobody listens at the host of an address: a firewall would hold each request for minutes."""
    if urllib.request.getproxies().get(urlsplit(url).scheme) and not urllib.request.proxy_bypass(urlsplit(url).hostname or ""):
        return  # the proxy is what must be reached
    parts = urlsplit(url)
    socket.create_connection((parts.hostname, parts.port or {"http": 80}.get(parts.scheme, 443)), SIGNED_TIMEOUT_S[0]).close()


def _verifies_tls() -> bool:
    return not MLFLOW_S3_IGNORE_TLS.get()  # type: ignore[no-untyped-call]


def check_model_name(name: str) -> None:
    """Raises MlflowException for a name that no registered model can have, with no request to a store."""
    _validate_model_name(name)


def check_model_alias(alias: str) -> None:
    """Raises MlflowException for an alias that no model version can have (`latest`, `v1`, odd characters), with no request to a store."""
    for name in ("_validate_model_alias_name", "_validate_model_alias_name_reserved"):  # 3.18 left `model` out
        (getattr(validation, name, None) or getattr(validation, name.replace("model_", "")))(alias)


def check_requests() -> None:
    """Have the scoring server of this process show a request as it was sent to a Python model with a method `check_request`.

    The method gets body and content type and raises MlflowException to refuse. Only after it does the server convert the request to the
    types of the signature, which turns null into the text "None" and drops unknown parameters; and a type without conversion (`AnyType`)
    would give up CSV. What the server fails to convert is answered with 400 and the reason, not with 500. Other models are served as
    before, and all of them where MLflow has no such function.
    """
    from mlflow.pyfunc import scoring_server  # here: only who serves needs it, and a training starts without it

    serve = getattr(scoring_server, "invocations", None)
    if serve is None or hasattr(serve, "checks_requests"):
        return

    @functools.wraps(serve)
    def invocations(data: bytes, content_type: str | None, model: Any, *rest: Any) -> Any:
        try:
            check = getattr(model.unwrap_python_model(), "check_request", None)
        except MlflowException:  # a model of another flavor
            check = None
        if check is None:
            return serve(data, content_type, model, *rest)
        check(data, content_type)
        try:
            return serve(data, content_type, model, *rest)
        except MlflowException:
            raise
        except Exception as error:
            reason = f"the request cannot be read: {type(error).__name__}: {first_line(error)}"
            raise MlflowException(reason, error_code=INVALID_PARAMETER_VALUE) from None

    setattr(invocations, "checks_requests", True)  # noqa: B010
    scoring_server.invocations = invocations


@contextlib.contextmanager
def default_store(uri: str) -> Iterator[None]:
    """Make `uri` the process's default tracking store in the body, by its environment variable.

    For `MlflowClient.create_model_version` with a source `models:/ID` on a database: MLflow's SqlAlchemyStore looks the model up with a
    client of the default store, not of itself (a TODO there, 3.17.2).
    """
    before = os.environ.get(MLFLOW_TRACKING_URI.name)
    os.environ[MLFLOW_TRACKING_URI.name] = uri
    try:
        yield
    finally:
        if before is None:
            del os.environ[MLFLOW_TRACKING_URI.name]
        else:
            os.environ[MLFLOW_TRACKING_URI.name] = before


class MetricPoint(NamedTuple):
    """A value of a metric.   at_ms: Unix time in ms."""

    step: int
    at_ms: int
    value: float


def metric_histories(client: MlflowClient, run_ids: Sequence[str], key: str) -> dict[str, list[MetricPoint]]:
    """All points of a metric, run by run, in no order.

    A database is read directly, with one query for all runs: through `get_metric_history` it would search the points of all runs once per
    run, and MLflow would make three objects of each point.
    """
    from mlflow.store.tracking.dbmodels.models import SqlMetric  # here: senders are spared the import of SQLAlchemy
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    store = client._tracking_client.store
    found: dict[str, list[MetricPoint]] = {run_id: [] for run_id in run_ids}
    if not isinstance(store, SqlAlchemyStore):

        def ask(run_id: str) -> None:
            found[run_id] = [MetricPoint(m.step, m.timestamp, m.value) for m in client.get_metric_history(run_id, key)]

        together(*[functools.partial(ask, run_id) for run_id in run_ids], at_once=REQUESTS)
        return found
    columns = SqlMetric.run_uuid, SqlMetric.step, SqlMetric.timestamp, SqlMetric.value, SqlMetric.is_nan
    with store.ManagedSessionMaker() as session:
        for run_id, step, at_ms, value, is_nan in session.query(*columns).filter(SqlMetric.key == key, SqlMetric.run_uuid.in_(run_ids)):
            found[run_id].append(MetricPoint(step, at_ms, float("nan") if is_nan else value))
    return found
