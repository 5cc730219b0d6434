"""What is known of a store before a run begins."""

import fcntl
import http.server
import json
import os
import sqlite3
import string
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import mlflow
import pytest
import requests
import sqlalchemy.exc
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from bdh_mlflow.config import TrackingConfig
from bdh_mlflow.errors import TrackingError
from bdh_mlflow.tracking import database
from bdh_mlflow.tracking import store as stores
from bdh_mlflow.tracking.status import overruled
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


@pytest.mark.slow  # four processes that import MLflow: the race is between processes
def test_processes_that_open_a_new_database_at_once_take_turns(tmp_path: Path) -> None:
    code = "import sys; from bdh_mlflow.tracking import store; print(len(store.client_of(sys.argv[1]).search_experiments()))"
    command = [sys.executable, "-c", code, f"sqlite:///{tmp_path}/new.db"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) for _ in range(4)]
    assert [process.communicate(timeout=120)[0] for process in processes] == ["1\n"] * 4
    assert [p.name for p in tmp_path.iterdir()] == ["new.db"], "no lock is left behind"


def test_folder_of_a_new_database_is_made_and_one_that_is_being_opened_is_waited_for(tmp_path: Path, monkeypatch: Any) -> None:
    stores.client_of(f"sqlite:///{tmp_path}/new/deeper/my.db")
    assert (tmp_path / "new/deeper/my.db").is_file()
    assert [p.name for p in (tmp_path / "new/deeper").iterdir()] == ["my.db"], "no lock is left behind"
    monkeypatch.setattr(database, "OPENING_S", 0.1)
    (tmp_path / "busy").mkdir()
    held = os.open(tmp_path / "busy/.my.db.opening", os.O_RDWR | os.O_CREAT)
    fcntl.flock(held, fcntl.LOCK_EX)
    try:
        with pytest.raises(OSError, match="database is locked: another process has been opening it"):
            stores.client_of(f"sqlite:///{tmp_path}/busy/my.db")
        assert not probe_store(TrackingConfig(tracking_uri=f"sqlite:///{tmp_path}/busy/my.db"), None).reachable
    finally:
        os.close(held)


def test_a_lock_that_a_user_holds_on_the_folder_holds_up_nothing(store: MlflowClient, tmp_path: Path) -> None:
    """`flock . bdh-mlflow train`, as in many a crontab."""
    held = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    try:
        assert probe_store(CONFIG, None).reachable
    finally:
        os.close(held)


@pytest.mark.parametrize(
    ("what", "words"), [("folder", "is no file"), ("read-only", "no permission to write"), ("below a file", "not a folder")]
)
def test_database_that_can_never_be_written_is_refused_at_once(tmp_path: Path, monkeypatch: Any, what: str, words: str) -> None:
    file = tmp_path / "my.db"
    if what == "folder":
        file.mkdir()
    elif what == "read-only":
        file.touch()
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != file)  # the tests may run as root, who may write everything
    else:
        file.touch()
        file = file / "my.db"
    with pytest.raises(TrackingError, match=words):
        probe_store(TrackingConfig(tracking_uri=f"sqlite:///{file}"), None)


def test_folder_in_which_mlflow_cannot_make_a_database_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / 'it\'s "mine"').mkdir()
    monkeypatch.chdir(tmp_path / 'it\'s "mine"')
    with pytest.raises(TrackingError, match="its name holds both kinds of quotes; start in another folder"):
        probe_store(CONFIG, None)


def test_folder_whose_name_mlflow_cannot_write_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "caf\udce9").mkdir()
    monkeypatch.chdir(tmp_path / "caf\udce9")
    with pytest.raises(TrackingError, match=r"caf\\xe9: MLflow cannot keep a database in a folder whose name is not UTF-8"):
        probe_store(CONFIG, None)


def test_default_database_lies_in_a_folder_of_any_name_and_makes_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow makes the parent of the URI as it is quoted: a folder `my%20project` beside `my project`."""
    (tmp_path / "my #project é").mkdir()
    monkeypatch.chdir(tmp_path / "my #project é")
    stores.client_of(stores.tracking_uri(CONFIG))
    assert [p.name for p in tmp_path.iterdir()] == ["my #project é"]
    assert Path("mlflow.db").stat().st_size


def test_database_that_was_left_half_made_is_said_to_be_so(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "half.db") as half:
        half.execute("create table runs (run_uuid text)")
    with pytest.raises(TrackingError, match=r"was left half made .* If it holds no runs yet, remove the file"):
        stores.client_of(f"sqlite:///{tmp_path}/half.db")


def test_database_server_that_refuses_the_password_is_refused_at_once_and_one_that_is_down_is_waited_for(monkeypatch: Any) -> None:
    said = {
        "FATAL: password authentication failed for user": False,
        "connection refused": True,
        'FATAL: database "x" does not exist': False,
    }
    for text, waited_for in said.items():

        def refuse(*given: Any, text: str = text, **named: Any) -> None:
            raise sqlalchemy.exc.OperationalError("connect", {}, Exception(text))

        monkeypatch.setattr(sqlalchemy, "create_engine", refuse)
        tracking = TrackingConfig(tracking_uri="postgresql://me@host/x")
        if waited_for:
            assert not probe_store(tracking, None).reachable
        else:
            with pytest.raises(TrackingError, match=text.split()[-1]):
                probe_store(tracking, None)


def made(store: MlflowClient, monkeypatch: pytest.MonkeyPatch, **tags: str) -> str:
    """A run as `mlflow run` makes it, named by MLFLOW_RUN_ID."""
    known = store.get_experiment_by_name("bdh")
    experiment_id = known.experiment_id if known else store.create_experiment("bdh")
    run_id = str(store.create_run(experiment_id, tags=tags).info.run_id)
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    return run_id


def test_run_that_mlflow_run_has_made_is_taken_while_it_is_fresh(store: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = made(store, monkeypatch)
    store.log_param(run_id, "config", "a.yaml")
    store.log_metric(run_id, "system/cpu_utilization_percentage", 5.0)
    assert probe_store(CONFIG, None).reachable
    store.log_metric(run_id, "train/loss", 5.0)
    with pytest.raises(TrackingError, match=f"run {run_id} .* holds another training already; unset MLFLOW_RUN_ID .* --resume {run_id}"):
        probe_store(CONFIG, None)
    assert probe_store(CONFIG, continues=run_id).reachable, "it goes on in that very run"


@pytest.mark.parametrize("tag", ["bdh.training", "bdh.segment", "bdh.sweep", "bdh.continues"])
def test_run_of_another_training_is_not_taken(store: MlflowClient, monkeypatch: pytest.MonkeyPatch, tag: str) -> None:
    made(store, monkeypatch, **{tag: "a" * 32})
    with pytest.raises(TrackingError, match="holds a sweep already" if tag == "bdh.sweep" else "holds another training already"):
        probe_store(CONFIG, None)


def test_deleted_or_unknown_run_of_the_environment_is_refused_at_the_door(store: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = made(store, monkeypatch)
    store.delete_run(run_id)
    for continues in (None, "a" * 32):
        with pytest.raises(TrackingError, match=rf"{run_id}, which is deleted; restore it \(mlflow runs restore --run-id {run_id}\)"):
            probe_store(CONFIG, continues)
    monkeypatch.setenv("MLFLOW_RUN_ID", "b" * 32)
    with pytest.raises(TrackingError, match=r"which is not at sqlite.*unset MLFLOW_RUN_ID"):
        probe_store(CONFIG, None)


def test_experiment_of_the_environment_that_is_overruled_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert overruled(CONFIG) is None
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "bdh")
    assert overruled(CONFIG) is None
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "7")
    words = "MLFLOW_EXPERIMENT_NAME=mine and MLFLOW_EXPERIMENT_ID=7 overruled by tracking.experiment bdh"
    assert overruled(CONFIG) == words


@pytest.mark.parametrize(
    ("root", "words"),
    [
        ("gs://bucket/x", r"pip install 'bdh-mlflow\[gcs\]'"),
        ("abfss://f@a/x", r"pip install 'bdh-mlflow\[azure\]'"),
        ("foo://x", "knows no artifact store"),
    ],
)
def test_artifact_root_that_this_machine_cannot_reach_is_refused_with_what_is_missing(store: MlflowClient, root: str, words: str) -> None:
    store.create_experiment("bdh", artifact_location=root)
    with pytest.raises(TrackingError, match=words):
        probe_store(CONFIG, None)


def test_artifacts_are_looked_for_where_mlflow_puts_them_whatever_the_folder_is_called(tmp_path: Path) -> None:
    for letter in string.printable.replace("/", ""):
        for name in (f"a{letter}b", f"a%{letter}1", "a%2Fb"):
            for uri in (str(tmp_path / name), (tmp_path / name).as_uri()):
                if uri.startswith("/") and set("?#") & set(uri):  # MLflow takes neither in a location without a scheme
                    continue
                (tmp_path / "file").write_bytes(letter.encode())
                get_artifact_repository(uri).log_artifact(str(tmp_path / "file"))
                folder = stores.local_path(uri)
                assert folder is not None
                assert (folder / "file").read_bytes() == letter.encode(), uri


@pytest.mark.parametrize(
    ("error", "invalid"),
    [
        (UnicodeEncodeError("utf-8", "\udce9", 0, 1, "surrogates not allowed"), True),
        (ModuleNotFoundError("No module named 'boto3'"), True),
        (TypeError("unhashable"), True),
        (NotImplementedError(), True),
        (MlflowException("a#b is no name", error_code=2), False),
        (MlflowException.invalid_parameter_value("no name"), True),
        (MlflowException.invalid_parameter_value("must be in the 'active' state"), False),
        (requests.exceptions.ConnectionError(), False),
        (requests.exceptions.JSONDecodeError("no JSON", "<html>", 0), False),
        (json.JSONDecodeError("no JSON", "<html>", 0), False),
        (OSError(28, "No space left on device"), False),
        (AttributeError("an answer of a proxy"), False),
    ],
)
def test_what_cannot_be_mended_by_waiting_is_told_from_an_outage(error: Exception, invalid: bool) -> None:
    assert stores.is_invalid(error) is invalid


def test_server_that_does_not_know_a_request_is_named_with_both_versions() -> None:
    class Old(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"2.22.5")

        def log_message(self, *args: Any) -> None:
            """Nothing."""

    with http.server.HTTPServer(("127.0.0.1", 0), Old) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        unknown = MlflowException("API request to endpoint /api/2.0/mlflow/logged-models failed with error code 404 != 200.")
        said = stores.explained(unknown, f"http://127.0.0.1:{server.server_port}")
    assert f"it runs MLflow 2.22.5, which does not know what MLflow {mlflow.__version__} asks of it" in said
    missing = MlflowException("error code 404 != 200. Response body: RESOURCE_DOES_NOT_EXIST: no such run")
    assert stores.explained(missing, "http://127.0.0.1:1") == str(missing)
    assert stores.explained(unknown, "sqlite:///x.db") == str(unknown)
