"""What we use of MLflow beyond its documented interface still does what we rely on."""

import json
import os
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import scoring_server
from mlflow.pyfunc.model import PythonModel
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.types.schema import ColSpec, DataType, Schema

from bdh_mlflow.tracking import mlflow_internals, routes
from bdh_mlflow.tracking.mlflow_internals import check_model_alias, check_model_name, default_store
from bdh_mlflow.tracking.routes import RoutedRepository
from scripts.servers import serving


@pytest.mark.parametrize(("name", "accepted"), [("bdh", True), ("bdh small", True), ("a/b", False), ("a:b", False), ("", False)])
def test_model_names_are_checked_as_the_registry_does(name: str, accepted: bool) -> None:
    if accepted:
        check_model_name(name)
    else:
        with pytest.raises(MlflowException):
            check_model_name(name)


@pytest.mark.parametrize(
    ("alias", "accepted"), [("champion", True), ("latest", False), ("Latest", False), ("v1", False), ("a b", False), ("", False)]
)
def test_model_aliases_are_checked_as_the_registry_does(alias: str, accepted: bool) -> None:
    if accepted:
        check_model_alias(alias)
    else:
        with pytest.raises(MlflowException):
            check_model_alias(alias)


def test_default_store_is_where_a_database_looks_up_the_source_of_a_model_version(store: MlflowClient, empty_store: Path) -> None:
    """And only while it is set: `store` is the default of the process, the model is in another one."""
    default = os.environ["MLFLOW_TRACKING_URI"]
    other = MlflowClient(f"sqlite:///{empty_store.with_name('other.db')}")
    empty_store.with_name("other.db").write_bytes(empty_store.read_bytes())
    experiment = other.create_experiment("bdh")
    run = other.create_run(experiment)
    model = other.create_logged_model(experiment, "tiny", run.info.run_id)
    other.create_registered_model("tiny")
    source = f"models:/{model.model_id}"
    with pytest.raises(MlflowException):
        other.create_model_version("tiny", source, model_id=model.model_id)
    with default_store(other.tracking_uri):
        version = other.create_model_version("tiny", source, model_id=model.model_id)
    assert (version.source, version.run_id) == (source, run.info.run_id)
    assert other.get_model_version_download_uri("tiny", version.version) == model.artifact_location
    assert os.environ["MLFLOW_TRACKING_URI"] == default


def logged(client: MlflowClient, values: list[float]) -> str:
    experiment = client.get_experiment_by_name("bdh")
    run = client.create_run(experiment.experiment_id if experiment else client.create_experiment("bdh"))
    client.log_batch(run.info.run_id, [Metric("train/loss", value, 1000 + i, i) for i, value in enumerate(values)])
    return str(run.info.run_id)


def check_histories(client: MlflowClient) -> None:
    runs = [logged(client, values) for values in ([3.0, float("nan"), 2.0, float("inf")], [1.0], [])]
    client.log_metric(runs[0], "train/loss", 1.5, timestamp=2000, step=1)
    client.log_metric(runs[0], "val/loss", 9.0, step=1)
    histories = mlflow_internals.metric_histories(client, runs, "train/loss")
    assert [len(histories[run_id]) for run_id in runs] == [5, 1, 0]
    for run_id in runs:
        given = [(m.step, m.timestamp, m.value) for m in client.get_metric_history(run_id, "train/loss")]
        assert sorted(repr(tuple(point)) for point in histories[run_id]) == sorted(map(repr, given))


def test_metric_histories_of_a_database_are_those_that_the_client_gives(store: MlflowClient) -> None:
    check_histories(store)


@pytest.mark.slow
def test_metric_histories_of_a_server_are_those_that_the_client_gives(empty_store: Path, tmp_path: Path) -> None:
    with serving(empty_store, tmp_path / "server") as server:
        check_histories(server.client)


@pytest.mark.slow
def test_put_stores_a_file_as_the_client_does(empty_store: Path, tmp_path: Path) -> None:
    """One request, the same bytes under the same path; whether MLflow would cut it into parts is its own answer."""
    content = b"\x00checkpoint" * 1000
    (tmp_path / "a.pt").write_bytes(content)
    with serving(empty_store, tmp_path / "server") as server:
        run = server.client.create_run(server.client.create_experiment("bdh"))
        routes.install()
        repository = get_artifact_repository(run.info.artifact_uri, tracking_uri=server.uri)
        assert isinstance(repository, RoutedRepository)
        assert repository.is_single_request(tmp_path / "a.pt")
        with (tmp_path / "a.pt").open("rb") as file:
            repository.put("checkpoints/a.pt", file)
        (stored,) = server.client.list_artifacts(run.info.run_id, "checkpoints")
        assert (stored.path, stored.file_size) == ("checkpoints/a.pt", len(content))
        assert Path(server.client.download_artifacts(run.info.run_id, stored.path, str(tmp_path))).read_bytes() == content


class Echo(PythonModel):
    """Answers with the column `x`, and refuses a request that holds "no"."""

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> list[str]:
        return [str(x) for x in model_input["x"]]

    def check_request(self, body: bytes, content_type: str | None) -> None:
        if b"no" in body:
            raise MlflowException("as sent", error_code=INVALID_PARAMETER_VALUE)


class Plain(PythonModel):
    """The same without a check."""

    predict = Echo.predict


def test_a_model_sees_a_request_before_the_server_converts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring_server, "invocations", scoring_server.invocations)
    mlflow_internals.check_requests()
    once = scoring_server.invocations
    mlflow_internals.check_requests()
    assert scoring_server.invocations is once, "not a wrapper around the wrapper with every model that is loaded"
    schema = Schema([ColSpec(DataType.string, "x")])

    def ask(python_model: PythonModel, body: str) -> Any:
        folder = tmp_path / type(python_model).__name__
        if not folder.exists():
            mlflow.pyfunc.save_model(
                str(folder),
                python_model=python_model,
                signature=ModelSignature(schema),
                input_example=pd.DataFrame({"x": ["a"]}),
                pip_requirements=["mlflow"],
            )
        return scoring_server.invocations(body.encode(), "application/json", mlflow.pyfunc.load_model(str(folder)), schema)

    assert json.loads(ask(Echo(), '{"inputs": {"x": [null]}}').response) == {"predictions": ["None"]}
    assert json.loads(ask(Plain(), '{"inputs": {"x": ["no"]}}').response) == {"predictions": ["no"]}
    with pytest.raises(MlflowException, match="as sent"):
        ask(Echo(), '{"inputs": {"x": ["no"]}}')
    unreadable = '{"dataframe_split": {"columns": [{}], "data": [[1]]}}'
    with pytest.raises(MlflowException, match="the request cannot be read: TypeError") as refused:
        ask(Echo(), unreadable)
    assert refused.value.get_http_status_code() == 400
    with pytest.raises(TypeError):
        ask(Plain(), unreadable)
