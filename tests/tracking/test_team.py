"""A team's stores, real ones: PostgreSQL, an S3 store, an MLflow server before them, with a login, by every way that files can go."""

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import pandas as pd
import pytest
import requests
from mlflow import MlflowClient

from bdh_mlflow import checkpoint
from bdh_mlflow.cli.doctor import artifact_root
from bdh_mlflow.tracking import journal, routes, sync
from bdh_mlflow.tracking.artifacts import Artifacts
from bdh_mlflow.tracking.lane import Patience
from bdh_mlflow.tracking.mlflow_internals import ServerRepository
from bdh_mlflow.tracking.records import Points
from scripts.relay import Answer, Relay
from scripts.team import ADMIN, BUCKET, NEXT_MLFLOW, Mode, ObjectStore, PostgreSQL, Team, TeamServer
from tests.conftest import history, only_run, run_cli, train, wait_for
from tests.stores import needs_stores
from tests.tracking.test_kills import program
from tests.tracking.tracked import TrackedRun, entries, quiet

pytestmark = needs_stores


@contextlib.contextmanager
def serving(stores: Team, mode: Mode = "proxied", *, login: bool = False) -> Iterator[TeamServer]:
    server = TeamServer(stores, mode, login=login)
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def server(stores: Team) -> Iterator[TeamServer]:
    with serving(stores) as started:
        yield started


@pytest.fixture
def client(server: TeamServer, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """Of the server through which all goes; this machine has no access to the S3 store itself."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    return MlflowClient(server.uri)


def whole_training(tiny: Path, client: MlflowClient, experiment: str) -> str:
    """Train, verify, lose the folder, resume from the artifact path.   Returns the run's id."""
    named = f"tracking.experiment={experiment}"
    assert train(tiny, named).exit_code == 0
    run = only_run(client, experiment)
    assert run.info.status == "FINISHED"
    assert len(history(client, run.info.run_id, "train/loss")) == 6
    (run_dir,) = checkpoint.list_all(Path("checkpoints"))
    kept = {file.name: file.read_bytes() for file in run_dir.glob("checkpoint_*.pt")}
    verified = run_cli("checkpoints", "verify", run.info.run_id, "--config", str(tiny))
    assert "2 intact, 0 damaged" in verified.output
    shutil.rmtree("checkpoints")
    target = f"runs:/{run.info.run_id}/checkpoints/{run_dir.name}/checkpoint_3.pt"
    assert train(tiny, named, resume=target).exit_code == 0
    assert only_run(client, experiment).info.run_id == run.info.run_id
    assert len(history(client, run.info.run_id, "train/loss")) == 6  # the same points again
    assert (run_dir / "checkpoint_6.pt").stat().st_size == len(kept["checkpoint_6.pt"])
    assert history(client, run.info.run_id, "resume/replay_max_abs_diff")[-1][1] == 0.0
    tags = client.get_run(run.info.run_id).data.tags
    assert tags["bdh.latest_checkpoint"].endswith("checkpoint_6.pt")
    return str(run.info.run_id)


def test_a_training_through_the_server_is_whole_and_its_model_registered_compared_and_listed(
    client: MlflowClient, text: Path, tiny: Path
) -> None:
    run_id = whole_training(tiny, client, "proxied")
    listed = run_cli("checkpoints", "list", run_id, "--config", str(tiny))
    assert listed.output.count("checkpoint_") == 2
    compared = run_cli("compare", run_id, "--out", "page.html", "--config", str(tiny))
    assert compared.exit_code == 0, compared.output
    registered = run_cli("checkpoints", "register", run_id, "--name", "team", "--alias", "best", "--config", str(tiny))
    assert registered.exit_code == 0, registered.output
    model = mlflow.pyfunc.load_model("models:/team@best")  # as `mlflow models serve` does
    assert len(model.predict(pd.DataFrame({"prompt": ["def "]}), params={"max_new_tokens": 4})) == 1


def test_training_that_was_killed_with_its_sender_is_delivered_by_sync(client: MlflowClient, text: Path, tiny: Path) -> None:
    endless = ("training.max_iters=1000000", "training.checkpoint_freq=20", "tracking.experiment=killed", "training.keep_checkpoints=2")
    trained = program(tiny, *endless)
    wait_for(lambda: [each for each in checkpoint.list_all(Path("checkpoints")) if len(checkpoint.list_run(each).checkpoints) > 1])
    trained.kill_all()
    (run_dir,) = checkpoint.list_all(Path("checkpoints"))
    synced = run_cli("sync", str(run_dir))
    assert (synced.exit_code, " 0 left" in synced.output) == (0, True), synced.output
    run = only_run(client, "killed")
    told = [e.record.step for e in entries(run_dir) if isinstance(e.record, Points) and "train/loss" in e.record.values]
    assert [step for step, _ in history(client, run.info.run_id, "train/loss")] == told
    assert (run.info.status, run.data.tags["bdh.stop_reason"]) == ("KILLED", "killed")
    verified = run_cli("checkpoints", "verify", run.info.run_id, "--config", str(tiny))
    assert " 0 damaged" in verified.output


def test_files_go_straight_to_the_bucket_where_the_server_takes_none(
    stores: Team, text: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in stores.s3.variables.items():
        monkeypatch.setenv(name, value)
    with serving(stores, "direct") as direct:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", direct.uri)
        run_id = whole_training(tiny, MlflowClient(direct.uri), "direct")
        root = MlflowClient(direct.uri).get_run(run_id).info.artifact_uri
        assert root.startswith(f"s3://{BUCKET}/mlflow/")
        (run_dir,) = checkpoint.list_all(Path("checkpoints"))
        shutil.rmtree("checkpoints")
        resumed = train(tiny, "training.max_iters=9", resume=f"{root}/checkpoints/{run_dir.name}/checkpoint_6.pt")
        assert "resumed from" in resumed.output
        found = artifact_root(MlflowClient(direct.uri).get_experiment_by_name("direct"), direct.uri)
        assert (found.good, "a file was written, read and removed" in found.found) == (True, True), found
        MlflowClient(direct.uri).create_experiment("elsewhere", artifact_location="s3://elsewhere/x")
        denied = artifact_root(MlflowClient(direct.uri).get_experiment_by_name("elsewhere"), direct.uri)
        assert (denied.good, "NoSuchBucket" in denied.found) == (False, True), denied


@pytest.mark.skipif(not NEXT_MLFLOW.exists(), reason=f"MLflow 3.18 is not in {NEXT_MLFLOW}")
def test_server_that_takes_files_at_signed_addresses_only_gets_them_there(
    stores: Team, text: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(stores, "presigned-only") as signing:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", signing.uri)
        client = MlflowClient(signing.uri)
        run_id = whole_training(tiny, client, "presigned only")
        registered = run_cli("checkpoints", "register", run_id, "--name", "signed", "--config", str(tiny))
        assert registered.exit_code == 0, registered.output
        artifacts = Artifacts(client.get_run(run_id).info.artifact_uri, signing.uri)
        artifacts.put_text("", "empty.txt")
        assert artifacts.read("empty.txt") == b""


@pytest.mark.parametrize("trouble", ["refused", "nobody there"])
def test_store_that_only_the_server_can_reach_gets_large_files_through_the_server(
    stores: Team, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    """What is signed fails here, whatever the server advertises: noticed once, said once."""
    relay = Relay(stores.s3.port, trouble=lambda line: Answer(403) if "X-Amz-Signature" in line else None)
    reached = {**stores.s3.variables, "AWS_ENDPOINT_URL": relay.uri, "MLFLOW_S3_ENDPOINT_URL": relay.uri}
    monkeypatch.setattr(type(stores.s3), "variables", reached)
    with serving(stores, "presigned") as advertising:
        if trouble == "nobody there":
            monkeypatch.setattr(ServerRepository, "create_multipart_upload", unreachable)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", advertising.uri)
        monkeypatch.setattr(routes, "LARGE_UPLOAD_BYTES", 1000)
        tracked = TrackedRun(tmp_path, advertising.uri, experiment=trouble, training=f"{len(trouble):032}")
        saved = [tracked.save(step, 3.0 - step) for step in (1, 2)]
        assert tracked.close() == 0
        assert [note for note in tracked.notes if "files go through the server" in note] == tracked.notes
        assert len(tracked.notes) == 1
        client = MlflowClient(advertising.uri)
        assert client.get_run(tracked.run_id).data.tags["bdh.latest_checkpoint"] == saved[-1].manifest.artifact_path
        artifacts = Artifacts(client.get_run(tracked.run_id).info.artifact_uri, advertising.uri)
        assert artifacts.read(saved[0].manifest.artifact_path) == saved[0].path.read_bytes()
    relay.close()


def unreachable(*args: Any, **kwargs: Any) -> Any:
    raise ConnectionRefusedError("nobody listens there")


def test_large_files_go_to_the_store_in_parts_where_the_server_offers_it(
    stores: Team, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    relay = Relay(stores.s3.port)
    reached = {**stores.s3.variables, "AWS_ENDPOINT_URL": relay.uri, "MLFLOW_S3_ENDPOINT_URL": relay.uri}
    monkeypatch.setattr(type(stores.s3), "variables", reached)
    with serving(stores, "presigned") as offering:
        artifacts = Artifacts(f"mlflow-artifacts:/parts-{offering.port}", offering.uri)
        file = tmp_path / "large.pt"
        with file.open("wb") as content:
            for _ in range(12):
                content.write(os.urandom(10_000_000))
        artifacts.put(file, "checkpoints")
        assert artifacts.sizes("checkpoints") == {"large.pt": 120_000_000}
        assert len([line for line in relay.requests if line.startswith("PUT") and "X-Amz-Signature" in line]) >= 10
        assert artifacts.fetch("checkpoints/large.pt", tmp_path / "..").read_bytes() == file.read_bytes()
    relay.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("which", ["postgres", "s3"])
def test_store_that_fails_in_the_middle_gets_everything_in_the_end(
    stores: Team, server: TeamServer, client: MlflowClient, tmp_path: Path, which: str, number: signal.Signals
) -> None:
    """To the end of the training and longer: the end comes within seconds, and `sync` delivers."""
    patience = Patience(batch_interval_s=0.05, first_retry_s=0.1, last_retry_s=0.5, server_exit_s=4.0, probe_s=0.5)
    experiment, frozen = f"{which} {number.name}", number == signal.SIGSTOP  # a thread that hangs in a request would keep the journal
    training = f"{len(experiment):031}{which[0] == 's':d}"
    tracked = TrackedRun(tmp_path, server.uri, experiment=experiment, training=training, patience=patience, process=frozen)
    run_id, program = tracked.run_id, getattr(stores, which)
    tracked.losses(*range(1, 20))
    tracked.save(10, 2.0)
    wait_for_delivery(tracked)
    program.signal(number)
    try:
        tracked.losses(*range(20, 40))
        saved = tracked.save(30, 1.0)
        started = time.monotonic()
        left = tracked.close()
        took_s = time.monotonic() - started
    finally:
        restore(program, number)
    assert left > 0
    assert took_s < 20, "the other store's answers are no reason to wait"
    assert sync.sync(tracked.directory.path, server.uri, quiet).left == 0
    assert history(client, run_id, "train/loss") == [(step, float(step)) for step in range(1, 40)]
    run = client.get_run(run_id)
    assert (run.info.status, run.data.tags["bdh.latest_checkpoint"]) == ("FINISHED", saved.manifest.artifact_path)
    blamed = [note for note in tracked.notes if "does not answer" in note]
    assert all(("artifact store" in note) == (which == "s3") for note in blamed), "\n".join(tracked.notes)


def wait_for_delivery(tracked: TrackedRun) -> None:
    def is_delivered() -> bool:
        with journal.reading(tracked.directory.folder) as reader:
            return reader.index.waiting(reader.delivered()) <= 1  # the end of the run is what is left

    wait_for(is_delivered, 20, lambda: tracked.notes)


def restore(program: PostgreSQL | ObjectStore, number: signal.Signals) -> None:
    if number == signal.SIGSTOP:
        program.signal(signal.SIGCONT)
    else:
        program.start()


def test_login_without_the_right_to_make_runs_ends_the_start_with_the_reason(
    stores: Team, text: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(stores, login=True) as guarded:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", guarded.uri)
        for name, value in ADMIN.items():
            monkeypatch.setenv(name, value)
        assert train(tiny, "tracking.experiment=guarded").exit_code == 0
        reader = {"username": "reader", "password": "reader-password-1"}
        admin = ADMIN["MLFLOW_TRACKING_USERNAME"], ADMIN["MLFLOW_TRACKING_PASSWORD"]
        made = requests.post(f"{guarded.uri}/api/2.0/mlflow/users/create", json=reader, auth=admin, timeout=60)
        assert made.status_code == 200, made.text
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", reader["username"])
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", reader["password"])
        refused = train(tiny, "tracking.experiment=guarded")
        assert (refused.exit_code, "may not create runs in experiment guarded" in refused.output) == (1, True)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong-password-1")
        refused = train(tiny, "tracking.experiment=guarded")
        assert (refused.exit_code, "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in refused.output) == (1, True)


def test_database_is_used_directly_and_a_wrong_password_refused_at_once(
    stores: Team, text: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    uri = stores.postgres.uri("mlflow_auth")  # one without an experiment yet
    monkeypatch.setenv("MLFLOW_TRACKING_URI", stores.postgres.uri("mlflow_auth", password="wrong-one"))
    started = time.monotonic()
    refused = train(tiny)
    assert (refused.exit_code, "password authentication failed" in refused.output, "wrong-one" in refused.output) == (1, True, False)
    assert time.monotonic() - started < 10
    monkeypatch.setenv("MLFLOW_TRACKING_URI", stores.postgres.uri("nowhere"))
    assert 'database "nowhere" does not exist' in train(tiny).output
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.replace("psycopg", "psycopg2"))
    assert "pip install 'bdh-mlflow[postgres]'" in train(tiny).output
    assert not Path("checkpoints").exists()
