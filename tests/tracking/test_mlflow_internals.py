"""What we use of MLflow beyond its documented interface still does what we rely on."""

import os
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from bdh_mlflow.tracking.mlflow_internals import check_model_alias, check_model_name, default_store


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
