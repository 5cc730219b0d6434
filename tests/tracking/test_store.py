"""What is known of a store before a run begins."""

from pathlib import Path

import pytest
from mlflow import MlflowClient

from bdh_mlflow.config import TrackingConfig
from bdh_mlflow.errors import TrackingError
from bdh_mlflow.tracking.store import connect, probe_store

CONFIG = TrackingConfig()


def test_unusable_store_is_an_error_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    with pytest.raises(TrackingError, match=r"http://me:\*\*\*@127.0.0.1:9 cannot be used") as caught:
        connect(CONFIG)
    assert "secret" not in str(caught.value)
    assert not probe_store(CONFIG, None).reachable


def test_database_that_cannot_be_opened_is_refused_at_the_door(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TrackingError, match="cannot be used"):
        probe_store(TrackingConfig(tracking_uri=f"sqlite:///{tmp_path}/file/m.db"), None)
    for uri in (f"sqlite:///{tmp_path}/file/m.db", "nonsense://somewhere"):
        with pytest.raises(TrackingError, match="cannot be used"):
            connect(TrackingConfig(tracking_uri=uri))


def test_experiment_whose_artifacts_only_a_server_can_store_is_refused(store: MlflowClient) -> None:
    store.create_experiment("bdh", artifact_location="mlflow-artifacts:/1")
    with pytest.raises(TrackingError, match="made by an MLflow server, which alone can store its artifacts"):
        probe_store(CONFIG, None)


def test_deleted_experiment_is_refused_with_the_command_that_restores_it(store: MlflowClient) -> None:
    experiment = store.create_experiment("bdh")
    store.delete_experiment(experiment)
    with pytest.raises(TrackingError, match=f"mlflow experiments restore -x {experiment}"):
        probe_store(CONFIG, None)


def test_tracking_uri_that_mlflow_run_does_not_use_is_refused(store: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    with pytest.raises(TrackingError, match="Set MLFLOW_TRACKING_URI=http://elsewhere instead"):
        connect(TrackingConfig(tracking_uri="http://elsewhere"))
