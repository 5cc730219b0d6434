"""Everything this package uses of MLflow beyond its documented interface, so that an update of MLflow is checked in one place.

Each function has a test that fails when MLflow changes what it relies on (tests/tracking/test_mlflow_internals.py).
"""

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple

from mlflow import MlflowClient
from mlflow.environment_variables import MLFLOW_TRACKING_URI
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.http_artifact_repo import HttpArtifactRepository
from mlflow.utils.request_utils import augmented_raise_for_status
from mlflow.utils.rest_utils import http_request
from mlflow.utils.validation import _validate_model_alias_name, _validate_model_alias_name_reserved, _validate_model_name

from bdh_mlflow.files import first_line

REQUESTS = 8  # at a time; most of each is waiting for the server


def is_single_request(repository: ArtifactRepository, path: Path) -> bool:
    """Whether MLflow would upload this file through its server in one request, as `put` does."""
    return isinstance(repository, HttpArtifactRepository) and not repository._should_multipart_upload(path)  # type: ignore[no-untyped-call]


def put(repository: ArtifactRepository, path: str, file: IO[bytes]) -> None:
    """Upload a file through the server in one request, as `HttpArtifactRepository.log_artifact` does.

    path: of the artifact, from the run's root, with a leading slash.   Raises what requests does, with the server's answer.
    """
    assert isinstance(repository, HttpArtifactRepository)
    kind = {"Content-Type": "application/octet-stream"}
    answer = http_request(repository._host_creds, path, "PUT", data=file, extra_headers=kind)  # type: ignore[no-untyped-call]
    augmented_raise_for_status(answer)  # type: ignore[no-untyped-call]


def check_model_name(name: str) -> None:
    """Raises MlflowException for a name that no registered model can have, with no request to a store."""
    _validate_model_name(name)


def check_model_alias(alias: str) -> None:
    """Raises MlflowException for an alias that no model version can have (`latest`, `v1`, odd characters), with no request to a store."""
    _validate_model_alias_name(alias)  # type: ignore[no-untyped-call]
    _validate_model_alias_name_reserved(alias)  # type: ignore[no-untyped-call]


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
    if not isinstance(store, SqlAlchemyStore):
        with ThreadPoolExecutor(REQUESTS) as pool:
            answers = pool.map(lambda run_id: client.get_metric_history(run_id, key), run_ids)
            return {
                run_id: [MetricPoint(m.step, m.timestamp, m.value) for m in points] for run_id, points in zip(run_ids, answers, strict=True)
            }
    found: dict[str, list[MetricPoint]] = {run_id: [] for run_id in run_ids}
    columns = SqlMetric.run_uuid, SqlMetric.step, SqlMetric.timestamp, SqlMetric.value, SqlMetric.is_nan
    with store.ManagedSessionMaker() as session:
        for run_id, step, at_ms, value, is_nan in session.query(*columns).filter(SqlMetric.key == key, SqlMetric.run_uuid.in_(run_ids)):
            found[run_id].append(MetricPoint(step, at_ms, float("nan") if is_nan else value))
    return found
